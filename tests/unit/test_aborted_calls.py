"""A client that hangs up at any moment of any call leaves nothing stuck (invariant 79)."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random

import pytest

from silo.clock import VirtualClock
from silo.model.attempt import Failure
from silo.model.job import LEASE_MS, LeasedTask
from silo.shard.shard import Shard
from silo.storage.memory import MemoryStorage
from tests.builders import DONE, GROUP, SHARD, a_job, a_policy, reopened
from tests.invariants import check_snapshot

TENANT = "-"
Call = Callable[[Shard, LeasedTask], Awaitable[object]]

CALLS: dict[str, Call] = {
    "enqueue": lambda shard, _: shard.enqueue(a_job("new", retry_policy=a_policy(9))),
    "enqueue of a new tenant": lambda shard, _: shard.enqueue(a_job("new", tenant="other")),
    "lease": lambda shard, _: shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=2),
    "lease and wait": lambda shard, _: shard.lease_tasks(
        worker_id="w", task_group="empty", max_tasks=2, wait_ms=60_000
    ),
    "lease one": lambda shard, _: shard.lease_one(tenant=TENANT, job_id="waiting", worker_id="w"),
    "report success": lambda shard, task: shard.report(_task_id(task), DONE),
    "report failure": lambda shard, task: shard.report(_task_id(task), Failure("BROKEN", b"\xc0")),
    "heartbeat": lambda shard, task: shard.heartbeat(task_id=_task_id(task), worker_id="w"),
    "cancel a waiting job": lambda shard, _: shard.cancel(tenant=TENANT, job_id="waiting"),
    "cancel a running job": lambda shard, _: shard.cancel(tenant=TENANT, job_id="running"),
    "expedite": lambda shard, _: shard.expedite(tenant=TENANT, job_id="delayed"),
    "restart": lambda shard, _: shard.restart(tenant=TENANT, job_id="cancelled"),
    "delete": lambda shard, _: shard.delete(tenant=TENANT, job_id="cancelled"),
    "look": lambda shard, _: shard.get_job(tenant=TENANT, job_id="running", with_attempts=True),
}


def _task_id(task: LeasedTask) -> str:
    assert task.state.lease is not None
    return task.state.lease.task_id


@asynccontextmanager
async def a_busy_shard(
    storage: MemoryStorage, clock: VirtualClock, *, is_reopened: bool
) -> AsyncIterator[tuple[Shard, LeasedTask]]:
    """One job of each kind; reopened, nothing of the queues is in memory yet."""
    shard = await reopened(storage, clock=clock, rng=Random(1))
    await shard.enqueue(a_job("running", priority=0, retry_policy=a_policy(9)))
    [task] = await shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=1)
    await shard.enqueue(a_job("cancelled"))
    await shard.cancel(tenant=TENANT, job_id="cancelled")
    for number in range(3):
        await shard.enqueue(a_job("waiting" if number == 0 else f"w{number}", tenant="-"))
    await shard.enqueue(a_job("elsewhere", tenant="t"))
    await shard.enqueue(a_job("delayed", start_at_ms=clock.now_ms() + 60_000))
    if is_reopened:
        await shard.close()
        shard = await reopened(storage, clock=clock, rng=Random(2))
    try:
        yield shard, task
    finally:
        await shard.close()


async def _hang_up_after(steps: int, call: Awaitable[object]) -> bool:
    """Let the call take some steps of the event loop, then drop it; whether it was over before."""
    task = asyncio.ensure_future(call)
    for _ in range(steps):
        await asyncio.sleep(0)
    was_over = task.done()
    task.cancel()
    await asyncio.wait({task})
    return was_over


async def _drain(shard: Shard, storage: MemoryStorage, clock: VirtualClock) -> None:
    """With workers that succeed, everything ends within a few leases' time."""
    for _ in range(8):
        clock.advance_ms(LEASE_MS)
        await shard.tick()
        while tasks := await shard.lease_tasks(worker_id="v", task_group=GROUP, max_tasks=10):
            for task in tasks:
                await shard.report(_task_id(task), DONE)
    jobs = check_snapshot(storage.snapshot(SHARD))
    unfinished = [name for name, stored in jobs.items() if not stored.state.status.is_terminal]
    assert not unfinished


@pytest.mark.spec("LSE-17", "LSE-18")
@pytest.mark.parametrize("is_reopened", [False, True], ids=["warm", "reopened"])
@pytest.mark.parametrize("name", CALLS)
async def test_a_call_dropped_at_any_moment_leaves_nothing_stuck(name: str, is_reopened: bool) -> None:
    for steps in range(60):
        storage, clock = MemoryStorage(), VirtualClock()
        async with a_busy_shard(storage, clock, is_reopened=is_reopened) as (shard, task):
            was_over = await _hang_up_after(steps, CALLS[name](shard, task))
            await _drain(shard, storage, clock)
        if was_over:
            break
    assert was_over or name == "lease and wait"


async def test_a_dropped_poll_that_waits_takes_nothing() -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with a_busy_shard(storage, clock, is_reopened=False) as (shard, _):
        poll = shard.lease_tasks(worker_id="w", task_group="quiet", max_tasks=1, wait_ms=60_000)
        await _hang_up_after(20, poll)
        await shard.enqueue(a_job("quiet", task_group="quiet"))
        [task] = await shard.lease_tasks(worker_id="v", task_group="quiet", max_tasks=1)
        assert task.job.id == "quiet"
