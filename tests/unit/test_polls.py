"""Polls: what they return and in which order, what they cost, and what a lost one leaves behind."""

import asyncio

import pytest

from silo.clock import VirtualClock
from silo.errors import ShardClosed
from silo.model.attempt import Failure
from silo.model.floating import FloatingState
from silo.model.job import LEASE_MS, JobStatus, Ready, Waiting
from silo.model.limit import Limit
from silo.shard.shard import Shard, ShardOptions
from silo.storage import keys
from silo.storage.memory import Fault, MemoryStorage
from tests.builders import (
    DONE,
    GROUP,
    SHARD,
    a_job,
    a_policy,
    a_rate,
    at_most,
    floating,
    open_shard,
    reopened,
)
from tests.one_shard import BROKEN, OneShard, one_shard

AT_ONCE = a_policy(9, initial_interval_ms=0)
FIFO = ShardOptions(priority_step_ms=0)


async def poll(shard: Shard, max_tasks: int = 100, *, task_group: str = GROUP) -> list[str]:
    """Lease what is ready; the names of the tasks, a refresh by its key."""
    tasks = await shard.lease_tasks(worker_id="w", task_group=task_group, max_tasks=max_tasks)
    return [f"refresh {task.key}" if isinstance(task, FloatingState) else task.job.id for task in tasks]


# What is returned, and in which order


@pytest.mark.spec("LSE-2")
@pytest.mark.parametrize("backlog", [0, 3_000])
async def test_a_job_for_later_is_never_returned_before_its_start(backlog: int) -> None:
    clock = VirtualClock()
    async with open_shard(clock=clock) as shard:
        start_at_ms = clock.now_ms() + 5_000
        await asyncio.gather(*(shard.enqueue(a_job(f"due-{n:04}")) for n in range(backlog)))
        await shard.enqueue(a_job("later", priority=0, start_at_ms=start_at_ms))
        await shard.enqueue(a_job("other group", task_group="other"))
        for _ in range(3):
            assert "later" not in await poll(shard, backlog or 9)
            clock.advance_ms(1_666)
            await shard.tick()
        assert await poll(shard) == []
        clock.advance_ms(2)
        await shard.tick()
        assert await poll(shard) == ["later"]


@pytest.mark.spec("LSE-5")
async def test_without_a_step_work_goes_by_start_then_priority_then_id() -> None:
    """The order of the reference; here a priority point counts as ten seconds unless told otherwise."""
    async with one_shard(options=FIFO) as here:
        for job_id, age_ms, priority in (
            ("b", 0, 50), ("a", 0, 50), ("urgent", 0, 0), ("B", 0, 50), ("old", 1, 99), ("aa", 0, 50),
        ):  # fmt: skip
            await here.enqueue(a_job(job_id, start_at_ms=here.now_ms - age_ms, priority=priority))
        assert await here.lease() == ["old", "urgent", "B", "a", "aa", "b"]


@pytest.mark.spec("LSE-5")
async def test_a_priority_point_counts_as_ten_seconds_of_waiting() -> None:
    """In the reference any start that is earlier goes first, whatever the priorities."""
    async with one_shard() as here:
        start_at_ms = here.now_ms - 60_000
        await here.enqueue(a_job("patient", start_at_ms=start_at_ms, priority=3))
        await here.enqueue(a_job("second", start_at_ms=start_at_ms + 29_999, priority=0))
        await here.enqueue(a_job("fourth", start_at_ms=start_at_ms + 30_001, priority=0))
        assert await here.lease() == ["second", "patient", "fourth"]


@pytest.mark.spec("LSE-6")
async def test_a_refresh_is_returned_in_the_place_of_a_job_of_priority_0() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("waits", limits=[floating(0)]))
        for job_id, age_ms, priority in (("a", 0, 0), ("z", 0, 0), ("older", 1, 0), ("b", 0, 1)):
            await here.enqueue(a_job(job_id, start_at_ms=here.now_ms - age_ms, priority=priority))
        assert await poll(here.shard) == ["older", "a", "refresh k", "z", "b"]


@pytest.mark.spec("LSE-7")
async def test_retries_expedited_and_waiting_jobs_take_the_place_of_their_own_start() -> None:
    async with one_shard() as here:
        await here.run(
            a_job("holds", limits=[at_most(1)]),
            a_job("retry", retry_policy=a_policy(1, initial_interval_ms=2)),
        )
        await here.enqueue(a_job("waited", limits=[at_most(1)]))
        await here.enqueue(a_job("expedited", start_at_ms=here.now_ms + 9_000))
        await here.wait(1)
        await here.enqueue(a_job("at-1"))
        await here.report("retry", BROKEN)  # Due at 3.
        await here.wait(1)
        await here.expedite("expedited")  # At 2.
        await here.wait(2)
        await here.enqueue(a_job("at-4"))
        await here.report("holds")
        assert await here.lease() == ["waited", "at-1", "expedited", "retry", "at-4"]


