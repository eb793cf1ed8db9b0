"""One shard: the single writer that joins decisions, memory and the store.

Every command has the same shape. Load what it needs; decide, synchronously; apply the
change to memory and to the open group; answer when the group is durable. Between the
last look and the change there is no await, so no locks are needed. A refusal is answered
once everything it was judged by is durable.

When the store fails, memory is ahead of it: the shard stops, tells everyone who waits,
and whoever owns it opens it again.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from random import Random
from typing import NoReturn, TypeAlias

import msgspec

from silo.clock import Clock
from silo.engine import admission, control, floating, leasing, outcomes
from silo.engine.limit_chain import Rules
from silo.engine.retention import Retention
from silo.engine.schedule import PRIORITY_STEP_MS
from silo.errors import (
    JobExists,
    JobNotFound,
    LeaseNotFound,
    LeaseOwnerMismatch,
    Overloaded,
    QuotaReached,
    ShardClosed,
    SiloError,
    StateForbids,
    StoreCorrupt,
    WrongTask,
)
from silo.model.attempt import Attempt, HandedBack, Outcome, Report
from silo.model.change import Change
from silo.model.counts import ShardTotals
from silo.model.floating import FloatingState, RefreshFailed, RefreshOutcome, RefreshSucceeded
from silo.model.job import LEASE_MS, ImportedJob, Job, JobState, JobStatus, LeasedTask, NewJob
from silo.model.shards import HashRange
from silo.model.storage import StorageInfo
from silo.model.task import Leased, Task
from silo.model.view import JobView
from silo.shard.asker import Asker
from silo.shard.committer import Committer
from silo.shard.dispatch import Room, TaskGroupQueue
from silo.shard.feeder import Feeder
from silo.shard.floors import Floors
from silo.shard.guard import GuardedStore
from silo.shard.imports import Imports
from silo.shard.limiter import RateLimiter
from silo.shard.loader import Loader
from silo.shard.reader import Reader
from silo.shard.reads import Reads
from silo.shard.state import ShardState
from silo.shard.steps import Steps
from silo.shard.timekeeper import Timekeeper
from silo.shard.views import LeaseHolder, leases_from
from silo.storage import codec, keys
from silo.storage.store import Row, Rows, Store, scan_all
from silo.telemetry.logging import Log
from silo.uuids import uuid_text

log = Log("silo.shard")

AnyReport: TypeAlias = Report | RefreshOutcome

GROUP_ROWS_MAX = 100_000  # Rows in the open group, and bytes of new jobs, before commands are refused.
GROUP_BYTES_MAX = 256 << 20
_FEED_TASKS = 64  # Taken by small calls, before the feeder looks; it keeps more than that ahead.
_ADMIT_JOBS = 256  # Admitted in one step, before others have their turn.
_SCAN_ROWS = 4096
_DROP_ROWS = 256  # Tickets taken away in one step.
_CLOSE_TIMEOUT_S = 30.0


class ShardOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a shard."""

    priority_step_ms: int = PRIORITY_STEP_MS
    max_pending_jobs: int | None = None  # Of each tenant; None: as many as they like.
    retention: Retention = Retention()
    store_timeout_s: float = 30.0  # A call to the store that takes longer counts as failed.


class ShardFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A shard at one moment, for operators."""

    running_jobs: int
    leases: Mapping[str, int]  # By task group, refreshes of floating limits included.
    rows_in_memory: int  # Of queues, lines and timers.
    queues_in_memory: int  # Task groups.


class Shard:
    """The commands of one shard. Call from one event loop; any number of calls at a time.

    Every command returns once its effect is durable, and raises `ShardClosed` when
    the shard stopped first: then it may have taken effect or not.
    """

    def __init__(
        self,
        *,
        shard_id: str,
        range: HashRange,
        store: Store,
        clock: Clock,
        rng: Random,
        options: ShardOptions,
        limiter: RateLimiter | None,
        recovered: "_Recovered",
    ) -> None:
        """Use `open`."""
        self.shard_id = shard_id
        self.range = range
        self.created_at_ms = recovered.created_at_ms
        self._store = store = GuardedStore(store, timeout_s=options.store_timeout_s, failed=self._fail)
        self._clock = clock
        self._rng = rng
        self._step_ms = options.priority_step_ms
        self._max_pending_jobs = options.max_pending_jobs
        floors = Floors(recovered.floors)
        self._committer = Committer(store, seal=self._seal_group, failed=self._stop)
        self._state = ShardState(
            totals=recovered.totals,
            newest_id_ms=recovered.newest_id_ms,
            floors=floors,
            leases=leases_from(recovered.leases, grace_until_ms=clock.now_ms() + LEASE_MS),
            committer=self._committer,
            wake_at=self._wake_at,
        )
        reader = Reader(store, self._committer, floors)
        self._reader = reader
        self._reads = Reads(self._fail)
        self._loader = Loader(self._state, reader, self._reads)
        self._feeder = Feeder(self._state, reader, self._reads, self._loader, free_tickets=self._free_tickets)
        self._steps = Steps(
            self._state,
            clock=clock,
            rules=Rules(priority_step_ms=options.priority_step_ms, asks_outside=limiter is not None),
            retention=options.retention,
            new_id=self._new_id,
        )
        self._timekeeper = Timekeeper(
            self._state,
            self._steps,
            self._loader,
            clock=clock,
            rng=rng,
            priority_step_ms=options.priority_step_ms,
            load_job=self._load_running,
        )
        self._imports = Imports(
            committer=self._committer,
            loader=self._loader,
            steps=self._steps,
            clock=clock,
            priority_step_ms=options.priority_step_ms,
            new_id=self._new_id,
        )
        self._asker = Asker(
            self._state,
            self._steps,
            self._loader,
            limiter,
            clock=clock,
            load_state=self._load_state,
            failed=self._fail,
        )
        self._ends_waits = False
        self._stopped = asyncio.Event()
        self._stop_cause: BaseException | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._is_closed = False

    @classmethod
    async def open(
        cls,
        *,
        shard_id: str,
        range: HashRange,
        store: Store,
        clock: Clock,
        rng: Random,
        options: ShardOptions | None = None,
        limiter: RateLimiter | None = None,
    ) -> "Shard":
        """Recover a shard from its store, which it owns and closes from here on.

        Reads the leases and the floors, not the backlog and not the history. With a
        `limiter` it is asked about rate limits; without, the shard keeps their buckets.

        Raises:
            StoreError: the store failed, or its records do not decode.
        """
        options = options or ShardOptions()
        guarded = GuardedStore(store, timeout_s=options.store_timeout_s)
        try:
            recovered = await _recover(guarded, clock.now_ms())
            shard = cls(
                shard_id=shard_id,
                range=range,
                store=store,
                clock=clock,
                rng=rng,
                options=options,
                limiter=limiter,
                recovered=recovered,
            )
        except BaseException:
            await guarded.close()
            raise
        shard._start()
        return shard

    def __repr__(self) -> str:
        return (
            f"Shard({self.shard_id}, {len(self._state.leases)} leases, "
            f"{len(self._state.queues)} task groups, {self._state.limits!r}, {self._committer!r})"
        )

    @property
    def counts(self) -> ShardTotals:
        return self._state.counters.totals

    def queue(self, task_group: str) -> TaskGroupQueue | None:
        """What is in memory of a task group's due work, to look at; None before anyone asked for it."""
        return self._state.queues.get(task_group)

    @property
    def groups_written(self) -> int:
        """Durable groups since the shard was opened."""
        return self._committer.groups_written

    def facts(self) -> ShardFacts:
        """What there is to say about the shard now; takes microseconds for ten leases."""
        leased = self._state.leases.tasks()
        return ShardFacts(
            running_jobs=sum(isinstance(task, JobState) for task in leased),
            leases=Counter(task.task_group for task in leased),
            rows_in_memory=self._state.tally.rows,
            queues_in_memory=len(self._state.queues),
        )

    # Commands of producers and operators

    async def enqueue(self, new: NewJob) -> str:
        """Admit a job; its id.

        Raises:
            JobExists: the tenant has a job with this id; nothing was changed.
            QuotaReached: the tenant has its limit of pending jobs; nothing was changed.
            Overloaded: too much waits to be written.
        """
        self._check_open()
        job_id = new.id if new.id is not None else self._new_id()
        change = admission.admit(
            new, job_id=job_id, now_ms=self._clock.now_ms(), priority_step_ms=self._step_ms
        )
        assert change.after is not None
        [is_taken] = await self._are_taken([change.after], are_drawn=[new.id is None])
        self._check_open()
        refusal = self._objection(change.after, is_taken=is_taken)
        if refusal is not None:
            await self._refuse(refusal)
        self._steps.take(change)
        await self._committer.durable()
        return job_id

    async def enqueue_many(self, jobs: Sequence[NewJob]) -> list[str | SiloError]:
        """Admit jobs, each by itself; for each its id, or why it was refused.

        What was admitted is durable as in one write or several, always the first ones first.
        """
        answers: list[str | SiloError] = []
        for start in range(0, len(jobs), _ADMIT_JOBS):
            answers += await self._admit_some(jobs[start : start + _ADMIT_JOBS])
        await self._committer.durable()
        return answers

    async def _admit_some(self, jobs: Sequence[NewJob]) -> list[str | SiloError]:
        self._check_running()
        now_ms = self._clock.now_ms()
        changes = [
            admission.admit(
                new,
                job_id=new.id if new.id is not None else self._new_id(),
                now_ms=now_ms,
                priority_step_ms=self._step_ms,
            )
            for new in jobs
        ]
        states = [change.subject for change in changes]
        are_taken = await self._are_taken(states, are_drawn=[new.id is None for new in jobs])
        admitted: set[tuple[str, str]] = set()
        answers: list[str | SiloError] = []
        for change, state, is_taken in zip(changes, states, are_taken, strict=True):
            name = (state.tenant, state.job_id)
            refusal = self._objection(state, is_taken=is_taken or name in admitted)
            if refusal is None:
                admitted.add(name)
                self._steps.take(change)
            answers.append(state.job_id if refusal is None else refusal)
        return answers

    async def _are_taken(self, jobs: Sequence[JobState], *, are_drawn: Sequence[bool]) -> list[bool]:
        """Whether there are jobs with these ids, with in memory what steps of the jobs look at.

        `are_drawn`: which ids we have drawn ourselves. Nothing is awaited after the look.
        """
        ids = self._state.ids
        while True:
            await self._loader.load(jobs)
            is_known = [drawn or ids.is_new(job.job_id) for job, drawn in zip(jobs, are_drawn, strict=True)]
            rows = [
                keys.state_key(job.tenant, job.job_id)
                for job, known in zip(jobs, is_known, strict=True)
                if not known
            ]
            found = iter(await self._committer.read(rows) if rows else ())
            if all(map(self._loader.has, jobs)) and all(
                drawn or not known or ids.is_new(job.job_id)
                for job, drawn, known in zip(jobs, are_drawn, is_known, strict=True)
            ):
                return [not known and next(found) is not None for known in is_known]

    def _objection(self, new: JobState, *, is_taken: bool) -> SiloError | None:
        """Why a job is not admitted, when all that this depends on is in memory."""
        if is_taken:
            return JobExists(new.job_id)
        try:
            self._check_open()
        except Overloaded as refusal:
            return refusal
        most = self._max_pending_jobs
        if most is not None and self._state.counters.pending(new.tenant) >= most:
            # After the look for the id: whoever repeats an enqueue that was taken hears that it exists.
            return _quota_reached(new.tenant, most)
        return None

    async def get_job(self, *, tenant: str, job_id: str, with_attempts: bool = False) -> JobView:
        """A job as it stands now, durably.

        Raises:
            JobNotFound: the tenant has no such job.
        """
        self._check_open()
        state, job = await self._read_job(tenant, job_id)
        wanted: list[int] = []
        if with_attempts:
            wanted = list(range(1, state.attempts_ended + 1))
        elif state.status.is_terminal and state.attempts_ended:
            wanted = [state.attempts_ended]
        rows = await self._committer.read([keys.attempt_key(tenant, job_id, number) for number in wanted])
        attempts = [codec.decode(Attempt, row) for row in rows if row is not None]
        last = attempts[-1].outcome if attempts and state.status.is_terminal else None
        if state.lease is not None:
            attempts.append(_running_attempt(state))
        if not self._committer.is_durable(keys.state_key(tenant, job_id)):
            await self._committer.durable()
        return JobView(
            job=job, state=state, attempts=tuple(attempts) if with_attempts else (), last_outcome=last
        )

    async def wait_ended(self, *, tenant: str, job_id: str) -> None:
        """Wait until the job has ended. Whoever looks at it then may find that it was restarted.

        Raises:
            JobNotFound: the tenant has no such job, or has none any more.
            ShardClosed: also when the node stops.
        """
        watchers = self._state.watchers
        name = (tenant, job_id)
        while True:
            # Watch first and look afterwards: an end in between is not missed.
            watcher = asyncio.get_running_loop().create_future()
            watchers.setdefault(name, set()).add(watcher)
            try:
                if await self._has_ended(tenant, job_id):
                    return
                if self._ends_waits:
                    raise ShardClosed("the node stops", shard=self.shard_id)
                await watcher
            finally:
                watchers[name].discard(watcher)
                if not watchers[name]:
                    del watchers[name]

    async def _has_ended(self, tenant: str, job_id: str) -> bool:
        """Whether the job has ended, durably."""
        self._check_running()
        row = keys.state_key(tenant, job_id)
        [stored] = await self._committer.read([row])
        if stored is None:
            await self._refuse(JobNotFound(tenant=tenant, job_id=job_id))
        if not codec.decode(JobState, stored).status.is_terminal:
            return False
        if not self._committer.is_durable(row):
            await self._committer.durable()
        return True

    async def cancel(self, *, tenant: str, job_id: str) -> None:
        """End a waiting job; flag a running one, whose worker is told.

        Raises:
            JobNotFound, StateForbids: nothing was changed.
        """
        state = await self._load_alone(tenant, job_id)
        await self._commit(lambda: control.cancel(state, now_ms=self._clock.now_ms()))

    async def restart(self, *, tenant: str, job_id: str) -> None:
        """Run a failed or cancelled job again.

        Raises:
            JobNotFound, StateForbids: nothing was changed.
        """
        state, job = await self._load(tenant, job_id)
        await self._commit(
            lambda: control.restart(state, job, now_ms=self._clock.now_ms(), priority_step_ms=self._step_ms)
        )

    async def expedite(self, *, tenant: str, job_id: str) -> None:
        """Make a delayed job, or a retry in backoff, due now.

        Raises:
            JobNotFound, StateForbids: nothing was changed.
        """
        state = await self._load_alone(tenant, job_id)
        await self._commit(
            lambda: control.expedite(state, now_ms=self._clock.now_ms(), priority_step_ms=self._step_ms)
        )

    async def delete(self, *, tenant: str, job_id: str) -> None:
        """Remove a job that has ended, with its attempts. A job that does not exist is no error.

        Raises:
            StateForbids: it has not ended; nothing was changed.
        """
        try:
            state, job = await self._load(tenant, job_id)
        except JobNotFound:
            return
        await self._commit(lambda: control.delete(state, job))

    async def drop_holders(self, *, tenant: str) -> int:
        """Take all tickets of concurrency queues from the tenant's jobs, whatever they do; how many.

        For emergencies: jobs that run go on, so more may run than the limits allow. Tickets that
        are granted meanwhile may survive. A caller that goes away ends it half-way, which is harmless.
        """
        self._check_open()
        await self._committer.durable()
        dropped = 0
        async for key, _ in scan_all(self._store, keys.holders_prefix(tenant), page_rows=_DROP_ROWS):
            _, job_id = keys.read_holder(key)
            try:
                state = await self._load_alone(tenant, job_id)
            except JobNotFound:
                continue
            except StoreCorrupt as error:  # One damaged job must not keep the others' tickets.
                log.error("ticket not dropped", tenant=tenant, job_id=job_id, reason=str(error))
                continue
            if state.held:
                dropped += len(state.held)
                self._steps.take(control.without_tickets(state))
        await self._committer.durable()
        return dropped

    async def import_jobs(self, *, tenant: str, jobs: Sequence[ImportedJob]) -> list[JobStatus | SiloError]:
        """Take in jobs of one tenant with their history; for each its status now, or why it was refused.

        A refusal of one job leaves the others alone. An id that comes twice is imported twice,
        in order.

        Raises:
            StateForbids: one of the jobs runs here; nothing was changed.
            Overloaded: too much waits to be written; nothing was changed.
        """
        self._check_open()
        histories = await self._imports.read(tenant, jobs)
        self._check_open()
        try:
            answers = self._imports.take(jobs, histories)
        except StateForbids as refusal:
            await self._refuse(refusal)
        await self._committer.durable()
        return answers

    # Administration: a failure of these is answered and does not stop the shard

    async def flush(self) -> None:
        """Move everything so far from the store's write-ahead log into its tables.

        Raises:
            StoreError: the store failed or took too long; nothing is lost.
        """
        self._check_open()
        await self._committer.durable()
        await self._store.flush()

    async def compact(self) -> None:
        """Have the store merged in the background; returns once that is asked for.

        Raises:
            StoreError: the store failed, or is too busy for it.
        """
        self._check_open()
        await self._store.compact()

    async def storage_info(self) -> StorageInfo:
        """What the store is made of.

        Raises:
            StoreError: the store failed.
        """
        self._check_open()
        return await self._store.storage_info()

    # Commands of workers

    async def lease_tasks(
        self, *, worker_id: str, task_group: str, max_tasks: int, wait_ms: int = 0
    ) -> list[Leased]:
        """Lease up to `max_tasks` due tasks, by turns of tenants and virtual deadlines.

        Refreshes of floating limits come among them and on top, up to as many again. With none
        ready it waits up to `wait_ms` for one. A caller that goes away before the tasks were taken
        leaves them where they were; after that they stay leased.
        """
        room = Room(max_tasks)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_ms / 1000  # Callers wait, whatever the clock of the jobs does.
        while not room.is_full:
            taken = await self._take_tasks(worker_id, task_group, room)
            if taken:
                await self._committer.durable()
                return taken
            if self._ends_waits or loop.time() >= deadline:
                break
            await self._work_or_deadline(task_group, deadline)
        return []

    async def _take_tasks(self, worker_id: str, task_group: str, room: Room) -> list[Leased]:
        """Lease what is due and fits, reading on in the store while it has more."""
        taken: list[Leased] = []
        self._check_open()
        while True:
            # What was taken is told, however much waits to be written by now.
            found, feeding = self._take_loaded(worker_id, task_group, room)
            taken += found
            if feeding is None or room.is_full:
                return taken
            await asyncio.wait({feeding})

    def take_loaded(
        self, *, worker_id: str, task_group: str, room: Room, session: str = ""
    ) -> tuple[list[Leased], asyncio.Task[None] | None]:
        """Lease what is due, fits and is in memory; and what to wait for if there is more.

        For callers who ask several shards: the leases count once `durable` has returned.
        """
        self._check_open()
        return self._take_loaded(worker_id, task_group, room, session)

    def _take_loaded(
        self, worker_id: str, task_group: str, room: Room, session: str = ""
    ) -> tuple[list[Leased], asyncio.Task[None] | None]:
        self._check_running()
        queue = self._state.queue(task_group)
        taken = self._take(queue, worker_id, room, session)
        if room.is_full and queue.since_fed < _FEED_TASKS:
            return taken, None  # There is more in memory than that.
        queue.since_fed = 0
        return taken, self._feeder.feed(queue, room.tasks)

    def durable(self) -> asyncio.Future[None]:
        """Done when everything so far is durable."""
        return self._committer.durable()

    async def lease_one(self, *, tenant: str, job_id: str, worker_id: str) -> LeasedTask:
        """Lease this job's pending attempt now, whenever it is due.

        Raises:
            JobNotFound, StateForbids: nothing was changed.
        """
        state, job = await self._load(tenant, job_id)

        def decide() -> Change:
            leasing.check_leasable(state)
            return leasing.lease(
                state, task_id=self._new_id(), worker_id=worker_id, now_ms=self._clock.now_ms()
            )

        change = await self._commit(decide)
        assert change.after is not None
        return LeasedTask(job, change.after)

    async def report(self, task_id: str, outcome: Outcome) -> None:
        """End a running attempt.

        A caller that is cancelled or sees ShardClosed may repeat the call: a
        second report changes nothing.

        Raises:
            LeaseNotFound: the lease ran out or was reported; forget the task.
            StateForbids: the task is the refresh of a floating limit.
        """
        await self._report(task_id, outcome)

    async def report_refresh(self, task_id: str, outcome: RefreshOutcome) -> None:
        """End the refresh of a floating limit: with a new maximum, or with none and a pause.

        Raises:
            LeaseNotFound: the lease ran out or was reported; forget the task.
            WrongTask: the task is a job's.
        """
        await self._report(task_id, outcome)

    async def _report(self, task_id: str, report: AnyReport) -> None:
        [refusal] = await self.report_many([(task_id, report)])
        if refusal is not None:
            raise refusal

    async def report_many(self, reports: Sequence[tuple[str, AnyReport]]) -> list[SiloError | None]:
        """End leases, each by itself and in this order; for each None, or why the report does not count."""
        answers: list[SiloError | None] = []
        for task_id, report in reports:
            try:
                while not self._take_report(task_id, report):
                    await self._load_leased(task_id)
            except ShardClosed:
                raise
            except SiloError as refusal:
                answers.append(refusal)
            else:
                answers.append(None)
        await self._committer.durable()
        return answers

    def _take_report(self, task_id: str, report: AnyReport) -> bool:
        """Make a report true; False if more has to be loaded first.

        Raises:
            LeaseNotFound, StateForbids, WrongTask: it does not count.
        """
        self._check_running()
        now_ms = self._clock.now_ms()
        state = self._state.leases.get(task_id)
        match state, report:
            case None, _:
                raise LeaseNotFound(task_id=task_id)
            case FloatingState(), RefreshSucceeded() | RefreshFailed() | HandedBack():
                if not self._loader.has_floating(state):
                    return False
                after = floating.reported(state, report, now_ms=now_ms)
                if after.failures > state.failures:
                    log.info(
                        "refresh of a floating limit failed", shard_id=self.shard_id, failures=after.failures
                    )
                self._steps.take_floating(state, after)
            case FloatingState(), _:
                raise StateForbids("task is the refresh of a floating limit", task_id=task_id)
            case _, RefreshSucceeded() | RefreshFailed():
                raise WrongTask(task_id=task_id)
            case _, _:
                if not self._loader.has(state):
                    return False
                change = outcomes.reported(
                    state, report, now_ms=now_ms, priority_step_ms=self._step_ms, rng=self._rng
                )
                self._steps.take(change)
        return True

    async def _load_leased(self, task_id: str) -> None:
        state = self._state.leases.get(task_id)
        if isinstance(state, FloatingState):
            await self._loader.load_floating((state.tenant, state.key))
        elif state is not None:
            await self._loader.load([state])

    def hold(self, holder: LeaseHolder, task_ids: Iterable[str], *, session: str) -> list[str]:
        """Renew leases of a session; those that are gone, which need not be durable yet.

        `holder` is told of what others do to the leases, until it lets them go. Renewals are kept in
        memory: after a restart every lease gets a full lease time anyway.
        """
        self._check_running()
        leases = self._state.leases
        expiry_ms = self._clock.now_ms() + LEASE_MS
        lost: list[str] = []
        for task_id in task_ids:
            state = leases.get(task_id)
            if state is None or state.lease is None or state.lease.session != session:
                lost.append(task_id)
                continue
            leases.extend(task_id, expiry_ms)
            if leases.holders.get(task_id) is not holder:
                leases.holders[task_id] = holder
                if state.cancelled_at_ms is not None:
                    tell = partial(holder.was_cancelled, task_id, state.cancelled_at_ms)
                    self._state.once_durable(tell)
        return lost

    def let_go(self, holder: LeaseHolder, task_ids: Iterable[str]) -> None:
        """Tell `holder` nothing more of these leases."""
        holders = self._state.leases.holders
        for task_id in task_ids:
            if holders.get(task_id) is holder:
                del holders[task_id]

    def leased_for(self, session: str) -> list[str]:
        """The ids of all tasks that are leased for a session."""
        return [
            state.lease.task_id for state in self._state.leases.of_session(session) if state.lease is not None
        ]

    async def heartbeat(self, *, task_id: str, worker_id: str) -> int | None:
        """Extend a lease to a full lease time from now; when the job was cancelled, if it was.

        Kept in memory: after a restart every lease gets a full lease time anyway.

        Raises:
            LeaseNotFound: the lease ran out or was reported; stop working.
            LeaseOwnerMismatch: another worker has it; stop working.
        """
        self._check_running()
        leases = self._state.leases
        state = leases.get(task_id)
        if state is None:
            await self._refuse(LeaseNotFound(task_id=task_id))
        assert state.lease is not None
        if state.lease.worker_id != worker_id:
            await self._refuse(LeaseOwnerMismatch(task_id=task_id))
        leases.extend(task_id, self._clock.now_ms() + LEASE_MS)
        return state.cancelled_at_ms

    def leased(self, task_id: str) -> Task | None:
        """What is leased under this id; None when nobody holds it."""
        return self._state.leases.get(task_id)

    def on_work(self, task_group: str, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` when a task of the group became ready for whoever waits; returns how to stop it.

        One waiter is called for each task, so look for work after each call, and stop as soon
        as nobody waits any more.
        """
        return self._state.listeners.add(task_group, callback)

    def end_waits(self) -> None:
        """Let everyone who waits for work go home, now and from now on."""
        self._ends_waits = True
        self._state.listeners.wake_all()
        self._state.wake_watchers()

    async def tick(self) -> int:
        """Do all that is due by now; how many steps that took. Tests call it after moving the clock."""
        return await self._timekeeper.tick()

    # Life cycle

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._loops = [
            loop.create_task(self._guarded(self._committer.run), name=f"commit {self.shard_id}"),
            loop.create_task(self._guarded(self._timekeeper.run), name=f"timers {self.shard_id}"),
            loop.create_task(self._guarded(self._asker.run), name=f"ask limiter {self.shard_id}"),
        ]

    async def _guarded(self, run: Callable[[], Awaitable[None]]) -> None:
        try:
            await run()
        except Exception as error:  # The outermost edge of our loops: stop with the reason.
            self._fail(error)

    async def wait_closed(self) -> BaseException | None:
        """Wait until the shard has stopped; the failure that stopped it, or None when it was closed."""
        await self._stopped.wait()
        return self._stop_cause

    async def close(self) -> None:
        """Make everything durable and release the store. Closing twice is harmless.

        Raises:
            StoreError: the store did not close; call again.
        """
        self._stop(None)
        self._committer.finish()
        self._reads.stop()
        await self._asker.close()
        commit, *others = self._loops
        for task in others:
            task.cancel()
        await asyncio.wait(others)
        _done, late = await asyncio.wait({commit}, timeout=_CLOSE_TIMEOUT_S)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
        self._committer.fail(ShardClosed("shard closed", shard=self.shard_id))
        if not self._is_closed:
            await self._store.close()
            self._is_closed = True

    def _stop(self, cause: BaseException | None) -> None:
        """Refuse new commands."""
        if self._is_stopped:
            return
        self._stop_cause = cause
        self._timekeeper.stop()
        self._asker.stop()
        self._stopped.set()
        self._state.listeners.wake_all()
        self._state.wake_watchers()

    def _fail(self, cause: BaseException) -> None:
        """The store cannot be trusted any more: stop, and tell whoever waits."""
        self._committer.fail(cause)

    @property
    def _is_stopped(self) -> bool:
        return self._stopped.is_set()

    def _check_running(self) -> None:
        if self._is_stopped:
            raise ShardClosed("shard closed", shard=self.shard_id) from self._stop_cause

    def _check_open(self) -> None:
        """Whether commands that add work are taken. Those that end work always are."""
        self._check_running()
        if len(self._committer.rows) > GROUP_ROWS_MAX or self._state.open_bytes > GROUP_BYTES_MAX:
            raise Overloaded("too many changes wait to be written; try again", shard=self.shard_id)

    # Steps that commands share

    async def _ready(self, state: JobState) -> None:
        """Have in memory what a step of this job looks at: nothing is awaited after the look."""
        while not self._loader.has(state):
            await self._loader.load([state])

    async def _read_ready(self, state: JobState, rows: list[bytes]) -> list[bytes | None]:
        """Read rows, with in memory what a step of this job looks at: nothing is awaited after the look."""
        while True:
            await self._ready(state)
            values = await self._committer.read(rows)
            if self._loader.has(state):
                return values

    async def _load(self, tenant: str, job_id: str) -> tuple[JobState, Job]:
        """The job as it stands now, and all that a step of it looks at: nothing is awaited after the look."""
        self._check_open()
        loaded = await self._load_running(tenant, job_id)
        self._check_open()
        return loaded

    async def _load_alone(self, tenant: str, job_id: str) -> JobState:
        """The same without the description, for steps that a job must be able to take without it."""
        self._check_open()
        state = await self._load_state(tenant, job_id)
        if state is None:
            await self._refuse(JobNotFound(tenant=tenant, job_id=job_id))
        self._check_open()
        return state

    async def _load_running(self, tenant: str, job_id: str) -> tuple[JobState, Job]:
        """The same for what goes on while commands are refused."""
        while True:
            loaded = await self._read_job(tenant, job_id)
            if self._loader.has(loaded[0]):
                self._check_running()
                return loaded
            await self._loader.load([loaded[0]])

    async def _load_state(self, tenant: str, job_id: str) -> JobState | None:
        """The same without the job's description; None if there is no such job."""
        while True:
            [row] = await self._committer.read([keys.state_key(tenant, job_id)])
            state = None if row is None else codec.decode(JobState, row)
            if state is None or self._loader.has(state):
                self._check_running()
                return state
            await self._loader.load([state])

    async def _read_job(self, tenant: str, job_id: str) -> tuple[JobState, Job]:
        rows = [keys.state_key(tenant, job_id), keys.job_key(tenant, job_id)]
        state_row, job_row = await self._committer.read(rows)
        if state_row is None:
            await self._refuse(JobNotFound(tenant=tenant, job_id=job_id))
        if job_row is None:
            raise StoreCorrupt("a job has a state but no description", shard=self.shard_id)
        return codec.decode(JobState, state_row), codec.decode(Job, job_row)

    async def _free_tickets(self, state: JobState) -> None:
        """Take the tickets from a job, if it still is as it was."""
        if await self._load_state(state.tenant, state.job_id) == state:
            self._steps.take(control.without_tickets(state))

    async def _commit(self, decide: Callable[[], Change]) -> Change:
        try:
            change = decide()
        except SiloError as refusal:
            await self._refuse(refusal)
        change = self._steps.take(change)
        await self._committer.durable()
        return change

    async def _refuse(self, refusal: SiloError) -> NoReturn:
        """Raise it once everything it was judged by is durable."""
        await self._committer.durable()
        raise refusal

    def _take(self, queue: TaskGroupQueue, worker_id: str, room: Room, session: str) -> list[Leased]:
        now_ms = self._clock.now_ms()
        leased: list[Leased] = []
        for task in queue.take(room, self._feeder.is_loaded):
            if isinstance(task, FloatingState):
                after = floating.leased(
                    task, task_id=self._new_id(), worker_id=worker_id, now_ms=now_ms, session=session
                )
                self._state.apply_floating(task, after)
                leased.append(after)
                continue
            job = self._state.jobs.pop(task)
            change = leasing.lease(
                task, task_id=self._new_id(), worker_id=worker_id, now_ms=now_ms, session=session
            )
            self._state.apply(change)  # Nothing follows from it: its tickets stay where they are.
            assert change.after is not None
            leased.append(LeasedTask(job, change.after))
        return leased

    async def _work_or_deadline(self, task_group: str, deadline: float) -> None:
        woken = asyncio.Event()
        stop = self.on_work(task_group, woken.set)
        alarm = asyncio.get_running_loop().call_at(deadline, woken.set)
        try:
            await woken.wait()
        finally:
            stop()
            alarm.cancel()

    def _wake_at(self, at_ms: int) -> None:
        self._timekeeper.wake_at(at_ms)

    def _seal_group(self, rows: Rows) -> None:
        self._state.seal(rows)

    def _new_id(self) -> str:
        return uuid_text(self._rng.getrandbits(128), version=4)


class _Recovered(msgspec.Struct, frozen=True):
    """What opening a shard reads."""

    created_at_ms: int
    totals: ShardTotals
    newest_id_ms: int
    leases: list[Row]
    floors: list[Row]


def _quota_reached(tenant: str, most: int) -> QuotaReached:
    return QuotaReached(
        f"tenant '{tenant}' has reached its limit of {most} pending jobs (tenancy.max_pending_jobs); "
        "try again when some of them have run"
    )


async def _recover(store: Store, now_ms: int) -> _Recovered:
    facts = [keys.CREATED_AT, keys.TOTALS, keys.NEWEST_ID]
    created, totals, newest_id = await store.get_many(facts)
    if created is None:
        created = codec.encode(now_ms)
        await store.write({keys.CREATED_AT: created})
    return _Recovered(
        created_at_ms=codec.decode(int, created),
        totals=codec.decode(ShardTotals, totals) if totals else ShardTotals(),
        newest_id_ms=codec.decode(int, newest_id) if newest_id else 0,
        leases=[row async for row in scan_all(store, keys.LEASES, page_rows=_SCAN_ROWS)],
        floors=[row async for row in scan_all(store, keys.FLOORS, page_rows=_SCAN_ROWS)],
    )


def _running_attempt(state: JobState) -> Attempt:
    lease = state.lease
    assert lease is not None
    return Attempt(
        attempt_number=state.next_attempt_number,
        relative_attempt_number=state.relative_attempt_number,
        task_id=lease.task_id,
        worker_id=lease.worker_id,
        started_at_ms=lease.started_at_ms,
        finished_at_ms=None,
        outcome=None,
    )
