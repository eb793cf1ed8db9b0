"""From a change to the rows it writes and deletes, index rows included."""

from collections.abc import Iterator, MutableMapping
from typing import assert_never

from silo.model.change import Change
from silo.model.job import Delayed, JobState, JobStatus, Ready
from silo.storage import codec, keys


def write_change(change: Change, rows: MutableMapping[bytes, bytes | None]) -> None:
    """Add to `rows` what `change` puts (bytes) and deletes (None).

    The row of a job's pending work or of its lease holds a copy of its state,
    so that a queue can be served, and leases recovered, by one scan.
    """
    before, after = change.before, change.after
    subject = change.subject
    tenant, job_id = subject.tenant, subject.job_id
    if before is not None:
        for key in derived_keys(before):
            rows[key] = None
    state_row = keys.state_key(tenant, job_id)
    if after is None:
        rows[state_row] = None
        assert before is not None
        for number in range(1, before.attempts_ended + 1):
            rows[keys.attempt_key(tenant, job_id, number)] = None
    else:
        value = codec.encode(after)
        rows[state_row] = value
        index_row, *locus = derived_keys(after)
        rows[index_row] = b""
        for key in locus:
            rows[key] = value
    if change.job is not None:
        kept = after is not None
        rows[keys.job_key(tenant, job_id)] = codec.encode(change.job) if kept else None
        for name, text in change.job.metadata:
            rows[keys.metadata_index_key(tenant, name, text, job_id)] = b"" if kept else None
    if change.attempt is not None:
        row = keys.attempt_key(tenant, job_id, change.attempt.attempt_number)
        rows[row] = codec.encode(change.attempt)


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
