"""The child's side of a process execution: takes a job, runs its handler, answers, again and again.

Handlers run in the main thread, as they would in a script. A second thread listens to what the worker
says meanwhile. When the worker is gone, both channels end: an idle child ends with the socket, and a
running handler is ended as by STOP.

A handler is ended by a SystemExit where it is, so that it can clean up. SIGTERM alone does nothing: a
service manager sends it to all processes of a service, but the worker decides what becomes of the jobs.
"""

import asyncio
import io
import os
import pickle
import queue
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO  # What handlers take and return is the application's.

from silo.worker.errors import error_data
from silo.worker.execution.blocking import BlockingTaskContext
from silo.worker.execution.exceptions import write_exception
from silo.worker.execution.fitting import name_of
from silo.worker.execution.frames import HEAD_BYTES, Kind, Setup, frame, read_head
from silo.worker.execution.main_module import MainModule, import_main

CLEAN_UP_S = 2.0  # How long a child may take to end, once it should.
RESULT_BYTES_MAX = 256 * 1024 * 1024  # Pickled. More would be too much for the worker, and for any server.


def serve(*, socket_fd: int, control_fd: int) -> None:
    """Run jobs until the worker closes the socket."""
    for fd in (socket_fd, control_fd):
        os.set_inheritable(fd, False)  # Not for the processes that handlers start.
    control = Control(control_fd)
    signal.signal(signal.SIGTERM, control.on_sigterm)
    _leave_forks_alone()
    threading.Thread(target=control.listen, name="silo-control", daemon=True).start()
    with socket.socket(fileno=socket_fd) as worker, worker.makefile("rb") as frames:
        _Jobs(worker, frames, control).serve()


def _leave_forks_alone() -> None:
    """Let SIGTERM end the processes that a handler forks: they are its own affair."""
    sigterm = {signal.SIGTERM}

    def in_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, sigterm)

    os.register_at_fork(  # Blocked meanwhile, so that one that comes at once is not lost.
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, sigterm),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, sigterm),
        after_in_child=in_child,
    )


