"""The limit chain: in which order an attempt passes its limits, what it holds, and where it waits."""

import pytest

from silo.errors import ShardClosed
from silo.model.job import Delayed, JobState, JobStatus, Ready, Throttled, Waiting
from silo.model.limit import Limit
from silo.storage import codec, keys
from silo.storage.memory import Fault
from tests.builders import DONE, SHARD, a_job, a_policy, a_rate, at_most, floating
from tests.invariants import check_snapshot
from tests.one_shard import BROKEN, OneShard, one_shard

A, B, C = at_most(1, "a"), at_most(1, "b"), at_most(1, "c")
AT_ONCE = a_policy(5, initial_interval_ms=0)
PLACES = (b"q", b"t", b"r", b"v", b"x")
"""Queues, timers, lines of tickets and of buckets, and questions: where a Scheduled job can be."""


def progress(here: OneShard, job_id: str) -> tuple[int, list[str]]:
    """How many limits a job has passed, and what it holds."""
    state = here.state(job_id)
    return state.passed, [holder.key for holder in state.held]


# Order


@pytest.mark.spec("CHN-1", "CHN-5", "ENT-26")
async def test_limits_are_passed_one_after_another_in_the_order_of_the_job() -> None:
    async with one_shard() as here:
        await here.run(a_job("holds-a", limits=[A]), a_job("holds-b", limits=[B]))
        await here.run(a_job("spends", limits=[a_rate(1, 5_000)]))
        await here.enqueue(a_job("j", limits=[A, a_rate(1, 5_000), B]))
        assert progress(here, "j") == (0, [])
        assert here.waiting("a") == ["j"]

        await here.report("holds-a")
        assert progress(here, "j") == (1, ["a"])
        assert isinstance(here.state("j").pending, Throttled)

        await here.wait(5_000)
        assert progress(here, "j") == (2, ["a"])  # What it passed it holds while it waits for the rest.
        assert here.waiting("b") == ["j"]

        await here.report("holds-b")
        assert progress(here, "j") == (3, ["a", "b"])
        assert await here.lease() == ["j"]


@pytest.mark.spec("CHN-1")
async def test_a_later_limit_is_not_touched_before_the_earlier_ones_are_passed() -> None:
    async with one_shard() as here:
        await here.run(a_job("first", limits=[a_rate(1, 5_000)]))
        await here.enqueue(a_job("j", limits=[a_rate(1, 5_000), A, a_rate(1, unique_key="later")]))
        assert (here.holders("a"), here.bucket(unique_key="later")) == (set(), None)


@pytest.mark.spec("CHN-2", "ENT-26")
async def test_a_job_that_can_be_leased_holds_a_ticket_of_each_of_its_queues_in_their_order() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", limits=[B, a_rate(1), floating(2, "f"), A]))
        assert here.held("j") == ["b", "f", "a"]
        assert len(here.family(b"q")) == 1
        assert await here.lease() == ["j"]
        assert here.held("j") == ["b", "f", "a"]


@pytest.mark.spec("CHN-2")
async def test_no_worker_gets_a_job_that_lacks_one_of_its_tickets() -> None:
    async with one_shard() as here:
        await here.run(a_job("holds-c", limits=[C]))
        await here.enqueue(a_job("j", limits=[A, a_rate(9), B, a_rate(9), C]))
        assert progress(here, "j") == (4, ["a", "b"])
        assert await here.lease() == []
        await here.report("holds-c")
        assert await here.lease() == ["j"]


# Due, free, full


@pytest.mark.spec("CHN-3", "CHN-6")
async def test_a_job_for_later_takes_no_ticket_and_spends_no_hit_before_its_start() -> None:
    async with one_shard() as here:
        start_at_ms = here.now_ms + 5_000
        await here.enqueue(a_job("j", start_at_ms=start_at_ms, limits=[A, a_rate(1)]))
        assert here.state("j").pending == Delayed(start_at_ms)
        await here.wait(4_999)
        assert (here.holders("a"), here.bucket()) == (set(), None)
        await here.wait(1)
        assert here.holders("a") == {"j"}
        assert here.bucket() is not None
        assert await here.lease() == ["j"]


