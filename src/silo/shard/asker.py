"""Asks an external limiter on behalf of jobs.

A job that reaches a rate limit leaves a row here (`Asking`). The limiter is asked outside of any
step, for up to `IN_FLIGHT_MAX` jobs at a time, in the order of their `turns`; an answer counts only
if the job still asks the same. A place comes free when the step that follows from an answer is
durable, so a crash asks again, and spends hits twice, for no more jobs than that; none passes unasked.

Rows that are asked about stay in the agenda's window until they are settled, so what is to be asked
next is read when all that is in memory is under way.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable

from silo.clock import Clock
from silo.errors import ShardClosed, StoreCorrupt, describe
from silo.model.job import Asking, JobState
from silo.model.limit import RateLimit
from silo.shard import loader as decode
from silo.shard.limiter import Answer, LimiterFailed, RateLimiter
from silo.shard.loader import Loader
from silo.shard.state import ShardState
from silo.shard.steps import Steps
from silo.storage.batch import asking_row
from silo.telemetry.logging import Log

IN_FLIGHT_MAX = 256
FAILURE_LOG_MS = 10_000  # Between two words about failures: there may be thousands a second.

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
        clock: Clock,
        load_state: Callable[[str, str], Awaitable[JobState | None]],
        failed: Callable[[BaseException], None],
    ) -> None:
        """`load_state` reads a job's state by tenant and id, with all that a step of it looks at.

        None means that there is no such job. It raises `StoreCorrupt`.
        """
        self._state = state
        self._steps = steps
        self._loader = loader
        self._limiter = limiter
        self._clock = clock
        self._load_state = load_state
        self._failed = failed
        self._in_flight: dict[bytes, asyncio.Task[None]] = {}
        self._is_stopped = False
        self._failures = 0  # Since the last word about them.
        self._told_at_ms: int | None = None

    def __repr__(self) -> str:
        return f"Asker({len(self._in_flight)} in flight)"

    async def run(self) -> None:
        """Ask until stopped."""
        while not self._is_stopped:
            self._state.was_asked.clear()
            await self._start_all()
            await self._state.was_asked.wait()

    def stop(self) -> None:
        """Ask nothing more. Answers that come later count for nothing."""
        self._is_stopped = True
        self._state.was_asked.set()

    async def close(self) -> None:
        """Stop, and forget what is under way."""
        self.stop()
        tasks = list(self._in_flight.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _start_all(self) -> None:
        asking = self._state.asking
        while not self._is_stopped:
            self._start_loaded()
            if len(self._in_flight) >= IN_FLIGHT_MAX or asking.window.is_complete:
                return
            await self._loader.refill(asking, decode.pending_job)

    def _start_loaded(self) -> None:
        """Begin to ask about what is in memory, as long as there is room."""
        for key, row in self._state.asking.window.items():
            if len(self._in_flight) >= IN_FLIGHT_MAX:
                return
            if key not in self._in_flight:
                task = asyncio.get_running_loop().create_task(self._ask(key, row), name="ask limiter")
                self._in_flight[key] = task
                task.add_done_callback(functools.partial(self._ended, key))

    def _ended(self, key: bytes, task: asyncio.Task[None]) -> None:
        del self._in_flight[key]
        self._state.was_asked.set()

    async def _ask(self, key: bytes, row: JobState) -> None:
        try:
            await self._settle(key, row)
            await self._state.committer.durable()
        except ShardClosed:
            return
        except Exception as error:  # The outermost edge of this task: the shard stops with the reason.
            self._failed(error)

    async def _settle(self, key: bytes, row: JobState) -> None:
        state = await self._current(key, row)
        if state is None:
            return
        if self._limiter is None:
            self._steps.become_due(state)
            return
        limit = state.rate_limit
        answer = await self._answer(self._limiter, limit)
        state = await self._current(key, row)
        if state is not None and state.rate_limit == limit:
            self._steps.answered(state, answer)

    async def _current(self, key: bytes, row: JobState) -> JobState | None:
        """The job whose question this is, as it stands now; None if it asks this no more."""
        try:
            state = await self._load_state(row.tenant, row.job_id)
        except StoreCorrupt as error:
            log.error("job passed over: its state is damaged", job_id=row.job_id, reason=describe(error))
            self._drop(key, row)
            return None
        is_asked = state is not None and isinstance(state.pending, Asking) and asking_row(state) == key
        if is_asked and state is not None and isinstance(state.next_limit, RateLimit):
            return state
        # It was cancelled, expedited or replaced. If its row is there all the same, that is a leftover.
        if self._drop(key, row):
            log.error("question passed over: no job asks it", job_id=row.job_id)
            if not is_asked:
                self._state.committer.rows[key] = None
        return None

    def _drop(self, key: bytes, row: JobState) -> bool:
        """Look at this row no more, unless another one took its place meanwhile."""
        if self._state.asking.window.get(key) is not row:
            return False
        self._state.asking.drop(key)
        return True

    async def _answer(self, limiter: RateLimiter, limit: RateLimit) -> Answer | None:
        try:
            return await limiter.check(limit)
        except LimiterFailed as error:
            self._note_failure(describe(error))
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._note_failure(type(error).__name__)  # Not ours: the limiter gave up by itself.
        except Exception as error:  # Whatever it is, the job asks again.
            self._note_failure(type(error).__name__)  # Its text may hold what is a tenant's.
        return None

    def _note_failure(self, reason: str) -> None:
        self._failures += 1
        now_ms, told_at_ms = self._clock.now_ms(), self._told_at_ms
        if told_at_ms is None or not 0 <= now_ms - told_at_ms < FAILURE_LOG_MS:
            log.warning("rate limiter failed: jobs ask again later", reason=reason, failures=self._failures)
            self._failures, self._told_at_ms = 0, now_ms
