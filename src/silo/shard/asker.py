"""Asks an external limiter on behalf of jobs.

A job that reaches a rate limit leaves a row here (`Asking`). The limiter is asked outside of any
step, for many jobs at a time; its answer counts only if the job still stands where it stood. A
crash in between asks again, so hits may be spent twice, but no job passes unasked.
"""

import asyncio
from collections.abc import Awaitable, Callable

from silo.errors import JobNotFound, ShardClosed, StoreCorrupt, describe
from silo.model.job import Job, JobState
from silo.shard import loader as decode
from silo.shard.limiter import Answer, LimiterFailed, RateLimiter
from silo.shard.loader import Loader
from silo.shard.state import ShardState
from silo.shard.steps import Steps
from silo.telemetry.logging import Log

IN_FLIGHT_MAX = 256

log = Log("silo.shard.asker")


class Asker:
    """The questions of one shard. Without a limiter, our own buckets judge those that are left over."""

    def __init__(
        self,
        state: ShardState,
        steps: Steps,
        loader: Loader,
        limiter: RateLimiter | None,
        *,
        load_job: Callable[[str, str], Awaitable[tuple[JobState, Job]]],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._state = state
        self._steps = steps
        self._loader = loader
        self._limiter = limiter
        self._load_job = load_job
        self._failed = failed
        self._in_flight: dict[bytes, asyncio.Task[None]] = {}
        self._is_stopped = False

    def __repr__(self) -> str:
        return f"Asker({len(self._in_flight)} in flight)"

    async def run(self) -> None:
        """Ask until stopped."""
        while not self._is_stopped:
            self._state.was_asked.clear()
            await self._start_all()
            await self._state.was_asked.wait()

    async def _start_all(self) -> None:
        asking = self._state.asking
        while not self._is_stopped and len(self._in_flight) < IN_FLIGHT_MAX:
            if asking.runs_low:
                await self._loader.refill(asking, decode.pending_job)
            found = self._next()
            if found is None:
                return
            key, state = found
            task = asyncio.get_running_loop().create_task(self._ask(key, state), name="ask limiter")
            self._in_flight[key] = task

    def _next(self) -> tuple[bytes, JobState] | None:
        """The first question that is not being asked."""
        for key, state in self._state.asking.window.items():
            if key not in self._in_flight:
                return key, state
        return None

    async def _ask(self, key: bytes, state: JobState) -> None:
        try:
            await self._settle(key, state, await self._answer(state))
        except ShardClosed:
            return
        except Exception as error:  # The outermost edge of this task: the shard stops with the reason.
            self._failed(error)
        finally:
            del self._in_flight[key]
            self._state.was_asked.set()

    async def _answer(self, state: JobState) -> Answer | None:
        if self._limiter is None:
            return None
        try:
            return await self._limiter.check(state.rate_limit)
        except LimiterFailed as error:
            log.warning("rate limiter failed: asking again later", reason=describe(error))
            return None

    async def _settle(self, key: bytes, state: JobState, answer: Answer | None) -> None:
        try:
            current, _ = await self._load_job(state.tenant, state.job_id)
        except (JobNotFound, StoreCorrupt) as error:
            log.error("job passed over: it cannot be read", job_id=state.job_id, reason=describe(error))
            self._state.asking.drop(key)
            return
        if current != state:
            return  # It was cancelled, expedited or replaced: nobody waits for this answer.
        if self._limiter is None:
            self._steps.become_due(current)
        else:
            self._steps.answered(current, answer)

    async def close(self) -> None:
        """Stop asking. Answers that come later count for nothing."""
        self._is_stopped = True
        self._state.was_asked.set()
        tasks = list(self._in_flight.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
