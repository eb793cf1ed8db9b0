"""Records to bytes and back. The first byte of a record is its format version.

Fields are stored by position: new ones come last, with a default, and a stored
meaning never changes in place. Old records stay readable.
"""

import struct
from typing import TypeAlias, TypeVar, cast

import msgspec

from silo.errors import StoreCorrupt
from silo.model.attempt import Attempt
from silo.model.counts import QueueCounts, ShardTotals, TenantCounts
from silo.model.floating import FloatingState
from silo.model.job import Job, JobState
from silo.model.limit import BucketRecord
from silo.model.task import Task

_VERSION = b"\x01"
_QUEUED = b"\x02"  # A state and the job it belongs to.
_REFRESH = b"\x03"  # A floating limit among jobs.
_LENGTH = struct.Struct(">I")

_encoder = msgspec.msgpack.Encoder()
_decoders = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in (
        Job,
        JobState,
        Attempt,
        FloatingState,
        BucketRecord,
        TenantCounts,
        QueueCounts,
        ShardTotals,
        int,
        bytes,
    )
}

AnyRecord: TypeAlias = (
    Job
    | JobState
    | Attempt
    | FloatingState
    | BucketRecord
    | TenantCounts
    | QueueCounts
    | ShardTotals
    | int
    | bytes
)
Record = TypeVar(
    "Record",
    Job,
    JobState,
    Attempt,
    FloatingState,
    BucketRecord,
    TenantCounts,
    QueueCounts,
    ShardTotals,
    int,
    bytes,
)


def encode(record: AnyRecord) -> bytes:
    """The bytes of `record`. Equal records have equal bytes."""
    return _VERSION + _encoder.encode(record)


def decode(kind: type[Record], value: bytes) -> Record:
    """The record in `value`.

    Raises:
        StoreCorrupt: the bytes are no record of this kind, or of a newer version.
    """
    if value[:1] != _VERSION:
        raise StoreCorrupt("record has an unknown version", kind=kind.__name__, version=value[:1].hex())
    try:
        return cast(Record, _decoders[kind].decode(memoryview(value)[1:]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StoreCorrupt("record does not decode", kind=kind.__name__) from error


def queued(state: bytes, job: bytes) -> bytes:
    """The value of a queue row that has the job along; both are encoded records."""
    return _QUEUED + _LENGTH.pack(len(state)) + state + job


def decode_queued(value: bytes) -> tuple[Task, Job | None]:
    """The task in a queue row, and the job if it is there too.

    Raises:
        StoreCorrupt: the bytes are neither a task nor a state with its job.
    """
    if value[:1] != _QUEUED:
        return decode_task(value), None
    try:
        (size,) = _LENGTH.unpack_from(value, 1)
    except struct.error as error:
        raise StoreCorrupt("record does not decode", kind="queue row") from error
    start = 1 + _LENGTH.size
    return decode(JobState, value[start : start + size]), decode(Job, value[start + size :])


def encode_refresh(state: FloatingState) -> bytes:
    """The value of a queue or lease row of a refresh task."""
    return _REFRESH + encode(state)


def decode_task(value: bytes) -> Task:
    """The task in a queue or lease row.

    Raises:
        StoreCorrupt: the bytes are none.
    """
    return decode(FloatingState, value[1:]) if value[:1] == _REFRESH else decode(JobState, value)
