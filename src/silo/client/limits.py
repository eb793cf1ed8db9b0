"""Limits: what a job must pass before it runs, and how they travel.

A job's limits are passed in the order in which they are given.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

from silo.wire.pb.silo.v1 import silo_pb2 as pb


class GubernatorAlgorithm(enum.IntEnum):
    """How a rate limit counts. Numbers are those of the wire."""

    TOKEN_BUCKET = 0  # `limit` hits in each window of `duration_ms`.
    LEAKY_BUCKET = 1  # Hits drain steadily, `limit` of them in `duration_ms`.


class GubernatorBehavior(enum.IntFlag):
    """What is special about a rate limit; combine with `|`. Numbers are those of the wire."""

    BATCHING = 0
    NO_BATCHING = 1
    GLOBAL = 2
    DURATION_IS_GREGORIAN = 4  # `duration_ms` names a window of the calendar: 0 minute, 1 hour, … 5 year.
    RESET_REMAINING = 8
    DRAIN_OVER_LIMIT = 16  # A hit that is refused takes what was left.


@dataclass(frozen=True, kw_only=True)
class ConcurrencyLimit:
    """At most `max_concurrency` jobs of the tenant with this key run at a time."""

    key: str
    max_concurrency: int


@dataclass(frozen=True, kw_only=True)
class FloatingConcurrencyLimit:
    """A concurrency limit whose maximum the refresh handler of a worker renews.

    `default_max_concurrency` holds until its first answer; then it is asked every
    `refresh_interval_ms`, with `metadata`, while jobs wait for it.
    """

    key: str
    default_max_concurrency: int
    refresh_interval_ms: int
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RateLimitRetryPolicy:
    """How long a job waits whose rate limit is reached, and how often it asks again.

    The wait doubles, or grows by `backoff_multiplier`, from `initial_backoff_ms` to `max_backoff_ms`.
    """

    initial_backoff_ms: int
    max_backoff_ms: int
    backoff_multiplier: float = 2.0
    max_retries: int = 0  # 0: no bound.


@dataclass(frozen=True, kw_only=True)
class RateLimit:
    """At most `limit` hits in `duration_ms`, of which this job makes `hits`.

    Jobs of the tenant with the same `name` and `unique_key` share the count. Without a retry policy
    the server's own holds: waits of 100 ms to 30 s without a bound.
    """

    name: str
    unique_key: str
    limit: int
    duration_ms: int
    hits: int = 1
    algorithm: GubernatorAlgorithm = GubernatorAlgorithm.TOKEN_BUCKET
    behavior: GubernatorBehavior = GubernatorBehavior.BATCHING
    retry_policy: RateLimitRetryPolicy | None = None


Limit: TypeAlias = ConcurrencyLimit | FloatingConcurrencyLimit | RateLimit


def limits_to_pb(limits: Iterable[Limit]) -> list[pb.Limit]:
    """In the same order.

    Raises:
        ValueError: a number is out of the range that the wire has for it.
        TypeError: a value is of another type.
    """
    return [_limit_to_pb(limit) for limit in limits]


def _limit_to_pb(limit: Limit) -> pb.Limit:
    match limit:
        case ConcurrencyLimit():
            fixed = pb.ConcurrencyLimit(key=limit.key, max_concurrency=limit.max_concurrency)
            return pb.Limit(concurrency=fixed)
        case FloatingConcurrencyLimit():
            floating = pb.FloatingConcurrencyLimit(
                key=limit.key,
                default_max_concurrency=limit.default_max_concurrency,
                refresh_interval_ms=limit.refresh_interval_ms,
                metadata=limit.metadata,
            )
            return pb.Limit(floating_concurrency=floating)
        case RateLimit():
            return pb.Limit(rate_limit=_rate_limit_to_pb(limit))
        case _:
            assert_never(limit)


def _rate_limit_to_pb(limit: RateLimit) -> pb.GubernatorRateLimit:
    rate = pb.GubernatorRateLimit(
        name=limit.name,
        unique_key=limit.unique_key,
        limit=limit.limit,
        duration_ms=limit.duration_ms,
        hits=limit.hits,
        algorithm=pb.GubernatorAlgorithm.Name(limit.algorithm),
        behavior=limit.behavior,
    )
    policy = limit.retry_policy
    if policy is not None:
        rate.retry_policy.SetInParent()  # Also when all of it is zero.
        rate.retry_policy.initial_backoff_ms = policy.initial_backoff_ms
        rate.retry_policy.max_backoff_ms = policy.max_backoff_ms
        rate.retry_policy.backoff_multiplier = policy.backoff_multiplier
        rate.retry_policy.max_retries = policy.max_retries
    return rate


def limits_from_pb(limits: Iterable[pb.Limit]) -> tuple[Limit, ...]:
    """In the same order. One of a kind that this client does not know is left out."""
    return tuple(limit for limit in map(_limit_from_pb, limits) if limit is not None)


def _limit_from_pb(limit: pb.Limit) -> Limit | None:
    match limit.WhichOneof("limit"):
        case "concurrency":
            fixed = limit.concurrency
            return ConcurrencyLimit(key=fixed.key, max_concurrency=fixed.max_concurrency)
        case "floating_concurrency":
            floating = limit.floating_concurrency
            return FloatingConcurrencyLimit(
                key=floating.key,
                default_max_concurrency=floating.default_max_concurrency,
                refresh_interval_ms=floating.refresh_interval_ms,
                metadata=dict(floating.metadata),
            )
        case "rate_limit":
            return _rate_limit_from_pb(limit.rate_limit)
        case _:
            return None


def _rate_limit_from_pb(rate: pb.GubernatorRateLimit) -> RateLimit:
    policy = None
    if rate.HasField("retry_policy"):
        policy = RateLimitRetryPolicy(
            initial_backoff_ms=rate.retry_policy.initial_backoff_ms,
            max_backoff_ms=rate.retry_policy.max_backoff_ms,
            backoff_multiplier=rate.retry_policy.backoff_multiplier,
            max_retries=rate.retry_policy.max_retries,
        )
    # A number from a later protocol counts as a token bucket, as it does at the server. It must not
    # make a task unreadable that is leased by now.
    is_leaky = rate.algorithm == pb.GUBERNATOR_ALGORITHM_LEAKY_BUCKET
    return RateLimit(
        name=rate.name,
        unique_key=rate.unique_key,
        limit=rate.limit,
        duration_ms=rate.duration_ms,
        hits=rate.hits,
        algorithm=GubernatorAlgorithm.LEAKY_BUCKET if is_leaky else GubernatorAlgorithm.TOKEN_BUCKET,
        behavior=GubernatorBehavior(rate.behavior),
        retry_policy=policy,
    )
