"""The server for tests that are no coroutines."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from silo import SiloGRPCClient, SiloWorker, TaskContext
from silo.testing import NotIdle, Ran, sync_server

GROUP = "g"
START = datetime(2030, 1, 1, tzinfo=UTC)


async def double(ctx: TaskContext[int, dict[str, str]]) -> int:
    return 2 * ctx.task.payload


def doubling(client: SiloGRPCClient) -> SiloWorker[int, dict[str, str], int]:
    return SiloWorker(client=client, worker_id="w", task_group=GROUP, handler=double)


def test_blocking_code_moves_the_clock_and_runs_workers() -> None:
    with sync_server(start_at=START) as s:
        job = s.client.enqueue(payload=21, task_group=GROUP, delay=300)
        assert s.run_until_idle(doubling) == Ran(ended=0, waiting=1)
        s.advance(timedelta(minutes=4), seconds=60)
        assert s.now() == START + timedelta(minutes=5)
        assert s.run_until_idle(doubling) == Ran(ended=1, waiting=0)
        assert job.result(timeout=10).result == 42


def test_a_job_can_be_waited_for() -> None:
    with sync_server() as s:
        job = s.client.enqueue(payload=21, task_group=GROUP)
        with pytest.raises(TimeoutError, match="Scheduled"):
            s.wait_for(job, "Succeeded", timeout=0.05)
        s.run_until_idle(doubling)
        assert s.wait_for(job, "Succeeded", "Failed").result == 42


def test_what_handlers_enqueue_goes_by_the_same_clock() -> None:
    with sync_server(start_at=START) as s:

        def again(client: SiloGRPCClient) -> SiloWorker[Any, Any, Any]:
            async def handler(ctx: TaskContext[Any, Any]) -> None:
                await client.enqueue(payload=1, task_group=GROUP, delay=60)

            return SiloWorker(client=client, worker_id="w", task_group=GROUP, handler=handler)

        s.client.enqueue(payload=1, task_group=GROUP)
        for _ in range(3):
            assert s.run_until_idle(again) == Ran(ended=1, waiting=1)
            s.advance(minutes=1)


def test_what_is_not_idle_in_time_is_named() -> None:
    with sync_server() as s:
        s.client.enqueue(payload="x", task_group="other", id="job-1")

        def nobody(client: SiloGRPCClient) -> SiloWorker[Any, Any, Any]:
            async def handler(ctx: TaskContext[Any, Any]) -> None:
                await ctx.wait_cancelled()

            return SiloWorker(client=client, worker_id="w", task_group="other", handler=handler)

        with pytest.raises(NotIdle, match="other: 1 leased"):
            s.run_until_idle(nobody, timeout=0.1)
