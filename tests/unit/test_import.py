"""Importing jobs with their history, statement by statement, on one shard in memory."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from random import Random

import pytest

from silo.clock import VirtualClock
from silo.errors import InvalidRequest, ShardClosed, SiloError, StateForbids, StoreCorrupt
from silo.model.attempt import Attempt, AttemptStatus, Cancelled, Failure, Outcome, PastAttempt, Success
from silo.model.counts import ShardTotals
from silo.model.job import ImportedJob, JobState, JobStatus, LeasedTask, RetryPolicy, Waiting
from silo.model.limit import Limit
from silo.shard.shard import Shard
from silo.storage import codec, keys
from silo.storage.memory import Fault, MemoryStorage, MemoryStore
from tests.builders import DONE, GROUP, SHARD, a_job, a_policy, a_rate, at_most, open_shard, reopened
from tests.invariants import Stored, check_snapshot, check_step

T = "-"
BROKEN = Failure("BROKEN", b"\xa3why")
SCHEDULED, SUCCEEDED, FAILED = JobStatus.SCHEDULED, JobStatus.SUCCEEDED, JobStatus.FAILED
CANCELLED = JobStatus.CANCELLED


class Imports:
    """A shard, its clock, and what a test does with both."""

    def __init__(self, shard: Shard, storage: MemoryStorage, clock: VirtualClock) -> None:
        self.shard = shard
        self.clock = clock
        self._storage = storage
        self._seen: dict[tuple[str, str], Stored] = {}

    async def take(self, *jobs: ImportedJob) -> list[JobStatus | str]:
        """Import the jobs; of each its status, or the text of its refusal."""
        answers = await self.shard.import_jobs(tenant=T, jobs=jobs)
        self.check()
        return [answer.message if isinstance(answer, SiloError) else answer for answer in answers]

    async def refuse(self, job: ImportedJob) -> str:
        """Import a job that is refused, which changes nothing; the text."""
        before = self.rows()
        [answer] = await self.take(job)
        assert isinstance(answer, str)
        assert self.rows() == before
        return answer

    async def run(self, outcome: Outcome = DONE, *, worker_id: str = "w") -> LeasedTask:
        """Lease the next task and report `outcome`."""
        [task] = await self.lease(worker_id=worker_id)
        assert task.state.lease is not None
        await self.shard.report(task.state.lease.task_id, outcome)
        self.check()
        return task

    async def lease(self, *, worker_id: str = "w") -> list[LeasedTask]:
        tasks = await self.shard.lease_tasks(worker_id=worker_id, task_group=GROUP, max_tasks=9)
        self.check()
        return tasks

    async def pass_time(self, duration_ms: int) -> None:
        self.clock.advance_ms(duration_ms)
        await self.shard.tick()
        self.check()

    def check(self) -> dict[tuple[str, str], Stored]:
        """All jobs that are stored, held against what must hold of them."""
        stored = check_snapshot(self.rows())
        check_step({name: self._seen[name] for name in self._seen.keys() & stored.keys()}, stored)
        self._seen = stored
        return stored

    def rows(self) -> dict[bytes, bytes]:
        return self._storage.snapshot(SHARD)

    def stored(self, id: str = "j") -> Stored:
        return self.check()[T, id]

    def state(self, id: str = "j") -> JobState:
        return self.stored(id).state

    def attempts(self, id: str = "j") -> list[Attempt]:
        return self.stored(id).attempts


@asynccontextmanager
async def imports() -> AsyncIterator[Imports]:
    clock, storage = VirtualClock(), MemoryStorage()
    async with open_shard(storage, clock=clock) as shard:
        yield Imports(shard, storage, clock)


def past(outcome: Outcome = BROKEN, *, started_at_ms: int = 100, finished_at_ms: int = 200) -> PastAttempt:
    return PastAttempt(started_at_ms=started_at_ms, finished_at_ms=finished_at_ms, outcome=outcome)


def an_import(
    id: str = "j",
    *attempts: PastAttempt,
    retry_policy: RetryPolicy | None = None,
    priority: int = 50,
    enqueue_time_ms: int = 0,
    start_at_ms: int = 0,
    task_group: str = GROUP,
    payload: bytes = b"\xa1p",
    metadata: dict[str, str] | None = None,
    limits: Sequence[Limit] = (),
) -> ImportedJob:
    return ImportedJob(
        tenant=T,
        id=id,
        task_group=task_group,
        priority=priority,
        enqueue_time_ms=enqueue_time_ms,
        start_at_ms=start_at_ms,
        payload=payload,
        retry_policy=retry_policy,
        metadata=tuple(sorted((metadata or {}).items())),
        attempts=attempts,
        limits=tuple(limits),
    )


def as_past(attempt: Attempt) -> PastAttempt:
    """A stored attempt as a caller who has read it imports it again."""
    assert attempt.finished_at_ms is not None
    assert attempt.outcome is not None
    return PastAttempt(
        started_at_ms=attempt.started_at_ms, finished_at_ms=attempt.finished_at_ms, outcome=attempt.outcome
    )


def refused(reason: str, status: str, id: str = "j") -> str:
    return f"cannot reimport job: cannot reimport job {id}: {reason} (status: {status})"


# A new job


@pytest.mark.spec("IMP-1")
async def test_results_come_in_the_order_of_the_jobs_and_one_failure_leaves_the_others_alone() -> None:
    async with imports() as here:
        answers = await here.take(
            an_import("a"), an_import("b", past(DONE), past(DONE)), an_import("c", past(DONE))
        )
        assert answers == [
            SCHEDULED,
            "invalid argument: import attempt 1 must be Failed (only the last attempt may be non-Failed)",
            SUCCEEDED,
        ]
        assert {id for _, id in here.check()} == {"a", "c"}


@pytest.mark.spec("IMP-1")
async def test_no_jobs_are_no_work() -> None:
    async with imports() as here:
        assert await here.take() == []


@pytest.mark.spec("IMP-3")
async def test_one_running_job_refuses_the_whole_call_and_nothing_changes() -> None:
    async with imports() as here:
        await here.shard.enqueue(a_job("busy"))
        await here.take(an_import("known", past(), retry_policy=a_policy(5)))
        await here.shard.lease_one(tenant=T, job_id="busy", worker_id="w")
        before = here.rows()
        with pytest.raises(StateForbids) as caught:
            await here.shard.import_jobs(
                tenant=T,
                jobs=[an_import("new"), an_import("known", past(), past()), an_import("busy", past())],
            )
        assert caught.value.message == (
            "cannot reimport job busy: job is currently running (status: Running)"
        )
        assert here.rows() == before


@pytest.mark.spec("IMP-4")
@pytest.mark.parametrize("early", [DONE, Cancelled()])
@pytest.mark.parametrize("number", [1, 2])
async def test_all_attempts_but_the_last_must_have_failed(early: Outcome, number: int) -> None:
    async with imports() as here:
        attempts = [past(), past(), past(DONE)]
        attempts[number - 1] = past(early)
        assert await here.refuse(an_import("j", *attempts)) == (
            f"invalid argument: import attempt {number} must be Failed "
            "(only the last attempt may be non-Failed)"
        )


@pytest.mark.spec("IMP-5", "ATT-4", "W-CC-88")
@pytest.mark.parametrize(
    ("attempts", "policy", "expected"),
    [
        ([], None, SCHEDULED),
        ([past(DONE)], None, SUCCEEDED),
        ([past(), past(DONE)], None, SUCCEEDED),
        ([past(Cancelled())], a_policy(5), CANCELLED),
        ([past(), past(Cancelled())], a_policy(5), CANCELLED),
        ([past()], None, FAILED),
        ([past()], a_policy(0), FAILED),
        ([past()], a_policy(1), SCHEDULED),
        ([past(), past()], a_policy(1), FAILED),
        ([past(), past()], a_policy(2), SCHEDULED),
    ],
)
async def test_the_last_attempt_and_the_retries_left_decide_the_status(
    attempts: list[PastAttempt], policy: RetryPolicy | None, expected: JobStatus
) -> None:
    async with imports() as here:
        assert await here.take(an_import("j", *attempts, retry_policy=policy)) == [expected]
        state = here.state()
        assert (state.status, state.attempts_ended, state.cancelled_at_ms) == (expected, len(attempts), None)
        assert here.shard.counts == ShardTotals(1, int(expected.is_terminal))
        if expected is SCHEDULED:
            now_ms = here.clock.now_ms()
            assert (state.changed_at_ms, state.next_start_ms) == (now_ms, now_ms)
            assert state.relative_attempt_number == state.next_attempt_number == len(attempts) + 1
        else:
            assert (state.changed_at_ms, state.next_start_ms) == (200, None)


@pytest.mark.spec("IMP-6")
async def test_a_job_without_history_waits_for_its_start_like_one_that_was_enqueued() -> None:
    async with imports() as here:
        start_at_ms = here.clock.now_ms() + 5_000
        await here.take(an_import("j", past(), start_at_ms=start_at_ms, retry_policy=a_policy(1)))
        assert here.state().next_start_ms == start_at_ms
        await here.pass_time(4_999)
        assert not await here.lease()
        await here.pass_time(1)
        [task] = await here.lease()
        assert (task.state.next_attempt_number, task.state.relative_attempt_number) == (2, 2)
        assert task.state.is_last_attempt


@pytest.mark.spec("IMP-6")
async def test_a_start_in_the_past_counts_in_the_order_of_work() -> None:
    async with imports() as here:
        await here.shard.enqueue(a_job("enqueued"))
        await here.take(an_import("older", start_at_ms=here.clock.now_ms() - 60_000))
        assert [task.job.id for task in await here.lease()] == ["older", "enqueued"]


@pytest.mark.spec("IMP-6")
async def test_an_imported_job_passes_its_limits_like_one_that_was_enqueued() -> None:
    limits = [at_most(1), a_rate(1), at_most(1, "m")]
    async with imports() as here:
        later = here.clock.now_ms() + 1_000
        await here.take(
            an_import("first", limits=limits),
            an_import("second", limits=limits),
            an_import("ended", past(DONE), limits=limits),
            an_import("later", limits=[at_most(1, "free")], start_at_ms=later),
        )
        held = {id: [holder.key for holder in here.state(id).held] for _, id in here.check()}
        assert held == {"first": ["k", "m"], "second": [], "ended": [], "later": []}
        assert isinstance(here.state("second").pending, Waiting)
        await here.run()
        await here.pass_time(1_000)
        assert sorted(task.job.id for task in await here.lease()) == ["later", "second"]


@pytest.mark.spec("IMP-6")
async def test_a_worker_who_waits_gets_an_imported_job_at_once() -> None:
    async with imports() as here:
        waiting = asyncio.create_task(
            here.shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=1, wait_ms=60_000)
        )
        await asyncio.sleep(0)
        await here.take(an_import("j"))
        [task] = await waiting
        assert task.job.id == "j"


@pytest.mark.spec("IMP-7")
@pytest.mark.parametrize("outcome", [DONE, BROKEN, Cancelled()])
async def test_a_start_means_nothing_to_a_job_that_has_ended(outcome: Outcome) -> None:
    async with imports() as here:
        start_at_ms = here.clock.now_ms() + 5_000
        await here.take(an_import("j", past(outcome), start_at_ms=start_at_ms))
        assert here.state().next_start_ms is None
        await here.pass_time(5_000)
        assert not await here.lease()


@pytest.mark.spec("IMP-7")
async def test_imported_failures_cause_no_backoff() -> None:
    async with imports() as here:
        policy = a_policy(3, initial_interval_ms=50_000)
        await here.take(an_import("j", past(), past(), retry_policy=policy))
        [task] = await here.lease()
        assert task.state.next_attempt_number == 3


async def test_an_imported_job_is_described_as_it_was_given() -> None:
    async with imports() as here:
        policy = a_policy(7)
        await here.take(
            an_import(
                "j",
                retry_policy=policy,
                priority=3,
                enqueue_time_ms=77,
                task_group="g" * 65,
                payload=b"\xc3",
                metadata={"b": "2", "a": "1"},
            )
        )
        job, state = here.stored().job, here.state()
        assert (state.priority, state.retry_policy, state.task_group) == (3, policy, "g" * 65)
        assert (job.payload, job.metadata) == (b"\xc3", (("a", "1"), ("b", "2")))
        assert (job.enqueue_time_ms, job.created_at_ms) == (77, here.clock.now_ms())
        assert state.payload_bytes == len("j") + 1 + len("a1b2")


@pytest.mark.parametrize("given", [0, -5])
async def test_a_job_without_enqueue_time_was_enqueued_now(given: int) -> None:
    async with imports() as here:
        await here.take(an_import("j", enqueue_time_ms=given))
        assert here.stored().job.enqueue_time_ms == here.clock.now_ms()


@pytest.mark.spec("ATT-4")
async def test_imported_attempts_have_numbers_and_new_task_ids_and_no_worker() -> None:
    async with imports() as here:
        given = [past(), past(Failure("", b""), started_at_ms=300, finished_at_ms=-1), past(Success(b""))]
        await here.take(an_import("j", *given))
        attempts = here.attempts()
        assert [as_past(attempt) for attempt in attempts] == given
        assert [(a.attempt_number, a.relative_attempt_number) for a in attempts] == [(1, 1), (2, 2), (3, 3)]
        assert {attempt.worker_id for attempt in attempts} == {""}
        assert len({attempt.task_id for attempt in attempts}) == 3


# It goes on as if it had always been here


@pytest.mark.spec("IMP-8")
async def test_an_imported_job_retries_until_its_budget_is_used_up() -> None:
    async with imports() as here:
        policy = a_policy(3, initial_interval_ms=1_000, backoff_factor=2.0)
        await here.take(an_import("j", past(), past(), retry_policy=policy))
        await here.run(BROKEN)
        assert here.state().next_start_ms == here.clock.now_ms() + 8_000  # Of the third failure.
        await here.pass_time(8_000)
        await here.run(BROKEN)
        assert here.state().status is FAILED
        assert [(a.attempt_number, a.worker_id) for a in here.attempts()] == [
            (1, ""),
            (2, ""),
            (3, "w"),
            (4, "w"),
        ]


@pytest.mark.spec("IMP-8")
async def test_an_imported_job_can_be_cancelled_restarted_run_and_deleted() -> None:
    async with imports() as here:
        await here.take(an_import("j", past(), retry_policy=a_policy(1), metadata={"k": "v"}))
        await here.shard.cancel(tenant=T, job_id="j")
        assert here.state().status is CANCELLED
        await here.shard.restart(tenant=T, job_id="j")
        assert (here.state().relative_attempt_number, here.state().next_attempt_number) == (1, 2)
        await here.run()
        assert here.state().status is SUCCEEDED
        await here.shard.delete(tenant=T, job_id="j")
        assert not here.check()
        assert not [key for key in here.rows() if key[:1] in (b"j", b"i", b"m", b"q", b"t", b"l", b"c")]


@pytest.mark.spec("IMP-8", "RST-6")
@pytest.mark.parametrize("outcome", [BROKEN, Cancelled()])
async def test_a_job_that_was_imported_as_ended_can_be_restarted(outcome: Outcome) -> None:
    async with imports() as here:
        later_ms = here.clock.now_ms() + 9_000
        await here.take(an_import("j", past(outcome), enqueue_time_ms=later_ms))
        await here.shard.restart(tenant=T, job_id="j")
        assert here.state().next_start_ms == later_ms
        await here.shard.expedite(tenant=T, job_id="j")
        assert (await here.run()).state.next_attempt_number == 2


@pytest.mark.spec("IMP-8")
async def test_a_job_that_was_imported_as_succeeded_has_its_result() -> None:
    async with imports() as here:
        await here.take(an_import("j", past(), past(Success(b"\x2a"))))
        view = await here.shard.get_job(tenant=T, job_id="j", with_attempts=True)
        assert view.last_outcome == Success(b"\x2a")
        assert [attempt.status for attempt in view.attempts] == [
            AttemptStatus.FAILED,
            AttemptStatus.SUCCEEDED,
        ]


async def test_imported_jobs_are_there_after_a_crash() -> None:
    clock, storage = VirtualClock(), MemoryStorage()
    shard = await reopened(storage, clock=clock)
    await shard.import_jobs(tenant=T, jobs=[an_import("j", past(), retry_policy=a_policy(1))])
    # Opened again while the first one was never closed, with other random numbers.
    again = await reopened(storage, clock=clock, rng=Random(8))
    [task] = await again.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=1)
    assert (task.job.id, task.state.next_attempt_number) == ("j", 2)
    check_snapshot(storage.snapshot(SHARD))
    await again.close()
    await shard.close()


async def test_an_import_whose_write_fails_is_not_answered() -> None:
    clock, storage = VirtualClock(), MemoryStorage()
    async with open_shard(storage, clock=clock) as shard:
        storage.faults.plan("write", Fault.FAIL_BEFORE)
        with pytest.raises(ShardClosed):
            await shard.import_jobs(tenant=T, jobs=[an_import("j")])
        assert not check_snapshot(storage.snapshot(SHARD))


# A job that is here already


@pytest.mark.spec("IMP-9")
async def test_a_job_that_succeeded_is_not_imported_again() -> None:
    async with imports() as here:
        await here.take(an_import("j", past(DONE)))
        text = refused("job already succeeded", "Succeeded")
        assert await here.refuse(an_import("j", past(DONE))) == text
        assert await here.refuse(an_import("j")) == text
        assert await here.refuse(an_import("j", past(), past(DONE))) == text


@pytest.mark.spec("IMP-9")
async def test_a_history_may_not_become_shorter() -> None:
    async with imports() as here:
        await here.take(an_import("j", past(), past()))
        text = refused("reimport has 1 attempts but job has 2 existing attempts", "Failed")
        assert await here.refuse(an_import("j", past(DONE))) == text


@pytest.mark.spec("IMP-9")
@pytest.mark.parametrize(
    "other",
    [
        past(started_at_ms=101),
        past(finished_at_ms=201),
        past(Failure("OTHER", BROKEN.data)),
        past(Failure(BROKEN.code, b"\xa5other")),
        past(Cancelled()),
        past(DONE),
    ],
)
async def test_a_history_that_differs_is_refused(other: PastAttempt) -> None:
    async with imports() as here:
        await here.take(an_import("j", past(), past(), retry_policy=a_policy(5)))
        text = refused("existing attempt 2 does not match reimport data", "Scheduled")
        assert await here.refuse(an_import("j", past(), other, past())) == text
        assert await here.refuse(an_import("j", past(), other)) == text


@pytest.mark.spec("IMP-9")
async def test_a_difference_is_reported_before_a_lack_of_new_attempts_and_before_their_order() -> None:
    async with imports() as here:
        await here.take(an_import("j", past()))
        differs = refused("existing attempt 1 does not match reimport data", "Failed")
        assert await here.refuse(an_import("j", past(finished_at_ms=1))) == differs
        assert await here.refuse(an_import("j", past(finished_at_ms=1), past(DONE), past())) == differs


@pytest.mark.spec("IMP-10")
@pytest.mark.parametrize("number", [1, 2])
async def test_only_the_last_new_attempt_may_not_have_failed(number: int) -> None:
    async with imports() as here:
        await here.take(an_import("j", past(), past()))
        added = [past(), past(), past()]
        added[number - 1] = past(DONE)
        assert await here.refuse(an_import("j", past(), past(), *added)) == (
            f"invalid argument: import attempt {number} must be Failed "
            "(only the last attempt may be non-Failed)"
        )


@pytest.mark.spec("IMP-10")
async def test_a_stored_cancelled_attempt_may_be_followed_by_new_ones() -> None:
    async with imports() as here:
        await here.take(an_import("j", past(), past(Cancelled())))
        job = an_import("j", past(), past(Cancelled()), past(), retry_policy=a_policy(2))
        assert await here.take(job) == [SCHEDULED]
        # Two failures of two retries, yet the fourth attempt: the numbers say nothing of the budget.
        [task] = await here.lease()
        assert (task.state.relative_attempt_number, task.state.is_last_attempt) == (4, True)


@pytest.mark.spec("IMP-11")
async def test_stored_attempts_stay_and_new_ones_get_the_next_numbers() -> None:
    async with imports() as here:
        await here.shard.enqueue(a_job("j"))
        await here.run(BROKEN)
        [stored] = here.attempts()
        await here.take(an_import("j", as_past(stored), past(), past(DONE)))
        assert here.attempts()[0] == stored
        assert [(a.attempt_number, a.relative_attempt_number, a.worker_id) for a in here.attempts()] == [
            (1, 1, "w"),
            (2, 2, ""),
            (3, 3, ""),
        ]


@pytest.mark.spec("IMP-11", "ATT-4")
async def test_numbers_go_on_after_a_restart_was_stored() -> None:
    async with imports() as here:
        await here.shard.enqueue(a_job("j"))
        await here.run(BROKEN)
        await here.shard.restart(tenant=T, job_id="j")
        await here.run(BROKEN)
        stored = [as_past(attempt) for attempt in here.attempts()]
        assert await here.take(an_import("j", *stored, past(), retry_policy=a_policy(3))) == [SCHEDULED]
        assert [a.relative_attempt_number for a in here.attempts()] == [1, 1, 3]
        assert here.state().relative_attempt_number == 4


@pytest.mark.spec("IMP-12", "ENT-9")
async def test_only_the_policy_and_the_start_are_taken_from_a_second_import() -> None:
    async with imports() as here:
        await here.take(
            an_import("j", past(), priority=3, enqueue_time_ms=77, metadata={"k": "v"}, payload=b"\xc2")
        )
        before = here.stored()
        start_at_ms, policy = here.clock.now_ms() + 500, a_policy(9)
        await here.take(
            an_import(
                "j",
                past(),
                past(),
                retry_policy=policy,
                start_at_ms=start_at_ms,
                priority=99,
                enqueue_time_ms=78,
                metadata={"other": "x"},
                payload=b"\xc3\xc3",
                task_group="other",
            )
        )
        after = here.stored()
        assert after.job == before.job
        assert (after.state.retry_policy, after.state.next_start_ms) == (policy, start_at_ms)
        assert (after.state.priority, after.state.task_group) == (3, GROUP)
        assert after.state.payload_bytes == before.state.payload_bytes


@pytest.mark.spec("IMP-12", "ENT-9")
async def test_a_second_import_can_take_the_policy_away() -> None:
    async with imports() as here:
        await here.take(an_import("j", past(), retry_policy=a_policy(9)))
        assert await here.take(an_import("j", past(), past())) == [FAILED]
        assert here.state().retry_policy is None


@pytest.mark.spec("IMP-13")
async def test_work_that_was_ready_is_replaced() -> None:
    async with imports() as here:
        await here.take(an_import("j"))
        assert await here.take(an_import("j", past(), retry_policy=a_policy(1))) == [SCHEDULED]
        [task] = await here.lease()
        assert task.state.next_attempt_number == 2
        assert not await here.lease()


@pytest.mark.spec("IMP-13")
async def test_work_that_was_delayed_never_comes_when_the_job_has_ended_elsewhere() -> None:
    async with imports() as here:
        await here.take(an_import("later", start_at_ms=here.clock.now_ms() + 1_000), an_import("now"))
        await here.take(an_import("later", past(DONE)), an_import("now", past(Cancelled())))
        await here.pass_time(60_000)
        assert not await here.lease()
        assert here.shard.counts == ShardTotals(2, 2)


@pytest.mark.spec("IMP-13")
async def test_a_replaced_job_gives_its_tickets_to_who_waits_and_stands_behind_them() -> None:
    async with imports() as here:
        limits = [at_most(1, "early"), a_rate(9), at_most(1)]
        await here.shard.enqueue(a_job("j", limits=limits))
        for id, limit in (("wants early", at_most(1, "early")), ("wants k", at_most(1))):
            await here.shard.enqueue(a_job(id, limits=[limit]))
        await here.take(an_import("j", past(), retry_policy=a_policy(1)))
        assert here.state().held == ()
        assert isinstance(here.state().pending, Waiting)
        assert {task.job.id for task in await here.lease()} == {"wants early", "wants k"}


@pytest.mark.spec("IMP-12", "IMP-13", "IMP-15")
async def test_a_replaced_job_that_nobody_waits_behind_gets_its_ticket_again_at_once() -> None:
    """What it held is free before it is looked at (there it waits for its own ticket first)."""
    async with imports() as here:
        await here.shard.enqueue(a_job("j", limits=[at_most(1)]))
        job = an_import("j", past(), retry_policy=a_policy(1), limits=[at_most(0, "other")])
        assert await here.take(job) == [SCHEDULED]
        assert [holder.key for holder in here.state().held] == ["k"]  # The limits of the stored job count.
        assert here.state().limits == (at_most(1),)
        [task] = await here.lease()
        assert task.state.next_attempt_number == 2


@pytest.mark.spec("IMP-13", "LSE-28")
async def test_a_task_that_a_worker_was_about_to_get_is_replaced() -> None:
    async with imports() as here:
        await here.shard.enqueue(a_job("first"))
        await here.shard.enqueue(a_job("j"))
        await here.shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=1)  # Reads ahead.
        await here.take(an_import("j", past(DONE)))
        assert not await here.lease()


@pytest.mark.spec("IMP-14")
async def test_a_cancellation_is_forgotten() -> None:
    async with imports() as here:
        for outcome, id in ((BROKEN, "a"), (DONE, "b"), (Cancelled(), "c")):
            await here.shard.enqueue(a_job(id))
            await here.shard.cancel(tenant=T, job_id=id)
            await here.take(an_import(id, past(outcome)))
            state = here.state(id)
            assert (state.cancelled_at_ms, state.next_start_ms) == (None, None)


@pytest.mark.spec("IMP-14", "IMP-15")
async def test_a_cancelled_job_runs_again_when_its_history_leaves_retries() -> None:
    async with imports() as here:
        await here.shard.enqueue(a_job("j"))
        await here.shard.cancel(tenant=T, job_id="j")
        await here.take(an_import("j", past(), retry_policy=a_policy(1)))
        assert (await here.run()).state.next_attempt_number == 2


@pytest.mark.spec("IMP-15")
@pytest.mark.parametrize(
    ("added", "policy", "expected"),
    [
        (DONE, None, SUCCEEDED),
        (Cancelled(), a_policy(9), CANCELLED),
        (BROKEN, a_policy(1), FAILED),
        (BROKEN, a_policy(2), SCHEDULED),
    ],
)
async def test_the_status_follows_from_the_whole_history(
    added: Outcome, policy: RetryPolicy | None, expected: JobStatus
) -> None:
    async with imports() as here:
        await here.take(an_import("j", past()))
        job = an_import("j", past(), past(added, finished_at_ms=999), retry_policy=policy)
        assert await here.take(job) == [expected]
        state = here.state()
        assert state.status is expected
        assert state.changed_at_ms == (here.clock.now_ms() if expected is SCHEDULED else 999)


@pytest.mark.spec("IMP-16")
async def test_a_second_import_counts_a_job_once() -> None:
    async with imports() as here:
        counts = []
        for attempts, retries in ((0, 0), (1, 0), (2, 0), (3, 3), (4, 3)):
            await here.take(an_import("j", *[past()] * attempts, retry_policy=a_policy(retries)))
            counts.append(here.shard.counts)
        assert counts == [ShardTotals(1, ended) for ended in (0, 1, 1, 0, 1)]


@pytest.mark.spec("IMP-17")
@pytest.mark.parametrize(("attempts", "status"), [([], "Scheduled"), ([past()], "Failed")])
async def test_the_same_import_twice_fails_the_second_time(attempts: list[PastAttempt], status: str) -> None:
    async with imports() as here:
        await here.take(an_import("j", *attempts))
        text = refused("reimport must include at least one new attempt", status)
        assert await here.refuse(an_import("j", *attempts, retry_policy=a_policy(9))) == text


# One call, several imports of a job, and what is damaged


async def test_a_job_that_comes_twice_in_one_call_is_imported_twice_in_order() -> None:
    async with imports() as here:
        answers = await here.take(
            an_import("j", past()),
            an_import("j", past(), past()),
            an_import("j", past()),
            an_import("j", past(), past(), past(DONE)),
            an_import("j", past(), past(), past(DONE)),
        )
        assert answers == [
            FAILED,
            FAILED,
            refused("reimport has 1 attempts but job has 2 existing attempts", "Failed"),
            SUCCEEDED,
            refused("job already succeeded", "Succeeded"),
        ]
        assert here.shard.counts == ShardTotals(1, 1)


async def test_of_two_imports_at_a_time_one_goes_on_where_the_other_ended() -> None:
    async with imports() as here:
        job = an_import("j", past(), past(DONE))
        answers = await asyncio.gather(*(here.shard.import_jobs(tenant=T, jobs=[job]) for _ in range(2)))
        texts = [str(answer) for [answer] in answers if isinstance(answer, SiloError)]
        assert texts == [refused("job already succeeded", "Succeeded")]
        assert len(here.attempts()) == 2


async def test_a_job_that_goes_on_while_its_history_is_read_is_judged_as_it_is_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with imports() as here:
        await here.shard.enqueue(a_job("j", retry_policy=a_policy(9, initial_interval_ms=0)))
        await here.run(BROKEN)
        given = [as_past(attempt) for attempt in here.attempts()]
        reading, go_on = asyncio.Event(), asyncio.Event()
        get_many = MemoryStore.get_many

        async def slow(store: MemoryStore, wanted: Sequence[bytes]) -> list[bytes | None]:
            values = await get_many(store, wanted)
            if keys.attempt_key(T, "j", 1) in wanted and not reading.is_set():
                reading.set()
                await go_on.wait()
            return values

        monkeypatch.setattr(MemoryStore, "get_many", slow)
        importing = asyncio.create_task(
            here.shard.import_jobs(tenant=T, jobs=[an_import("j", *given, past(), past(DONE))])
        )
        await reading.wait()
        await here.run(BROKEN)
        go_on.set()
        [answer] = await importing
        assert isinstance(answer, StateForbids)
        assert answer.message == refused("existing attempt 2 does not match reimport data", "Scheduled")
        here.check()


async def test_a_damaged_job_is_refused_alone() -> None:
    clock, storage = VirtualClock(), MemoryStorage()
    async with open_shard(storage, clock=clock) as shard:
        await shard.import_jobs(tenant=T, jobs=[an_import(id, past()) for id in ("a", "b")])
    store = await storage.open(SHARD)
    await store.write({keys.state_key(T, "a"): b"\x01nonsense", keys.attempt_key(T, "b", 1): None})
    await store.close()
    async with open_shard(storage, clock=clock) as shard:
        answers = await shard.import_jobs(
            tenant=T, jobs=[an_import("a", past(), past()), an_import("b", past(), past()), an_import("c")]
        )
        assert isinstance(answers[0], StoreCorrupt)
        assert isinstance(answers[1], StoreCorrupt)
        assert answers[2] is SCHEDULED


async def test_an_argument_error_is_told_from_a_conflict() -> None:
    async with imports() as here:
        await here.take(an_import("j"))
        answers = await here.shard.import_jobs(
            tenant=T, jobs=[an_import("j"), an_import("k", past(DONE), past())]
        )
        assert [type(answer) for answer in answers] == [StateForbids, InvalidRequest]


async def test_the_queue_row_of_an_imported_job_has_the_job_along() -> None:
    async with imports() as here:
        await here.take(an_import("j"))
        [row] = [value for key, value in here.rows().items() if key.startswith(b"q")]
        _, job = codec.decode_queued(row)
        assert job == here.stored().job


@pytest.mark.spec("IMP-3")
async def test_a_job_that_starts_to_run_while_its_history_is_read_refuses_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with imports() as here:
        await here.shard.enqueue(a_job("j"))
        get_many, leased = MemoryStore.get_many, asyncio.Event()

        async def slow(store: MemoryStore, wanted: Sequence[bytes]) -> list[bytes | None]:
            values = await get_many(store, wanted)
            if keys.state_key(T, "new") in wanted and not leased.is_set():
                await here.lease()
                leased.set()
            return values

        monkeypatch.setattr(MemoryStore, "get_many", slow)
        with pytest.raises(StateForbids, match="job is currently running"):
            await here.shard.import_jobs(tenant=T, jobs=[an_import("new"), an_import("j", past())])
        assert leased.is_set()
        assert here.state().status is JobStatus.RUNNING
        assert (T, "new") not in here.check()
