"""Concurrency queues: who gets a ticket and when, what gives it back, and what waits for it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random

import pytest

from silo.errors import LeaseNotFound, ShardClosed, SiloError, StateForbids
from silo.model.attempt import Cancelled
from silo.model.counts import QueueCounts
from silo.model.job import DEFAULT_TENANT, LEASE_MS, Delayed, Holder, JobStatus, Ready, Throttled, Waiting
from silo.shard import limits as limits_module
from silo.storage import keys
from silo.storage.memory import Fault
from tests.builders import DONE, SHARD, a_job, a_policy, a_rate, at_most, floating
from tests.one_shard import BROKEN, OneShard, one_shard

ONE = at_most(1)
AT_ONCE = a_policy(20, initial_interval_ms=0)
QUEUE_ROWS = (b"h", b"r", b"n", b"v", b"t", b"y")  # Tickets, lines, counts, timers and alarms.


# Capacity


@pytest.mark.spec("CON-1", "CON-2")
async def test_a_job_gets_a_ticket_only_while_fewer_than_its_own_maximum_are_held() -> None:
    """A waiter that its own lower maximum holds back does not hold back those behind it (there it does)."""
    async with one_shard() as here:
        await here.run(a_job("first", limits=[at_most(2)]))
        await here.enqueue(a_job("alone", limits=[at_most(1)]))
        await here.run(a_job("third", limits=[at_most(3)]))
        await here.enqueue(a_job("second", limits=[at_most(2)]))
        assert here.holders() == {"first", "third"}
        assert here.waiting() == ["alone", "second"]

        await here.report("first")
        assert here.holders() == {"third", "second"}
        await here.report("third")
        assert here.holders() == {"second"}
        assert await here.lease() == ["second"]
        await here.report("second")
        assert here.holders() == {"alone"}


@pytest.mark.spec("CON-2")
async def test_the_maximum_of_a_floating_limit_is_the_one_that_all_its_jobs_share() -> None:
    async with one_shard() as here:
        await here.run(a_job("a", limits=[floating(2)]), a_job("b", limits=[floating(9)]))
        await here.enqueue(a_job("c", limits=[floating(9)]))
        assert here.holders() == {"a", "b"}
        assert here.waiting() == ["c"]
        await here.refresh(3)
        assert here.holders() == {"a", "b", "c"}


@pytest.mark.spec("CON-3")
@pytest.mark.parametrize("seed", range(20))
async def test_a_maximum_that_all_jobs_agree_on_is_never_exceeded(seed: int) -> None:
    rng = Random(seed)
    async with one_shard() as here:
        for number in range(60):
            command = rng.choice(["enqueue", "enqueue", "lease", "report", "steer", "wait", "crash", "fault"])
            jobs = {name[1]: stored.state for name, stored in here.jobs().items()}
            running = [job_id for job_id, state in jobs.items() if state.status is JobStatus.RUNNING]
            match command:
                case "enqueue":
                    start_at_ms = rng.choice([0, 0, here.now_ms + 2_000])
                    job = a_job(
                        f"j{number}", limits=[at_most(3)], retry_policy=AT_ONCE, start_at_ms=start_at_ms
                    )
                    await here.enqueue(job)
                case "lease":
                    await here.lease(rng.randrange(1, 5))
                case "report" if running:
                    some = rng.sample(running, rng.randint(1, len(running)))
                    outcomes = [rng.choice([DONE, BROKEN, Cancelled()]) for _ in some]
                    await asyncio.gather(*map(here.report, some, outcomes))
                case "steer" if jobs:
                    verb = rng.choice(["cancel", "restart", "expedite", "delete"])
                    await _attempt(getattr(here, verb)(rng.choice(list(jobs))), StateForbids)
                case "wait":
                    await here.wait(rng.choice([500, 2_000, LEASE_MS]))
                case "crash":
                    await here.crash()
                case "fault":
                    here.storage.faults.plan("write", rng.choice([Fault.FAIL_BEFORE, Fault.FAIL_AFTER]))
                    job = a_job(f"j{number}", limits=[at_most(3)], retry_policy=AT_ONCE)
                    await _attempt(here.enqueue(job), ShardClosed)
                    await here.crash()
            assert len(here.holders()) <= 3, command


@pytest.mark.spec("CON-4")
async def test_a_lower_maximum_takes_no_ticket_back_and_grants_none_until_enough_came_back() -> None:
    async with one_shard() as here:
        await here.run(*(a_job(f"j{number}", limits=[at_most(3)]) for number in range(3)))
        await here.enqueue(a_job("lower", limits=[at_most(2)]))
        assert here.holders() == {"j0", "j1", "j2"}
        await here.report("j0")
        assert here.holders() == {"j1", "j2"}
        await here.report("j1")
        assert here.holders() == {"j2", "lower"}


@pytest.mark.spec("CON-4")
async def test_a_refresh_that_lowers_a_floating_maximum_takes_no_ticket_back() -> None:
    async with one_shard() as here:
        await here.run(*(a_job(f"j{number}", limits=[floating(3)]) for number in range(3)))
        await here.enqueue(a_job("j3", limits=[floating(3)]))
        await here.refresh(1)
        assert here.holders() == {"j0", "j1", "j2"}
        for job_id in ("j0", "j1"):
            await here.report(job_id)
            assert here.waiting() == ["j3"]
        await here.report("j2")
        assert here.holders() == {"j3"}


@pytest.mark.spec("CON-5")
async def test_raising_a_floating_maximum_grants_as_many_as_fit_in_the_same_commit() -> None:
    async with one_shard() as here:
        await here.enqueue(*(a_job(f"j{n}", limits=[floating(0, refresh_interval_ms=0)]) for n in range(5)))
        assert here.holders() == set()
        for maximum, granted in ((3, 3), (4, 4), (9, 5)):
            await here.wait(1_000)  # Between two refreshes of what is stale at once.
            await here.lease()
            before = here.shard.groups_written
            await here.report_refresh(here.refreshes.pop(), maximum)
            assert here.shard.groups_written == before + 1
            assert here.holders() == {f"j{number}" for number in range(granted)}


@pytest.mark.spec("CON-6")
async def test_nobody_gets_a_ticket_of_a_queue_with_a_maximum_of_zero() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("never", limits=[at_most(0)]))
        assert await here.lease() == []
        assert here.waiting() == ["never"]
        await here.cancel("never")
        assert here.status("never") is JobStatus.CANCELLED
        assert not here.family(*QUEUE_ROWS)


# Order


@pytest.mark.spec("CON-8")
async def test_tickets_go_by_start_then_priority_then_job_id() -> None:
    """A job has one pending attempt, so attempt numbers never decide."""
    async with one_shard() as here:
        await here.run(a_job("holder", limits=[ONE]))
        waiting = [
            a_job("z", priority=99, start_at_ms=here.now_ms - 1_000, limits=[ONE]),
            a_job("c", priority=0, limits=[ONE]),
            a_job("a", priority=1, limits=[ONE]),
            a_job("b", priority=1, limits=[ONE]),
        ]
        await here.enqueue(*Random(3).sample(waiting, 4))
        order = ["holder"]
        for _ in waiting:
            await here.report(order[-1])
            order += await here.lease()
        assert order == ["holder", "z", "c", "a", "b"]


@pytest.mark.spec("CON-8")
@pytest.mark.parametrize("is_cold", [False, True], ids=["warm", "cold"])
async def test_nobody_who_comes_later_takes_a_ticket_that_is_still_to_be_granted(is_cold: bool) -> None:
    async with one_shard() as here:
        await here.enqueue(*(a_job(f"j{number}", limits=[floating(0)]) for number in range(150)))
        await here.refresh(100)
        assert len(here.holders()) < 100  # One step does not grant them all.
        if is_cold:
            await here.crash()
        await here.enqueue(a_job("late", limits=[floating(0)]))
        await here.settle()
        assert len(here.holders()) == 100
        assert "late" in here.waiting()


async def test_a_waiter_in_a_line_of_another_maximum_holds_up_the_others_only_while_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits_module, "LINES_MAX", 1)
    async with one_shard() as here:
        await here.run(*(a_job(f"h{number}", limits=[at_most(2)]) for number in range(2)))
        await here.enqueue(a_job("z", limits=[at_most(2)]))
        await here.enqueue(a_job("a smaller one", priority=0, limits=[at_most(1)]))
        await here.report("h0")
        assert here.counts() == QueueCounts(1, ((2, 2),))
        await here.cancel("a smaller one")
        assert here.holders() == {"h1", "z"}


@pytest.mark.spec("CON-9", "CON-22")
async def test_jobs_of_the_future_hold_no_ticket_and_take_none_that_comes_free() -> None:
    async with one_shard() as here:
        later = here.now_ms + 5_000
        await here.enqueue(*(a_job(f"later{n}", start_at_ms=later, limits=[ONE]) for n in range(10)))
        assert here.holders() == set()
        await here.run(a_job("now", limits=[ONE]))
        assert here.holders() == {"now"}
        await here.report("now")
        assert here.holders() == set()
        await here.wait(4_999)
        assert here.holders() == set()


@pytest.mark.spec("CON-23")
@pytest.mark.parametrize("is_free", [True, False])
async def test_a_job_that_becomes_due_takes_its_ticket_or_waits_for_it(is_free: bool) -> None:
    """Here by the shard's timer, without a poll (there a poll moves it)."""
    async with one_shard() as here:
        await here.enqueue(a_job("later", start_at_ms=here.now_ms + 100, limits=[ONE, at_most(1, "m")]))
        if not is_free:
            await here.run(a_job("holder", limits=[ONE]))
        await here.wait(100)
        if is_free:
            assert here.held("later") == ["k", "m"]
            assert await here.lease() == ["later"]
        else:
            assert here.waiting() == ["later"]
            assert here.counts().lines == ((1, 1),)
            assert await here.lease() == []


