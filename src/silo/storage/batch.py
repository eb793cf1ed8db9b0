"""From a change to the rows it writes and deletes, index rows included."""

from collections.abc import Iterator, MutableMapping
from typing import assert_never

from silo.model.change import Change
from silo.model.job import Delayed, JobState, JobStatus, Ready
from silo.storage import codec, keys

QUEUED_BYTES_MAX = 1024  # A larger job is not copied into its queue row.


def write_change(change: Change, rows: MutableMapping[bytes, bytes | None]) -> None:
    """Add to `rows` what `change` puts (bytes) and deletes (None).

    The row of a job's pending work or of its lease holds a copy of its state,
    so that a queue can be served, and leases recovered, by one scan. The queue row of a
    new job has the job along unless it is large: a backlog is served without point reads.
    """
    before, after = change.before, change.after
    subject = change.subject
    if before is not None:
        for key in derived_keys(before):
            rows[key] = None
    job_value = None if change.job is None or after is None else codec.encode(change.job)
    if after is None:
        _delete_history(change, rows)
    else:
        _write_state(after, job_value, rows)
    if change.job is not None:
        rows[keys.job_key(subject.tenant, subject.job_id)] = job_value
        for name, text in change.job.metadata:
            key = keys.metadata_index_key(subject.tenant, name, text, subject.job_id)
            rows[key] = None if after is None else b""
    for attempt in change.attempts:
        row = keys.attempt_key(subject.tenant, subject.job_id, attempt.attempt_number)
        rows[row] = codec.encode(attempt)


def _write_state(state: JobState, job_value: bytes | None, rows: MutableMapping[bytes, bytes | None]) -> None:
    value = codec.encode(state)
    rows[keys.state_key(state.tenant, state.job_id)] = value
    index_row, *locus = derived_keys(state)
    rows[index_row] = b""
    if job_value is not None and isinstance(state.pending, Ready) and len(job_value) <= QUEUED_BYTES_MAX:
        value = codec.queued(value, job_value)
    for key in locus:
        rows[key] = value


def _delete_history(change: Change, rows: MutableMapping[bytes, bytes | None]) -> None:
    state = change.subject
    rows[keys.state_key(state.tenant, state.job_id)] = None
    for number in range(1, state.attempts_ended + 1):
        rows[keys.attempt_key(state.tenant, state.job_id, number)] = None


def derived_keys(state: JobState) -> Iterator[bytes]:
    """The keys that exist because of this state: its status index row first, then where it waits or runs."""
    at_ms = state.changed_at_ms
    if state.status is JobStatus.SCHEDULED and state.next_start_ms is not None:
        at_ms = state.next_start_ms
    yield keys.status_index_key(state.tenant, state.status, at_ms, state.job_id)
    if state.pending is not None:
        yield pending_key(state)
    if state.lease is not None:
        yield keys.lease_key(state.lease.task_id)


def pending_key(state: JobState) -> bytes:
    """The row where a Scheduled job waits."""
    match state.pending:
        case Ready(deadline_ms=deadline_ms):
            return keys.queue_key(state.task_group, state.tenant, deadline_ms, state.priority, state.job_id)
        case Delayed(due_ms=due_ms):
            return keys.timer_key(due_ms, state.tenant, state.job_id)
        case None:
            raise AssertionError("nothing of this job is pending")
        case _:
            assert_never(state.pending)