@pytest.mark.spec("CHN-4")
async def test_free_tickets_are_taken_in_the_write_that_takes_the_job_in() -> None:
    async with one_shard() as here:
        writes = here.storage.faults.calls["write"]
        await here.enqueue(a_job("j", limits=[A, a_rate(9), B]))
        assert here.storage.faults.calls["write"] == writes + 1
        assert isinstance(here.state("j").pending, Ready)
        assert here.held("j") == ["a", "b"]
        assert {holder.granted_at_ms for holder in here.state("j").held} == {here.now_ms}


@pytest.mark.spec("CHN-5")
async def test_a_job_whose_queue_is_full_waits_there_with_its_own_start_and_priority() -> None:
    async with one_shard() as here:
        await here.run(a_job("holds", limits=[A]))
        start_at_ms = here.now_ms - 60_000
        await here.enqueue(a_job("j", start_at_ms=start_at_ms, priority=7, limits=[a_rate(9), A]))
        state = here.state("j")
        assert isinstance(state.pending, Waiting)
        assert (state.pending.key, state.rank) == ("a", (start_at_ms, 7, "j"))
        assert dict(here.counts("a").lines) == {1: 1}
        assert here.holders("a") == {"holds"}


@pytest.mark.spec("CHN-5")
async def test_of_adjacent_queues_a_job_takes_all_tickets_or_none() -> None:
    """In the reference it sits on those it has while it waits for the others."""
    async with one_shard() as here:
        await here.run(a_job("holds-b", limits=[B]))
        await here.enqueue(a_job("j", limits=[A, B]))
        assert (here.held("j"), here.waiting("b")) == ([], ["j"])
        await here.run(a_job("other", limits=[A]))  # The ticket that j could not use yet.
        await here.report("holds-b")
        assert (here.held("j"), here.waiting("a")) == ([], ["j"])
        await here.report("other")
        assert here.held("j") == ["a", "b"]


@pytest.mark.spec("CHN-6")
async def test_a_due_job_asks_its_rate_limit_in_the_write_that_takes_it_in() -> None:
    """In the reference a poll asks later. The bucket is in the shard here, and stored with the job."""
    async with one_shard() as here:
        writes = here.storage.faults.calls["write"]
        for job_id in ("in", "over"):
            await here.enqueue(a_job(job_id, limits=[a_rate(1, 5_000)]))
        assert here.storage.faults.calls["write"] == writes + 2
        bucket = here.bucket()
        assert bucket is not None
        assert bucket.used == 1
        assert isinstance(here.state("in").pending, Ready)
        assert here.state("over").pending == Throttled(checks=1)


@pytest.mark.spec("CHN-7", "LSE-7", "SM-2")
async def test_a_job_that_waited_for_its_limits_is_not_moved_behind_younger_work() -> None:
    async with one_shard() as here:
        await here.run(a_job("holds", limits=[A]))
        await here.enqueue(a_job("waited", limits=[A, a_rate(9)]))
        start_at_ms = here.now_ms
        await here.wait(100)
        await here.enqueue(a_job("younger"))
        await here.report("holds")
        assert here.state("waited").next_start_ms == start_at_ms
        assert await here.lease() == ["waited", "younger"]


@pytest.mark.spec("CHN-8")
async def test_the_maximum_of_a_fixed_limit_is_that_of_the_job_itself() -> None:
    async with one_shard() as here:
        await here.run(a_job("one", limits=[at_most(1)]), a_job("two", limits=[at_most(2)]))
        await here.enqueue(a_job("again-two", limits=[at_most(2)]), a_job("three", limits=[at_most(3)]))
        assert here.holders() == {"one", "two", "three"}
        assert here.waiting() == ["again-two"]


@pytest.mark.spec("CHN-8")
async def test_the_maximum_of_a_floating_limit_is_made_by_the_first_job_and_shared_by_all() -> None:
    async with one_shard() as here:
        assert here.floating() is None
        await here.enqueue(a_job("a", limits=[floating(1)]), a_job("b", limits=[floating(5)]))
        assert (here.holders(), here.waiting()) == ({"a"}, ["b"])
        assert await here.lease() == ["a"]
        await here.refresh(2)
        assert here.holders() == {"a", "b"}