@pytest.mark.spec("CON-11")
async def test_a_job_that_was_delayed_waits_at_the_place_of_its_start() -> None:
    async with one_shard() as here:
        await here.run(a_job("holder", limits=[ONE]))
        start = here.now_ms
        await here.enqueue(a_job("second", start_at_ms=start + 100, limits=[ONE]))
        await here.wait(50)
        await here.enqueue(a_job("first", limits=[ONE]))
        await here.wait(100)
        await here.enqueue(a_job("third", limits=[ONE]))
        assert here.waiting() == ["first", "second", "third"]
        assert here.state("second").next_start_ms == start + 100


@pytest.mark.spec("CON-12")
async def test_task_groups_share_a_queue_and_tenants_do_not() -> None:
    async with one_shard() as here:
        await here.enqueue(
            a_job("j", tenant="a", limits=[ONE]),
            a_job("j", tenant="b", limits=[ONE]),
            a_job("other", tenant="a", task_group="g2", limits=[ONE]),
        )
        assert here.holders(tenant="a") == here.holders(tenant="b") == {"j"}
        assert here.waiting(tenant="a") == ["other"]
        await here.lease()
        await here.report("j", tenant="a")
        assert await here.lease(task_group="g2") == ["other"]


@pytest.mark.spec("CON-13")
@pytest.mark.parametrize("waiters", [3, 5, 8])
async def test_tickets_that_come_back_together_go_to_as_many_who_wait(waiters: int) -> None:
    async with one_shard() as here:
        await here.run(*(a_job(f"held{number}", limits=[at_most(5)]) for number in range(5)))
        await here.enqueue(*(a_job(f"w{number}", limits=[at_most(5)]) for number in range(waiters)))
        await asyncio.gather(*(here.report(f"held{number}") for number in range(5)))
        granted = min(5, waiters)
        assert here.holders() == {f"w{number}" for number in range(granted)}
        assert here.counts().holders == granted
        assert sorted(await here.lease()) == sorted(here.holders())


