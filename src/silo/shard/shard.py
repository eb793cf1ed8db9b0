"""One shard: the single writer that joins decisions, memory and the store.

Every command has the same shape. Load what it needs; decide, synchronously; apply the
change to memory and to the open group; answer when the group is durable. Between the
last look and the change there is no await, so no locks are needed. A refusal is answered
once everything it was judged by is durable.

When the store fails, memory is ahead of it: the shard stops, tells everyone who waits,
and whoever owns it opens it again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from random import Random
from typing import NoReturn
from uuid import UUID

import msgspec

from silo.clock import Alarm, Clock
from silo.engine import admission, control, importing, leasing, outcomes
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
)
from silo.model.attempt import Attempt, Outcome
from silo.model.change import Change
from silo.model.counts import ShardTotals
from silo.model.job import (
    LEASE_MS,
    Delayed,
    ImportedJob,
    Job,
    JobState,
    JobStatus,
    LeasedTask,
    NewJob,
    Ready,
)
from silo.model.shards import HashRange
from silo.model.storage import StorageInfo
from silo.model.view import JobView
from silo.shard.committer import Committer, Rows
from silo.shard.dispatch import Room, TaskGroupQueue
from silo.shard.feeder import Feeder
from silo.shard.floors import Floors
from silo.shard.guard import GuardedStore
from silo.shard.listeners import Listeners
from silo.shard.views import Counters, JobCache, leases_from
from silo.shard.window import Window
from silo.storage import codec, keys
from silo.storage.batch import pending_key, write_change
from silo.storage.store import Row, Store, scan_all

GROUP_ROWS_MAX = 100_000  # Rows in the open group, and bytes of new jobs, before commands are refused.
GROUP_BYTES_MAX = 256 << 20
_TICK_TASKS = 512
_TIMER_WINDOW = 512
_SCAN_ROWS = 4096
_CLOSE_TIMEOUT_S = 30.0
_QUEUES_MAX = 10_000  # Task groups in memory, before idle ones are dropped.
_QUEUES_LOOKED_AT = 16  # For each new one beyond.


class ShardOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a shard."""

    priority_step_ms: int = PRIORITY_STEP_MS
    max_pending_jobs: int | None = None  # Of each tenant; None: as many as they like.
    store_timeout_s: float = 30.0  # A call to the store that takes longer counts as failed.


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
        self._counters = Counters(recovered.totals)
        self._jobs = JobCache()
        self._floors = Floors(recovered.floors)
        self._leases = leases_from(recovered.leases, grace_until_ms=clock.now_ms() + LEASE_MS)
        self._queues: dict[str, TaskGroupQueue] = {}
        self._timers = Window(self._floors.start(keys.TIMERS))
        self._committer = Committer(store, seal=self._seal, failed=self._stop)
        self._feeder = Feeder(
            store=store,
            committer=self._committer,
            floors=self._floors,
            counters=self._counters,
            jobs=self._jobs,
            failed=self._fail,
        )
        self._listeners = Listeners(self._has_work)
        self._open_bytes = 0  # Of new jobs in the open group.
        self._ends_waits = False
        self._alarm: Alarm | None = None
        self._alarm_at_ms: int | None = None
        self._due = asyncio.Event()
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
    ) -> "Shard":
        """Recover a shard from its store, which it owns and closes from here on.

        Reads the leases and the floors, not the backlog and not the history.

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
                recovered=recovered,
            )
        except BaseException:
            await guarded.close()
            raise
        shard._start()
        return shard

    def __repr__(self) -> str:
        return (
            f"Shard({self.shard_id}, {len(self._leases)} leases, {len(self._queues)} task groups, "
            f"{self._committer!r})"
        )

    @property
    def counts(self) -> ShardTotals:
        return self._counters.totals

    def queue(self, task_group: str) -> TaskGroupQueue | None:
        """What is in memory of a task group's due work, to look at; None before anyone asked for it."""
        return self._queues.get(task_group)

    @property
    def groups_written(self) -> int:
        """Durable groups since the shard was opened."""
        return self._committer.groups_written

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
        while True:
            await self._feeder.load_counts((new.tenant,))
            if new.id is not None:
                [stored] = await self._committer.read([keys.state_key(new.tenant, job_id)])
                if stored is not None:
                    await self._refuse(JobExists(job_id))
            if self._counters.has(new.tenant):
                break
        self._check_open()
        most = self._max_pending_jobs
        if most is not None and self._counters.get(new.tenant).pending >= most:
            # After the look for the id: whoever repeats an enqueue that was taken hears that it exists.
            await self._refuse(_quota_reached(new.tenant, most))
        change = admission.admit(
            new, job_id=job_id, now_ms=self._clock.now_ms(), priority_step_ms=self._step_ms
        )
        self._apply(change)
        await self._committer.durable()
        return job_id

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

    async def cancel(self, *, tenant: str, job_id: str) -> None:
        """End a waiting job; flag a running one, whose worker is told.

        Raises:
            JobNotFound, StateForbids: nothing was changed.
        """
        state, _ = await self._load(tenant, job_id)
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
        state, _ = await self._load(tenant, job_id)
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

    async def import_jobs(self, *, tenant: str, jobs: Sequence[ImportedJob]) -> list[JobStatus | SiloError]:
        """Take in jobs of one tenant with their history; for each its status now, or why it was refused.

        A refusal of one job leaves the others alone. An id that comes twice is imported twice,
        in order.

        Raises:
            StateForbids: one of the jobs runs here; nothing was changed.
            Overloaded: too much waits to be written; nothing was changed.
        """
        self._check_open()
        histories = await self._read_histories(tenant, jobs)
        self._check_open()
        try:
            importing.check_none_runs(
                history.state for history in histories.values() if isinstance(history, _History)
            )
        except StateForbids as refusal:
            await self._refuse(refusal)
        answers: list[JobStatus | SiloError] = []
        for job in jobs:
            try:
                answers.append(self._import(job, histories))
            except SiloError as refusal:
                answers.append(refusal)
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
    ) -> list[LeasedTask]:
        """Lease up to `max_tasks` due tasks, by turns of tenants and virtual deadlines.

        With none ready it waits up to `wait_ms` for one. A caller that goes away before
        the tasks were taken leaves them where they were; after that they stay leased.
        """
        room = Room(max_tasks)
        deadline_ms = self._clock.now_ms() + wait_ms
        while not room.is_full:
            taken = await self._take_tasks(worker_id, task_group, room)
            if taken:
                await self._committer.durable()
                return taken
            if self._ends_waits or self._clock.now_ms() >= deadline_ms:
                break
            await self._work_or_deadline(task_group, deadline_ms)
        return []

    async def _take_tasks(self, worker_id: str, task_group: str, room: Room) -> list[LeasedTask]:
        """Lease what is due and fits, reading on in the store while it has more."""
        taken: list[LeasedTask] = []
        self._check_open()
        while True:
            # What was taken is told, however much waits to be written by now.
            found, feeding = self._take_loaded(worker_id, task_group, room)
            taken += found
            if feeding is None or room.is_full:
                return taken
            await asyncio.wait({feeding})

    def take_loaded(
        self, *, worker_id: str, task_group: str, room: Room
    ) -> tuple[list[LeasedTask], asyncio.Task[None] | None]:
        """Lease what is due, fits and is in memory; and what to wait for if there is more.

        For callers who ask several shards: the leases count once `durable` has returned.
        """
        self._check_open()
        return self._take_loaded(worker_id, task_group, room)

    def _take_loaded(
        self, worker_id: str, task_group: str, room: Room
    ) -> tuple[list[LeasedTask], asyncio.Task[None] | None]:
        self._check_running()
        queue = self._queue(task_group)
        taken = self._take(queue, worker_id, room)
        return taken, self._feeder.feed(queue, room.tasks)

    async def durable(self) -> None:
        """Wait until everything so far is durable."""
        await self._committer.durable()

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
        """
        self._check_running()
        state = self._leases.get(task_id)
        while state is not None and not self._counters.has(state.tenant):
            await self._feeder.load_counts((state.tenant,))
            self._check_running()
            state = self._leases.get(task_id)
        if state is None:
            await self._refuse(LeaseNotFound(task_id=task_id))
        change = outcomes.ended(
            state,
            outcome,
            now_ms=self._clock.now_ms(),
            priority_step_ms=self._step_ms,
            rng=self._rng,
        )
        self._apply(change)
        await self._committer.durable()

    async def heartbeat(self, *, task_id: str, worker_id: str) -> int | None:
        """Extend a lease to a full lease time from now; when the job was cancelled, if it was.

        Kept in memory: after a restart every lease gets a full lease time anyway.

        Raises:
            LeaseNotFound: the lease ran out or was reported; stop working.
            LeaseOwnerMismatch: another worker has it; stop working.
        """
        self._check_running()
        state = self._leases.get(task_id)
        if state is None:
            await self._refuse(LeaseNotFound(task_id=task_id))
        assert state.lease is not None
        if state.lease.worker_id != worker_id:
            await self._refuse(LeaseOwnerMismatch(task_id=task_id))
        self._leases.extend(task_id, self._clock.now_ms() + LEASE_MS)
        return state.cancelled_at_ms

    def task_group_of(self, task_id: str) -> str | None:
        """The task group of a leased task; None when nobody holds it."""
        state = self._leases.get(task_id)
        return None if state is None else state.task_group

    def on_work(self, task_group: str, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` when a task of the group became ready for whoever waits; returns how to stop it.

        One waiter is called for each task, so look for work after each call, and stop as soon
        as nobody waits any more.
        """
        return self._listeners.add(task_group, callback)

    def end_waits(self) -> None:
        """Let everyone who waits for work go home, now and from now on."""
        self._ends_waits = True
        self._listeners.wake_all()

    def _has_work(self, task_group: str) -> bool:
        queue = self._queues.get(task_group)
        return queue is not None and not queue.is_empty

    # Time

    async def tick(self) -> int:
        """Move due work to its queues and end expired leases; how many steps that took."""
        self._due.clear()
        done = 0
        while not self._is_stopped:
            now_ms = self._clock.now_ms()
            moved = await self._move_due(now_ms) + await self._expire(now_ms)
            if not moved:
                break
            done += moved
            await self._committer.durable()
        self._arm()
        return done

    async def _move_due(self, now_ms: int) -> int:
        if self._timers.bound is not None and len(self._timers) < _TIMER_WINDOW // 4:
            await self._feeder.refill_timers(self._timers)
        moved = 0
        while len(self._timers) and moved < _TICK_TASKS:
            state = self._timers.first()
            assert isinstance(state.pending, Delayed)
            if state.pending.due_ms > now_ms:
                break
            self._apply(leasing.become_due(state, priority_step_ms=self._step_ms))
            moved += 1
        return moved

    async def _expire(self, now_ms: int) -> int:
        expired = self._leases.expired(now_ms, _TICK_TASKS)
        await self._feeder.load_counts(state.tenant for state in expired)
        ended = 0
        for state in self._leases.expired(now_ms, _TICK_TASKS):
            assert state.lease is not None
            if not self._counters.has(state.tenant):
                continue
            change = outcomes.expired(
                state,
                expiry_ms=self._leases.expiry_ms(state.lease.task_id),
                now_ms=now_ms,
                priority_step_ms=self._step_ms,
                rng=self._rng,
            )
            self._apply(change)
            ended += 1
        return ended

    def _arm(self) -> None:
        """Set the alarm to the next moment at which something is due."""
        times = [self._leases.next_expiry_ms()]
        if len(self._timers):
            pending = self._timers.first().pending
            assert isinstance(pending, Delayed)
            times.append(pending.due_ms)
        elif self._timers.bound is not None:
            times.append(self._clock.now_ms())
        known = [at_ms for at_ms in times if at_ms is not None]
        at_ms = min(known) if known else None
        if at_ms == self._alarm_at_ms:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at_ms = at_ms
        self._alarm = None if at_ms is None else self._clock.call_at(at_ms, self._ring)

    def _arm_for(self, at_ms: int) -> None:
        if self._alarm_at_ms is None or at_ms < self._alarm_at_ms:
            self._arm()

    def _ring(self) -> None:
        self._alarm = None
        self._alarm_at_ms = None
        self._due.set()

    async def _run_timers(self) -> None:
        while not self._is_stopped:
            try:
                await self.tick()
            except ShardClosed:
                return
            await self._due.wait()

    # Life cycle

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._loops = [
            loop.create_task(self._guarded(self._committer.run), name=f"commit {self.shard_id}"),
            loop.create_task(self._guarded(self._run_timers), name=f"timers {self.shard_id}"),
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
        self._feeder.stop()
        commit, timers = self._loops
        timers.cancel()
        await asyncio.wait({timers})
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
        if self._alarm is not None:
            self._alarm.cancel()
        self._due.set()
        self._stopped.set()
        self._listeners.wake_all()

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
        if len(self._committer.rows) > GROUP_ROWS_MAX or self._open_bytes > GROUP_BYTES_MAX:
            raise Overloaded("too many changes wait to be written; try again", shard=self.shard_id)

    # Steps that commands share

    async def _load(self, tenant: str, job_id: str) -> tuple[JobState, Job]:
        """The job as it stands now, and its tenant's counters: nothing is awaited after the look."""
        self._check_open()
        while True:
            await self._feeder.load_counts((tenant,))
            loaded = await self._read_job(tenant, job_id)
            if self._counters.has(tenant):
                self._check_open()
                return loaded

    async def _read_job(self, tenant: str, job_id: str) -> tuple[JobState, Job]:
        rows = [keys.state_key(tenant, job_id), keys.job_key(tenant, job_id)]
        state_row, job_row = await self._committer.read(rows)
        if state_row is None:
            await self._refuse(JobNotFound(tenant=tenant, job_id=job_id))
        if job_row is None:
            raise StoreCorrupt("a job has a state but no description", shard=self.shard_id)
        return codec.decode(JobState, state_row), codec.decode(Job, job_row)

    async def _read_histories(
        self, tenant: str, jobs: Sequence[ImportedJob]
    ) -> "dict[str, _History | StoreCorrupt]":
        """What stands of these jobs, by id, and the tenant's counters: nothing is awaited after the look.

        Jobs that do not exist are left out; of attempts there is what the import looks at.
        """
        counts = dict.fromkeys((job.id for job in jobs), 0)  # How many attempts of each are read.
        while True:
            await self._feeder.load_counts((tenant,))
            rows = [keys.state_key(tenant, job_id) for job_id in counts]
            for job_id, count in counts.items():
                rows += [keys.attempt_key(tenant, job_id, number) for number in range(1, count + 1)]
            values = dict(zip(rows, await self._committer.read(rows), strict=True))
            found = {job_id: _history(values, tenant, job_id, count) for job_id, count in counts.items()}
            is_whole = True
            for job in jobs:
                match found[job.id]:
                    case _History(state=state) if importing.compares_history(state, job):
                        if state.attempts_ended > counts[job.id]:
                            counts[job.id] = state.attempts_ended
                            is_whole = False
            if is_whole and self._counters.has(tenant):
                return {job_id: history for job_id, history in found.items() if history is not None}

    def _import(self, job: ImportedJob, histories: "dict[str, _History | StoreCorrupt]") -> JobStatus:
        history = histories.get(job.id)
        if isinstance(history, StoreCorrupt):
            raise history
        now_ms = self._clock.now_ms()
        if history is None:
            change = importing.import_new(
                job, new_task_id=self._new_id, now_ms=now_ms, priority_step_ms=self._step_ms
            )
        else:
            change = importing.reimport(
                history.state,
                history.attempts,
                job,
                new_task_id=self._new_id,
                now_ms=now_ms,
                priority_step_ms=self._step_ms,
            )
        self._apply(change)
        assert change.after is not None
        earlier = history.attempts if history is not None else ()
        histories[job.id] = _History(change.after, earlier + change.attempts)
        return change.after.status

    async def _commit(self, decide: Callable[[], Change]) -> Change:
        try:
            change = decide()
        except SiloError as refusal:
            await self._refuse(refusal)
        self._apply(change)
        await self._committer.durable()
        return change

    async def _refuse(self, refusal: SiloError) -> NoReturn:
        """Raise it once everything it was judged by is durable."""
        await self._committer.durable()
        raise refusal

    def _take(self, queue: TaskGroupQueue, worker_id: str, room: Room) -> list[LeasedTask]:
        now_ms = self._clock.now_ms()
        leased: list[LeasedTask] = []
        for state in queue.take(room, self._feeder.is_loaded):
            job = self._jobs.pop(state)
            change = leasing.lease(state, task_id=self._new_id(), worker_id=worker_id, now_ms=now_ms)
            self._apply(change)
            assert change.after is not None
            leased.append(LeasedTask(job, change.after))
        return leased

    def _apply(self, change: Change) -> None:
        """Make a decision true: in the open group, and in memory. Nothing here can fail or wait."""
        before, after = change.before, change.after
        rows = self._committer.rows
        write_change(change, rows)
        if change.job is not None:  # Created or deleted: whatever is cached under its id is another job.
            self._jobs.drop(change.job.tenant, change.job.id)
            self._open_bytes += change.subject.payload_bytes
        if before is not None:
            self._leave(before, after)
        if after is not None:
            self._enter(before, after, change.job, rows)
        tenant = change.subject.tenant
        self._counters.move(tenant, before.status if before else None, after.status if after else None)

    def _leave(self, before: JobState, after: JobState | None) -> None:
        match before.pending:
            case Ready():
                queue = self._queues.get(before.task_group)
                if queue is not None:
                    queue.remove(pending_key(before), before.tenant)
                self._jobs.drop(before.tenant, before.job_id)
            case Delayed():
                self._timers.remove(pending_key(before))
            case None:
                pass
        if before.lease is not None and (after is None or after.lease is None):
            self._leases.drop(before.lease.task_id)

    def _enter(self, before: JobState | None, after: JobState, job: Job | None, rows: Rows) -> None:
        match after.pending:
            case Ready():
                self._enter_queue(after, job, rows)
            case Delayed(due_ms=due_ms):
                key = pending_key(after)
                self._floors.admit(keys.TIMERS, key, rows)
                self._timers.insert(key, after, limit=_TIMER_WINDOW)
                self._arm_for(due_ms)
            case None:
                pass
        if after.lease is not None:
            self._leases.put(after, after.lease.expiry_ms)
            if before is None or before.lease is None:
                self._arm_for(after.lease.expiry_ms)

    def _enter_queue(self, state: JobState, job: Job | None, rows: Rows) -> None:
        key = pending_key(state)
        prefix = keys.queue_prefix(state.task_group, state.tenant)
        self._floors.admit(prefix, key, rows)
        queue = self._queues.get(state.task_group)
        if queue is not None:
            queue.insert(key, state, self._floors.start(prefix))
            if job is not None and self._jobs.has_room(job):
                self._jobs.put(job)
        self._listeners.wake_one(state.task_group)

    def _queue(self, task_group: str) -> TaskGroupQueue:
        queue = self._queues.get(task_group)
        if queue is None:
            queue = self._queues[task_group] = TaskGroupQueue(task_group)
            if len(self._queues) > _QUEUES_MAX:
                self._forget_idle_queues()
        return queue

    def _forget_idle_queues(self) -> None:
        """Drop what is empty and not waited for, of those that were not looked at for longest."""
        for name in list(islice(self._queues, _QUEUES_LOOKED_AT)):
            queue = self._queues.pop(name)
            if not queue.is_empty or name in self._listeners:
                self._queues[name] = queue

    async def _work_or_deadline(self, task_group: str, deadline_ms: int) -> None:
        woken = asyncio.Event()
        stop = self.on_work(task_group, woken.set)
        alarm = self._clock.call_at(deadline_ms, woken.set)
        try:
            await woken.wait()
        finally:
            stop()
            alarm.cancel()

    def _seal(self, rows: Rows) -> None:
        self._open_bytes = 0
        self._counters.seal(rows)
        self._counters.trim()

    def _new_id(self) -> str:
        return str(UUID(int=self._rng.getrandbits(128), version=4))


class _History(msgspec.Struct, frozen=True, gc=False):
    """What an import compares with."""

    state: JobState
    attempts: tuple[Attempt, ...]


class _Recovered(msgspec.Struct, frozen=True):
    """What opening a shard reads."""

    created_at_ms: int
    totals: ShardTotals
    leases: list[Row]
    floors: list[Row]


def _history(values: Rows, tenant: str, job_id: str, count: int) -> _History | StoreCorrupt | None:
    """A job with its first `count` attempts; what is damaged is the trouble of this job only."""
    row = values[keys.state_key(tenant, job_id)]
    if row is None:
        return None
    try:
        state = codec.decode(JobState, row)
        found = [values[keys.attempt_key(tenant, job_id, number)] for number in range(1, count + 1)]
        # There are fewer when the job was made anew while its attempts were read.
        attempts = tuple(
            codec.decode(Attempt, row) for row in found[: state.attempts_ended] if row is not None
        )
    except StoreCorrupt as error:
        return error
    if len(attempts) < min(count, state.attempts_ended):
        return StoreCorrupt("attempts are missing from a job's history", job_id=job_id)
    return _History(state, attempts)


def _quota_reached(tenant: str, most: int) -> QuotaReached:
    return QuotaReached(
        f"tenant '{tenant}' has reached its limit of {most} pending jobs (tenancy.max_pending_jobs); "
        "try again when some of them have run"
    )


async def _recover(store: Store, now_ms: int) -> _Recovered:
    created, totals = await store.get_many([keys.CREATED_AT, keys.TOTALS])
    if created is None:
        created = codec.encode(now_ms)
        await store.write({keys.CREATED_AT: created})
    return _Recovered(
        created_at_ms=codec.decode(int, created),
        totals=codec.decode(ShardTotals, totals) if totals else ShardTotals(),
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
