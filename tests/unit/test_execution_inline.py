"""Async handlers run in their caller's task, end in time, and are interrupted on request."""

import asyncio
from typing import Any

import pytest

from silo.worker.execution.errors import HandlerTimeout
from silo.worker.execution.inline import AsyncExecution
from tests.contexts import Context, a_context

SOON_S = 0.01


async def forever(ctx: Context) -> None:
    await asyncio.Event().wait()


async def test_it_returns_what_the_handler_returns() -> None:
    async def handler(ctx: Context) -> Any:
        return ctx.task.payload

    assert await AsyncExecution().run(handler, a_context(7), timeout_s=None) == 7
    assert await AsyncExecution().run(handler, a_context(7), timeout_s=60) == 7
    assert await AsyncExecution(interrupts=True).run(handler, a_context(7), timeout_s=60) == 7


@pytest.mark.parametrize("interrupts", [False, True])
@pytest.mark.parametrize("timeout_s", [None, 60])
async def test_it_raises_what_the_handler_raises(interrupts: bool, timeout_s: float | None) -> None:
    async def handler(ctx: Context) -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine") as raised:
        await AsyncExecution(interrupts=interrupts).run(handler, a_context(), timeout_s=timeout_s)
    assert not isinstance(raised.value, HandlerTimeout)


async def test_a_handler_costs_no_task_of_its_own() -> None:
    me = asyncio.current_task()

    async def handler(ctx: Context) -> bool:
        return asyncio.current_task() is me and len(asyncio.all_tasks()) == 1

    assert await AsyncExecution().run(handler, a_context(), timeout_s=None)


async def test_a_handler_out_of_time_is_cancelled() -> None:
    is_cleaned_up = False

    async def handler(ctx: Context) -> None:
        nonlocal is_cleaned_up
        try:
            await forever(ctx)
        finally:
            is_cleaned_up = True

    with pytest.raises(HandlerTimeout, match=r"did not end within 0\.01 s") as raised:
        await AsyncExecution().run(handler, a_context(), timeout_s=SOON_S)
    assert is_cleaned_up
    assert raised.value.timeout_s == SOON_S


async def test_a_result_that_comes_out_of_time_is_none() -> None:
    async def handler(ctx: Context) -> str:
        try:
            await forever(ctx)
        except asyncio.CancelledError:
            return "late"
        return "early"

    with pytest.raises(HandlerTimeout):
        await AsyncExecution().run(handler, a_context(), timeout_s=SOON_S)


async def test_an_error_that_comes_out_of_time_is_the_cause_of_the_timeout() -> None:
    async def handler(ctx: Context) -> None:
        try:
            await forever(ctx)
        finally:
            raise KeyError("cleaning up")

    with pytest.raises(HandlerTimeout) as raised:
        await AsyncExecution().run(handler, a_context(), timeout_s=SOON_S)
    assert isinstance(raised.value.__cause__, KeyError)


async def test_a_cancelled_job_leaves_the_handler_alone_unless_asked_for() -> None:
    async def handler(ctx: Context) -> bool:
        ctx.cancellation_signal.abort()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return ctx.cancelled

    assert await AsyncExecution().run(handler, a_context(), timeout_s=None) is True


@pytest.mark.parametrize("timeout_s", [None, 60])
async def test_a_cancelled_job_interrupts_its_handler_where_it_waits(timeout_s: float | None) -> None:
    context = a_context()
    asyncio.get_running_loop().call_later(SOON_S, context.cancellation_signal.abort)
    with pytest.raises(asyncio.CancelledError):
        await AsyncExecution(interrupts=True).run(forever, context, timeout_s=timeout_s)
    me = asyncio.current_task()
    assert me is not None
    assert me.cancelling() == 0


async def test_a_job_that_was_cancelled_before_interrupts_its_handler_at_once() -> None:
    context = a_context()
    context.cancellation_signal.abort()
    with pytest.raises(asyncio.CancelledError):
        await AsyncExecution(interrupts=True).run(forever, context, timeout_s=None)


async def test_an_interrupted_handler_may_still_have_a_result() -> None:
    async def handler(ctx: Context) -> str:
        try:
            await forever(ctx)
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # And it is not interrupted twice.
        return "cleaned up"

    context = a_context()
    asyncio.get_running_loop().call_later(SOON_S, context.cancellation_signal.abort)
    assert await AsyncExecution(interrupts=True).run(handler, context, timeout_s=None) == "cleaned up"
    await asyncio.sleep(0)  # And nobody else is interrupted instead.


async def test_a_handler_that_ends_as_its_job_is_cancelled_leaves_its_caller_alone() -> None:
    async def handler(ctx: Context) -> str:
        await ctx.cancel()
        return "done"

    assert await AsyncExecution(interrupts=True).run(handler, a_context(), timeout_s=None) == "done"
    for _ in range(3):
        await asyncio.sleep(0)


async def test_a_caller_that_is_cancelled_as_well_stays_cancelled() -> None:
    context = a_context()
    running = asyncio.create_task(AsyncExecution(interrupts=True).run(forever, context, timeout_s=None))
    await asyncio.sleep(0)
    context.cancellation_signal.abort()
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    assert running.cancelling() == 1


async def test_no_task_is_left_behind() -> None:
    for _ in range(10):
        context = a_context()
        asyncio.get_running_loop().call_soon(context.cancellation_signal.abort)
        with pytest.raises(asyncio.CancelledError):
            await AsyncExecution(interrupts=True).run(forever, context, timeout_s=60)
        assert await AsyncExecution(interrupts=True).run(_nothing, a_context(), timeout_s=60) is None
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def _nothing(ctx: Context) -> None: ...