# What a grant does


@pytest.mark.spec("CON-14", "CON-15")
async def test_a_ticket_is_passed_on_in_the_commit_that_frees_it_and_its_job_runs_at_once() -> None:
    async with one_shard() as here:
        await here.run(a_job("first", limits=[ONE]))
        await here.wait(5)
        await here.enqueue(a_job("second", limits=[ONE, at_most(4, "m"), a_rate(5)]))
        assert here.counts() == QueueCounts(1, ((1, 1),))
        before = here.shard.groups_written
        await here.wait(5)
        await here.report("first")
        assert here.shard.groups_written == before + 1
        state = here.state("second")
        assert isinstance(state.pending, Ready)
        assert state.held == (Holder("k", here.now_ms), Holder("m", here.now_ms))
        assert here.counts() == here.counts("m") == QueueCounts(1)
        assert not here.family(b"r")
        assert await here.lease() == ["second"]


@pytest.mark.spec("CON-14")
@pytest.mark.parametrize("next_limit", ["queue", "rate"])
async def test_who_gets_a_ticket_goes_on_to_its_next_limit_in_the_same_step(next_limit: str) -> None:
    async with one_shard() as here:
        await here.run(
            a_job("first", limits=[ONE]),
            a_job("other", limits=[at_most(1, "m")]),
            a_job("fast", limits=[a_rate(1)]),
        )
        beyond = [a_rate(9, name="free"), at_most(1, "m")] if next_limit == "queue" else [a_rate(1)]
        await here.enqueue(a_job("second", limits=[ONE, *beyond]))
        await here.report("first")
        assert here.held("second") == ["k"]
        pending = here.state("second").pending
        if next_limit == "queue":
            assert isinstance(pending, Waiting)
            assert pending.key == "m"
        else:
            assert isinstance(pending, Throttled)


