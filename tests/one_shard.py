"""One shard on a memory store, told what to do by the ids of its jobs. Every look checks what must hold."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import msgspec

from silo.clock import VirtualClock
from silo.model.attempt import Attempt, Cancelled, Failure, Outcome, PastAttempt
from silo.model.counts import QueueCounts
from silo.model.floating import FloatingState, RefreshOutcome, RefreshSucceeded
from silo.model.job import DEFAULT_TENANT, ImportedJob, JobState, JobStatus, NewJob, RetryPolicy, Waiting
from silo.model.limit import Bucket, BucketRecord, Limit
from silo.shard.limiter import RateLimiter
from silo.shard.shard import Shard, ShardOptions
from silo.storage import codec, keys
from silo.storage.memory import MemoryStorage
from tests.builders import DONE, GROUP, SHARD, reopened
from tests.invariants import Stored, check_snapshot, check_step

BROKEN = Failure("BROKEN", msgspec.msgpack.encode("it broke"))


class OneShard:
    """A shard, its store and its clock. Jobs are those of the default tenant unless another is named."""

    shard: Shard

    def __init__(self, options: ShardOptions | None, limiter: RateLimiter | None) -> None:
        """Open it with `open`."""
        self.storage = MemoryStorage()
        self.clock = VirtualClock()
        self.refreshes: list[FloatingState] = []  # Those that polls for jobs brought along.
        self.were_dropped = False  # Tickets were taken by force: jobs run without.
        self._options = options
        self._limiter = limiter
        self._rng = Random(7)
        self._seen: dict[tuple[str, str], Stored] = {}

    @property
    def now_ms(self) -> int:
        return self.clock.now_ms()

    # What callers do

    async def enqueue(self, *jobs: NewJob) -> None:
        for job in jobs:
            await self.shard.enqueue(job)

    async def lease(
        self, max_tasks: int = 100, *, task_group: str = GROUP, worker_id: str = "w", wait_ms: int = 0
    ) -> list[str]:
        """Lease what is ready; the ids of the jobs, in order."""
        tasks = await self.shard.lease_tasks(
            worker_id=worker_id, task_group=task_group, max_tasks=max_tasks, wait_ms=wait_ms
        )
        self.refreshes += [task for task in tasks if isinstance(task, FloatingState)]
        return [task.job.id for task in tasks if not isinstance(task, FloatingState)]

    async def report(self, job_id: str, outcome: Outcome = DONE, *, tenant: str = DEFAULT_TENANT) -> None:
        await self.shard.report(self.task_id(job_id, tenant=tenant), outcome)

    async def run(self, *jobs: NewJob) -> None:
        """Enqueue jobs and lease them."""
        await self.enqueue(*jobs)
        leased = await self.lease()
        assert set(leased) >= {job.id for job in jobs}, leased

    async def cancel(self, job_id: str) -> None:
        await self.shard.cancel(tenant=DEFAULT_TENANT, job_id=job_id)

    async def restart(self, job_id: str) -> None:
        await self.shard.restart(tenant=DEFAULT_TENANT, job_id=job_id)

    async def expedite(self, job_id: str) -> None:
        await self.shard.expedite(tenant=DEFAULT_TENANT, job_id=job_id)

    async def delete(self, job_id: str) -> None:
        await self.shard.delete(tenant=DEFAULT_TENANT, job_id=job_id)
        self.jobs()  # A new job under this id is another one.

    async def lease_one(self, job_id: str) -> JobState:
        leased = await self.shard.lease_one(tenant=DEFAULT_TENANT, job_id=job_id, worker_id="w")
        return leased.state

    async def drop_holders(self, tenant: str = DEFAULT_TENANT) -> int:
        self.were_dropped = True
        return await self.shard.drop_holders(tenant=tenant)

    async def import_job(
        self,
        job_id: str,
        *outcomes: Outcome,
        limits: tuple[Limit, ...] = (),
        retry_policy: RetryPolicy | None = None,
        start_at_ms: int = 0,
        finished_at_ms: int = 2,
    ) -> JobStatus:
        """Import a job that went through its stored attempts and then `outcomes`."""
        stored = self.jobs().get((DEFAULT_TENANT, job_id))
        past = [_past(attempt) for attempt in stored.attempts] if stored else []
        past += [
            PastAttempt(started_at_ms=1, finished_at_ms=finished_at_ms, outcome=outcome)
            for outcome in outcomes
        ]
        given = ImportedJob(
            tenant=DEFAULT_TENANT,
            id=job_id,
            task_group=GROUP,
            priority=50,
            enqueue_time_ms=0,
            start_at_ms=start_at_ms,
            payload=b"\xa1p",
            retry_policy=retry_policy,
            limits=limits,
            attempts=tuple(past),
        )
        [answer] = await self.shard.import_jobs(tenant=DEFAULT_TENANT, jobs=[given])
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def lease_refresh(self, task_group: str = GROUP) -> FloatingState | None:
        """Lease the refresh of a floating limit, if one is ready; and no job."""
        if not self.refreshes:
            leased = await self.lease(task_group=task_group)
            assert not leased, f"the test did not say that it wants {leased}"
        return self.refreshes.pop(0) if self.refreshes else None

    async def refresh(self, outcome: int | RefreshOutcome, *, task_group: str = GROUP) -> None:
        """Do the refresh that is ready: a new maximum, or a failure."""
        task = await self.lease_refresh(task_group)
        assert task is not None, "no refresh is ready"
        await self.report_refresh(task, outcome)

    async def report_refresh(self, task: FloatingState, outcome: int | RefreshOutcome) -> None:
        assert task.lease is not None
        result = RefreshSucceeded(outcome) if isinstance(outcome, int) else outcome
        await self.shard.report_refresh(task.lease.task_id, result)

    async def wait(self, duration_ms: int) -> None:
        """Let time pass, and all that is due by then happen."""
        self.clock.advance_ms(duration_ms)
        await self.settle()

    async def settle(self) -> None:
        """Let all that is due happen, durably, answers of a limiter included."""
        async with asyncio.timeout(10):
            await self.shard.tick()
            while self.family(keys.ASKING) or self._is_due():
                await asyncio.sleep(0)
                await self.shard.tick()
                await self.shard.durable()

    def _is_due(self) -> bool:
        rows = self.family(keys.TIMERS, keys.ALARMS, keys.EXPIRIES)
        return any(keys.read_time(row) <= self.now_ms for row in rows)

    async def crash(self) -> None:
        """The process dies and comes back: nothing is in memory."""
        old = self.shard
        await self.open()
        await old.close()

    async def open(self) -> None:
        self.shard = await reopened(
            self.storage, clock=self.clock, rng=self._rng, options=self._options, limiter=self._limiter
        )

    # What is stored

    def rows(self) -> dict[bytes, bytes]:
        return self.storage.snapshot(SHARD)

    def facts(self) -> dict[bytes, bytes]:
        """The rows without the floors: those are hints that reading improves."""
        return {key: value for key, value in self.rows().items() if not key.startswith(keys.FLOORS)}

    def family(self, *families: bytes) -> list[bytes]:
        """The keys of these families, in order."""
        return sorted(key for key in self.rows() if key[:1] in families)

    def jobs(self) -> dict[tuple[str, str], Stored]:
        """All jobs, held against what must hold of them."""
        stored = check_snapshot(self.rows(), now_ms=self.now_ms, were_dropped=self.were_dropped)
        check_step({name: self._seen[name] for name in self._seen.keys() & stored.keys()}, stored)
        self._seen = stored
        return stored

    def state(self, job_id: str, *, tenant: str = DEFAULT_TENANT) -> JobState:
        return self.jobs()[tenant, job_id].state

    def status(self, job_id: str) -> JobStatus:
        return self.state(job_id).status

    def attempts(self, job_id: str) -> list[Attempt]:
        return self.jobs()[DEFAULT_TENANT, job_id].attempts

    def held(self, job_id: str) -> list[str]:
        """The keys of the tickets that a job holds."""
        return [holder.key for holder in self.state(job_id).held]

    def task_id(self, job_id: str, *, tenant: str = DEFAULT_TENANT) -> str:
        lease = self.state(job_id, tenant=tenant).lease
        assert lease is not None, f"{job_id} does not run"
        return lease.task_id

    def holders(self, key: str = "k", *, tenant: str = DEFAULT_TENANT) -> set[str]:
        """Who holds a ticket of a queue."""
        rows = self.rows()
        prefix = keys.queue_holders_prefix(tenant, key)
        return {keys.read_holder(row)[1] for row in rows if row.startswith(prefix)}

    def waiting(self, key: str = "k", *, tenant: str = DEFAULT_TENANT) -> list[str]:
        """Who waits for a ticket of a queue, the most eligible first."""
        states = [
            stored.state
            for name, stored in self.jobs().items()
            if name[0] == tenant
            and isinstance(stored.state.pending, Waiting)
            and stored.state.pending.key == key
        ]
        return [state.job_id for state in sorted(states, key=lambda state: state.rank)]

    def counts(self, key: str = "k", *, tenant: str = DEFAULT_TENANT) -> QueueCounts:
        row = self.rows().get(keys.queue_counts_key(tenant, key))
        return QueueCounts() if row is None else codec.decode(QueueCounts, row)

    def floating(self, key: str = "k", *, tenant: str = DEFAULT_TENANT) -> FloatingState | None:
        row = self.rows().get(keys.floating_key(tenant, key))
        return None if row is None else codec.decode(FloatingState, row)

    def bucket(
        self, name: str = "rate", unique_key: str = "u", *, tenant: str = DEFAULT_TENANT
    ) -> Bucket | None:
        row = self.rows().get(keys.bucket_key(tenant, name, unique_key))
        return None if row is None else codec.decode(BucketRecord, row).bucket


def _past(attempt: Attempt) -> PastAttempt:
    assert attempt.finished_at_ms is not None
    return PastAttempt(
        started_at_ms=attempt.started_at_ms,
        finished_at_ms=attempt.finished_at_ms,
        outcome=attempt.outcome or Cancelled(),
    )


@asynccontextmanager
async def one_shard(
    *, options: ShardOptions | None = None, limiter: RateLimiter | None = None
) -> AsyncIterator[OneShard]:
    """A shard with nothing in it, closed at the end. With a `limiter` it is asked about rate limits."""
    here = OneShard(options, limiter)
    await here.open()
    try:
        yield here
    finally:
        await here.shard.close()
