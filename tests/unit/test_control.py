"""Cancel, restart, expedite, delete and lease by id: of jobs in every place where one can be."""

import pytest

from silo.errors import JobExists, JobNotFound, LeaseNotFound, StateForbids
from silo.model.attempt import Cancelled
from silo.model.counts import ShardTotals
from silo.model.job import (
    DEFAULT_TENANT,
    LEASE_MS,
    Checking,
    Delayed,
    JobStatus,
    Ready,
    Throttled,
    Waiting,
)
from silo.storage import keys
from tests.builders import DONE, a_job, a_policy, a_rate, at_most
from tests.one_shard import BROKEN, OneShard, one_shard

T = DEFAULT_TENANT
SCHEDULED, CANCELLED = JobStatus.SCHEDULED, JobStatus.CANCELLED
PLACES: dict[str, type] = {
    "ready": Ready,
    "delayed": Delayed,
    "retry in backoff": Delayed,
    "waiting": Waiting,
    "throttled": Throttled,
    "checking": Checking,
}
TICKET = at_most(1, "early")  # The job holds it where it can be held.


async def a_job_that_is(place: str, here: OneShard) -> None:
    """The job `j` in this place, with what keeps it there."""
    later_ms = here.now_ms + 60_000
    match place:
        case "ready":
            await here.enqueue(a_job("j", limits=[TICKET]))
        case "delayed":
            await here.enqueue(a_job("j", start_at_ms=later_ms, limits=[TICKET]))
        case "retry in backoff":
            policy = a_policy(9, initial_interval_ms=60_000)
            await here.run(a_job("j", limits=[TICKET], retry_policy=policy))
            await here.report("j", BROKEN)
        case "waiting":
            await here.run(a_job("holder", limits=[at_most(1)]))
            await here.enqueue(a_job("j", limits=[TICKET, a_rate(9), at_most(1)]))
        case "throttled":
            await here.run(a_job("fast", limits=[a_rate(1, 60_000)]))
            await here.enqueue(a_job("j", limits=[TICKET, a_rate(1, 60_000)]))
        case "checking":
            await here.enqueue(a_job("j", limits=[TICKET, a_rate(1, hits=2, max_retries=9)]))
    assert isinstance(here.state("j").pending, PLACES[place])


def leftovers(here: OneShard) -> list[bytes]:
    """The rows by which something of the job `j` could still happen."""
    return [key for key in here.family(b"q", b"t", b"r", b"v", b"x", b"h") if key.endswith(b"j\0\0")]


# Cancel


@pytest.mark.spec("CAN-1")
@pytest.mark.parametrize("place", PLACES)
async def test_a_job_that_waits_anywhere_is_cancelled_at_once_and_its_tickets_pass_on(place: str) -> None:
    async with one_shard() as here:
        await a_job_that_is(place, here)
        before, completed = here.state("j"), here.shard.counts.completed_jobs
        if before.held:
            await here.enqueue(a_job("next", limits=[TICKET]))
            assert here.waiting("early") == ["next"]
        await here.cancel("j")
        after = here.state("j")
        assert (after.status, after.changed_at_ms, after.cancelled_at_ms) == (
            CANCELLED,
            here.now_ms,
            here.now_ms,
        )
        assert (after.pending, after.held) == (None, ())
        assert after.next_start_ms == before.next_start_ms
        assert leftovers(here) == []
        assert here.shard.counts.completed_jobs == completed + 1
        assert here.counts().lines == ()
        if before.held:
            assert here.holders("early") == {"next"}
            assert "next" in await here.lease()


@pytest.mark.spec("CAN-2")
async def test_a_cancelled_waiter_is_passed_over() -> None:
    async with one_shard() as here:
        await here.run(a_job("holder", limits=[at_most(1)]))
        await here.enqueue(*(a_job(f"w{number}", limits=[at_most(1)]) for number in range(5)))
        for job_id in ("w0", "w1", "w3"):
            await here.cancel(job_id)
        await here.report("holder")
        assert await here.lease() == ["w2"]
        await here.report("w2")
        assert await here.lease() == ["w4"]