@pytest.mark.spec("CON-16", "CON-30")
@pytest.mark.parametrize("how", ["cancel", "import as ended", "import with a retry"])
async def test_a_waiter_that_is_no_longer_valid_gives_up_its_place_and_its_earlier_tickets(how: str) -> None:
    async with one_shard() as here:
        await here.run(a_job("holder", limits=[ONE]))
        stale = [at_most(1, "early"), a_rate(9), at_most(1, "too"), a_rate(9), ONE]
        await here.enqueue(a_job("a stale one", limits=stale))
        await here.enqueue(a_job("next", limits=[ONE]))
        await here.enqueue(a_job("e", limits=[at_most(1, "early")]), a_job("t", limits=[at_most(1, "too")]))
        assert here.held("a stale one") == ["early", "too"]
        assert here.waiting() == ["a stale one", "next"]
        match how:
            case "cancel":
                await here.cancel("a stale one")
            case "import as ended":
                await here.import_job("a stale one", DONE)
            case "import with a retry":
                await here.import_job("a stale one", BROKEN, retry_policy=a_policy(1))
        assert here.holders("early") == {"e"}
        assert here.holders("too") == {"t"}
        assert here.waiting() == ["next"]
        assert here.held("a stale one") == []
        await here.report("holder")
        assert here.holders() == {"next"}


@pytest.mark.spec("CON-17")
async def test_a_damaged_row_in_a_line_stops_nobody_behind_it() -> None:
    async with one_shard() as here:
        await here.run(a_job("holder", limits=[ONE]))
        await here.enqueue(*(a_job(f"w{number}", limits=[ONE]) for number in range(3)))
        [first, *_] = here.family(b"r")
        await (await here.storage.open(SHARD)).write({first: b"\x01damaged"})
        task_id = _only_lease(here)
        await here.crash()
        for expected in ("w1", "w2"):
            await here.shard.report(task_id, DONE)
            await here.shard.tick()
            assert here.holders() == {expected}
            assert await here.lease() == [expected]
            task_id = _only_lease(here)


def _only_lease(here: OneShard) -> str:
    [row] = here.family(keys.LEASES)
    return row[1:].decode()


@pytest.mark.spec("CON-18")
async def test_a_ticket_is_held_before_its_job_is_leased_even_if_nobody_polls_for_it() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("unpolled", task_group="nobody", limits=[ONE]))
        await here.enqueue(a_job("j", limits=[ONE]))
        await here.wait(3_600_000)
        assert here.holders() == {"unpolled"}
        assert await here.lease() == []


# Release


@pytest.mark.spec("CON-19")
async def test_only_jobs_that_hold_nothing_can_be_deleted() -> None:
    async with one_shard() as here:
        await here.run(a_job("done", limits=[ONE]))
        await here.report("done")
        await here.run(a_job("running", limits=[ONE]))
        await here.enqueue(a_job("waiting", limits=[ONE]), a_job("granted", limits=[at_most(1, "m")]))
        for job_id in ("running", "waiting", "granted"):
            before = here.facts()
            with pytest.raises(StateForbids):
                await here.delete(job_id)
            assert here.facts() == before
        await here.delete("done")
        assert (here.holders(), here.holders("m"), here.waiting()) == ({"running"}, {"granted"}, ["waiting"])


