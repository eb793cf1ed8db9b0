"""Index rows and counters: what queries will scan and add up, looked at as it is stored."""

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest

from silo.engine.retention import Retention
from silo.errors import JobExists, JobNotFound, StateForbids
from silo.model.attempt import Cancelled
from silo.model.counts import QueueCounts, ShardTotals, TenantCounts
from silo.model.job import DEFAULT_TENANT, LEASE_MS, JobStatus
from silo.shard.shard import ShardOptions
from silo.storage import codec, keys
from silo.storage.memory import MemoryStore
from silo.storage.store import Batch
from tests.builders import DONE, SHARD, a_job, a_policy, a_rate, at_most, floating
from tests.invariants import check_snapshot
from tests.one_shard import BROKEN, OneShard, one_shard

T = DEFAULT_TENANT
SCHEDULED, RUNNING, SUCCEEDED, FAILED, CANCELLED = JobStatus
Entry = tuple[JobStatus, int, str]


def entries(here: OneShard, *, tenant: str = T) -> list[Entry]:
    """Status, time and job id of all status index rows of a tenant, in the order of a scan."""
    prefix = keys.status_index_prefix(tenant)
    found = []
    for key in sorted(here.rows()):
        if key.startswith(prefix):
            status, descending = struct.unpack_from(">BQ", key, len(prefix))
            job_id, end = keys.read_text(key, len(prefix) + 9)
            assert end == len(key)
            found.append((JobStatus(status), (1 << 63) - 1 - descending, job_id))
    return found


def of_status(here: OneShard, status: JobStatus) -> list[tuple[int, str]]:
    return [(at_ms, job_id) for found, at_ms, job_id in entries(here) if found is status]


def tenant_counts(here: OneShard, tenant: str = T) -> TenantCounts:
    row = here.rows().get(keys.counts_key(tenant))
    return TenantCounts() if row is None else codec.decode(TenantCounts, row)


def totals(here: OneShard) -> ShardTotals:
    return codec.decode(ShardTotals, here.rows()[keys.TOTALS])


# The status index


@pytest.mark.spec("IDX-1")
async def test_a_job_has_one_status_index_row_with_its_start_or_its_last_change() -> None:
    async with one_shard() as here:
        start_at_ms = here.now_ms + 5_000
        await here.enqueue(a_job("j", start_at_ms=start_at_ms, retry_policy=a_policy(1)))
        assert entries(here) == [(SCHEDULED, start_at_ms, "j")]
        await here.wait(1_000)
        await here.expedite("j")
        assert entries(here) == [(SCHEDULED, here.now_ms, "j")]
        await here.wait(10)
        await here.lease()
        assert entries(here) == [(RUNNING, here.now_ms, "j")]
        await here.wait(10)
        await here.report("j", BROKEN)
        assert entries(here) == [(SCHEDULED, here.now_ms + 1_000, "j")]
        await here.cancel("j")
        assert entries(here) == [(CANCELLED, here.now_ms, "j")]
        await here.restart("j")
        assert entries(here) == [(SCHEDULED, start_at_ms, "j")]
        await here.wait(5_000)
        await here.lease()
        leased_at_ms = here.now_ms
        await here.wait(10)
        await here.cancel("j")  # A flag is no change of status.
        assert entries(here) == [(RUNNING, leased_at_ms, "j")]
        await here.report("j")
        assert entries(here) == [(SUCCEEDED, here.now_ms, "j")]
        await here.delete("j")
        assert entries(here) == []


@pytest.mark.spec("IDX-1")
async def test_a_time_before_all_times_is_indexed_as_the_first_one() -> None:
    async with one_shard() as here:
        await here.import_job("j", BROKEN, finished_at_ms=-5)
        assert here.state("j").changed_at_ms == -5
        assert entries(here) == [(FAILED, 0, "j")]


@pytest.mark.spec("IDX-2")
async def test_a_scan_of_a_status_finds_the_newest_first_and_of_one_time_the_smallest_id() -> None:
    async with one_shard() as here:
        now_ms = here.now_ms
        for job_id, offset_ms in (("c", 0), ("a", 0), ("late", 900), ("early", -900), ("b", 0)):
            await here.enqueue(a_job(job_id, start_at_ms=now_ms + offset_ms))
        assert [job_id for _, job_id in of_status(here, SCHEDULED)] == ["late", "a", "b", "c", "early"]
        for job_id in await here.lease():
            await here.report(job_id)
            await here.wait(1 if job_id != "a" else 0)
        assert [job_id for _, job_id in of_status(here, SUCCEEDED)] == ["c", "a", "b", "early"]
        prefix = keys.status_index_prefix(T)
        store = await here.storage.open(SHARD)
        assert await store.scan(prefix, keys.range_end(prefix), limit=0) == []


