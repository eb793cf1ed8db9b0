"""Plain handlers run in threads: side by side, told of what happens, and given up when they hang."""

import asyncio
import contextvars
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from silo.worker.execution.blocking import BlockingTaskContext
from silo.worker.execution.errors import HandlerCrashed, HandlerTimeout
from silo.worker.execution.threads import ThreadExecution
from tests.builders import until
from tests.contexts import a_context

Blocking = BlockingTaskContext[Any, dict[str, str]]
SOON_S = 0.02
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")


@asynccontextmanager
async def threads(count: int) -> AsyncIterator[ThreadExecution]:
    execution = ThreadExecution(count)
    try:
        yield execution
    finally:
        await execution.close()


class Hanging:
    """A handler that looks at nothing until it is released."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.contexts: list[Blocking] = []

    def __call__(self, ctx: Blocking) -> str:
        self.contexts.append(ctx)
        self.release.wait()
        return "released"


def ours() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("silo-handler")}


async def test_it_returns_what_the_handler_returns_from_another_thread() -> None:
    def handler(ctx: Blocking) -> Any:
        assert threading.current_thread().daemon
        return threading.get_ident(), ctx.task.payload, ctx.cancelled

    async with threads(1) as execution:
        ident, payload, is_cancelled = await execution.run(handler, a_context(7), timeout_s=None)
    assert (payload, is_cancelled) == (7, False)
    assert ident != threading.get_ident()


async def test_it_raises_what_the_handler_raises() -> None:
    def handler(ctx: Blocking) -> None:
        raise TimeoutError("mine")

    async with threads(1) as execution:
        with pytest.raises(TimeoutError, match="mine") as raised:
            await execution.run(handler, a_context(), timeout_s=60)
        assert not isinstance(raised.value, HandlerTimeout)


async def test_ten_handlers_that_sleep_sleep_at_the_same_time() -> None:
    def handler(ctx: Blocking) -> None:
        time.sleep(0.2)

    async with threads(10) as execution:
        started = time.monotonic()
        await asyncio.gather(*(execution.run(handler, a_context(), timeout_s=None) for _ in range(10)))
        assert time.monotonic() - started < 1.0


async def test_no_more_handlers_run_than_there_are_threads() -> None:
    handler = Hanging()
    async with threads(2) as execution:
        runs = [asyncio.create_task(execution.run(handler, a_context(), timeout_s=None)) for _ in range(5)]
        await until(lambda: len(handler.contexts) == 2)
        assert "2 running, 2 threads" in repr(execution)
        handler.release.set()
        assert await asyncio.gather(*runs) == ["released"] * 5
        assert "0 running, 2 threads" in repr(execution)


async def test_threads_are_used_again() -> None:
    async with threads(8) as execution:
        idents = [
            await execution.run(lambda ctx: threading.get_ident(), a_context(), timeout_s=None)
            for _ in range(20)
        ]
    assert len(set(idents)) == 1


async def test_context_variables_come_along() -> None:
    variable.set("mine")
    async with threads(1) as execution:
        assert await execution.run(lambda ctx: variable.get(), a_context(), timeout_s=None) == "mine"
        variable.set("later")
        assert await execution.run(lambda ctx: variable.get(), a_context(), timeout_s=None) == "later"


async def test_a_handler_out_of_time_is_told_and_not_waited_for() -> None:
    handler = Hanging()
    context = a_context()
    async with threads(1) as execution:
        with pytest.raises(HandlerTimeout):
            await execution.run(handler, context, timeout_s=SOON_S)
        assert context.cancelled
        assert handler.contexts[0].cancelled
        handler.release.set()


async def test_a_handler_that_hangs_keeps_its_place_until_it_ends() -> None:
    handler = Hanging()
    async with threads(1) as execution:
        with pytest.raises(HandlerTimeout):
            await execution.run(handler, a_context(), timeout_s=SOON_S)
        next_run = asyncio.create_task(execution.run(lambda ctx: "next", a_context(), timeout_s=0.5))
        await asyncio.sleep(0.6)  # Its time does not run while it waits.
        assert not next_run.done()
        handler.release.set()
        assert await next_run == "next"


async def test_a_handler_sees_that_its_job_is_cancelled() -> None:
    def handler(ctx: Blocking) -> tuple[bool, bool, bool]:
        first = ctx.wait_cancelled(0.001)
        is_started.set()
        return first, ctx.wait_cancelled(), ctx.cancelled

    is_started = threading.Event()
    context = a_context()
    async with threads(1) as execution:
        run = asyncio.create_task(execution.run(handler, context, timeout_s=None))
        await until(is_started.is_set)
        context.cancellation_signal.abort()
        assert await run == (False, True, True)


async def test_a_pause_that_is_not_cancelled_leaves_nothing_behind() -> None:
    async with threads(1) as execution:
        waited = await execution.run(
            lambda ctx: [ctx.wait_cancelled(0.001) for _ in range(5)], a_context(), timeout_s=None
        )
        assert waited == [False] * 5
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def test_a_handler_cancels_its_job() -> None:
    told = []

    async def tell_the_server() -> None:
        await asyncio.sleep(0)
        told.append(threading.get_ident())

    def handler(ctx: Blocking) -> bool:
        ctx.cancel()
        return ctx.cancelled and bool(told)

    async with threads(1) as execution:
        assert await execution.run(handler, a_context(on_cancel=tell_the_server), timeout_s=None)
    assert told == [threading.get_ident()]


async def test_a_cancel_that_fails_is_told_to_the_handler() -> None:
    async def fail() -> None:
        raise ConnectionError("no server")

    async with threads(1) as execution:
        with pytest.raises(ConnectionError, match="no server"):
            await execution.run(lambda ctx: ctx.cancel(), a_context(on_cancel=fail), timeout_s=None)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
async def test_a_handler_that_leaves_its_thread_does_not_end_the_worker(error: BaseException) -> None:
    def leaver(ctx: Blocking) -> None:
        raise error

    async with threads(1) as execution:
        with pytest.raises(HandlerCrashed, match=rf"leaver raised {type(error).__name__}") as raised:
            await execution.run(leaver, a_context(), timeout_s=None)
        assert raised.value.__cause__ is error
        assert await execution.run(lambda ctx: "next", a_context(), timeout_s=None) == "next"


async def test_sys_exit_is_such_a_leaving() -> None:
    async with threads(1) as execution:
        with pytest.raises(HandlerCrashed, match="SystemExit"):
            await execution.run(lambda ctx: sys.exit(1), a_context(), timeout_s=None)


async def test_a_handler_may_raise_what_futures_cannot_hold() -> None:
    async with threads(1) as execution:
        with pytest.raises(RuntimeError, match="StopIteration"):
            await execution.run(lambda ctx: next(iter(())), a_context(), timeout_s=None)


async def test_a_caller_that_is_cancelled_tells_its_handler() -> None:
    handler = Hanging()
    context = a_context()
    async with threads(1) as execution:
        run = asyncio.create_task(execution.run(handler, context, timeout_s=None))
        await until(lambda: len(handler.contexts) == 1)
        run.cancel()
        await asyncio.wait({run})
        assert run.cancelled()
        assert handler.contexts[0].cancelled
        handler.release.set()


async def test_a_job_that_is_cancelled_in_line_is_not_begun() -> None:
    handler, second = Hanging(), a_context()
    async with threads(1) as execution:
        first_run = asyncio.create_task(execution.run(handler, a_context(), timeout_s=None))
        second_run = asyncio.create_task(execution.run(handler, second, timeout_s=None))
        await until(lambda: len(handler.contexts) == 1)
        second.cancellation_signal.abort()
        await asyncio.wait({second_run})
        assert second_run.cancelled()
        assert second_run.cancelling() == 0
        handler.release.set()
        await first_run
    assert len(handler.contexts) == 1


async def test_closing_interrupts_what_runs_and_what_waits_and_ends_the_threads() -> None:
    handler = Hanging()
    contexts = [a_context() for _ in range(3)]
    execution = ThreadExecution(2)
    runs = [asyncio.create_task(execution.run(handler, context, timeout_s=None)) for context in contexts]
    await until(lambda: len(handler.contexts) == 2)
    await execution.close()
    await asyncio.wait(runs)
    assert [run.cancelled() for run in runs] == [True] * 3
    assert all(ctx.cancelled for ctx in handler.contexts)
    assert ours()
    handler.release.set()
    await until(lambda: not ours())
    assert len(handler.contexts) == 2


async def test_a_closed_execution_begins_anew_beside_a_handler_that_hangs() -> None:
    handler = Hanging()
    async with threads(2) as execution:
        with pytest.raises(HandlerTimeout):
            await execution.run(handler, a_context(), timeout_s=SOON_S)
        await execution.close()
        for _ in range(3):
            assert await execution.run(lambda ctx: "anew", a_context(), timeout_s=10) == "anew"
        handler.release.set()
    await until(lambda: not ours())


def test_a_handler_may_outlive_its_event_loop() -> None:
    handler = Hanging()
    failures: list[BaseException] = []

    def cancel_late(ctx: Blocking) -> None:
        handler(ctx)
        try:
            assert ctx.wait_cancelled()
            ctx.cancel()
        except BaseException as error:
            failures.append(error)

    async def work() -> None:
        async with threads(1) as execution:
            with pytest.raises(HandlerTimeout):
                await execution.run(cancel_late, a_context(), timeout_s=SOON_S)

    asyncio.run(work())
    handler.release.set()
    deadline = time.monotonic() + 10
    while ours() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not ours()
    assert [str(error) for error in failures] == ["Event loop is closed"]


def test_it_runs_on_uvloop() -> None:
    async def work() -> None:
        async with threads(2) as execution:
            assert await execution.run(lambda ctx: ctx.task.payload, a_context(7), timeout_s=10) == 7
            with pytest.raises(HandlerTimeout):
                await execution.run(lambda ctx: ctx.wait_cancelled(), a_context(), timeout_s=SOON_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work())
