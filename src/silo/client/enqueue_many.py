"""Enqueue any number of jobs, with a bounded number of them under way."""

import asyncio
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

from silo.client.batching import BATCH_JOBS_MAX
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
    """What `enqueue` returned for each of the jobs, in their order; the first error ends it.

    Reading goes ahead of yielding, so that an iterable that takes its time holds up nobody's answer.
    """
    loop = asyncio.get_running_loop()
    begun: asyncio.Queue[asyncio.Task[H] | None] = asyncio.Queue()  # None after the last one.
    room = asyncio.Semaphore(UNDER_WAY_MAX)

    async def begin_all() -> None:
        try:
            async for job in _each(jobs):
                await room.acquire()
                begun.put_nowait(loop.create_task(enqueue(job)))
        finally:
            begun.put_nowait(None)

    reading = loop.create_task(begin_all(), name="read new jobs")
    try:
        while (task := await begun.get()) is not None:
            yield await task
            room.release()
        await reading  # Raises what the iterable raised.
    finally:
        await _end([reading])
        await _end([task for _ in range(begun.qsize()) if (task := begun.get_nowait()) is not None])


async def _each(jobs: Iterable[NewJob] | AsyncIterable[NewJob]) -> AsyncIterator[NewJob]:
    if isinstance(jobs, AsyncIterable):
        async for job in jobs:
            yield job
        return
    for number, job in enumerate(jobs, 1):
        yield job
        if number % BATCH_JOBS_MAX == 0:
            await asyncio.sleep(0)  # It may be slow itself: what there is can go meanwhile.


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks, whose errors nobody hears of any more."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()
