"""Enqueue: ids, starts, what is there afterwards, and what is not when it failed."""

import asyncio
from uuid import UUID

import pytest

from silo.errors import JobExists, JobNotFound, ShardClosed
from silo.model.attempt import Cancelled, Outcome
from silo.model.counts import ShardTotals
from silo.model.job import DEFAULT_TENANT, Delayed, JobStatus, Ready
from silo.model.shards import HashRange, hash_tenant
from silo.storage.memory import Fault
from tests.builders import DONE, GROUP, a_job, a_policy, a_rate, at_most, floating, open_shard
from tests.one_shard import BROKEN, OneShard, one_shard

# Ids


@pytest.mark.spec("ENQ-6")
async def test_a_job_without_id_gets_a_random_uuid_and_one_with_an_id_keeps_it() -> None:
    async with open_shard() as shard:
        drawn = {await shard.enqueue(a_job(None)) for _ in range(20)}
        assert len(drawn) == 20
        assert all(str(UUID(id)) == id and UUID(id).version == 4 for id in drawn)
        for id in (" any text\0é", "x" * 5_000):
            assert await shard.enqueue(a_job(id)) == id


async def _bring_to(here: OneShard, status: str) -> None:
    """The job `j` in this status, with a limit and metadata."""
    later_ms = here.now_ms + 9_000 if status == "delayed" else 0
    job = a_job("j", start_at_ms=later_ms, metadata={"k": "v"}, limits=[at_most(1)])
    await here.enqueue(job)
    endings: dict[str, Outcome] = {"Succeeded": DONE, "Failed": BROKEN, "Cancelled": Cancelled()}
    if status == "Running" or status in endings:
        assert await here.lease() == ["j"]
    if status in endings:
        await here.report("j", endings[status])


@pytest.mark.spec("ENQ-7")
@pytest.mark.parametrize("status", ["delayed", "Scheduled", "Running", "Succeeded", "Failed", "Cancelled"])
async def test_an_id_that_exists_is_refused_in_every_status_and_nothing_changes(status: str) -> None:
    async with one_shard() as here:
        await _bring_to(here, status)
        assert here.status("j").label == status.capitalize().replace("Delayed", "Scheduled")
        before, counts = here.facts(), here.shard.counts
        other = a_job("j", payload="other", priority=1, metadata={"k": "w"}, limits=[floating(1), a_rate(1)])
        with pytest.raises(JobExists, match=r"^job already exists with id j$"):
            await here.enqueue(other)
        assert (here.facts(), here.shard.counts) == (before, counts)


@pytest.mark.spec("ENQ-9")
async def test_enqueues_of_many_ids_at_once_all_succeed_and_are_all_counted() -> None:
    async with one_shard() as here:
        jobs = [
            a_job(None if n % 2 else f"j{n}", tenant=f"t{n % 3}", limits=[at_most(2)], metadata={"k": "v"})
            for n in range(300)
        ]
        ids = await asyncio.gather(*map(here.shard.enqueue, jobs))
        assert len(set(ids)) == len(here.jobs()) == 300
        assert here.shard.counts == ShardTotals(300, 0)


# Starts


@pytest.mark.spec("ENQ-10")
@pytest.mark.parametrize("offset_ms", [None, -60_000, 0, 60_000])
async def test_the_start_of_a_job_is_the_given_one_or_now(offset_ms: int | None) -> None:
    async with one_shard() as here:
        given = 0 if offset_ms is None else here.now_ms + offset_ms
        await here.enqueue(a_job("j", start_at_ms=given))
        start_at_ms = given or here.now_ms
        state = here.state("j")
        assert (state.next_start_ms, state.rank) == (start_at_ms, (start_at_ms, 50, "j"))
        if start_at_ms > here.now_ms:
            assert state.pending == Delayed(start_at_ms)
        else:
            assert isinstance(state.pending, Ready)


@pytest.mark.spec("ENQ-10")
async def test_a_start_before_all_time_means_now() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", start_at_ms=-7))
        assert here.state("j").next_start_ms == here.now_ms
        assert here.jobs()[DEFAULT_TENANT, "j"].job.enqueue_time_ms == -7


@pytest.mark.spec("ENQ-11")
async def test_a_start_in_the_past_is_kept_and_goes_before_what_became_ready_later() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("now"), a_job("past", start_at_ms=here.now_ms - 1_000))
        await here.enqueue(a_job("long-past", start_at_ms=1))
        assert await here.lease() == ["long-past", "past", "now"]


@pytest.mark.spec("ENQ-12", "ENQ-13", "ENT-5")
async def test_a_due_job_is_seen_by_the_next_look_and_the_next_poll_whosever_it_is() -> None:
    async with open_shard() as shard:
        for tenant in ("-", "acme"):
            await shard.enqueue(a_job("j", tenant=tenant))
            view = await shard.get_job(tenant=tenant, job_id="j")
            assert view.state.status is JobStatus.SCHEDULED
            [task] = await shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=9)
            assert (task.job.tenant, task.job.id) == (tenant, "j")


@pytest.mark.spec("ENT-5")
async def test_one_poll_of_a_task_group_returns_work_of_all_tenants() -> None:
    async with open_shard() as shard:
        for tenant in "abc":
            await shard.enqueue(a_job("j", tenant=tenant))
            await shard.enqueue(a_job("other", tenant=tenant, task_group="other"))
        tasks = await shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=9)
        assert {(task.job.tenant, task.job.id) for task in tasks} == {(tenant, "j") for tenant in "abc"}


# Failure


@pytest.mark.spec("ENQ-13")
async def test_nothing_is_seen_of_a_job_whose_enqueue_failed() -> None:
    async with one_shard() as here:
        before = here.facts()
        here.storage.faults.plan("write", Fault.FAIL_BEFORE)
        job = a_job("j", metadata={"k": "v"}, limits=[at_most(1)], retry_policy=a_policy(1))
        with pytest.raises(ShardClosed):
            await here.enqueue(job)
        await here.crash()
        assert (here.facts(), here.shard.counts) == (before, ShardTotals(0, 0))
        with pytest.raises(JobNotFound):
            await here.shard.get_job(tenant=DEFAULT_TENANT, job_id="j")
        assert await here.lease() == []


# Where a tenant's jobs live


@pytest.mark.spec("ENT-1")
def test_a_shard_owns_the_tenants_whose_hash_lies_in_its_half_open_range() -> None:
    assert hash_tenant("-") == "7a162ebe4ce6fc55"  # XXH64 with seed 0.
    assert hash_tenant("日本") == "80c2e40b8486afab"
    middle = HashRange("4000000000000000", "8000000000000000")
    inside = [middle.start, "7fffffffffffffff", hash_tenant("-")]
    outside = ["3fffffffffffffff", middle.end, "ffffffffffffffff", hash_tenant("日本")]
    assert all(map(middle.contains, inside))
    assert not any(map(middle.contains, outside))
    ends = ["0" * 16, "f" * 16]
    assert all(map(HashRange().contains, ends))
    assert [HashRange("", middle.start).contains(hashed) for hashed in ends] == [True, False]
    assert [HashRange(middle.end, "").contains(hashed) for hashed in ends] == [False, True]
