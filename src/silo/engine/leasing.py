"""Hand work out, and move it to its queue when it is due."""

import msgspec

from silo.engine.schedule import virtual_deadline_ms
from silo.errors import TERMINAL_STATE, StateForbids
from silo.model.change import Change
from silo.model.job import LEASE_MS, Delayed, JobState, JobStatus, Lease, Place, Ready, Waiting


def lease(state: JobState, *, task_id: str, worker_id: str, now_ms: int, session: str = "") -> Change:
    """The pending attempt of a Scheduled job becomes Running under `task_id`, and keeps its tickets."""
    assert state.status is JobStatus.SCHEDULED, "only pending work is leased"
    place: Place | None = None
    if isinstance(state.pending, Ready) and state.next_start_ms is not None:
        place = Place(state.next_start_ms, state.pending.deadline_ms)
    granted = Lease(
        task_id=task_id,
        worker_id=worker_id,
        started_at_ms=now_ms,
        expiry_ms=now_ms + LEASE_MS,
        session=session,
        place=place,
    )
    after = JobState(
        tenant=state.tenant,
        job_id=state.job_id,
        task_group=state.task_group,
        priority=state.priority,
        retry_policy=state.retry_policy,
        status=JobStatus.RUNNING,
        changed_at_ms=now_ms,
        attempts_ended=state.attempts_ended,
        relative_attempt_number=state.relative_attempt_number,
        payload_bytes=state.payload_bytes,
        lease=granted,
        limits=state.limits,
        passed=state.passed,
        held=state.held,
    )
    return Change(before=state, after=after)


def handed_back(state: JobState, place: Place, *, now_ms: int) -> Change:
    """The inverse of `lease`: the attempt was not begun, and the job stands where it stood."""
    assert state.lease is not None, "only leased work is handed back"
    after = msgspec.structs.replace(
        state,
        status=JobStatus.SCHEDULED,
        changed_at_ms=now_ms,
        next_start_ms=place.start_ms,
        pending=Ready(place.deadline_ms),
        lease=None,
    )
    return Change(before=state, after=after)


def become_due(state: JobState, *, priority_step_ms: int) -> Change:
    """Delayed work without limits joins the queue of its task group. Its status does not change."""
    assert not state.limits, "limits come first"
    match state.pending:
        case Delayed(due_ms=due_ms):
            deadline_ms = virtual_deadline_ms(due_ms, state.priority, priority_step_ms)
            return Change(before=state, after=msgspec.structs.replace(state, pending=Ready(deadline_ms)))
        case _:
            raise AssertionError("only delayed work becomes due")


def check_leasable(state: JobState) -> None:
    """Leasing one job by its id.

    Raises:
        StateForbids: the job is not waiting to run.
    """
    if state.status is JobStatus.RUNNING:
        reason = "job is currently running"
    elif state.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        reason = TERMINAL_STATE
    elif state.cancelled_at_ms is not None:
        reason = "job is cancelled"
    elif state.pending is None:
        reason = "job has no pending task"
    elif isinstance(state.pending, Waiting):
        reason = "job has no pending task in queue"
    else:
        return
    raise StateForbids(f"cannot lease job {state.job_id}: {reason} (status: {state.status.label})")