@pytest.mark.spec("IDX-3")
async def test_for_one_moment_each_scheduled_job_is_either_due_or_of_the_future() -> None:
    async with one_shard() as here:
        await here.run(a_job("running", limits=[at_most(1)]))
        await here.enqueue(
            a_job("ready"),
            a_job("waits", limits=[at_most(1)]),
            a_job("due soon", start_at_ms=here.now_ms + 100),
            a_job("later", start_at_ms=here.now_ms + 101),
        )
        await here.wait(100)
        now_ms = here.now_ms
        found = of_status(here, SCHEDULED)
        waiting = {job_id for at_ms, job_id in found if at_ms <= now_ms}
        future = {job_id for at_ms, job_id in found if at_ms > now_ms}
        assert waiting == {"ready", "waits", "due soon"}
        assert future == {"later"}
        assert (
            found[0][1] == "later"
        )  # They lie apart: one scan from this moment on finds those that are due.


# The metadata index


def with_metadata(
    here: OneShard, key: str, value: str, *, tenant: str = T, is_prefix: bool = False
) -> set[str]:
    """The jobs with this pair, or with a value that starts so."""
    whole = keys.metadata_index_key(tenant, key, value, "")[: -len(b"\0\0")]  # Up to the job id.
    start = whole[: -len(b"\0\0")] if is_prefix else whole
    found = set()
    for row in here.family(b"m"):
        if row.startswith(start):
            _, at = keys.read_text(row, 1)
            _, at = keys.read_text(row, at)
            _, at = keys.read_text(row, at)
            found.add(keys.read_text(row, at)[0])
    return found


@pytest.mark.spec("IDX-4")
async def test_jobs_are_found_by_a_pair_of_their_metadata_and_by_how_its_value_starts() -> None:
    async with one_shard() as here:
        await here.enqueue(
            a_job("a", metadata={"color": "red", "size": "1"}),
            a_job("b", metadata={"color": "redder"}),
            a_job("c", metadata={"color": "red"}),
            a_job("d", metadata={"colo": "rred", "empty": ""}),
            a_job("e", tenant="t", metadata={"color": "red"}),
        )
        assert len(here.family(b"m")) == 7
        assert with_metadata(here, "color", "red") == {"a", "c"}
        assert with_metadata(here, "color", "red", is_prefix=True) == {"a", "b", "c"}
        assert with_metadata(here, "color", "", is_prefix=True) == {"a", "b", "c"}
        assert with_metadata(here, "empty", "") == {"d"}
        assert with_metadata(here, "color", "re") == set()
        assert with_metadata(here, "color", "red", tenant="t") == {"e"}
        await here.cancel("a")
        assert with_metadata(here, "color", "red") == {"a", "c"}
        await here.delete("a")
        assert with_metadata(here, "color", "red") == {"c"}
        assert with_metadata(here, "size", "1") == set()


@pytest.mark.spec("IDX-5")
async def test_a_tenants_jobs_lie_in_the_order_of_their_ids_and_apart_from_those_of_others() -> None:
    ids = ["10", "2", "a", "a\0b", "aa", "b", "é", "日"]
    tenants = ["a", "a\0", "aa", "b"]
    async with one_shard() as here:
        for tenant in Random(1).sample(tenants, 4):
            await here.enqueue(*(a_job(job_id, tenant=tenant) for job_id in Random(2).sample(ids, 8)))
        listed: dict[str, list[str]] = {}
        for key in here.family(b"j"):
            tenant, at = keys.read_text(key, 1)
            job_id, at = keys.read_text(key, at)
            if key == keys.state_key(tenant, job_id):
                listed.setdefault(tenant, []).append(job_id)
        assert list(listed) == tenants
        for tenant in tenants:
            assert listed[tenant] == sorted(ids, key=str.encode)


# At every commit


@asynccontextmanager
async def checked_commits(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[int]]:
    """Holds what is stored after each write against all that must hold; counts the writes."""
    write = MemoryStore.write
    writes = [0]

    async def checked(store: MemoryStore, batch: Batch) -> None:
        await write(store, batch)
        check_snapshot(dict(store._database.rows), were_dropped=True)
        writes[0] += 1

    monkeypatch.setattr(MemoryStore, "write", checked)
    yield writes