@pytest.mark.spec("CON-20")
async def test_when_every_job_has_ended_no_ticket_no_waiter_and_no_count_is_left() -> None:
    async with one_shard() as here:
        two = [at_most(2), floating(1, "f")]
        await here.enqueue(*(a_job(f"j{number}", limits=two, retry_policy=AT_ONCE) for number in range(6)))
        await here.enqueue(a_job("cancelled before its time", start_at_ms=here.now_ms + 60_000, limits=two))
        await here.enqueue(a_job("over its rate", limits=[at_most(1, "m"), a_rate(0, max_retries=2)]))
        await here.cancel("j5")  # While it waits.
        await here.cancel("cancelled before its time")
        await here.import_job("j4", DONE)
        assert await here.lease() == ["j0"]
        await here.cancel("j0")
        await here.report("j0", BROKEN)
        assert await here.lease() == ["j1"]
        await here.wait(LEASE_MS)  # Lost, and repeated behind the others.
        while leased := await here.lease():
            for job_id in leased:
                await here.report(job_id, BROKEN if here.state(job_id).attempts_ended < 1 else DONE)
        await here.wait(60_000)
        assert all(stored.state.status.is_terminal for stored in here.jobs().values())
        for refresh in here.refreshes:
            await _attempt(here.report_refresh(refresh, 3), LeaseNotFound)
        assert not here.family(b"h", b"r", b"n", b"v", b"t")


@pytest.mark.spec("CON-21")
async def test_a_ticket_comes_back_once() -> None:
    async with one_shard() as here:
        await here.run(a_job("a", limits=[at_most(2)]), a_job("b", limits=[at_most(2)]))
        task_id = here.task_id("a")
        await here.shard.report(task_id, DONE)
        with pytest.raises(LeaseNotFound):
            await here.shard.report(task_id, DONE)
        assert here.counts() == QueueCounts(1)
        assert await here.drop_holders() == 1
        assert await here.drop_holders() == 0
        await here.report("b")  # It holds nothing any more.
        assert here.counts() == QueueCounts(0)


@pytest.mark.spec("CON-25")
@pytest.mark.parametrize("how", ["cancelled", "deleted", "imported as ended"])
async def test_work_of_a_job_that_ended_before_its_time_never_takes_a_ticket(how: str) -> None:
    """Here it leaves with the step that ends the job (there when it is due)."""
    async with one_shard() as here:
        await here.enqueue(a_job("gone", start_at_ms=here.now_ms + 1_000, limits=[ONE]))
        if how == "imported as ended":
            await here.import_job("gone", DONE)
        else:
            await here.cancel("gone")
        if how == "deleted":
            await here.delete("gone")
        assert not here.family(*QUEUE_ROWS)
        await here.wait(1_000)
        assert here.holders() == set()
        await here.run(a_job("j", limits=[ONE]))


# Several limits


@pytest.mark.spec("CON-27")
async def test_a_job_that_waits_for_one_of_two_tickets_holds_neither() -> None:
    """Adjacent limits are taken all at once, so that no ticket lies idle (there it holds the first)."""
    async with one_shard() as here:
        a, b = at_most(1, "a"), at_most(1, "b")
        await here.run(a_job("holder", limits=[b]))
        await here.enqueue(a_job("both", limits=[a, b]))
        assert (here.held("both"), here.waiting("b")) == ([], ["both"])
        await here.run(a_job("passes by", limits=[a]))
        await here.report("passes by")
        await here.report("holder")
        assert here.held("both") == ["a", "b"]
        assert await here.lease() == ["both"]
        assert (here.counts("a"), here.counts("b")) == (QueueCounts(1), QueueCounts(1))
        await here.report("both")
        assert not here.family(b"h", b"n", b"r")


