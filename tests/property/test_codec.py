"""Records come back as they were; anything else is told to be corrupt."""

from typing import TypeAlias

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silo.errors import StoreCorrupt
from silo.model.attempt import Attempt, Cancelled, Failure, Success
from silo.model.counts import ShardTotals, TenantCounts
from silo.model.job import Delayed, Job, JobState, JobStatus, Lease, Ready, RetryPolicy
from silo.storage import codec

Stored: TypeAlias = Job | JobState | Attempt | TenantCounts | ShardTotals | int | bytes

_texts = st.text(max_size=10)
_ints = st.integers(-(1 << 63), (1 << 63) - 1)
_counts = st.integers(0, 1 << 40)

_policies = st.builds(
    RetryPolicy,
    retry_count=_ints,
    initial_interval_ms=_ints,
    max_interval_ms=_ints,
    randomize_interval=st.booleans(),
    backoff_factor=st.floats(allow_nan=False),
)
_jobs = st.builds(
    Job,
    tenant=_texts,
    id=_texts,
    enqueue_time_ms=_ints,
    created_at_ms=_ints,
    payload=st.binary(max_size=50),
    metadata=st.lists(st.tuples(_texts, _texts), max_size=3).map(tuple),
)
_states = st.builds(
    JobState,
    tenant=_texts,
    job_id=_texts,
    task_group=_texts,
    priority=_ints,
    retry_policy=st.none() | _policies,
    status=st.sampled_from(JobStatus),
    changed_at_ms=_ints,
    attempts_ended=_ints,
    relative_attempt_number=_ints,
    payload_bytes=_ints,
    next_start_ms=st.none() | _ints,
    cancelled_at_ms=st.none() | _ints,
    pending=st.none() | st.builds(Ready, _ints) | st.builds(Delayed, _ints),
    lease=st.none()
    | st.builds(Lease, task_id=_texts, worker_id=_texts, started_at_ms=_ints, expiry_ms=_ints),
)
_attempts = st.builds(
    Attempt,
    attempt_number=_ints,
    relative_attempt_number=_ints,
    task_id=_texts,
    worker_id=_texts,
    started_at_ms=_ints,
    finished_at_ms=st.none() | _ints,
    outcome=st.none()
    | st.builds(Success, st.binary(max_size=20))
    | st.builds(Failure, _texts, st.binary(max_size=20))
    | st.just(Cancelled()),
)
_RECORDS: dict[type, st.SearchStrategy[Stored]] = {
    Job: _jobs,
    JobState: _states,
    Attempt: _attempts,
    TenantCounts: st.builds(TenantCounts, st.tuples(_counts, _counts, _counts, _counts, _counts)),
    ShardTotals: st.builds(ShardTotals, _counts, _counts),
    int: _ints,
    bytes: st.binary(max_size=50),
}
_kinds = pytest.mark.parametrize("kind", _RECORDS, ids=lambda kind: kind.__name__)


@_kinds
@given(st.data())
def test_a_record_comes_back_as_it_was(kind: type, data: st.DataObject) -> None:
    record = data.draw(_RECORDS[kind])
    assert codec.decode(kind, codec.encode(record)) == record


@_kinds
@given(st.data())
def test_equal_records_have_equal_bytes(kind: type, data: st.DataObject) -> None:
    record = data.draw(_RECORDS[kind])
    twin = codec.decode(kind, codec.encode(record))
    assert codec.encode(twin) == codec.encode(record)


@_kinds
@given(st.data())
def test_another_version_is_corrupt(kind: type, data: st.DataObject) -> None:
    value = codec.encode(data.draw(_RECORDS[kind]))
    version = data.draw(st.integers(0, 255).filter(lambda number: number != value[0]))
    with pytest.raises(StoreCorrupt, match="unknown version"):
        codec.decode(kind, bytes((version,)) + value[1:])


@_kinds
@given(st.data())
def test_a_truncated_record_is_corrupt(kind: type, data: st.DataObject) -> None:
    value = codec.encode(data.draw(_RECORDS[kind]))
    with pytest.raises(StoreCorrupt):
        codec.decode(kind, value[: data.draw(st.integers(0, len(value) - 1))])


@_kinds
@given(st.data())
def test_bytes_behind_a_record_are_corrupt(kind: type, data: st.DataObject) -> None:
    value = codec.encode(data.draw(_RECORDS[kind]))
    with pytest.raises(StoreCorrupt):
        codec.decode(kind, value + data.draw(st.binary(min_size=1, max_size=3)))


@_kinds
@given(rest=st.binary(max_size=40))
def test_any_bytes_decode_or_are_corrupt_and_nothing_else(kind: type, rest: bytes) -> None:
    for value in (rest, b"\x01" + rest):
        try:
            record = codec.decode(kind, value)
        except StoreCorrupt:
            continue
        assert isinstance(record, kind)


@_kinds
@given(st.data())
def test_a_record_with_one_byte_changed_decodes_or_is_corrupt(kind: type, data: st.DataObject) -> None:
    value = bytearray(codec.encode(data.draw(_RECORDS[kind])))
    value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    try:
        record = codec.decode(kind, bytes(value))
    except StoreCorrupt:
        return
    assert isinstance(record, kind)


def test_records_of_today_with_fields_of_tomorrow_still_decode() -> None:
    policy = RetryPolicy(
        retry_count=1, initial_interval_ms=2, max_interval_ms=3, randomize_interval=False, backoff_factor=2.0
    )
    fields = msgspec.to_builtins(ShardTotals(4, 3))
    assert codec.decode(ShardTotals, b"\x01" + msgspec.msgpack.encode([*fields, "new"])) == ShardTotals(4, 3)
    assert codec.decode(ShardTotals, b"\x01" + msgspec.msgpack.encode([4])) == ShardTotals(4)
    assert policy == msgspec.convert(msgspec.to_builtins(policy), RetryPolicy)


@given(_states, _jobs)
def test_a_queue_row_gives_back_its_state_and_the_job_it_has_along(state: JobState, job: Job) -> None:
    value = codec.encode(state)
    assert codec.decode_queued(value) == (state, None)
    assert codec.decode_queued(codec.queued(value, codec.encode(job))) == (state, job)


@given(_states, _jobs, st.data())
def test_a_damaged_queue_row_is_corrupt(state: JobState, job: Job, data: st.DataObject) -> None:
    value = codec.queued(codec.encode(state), codec.encode(job))
    cut = data.draw(st.integers(0, len(value) - 1))
    with pytest.raises(StoreCorrupt):
        codec.decode_queued(value[:cut])
