"""The rows that a change writes are those that its states call for, and no others."""

import msgspec
import pytest

from silo.model.attempt import Attempt, Failure
from silo.model.change import Change
from silo.model.job import Delayed, Job, JobState, JobStatus, Lease, Ready
from silo.storage import codec, keys
from silo.storage.batch import (
    QUEUED_BYTES_MAX,
    copy_rows,
    index_row,
    pending_keys,
    queue_row,
    write_change,
)

_T, _ID = "tenant", "job-1"


def _state(status: JobStatus, **fields: object) -> JobState:
    given: dict[str, object] = {
        "tenant": _T,
        "job_id": _ID,
        "task_group": "group",
        "priority": 50,
        "retry_policy": None,
        "status": status,
        "changed_at_ms": 1_000,
        "attempts_ended": 0,
        "relative_attempt_number": 1,
    }
    return JobState(**(given | fields))  # type: ignore[arg-type]


_LEASE = Lease(task_id="task-1", worker_id="w", started_at_ms=3_000, expiry_ms=13_000)
_READY = _state(JobStatus.SCHEDULED, pending=Ready(2_000), next_start_ms=2_000)
_DELAYED = _state(JobStatus.SCHEDULED, pending=Delayed(9_000), next_start_ms=9_000)
_RUNNING = _state(JobStatus.RUNNING, changed_at_ms=3_000, lease=_LEASE)
_RETRIED = _state(
    JobStatus.SCHEDULED, changed_at_ms=4_000, attempts_ended=1, pending=Delayed(8_000), next_start_ms=8_000
)
_SUCCEEDED = _state(JobStatus.SUCCEEDED, changed_at_ms=5_000, attempts_ended=1)
_FAILED = _state(JobStatus.FAILED, changed_at_ms=5_000, attempts_ended=3)
_CANCELLED = _state(JobStatus.CANCELLED, changed_at_ms=6_000, next_start_ms=2_000, cancelled_at_ms=6_000)
_JOB = Job(
    tenant=_T,
    id=_ID,
    enqueue_time_ms=0,
    created_at_ms=1_000,
    payload=b"payload",
    metadata=(("a", "1"), ("b", "2")),
)

_TRANSITIONS = [
    (None, _READY),
    (None, _DELAYED),
    (_DELAYED, _READY),
    (_READY, _READY),
    (_READY, _RUNNING),
    (_RUNNING, _RETRIED),
    (_RUNNING, _SUCCEEDED),
    (_RUNNING, _FAILED),
    (_READY, _CANCELLED),
    (_DELAYED, _CANCELLED),
    (_RUNNING, _CANCELLED),
    (_FAILED, _READY),
    (_CANCELLED, _DELAYED),
]


def _rows_of(state: JobState | None) -> dict[bytes, bytes]:
    """All rows that exist because of `state`, its description and attempts apart."""
    if state is None:
        return {}
    value = codec.encode(state)
    return {keys.state_key(_T, _ID): value, index_row(state): b""} | dict.fromkeys(copy_rows(state), value)


def _applied(rows: dict[bytes, bytes], change: Change) -> dict[bytes, bytes]:
    written: dict[bytes, bytes | None] = {}
    write_change(change, written)
    return {key: value for key, value in (rows | written).items() if value is not None}


@pytest.mark.parametrize(("before", "after"), _TRANSITIONS)
def test_after_a_step_exactly_the_rows_of_the_new_state_are_left(
    before: JobState | None, after: JobState
) -> None:
    assert _applied(_rows_of(before), Change(before=before, after=after)) == _rows_of(after)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (_READY, [keys.status_index_key(_T, 0, 2_000, _ID), keys.queue_key("group", _T, 2_000, 50, _ID)]),
        (_DELAYED, [keys.status_index_key(_T, 0, 9_000, _ID), keys.timer_key(9_000, _T, _ID)]),
        (_RUNNING, [keys.status_index_key(_T, 1, 3_000, _ID), keys.lease_key("task-1")]),
        (_SUCCEEDED, [keys.status_index_key(_T, 2, 5_000, _ID)]),
        (_FAILED, [keys.status_index_key(_T, 3, 5_000, _ID)]),
        (_CANCELLED, [keys.status_index_key(_T, 4, 6_000, _ID)]),
    ],
)
def test_each_state_has_its_index_row_and_the_place_where_it_waits_or_runs(
    state: JobState, expected: list[bytes]
) -> None:
    assert [index_row(state), *copy_rows(state)] == expected


def test_a_step_keeps_the_rows_of_other_jobs() -> None:
    other = {keys.state_key(_T, "job-2"): b"x", keys.job_key(_T, _ID): b"y"}
    change = Change(before=_READY, after=_RUNNING)
    assert _applied(_rows_of(_READY) | other, change) == _rows_of(_RUNNING) | other


def test_a_new_job_gets_its_description_and_a_row_for_each_metadata_entry() -> None:
    rows = _applied({}, Change(before=None, after=_READY, job=_JOB))
    assert rows == _rows_of(_READY) | {
        keys.job_key(_T, _ID): codec.encode(_JOB),
        queue_row(_READY): codec.queued(codec.encode(_READY), codec.encode(_JOB)),
        keys.metadata_index_key(_T, "a", "1", _ID): b"",
        keys.metadata_index_key(_T, "b", "2", _ID): b"",
    }


def test_a_large_job_is_not_copied_into_its_queue_row() -> None:
    large = msgspec.structs.replace(_JOB, payload=bytes(QUEUED_BYTES_MAX))
    rows = _applied({}, Change(before=None, after=_READY, job=large))
    assert rows[queue_row(_READY)] == codec.encode(_READY)


def test_an_attempt_that_ended_is_stored_under_its_number() -> None:
    attempt = Attempt(
        attempt_number=1,
        relative_attempt_number=1,
        task_id="task-1",
        worker_id="w",
        started_at_ms=3_000,
        finished_at_ms=4_000,
        outcome=Failure("CODE", b""),
    )
    rows = _applied(_rows_of(_RUNNING), Change(before=_RUNNING, after=_RETRIED, attempts=(attempt,)))
    assert rows == _rows_of(_RETRIED) | {keys.attempt_key(_T, _ID, 1): codec.encode(attempt)}


@pytest.mark.parametrize("last", [_SUCCEEDED, _FAILED, _CANCELLED])
def test_deleting_a_job_leaves_none_of_its_rows(last: JobState) -> None:
    rows = _applied({}, Change(before=None, after=_READY, job=_JOB))
    rows = _applied(rows, Change(before=_READY, after=last))
    rows |= {keys.attempt_key(_T, _ID, number + 1): b"attempt" for number in range(last.attempts_ended)}

    assert _applied(rows, Change(before=last, after=None, job=_JOB)) == {}


@pytest.mark.parametrize("state", [_RUNNING, _SUCCEEDED])
def test_a_job_that_does_not_wait_has_no_place_to_wait(state: JobState) -> None:
    with pytest.raises(AssertionError, match="nothing of this job is pending"):
        pending_keys(state)
