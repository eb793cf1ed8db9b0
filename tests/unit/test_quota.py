"""The limit on a tenant's pending jobs: exact, of that tenant only, and no obstacle for what was taken in."""

import asyncio
from pathlib import Path

import pytest

from silo.clock import VirtualClock
from silo.config import load_config
from silo.errors import ConfigError, ErrorKind, JobExists, QuotaReached
from silo.model.attempt import Failure
from silo.model.job import LEASE_MS, JobStatus, LeasedTask
from silo.shard.shard import Shard, ShardOptions
from silo.storage.memory import MemoryStorage
from tests.builders import DONE, GROUP, a_job, a_policy, open_shard

TWO = ShardOptions(max_pending_jobs=2)
TENANT = "ada"


async def enqueue(shard: Shard, *ids: str, tenant: str = TENANT, start_at_ms: int = 0) -> None:
    for id in ids:
        await shard.enqueue(a_job(id, tenant=tenant, start_at_ms=start_at_ms, retry_policy=a_policy()))


async def lease_one(shard: Shard) -> LeasedTask:
    [task] = await shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=1)
    return task


def task_id_of(task: LeasedTask) -> str:
    assert task.state.lease is not None
    return task.state.lease.task_id


async def test_an_enqueue_beyond_the_limit_is_refused_with_the_limit_and_changes_nothing() -> None:
    storage = MemoryStorage()
    async with open_shard(storage, options=TWO) as shard:
        await enqueue(shard, "a", "b")
        before = storage.snapshot(shard.shard_id)
        with pytest.raises(QuotaReached) as caught:
            await enqueue(shard, "c")
        assert caught.value.kind is ErrorKind.EXHAUSTED
        for part in ("'ada'", "2 pending jobs", "tenancy.max_pending_jobs"):
            assert part in caught.value.message
        assert storage.snapshot(shard.shard_id) == before
        assert shard.counts.total_jobs == 2


async def test_without_a_limit_there_is_none() -> None:
    async with open_shard() as shard:
        await enqueue(shard, *(f"{number}" for number in range(50)))
        assert shard.counts.total_jobs == 50


async def test_enqueues_at_the_same_time_do_not_slip_through() -> None:
    async with open_shard(options=TWO) as shard:
        answers = await asyncio.gather(
            *(enqueue(shard, f"{number}") for number in range(20)), return_exceptions=True
        )
        assert sum(answer is None for answer in answers) == 2
        assert sum(isinstance(answer, QuotaReached) for answer in answers) == 18
        assert shard.counts.total_jobs == 2


async def test_other_tenants_do_not_notice() -> None:
    async with open_shard(options=TWO) as shard:
        await enqueue(shard, "a", "b")
        await enqueue(shard, "a", "b", tenant="bob")
        with pytest.raises(QuotaReached):
            await enqueue(shard, "c", tenant="bob")


async def test_a_job_that_started_makes_room() -> None:
    async with open_shard(options=TWO) as shard:
        await enqueue(shard, "a", "b")
        await lease_one(shard)
        await enqueue(shard, "c")
        with pytest.raises(QuotaReached):
            await enqueue(shard, "d")


async def test_a_cancelled_job_makes_room() -> None:
    async with open_shard(options=TWO) as shard:
        await enqueue(shard, "a", "b")
        await shard.cancel(tenant=TENANT, job_id="a")
        await enqueue(shard, "c")
        assert shard.counts.total_jobs == 3


async def test_jobs_of_the_future_count() -> None:
    clock = VirtualClock()
    async with open_shard(clock=clock, options=TWO) as shard:
        await enqueue(shard, "a", "b", start_at_ms=clock.now_ms() + 3_600_000)
        with pytest.raises(QuotaReached):
            await enqueue(shard, "c")


async def test_who_repeats_an_enqueue_hears_that_the_job_is_there() -> None:
    async with open_shard(options=TWO) as shard:
        await enqueue(shard, "a", "b")
        with pytest.raises(JobExists):
            await enqueue(shard, "a")


async def test_a_retry_is_not_refused_and_counts() -> None:
    async with open_shard(options=TWO) as shard:
        await enqueue(shard, "a", "b")
        task = await lease_one(shard)
        await enqueue(shard, "c")
        await shard.report(task_id_of(task), Failure(code="LATER", data=b""))
        view = await shard.get_job(tenant=TENANT, job_id=task.job.id)
        assert view.state.status is JobStatus.SCHEDULED
        with pytest.raises(QuotaReached):
            await enqueue(shard, "d")


async def test_an_expired_lease_is_retried_beyond_the_limit() -> None:
    clock = VirtualClock()
    async with open_shard(clock=clock, options=TWO) as shard:
        await enqueue(shard, "a", "b")
        task = await lease_one(shard)
        await enqueue(shard, "c")
        clock.advance_ms(LEASE_MS)
        await shard.tick()
        view = await shard.get_job(tenant=TENANT, job_id=task.job.id)
        assert view.state.status is JobStatus.SCHEDULED


async def test_a_restart_is_not_refused() -> None:
    async with open_shard(options=TWO) as shard:
        await enqueue(shard, "a")
        await shard.cancel(tenant=TENANT, job_id="a")
        await enqueue(shard, "b", "c")
        await shard.restart(tenant=TENANT, job_id="a")
        view = await shard.get_job(tenant=TENANT, job_id="a")
        assert view.state.status is JobStatus.SCHEDULED


async def test_the_count_outlives_a_restart_of_the_shard() -> None:
    storage = MemoryStorage()
    async with open_shard(storage) as shard:
        await enqueue(shard, "a", "b", "c")
    async with open_shard(storage, options=TWO) as shard:
        with pytest.raises(QuotaReached):
            await enqueue(shard, "d")
        for _ in range(2):
            await shard.report(task_id_of(await lease_one(shard)), DONE)
        await enqueue(shard, "d")


def test_the_limit_is_unset_unless_configured(tmp_path: Path) -> None:
    assert load_config(None, {"HOME": "/home/ada"}).tenancy.max_pending_jobs is None
    path = tmp_path / "silo.toml"
    path.write_text("[tenancy]\nmax_pending_jobs = 5")
    assert load_config(path, {"HOME": "/home/ada"}).tenancy.max_pending_jobs == 5


@pytest.mark.parametrize("value", ["0", "-1", "'many'", "1.5", "true"])
def test_a_wrong_limit_is_an_error(tmp_path: Path, value: str) -> None:
    path = tmp_path / "silo.toml"
    path.write_text(f"[tenancy]\nmax_pending_jobs = {value}")
    with pytest.raises(ConfigError, match=r"tenancy\.max_pending_jobs = .* is wrong; write a whole number"):
        load_config(path, {"HOME": "/home/ada"})