# Failure, retry, deadlock


@pytest.mark.spec("CHN-10")
@pytest.mark.parametrize("limits", [[A], [A, B], [A, a_rate(1), B], [floating(1)]])
async def test_a_walk_that_is_not_written_leaves_no_ticket_no_hit_and_no_job(limits: list[Limit]) -> None:
    async with one_shard() as here:
        before = here.facts()
        here.storage.faults.plan("write", Fault.FAIL_BEFORE)
        with pytest.raises(ShardClosed):
            await here.enqueue(a_job("j", limits=limits))
        await here.crash()
        assert here.facts() == before
        await here.enqueue(a_job("j", limits=limits))
        assert await here.lease() == ["j"]


@pytest.mark.spec("CHN-11", "RET-12")
async def test_a_retry_at_once_stands_behind_those_who_waited_already() -> None:
    """If nobody does, it has its tickets in the write of the report; in the reference only later."""
    async with one_shard() as here:
        await here.run(a_job("j", limits=[A], retry_policy=AT_ONCE))
        await here.wait(1)
        await here.enqueue(a_job("waits", limits=[A]))
        await here.wait(1)
        await here.report("j", BROKEN)
        assert (here.holders("a"), here.waiting("a")) == ({"waits"}, ["j"])
        assert await here.lease() == ["waits"]
        await here.report("waits")
        assert await here.lease() == ["j"]
        await here.report("j", BROKEN)
        assert here.holders("a") == {"j"}


@pytest.mark.spec("CHN-12")
@pytest.mark.parametrize("rounds", [1, 10])
async def test_jobs_that_take_the_same_queues_in_other_orders_all_end(rounds: int) -> None:
    """In the reference they can block each other for ever."""
    orders = [[A, B], [B, A], [A, B, C], [C, A], [B, C]]
    async with one_shard() as here:
        for number in range(rounds):
            await here.enqueue(*(a_job(f"{number}-{n}", limits=order) for n, order in enumerate(orders)))
        while leased := await here.lease():
            for job_id in leased:
                await here.report(job_id)
        assert {stored.state.status for stored in here.jobs().values()} == {JobStatus.SUCCEEDED}
        assert here.family(b"h", b"r", b"n") == []


# What a job holds, and where it is


@pytest.mark.spec("ENT-27")
async def test_an_attempt_has_one_task_id_and_a_retry_another_with_tickets_of_its_own() -> None:
    """The id is drawn with the lease; until then the job's own id says whose a ticket is."""
    async with one_shard() as here:
        await here.run(a_job("j", limits=[A, a_rate(9), B], retry_policy=a_policy(1)))
        first = here.task_id("j")
        assert (here.holders("a"), here.holders("b")) == ({"j"}, {"j"})
        await here.report("j", BROKEN)
        assert (here.holders("a"), here.holders("b")) == (set(), set())
        await here.wait(1_000)
        assert await here.lease() == ["j"]
        assert here.task_id("j") != first
        assert (here.counts("a").holders, here.counts("b").holders) == (1, 1)


@pytest.mark.spec("ENT-29")
async def test_a_scheduled_job_is_in_exactly_one_place_whatever_it_waits_for() -> None:
    """A throttled job with a bound on its checks has a second row, of the time of its next one."""
    async with one_shard() as here:
        bounded = a_rate(1, 5_000, unique_key="b", max_retries=3)
        await here.run(a_job("holds", limits=[A, a_rate(1, 5_000), bounded]))
        waiting = {
            "ready": a_job("ready", limits=[B]),
            "delayed": a_job("delayed", start_at_ms=here.now_ms + 9_000, limits=[A]),
            "parked": a_job("parked", limits=[A]),
            "throttled": a_job("throttled", limits=[C, a_rate(1, 5_000)]),
            "bounded": a_job("bounded", limits=[bounded]),
            "never": a_job("never", limits=[a_rate(1, hits=2)]),
        }
        for job_id, job in waiting.items():
            before = here.family(*PLACES)
            await here.enqueue(job)
            added = set(here.family(*PLACES)) - set(before)
            assert len(added) == (2 if job_id == "bounded" else 1), job_id
            assert here.state(job_id).status is JobStatus.SCHEDULED
        for job_id in waiting:
            await here.cancel(job_id)
        assert here.family(*PLACES) == []