@pytest.mark.spec("CON-28")
async def test_no_limit_is_skipped_whichever_of_them_is_full() -> None:
    """A job waits in the queue of its last full limit, then looks at all of them again."""
    async with one_shard() as here:
        a, b = at_most(1, "a"), at_most(1, "b")
        await here.run(a_job("in a", limits=[a]), a_job("in b", limits=[b]))
        await here.enqueue(a_job("both", limits=[a, b]))
        assert (here.held("both"), here.waiting("b")) == ([], ["both"])
        await here.report("in b")
        assert (here.held("both"), here.waiting("a")) == ([], ["both"])
        assert await here.lease() == []
        await here.report("in a")
        assert here.held("both") == ["a", "b"]
        assert await here.lease() == ["both"]


@pytest.mark.spec("CON-29")
async def test_a_ticket_is_held_while_its_job_waits_for_a_rate_limit_behind_it() -> None:
    async with one_shard() as here:
        await here.run(a_job("fast", limits=[a_rate(1, 1_000)]))
        await here.enqueue(a_job("slow", limits=[at_most(1, "a"), a_rate(1, 1_000), at_most(1, "b")]))
        assert here.held("slow") == ["a"]
        await here.enqueue(a_job("j", limits=[at_most(1, "a")]))
        assert here.waiting("a") == ["j"]
        await here.wait(1_000)
        assert here.held("slow") == ["a", "b"]


@pytest.mark.spec("CON-30")
@pytest.mark.parametrize("how", ["cancel", "import", "exhausted"])
async def test_the_tickets_of_all_earlier_limits_come_back_together(how: str) -> None:
    async with one_shard() as here:
        a, b = at_most(1, "a"), at_most(1, "b")
        full = a_rate(1, 60_000, max_retries=1, initial_backoff_ms=1_000)
        await here.run(a_job("fast", limits=[full]))
        await here.enqueue(a_job("j", limits=[a, a_rate(9, name="free"), b, full]))
        await here.enqueue(a_job("wants a", limits=[a]), a_job("wants b", limits=[b]))
        assert here.held("j") == ["a", "b"]
        match how:
            case "cancel":
                await here.cancel("j")
            case "import":
                await here.import_job("j", DONE)
            case "exhausted":
                await here.wait(1_000)
                assert here.status("j") is JobStatus.FAILED
        assert (here.holders("a"), here.holders("b")) == ({"wants a"}, {"wants b"})


# Progress


@pytest.mark.spec("CON-37")
async def test_more_grants_than_one_step_makes_go_on_after_a_crash_in_the_middle() -> None:
    async with one_shard() as here:
        await here.enqueue(*(a_job(f"j{number}", limits=[floating(0)]) for number in range(150)))
        await here.refresh(100)
        assert 0 < len(here.holders()) < 100
        await here.crash()
        await here.settle()
        assert len(here.holders()) == 100


CALLS: dict[str, Callable[[OneShard], Awaitable[object]]] = {
    "enqueue": lambda here: here.enqueue(a_job("new", limits=[ONE, at_most(1, "m")])),
    "lease": lambda here: here.lease(),
    "report": lambda here: here.report("running"),
    "report a failure": lambda here: here.report("running", BROKEN),
    "cancel who waits": lambda here: here.cancel("w0"),
    "lease one": lambda here: here.lease_one("delayed"),
    "expedite": lambda here: here.expedite("delayed"),
    "import": lambda here: here.import_job("w1", BROKEN, retry_policy=a_policy(1)),
    "drop tickets": lambda here: here.drop_holders(),
}