@pytest.mark.spec("CAN-3")
@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (DONE, JobStatus.SUCCEEDED),
        (BROKEN, CANCELLED),
        (Cancelled(), CANCELLED),
        (None, CANCELLED),
    ],
    ids=["success", "failure", "cancelled", "expired"],
)
async def test_a_running_job_is_told_of_its_cancellation_and_ends_by_its_worker(
    outcome: object, status: JobStatus
) -> None:
    """A failure ends it as Cancelled and is not repeated (there it is)."""
    async with one_shard() as here:
        await here.run(a_job("j", limits=[at_most(1)], retry_policy=a_policy(9, initial_interval_ms=0)))
        before = here.state("j")
        await here.wait(5)
        await here.cancel("j")
        flagged = here.state("j")
        assert (flagged.status, flagged.changed_at_ms, flagged.lease, flagged.held) == (
            before.status,
            before.changed_at_ms,
            before.lease,
            before.held,
        )
        assert here.shard.counts.completed_jobs == 0
        task_id = here.task_id("j")
        assert await here.shard.heartbeat(task_id=task_id, worker_id="w") == here.now_ms
        if outcome is None:
            await here.wait(LEASE_MS)
        else:
            await here.report("j", outcome)
        assert here.status("j") is status
        assert here.state("j").cancelled_at_ms == flagged.cancelled_at_ms
        assert here.holders() == set()


@pytest.mark.spec("CAN-4")
async def test_cancelling_a_waiter_leaves_those_who_hold_tickets_alone() -> None:
    async with one_shard() as here:
        await here.run(*(a_job(f"h{number}", limits=[at_most(2)]) for number in range(2)))
        await here.enqueue(a_job("w", limits=[at_most(2)]))
        before = [here.state("h0"), here.state("h1")]
        await here.cancel("w")
        assert [here.state("h0"), here.state("h1")] == before
        assert here.counts().holders == 2


@pytest.mark.spec("CAN-5")
async def test_a_second_cancellation_is_refused_and_changes_nothing() -> None:
    async with one_shard() as here:
        await here.run(a_job("running"), a_job("done"))
        await here.report("done")
        await here.enqueue(a_job("waiting"))
        for job_id in ("running", "waiting"):
            await here.cancel(job_id)
        refusals = {
            "running": "job is already cancelled",
            "waiting": "job is already cancelled",
            "done": "job is already in terminal state",
        }
        before = here.facts()
        for job_id, text in refusals.items():
            with pytest.raises(StateForbids, match=text):
                await here.cancel(job_id)
        with pytest.raises(JobNotFound, match="job not found"):
            await here.cancel("nowhere")
        assert here.facts() == before


@pytest.mark.spec("CAN-6")
@pytest.mark.parametrize("how", ["delete", "restart", "import"])
@pytest.mark.parametrize("place", PLACES)
async def test_a_cancelled_job_can_be_deleted_restarted_and_imported(place: str, how: str) -> None:
    async with one_shard() as here:
        await a_job_that_is(place, here)
        await here.cancel("j")
        match how:
            case "delete":
                await here.delete("j")
                assert (T, "j") not in here.jobs()
            case "restart":
                await here.restart("j")
                assert here.status("j") is SCHEDULED
            case "import":
                assert await here.import_job("j", DONE) is JobStatus.SUCCEEDED


@pytest.mark.spec("CAN-6")
async def test_a_job_cancelled_while_it_runs_can_be_deleted_when_it_has_ended() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        await here.cancel("j")
        with pytest.raises(StateForbids):
            await here.delete("j")
        await here.report("j", Cancelled())
        await here.delete("j")
        assert not here.jobs()


# Restart


@pytest.mark.spec("RST-1")
async def test_only_cancelled_and_failed_jobs_can_be_restarted() -> None:
    async with one_shard() as here:
        await here.run(*(a_job(job_id) for job_id in ("running", "done", "failed", "stopped")))
        for job_id, outcome in (("done", DONE), ("failed", BROKEN), ("stopped", Cancelled())):
            await here.report(job_id, outcome)
        await here.enqueue(a_job("scheduled"), a_job("flagged"))
        await here.cancel("flagged")
        for job_id in ("failed", "stopped", "flagged"):
            await here.restart(job_id)
            assert here.status(job_id) is SCHEDULED
        before = here.facts()
        for job_id in ("running", "done", "scheduled"):
            with pytest.raises(StateForbids):
                await here.restart(job_id)
        assert here.facts() == before


