"""Limits go to the server and come back as they were, in their order."""

from typing import Any

import pytest

from silo import (
    ConcurrencyLimit,
    FloatingConcurrencyLimit,
    GubernatorAlgorithm,
    GubernatorBehavior,
    Limit,
    RateLimit,
    RateLimitRetryPolicy,
)
from silo.client.limits import limits_from_pb, limits_to_pb
from silo.wire.pb.silo.v1 import silo_pb2 as pb

POLICY = RateLimitRetryPolicy(initial_backoff_ms=1, max_backoff_ms=2, backoff_multiplier=1.5, max_retries=3)
A_RATE = RateLimit(name="api", unique_key="u", limit=2**63 - 1, duration_ms=60_000)
FULL_RATE = RateLimit(
    name="api",
    unique_key="u",
    limit=10,
    duration_ms=4,
    hits=2,
    algorithm=GubernatorAlgorithm.LEAKY_BUCKET,
    behavior=GubernatorBehavior.DURATION_IS_GREGORIAN | GubernatorBehavior.DRAIN_OVER_LIMIT,
    retry_policy=POLICY,
)
LIMITS: list[Limit] = [
    FloatingConcurrencyLimit(
        key="f", default_max_concurrency=5, refresh_interval_ms=60_000, metadata={"api": "mail"}
    ),
    A_RATE,
    ConcurrencyLimit(key="c", max_concurrency=2**32 - 1),
    FULL_RATE,
    FloatingConcurrencyLimit(key="f", default_max_concurrency=0, refresh_interval_ms=1),
    ConcurrencyLimit(key="c", max_concurrency=0),
]


def test_limits_come_back_as_they_were_and_in_their_order() -> None:
    assert limits_from_pb(limits_to_pb(LIMITS)) == tuple(LIMITS)


def test_a_rate_limit_is_sent_with_defaults_and_without_a_policy_of_its_own() -> None:
    [sent] = limits_to_pb([A_RATE])
    rate = sent.rate_limit
    assert (rate.hits, rate.algorithm, rate.behavior) == (1, pb.GUBERNATOR_ALGORITHM_TOKEN_BUCKET, 0)
    assert not rate.HasField("retry_policy")


def test_a_policy_that_says_little_has_the_defaults_of_other_clients() -> None:
    policy = RateLimitRetryPolicy(initial_backoff_ms=0, max_backoff_ms=0)
    assert (policy.backoff_multiplier, policy.max_retries) == (2.0, 0)


def test_a_policy_of_zeros_is_a_policy() -> None:
    zeros = RateLimitRetryPolicy(initial_backoff_ms=0, max_backoff_ms=0, backoff_multiplier=0)
    limit = RateLimit(name="n", unique_key="u", limit=1, duration_ms=1, retry_policy=zeros)
    [sent] = limits_to_pb([limit])
    assert sent.rate_limit.HasField("retry_policy")
    assert limits_from_pb([sent]) == (limit,)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("TOKEN_BUCKET", 0),
        ("LEAKY_BUCKET", 1),
    ],
)
def test_algorithms_have_the_numbers_of_the_wire(name: str, number: int) -> None:
    assert GubernatorAlgorithm[name] == pb.GubernatorAlgorithm.Value(f"GUBERNATOR_ALGORITHM_{name}") == number


@pytest.mark.parametrize(
    "name",
    [
        "BATCHING",
        "NO_BATCHING",
        "GLOBAL",
        "DURATION_IS_GREGORIAN",
        "RESET_REMAINING",
        "DRAIN_OVER_LIMIT",
    ],
)
def test_behaviours_have_the_numbers_of_the_wire(name: str) -> None:
    assert GubernatorBehavior[name] == pb.GubernatorBehavior.Value(f"GUBERNATOR_BEHAVIOR_{name}")


def test_a_limit_of_a_kind_that_is_not_known_is_left_out() -> None:
    known = ConcurrencyLimit(key="c", max_concurrency=1)
    assert limits_from_pb([pb.Limit(), *limits_to_pb([known])]) == (known,)


def test_what_a_later_protocol_knows_does_not_make_a_limit_unreadable() -> None:
    [read] = limits_from_pb([pb.Limit(rate_limit=pb.GubernatorRateLimit(algorithm=7, behavior=64 | 4))])
    assert isinstance(read, RateLimit)
    assert read.algorithm is GubernatorAlgorithm.TOKEN_BUCKET
    assert read.behavior == 64 | GubernatorBehavior.DURATION_IS_GREGORIAN


@pytest.mark.parametrize(
    ("limit", "error"),
    [
        (ConcurrencyLimit(key="c", max_concurrency=-1), ValueError),
        (ConcurrencyLimit(key="c", max_concurrency=2**32), ValueError),
        (RateLimit(name="n", unique_key="u", limit=2**63, duration_ms=1), ValueError),
        (RateLimit(name="n", unique_key="u", limit=1, duration_ms=1, hits=2**31), ValueError),
        (ConcurrencyLimit(key="c", max_concurrency=1.5), TypeError),
        (ConcurrencyLimit(key=1, max_concurrency=1), TypeError),
    ],
)
def test_a_value_that_the_wire_has_no_room_for_is_refused(limit: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        limits_to_pb([limit])
