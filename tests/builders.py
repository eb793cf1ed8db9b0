"""Builders that fill in what a test is not about."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import msgspec

from silo.clock import VirtualClock
from silo.model.attempt import Success
from silo.model.job import DEFAULT_TENANT, NewJob, RetryPolicy
from silo.model.limit import (
    ConcurrencyLimit,
    FloatingLimit,
    Limit,
    RateAlgorithm,
    RateLimit,
    RateRetryPolicy,
)
from silo.model.shards import HashRange
from silo.shard.limiter import RateLimiter
from silo.shard.shard import Shard, ShardOptions
from silo.storage.memory import MemoryStorage

SHARD = "shard-1"
GROUP = "default"
DONE = Success(msgspec.msgpack.encode("done"))


def a_policy(
    retry_count: int = 1,
    *,
    initial_interval_ms: int = 1_000,
    max_interval_ms: int = 60_000,
    randomize_interval: bool = False,
    backoff_factor: float = 1.0,
) -> RetryPolicy:
    return RetryPolicy(
        retry_count=retry_count,
        initial_interval_ms=initial_interval_ms,
        max_interval_ms=max_interval_ms,
        randomize_interval=randomize_interval,
        backoff_factor=backoff_factor,
    )


def a_job(
    id: str | None = None,
    *,
    tenant: str = DEFAULT_TENANT,
    task_group: str = GROUP,
    priority: int = 50,
    start_at_ms: int = 0,
    payload: object = "payload",
    metadata: dict[str, str] | None = None,
    retry_policy: RetryPolicy | None = None,
    limits: Sequence[Limit] = (),
) -> NewJob:
    return NewJob(
        tenant=tenant,
        id=id,
        task_group=task_group,
        priority=priority,
        start_at_ms=start_at_ms,
        payload=msgspec.msgpack.encode(payload),
        metadata=tuple(sorted((metadata or {}).items())),
        retry_policy=retry_policy,
        limits=tuple(limits),
    )


def at_most(max_concurrency: int, key: str = "k") -> ConcurrencyLimit:
    return ConcurrencyLimit(key=key, max_concurrency=max_concurrency)


def floating(
    default_max_concurrency: int,
    key: str = "k",
    *,
    refresh_interval_ms: int = 60_000,
    metadata: dict[str, str] | None = None,
) -> FloatingLimit:
    return FloatingLimit(
        key=key,
        default_max_concurrency=default_max_concurrency,
        refresh_interval_ms=refresh_interval_ms,
        metadata=tuple(sorted((metadata or {}).items())),
    )


def a_rate(
    limit: int,
    duration_ms: int = 1_000,
    *,
    name: str = "rate",
    unique_key: str = "u",
    hits: int = 1,
    algorithm: RateAlgorithm = RateAlgorithm.TOKEN_BUCKET,
    behavior: int = 0,
    **policy: Any,
) -> RateLimit:
    """A rate limit; further names are those of its retry policy."""
    return RateLimit(
        name=name,
        unique_key=unique_key,
        limit=limit,
        duration_ms=duration_ms,
        hits=hits,
        algorithm=algorithm,
        behavior=behavior,
        retry_policy=RateRetryPolicy(**policy),
    )


@asynccontextmanager
async def open_shard(
    storage: MemoryStorage | None = None,
    *,
    clock: VirtualClock | None = None,
    rng: Random | None = None,
    name: str = SHARD,
    options: ShardOptions | None = None,
) -> AsyncIterator[Shard]:
    """A shard on a memory store, closed at the end."""
    shard = await reopened(
        storage or MemoryStorage(), clock=clock or VirtualClock(), rng=rng, name=name, options=options
    )
    try:
        yield shard
    finally:
        await shard.close()


async def reopened(
    storage: MemoryStorage,
    *,
    clock: VirtualClock,
    rng: Random | None = None,
    name: str = SHARD,
    options: ShardOptions | None = None,
    limiter: RateLimiter | None = None,
) -> Shard:
    """The shard, opened from what `storage` holds."""
    return await Shard.open(
        shard_id=name,
        range=HashRange(),
        store=await storage.open(name),
        clock=clock,
        rng=rng or Random(7),
        options=options,
        limiter=limiter,
    )


async def until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    """Wait for a state, with a deadline."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # What is waited for may lie in another process.
            await asyncio.sleep(0.005)
