"""Take in a job from elsewhere with its history, or more history of a job that is here.

The texts of refusals are those that clients get for each job of an import.
"""

from collections.abc import Callable, Iterable, Sequence

import msgspec

from silo.engine.schedule import pending_at
from silo.errors import InvalidRequest, StateForbids
from silo.model.attempt import Attempt, Cancelled, Failure, Outcome, PastAttempt, Success
from silo.model.change import Change
from silo.model.job import ImportedJob, Job, JobState, JobStatus, RetryPolicy, task_bytes


def check_none_runs(states: Iterable[JobState]) -> None:
    """An import is refused as a whole while one of its jobs runs.

    Raises:
        StateForbids: one does.
    """
    for state in states:
        if state.status is JobStatus.RUNNING:
            raise StateForbids(
                f"cannot reimport job {state.job_id}: job is currently running (status: {state.status.label})"
            )


def import_new(
    given: ImportedJob, *, new_task_id: Callable[[], str], now_ms: int, priority_step_ms: int
) -> Change:
    """The job as its history leaves it. The caller knows that the id is free.

    Raises:
        InvalidRequest: an attempt before the last one did not fail.
    """
    _check_order(given.attempts)
    state = JobState(
        tenant=given.tenant,
        job_id=given.id,
        task_group=given.task_group,
        priority=given.priority,
        retry_policy=given.retry_policy,
        status=JobStatus.SCHEDULED,
        changed_at_ms=now_ms,
        attempts_ended=0,
        relative_attempt_number=1,
        payload_bytes=task_bytes(given.id, given.payload, given.metadata, given.limits),
        limits=given.limits,
    )
    job = Job(
        tenant=given.tenant,
        id=given.id,
        enqueue_time_ms=given.enqueue_time_ms if given.enqueue_time_ms > 0 else now_ms,
        created_at_ms=now_ms,
        payload=given.payload,
        metadata=given.metadata,
    )
    return Change(
        before=None,
        after=_after(state, given, now_ms=now_ms, priority_step_ms=priority_step_ms),
        job=job,
        attempts=_attempts(given.attempts, stored=0, new_task_id=new_task_id),
    )


def reimport(
    state: JobState,
    stored: Sequence[Attempt],
    given: ImportedJob,
    *,
    new_task_id: Callable[[], str],
    now_ms: int,
    priority_step_ms: int,
) -> Change:
    """The job with the attempts that `given` has beyond the `stored` ones, which it must repeat.

    The retry policy and the start are those of `given`; all else of the job stays as
    it is. What was pending is replaced, and a cancellation forgotten.

    Raises:
        StateForbids: the job has succeeded, or its history does not go on in `given`.
        InvalidRequest: a new attempt before the last one did not fail.
    """
    assert state.status is not JobStatus.RUNNING, "refused with the whole import"
    if state.status is JobStatus.SUCCEEDED:
        raise _refused(state, "job already succeeded")
    # Every stored attempt has ended: only a Running job has one that has not.
    count = state.attempts_ended
    if len(given.attempts) < count:
        raise _refused(
            state, f"reimport has {len(given.attempts)} attempts but job has {count} existing attempts"
        )
    assert len(stored) == count, "the whole history is compared"
    for number, (old, new) in enumerate(zip(stored, given.attempts, strict=False), start=1):
        if not _is_same(old, new):
            raise _refused(state, f"existing attempt {number} does not match reimport data")
    added = given.attempts[count:]
    if not added:
        raise _refused(state, "reimport must include at least one new attempt")
    _check_order(added)
    return Change(
        before=state,
        after=_after(state, given, now_ms=now_ms, priority_step_ms=priority_step_ms),
        attempts=_attempts(added, stored=count, new_task_id=new_task_id),
    )


def compares_history(state: JobState, given: ImportedJob) -> bool:
    """Whether `reimport` looks at the stored attempts, so that they must be read."""
    if state.status in (JobStatus.RUNNING, JobStatus.SUCCEEDED):
        return False  # Refused anyhow.
    return len(given.attempts) >= state.attempts_ended


def _after(state: JobState, given: ImportedJob, *, now_ms: int, priority_step_ms: int) -> JobState:
    """`state` when it has gone through all attempts of `given`."""
    ended = len(given.attempts)
    status = _status(given.attempts, given.retry_policy)
    after = msgspec.structs.replace(
        state,
        retry_policy=given.retry_policy,
        status=status,
        attempts_ended=ended,
        next_start_ms=None,
        cancelled_at_ms=None,
        pending=None,
        passed=0,
        held=(),
        expires_at_ms=None,
    )
    if status is not JobStatus.SCHEDULED:
        return msgspec.structs.replace(
            after, changed_at_ms=given.attempts[-1].finished_at_ms, relative_attempt_number=ended
        )
    start_at_ms = given.start_at_ms if given.start_at_ms > 0 else now_ms
    return msgspec.structs.replace(
        after,
        changed_at_ms=now_ms,
        # Counted from the first attempt of all, restarts or not.
        relative_attempt_number=ended + 1,
        next_start_ms=start_at_ms,
        pending=pending_at(
            start_at_ms, state.priority, state.limits, now_ms=now_ms, priority_step_ms=priority_step_ms
        ),
    )


def _status(attempts: Sequence[PastAttempt], policy: RetryPolicy | None) -> JobStatus:
    if not attempts:
        return JobStatus.SCHEDULED
    outcome: Outcome = attempts[-1].outcome
    match outcome:
        case Success():
            return JobStatus.SUCCEEDED
        case Cancelled():
            return JobStatus.CANCELLED
        case Failure():
            failures = sum(isinstance(attempt.outcome, Failure) for attempt in attempts)
            has_retries = policy is not None and failures <= policy.retry_count
            return JobStatus.SCHEDULED if has_retries else JobStatus.FAILED


def _attempts(
    given: Sequence[PastAttempt], *, stored: int, new_task_id: Callable[[], str]
) -> tuple[Attempt, ...]:
    """Records of attempts that follow `stored` others. Nobody here worked on them."""
    return tuple(
        Attempt(
            attempt_number=number,
            relative_attempt_number=number,
            task_id=new_task_id(),
            worker_id="",
            started_at_ms=attempt.started_at_ms,
            finished_at_ms=attempt.finished_at_ms,
            outcome=attempt.outcome,
        )
        for number, attempt in enumerate(given, start=stored + 1)
    )


def _check_order(attempts: Sequence[PastAttempt]) -> None:
    for number, attempt in enumerate(attempts[:-1], start=1):
        if not isinstance(attempt.outcome, Failure):
            raise InvalidRequest(
                f"invalid argument: import attempt {number} must be Failed "
                "(only the last attempt may be non-Failed)"
            )


def _is_same(stored: Attempt, given: PastAttempt) -> bool:
    return (stored.started_at_ms, stored.finished_at_ms, stored.outcome) == (
        given.started_at_ms,
        given.finished_at_ms,
        given.outcome,
    )


def _refused(state: JobState, reason: str) -> StateForbids:
    refusal = f"cannot reimport job {state.job_id}: {reason} (status: {state.status.label})"
    return StateForbids(f"cannot reimport job: {refusal}")