@pytest.mark.spec("LSE-11")
@pytest.mark.parametrize(
    "limits",
    [
        [a_rate(1), a_rate(1, unique_key="v")],
        [at_most(1), a_rate(1), at_most(1, "l")],
        [limit for n in range(10) for limit in (a_rate(1, unique_key=f"u{n}"), at_most(1, f"k{n}"))],
    ],
    ids=["two rates", "ticket, rate, ticket", "twenty limits"],
)
async def test_one_poll_is_enough_for_a_chain_that_passes(limits: list[Limit]) -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", limits=limits))
        assert await here.lease(1) == ["j"]
        start_at_ms = here.now_ms + 9_000
        await here.enqueue(a_job("later", start_at_ms=start_at_ms, limits=limits))
        await here.report("j")
        await here.wait(9_000)
        assert await here.lease(1) == ["later"]


@pytest.mark.spec("LSE-13")
async def test_workers_that_poll_side_by_side_never_get_the_same_attempt() -> None:
    async with open_shard() as shard:
        seen: list[str] = []

        async def produce() -> None:
            for number in range(200):
                await shard.enqueue(a_job(f"j{number}"))

        async def work() -> None:
            while shard.counts.completed_jobs < 200:
                for task in await shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=3):
                    seen.append(task.job.id)
                    assert task.state.lease is not None
                    await shard.report(task.state.lease.task_id, DONE)
                await asyncio.sleep(0)

        async with asyncio.timeout(30):
            await asyncio.gather(produce(), *(work() for _ in range(8)))
        assert sorted(seen) == sorted(f"j{number}" for number in range(200))


# Lost polls


@pytest.mark.spec("LSE-16")
@pytest.mark.parametrize("limits", [[], [at_most(3)]])
async def test_a_poll_whose_write_fails_hands_out_nothing_and_leaves_all_where_it_was(
    limits: list[Limit],
) -> None:
    async with one_shard() as here:
        await here.enqueue(*(a_job(f"j{n}", limits=limits) for n in range(3)))
        before = here.facts()
        here.storage.faults.plan("write", Fault.FAIL_BEFORE)
        with pytest.raises(ShardClosed):
            await here.lease()
        await here.crash()
        assert here.facts() == before
        assert await here.lease() == ["j0", "j1", "j2"]


@pytest.mark.spec("LSE-16")
async def test_a_poll_answers_after_its_leases_are_durable() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j"))
        assert await here.lease() == ["j"]
        assert len(here.family(keys.LEASES)) == 1  # Without closing the shard.
        await here.crash()
        assert here.status("j") is JobStatus.RUNNING


@pytest.mark.spec("LSE-17", "LSE-18")
async def test_a_caller_that_goes_away_leaves_jobs_ready_or_leased_and_nothing_between() -> None:
    """What was taken stays leased also when it was not written yet."""
    outcomes = set()
    for steps in range(20):
        async with one_shard() as here:
            await here.enqueue(a_job("j", retry_policy=AT_ONCE))
            await here.crash()  # So that the poll has to read first.
            polling = asyncio.ensure_future(here.lease())
            for _ in range(steps):
                await asyncio.sleep(0)
            polling.cancel()
            await asyncio.wait({polling})
            await here.shard.durable()
            was_leased = here.status("j") is JobStatus.RUNNING
            outcomes.add(was_leased)
            if was_leased:
                await here.wait(LEASE_MS)
                [attempt] = here.attempts("j")
                assert isinstance(attempt.outcome, Failure)
                assert attempt.outcome.code == "WORKER_CRASHED"
            assert await here.lease() == ["j"]
            assert here.state("j").next_attempt_number == 1 + was_leased
    assert outcomes == {False, True}


@pytest.mark.spec("LSE-19")
async def test_work_without_its_job_is_passed_over_and_the_poll_goes_on() -> None:
    """Only damage takes it away here. Its rows stay for a person to look at, its tickets go to others."""
    async with one_shard() as here:
        await here.enqueue(
            a_job("damaged", payload=bytes(2_000), limits=[at_most(1)]), a_job("good"), a_job("fine")
        )
        store = await here.storage.open(SHARD)
        await store.write({keys.job_key("-", "damaged"): None})
        await here.crash()
        assert await here.lease() == ["fine", "good"]
        assert await here.lease() == []
        await here.enqueue(a_job("after"))
        assert await here.lease() == ["after"]


# Nothing blocks the line


