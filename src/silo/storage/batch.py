"""From a change to the rows it writes and deletes, index rows included."""

from typing import assert_never

from silo.model.change import Change
from silo.model.floating import FloatingState, RefreshDue
from silo.model.job import (
    Asking,
    Checking,
    Delayed,
    JobState,
    JobStatus,
    Ready,
    Throttled,
    Waiting,
)
from silo.model.task import Task
from silo.storage import codec, keys
from silo.storage.store import Group, Rows

QUEUED_BYTES_MAX = 1024  # A larger job is not copied into its queue row.


def write_change(change: Change, rows: Rows) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Add to `rows` what `change` puts (bytes) and deletes (None); the `copy_rows` of before and after.

    The row of a job's pending work or of its lease holds a copy of its state,
    so that a queue can be served, and leases recovered, by one scan. The queue row of a
    new job has the job along unless it is large: a backlog is served without point reads.
    """
    before, after = change.before, change.after
    subject = change.subject
    copies_before: tuple[bytes, ...] = ()
    copies_after: tuple[bytes, ...] = ()
    if before is not None:
        rows[index_row(before)] = None
        copies_before = copy_rows(before)
        for key in copies_before:
            rows[key] = None
        if before.expires_at_ms is not None:
            rows[keys.expiry_key(before.expires_at_ms, before.tenant, before.job_id)] = None
    _write_holders(before, after, rows)
    job_value = None if change.job is None or after is None else codec.encode(change.job)
    if after is None:
        _delete_history(change, rows)
    else:
        # After the deletions: what is new now was not there before.
        copies_after = _write_state(after, job_value, rows)
    if change.job is not None:
        rows[keys.job_key(subject.tenant, subject.job_id)] = job_value
        for name, text in change.job.metadata:
            key = keys.metadata_index_key(subject.tenant, name, text, subject.job_id)
            rows[key] = None if after is None else b""
    for attempt in change.attempts:
        row = keys.attempt_key(subject.tenant, subject.job_id, attempt.attempt_number)
        rows[row] = codec.encode(attempt)
    return copies_before, copies_after


def _write_state(state: JobState, job_value: bytes | None, rows: Rows) -> tuple[bytes, ...]:
    value = codec.encode(state)
    rows[keys.state_key(state.tenant, state.job_id)] = value
    index, copies = index_row(state), copy_rows(state)
    if isinstance(rows, Group):
        rows.note_fresh((index, *copies))
    rows[index] = b""
    if job_value is not None and isinstance(state.pending, Ready) and len(job_value) <= QUEUED_BYTES_MAX:
        value = codec.queued(value, job_value)
    for key in copies:
        rows[key] = value
    if state.expires_at_ms is not None:
        rows[keys.expiry_key(state.expires_at_ms, state.tenant, state.job_id)] = b""
    return copies


def _write_holders(before: JobState | None, after: JobState | None, rows: Rows) -> None:
    held_before = before.held if before is not None else ()
    held_after = after.held if after is not None else ()
    if held_before is held_after:
        return
    subject = after or before
    assert subject is not None
    for holder in held_before:
        rows[keys.holder_key(subject.tenant, holder.key, subject.job_id)] = None
    for holder in held_after:
        rows[keys.holder_key(subject.tenant, holder.key, subject.job_id)] = codec.encode(holder.granted_at_ms)


def _delete_history(change: Change, rows: Rows) -> None:
    state = change.subject
    rows[keys.state_key(state.tenant, state.job_id)] = None
    for number in range(1, state.attempts_ended + 1):
        rows[keys.attempt_key(state.tenant, state.job_id, number)] = None


def index_row(state: JobState) -> bytes:
    """The job's row in the status index."""
    at_ms = state.changed_at_ms
    if state.status is JobStatus.SCHEDULED and state.next_start_ms is not None:
        at_ms = state.next_start_ms
    return keys.status_index_key(state.tenant, state.status, at_ms, state.job_id)


def copy_rows(state: JobState) -> tuple[bytes, ...]:
    """The rows with a copy of this state: where the job waits, or its lease."""
    if state.lease is not None:
        return (keys.lease_key(state.lease.task_id),)
    return () if state.pending is None else pending_keys(state)


def pending_keys(state: JobState) -> tuple[bytes, ...]:
    """The rows where a Scheduled job waits: one, or its place in a line and a timer."""
    pending = state.pending
    match pending:
        case Ready():
            return (queue_row(state),)
        case Delayed() | Checking():
            return (timer_row(state),)
        case Waiting() | Throttled(due_ms=None):
            return (line_row(state),)
        case Throttled():
            return (line_row(state), timer_row(state))
        case Asking():
            return (asking_row(state),)
        case None:
            raise AssertionError("nothing of this job is pending")
        case _:
            assert_never(pending)


def queue_row(task: Task) -> bytes:
    """The place of due work in the queue of its task group."""
    if isinstance(task, FloatingState):
        assert isinstance(task.refresh, RefreshDue), "no refresh waits"
        return keys.refresh_key(task.task_group, task.tenant, task.refresh.scheduled_at_ms, task.key)
    assert isinstance(task.pending, Ready), "this job is not ready"
    return keys.queue_key(task.task_group, task.tenant, task.pending.deadline_ms, task.priority, task.job_id)


def timer_row(state: JobState) -> bytes:
    """Where a job waits that is looked at later."""
    assert isinstance(state.pending, Delayed | Checking | Throttled), "this job waits for no time"
    assert state.pending.due_ms is not None, "this job waits in its line only"
    return keys.timer_key(state.pending.due_ms, state.tenant, state.job_id)


def asking_row(state: JobState) -> bytes:
    assert isinstance(state.pending, Asking), "nobody is asked for this job"
    return keys.asking_key(state.pending.turn, state.tenant, state.job_id)


def line_prefix(state: JobState) -> bytes:
    """What the rows of the line begin with in which a job waits for a limit."""
    match state.pending:
        case Waiting(key=key, line=line):
            return keys.ticket_line_prefix(state.tenant, key, line)
        case Throttled():
            limit = state.rate_limit
            return keys.bucket_line_prefix(state.tenant, limit.name, limit.unique_key)
        case _:
            raise AssertionError("this job is in no line")


def line_row(state: JobState) -> bytes:
    """The place of a job in its line."""
    return keys.place_in_line(line_prefix(state), *state.rank)


def write_floating(before: FloatingState | None, after: FloatingState, rows: Rows) -> None:
    """Add to `rows` what a floating limit's step from `before` to `after` puts and deletes; not its alarm."""
    if before is not None and before.refresh is not None:
        rows[refresh_row(before)] = None
    rows[keys.floating_key(after.tenant, after.key)] = codec.encode(after)
    if after.refresh is not None:
        rows[refresh_row(after)] = codec.encode_refresh(after)


def refresh_row(state: FloatingState) -> bytes:
    """Where the refresh task of a floating limit is: in a queue, or leased."""
    return queue_row(state) if state.lease is None else keys.lease_key(state.lease.task_id)
