"""Async handlers, on the event loop of the worker."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

from silo.worker.context import CancellationSignal, TaskContext
from silo.worker.execution.errors import HandlerTimeout
from silo.worker.execution.execution import Handler
from silo.worker.execution.fitting import require_async

P = TypeVar("P")
M = TypeVar("M", bound=Mapping[str, object])


class AsyncExecution:
    """Runs handlers within the task of the caller, all at once.

    Args:
        interrupts: a handler whose job is cancelled gets a CancelledError where it waits. What it returns
            or raises then is the outcome of `run`.
    """

    def __init__(self, *, interrupts: bool = False) -> None:
        self._interrupts = interrupts

    def check(self, handler: Handler) -> None:
        require_async(handler)

    async def run(self, handler: Handler, context: TaskContext[P, M], *, timeout_s: float | None) -> object:
        if self._interrupts:
            async with _interrupted_by(context.cancellation_signal):
                return await _within(timeout_s, handler, context)
        if timeout_s is not None:
            return await _within(timeout_s, handler, context)
        return await handler(context)  # The hot path: nothing around the handler.

    async def close(self) -> None:
        """Nothing is held: runs end with the tasks that wait for them."""


async def _within(timeout_s: float | None, handler: Handler, context: TaskContext[P, M]) -> object:
    if timeout_s is None:
        return await handler(context)
    try:
        async with asyncio.timeout(timeout_s) as limit:
            returned: object = await handler(context)
    except Exception as error:
        if limit.expired():
            raise HandlerTimeout(timeout_s) from error
        raise
    if limit.expired():  # It caught the CancelledError. What comes too late does not count.
        raise HandlerTimeout(timeout_s)
    return returned


@asynccontextmanager
async def _interrupted_by(signal: CancellationSignal) -> AsyncIterator[None]:
    """Cancel the current task when the signal is set, and do not count that as somebody's cancelling.

    A task that ends with the CancelledError has not been cancelled by anybody else, unless
    `cancelling()` says so: that is how `run` tells an interrupted handler from a worker that is torn down.
    """
    task = asyncio.current_task()
    assert task is not None
    is_interrupted = False

    async def interrupt() -> None:
        nonlocal is_interrupted
        await signal.wait()
        is_interrupted = True
        task.cancel()

    interrupter = asyncio.get_running_loop().create_task(interrupt())
    try:
        yield
    finally:
        # Not waited for: it holds nothing, and a wait here would cost each job a turn of the loop.
        interrupter.cancel()
        if is_interrupted:
            task.uncancel()
