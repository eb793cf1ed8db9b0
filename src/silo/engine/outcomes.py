"""End an attempt: reported, or given up because its lease ran out."""

from random import Random
from typing import assert_never

import msgspec

from silo.engine import leasing
from silo.engine.schedule import pending_at, retry_delay_ms, saturating_add
from silo.model.attempt import (
    Attempt,
    Cancelled,
    Failure,
    FinalFailure,
    HandedBack,
    Outcome,
    Postponed,
    Report,
    Success,
)
from silo.model.change import Change
from silo.model.job import JobState, JobStatus

WORKER_CRASHED = "WORKER_CRASHED"


def ended(state: JobState, outcome: Outcome, *, now_ms: int, priority_step_ms: int, rng: Random) -> Change:
    """The running attempt ends with `outcome`; the job ends or is scheduled again.

    Success always wins. A failure of a cancelled job ends it as Cancelled: it
    must not run again.
    """
    lease = state.lease
    assert lease is not None, "only a running attempt ends"
    attempt = Attempt(
        attempt_number=state.next_attempt_number,
        relative_attempt_number=state.relative_attempt_number,
        task_id=lease.task_id,
        worker_id=lease.worker_id,
        started_at_ms=lease.started_at_ms,
        finished_at_ms=now_ms,
        outcome=outcome,
    )
    match outcome:
        case Success():
            after = _terminal(state, JobStatus.SUCCEEDED, now_ms)
        case Cancelled():
            after = _terminal(state, JobStatus.CANCELLED, now_ms)
        case Failure():
            if state.cancelled_at_ms is not None:
                after = _terminal(state, JobStatus.CANCELLED, now_ms)
            elif state.is_last_attempt:
                after = _terminal(state, JobStatus.FAILED, now_ms)
            else:
                after = _retry(state, now_ms=now_ms, priority_step_ms=priority_step_ms, rng=rng)
    return Change(before=state, after=after, attempts=(attempt,))


def reported(state: JobState, report: Report, *, now_ms: int, priority_step_ms: int, rng: Random) -> Change:
    """What a worker said of its task. Nothing of a cancelled job runs again."""
    match report:
        case FinalFailure(failure=failure):
            change = ended(state, failure, now_ms=now_ms, priority_step_ms=priority_step_ms, rng=rng)
            assert change.after is not None
            if change.after.status.is_terminal:
                return change
            return msgspec.structs.replace(change, after=_terminal(state, JobStatus.FAILED, now_ms))
        case Postponed(delay_ms=delay_ms):
            if state.cancelled_at_ms is not None:
                return reported(state, Cancelled(), now_ms=now_ms, priority_step_ms=priority_step_ms, rng=rng)
            start_at_ms = saturating_add(now_ms, delay_ms)
            after = _scheduled(state, start_at_ms, now_ms=now_ms, priority_step_ms=priority_step_ms)
            return Change(before=state, after=after)
        case HandedBack():
            place = state.lease.place if state.lease is not None else None
            if place is None or state.cancelled_at_ms is not None:
                now = Postponed(0)
                return reported(state, now, now_ms=now_ms, priority_step_ms=priority_step_ms, rng=rng)
            return leasing.handed_back(state, place, now_ms=now_ms)
        case Success() | Failure() | Cancelled():
            return ended(state, report, now_ms=now_ms, priority_step_ms=priority_step_ms, rng=rng)
        case _:
            assert_never(report)


def expired(state: JobState, *, expiry_ms: int, now_ms: int, priority_step_ms: int, rng: Random) -> Change:
    """The lease ran out: the worker is taken for dead.

    The error data is a MessagePack text that says when, and which worker.
    """
    lease = state.lease
    assert lease is not None, "only a lease expires"
    outcome: Outcome
    if state.cancelled_at_ms is not None:
        outcome = Cancelled()
    else:
        text = f"lease expired at {expiry_ms} (now {now_ms}), worker={lease.worker_id}"
        outcome = Failure(WORKER_CRASHED, msgspec.msgpack.encode(text))
    return ended(state, outcome, now_ms=now_ms, priority_step_ms=priority_step_ms, rng=rng)


def _terminal(state: JobState, status: JobStatus, now_ms: int) -> JobState:
    return JobState(
        tenant=state.tenant,
        job_id=state.job_id,
        task_group=state.task_group,
        priority=state.priority,
        retry_policy=state.retry_policy,
        status=status,
        changed_at_ms=now_ms,
        attempts_ended=state.attempts_ended + 1,
        relative_attempt_number=state.relative_attempt_number,
        payload_bytes=state.payload_bytes,
        cancelled_at_ms=state.cancelled_at_ms,
        limits=state.limits,
    )


def _retry(state: JobState, *, now_ms: int, priority_step_ms: int, rng: Random) -> JobState:
    assert state.retry_policy is not None, "a retry needs a policy"
    delay_ms = retry_delay_ms(state.retry_policy, state.relative_attempt_number, rng)
    again = _scheduled(
        state, saturating_add(now_ms, delay_ms), now_ms=now_ms, priority_step_ms=priority_step_ms
    )
    return msgspec.structs.replace(
        again,
        attempts_ended=state.attempts_ended + 1,
        relative_attempt_number=state.relative_attempt_number + 1,
    )


def _scheduled(state: JobState, start_at_ms: int, *, now_ms: int, priority_step_ms: int) -> JobState:
    """The job without its lease and its tickets, to run at `start_at_ms`."""
    return msgspec.structs.replace(
        state,
        status=JobStatus.SCHEDULED,
        changed_at_ms=now_ms,
        next_start_ms=start_at_ms,
        pending=pending_at(
            start_at_ms, state.priority, state.limits, now_ms=now_ms, priority_step_ms=priority_step_ms
        ),
        lease=None,
        passed=0,
        held=(),
    )
