"""The thread behind all blocking clients of a process: one event loop, made by the first call.

Threads: calls come from any number of them. The asynchronous clients live on the loop, and nothing but the
loop touches them.

Forks: gRPC does not survive one. Its threads exist in the parent only, and a child that inherits what they
worked on waits for them for ever. So before a fork our thread ends, with all connections: after it parent and
child both start anew with their next call. What runs meanwhile in other threads of the parent:

    a wait for the end of a job      is broken off, and goes on after the fork
    any other call                   is waited for, `FORK_PATIENCE_S` at most
    a call that begins               waits for the end of the fork

If that does not work, or something else in the process uses gRPC, too, the fork goes on and the parent
notices nothing; the child refuses calls, since they would hang.
"""

import asyncio
import atexit
import gc
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from silo.client.client import SiloGRPCClient
from silo.client.errors import ClientClosed, SiloClientError
from silo.sync.loop_thread import LoopThread

R = TypeVar("R")

Operation = Callable[[SiloGRPCClient], Coroutine[Any, Any, R]]

FORK_PATIENCE_S = 2.0
_STOP_S = 5.0
_CANCELLED_S = 1.0
_GONE_S = 1.0
_GRPC_THREADS = ("event_engine", "lifeguard", "grpc_", "timer_manager", "default-execut", "resolver-execut")


class Source:
    """Where the asynchronous client of a blocking one comes from, in each process anew."""

    def __init__(self, make: Callable[[], SiloGRPCClient]) -> None:
        self.make = make
        self.is_closed = False


class _Call(Generic[R]):
    """A call under way."""

    def __init__(self, future: "Future[R]", *, resumes: bool) -> None:
        self.future = future
        self.resumes = resumes
        self.was_broken_off = False


class _ClientThread:
    """The loop with the clients on it, and the calls under way."""

    def __init__(self) -> None:
        self._clients: dict[Source, SiloGRPCClient] = {}
        self._calls: set[_Call[Any]] = set()
        self._loop: LoopThread[None] = LoopThread("silo.sync", around=self._living)

    def begin(self, source: Source, operation: Operation[R], *, resumes: bool) -> _Call[R]:
        call = _Call(self._loop.submit(self._perform(source, operation)), resumes=resumes)
        self._calls.add(call)
        call.future.add_done_callback(lambda _: self._calls.discard(call))
        return call

    async def _perform(self, source: Source, operation: Operation[R]) -> R:
        if source.is_closed:
            raise ClientClosed("the client is closed")
        client = self._clients.get(source)
        if client is None:
            client = self._clients[source] = source.make()
        try:
            return await operation(client)
        except SiloClientError as error:
            _drop_traces(error)
            raise

    def close(self, source: Source) -> "Future[None]":
        return self._loop.submit(self._close(source))

    async def _close(self, source: Source) -> None:
        client = self._clients.pop(source, None)
        if client is not None:
            await client.close()

    @asynccontextmanager
    async def _living(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            for source in list(self._clients):
                await self._close(source)
            # What was cancelled is over for gRPC only when its last event has come, which needs the loop.
            if left := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(left, timeout=_CANCELLED_S)

    def settle(self, timeout: float) -> bool:
        """Break off what can be resumed, and wait for the rest; whether nothing is left."""
        if self._loop.is_current:
            return False
        calls = list(self._calls)
        for call in calls:
            if call.resumes:
                call.was_broken_off = True
                call.future.cancel()
        return not wait([call.future for call in calls], timeout).not_done

    def stop(self) -> bool:
        """Close all clients and end; whether that worked."""
        return self._loop.stop(_STOP_S)


class Background:
    """What all blocking clients of a process share."""

    def __init__(self) -> None:
        # Held while a call begins, and all through a fork. Reentrant, for handlers of signals.
        self._lock = threading.RLock()
        self._thread: _ClientThread | None = None
        self._survives_fork = True
        self._is_crippled = False  # By a fork that came at a wrong moment.

    def run(self, source: Source, operation: Operation[R], *, resumes: bool = False) -> R:
        """Run an operation with the client of `source` and wait for it.

        Args:
            resumes: it changes nothing, so a fork may break it off and begin it again.

        Raises:
            RuntimeError: this thread runs an event loop, which would stand still.
            ClientClosed: the client was closed.
            SiloClientError: this process was forked at a wrong moment.
        """
        while True:
            call = self._begin(source, operation, resumes=resumes)
            try:
                return call.future.result()
            except CancelledError:
                if not call.was_broken_off:
                    raise
            finally:
                call.future.cancel()  # Does something only if the wait was interrupted, as by Ctrl-C.

    def begin(self, source: Source, operation: Operation[R]) -> "Future[R]":
        """Begin an operation for a caller who waits later. Raises like `run`."""
        return self._begin(source, operation, resumes=False).future

    def _begin(self, source: Source, operation: Operation[R], *, resumes: bool) -> _Call[R]:
        _check_may_block()
        with self._lock:
            return self._running().begin(source, operation, resumes=resumes)

    def close(self, source: Source) -> None:
        """Close the client of `source`; calls that run on it and later ones raise ClientClosed."""
        _check_may_block()
        source.is_closed = True
        with self._lock:
            if self._thread is None or self._is_crippled:
                return
            closing = self._thread.close(source)
        closing.result()

    def _running(self) -> _ClientThread:
        if self._is_crippled:
            raise SiloClientError(
                "this process was forked while its parent used gRPC, which gRPC does not survive; "
                "fork before the first call, or while no other call runs"
            )
        if self._thread is None:
            self._thread = _ClientThread()
        return self._thread

    def stop(self) -> None:
        """End the thread, at the end of the process."""
        with self._lock:
            if self._thread is not None and not self._is_crippled:
                self._thread.stop()
                self._thread = None

    # Forks

    def before_fork(self) -> None:
        self._lock.acquire()
        thread = self._thread
        if thread is not None:
            self._survives_fork = False
            if thread.settle(FORK_PATIENCE_S):
                self._thread = None
                self._survives_fork = thread.stop() and _is_grpc_gone()

    def after_fork_in_parent(self) -> None:
        self._survives_fork = True
        self._lock.release()

    def after_fork_in_child(self) -> None:
        # A thread that is still there is kept: to destroy what belongs to gRPC would hang, too.
        self._is_crippled |= self._thread is not None or not self._survives_fork
        self._lock = threading.RLock()


def _check_may_block() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(
        "SiloClient would block the event loop of this thread; use SiloGRPCClient in async code"
    )


def _drop_traces(error: BaseException | None) -> None:
    """Let go of the frames that an error has passed: who keeps it would keep gRPC's objects over a fork."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _is_grpc_gone() -> bool:
    """Wait until gRPC's own threads have ended, which takes a moment; whether they have."""
    gc.collect()  # Calls, channels and exceptions hold each other in circles.
    deadline = time.monotonic() + _GONE_S
    while any(name.startswith(_GRPC_THREADS) for name in _thread_names()):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.001)
    return True


def _thread_names() -> Iterator[str]:
    """The names that all threads of this process have for the system, where it tells."""
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # It has ended meanwhile.
            yield path.read_text()


BACKGROUND = Background()
atexit.register(BACKGROUND.stop)
if hasattr(os, "register_at_fork"):  # Not on Windows, which has no fork.
    os.register_at_fork(
        before=BACKGROUND.before_fork,
        after_in_parent=BACKGROUND.after_fork_in_parent,
        after_in_child=BACKGROUND.after_fork_in_child,
    )
