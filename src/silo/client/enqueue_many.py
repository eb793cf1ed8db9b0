"""Enqueue any number of jobs, with a bounded number of them under way."""

import asyncio
from collections import deque
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import Any, TypeVar

from silo.client.limits import Limit
from silo.client.types import RetryPolicy

H = TypeVar("H")

UNDER_WAY_MAX = 2_000


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job for `enqueue_many`; the fields are the arguments of `enqueue`."""

    payload: object
    task_group: str
    id: str | None = None
    priority: int = 50
    start_at_ms: int | None = None
    delay: float | None = None
    retry_policy: RetryPolicy | None = None
    limits: Sequence[Limit] = ()
    tenant: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


async def enqueue_all(
    enqueue: Callable[[NewJob], Coroutine[Any, Any, H]], jobs: Iterable[NewJob] | AsyncIterable[NewJob]
) -> AsyncIterator[H]:
    """What `enqueue` returned for each of the jobs, in their order; the first error ends it."""
    loop = asyncio.get_running_loop()
    under_way: deque[asyncio.Task[H]] = deque()
    try:
        async for job in _each(jobs):
            under_way.append(loop.create_task(enqueue(job)))
            if len(under_way) >= UNDER_WAY_MAX:
                yield await under_way.popleft()
        while under_way:
            yield await under_way.popleft()
    finally:
        for task in under_way:
            task.cancel()
        if under_way:
            await asyncio.wait(under_way)


async def _each(jobs: Iterable[NewJob] | AsyncIterable[NewJob]) -> AsyncIterator[NewJob]:
    if isinstance(jobs, AsyncIterable):
        async for job in jobs:
            yield job
    else:
        for job in jobs:
            yield job