class Control:
    """What the worker says while a handler runs."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._changed = threading.Condition()
        self._cancelled = 0  # The last job that was. Earlier ones are over, and later ones not begun.
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._is_stopping = False
        self._is_told = False
        self.is_busy = False  # The main thread runs the application's code.

    def listen(self) -> None:
        """Hear the worker until it is gone; then end this process."""
        with open(self._fd, "rb") as pipe:  # noqa: PTH123  # It has no path.
            while (received := read_frame(pipe)) is not None:
                self._hear(*received)
        if self.is_busy:  # Otherwise the main thread sees the same, and comes to its end by itself.
            self._stop()
        time.sleep(CLEAN_UP_S)
        os._exit(1)  # Whatever still runs here, a handler or its threads, does not care.

    def _hear(self, kind: Kind, body: bytes) -> None:
        match kind:
            case Kind.CANCELLED:
                with self._changed:
                    self._cancelled = pickle.loads(body)
                    self._changed.notify_all()
            case Kind.ANSWERED:
                self._answers.put(pickle.loads(body))
            case Kind.STOP:
                self._stop()
            case _:
                raise AssertionError(kind)

    def _stop(self) -> None:
        self._is_stopping = True
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)  # To that thread: it may sit in a system call.

    def on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_stopping and not self._is_told:
            self._is_told = True  # Once is enough: the next would break into the cleaning up.
            sys.exit(128 + signal.SIGTERM)

    def is_cancelled(self, number: int) -> bool:
        return self._cancelled >= number

    def wait_cancelled(self, number: int, timeout_s: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.is_cancelled(number), timeout_s)

    def answer(self) -> str | None:
        """Wait for the answer to a CANCEL."""
        return self._answers.get()


class _Signal:
    """The signal of one job."""

    def __init__(self, control: Control, number: int) -> None:
        self._control = control
        self._number = number

    @property
    def aborted(self) -> bool:
        return self._control.is_cancelled(self._number)

    def wait(self, timeout_s: float | None) -> bool:
        return self._control.wait_cancelled(self._number, timeout_s)


class _Jobs:
    """Takes jobs from the socket and answers them."""

    def __init__(self, worker: socket.socket, frames: BinaryIO, control: Control) -> None:
        self._worker = worker
        self._frames = frames
        self._control = control
        self._sending = threading.Lock()
        self._cancelling = threading.Lock()
        self._number = 0  # Of the job that runs, or ran last.
        self._setup: Setup | None = None

    def serve(self) -> None:
        while (received := read_frame(self._frames)) is not None:
            self._control.is_busy = True
            try:
                answer = self._answer(*received)
            except (Exception, asyncio.CancelledError) as error:  # The edge around user code.
                answer = self._raised(error)
            finally:
                self._control.is_busy = False
            self._send(answer)
            del received, answer  # An idle child holds on to no payload.

    def _answer(self, kind: Kind, body: bytes) -> memoryview:
        if kind is Kind.SETUP:
            setup: Setup = pickle.loads(body)
            self._setup = setup
            sys.path[:] = setup.import_path
            sys.argv[:] = setup.arguments
            self._load(setup.handler)
            return frame(Kind.READY)
        assert kind is Kind.JOB
        self._number += 1
        number = self._number
        handler, task = self._load(body)
        context: BlockingTaskContext[Any, Any] = BlockingTaskContext(
            task, _Signal(self._control, number), lambda: self._cancel(number)
        )
        returned = handler(context)
        try:
            answer = frame(Kind.RETURNED, (self._is_spent(), returned))
        except Exception as error:  # Objects bring their own ways of not being pickled.
            raise TypeError(f"what {name_of(handler)} returned cannot leave its process: {error}") from error
        if len(answer) > RESULT_BYTES_MAX:
            raise ValueError(f"what {name_of(handler)} returned has more than {RESULT_BYTES_MAX} bytes")
        return answer

    def _raised(self, error: BaseException) -> memoryview:
        return frame(Kind.RAISED, (self._is_spent(), error_data(error), write_exception(error)))

    def _load(self, pickled: bytes) -> Any:
        assert self._setup is not None
        return _Unpickler(pickled, self._setup.main).load()

    def _is_spent(self) -> bool:
        assert self._setup is not None
        jobs, megabytes = self._setup.recycle_after_jobs, self._setup.recycle_above_mb
        return (jobs is not None and self._number >= jobs) or (
            megabytes is not None and resident_mb() > megabytes
        )

    def _cancel(self, number: int) -> None:
        with self._cancelling:
            self._send(frame(Kind.CANCEL, number))
            problem = self._control.answer()
        if problem is not None:
            raise RuntimeError(f"the worker could not cancel the job: {problem}")

    def _send(self, data: memoryview) -> None:
        with self._sending:
            self._worker.sendall(data)


class _Unpickler(pickle.Unpickler):
    """Knows that `__main__` is the worker's main module."""

    def __init__(self, pickled: bytes, main: MainModule) -> None:
        super().__init__(io.BytesIO(pickled))
        self._main = main

    def find_class(self, module_name: str, name: str) -> Any:
        if module_name == "__main__":
            import_main(self._main)
        return super().find_class(module_name, name)


def read_frame(stream: BinaryIO) -> tuple[Kind, bytes] | None:
    """The next frame; None at the end of the stream, or if it breaks off."""
    head = stream.read(HEAD_BYTES)
    if len(head) < HEAD_BYTES:
        return None
    kind, length = read_head(head)
    body = stream.read(length)
    return (kind, body) if len(body) == length else None


def resident_mb() -> float:
    """How much memory this process has, in MiB."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # Only Linux says how much it is now. Elsewhere the most that it ever was must do.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    return pages * resource.getpagesize() / 2**20
