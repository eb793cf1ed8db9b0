"""Cancel, restart, expedite and delete a job. Refusals keep the texts that clients match on."""

import msgspec

from silo.engine.schedule import pending_at
from silo.errors import TERMINAL_STATE, StateForbids
from silo.model.change import Change
from silo.model.job import Checking, Delayed, Job, JobState, JobStatus, Pending, Throttled, Waiting

_FINAL = (JobStatus.SUCCEEDED, JobStatus.FAILED)


def cancel(state: JobState, *, now_ms: int) -> Change:
    """A waiting job ends at once; a running one is flagged, and its worker is told by heartbeat.

    Raises:
        StateForbids: it is cancelled already, or has ended.
    """
    if state.cancelled_at_ms is not None:
        raise StateForbids("job is already cancelled")
    if state.status in _FINAL:
        raise StateForbids(TERMINAL_STATE)
    after = msgspec.structs.replace(state, cancelled_at_ms=now_ms)
    if state.status is JobStatus.SCHEDULED:
        after = msgspec.structs.replace(
            after, status=JobStatus.CANCELLED, changed_at_ms=now_ms, pending=None, passed=0, held=()
        )
    return Change(before=state, after=after)


def restart(state: JobState, job: Job, *, now_ms: int, priority_step_ms: int) -> Change:
    """A cancelled or failed job runs again, with a full retry budget and its history kept.

    Raises:
        StateForbids: it succeeded, or has not ended.
    """
    if state.status is JobStatus.SUCCEEDED:
        raise _refused("restart", state, "job already succeeded")
    if not state.status.is_terminal:
        raise _refused("restart", state, "job is still in progress")
    # A job that was cancelled long before its time keeps its time.
    start_at_ms = max(job.enqueue_time_ms, now_ms)
    after = msgspec.structs.replace(
        state,
        status=JobStatus.SCHEDULED,
        changed_at_ms=now_ms,
        relative_attempt_number=1,
        next_start_ms=start_at_ms,
        cancelled_at_ms=None,
        pending=pending_at(
            start_at_ms, state.priority, state.limits, now_ms=now_ms, priority_step_ms=priority_step_ms
        ),
        expires_at_ms=None,
    )
    return Change(before=state, after=after)


def expedite(state: JobState, *, now_ms: int, priority_step_ms: int) -> Change:
    """Work that is not due yet becomes due now, as the same attempt.

    Raises:
        StateForbids: nothing of the job waits for a later time.
    """
    if state.status in _FINAL:
        raise _refused("expedite", state, TERMINAL_STATE)
    if state.cancelled_at_ms is not None:
        raise _refused("expedite", state, "job is cancelled")
    if state.status is JobStatus.RUNNING:
        raise _refused("expedite", state, "job is currently running")
    pending: Pending
    start_at_ms = now_ms
    match state.pending:
        case None | Waiting() | Throttled():  # What waits in line for a limit cannot be hurried.
            raise _refused("expedite", state, "job has no pending task to expedite")
        case Delayed(due_ms=due_ms) if due_ms > now_ms:
            pending = pending_at(
                now_ms, state.priority, state.limits, now_ms=now_ms, priority_step_ms=priority_step_ms
            )
        case Checking(due_ms=due_ms, checks=checks) if due_ms > now_ms:
            pending = Checking(now_ms, checks)
            start_at_ms = min(now_ms, state.rank[0])  # It keeps its place among those that wait.
        case _:
            raise _refused("expedite", state, "task is already ready to run (not future-scheduled)")
    after = msgspec.structs.replace(state, changed_at_ms=now_ms, next_start_ms=start_at_ms, pending=pending)
    return Change(before=state, after=after)


def delete(state: JobState, job: Job) -> Change:
    """A job that has ended disappears with its attempts.

    Raises:
        StateForbids: it has not ended.
    """
    if not state.status.is_terminal:
        raise StateForbids(
            f"cannot delete job {state.job_id}: job is currently running or has pending requests"
        )
    return Change(before=state, after=None, job=job)


def without_tickets(state: JobState) -> Change:
    """The same job in the same place, with no ticket."""
    return Change(before=state, after=msgspec.structs.replace(state, held=()))


def _refused(verb: str, state: JobState, reason: str) -> StateForbids:
    return StateForbids(f"cannot {verb} job {state.job_id}: {reason} (status: {state.status.label})")
