"""An event loop in a thread of its own."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Any, Generic, TypeVar

C = TypeVar("C")
T = TypeVar("T")


class LoopThread(Generic[C]):
    """Runs coroutines for other threads until it is stopped. A daemon: it keeps no process alive."""

    def __init__(self, name: str, *, around: Callable[[], AbstractAsyncContextManager[C]]) -> None:
        """Start the loop; return once `around` was entered on it, which is left again before it ends.

        Raises:
            Exception: what `around` raised; there is no thread then.
        """
        self._tasks: dict[Future[Any], asyncio.Task[Any]] = {}  # Under way.
        self._started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, C]] = Future()
        self._thread = threading.Thread(target=self._run, args=(around,), name=name, daemon=True)
        self._thread.start()
        self._loop, self._end, self.entered = self._started.result()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in this thread."""
        return threading.current_thread() is self._thread

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Begin a coroutine, in the context of the caller. Cancelling the future cancels it.

        The future leads to the result, and to nothing else of what ran: who keeps it keeps none of that.
        """
        future: Future[T] = Future()
        future.add_done_callback(self._cancel_if_cancelled)
        self._loop.call_soon_threadsafe(self._begin, coroutine, future)
        return future

    def _begin(self, coroutine: Coroutine[Any, Any, T], future: "Future[T]") -> None:
        task = self._tasks[future] = self._loop.create_task(coroutine)
        task.add_done_callback(partial(self._ended, future))
        self._cancel_if_cancelled(future)

    def _ended(self, future: "Future[Any]", task: "asyncio.Task[Any]") -> None:
        del self._tasks[future]
        if task.cancelled():
            future.cancel()
        error = None if task.cancelled() else task.exception()
        if not future.set_running_or_notify_cancel():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(task.result())

    def _cancel_if_cancelled(self, future: "Future[Any]") -> None:
        task = self._tasks.get(future)
        if task is not None and future.cancelled():
            with suppress(RuntimeError):  # The loop has ended, and all tasks with it.
                self._loop.call_soon_threadsafe(task.cancel)

    def stop(self, timeout: float) -> bool:
        """Leave `around`, cancel what still runs, and end; whether that took `timeout` seconds at most."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self, around: Callable[[], AbstractAsyncContextManager[C]]) -> None:
        try:
            asyncio.run(self._live(around))
        except Exception as error:  # The outermost edge of a thread.
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _live(self, around: Callable[[], AbstractAsyncContextManager[C]]) -> None:
        end = asyncio.Event()
        async with around() as entered:
            self._started.set_result((asyncio.get_running_loop(), end, entered))
            await end.wait()
