"""Plain handlers that wait, each in a thread.

Threads cannot be stopped from outside. A handler that is given up, after a timeout or when its worker
is torn down, is told so by its signal and goes on until it looks. It keeps its thread, and with it its
place: otherwise handlers that hang would add up to more threads than were asked for. All threads are
daemons, so that none of them keeps the process alive.
"""

import asyncio
import concurrent.futures
import contextvars
import queue
import threading
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar  # Whatever a coroutine is sent.

from silo.worker.context import CancellationSignal, TaskContext
from silo.worker.execution.blocking import BlockingTaskContext
from silo.worker.execution.errors import HandlerCrashed, HandlerTimeout
from silo.worker.execution.execution import Handler
from silo.worker.execution.fitting import name_of, require_plain
from silo.worker.execution.places import Places

P = TypeVar("P")
M = TypeVar("M", bound=Mapping[str, object])
T = TypeVar("T")


class ThreadExecution:
    """Runs each handler in one of `threads` daemon threads, with the context variables of the caller.

    The handler gets a `BlockingTaskContext`. Threads start when they are first needed, and are used again.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self._places = Places(threads)
        self._runs: set[_Run] = set()  # Begun and not ended.
        self._work: queue.SimpleQueue[_Run | None] = queue.SimpleQueue()
        self._started = 0  # Threads that take from it: as many as there ever were runs at a time.

    def __repr__(self) -> str:
        return f"ThreadExecution({len(self._runs)} running, {self._started} threads)"

    def check(self, handler: Handler) -> None:
        require_plain(handler, kind="thread")

    async def run(self, handler: Handler, context: TaskContext[P, M], *, timeout_s: float | None) -> object:
        await self._places.take(context.cancellation_signal)
        loop = asyncio.get_running_loop()
        blocking = BlockingTaskContext(
            context.task,
            _LoopSignal(context.cancellation_signal, loop),
            lambda: _on_loop(context.cancel(), loop).result(),
        )
        run = _Run(handler, blocking, ended=loop.create_future(), on_end=self._ended)
        self._begin(run)
        try:
            async with asyncio.timeout(timeout_s):
                await run.ended
        except TimeoutError:
            assert timeout_s is not None  # Nothing else here ends so.
            raise HandlerTimeout(timeout_s) from None
        finally:
            if not run.is_over:
                context.cancellation_signal.abort()  # It goes on, but not for us.
        return run.returned()

    def _begin(self, run: "_Run") -> None:
        if len(self._runs) >= self._started:
            number = self._started + 1
            try:
                threading.Thread(
                    target=_work_forever, args=[self._work], name=f"silo-handler-{number}", daemon=True
                ).start()
            except RuntimeError:  # The system allows no more of them.
                self._places.give_back()
                raise
            self._started = number
        self._runs.add(run)
        self._work.put(run)

    def _ended(self, run: "_Run") -> None:
        run.is_over = True
        self._runs.discard(run)
        self._places.give_back()
        if not run.ended.done():
            run.ended.set_result(None)

    async def close(self) -> None:
        """Give up what runs or waits for a thread. Threads end as they come free; none is waited for.

        Handlers that do not end keep their places.
        """
        self._places.turn_away()
        for run in self._runs:
            run.ended.cancel()
        for _ in range(self._started):
            self._work.put(None)
        # Later runs get threads of their own: one that hangs now ends with the None that is left for it.
        self._runs, self._work, self._started = set(), queue.SimpleQueue(), 0


def _work_forever(work: "queue.SimpleQueue[_Run | None]") -> None:
    while (run := work.get()) is not None:
        run.run()
        del run  # An idle thread holds on to no payload.


class _Run:
    """One run of a handler: made on the event loop, run in a thread, ended on the event loop again."""

    def __init__(
        self,
        handler: Handler,
        context: BlockingTaskContext[Any, Any],
        *,
        ended: asyncio.Future[None],
        on_end: Callable[["_Run"], None],
    ) -> None:
        self.ended = ended
        self.is_over = False  # Unlike `ended`, which is done also when it was given up.
        self._on_end = on_end
        self._call = (contextvars.copy_context(), handler, context)
        self._returned: object = None
        self._error: BaseException | None = None

    def run(self) -> None:
        variables, handler, context = self._call
        try:
            self._returned = variables.run(handler, context)
        except (Exception, asyncio.CancelledError) as error:  # The edge around user code.
            self._error = error
        except BaseException as error:  # Let through, sys.exit would end the whole worker.
            self._error = HandlerCrashed(f"{name_of(handler)} raised {type(error).__name__}")
            self._error.__cause__ = error
        with suppress(RuntimeError):  # The loop is closed: nobody waits any more.
            self.ended.get_loop().call_soon_threadsafe(self._on_end, self)

    def returned(self) -> object:
        """What the handler returned; raises what it raised."""
        try:
            if self._error is not None:
                raise self._error
            return self._returned
        finally:
            self._error = None  # Its traceback leads back to this run.


class _LoopSignal:
    """The signal of a job, seen from a thread. The event loop is troubled only by those that wait."""

    def __init__(self, signal: CancellationSignal, loop: asyncio.AbstractEventLoop) -> None:
        self._signal = signal
        self._loop = loop

    @property
    def aborted(self) -> bool:
        return self._signal.aborted

    def wait(self, timeout_s: float | None) -> bool:
        if self._signal.aborted:
            return True
        waiting = _on_loop(self._signal.wait(), self._loop)
        try:
            waiting.result(timeout_s)
        except TimeoutError:
            waiting.cancel()
        except concurrent.futures.CancelledError:
            return True  # The loop comes to its end, and this run with it.
        return self._signal.aborted


def _on_loop(
    coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop
) -> concurrent.futures.Future[T]:
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:  # The loop is closed.
        coroutine.close()
        raise
