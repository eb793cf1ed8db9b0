"""Limits: conditions a job passes before it runs."""

import enum
from collections.abc import Iterable
from typing import TypeAlias

import msgspec

FLOATING_LINE = 1 << 32  # Where jobs with a floating limit wait; a fixed limit's line is its maximum.
NEVER_MS = (1 << 63) - 1


class ConcurrencyLimit(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag=1, gc=False):
    """At most `max_concurrency` tickets of the queue `key` are held with this job's; 0 means never."""

    key: str
    max_concurrency: int

    @property
    def line(self) -> int:
        return self.max_concurrency


class FloatingLimit(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag=2, gc=False):
    """Like a concurrency limit, with one maximum for all jobs of the queue, which workers refresh."""

    key: str
    default_max_concurrency: int  # Until the first refresh.
    refresh_interval_ms: int
    metadata: tuple[tuple[str, str], ...] = ()  # Handed to the worker that refreshes.

    @property
    def line(self) -> int:
        return FLOATING_LINE


class RateAlgorithm(enum.IntEnum):
    """Numbers are those of the wire and of stored records."""

    TOKEN_BUCKET = 0
    LEAKY_BUCKET = 1


class RateBehavior(enum.IntFlag):
    """Numbers are those of the wire. Others say how servers share buckets, and mean nothing here."""

    DURATION_IS_GREGORIAN = 4
    RESET_REMAINING = 8
    DRAIN_OVER_LIMIT = 16


class CalendarWindow(enum.IntEnum):
    """What `duration_ms` counts as with `DURATION_IS_GREGORIAN`; windows are those of UTC."""

    MINUTE = 0
    HOUR = 1
    DAY = 2
    WEEK = 3  # From Monday.
    MONTH = 4
    YEAR = 5


class RateRetryPolicy(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """How long a job over its rate limit waits, and how often. Fields are used as sent."""

    initial_backoff_ms: int = 100
    max_backoff_ms: int = 30_000
    backoff_multiplier: float = 2.0
    max_retries: int = 0  # 0: no bound.


class RateLimit(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag=3, gc=False):
    """`hits` of the `limit` that a bucket has in `duration_ms`. The bucket is the tenant's, by both names."""

    name: str
    unique_key: str
    limit: int
    duration_ms: int
    hits: int = 1
    algorithm: RateAlgorithm = RateAlgorithm.TOKEN_BUCKET
    behavior: int = 0  # `RateBehavior`, and bits that mean nothing here.
    retry_policy: RateRetryPolicy = RateRetryPolicy()


TicketLimit: TypeAlias = ConcurrencyLimit | FloatingLimit
"""A limit that is passed by holding a ticket of a concurrency queue."""

Limit: TypeAlias = ConcurrencyLimit | FloatingLimit | RateLimit


class Holder(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A ticket of a concurrency queue, from the grant to the end of the attempt."""

    key: str
    granted_at_ms: int


class Bucket(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """What a rate limit has spent. A bucket that is not stored has spent nothing.

    Token bucket: `used` hits in the window that began at `at_ms`. Leaky bucket: at `at_ms`,
    `used` hits and `part` / `duration_ms` of one more had not drained.
    """

    tenant: str
    name: str
    unique_key: str
    algorithm: RateAlgorithm
    limit: int  # These two are those of the request that was judged last.
    duration_ms: int
    used: int
    part: int
    at_ms: int


class BucketRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A bucket as it is stored."""

    bucket: Bucket | None
    waiters: int  # Jobs in its line.
    alarm_at_ms: int | None  # When it is looked at next: to serve its line, or to forget it.


def limits_bytes(limits: Iterable[Limit]) -> int:
    """How much of an answer these limits take, in bytes, about."""
    size = 0
    for limit in limits:
        match limit:
            case ConcurrencyLimit(key=key):
                size += len(key.encode()) + 16
            case FloatingLimit(key=key, metadata=metadata):
                size += len(key.encode()) + 32
                size += sum(len(name.encode()) + len(value.encode()) + 8 for name, value in metadata)
            case RateLimit(name=name, unique_key=unique_key):
                size += len(name.encode()) + len(unique_key.encode()) + 96
    return size