@pytest.mark.spec("RST-2", "RST-3", "RST-4")
async def test_a_restart_forgets_the_cancellation_keeps_the_history_and_starts_the_budget_anew() -> None:
    async with one_shard() as here:
        policy = a_policy(1, initial_interval_ms=1_000, backoff_factor=2.0)
        await here.run(a_job("j", retry_policy=policy))
        await here.report("j", BROKEN)
        await here.wait(2_000)
        await here.lease()
        await here.report("j", BROKEN)
        history = here.attempts("j")
        completed = here.shard.counts.completed_jobs

        await here.restart("j")

        state = here.state("j")
        assert (state.status, state.cancelled_at_ms, state.changed_at_ms) == (SCHEDULED, None, here.now_ms)
        assert (state.next_attempt_number, state.relative_attempt_number) == (3, 1)
        assert here.shard.counts.completed_jobs == completed - 1
        assert await here.lease() == ["j"]
        assert here.task_id("j") not in {attempt.task_id for attempt in history}
        await here.report("j", BROKEN)
        assert here.attempts("j")[:2] == history
        assert here.state("j").next_start_ms == here.now_ms + 2_000  # The first delay of a series.
        await here.wait(2_000)
        await here.lease()
        await here.report("j", BROKEN)
        assert here.status("j") is JobStatus.FAILED
        assert [(a.attempt_number, a.relative_attempt_number) for a in here.attempts("j")] == [
            (1, 1),
            (2, 2),
            (3, 1),
            (4, 2),
        ]


@pytest.mark.spec("RST-2")
@pytest.mark.parametrize("place", PLACES)
async def test_a_job_that_was_cancelled_anywhere_is_pending_again_without_its_flag(place: str) -> None:
    async with one_shard() as here:
        await a_job_that_is(place, here)
        number = here.state("j").next_attempt_number
        completed = here.shard.counts.completed_jobs
        await here.cancel("j")
        await here.restart("j")
        state = here.state("j")
        assert (state.status, state.cancelled_at_ms) == (SCHEDULED, None)
        # The attempt that was never leased left no record: its number is used again.
        assert (state.next_attempt_number, state.relative_attempt_number) == (number, 1)
        assert here.shard.counts.completed_jobs == completed


@pytest.mark.spec("RST-5")
async def test_a_job_can_be_restarted_any_number_of_times() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        for number in range(1, 6):
            await here.report("j", BROKEN)
            await here.restart("j")
            await here.cancel("j")
            await here.restart("j")
            assert await here.lease() == ["j"]
            assert len(here.attempts("j")) == number


@pytest.mark.spec("RST-6")
@pytest.mark.parametrize("offset_ms", [-5_000, 5_000])
async def test_a_restarted_job_starts_now_or_at_the_time_it_was_enqueued_for(offset_ms: int) -> None:
    async with one_shard() as here:
        start_at_ms = here.now_ms + offset_ms
        await here.enqueue(a_job("j", start_at_ms=start_at_ms, limits=[at_most(1)]))
        await here.cancel("j")
        await here.wait(100)
        await here.restart("j")
        assert here.state("j").next_start_ms == max(start_at_ms, here.now_ms)
        if offset_ms < 0:
            assert await here.lease() == ["j"]
        else:
            assert (await here.lease(), here.holders()) == ([], set())
            await here.wait(4_900)
            assert await here.lease() == ["j"]


# Expedite


@pytest.mark.spec("EXP-1", "EXP-2")
@pytest.mark.parametrize("place", ["delayed", "retry in backoff", "checking"])
async def test_work_that_is_not_due_becomes_due_now_and_stays_the_same_attempt(place: str) -> None:
    async with one_shard() as here:
        await a_job_that_is(place, here)
        before = here.state("j")
        await here.wait(10)
        await here.expedite("j")
        await here.settle()
        after = here.state("j")
        # What was due before and only waits for its limit keeps its place.
        start_ms = before.next_start_ms if place == "checking" else here.now_ms
        assert (after.status, after.changed_at_ms, after.next_start_ms) == (SCHEDULED, here.now_ms, start_ms)
        assert (after.attempts_ended, after.relative_attempt_number, after.priority) == (
            before.attempts_ended,
            before.relative_attempt_number,
            before.priority,
        )
        if place == "checking":  # It was checked at once, and is still over its limit.
            assert isinstance(after.pending, Checking)
            assert isinstance(before.pending, Checking)
            assert after.pending.checks == before.pending.checks + 1
            assert after.held == before.held
        else:
            assert here.held("j") == ["early"]
            assert await here.lease() == ["j"]