@pytest.mark.spec("IDX-6", "CNT-2")
@pytest.mark.parametrize("seed", range(10))
async def test_after_every_commit_indexes_and_counters_agree_with_the_jobs(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = Random(seed)
    limits = [[], [], [at_most(1)], [floating(1, "f"), a_rate(2)], [a_rate(1, max_retries=1)]]
    options = ShardOptions(retention=Retention(succeeded_s=1, unsuccessful_s=20))
    async with checked_commits(monkeypatch) as writes, one_shard(options=options) as here:
        here.were_dropped = True
        for number in range(80):
            job_id = rng.choice(["j1", "j2", "j3", "j4"])
            try:
                match rng.choice(
                    ["enqueue", "enqueue", "lease", "lease", "report", "steer", "import", "wait"]
                ):
                    case "enqueue":
                        policy = a_policy(2, initial_interval_ms=rng.choice([0, 500]))
                        start_at_ms = rng.choice([0, here.now_ms + 700])
                        job = a_job(
                            job_id,
                            limits=rng.choice(limits),
                            metadata={"k": str(number % 3)},
                            retry_policy=policy,
                            start_at_ms=start_at_ms,
                        )
                        await here.enqueue(job)
                    case "lease":
                        await here.lease(rng.randint(1, 3))
                    case "report":
                        for name, stored in here.jobs().items():
                            if stored.state.status is RUNNING:
                                await here.report(name[1], rng.choice([DONE, BROKEN, Cancelled()]))
                    case "steer":
                        verb = rng.choice(["cancel", "restart", "expedite", "delete", "lease_one"])
                        await getattr(here, verb)(job_id)
                    case "import":
                        await here.import_job(job_id, rng.choice([BROKEN, DONE]), retry_policy=a_policy(5))
                    case "wait":
                        await here.wait(rng.choice([500, 1_000, LEASE_MS]))
            except (JobExists, JobNotFound, StateForbids):
                pass
            here.jobs()
        assert writes[0] > 20


@pytest.mark.spec("IDX-7")
async def test_whoever_got_an_answer_sees_what_it_says() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", metadata={"k": "v"}))
        assert await _seen(here) is SCHEDULED
        await here.lease()
        assert await _seen(here) is RUNNING
        await here.report("j", BROKEN)
        assert await _seen(here) is FAILED
        await here.restart("j")
        assert await _seen(here) is SCHEDULED
        await here.cancel("j")
        assert await _seen(here) is CANCELLED
        await here.delete("j")
        with pytest.raises(JobNotFound):
            await _seen(here)


async def _seen(here: OneShard) -> JobStatus:
    """What a lookup shows, and the same in the index."""
    view = await here.shard.get_job(tenant=T, job_id="j")
    assert [status for status, _, _ in entries(here)] == [view.state.status]
    return view.state.status


# Counters


@pytest.mark.spec("CNT-1")
async def test_counters_are_the_numbers_of_what_they_count() -> None:
    async with one_shard() as here:
        await here.run(*(a_job(job_id, limits=[at_most(3)]) for job_id in ("done", "broken", "running")))
        await here.report("done")
        await here.report("broken", BROKEN)
        await here.enqueue(*(a_job(f"w{number}", limits=[at_most(1)]) for number in range(3)))
        await here.enqueue(a_job("other", limits=[at_most(2)]), a_job("stopped"))
        await here.cancel("stopped")
        await here.enqueue(a_job("j", tenant="t"))
        assert totals(here) == here.shard.counts == ShardTotals(9, 3)
        assert tenant_counts(here) == TenantCounts((4, 1, 1, 1, 1))
        assert tenant_counts(here, "t") == TenantCounts((1, 0, 0, 0, 0))
        assert here.counts() == QueueCounts(2, ((1, 3),))  # `other` has the second ticket.


@pytest.mark.spec("CNT-2")
async def test_counters_are_there_again_after_a_crash_and_go_on_from_there() -> None:
    async with one_shard() as here:
        await here.run(a_job("running", limits=[at_most(1)]))
        await here.enqueue(a_job("waiting", limits=[at_most(1)]))
        before = (totals(here), tenant_counts(here), here.counts())
        await here.crash()
        assert here.shard.counts == before[0]
        assert (totals(here), tenant_counts(here), here.counts()) == before
        await here.report("running")
        await here.settle()
        assert (totals(here), tenant_counts(here)) == (ShardTotals(2, 1), TenantCounts((1, 0, 1, 0, 0)))
        assert here.counts() == QueueCounts(1)


@pytest.mark.spec("CNT-3")
async def test_a_job_counts_as_completed_when_it_ends_and_not_before() -> None:
    async with one_shard() as here:
        completed = lambda: here.shard.counts.completed_jobs  # noqa: E731
        await here.run(a_job("done"), a_job("broken"), a_job("flagged"), a_job("lost"))
        await here.report("done")
        assert completed() == 1
        await here.report("broken", BROKEN)
        assert completed() == 2
        await here.cancel("flagged")
        await here.cancel("lost")
        assert completed() == 2
        await here.report("flagged", Cancelled())
        assert completed() == 3
        await here.wait(LEASE_MS)
        assert completed() == 4
        await here.enqueue(a_job("waiting"))
        await here.cancel("waiting")
        assert completed() == 5
        await here.restart("broken")
        assert completed() == 4


@pytest.mark.spec("CNT-3")
async def test_a_failure_that_is_repeated_completes_nothing() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=a_policy(1)))
        await here.report("j", BROKEN)
        assert here.shard.counts == ShardTotals(1, 0)
        assert tenant_counts(here) == TenantCounts((1, 0, 0, 0, 0))
