"""Who goes next: order, fairness, waking, and how little of a backlog is in memory."""

import asyncio
from collections import Counter
from itertools import pairwise

import pytest

from silo.clock import VirtualClock
from silo.model.job import LEASE_MS, LeasedTask
from silo.shard import dispatch
from silo.shard.shard import Shard
from silo.storage.memory import MemoryStorage
from tests.builders import DONE, GROUP, a_job, a_policy, open_shard, reopened

_AT_ONCE = a_policy(1, initial_interval_ms=0)


async def lease(
    shard: Shard, count: int = 1, *, task_group: str = GROUP, wait_ms: int = 0
) -> list[LeasedTask]:
    return await shard.lease_tasks(worker_id="w", task_group=task_group, max_tasks=count, wait_ms=wait_ms)


async def lease_ids(shard: Shard, count: int = 1) -> list[str]:
    return [task.job.id for task in await lease(shard, count)]


async def enqueue_all(shard: Shard, count: int, *, tenant: str = "-", priority: int = 50) -> None:
    await asyncio.gather(
        *(shard.enqueue(a_job(f"{tenant}{n:05}", tenant=tenant, priority=priority)) for n in range(count))
    )


@pytest.mark.spec("LSE-5")
async def test_smaller_priority_numbers_run_first() -> None:
    async with open_shard() as shard:
        for priority in (50, 99, 0, 20):
            await shard.enqueue(a_job(f"p{priority}", priority=priority))
        assert await lease_ids(shard, 4) == ["p0", "p20", "p50", "p99"]


async def test_a_job_that_waited_long_enough_overtakes_a_more_urgent_one() -> None:
    clock = VirtualClock()
    async with open_shard(clock=clock) as shard:
        await shard.enqueue(a_job("patient", priority=2))
        clock.advance_ms(20_001)
        await shard.enqueue(a_job("urgent", priority=0))
        assert await lease_ids(shard, 2) == ["patient", "urgent"]


@pytest.mark.spec("LSE-5")
async def test_equal_claims_go_by_job_id() -> None:
    async with open_shard() as shard:
        for job_id in "cab":
            await shard.enqueue(a_job(job_id))
        assert await lease_ids(shard, 3) == ["a", "b", "c"]


@pytest.mark.spec("LSE-2")
async def test_future_work_does_not_hold_up_due_work() -> None:
    clock = VirtualClock()
    async with open_shard(clock=clock) as shard:
        await shard.enqueue(a_job("later", priority=0, start_at_ms=clock.now_ms() + 1_000))
        await shard.enqueue(a_job("now", priority=99))
        assert await lease_ids(shard, 2) == ["now"]
        clock.advance_ms(1_000)
        await shard.tick()
        assert await lease_ids(shard, 2) == ["later"]


@pytest.mark.parametrize("is_reopened", [False, True], ids=["warm", "reopened"])
async def test_a_new_tenant_waits_behind_one_job_of_every_other_tenant(is_reopened: bool) -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    shard = await reopened(storage, clock=clock)
    for tenant in "abc":
        await enqueue_all(shard, 200, tenant=tenant, priority=0)
    await shard.enqueue(a_job("new", tenant="z", priority=99))
    if is_reopened:
        await shard.close()
        shard = await reopened(storage, clock=clock)
    first = await lease_ids(shard, 4)
    await shard.close()
    assert "new" in first


@pytest.mark.spec("LSE-9")
async def test_tenants_take_turns() -> None:
    """In the reference whoever was first goes first, whatever the tenant."""
    async with open_shard() as shard:
        await enqueue_all(shard, 300, tenant="big")
        await enqueue_all(shard, 30, tenant="small")
        tenants = [task.job.tenant for task in await lease(shard, 60)]
        assert Counter(tenants) == {"big": 30, "small": 30}
        assert all(one != other for one, other in pairwise(tenants))


async def test_a_tenant_that_others_crowd_out_of_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "RESIDENTS_MAX", 8)
    async with open_shard() as shard:
        for number in range(50):
            await enqueue_all(shard, 3, tenant=f"t{number:02}")
        seen: list[str] = []
        while tasks := await lease(shard, 10):
            seen += [task.job.tenant for task in tasks]
        assert Counter(seen) == {f"t{number:02}": 3 for number in range(50)}