@pytest.mark.spec("EXP-2")
async def test_an_expedited_job_still_passes_its_limits() -> None:
    async with one_shard() as here:
        await here.run(a_job("holder", limits=[at_most(1)]))
        await here.enqueue(a_job("j", start_at_ms=here.now_ms + 60_000, limits=[at_most(1)]))
        await here.expedite("j")
        assert here.waiting() == ["j"]
        assert here.state("j").next_start_ms == here.now_ms
        await here.report("holder")
        assert await here.lease() == ["j"]


@pytest.mark.spec("EXP-3")
@pytest.mark.parametrize("place", ["waiting", "throttled"])
async def test_what_waits_in_line_for_a_limit_cannot_be_expedited(place: str) -> None:
    """Jobs over their rate limit stand in line too."""
    async with one_shard() as here:
        await a_job_that_is(place, here)
        before = here.facts()
        with pytest.raises(StateForbids) as refusal:
            await here.expedite("j")
        text = "cannot expedite job j: job has no pending task to expedite (status: Scheduled)"
        assert refusal.value.message == text
        assert here.facts() == before


@pytest.mark.spec("EXP-3")
@pytest.mark.parametrize("place", ["delayed", "retry in backoff", "ready"])
async def test_a_second_expedite_is_refused(place: str) -> None:
    async with one_shard() as here:
        await a_job_that_is(place, here)
        if place != "ready":
            await here.expedite("j")
        before = here.facts()
        with pytest.raises(StateForbids) as refusal:
            await here.expedite("j")
        assert refusal.value.message == (
            "cannot expedite job j: task is already ready to run (not future-scheduled) (status: Scheduled)"
        )
        assert here.facts() == before


@pytest.mark.spec("EXP-5")
async def test_an_expedited_job_overtakes_nobody_who_is_due_already() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("z due"), a_job("expedited", start_at_ms=here.now_ms + 60_000))
        await here.wait(10)
        await here.expedite("expedited")
        await here.wait(10)
        await here.enqueue(a_job("a late"))
        assert await here.lease() == ["z due", "expedited", "a late"]


@pytest.mark.spec("EXP-5")
async def test_an_expedited_job_stands_behind_those_who_wait_for_its_ticket_already() -> None:
    async with one_shard() as here:
        await here.run(a_job("holder", limits=[at_most(1)]))
        await here.enqueue(a_job("z waits", limits=[at_most(1)]))
        await here.enqueue(a_job("expedited", start_at_ms=here.now_ms + 60_000, limits=[at_most(1)]))
        await here.wait(10)
        await here.expedite("expedited")
        await here.wait(10)
        await here.enqueue(a_job("a late", limits=[at_most(1)]))
        assert here.waiting() == ["z waits", "expedited", "a late"]


# Delete


@pytest.mark.spec("DEL-1")
@pytest.mark.parametrize("place", PLACES)
async def test_a_job_that_waits_anywhere_cannot_be_deleted(place: str) -> None:
    async with one_shard() as here:
        await a_job_that_is(place, here)
        before = here.facts()
        with pytest.raises(StateForbids) as refusal:
            await here.delete("j")
        assert refusal.value.message == (
            "cannot delete job j: job is currently running or has pending requests"
        )
        assert here.facts() == before


@pytest.mark.spec("DEL-1")
async def test_a_running_job_cannot_be_deleted() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        with pytest.raises(StateForbids):
            await here.delete("j")
        assert here.status("j") is JobStatus.RUNNING


@pytest.mark.spec("DEL-2")
@pytest.mark.parametrize("end", [DONE, BROKEN, Cancelled(), None], ids=["done", "failed", "stopped", "flag"])
async def test_a_deleted_job_leaves_no_row_and_no_count(end: object) -> None:
    """Its attempts go too (there they stay)."""
    async with one_shard() as here:
        await here.enqueue(a_job("other", task_group="g2", metadata={"k": "v"}, limits=[at_most(2)]))
        before = here.facts()
        await here.enqueue(a_job("j", metadata={"k": "v"}, limits=[at_most(2)]))
        if end is None:
            await here.cancel("j")
        else:
            await here.lease()
            await here.report("j", end)
        assert here.shard.counts == ShardTotals(2, 1)
        await here.delete("j")
        assert here.facts() == before
        assert here.shard.counts == ShardTotals(1, 0)


