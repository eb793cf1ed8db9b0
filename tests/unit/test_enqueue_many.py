"""Many jobs in one call: each is admitted or refused by itself, and none is told before it is durable."""

import asyncio
from collections.abc import Sequence
from uuid import UUID

import pytest

from silo.errors import JobExists, Overloaded, ShardClosed, SiloError
from silo.model.counts import ShardTotals
from silo.model.job import Delayed, JobStatus, NewJob, Ready
from silo.model.limit import Limit
from silo.shard import shard as shard_module
from silo.shard.limits import Limits
from silo.shard.shard import ShardOptions
from silo.storage.memory import Fault
from tests.builders import DONE, a_job, a_rate, at_most, floating
from tests.one_shard import OneShard, one_shard

TICKETS: list[Limit] = [at_most(2)]
HASTY = ShardOptions(store_timeout_s=0.2)  # A hung write fails soon, so that the test can end.


async def enqueue(here: OneShard, *jobs: NewJob) -> list[str]:
    """The answers to one call: the ids, or the names of the refusals."""
    answers = await here.shard.enqueue_many(jobs)
    return [type(answer).__name__ if isinstance(answer, SiloError) else answer for answer in answers]


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "_ADMIT_JOBS", 3)


async def test_all_jobs_of_a_call_are_admitted_in_their_order_and_in_one_write() -> None:
    async with one_shard() as here:
        jobs = [a_job(f"j{number}", metadata={"k": "v"}) for number in range(20)]
        assert await enqueue(here, *jobs) == [job.id for job in jobs]
        assert here.shard.groups_written == 1
        assert here.shard.counts == ShardTotals(20, 0)
        assert await here.lease() == sorted(job.id or "" for job in jobs)


async def test_jobs_without_ids_get_random_ones() -> None:
    async with one_shard() as here:
        ids = await enqueue(here, *(a_job(None) for _ in range(50)))
        assert len(set(ids)) == 50
        assert all(str(UUID(id)) == id for id in ids)
        assert {name[1] for name in here.jobs()} == set(ids)


async def test_nothing_to_enqueue_is_answered_with_nothing() -> None:
    async with one_shard() as here:
        assert await enqueue(here) == []


async def test_a_call_does_what_as_many_calls_would() -> None:
    """The same rows to the byte, but for the moments of their writes."""

    def jobs(now_ms: int) -> Sequence[NewJob]:
        chains = [[], TICKETS, [floating(1, "f")], [a_rate(2)], [at_most(1, "a"), a_rate(1, name="r")]]
        return [
            a_job(
                f"j{number}",
                tenant=f"t{number % 3}",
                limits=chains[number % len(chains)],
                start_at_ms=[0, now_ms + 500, now_ms - 500][number % 7 % 3],
                priority=number,
            )
            for number in range(30)
        ]

    facts = []
    for is_one_call in (True, False):
        async with one_shard() as here:
            if is_one_call:
                await enqueue(here, *jobs(here.now_ms))
            else:
                await here.enqueue(*jobs(here.now_ms))
            await here.settle()
            facts.append(here.jobs())
    assert facts[0] == facts[1]


# Refusals


@pytest.mark.usefixtures("small_steps")
async def test_of_an_id_that_comes_twice_the_first_is_admitted_and_the_others_exist() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("stored"))
        jobs = [
            a_job("a", payload="first"),
            a_job("a", payload="second"),
            a_job("stored"),
            a_job("b"),
            a_job("a", payload="in the next step"),
            a_job("a", tenant="other"),
            a_job("b"),
        ]
        expected = ["a", "JobExists", "JobExists", "b", "JobExists", "a", "JobExists"]
        assert await enqueue(here, *jobs) == expected
        assert here.jobs()["-", "a"].job.payload == jobs[0].payload
        assert here.shard.counts == ShardTotals(4, 0)


async def test_a_refusal_says_which_id_exists() -> None:
    async with one_shard() as here:
        [_, refusal] = await here.shard.enqueue_many([a_job("j"), a_job("j")])
        assert isinstance(refusal, JobExists)
        assert refusal.message == "job already exists with id j"


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("jobs", [2, 3, 8])
async def test_the_quota_of_a_tenant_is_counted_within_a_call(jobs: int) -> None:
    async with one_shard(options=ShardOptions(max_pending_jobs=3)) as here:
        await here.enqueue(a_job("stored"))
        ids = [f"j{number}" for number in range(jobs)]
        answers = await enqueue(here, *map(a_job, ids), a_job("stored"), a_job("other", tenant="other"))
        expected = [*ids[:2], *["QuotaReached"] * (jobs - 2), "JobExists", "other"]
        assert answers == expected


async def test_a_refused_job_takes_no_place_from_those_behind_it() -> None:
    async with one_shard(options=ShardOptions(max_pending_jobs=2)) as here:
        jobs = [a_job("a"), a_job("a"), a_job("a"), a_job("b"), a_job("c")]
        assert await enqueue(here, *jobs) == ["a", "JobExists", "JobExists", "b", "QuotaReached"]


@pytest.mark.usefixtures("small_steps")
async def test_when_too_much_waits_to_be_written_the_first_are_admitted_and_the_rest_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_module, "GROUP_ROWS_MAX", 40)
    async with one_shard() as here:
        answers = await here.shard.enqueue_many([a_job(f"j{number}") for number in range(60)])
        admitted = [answer for answer in answers if isinstance(answer, str)]
        assert 0 < len(admitted) < 60
        assert len(here.jobs()) == len(admitted)
        assert all(isinstance(answer, str | Overloaded) for answer in answers)
        [later] = await here.shard.enqueue_many([a_job("later")])
        assert later == "later"


