"""What happens in a shard because time passes.

One alarm clock is set to the earliest of the next timer, the next alarm of a limit, the next lease
expiry and the next job to be deleted. When it rings, `tick` does what is due. Nothing is polled.
"""

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

from silo.clock import Alarm, Clock
from silo.engine import control, floating, outcomes
from silo.errors import JobNotFound, ShardClosed, StoreCorrupt
from silo.model.floating import FloatingState
from silo.model.job import Job, JobState
from silo.shard import loader as decode
from silo.shard.loader import Loader
from silo.shard.state import ShardState
from silo.shard.steps import Steps
from silo.storage import keys
from silo.telemetry.logging import Log

log = Log("silo.shard.timekeeper")

_TICK_TASKS = 512  # Of each kind in one go; then what they changed is made durable.
_TICK_ALARMS = 64
_DELETES = 64


class Timekeeper:
    """Keeps the time of one shard."""

    def __init__(
        self,
        state: ShardState,
        steps: Steps,
        loader: Loader,
        *,
        clock: Clock,
        rng: Random,
        priority_step_ms: int,
        load_job: Callable[[str, str], Awaitable[tuple[JobState, Job]]],
    ) -> None:
        """`load_job` reads a job by tenant and id, with all that a step of it looks at.

        It raises `JobNotFound` or `StoreCorrupt`.
        """
        self._state = state
        self._steps = steps
        self._loader = loader
        self._clock = clock
        self._rng = rng
        self._priority_step_ms = priority_step_ms
        self._load_job = load_job
        self._alarm: Alarm | None = None
        self._alarm_at_ms: int | None = None
        self._due = asyncio.Event()
        self._is_stopped = False

    async def run(self) -> None:
        """Do what is due, when it is, until stopped."""
        while not self._is_stopped:
            try:
                await self.tick()
            except ShardClosed:
                return
            await self._due.wait()

    def stop(self) -> None:
        self._is_stopped = True
        if self._alarm is not None:
            self._alarm.cancel()
        self._due.set()

    async def tick(self) -> int:
        """Do all that is due; how many steps that took."""
        self._due.clear()
        done = 0
        while not self._is_stopped:
            now_ms = self._clock.now_ms()
            # Alarms first: who waits in line comes before who is due only now.
            moved = await self._ring_alarms(now_ms)
            moved += await self._move_due(now_ms)
            moved += await self._expire_leases(now_ms)
            moved += await self._delete_expired(now_ms)
            if not moved:
                break
            done += moved
            await self._state.committer.durable()
        self._arm()
        return done

    # What is due

    async def _ring_alarms(self, now_ms: int) -> int:
        alarms = self._state.alarms
        rung = 0
        while rung < _TICK_ALARMS and not self._is_stopped:
            if alarms.runs_low:
                await self._loader.refill(alarms, decode.alarm)
            due = alarms.first_due(now_ms)
            if due is None:
                break
            if await self._ring(*due):
                rung += 1
                await asyncio.sleep(0)  # Each may stand for many jobs: let others have their turn.
        return rung

    async def _ring(self, key: bytes, record: bytes) -> bool:
        """Look at what an alarm is about; False if more has to be loaded first."""
        try:
            names = keys.read_names(record)
        except ValueError:
            names = ()
        at_ms = keys.read_time(key)
        limits = self._state.limits
        match record[:1], names:
            case b"n", (tenant, limit_key):
                queue = (tenant, limit_key)
                if not await self._loader.load_queue(queue):
                    return False
                if limits.queue(queue).alarm_at_ms == at_ms:
                    self._steps.serve_queue(queue)
                    return True
            case b"b", (tenant, name, unique_key):
                bucket = (tenant, name, unique_key)
                if not await self._loader.load_bucket(bucket):
                    return False
                if limits.bucket_line(bucket).alarm_at_ms == at_ms:
                    self._steps.serve_bucket(bucket)
                    return True
            case b"f", (tenant, limit_key):
                queue = (tenant, limit_key)
                if not await self._loader.load_floating(queue):
                    return False
                state = limits.floating(*queue)
                if state is not None and state.alarm_at_ms == at_ms:
                    self._steps.refresh(queue)
                    return True
            case _:
                log.error("alarm passed over: its key is damaged", key=key.hex())
        # Nothing stands behind it: what was awaited has moved it, or its record is damaged.
        self._state.committer.rows[key] = None
        self._state.alarms.drop(key)
        return True

    async def _move_due(self, now_ms: int) -> int:
        timers = self._state.timers
        moved = 0
        while moved < _TICK_TASKS and not self._is_stopped:
            if timers.runs_low:
                await self._loader.refill(timers, decode.pending_job)
            due = timers.first_due(now_ms)
            if due is None:
                break
            _, state = due
            if not self._loader.has(state):
                await self._loader.load([state])
                continue
            self._steps.become_due(state)
            moved += 1
        return moved

    async def _expire_leases(self, now_ms: int) -> int:
        leases = self._state.leases
        await self._loader.load(
            state for state in leases.expired(now_ms, _TICK_TASKS) if isinstance(state, JobState)
        )
        ended = 0
        refreshes: list[FloatingState] = []
        for state in leases.expired(now_ms, _TICK_TASKS):
            if isinstance(state, FloatingState):
                refreshes.append(state)
            elif self._loader.has(state):
                self._expire_attempt(state, now_ms)
                ended += 1
        for refresh in refreshes:
            ended += await self._expire_refresh(refresh)
        return ended

    async def _expire_refresh(self, state: FloatingState) -> bool:
        while not await self._loader.load_floating((state.tenant, state.key)):
            pass
        if state.lease is None or self._state.leases.get(state.lease.task_id) is not state:
            return False  # It was reported meanwhile.
        self._steps.take_floating(state, floating.expired(state))
        return True

    def _expire_attempt(self, state: JobState, now_ms: int) -> None:
        assert state.lease is not None
        self._steps.take(
            outcomes.expired(
                state,
                expiry_ms=self._state.leases.expiry_ms(state.lease.task_id),
                now_ms=now_ms,
                priority_step_ms=self._priority_step_ms,
                rng=self._rng,
            )
        )

    async def _delete_expired(self, now_ms: int) -> int:
        """Delete jobs whose time after their end is over."""
        expiries = self._state.expiries
        deleted = 0
        while deleted < _DELETES and not self._is_stopped:
            if expiries.runs_low:
                await self._loader.refill(expiries, decode.expiry)
            due = expiries.first_due(now_ms)
            if due is None:
                break
            key, name = due
            deleted += 1
            try:
                state, job = await self._load_job(*name)
            except JobNotFound:
                expiries.drop(key)  # It was deleted meanwhile.
                continue
            except StoreCorrupt as error:
                log.error("job not deleted at its time", tenant=name[0], job_id=name[1], reason=str(error))
                expiries.drop(key)
                continue
            if state.expires_at_ms == keys.read_time(key):
                self._steps.take(control.delete(state, job))
            else:
                expiries.drop(key)  # It was restarted meanwhile.
        return deleted

    # The alarm clock

    def wake_at(self, at_ms: int) -> None:
        """Something is due at `at_ms`."""
        if at_ms <= self._clock.now_ms():
            self._due.set()
        elif self._alarm_at_ms is None or at_ms < self._alarm_at_ms:
            self._set(at_ms)

    def _arm(self) -> None:
        """Set the alarm to the next moment at which something is due."""
        now_ms = self._clock.now_ms()
        state = self._state
        times = [agenda.next_at_ms(now_ms) for agenda in (state.timers, state.alarms, state.expiries)]
        times.append(state.leases.next_expiry_ms())
        self._set(min((at_ms for at_ms in times if at_ms is not None), default=None))

    def _set(self, at_ms: int | None) -> None:
        if at_ms == self._alarm_at_ms:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at_ms = at_ms
        self._alarm = None if at_ms is None else self._clock.call_at(at_ms, self._ring_clock)

    def _ring_clock(self) -> None:
        self._alarm = None
        self._alarm_at_ms = None
        self._due.set()