@pytest.mark.spec("DEL-3")
async def test_deleting_a_job_that_does_not_exist_succeeds_and_changes_nothing() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j"))
        before = here.facts()
        await here.delete("nowhere")
        await here.shard.delete(tenant="nobody", job_id="j")
        assert here.facts() == before


@pytest.mark.spec("DEL-4")
async def test_the_id_of_a_deleted_job_can_be_used_again_and_nothing_is_left_of_the_old_one() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", metadata={"old": "1"}))
        await here.report("j", BROKEN)
        with pytest.raises(JobExists):
            await here.enqueue(a_job("j"))
        await here.delete("j")
        await here.run(a_job("j", metadata={"new": "1"}, payload="other"))
        assert here.attempts("j") == []
        assert here.state("j").next_attempt_number == 1
        assert here.family(b"m") == [keys.metadata_index_key(T, "new", "1", "j")]


# Lease one


@pytest.mark.spec("LSO-1", "LSO-2", "LSO-3")
@pytest.mark.parametrize("place", [place for place in PLACES if place != "waiting"])
async def test_a_job_is_leased_by_its_id_before_its_time_and_before_its_limits(place: str) -> None:
    """It keeps the tickets that it has got so far, and gives them back (there they are lost)."""
    async with one_shard() as here:
        await a_job_that_is(place, here)
        before = here.state("j")
        await here.wait(10)
        leased = await here.lease_one("j")
        state = here.state("j")
        assert state == leased
        assert state.lease is not None
        assert (state.status, state.changed_at_ms) == (JobStatus.RUNNING, here.now_ms)
        assert (state.lease.started_at_ms, state.lease.expiry_ms) == (here.now_ms, here.now_ms + 10_000)
        assert state.next_attempt_number == before.next_attempt_number
        assert state.relative_attempt_number == before.relative_attempt_number
        assert state.held == before.held
        assert leftovers(here) == [key for key in leftovers(here) if key.startswith(b"h")]
        assert await here.lease() == []
        await here.report("j")
        assert here.status("j") is JobStatus.SUCCEEDED
        assert here.holders("early") == set()


@pytest.mark.spec("LSO-2")
async def test_a_lease_by_id_has_a_task_id_of_its_own() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", retry_policy=a_policy(9, initial_interval_ms=0)))
        used = set()
        for _ in range(3):
            leased = await here.lease_one("j")
            assert leased.lease is not None
            used.add(leased.lease.task_id)
            await here.report("j", BROKEN)
        assert len(used) == 3


@pytest.mark.spec("LSO-1", "LSO-3")
async def test_a_lease_by_id_goes_past_a_full_queue_takes_no_ticket_and_retries_through_it() -> None:
    async with one_shard() as here:
        await here.run(a_job("holder", limits=[at_most(1)]))
        policy = a_policy(1, initial_interval_ms=0)
        later = here.now_ms + 60_000
        await here.enqueue(a_job("j", start_at_ms=later, limits=[at_most(1)], retry_policy=policy))
        await here.lease_one("j")
        assert here.holders() == {"holder"}
        await here.report("j", BROKEN)
        assert here.waiting() == ["j"]


@pytest.mark.spec("LSO-3")
async def test_a_lease_by_id_runs_out_like_any_other() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", retry_policy=a_policy(1, initial_interval_ms=0)))
        await here.lease_one("j")
        task_id = here.task_id("j")
        await here.wait(LEASE_MS)
        assert await here.lease() == ["j"]
        with pytest.raises(LeaseNotFound):
            await here.shard.report(task_id, DONE)


@pytest.mark.spec("LSO-4")
async def test_a_job_that_waits_for_a_ticket_cannot_be_leased_by_its_id() -> None:
    async with one_shard() as here:
        await a_job_that_is("waiting", here)
        before = here.facts()
        with pytest.raises(StateForbids) as refusal:
            await here.lease_one("j")
        text = "cannot lease job j: job has no pending task in queue (status: Scheduled)"
        assert refusal.value.message == text
        assert here.facts() == before