# Limits


@pytest.mark.usefixtures("small_steps")
async def test_limits_hold_within_a_call_and_go_to_the_first() -> None:
    async with one_shard() as here:
        jobs = [a_job(f"j{number}", limits=TICKETS) for number in range(8)]
        await enqueue(here, *jobs)
        assert here.holders() == {"j0", "j1"}
        assert here.waiting() == [f"j{number}" for number in range(2, 8)]


async def test_jobs_that_wait_already_go_before_those_of_a_call() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("holds", limits=[at_most(1)]), a_job("waits", limits=[at_most(1)]))
        await here.cancel("holds")
        await here.wait(1)
        await enqueue(here, a_job("new", priority=0, limits=[at_most(1)]))
        assert (here.holders(), here.waiting()) == ({"waits"}, ["new"])


async def test_a_call_of_many_limits_needs_no_room_for_all_of_them_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Limits.trim.__kwdefaults__ is not None
    monkeypatch.setitem(Limits.trim.__kwdefaults__, "records_max", 3)
    async with one_shard() as here:
        for round in range(3):
            jobs = [a_job(f"j{round}-{n}", limits=[at_most(1, f"k{n}"), a_rate(9)]) for n in range(40)]
            async with asyncio.timeout(20):
                assert await enqueue(here, *jobs) == [job.id for job in jobs]
        assert len(here.jobs()) == 120


# Starts and workers


async def test_each_job_of_a_call_is_due_when_it_says() -> None:
    async with one_shard() as here:
        starts = {"now": 0, "past": here.now_ms - 9, "later": here.now_ms + 9}
        await enqueue(here, *(a_job(id, start_at_ms=at_ms) for id, at_ms in starts.items()))
        assert isinstance(here.state("now").pending, Ready)
        assert here.state("later").pending == Delayed(starts["later"])
        assert await here.lease() == ["past", "now"]
        await here.wait(9)
        assert await here.lease() == ["later"]


async def test_as_many_polls_are_woken_as_there_are_jobs() -> None:
    async with one_shard() as here:
        polls = [asyncio.ensure_future(here.lease(1, wait_ms=60_000)) for _ in range(30)]
        await asyncio.sleep(0)
        await enqueue(here, *(a_job(f"j{number}") for number in range(20)))
        done, waiting = await asyncio.wait(polls, timeout=0.5)
        assert sorted(poll.result()[0] for poll in done) == sorted(f"j{number}" for number in range(20))
        assert len(waiting) == 10
        here.shard.end_waits()
        await asyncio.gather(*waiting)


# Size and failure


async def test_a_call_of_more_jobs_than_are_admitted_in_one_step_gives_way_to_others() -> None:
    async with one_shard() as here:
        jobs = [a_job(f"j{number}") for number in range(4 * shard_module._ADMIT_JOBS + 1)]
        calling = asyncio.ensure_future(enqueue(here, *jobs))
        await here.enqueue(a_job("other"))
        assert not calling.done()
        assert await calling == [job.id for job in jobs]
        assert here.shard.counts == ShardTotals(len(jobs) + 1, 0)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("fault", [Fault.FAIL_BEFORE, Fault.FAIL_AFTER])
async def test_when_the_store_fails_half_way_no_job_is_answered_as_done(fault: Fault) -> None:
    jobs = [a_job(f"j{number}") for number in range(20)]
    for call in range(1, 4):
        async with one_shard() as here:
            here.storage.faults.plan("write", fault, call=here.storage.faults.calls["write"] + call)
            before = here.storage.faults.calls["write"]
            try:
                await enqueue(here, *jobs)
            except ShardClosed:
                assert here.storage.faults.calls["write"] == before + call
            else:
                assert here.storage.faults.calls["write"] < before + call
                continue
            await here.crash()
            kept = [name[1] for name in here.jobs()]
            assert sorted(kept) == sorted(f"j{number}" for number in range(len(kept))), "the first ones first"
            again = await enqueue(here, *jobs)
            assert again == ["JobExists"] * len(kept) + [f"j{number}" for number in range(len(kept), 20)]


@pytest.mark.usefixtures("small_steps")
async def test_a_caller_that_goes_away_leaves_whole_jobs_behind() -> None:
    for steps in range(12):
        async with one_shard() as here:
            calling = asyncio.ensure_future(
                enqueue(here, *(a_job(f"j{n}", limits=TICKETS) for n in range(9)))
            )
            for _ in range(steps):
                await asyncio.sleep(0)
            calling.cancel()
            await asyncio.wait({calling})
            await here.shard.durable()
            kept = here.jobs()
            assert len(kept) % 3 == 0
            assert len(await here.lease()) == min(2, len(kept))


async def test_a_shard_that_has_closed_admits_nothing() -> None:
    async with one_shard() as here:
        await here.shard.close()
        with pytest.raises(ShardClosed):
            await enqueue(here, a_job("j"))


async def test_what_was_admitted_is_durable_when_it_is_answered() -> None:
    async with one_shard(options=HASTY) as here:
        await enqueue(here, a_job("a"), a_job("b"))
        here.storage.faults.plan("write", Fault.HANG)
        refusing = asyncio.ensure_future(enqueue(here, a_job("a"), a_job("c"), a_job("c")))
        await asyncio.sleep(0.02)
        assert not refusing.done(), "that `c` exists is not durable"
        refusing.cancel()
        await here.crash()
        assert {name[1] for name in here.jobs()} == {"a", "b"}
        assert await here.lease() == ["a", "b"]
        await here.report("a", DONE)
        assert here.status("a") is JobStatus.SUCCEEDED