async def test_a_backlog_stays_in_the_store() -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        await enqueue_all(shard, 5_000)
        await lease(shard, 1)
        queue = shard.queue(GROUP)
        assert queue is not None
        assert len(queue) <= 1_200
        leased = 1
        while tasks := await lease(shard, 100):
            leased += len(tasks)
        assert leased == 5_000
        assert len(queue) == 0


async def test_opening_reads_neither_backlog_nor_history() -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        await enqueue_all(shard, 2_000)
        for task in await lease(shard, 500):
            assert task.state.lease is not None
            await shard.report(task.state.lease.task_id, DONE)
        await lease(shard, 3)
    before = storage.faults.calls.copy()
    async with open_shard(storage, clock=clock) as shard:
        calls = storage.faults.calls - before
        assert calls["scan"] <= 2
        assert calls["get"] <= 2
        assert await lease_ids(shard, 1)


async def test_a_waiting_poll_gets_work_as_soon_as_it_is_there() -> None:
    async with open_shard() as shard:
        poll = asyncio.ensure_future(lease(shard, wait_ms=60_000))
        await asyncio.sleep(0)
        await shard.enqueue(a_job("j1"))
        [task] = await poll  # The clock has not moved.
        assert task.job.id == "j1"


async def test_a_waiting_poll_gets_delayed_work_when_it_is_due() -> None:
    clock = VirtualClock()
    async with open_shard(clock=clock) as shard:
        await shard.enqueue(a_job("j1", start_at_ms=clock.now_ms() + 500))
        poll = asyncio.ensure_future(lease(shard, wait_ms=60_000))
        await asyncio.sleep(0.01)
        assert not poll.done()
        clock.advance_ms(500)
        [task] = await poll
        assert task.job.id == "j1"


async def test_a_waiting_poll_ends_empty_at_its_deadline_though_the_clock_of_the_jobs_stands_still() -> None:
    async with open_shard(clock=VirtualClock()) as shard:
        assert await lease(shard, wait_ms=30) == []


async def test_a_waiting_poll_is_told_when_the_shard_closes() -> None:
    async with open_shard() as shard:
        poll = asyncio.ensure_future(lease(shard, wait_ms=60_000))
        await asyncio.sleep(0.01)
        await shard.close()
        with pytest.raises(Exception, match="shard closed"):
            await poll


@pytest.mark.spec("LSE-2")
async def test_task_groups_do_not_see_each_others_work() -> None:
    async with open_shard() as shard:
        await shard.enqueue(a_job("j1", task_group="emails"))
        assert await lease(shard, 5) == []
        [task] = await lease(shard, 5, task_group="emails")
        assert task.job.id == "j1"


async def test_ten_thousand_expired_leases_go_back_to_the_queue() -> None:
    clock = VirtualClock()
    async with open_shard(clock=clock) as shard:
        jobs = [a_job(f"j{n:05}", retry_policy=_AT_ONCE) for n in range(10_000)]
        await asyncio.gather(*map(shard.enqueue, jobs))
        leased = 0
        while tasks := await lease(shard, 4_000):
            leased += len(tasks)
        assert leased == 10_000
        clock.advance_ms(LEASE_MS)
        await shard.tick()
        again = await lease(shard, 4_000)
        assert len(again) == 4_000
        assert {task.state.next_attempt_number for task in again} == {2}


async def test_an_answer_holds_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LEASE_BYTES_MAX", 1_000)
    async with open_shard() as shard:
        for number in range(4):
            await shard.enqueue(a_job(f"j{number}", payload=bytes(400)))
        assert len(await lease(shard, 9)) == 2
        assert len(await lease(shard, 9)) == 2


async def test_a_task_above_the_bound_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LEASE_BYTES_MAX", 1_000)
    async with open_shard() as shard:
        await shard.enqueue(a_job("small", priority=0, payload=bytes(10)))
        await shard.enqueue(a_job("large", priority=1, payload=bytes(5_000)))
        await shard.enqueue(a_job("last", priority=2))
        answers = [await lease_ids(shard, 9) for _ in range(3)]
        assert answers == [["small"], ["large"], ["last"]]