@pytest.mark.spec("ENT-31")
async def test_a_key_that_a_job_names_twice_is_one_ticket() -> None:
    """In the reference it needs a free one for each, and with a maximum of 1 waits for itself for ever."""
    async with one_shard() as here:
        await here.enqueue(a_job("j", limits=[A, A, a_rate(9), A, floating(1, "a")]))
        assert here.held("j") == ["a"]
        assert here.counts("a").holders == 1
        assert await here.lease() == ["j"]
        await here.report("j")
        assert here.counts("a").holders == 0


@pytest.mark.spec("ENT-32")
async def test_whoever_waits_goes_on_without_the_description_of_its_job() -> None:
    async with one_shard() as here:
        await here.run(a_job("holds", limits=[A]))
        await here.enqueue(a_job("j", limits=[C, a_rate(9), A, a_rate(9), B]))
        running = here.task_id("holds")
        store = await here.storage.open(SHARD)
        await store.write({keys.job_key("-", "j"): None})
        await here.crash()
        await here.shard.report(running, DONE)
        await here.settle()
        [row] = here.family(b"q")
        state, _ = codec.decode_queued(here.rows()[row])
        assert isinstance(state, JobState)
        assert (state.job_id, [holder.key for holder in state.held]) == ("j", ["c", "a", "b"])


@pytest.mark.spec("ENT-33")
async def test_nobody_waits_for_a_ticket_that_it_holds() -> None:
    async with one_shard() as here:
        await here.run(a_job("holds", limits=[A]))
        await here.enqueue(*(a_job(f"j{n}", limits=[A, B], retry_policy=AT_ONCE) for n in range(4)))
        for _ in range(8):
            for key in ("a", "b"):
                assert not here.holders(key) & set(here.waiting(key))
            [running] = [n[1] for n, s in here.jobs().items() if s.state.status is JobStatus.RUNNING]
            await here.report(running, BROKEN)
            assert len(await here.lease()) == 1
        check_snapshot(here.rows(), now_ms=here.now_ms)


@pytest.mark.spec("ENT-6")
async def test_a_queue_is_shared_by_all_task_groups_and_by_both_kinds_of_limits_of_a_tenant() -> None:
    async with one_shard() as here:
        await here.run(a_job("fixed", limits=[at_most(2, "q")]))
        await here.enqueue(a_job("floats", task_group="other", limits=[floating(2, "q")]))
        await here.enqueue(a_job("third", task_group="third", limits=[at_most(2, "q")]))
        await here.enqueue(a_job("elsewhere", tenant="acme", limits=[at_most(1, "q")]))
        assert here.holders("q") == {"fixed", "floats"}
        assert here.waiting("q") == ["third"]
        assert here.holders("q", tenant="acme") == {"elsewhere"}
        await here.report("fixed")
        assert here.holders("q") == {"floats", "third"}


@pytest.mark.spec("SM-2")
async def test_progress_in_the_chain_is_no_change_of_status() -> None:
    def seen(state: JobState) -> tuple[object, ...]:
        return state.status, state.changed_at_ms, state.next_start_ms, state.next_attempt_number

    async with one_shard() as here:
        await here.run(a_job("holds", limits=[A, a_rate(1, 5_000)]))
        start_at_ms = here.now_ms + 1_000
        await here.enqueue(a_job("j", start_at_ms=start_at_ms, limits=[A, a_rate(1, 5_000), B]))
        before = seen(here.state("j"))
        await here.wait(1_000)
        assert isinstance(here.state("j").pending, Waiting)
        assert seen(here.state("j")) == before
        await here.report("holds")
        assert isinstance(here.state("j").pending, Throttled)
        assert seen(here.state("j")) == before
        await here.wait(5_000)
        assert isinstance(here.state("j").pending, Ready)
        assert seen(here.state("j")) == before
        assert keys.status_index_key("-", JobStatus.SCHEDULED, start_at_ms, "j") in here.rows()