@pytest.mark.spec("CON-37")
@pytest.mark.parametrize("is_cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("name", CALLS)
async def test_a_call_dropped_at_any_moment_leaves_no_ticket_without_its_owner(
    name: str, is_cold: bool
) -> None:
    was_over = False
    for steps in range(60):
        async with one_shard() as here:
            await here.run(a_job("running", limits=[ONE], retry_policy=AT_ONCE))
            await here.enqueue(*(a_job(f"w{number}", limits=[ONE]) for number in range(2)))
            await here.enqueue(a_job("delayed", limits=[ONE], start_at_ms=here.now_ms + 60_000))
            if is_cold:
                await here.crash()
            call = asyncio.ensure_future(CALLS[name](here))
            for _ in range(steps):
                await asyncio.sleep(0)
            was_over = call.done()
            call.cancel()
            await asyncio.wait({call})
            here.were_dropped |= name == "lease one"
            for _ in range(12):
                await here.wait(LEASE_MS)
                for job_id in await here.lease():
                    await here.report(job_id)
            unfinished = [name for name, job in here.jobs().items() if not job.state.status.is_terminal]
            # A job that runs on nobody's behalf is repeated or fails when its lease is over.
            assert not unfinished
            assert not here.family(b"h", b"r")
        if was_over:
            break
    assert was_over


@pytest.mark.spec("CON-38")
@pytest.mark.parametrize("is_cold", [False, True], ids=["warm", "cold"])
async def test_a_free_ticket_reaches_its_waiter_at_once_beside_120_full_queues(is_cold: bool) -> None:
    async with one_shard() as here:
        for queue in range(120):
            limits = [at_most(1, f"full{queue}")]
            await here.enqueue(*(a_job(f"q{queue}-{number}", limits=limits) for number in range(11)))
        await here.lease(1_000)
        await here.run(a_job("holder", limits=[ONE]))
        await here.enqueue(a_job("waiter", limits=[ONE]))
        if is_cold:
            await here.crash()
        task_id = here.task_id("holder")
        before = _reads(here)
        async with asyncio.timeout(5):
            await here.shard.report(task_id, DONE)
            assert await here.lease(wait_ms=1) == ["waiter"]  # Time stands still: only the work ends it.
        assert _reads(here) - before < 20


def _reads(here: OneShard) -> int:
    return here.storage.faults.calls["get"] + here.storage.faults.calls["scan"]


# Tickets taken by force


@pytest.mark.spec("CON-39", "CON-41")
async def test_dropping_a_tenants_tickets_counts_them_and_serves_who_waits() -> None:
    """More jobs run than the limit allows then: that is accepted."""
    async with one_shard() as here:
        assert await here.drop_holders() == 0
        await here.run(a_job("running", limits=[ONE, at_most(9, "m")]))
        await here.enqueue(a_job("granted", task_group="g2", limits=[at_most(1, "g")]))
        await here.enqueue(a_job("waiter", limits=[ONE]))
        assert await here.drop_holders() == 3
        assert here.holders() == {"waiter"}
        assert await here.lease() == ["waiter"]
        assert here.status("running") is here.status("waiter") is JobStatus.RUNNING


@pytest.mark.spec("CON-40")
async def test_dropping_tickets_touches_nothing_but_tickets_and_repeating_it_is_harmless() -> None:
    async with one_shard() as here:
        await here.run(
            a_job("running", limits=[ONE]), a_job("running", tenant="b", limits=[ONE]), a_job("free")
        )
        await here.enqueue(a_job("waiter", limits=[ONE, at_most(0, "never")]), a_job("b", limits=[ONE]))
        await here.enqueue(a_job("later", start_at_ms=here.now_ms + 5_000, limits=[ONE]))
        before = {name: stored.state for name, stored in here.jobs().items() if name[1] != "b"}
        for _ in range(3):
            await here.drop_holders()
        for name, state in before.items():
            after = here.state(name[1], tenant=name[0])
            assert (after.status, after.lease, after.attempts_ended) == (
                state.status,
                state.lease,
                state.attempts_ended,
            )
            assert (after.pending, after.changed_at_ms) == (state.pending, state.changed_at_ms)
        assert here.holders(tenant="b") == {"running"}
        await here.report("running")
        assert here.status("running") is JobStatus.SUCCEEDED
        assert isinstance(here.state("later").pending, Delayed)


async def test_a_damaged_job_keeps_no_other_ticket_from_being_dropped() -> None:
    async with one_shard() as here:
        await here.run(*(a_job(f"j{number}", limits=[at_most(3)]) for number in range(3)))
        store = await here.storage.open(SHARD)
        await store.write({keys.state_key(DEFAULT_TENANT, "j0"): b"\x01damaged"})
        await here.crash()
        assert await here.drop_holders() == 2
        assert here.holders() == {"j0"}


async def _attempt(call: Awaitable[object], *refusals: type[SiloError]) -> None:
    with suppress(*refusals):
        await call
