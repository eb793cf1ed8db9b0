"""Workers of a server that pushes, and of one that only speaks `silo.v1`: the same, as far as that goes."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from silo import (
    Failure,
    FloatingConcurrencyLimit,
    JobHandle,
    NewJob,
    RefreshTaskContext,
    Retry,
    RetryPolicy,
    SiloGRPCClient,
    SiloWorker,
)
from silo.rpc.auth import EVERYTHING, Tokens
from silo.rpc.server import Security
from tests.builders import until
from tests.integration.fake_silo import GROUP, a_client
from tests.integration.real_silo import real_silo
from tests.integration.workers import Context, Errors, Handler, a_worker

HOUR_MS = 3_600_000
SOON = RetryPolicy(retry_count=5, initial_interval_ms=1, max_interval_ms=1)

pushed_and_polled = pytest.mark.parametrize("extension", [True, False], ids=["pushed", "polled"])


@asynccontextmanager
async def a_cluster(*, extension: bool = True, shards: int = 1) -> AsyncIterator[SiloGRPCClient]:
    async with real_silo(extension=extension, shards=shards) as address, a_client(address) as client:
        yield client


async def attempts_of(handle: JobHandle) -> list[tuple[str, str | None]]:
    """Status and error code of each attempt."""
    job = await handle.job(include_attempts=True)
    return [(attempt.status, attempt.error_code) for attempt in job.attempts or ()]


async def has_attempts(handles: list[JobHandle], number: int) -> None:
    for handle in handles:
        assert len(await attempts_of(handle)) == number, handle


# What handlers may say


async def test_a_job_that_is_put_off_runs_again_and_only_the_last_run_counts() -> None:
    runs = 0

    async def handler(ctx: Context) -> int:
        nonlocal runs
        runs += 1
        if runs < 4:
            raise Retry(after=0.01)
        return ctx.task.attempt_number

    async with a_cluster() as client, a_worker(client, handler):
        handle = await client.enqueue(payload=0, task_group=GROUP)
        assert (await handle.result(timeout=20)).result == 1
        assert runs == 4
        assert await attempts_of(handle) == [("Succeeded", None)]


async def test_a_job_that_is_put_off_for_long_is_scheduled_and_can_be_expedited() -> None:
    handler = Handler()

    async def put_off(ctx: Context) -> Any:
        if not handler.ids:
            await handler(ctx)
            raise Retry(after=3600)
        return await handler(ctx)

    async with a_cluster() as client, a_worker(client, put_off):
        handle = await client.enqueue(payload=0, task_group=GROUP)
        await until(lambda: len(handler.ids) == 1)
        async with asyncio.timeout(10):
            while await handle.status() != "Scheduled":
                pass
        await handle.expedite()
        assert (await handle.result(timeout=20)).status == "Succeeded"


async def test_where_nothing_can_be_put_off_that_is_a_failure_and_counts() -> None:
    async def handler(ctx: Context) -> int:
        if ctx.task.attempt_number < 3:
            raise Retry(after=0.01)
        return ctx.task.attempt_number

    async with a_cluster(extension=False) as client, a_worker(client, handler):
        handle = await client.enqueue(payload=0, task_group=GROUP, retry_policy=SOON)
        assert (await handle.result(timeout=20)).result == 3
        assert await attempts_of(handle) == [("Failed", "RETRY"), ("Failed", "RETRY"), ("Succeeded", None)]


@pushed_and_polled
async def test_a_final_failure_ends_a_job_where_servers_know_of_it(extension: bool) -> None:
    async def handler(ctx: Context) -> Failure:
        return Failure("NEVER", is_final=True)

    async with a_cluster(extension=extension) as client, a_worker(client, handler):
        handle = await client.enqueue(payload=0, task_group=GROUP, retry_policy=SOON)
        result = await handle.result(timeout=20)
        assert (result.status, result.error_code) == ("Failed", "NEVER")
        assert len(await attempts_of(handle)) == (1 if extension else 6)


@pushed_and_polled
async def test_a_handler_that_takes_too_long_fails_with_timeout(extension: bool) -> None:
    async with (
        a_cluster(extension=extension) as client,
        a_worker(client, Handler(holds=True), timeout=0.05),
    ):
        handle = await client.enqueue(payload=0, task_group=GROUP)
        result = await handle.result(timeout=20)
        assert (result.status, result.error_code) == ("Failed", "TIMEOUT")


@pushed_and_polled
async def test_failed_attempts_are_repeated_by_their_policy(extension: bool) -> None:
    async def handler(ctx: Context) -> int:
        if ctx.task.attempt_number < 3:
            raise RuntimeError("not yet")
        return ctx.task.attempt_number

    async with a_cluster(extension=extension) as client, a_worker(client, handler):
        handle = await client.enqueue(payload=0, task_group=GROUP, retry_policy=SOON)
        assert (await handle.result(timeout=20)).result == 3


# Nothing waits for an interval


async def test_a_running_job_hears_of_its_cancellation_without_a_heartbeat() -> None:
    started = asyncio.Event()

    async def handler(ctx: Context) -> None:
        started.set()
        await ctx.wait_cancelled()

    async with (
        a_cluster() as client,
        a_worker(client, handler, heartbeat_interval_ms=HOUR_MS, poll_interval_ms=HOUR_MS) as worker,
    ):
        handle = await client.enqueue(payload=0, task_group=GROUP)
        await started.wait()
        await handle.cancel()
        assert (await handle.result(timeout=20)).status == "Cancelled"
        assert worker.metrics.polls == 0


async def test_work_is_pushed_and_its_result_comes_without_a_poll() -> None:
    async with (
        a_cluster(shards=3) as client,
        a_worker(client, Handler(), heartbeat_interval_ms=HOUR_MS, poll_interval_ms=HOUR_MS) as worker,
    ):
        for _ in range(20):
            handle = await client.enqueue(payload=0, task_group=GROUP)
            assert (await handle.result(timeout=20)).result == "done"
        assert worker.metrics.polls == 0


@pushed_and_polled
async def test_a_handler_may_cancel_its_own_job(extension: bool) -> None:
    async def handler(ctx: Context) -> str:
        await ctx.cancel()
        assert ctx.cancelled
        return "whatever"

    async with a_cluster(extension=extension) as client, a_worker(client, handler):
        handle = await client.enqueue(payload=0, task_group=GROUP, retry_policy=SOON)
        assert (await handle.result(timeout=20)).status == "Cancelled"
        assert len(await attempts_of(handle)) == 1


# Task groups and slots


@pushed_and_polled
async def test_several_task_groups_share_the_slots_of_a_worker(extension: bool) -> None:
    handler = Handler(holds=True)
    async with (
        a_cluster(extension=extension, shards=2) as client,
        a_worker(client, handler, task_group=["a", "b", "c"], max_concurrent_tasks=3),
    ):
        handles = [
            await client.enqueue(payload=0, task_group=group) for group in ("a", "b", "c") for _ in range(5)
        ]
        await until(lambda: handler.running == 3)
        handler.release.set()
        for handle in handles:
            assert (await handle.result(timeout=20)).status == "Succeeded"
        assert handler.most_running == 3
        assert {ctx.task.task_group for ctx in handler.contexts} == {"a", "b", "c"}


async def test_a_task_that_waits_behind_a_slow_one_goes_to_a_worker_that_has_time() -> None:
    release = asyncio.Event()

    async def slow_if_asked(ctx: Context) -> str:
        if ctx.task.payload == "slow":
            await release.wait()
        return "busy"

    async with a_cluster() as client:
        busy = a_worker(client, slow_if_asked, worker_id="busy", max_concurrent_tasks=1)
        async with busy:
            for _ in range(30):  # It is quick, so it gets tasks ahead.
                await (await client.enqueue(payload="quick", task_group=GROUP)).result(timeout=20)
            jobs = [NewJob(payload="slow", task_group=GROUP, priority=0)]
            jobs += [NewJob(payload="quick", task_group=GROUP) for _ in range(5)]
            slow, *quick = [handle async for handle in client.enqueue_many(jobs)]
            await until(lambda: busy.queued_tasks == 5)
            async with a_worker(client, Handler("idle"), worker_id="idle"):
                assert {(await handle.result(timeout=20)).result for handle in quick} == {"idle"}
            release.set()
            assert (await slow.result(timeout=20)).result == "busy"
        await has_attempts([slow, *quick], 1)


# Floating limits


@pushed_and_polled
async def test_a_floating_limit_is_refreshed_by_the_worker(extension: bool) -> None:
    handler = Handler(holds=True)

    async def refresh(ctx: RefreshTaskContext) -> int:
        assert ctx.task.metadata == {"of": "test"}
        return 4

    limit = FloatingConcurrencyLimit(
        key="k", default_max_concurrency=1, refresh_interval_ms=50, metadata={"of": "test"}
    )
    async with (
        a_cluster(extension=extension) as client,
        a_worker(client, handler, refresh_handler=refresh),
    ):
        handles = [await client.enqueue(payload=0, task_group=GROUP, limits=[limit]) for _ in range(6)]
        await until(lambda: handler.running == 4)
        handler.release.set()
        for handle in handles:
            assert (await handle.result(timeout=20)).status == "Succeeded"
        assert handler.most_running == 4


@pushed_and_polled
async def test_without_a_handler_a_floating_limit_keeps_its_default(extension: bool) -> None:
    handler, errors = Handler(), Errors()
    limit = FloatingConcurrencyLimit(key="k", default_max_concurrency=1, refresh_interval_ms=1)
    async with a_cluster(extension=extension) as client, a_worker(client, handler, on_error=errors):
        handles = [await client.enqueue(payload=0, task_group=GROUP, limits=[limit]) for _ in range(20)]
        for handle in handles:
            assert (await handle.result(timeout=20)).status == "Succeeded"
        assert handler.most_running == 1


# Stopping and starting


async def test_what_a_worker_did_not_begin_is_handed_to_the_next_and_was_no_attempt() -> None:
    async with a_cluster() as client:
        first, second = Handler(), Handler("second")
        worker = a_worker(client, first, max_concurrent_tasks=1)
        worker.start()
        for _ in range(30):
            await (await client.enqueue(payload=0, task_group=GROUP)).result(timeout=20)
        first.release.clear()
        jobs = [NewJob(payload=0, task_group=GROUP, priority=min(number, 1)) for number in range(8)]
        running, *waiting = [handle async for handle in client.enqueue_many(jobs)]
        await until(lambda: worker.queued_tasks == 7)
        stopping = asyncio.create_task(worker.stop())
        async with a_worker(client, second, worker_id="second"):
            for handle in waiting:  # At once: the first one still runs.
                assert (await handle.result(timeout=20)).result == "second"
        assert not stopping.done()
        first.release.set()
        await stopping
        assert (await running.result(timeout=20)).result == "done"
        await has_attempts([running, *waiting], 1)


async def test_a_worker_that_starts_and_stops_while_jobs_flow_runs_each_once() -> None:
    handler, errors = Handler(), Errors()
    async with a_cluster(shards=2) as client:
        worker = a_worker(client, handler, max_concurrent_tasks=4, on_error=errors)
        enqueuing = asyncio.create_task(_enqueue_all(client, 1500))
        for number in range(25):
            worker.start()
            await until(lambda seen=50 * (number + 1): len(handler.ids) >= min(seen, 1400))
            await worker.stop()
        async with worker:
            handles = await enqueuing
            for handle in handles:
                assert (await handle.result(timeout=20)).status == "Succeeded"
        await has_attempts(handles, 1)
    assert len(handler.ids) == 1500
    assert errors.seen == []


async def _enqueue_all(client: SiloGRPCClient, count: int) -> list[JobHandle]:
    jobs = (NewJob(payload=0, task_group=GROUP) for _ in range(count))
    return [handle async for handle in client.enqueue_many(jobs)]


async def test_an_idle_worker_that_stops_at_any_moment_keeps_nothing_for_itself() -> None:
    """Tasks may be on the wire when the end is said."""
    first, second = Handler(), Handler()
    async with a_cluster() as client, a_worker(client, second, worker_id="second", max_concurrent_tasks=1):
        handles = []
        for turn in range(40):
            worker = a_worker(client, first, max_concurrent_tasks=8)
            worker.start()
            await (await client.enqueue(payload=0, task_group=GROUP)).result(timeout=20)
            enqueuing = asyncio.create_task(_enqueue_all(client, 10))
            for _ in range(turn):
                await asyncio.sleep(0)
            await worker.stop()
            handles += await enqueuing
        for handle in handles:
            assert (await handle.result(timeout=20)).status == "Succeeded"
        await has_attempts(handles, 1)


@pushed_and_polled
async def test_the_outcome_of_a_handler_that_outlives_a_stop_and_a_start_counts(extension: bool) -> None:
    handler = Handler(holds=True)
    async with a_cluster(extension=extension) as client:
        worker = a_worker(client, handler, on_error=Errors())
        worker.start()
        handle = await client.enqueue(payload=0, task_group=GROUP)
        await until(lambda: handler.running == 1)
        await worker.stop(timeout=0)
        async with worker:
            second = await client.enqueue(payload=0, task_group=GROUP)
            await until(lambda: handler.running == 2)
            handler.release.set()
            for ended in (handle, second):
                assert (await ended.result(timeout=20)).result == "done"
                assert len(await attempts_of(ended)) == 1


@pushed_and_polled
async def test_a_handler_may_stop_its_worker(extension: bool) -> None:
    worker: SiloWorker[Any, Any, Any]

    async def handler(ctx: Context) -> str:
        await worker.stop()
        return "stopped"

    async with a_cluster(extension=extension) as client:
        worker = a_worker(client, handler)
        worker.start()
        handle = await client.enqueue(payload=0, task_group=GROUP)
        assert (await handle.result(timeout=20)).result == "stopped"
        assert not worker.is_running


@pushed_and_polled
async def test_a_signal_drains_and_a_second_one_cancels(extension: bool) -> None:
    async with a_cluster(extension=extension) as client:
        handler = Handler(holds=True)
        worker = a_worker(client, handler)
        ready = asyncio.Event()
        running = asyncio.create_task(worker.run(on_ready=ready.set))
        await ready.wait()
        await client.enqueue(payload=0, task_group=GROUP)
        await until(lambda: handler.running == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: not worker.is_running)
        assert (handler.running, running.done()) == (1, False)
        os.kill(os.getpid(), signal.SIGTERM)
        await running
        assert handler.running == 0


# Tokens


async def test_a_wrong_token_is_told_once_and_a_right_one_later_works() -> None:
    tokens = Tokens([("right-0123456789abcdef", EVERYTHING)])
    token = "wrong-0123456789abcdef"

    async def current() -> str:
        return token

    async with (
        real_silo(security=Security(tokens=tokens)) as address,
        a_client(address, token=current) as client,
    ):
        errors = Errors()
        async with a_worker(client, Handler(), on_error=errors):
            await until(lambda: bool(errors.seen))
            token = "right-0123456789abcdef"
            handle = await client.enqueue(payload=0, task_group=GROUP)
            assert (await handle.result(timeout=20)).status == "Succeeded"
        assert len(errors.seen) == 1
