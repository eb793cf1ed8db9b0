"""The worker's side of one child process: start it, talk to it, end it."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from silo.worker.execution.frames import HEAD_BYTES, Kind, Setup, frame, read_head

_BOOTSTRAP = Path(__file__).with_name("bootstrap.py")
_END_S = 3.0  # From being asked to end until being killed: longer than children give themselves.
_LAST_WORDS_S = 1.0  # From the end of a process until all that it sent has surely been read.


class ChildEnded(Exception):
    """The child has closed its socket, or is dead. It answers no more."""


class Child:
    """One child process, which runs one job at a time.

    It is a session of its own, so that Ctrl-C does not reach it, and signals reach what it has started.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        control_fd: int,
        transport: asyncio.Transport,
        answers: "_Answers",
    ) -> None:
        self._process = process
        self._control_fd = control_fd
        self._transport = transport
        self._answers = answers
        self._has_ended = asyncio.Event()
        self._jobs = 0
        self.is_spent = False  # It asked to be replaced.

    def __repr__(self) -> str:
        return f"Child(pid {self.pid}, {self._jobs} jobs)"

    @classmethod
    async def start(cls, setup: Setup) -> "Child":
        """A new process. Its first answer is READY or RAISED.

        Raises:
            OSError: the system does not allow one more.
        """
        process, ours, control_fd = _spawn()
        loop = asyncio.get_running_loop()
        try:
            transport, answers = await loop.create_unix_connection(_Answers, sock=ours)
        except BaseException:  # The caller is cancelled, most likely.
            ours.close()
            os.close(control_fd)
            process.kill()
            process.wait()  # So young a process is gone at once.
            raise
        child = cls(process, control_fd=control_fd, transport=transport, answers=answers)
        _when_ended(process, child._ended)
        transport.write(frame(Kind.SETUP, setup))
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return not self._has_ended.is_set() and not self._answers.is_over

    def begin(self, job: memoryview) -> int:
        """Send a job; the number by which it is known."""
        self._jobs += 1
        self._transport.write(job)  # Without a bound, but there is only this one under way.
        return self._jobs

    async def receive(self) -> tuple[Kind, memoryview]:
        """The next that the child says.

        Raises:
            ChildEnded: nothing more will come.
            CancelledError: `interrupt` was called, or the caller is cancelled.
        """
        return await self._answers.receive()

    def interrupt(self) -> None:
        """Cancel whoever waits for an answer, or will."""
        self._answers.interrupt()

    def tell(self, kind: Kind, content: object = None) -> None:
        """Say something through the pipe, which a running handler does not delay.

        Nothing is ever queued: a pipe that is full after so little belongs to a child that hangs or is dead.
        """
        if self._control_fd >= 0:
            with suppress(BlockingIOError, BrokenPipeError):
                os.write(self._control_fd, frame(kind, content))

    async def end(self, *, at_once: bool) -> int:
        """End the process and wait for that; its exit code, below zero for a signal.

        An idle one ends by itself once its channels are closed. One that runs a handler has to be stopped
        `at_once`. One that has not ended some seconds later is killed.
        """
        try:
            if not at_once:
                self._close_channels()
                await self._ends_within(_END_S)
            if not self._has_ended.is_set():
                self.tell(Kind.STOP)
                self._signal(signal.SIGTERM)
                await self._ends_within(_END_S)
        finally:  # Also for a caller that is cancelled and can wait no more.
            self.kill()
            self._close_channels()
        await self._has_ended.wait()
        return self._process.returncode

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def _ends_within(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._has_ended.wait()

    def _signal(self, number: signal.Signals) -> None:
        """To the whole session. Its number is nobody else's, as long as the process was not waited for."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _ended(self) -> None:
        self._process.wait()
        self._has_ended.set()
        # The socket says so, too, unless a process that a handler forked holds its other end.
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._answers.connection_lost, None)

    def _close_channels(self) -> None:
        self._transport.abort()
        if self._control_fd >= 0:
            os.close(self._control_fd)
            self._control_fd = -1


def _spawn() -> tuple[subprocess.Popen[bytes], socket.socket, int]:
    """A new process, and our ends of its socket and its pipe. It takes well under a millisecond."""
    ours, theirs = socket.socketpair()
    control_for_child, control_fd = os.pipe()
    ours.setblocking(False)
    os.set_blocking(control_fd, False)
    fds = theirs.fileno(), control_for_child
    try:
        # asyncio's own way is not the same everywhere: uvloop forks, and lets other descriptors through.
        process = subprocess.Popen(
            [sys.executable, "-P", str(_BOOTSTRAP), *map(str, fds)],
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        os.close(control_fd)
        raise
    finally:
        theirs.close()
        os.close(control_for_child)
    return process, ours, control_fd


class _Answers(asyncio.Protocol):
    """What comes through the socket of a child, frame by frame."""

    def __init__(self) -> None:
        self._data = bytearray()  # Of a frame that has begun.
        self._frames: deque[tuple[Kind, memoryview]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_interrupted = False
        self.is_over = False

    def data_received(self, data: bytes) -> None:
        self._data += data
        while len(self._data) >= HEAD_BYTES:
            kind, length = read_head(self._data)
            end = HEAD_BYTES + length
            if len(self._data) < end:
                return
            rest = self._data[end:]
            del self._data[end:]  # Only the rest was copied: the frame itself may be large.
            self._frames.append((kind, memoryview(self._data)[HEAD_BYTES:]))
            self._data = rest
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_over = True
        self._wake()

    async def receive(self) -> tuple[Kind, memoryview]:
        if self._is_interrupted:
            raise asyncio.CancelledError
        while not self._frames:
            if self.is_over:
                raise ChildEnded
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._frames.popleft()

    def interrupt(self) -> None:
        self._is_interrupted = True
        if self._waiter is not None:
            self._waiter.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _when_ended(process: subprocess.Popen[bytes], told: Callable[[], None]) -> None:
    """Call `told` on the event loop once the process has ended. It is left to be reaped."""
    loop = asyncio.get_running_loop()
    if sys.platform == "linux":
        with suppress(OSError):  # A kernel or a sandbox without it.
            fd = os.pidfd_open(process.pid)

            def on_end() -> None:
                loop.remove_reader(fd)
                os.close(fd)
                told()

            loop.add_reader(fd, on_end)
            return

    def wait() -> None:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(told)

    threading.Thread(target=wait, name=f"silo-child-{process.pid}", daemon=True).start()