@pytest.mark.spec("LSE-21")
async def test_thousands_that_wait_for_one_ticket_delay_nobody_else() -> None:
    async with one_shard() as here:
        blocked = [a_job(f"a{n:04}", tenant="a", limits=[at_most(1)]) for n in range(4_300)]
        await asyncio.gather(*map(here.shard.enqueue, blocked))
        await here.enqueue(*(a_job(f"b{n}", tenant="b") for n in range(3)))
        calls = here.storage.faults.calls.total()
        assert set(await here.lease()) == {"a0000", "b0", "b1", "b2"}
        assert here.storage.faults.calls.total() - calls <= 5
        assert await here.lease() == []


@pytest.mark.spec("LSE-22")
async def test_a_job_that_becomes_due_while_its_queue_is_full_waits_there_in_the_place_of_its_start() -> None:
    async with one_shard() as here:
        await here.run(a_job("holds", limits=[at_most(1)]))
        start_at_ms = here.now_ms + 1_000
        await here.enqueue(a_job("j", start_at_ms=start_at_ms, priority=7, limits=[at_most(1)]))
        assert here.counts().lines == ()
        await here.wait(1_500)
        state = here.state("j")
        assert isinstance(state.pending, Waiting)
        assert state.rank == (start_at_ms, 7, "j")
        assert here.counts().lines == ((1, 1),)
        assert here.family(b"q", b"t") == []


@pytest.mark.spec("LSE-23")
async def test_a_long_tail_of_future_work_costs_a_poll_nothing() -> None:
    async def calls_of_a_poll(future_jobs: int) -> int:
        storage, clock = MemoryStorage(), VirtualClock()
        async with open_shard(storage, clock=clock) as shard:
            later_ms = clock.now_ms() + 60_000
            jobs = [a_job(f"later{n}", start_at_ms=later_ms + n) for n in range(future_jobs)]
            await asyncio.gather(*map(shard.enqueue, jobs))
            await shard.enqueue(a_job("now"))
        shard = await reopened(storage, clock=clock)
        await shard.tick()
        calls = storage.faults.calls.total()
        assert await poll(shard) == ["now"]
        cost = storage.faults.calls.total() - calls
        await shard.close()
        return cost

    assert await calls_of_a_poll(3_000) == await calls_of_a_poll(0)


# Cancel, expedite, import and lease by id


async def a_backlog(here: OneShard, *jobs: str) -> None:
    """Jobs that the shard has read ahead for the next poll."""
    await here.enqueue(a_job("first", priority=0), *map(a_job, jobs))
    assert await here.lease(1) == ["first"]


@pytest.mark.spec("LSE-26")
@pytest.mark.parametrize("limits", [[], [at_most(1)]])
async def test_a_cancelled_attempt_is_not_handed_out(limits: list[Limit]) -> None:
    async with one_shard() as here:
        await a_backlog(here, "other")
        await here.enqueue(a_job("j", limits=limits))
        assert isinstance(here.state("j").pending, Ready)
        await here.cancel("j")
        assert await here.lease() == ["other"]


@pytest.mark.spec("LSE-26")
async def test_of_a_cancel_and_a_poll_at_once_one_comes_first() -> None:
    """It is cancelled and never handed out, or handed out and then flagged; in the reference maybe both."""
    seen = set()
    for steps in range(12):
        async with one_shard() as here:
            await a_backlog(here, "j")
            cancelling = asyncio.ensure_future(here.cancel("j"))
            for _ in range(steps):
                await asyncio.sleep(0)
            leased = await here.lease()
            await cancelling
            assert here.state("j").cancelled_at_ms is not None
            assert here.status("j") is (JobStatus.RUNNING if leased else JobStatus.CANCELLED)
            seen.add(here.status("j"))
    assert seen == {JobStatus.RUNNING, JobStatus.CANCELLED}


@pytest.mark.spec("LSE-27")
async def test_an_expedited_job_is_in_the_next_poll() -> None:
    async with one_shard() as here:
        await a_backlog(here, "other")
        await here.enqueue(a_job("j", priority=0, start_at_ms=here.now_ms + 9_000))
        await here.expedite("j")
        assert await here.lease(1) == ["j"]


@pytest.mark.spec("LSE-28")
async def test_an_attempt_that_an_import_replaced_is_not_handed_out() -> None:
    async with one_shard() as here:
        await a_backlog(here, "ends", "goes-on")
        await here.import_job("ends", DONE)
        await here.import_job("goes-on", BROKEN, retry_policy=AT_ONCE)
        assert await here.lease() == ["goes-on"]
        assert here.state("goes-on").next_attempt_number == 2


@pytest.mark.spec("LSE-29")
@pytest.mark.parametrize("delay_ms", [0, 9_000])
async def test_work_that_was_leased_by_its_id_is_not_handed_out_again(delay_ms: int) -> None:
    async with one_shard() as here:
        await a_backlog(here)
        await here.enqueue(a_job("j", start_at_ms=here.now_ms + delay_ms))
        await here.lease_one("j")
        assert await here.lease() == []
        await here.wait(9_000)
        assert await here.lease() == []
        assert here.status("j") is JobStatus.RUNNING
