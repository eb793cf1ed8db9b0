"""A shard's memory, kept in step with its open group.

`apply` makes a decision true, in both. It is synchronous and cannot fail, so what commands see
between two awaits is whole. What follows from a change (tickets that it frees, limits that a due
job passes next) is the business of `Steps`.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from itertools import islice

from silo.model.change import Change
from silo.model.counts import ShardTotals
from silo.model.floating import FloatingState, RefreshDue
from silo.model.job import Asking, Checking, Delayed, Job, JobState, Ready, Throttled
from silo.model.task import Task
from silo.shard.agenda import Agenda
from silo.shard.committer import Committer
from silo.shard.dispatch import TaskGroupQueue
from silo.shard.floors import Floors
from silo.shard.ids import KnownIds
from silo.shard.limits import Limits
from silo.shard.listeners import Listeners
from silo.shard.turns import Turns
from silo.shard.views import Counters, JobCache, Leases
from silo.shard.window import RowTally
from silo.storage import keys
from silo.storage.batch import queue_row, write_change, write_floating
from silo.storage.store import Rows

_QUEUES_MAX = 10_000  # Task groups in memory, before idle ones are dropped.
_QUEUES_LOOKED_AT = 16  # For each new one beyond.
ROWS_MAX = 200_000  # Of all windows together, before those that were not used for longest go.


class ShardState:
    """The views of one shard, and what moves them."""

    def __init__(
        self,
        *,
        totals: ShardTotals,
        newest_id_ms: int,
        floors: Floors,
        leases: Leases,
        committer: Committer,
        wake_at: Callable[[int], None],
    ) -> None:
        """`wake_at` is told of each time at which something new is due."""
        self.committer = committer
        self.wake_at = wake_at
        self.tally = RowTally()
        self.floors = floors
        self.leases = leases
        self.counters = Counters(totals)
        self.ids = KnownIds(newest_id_ms)
        self.jobs = JobCache()
        self.queues: dict[str, TaskGroupQueue] = {}  # Those not asked for the longest first.
        self.timers: Agenda[JobState] = Agenda(keys.TIMERS, floors, self.tally)
        self.alarms: Agenda[bytes] = Agenda(keys.ALARMS, floors, self.tally)
        self.expiries: Agenda[tuple[str, str]] = Agenda(keys.EXPIRIES, floors, self.tally)
        self.asking: Agenda[JobState] = Agenda(keys.ASKING, floors, self.tally)
        self.was_asked = asyncio.Event()  # Set when `asking` has a new row.
        self.turns = Turns(self.asking)
        self.limits = Limits(floors, self.alarms, self.turns, self.tally)
        self.listeners = Listeners(self._has_work)
        self.watchers: dict[tuple[str, str], set[asyncio.Future[None]]] = {}  # Of jobs that have not ended.
        self.open_bytes = 0  # Of new jobs in the open group.

    def _has_work(self, task_group: str) -> bool:
        queue = self.queues.get(task_group)
        return queue is not None and not queue.is_empty

    def queue(self, task_group: str) -> TaskGroupQueue:
        """The due work of a task group, for someone who wants to take of it."""
        queue = self.queues.pop(task_group, None)
        if queue is None:
            queue = TaskGroupQueue(task_group, tally=self.tally)
            if len(self.queues) >= _QUEUES_MAX:
                self._forget_idle_queues()
        self.queues[task_group] = queue
        return queue

    def _forget_idle_queues(self) -> None:
        """Drop what is empty and not waited for, of those that were not asked for longest."""
        for name in list(islice(self.queues, _QUEUES_LOOKED_AT)):
            queue = self.queues.pop(name)
            if not queue.is_empty or name in self.listeners:
                self.queues[name] = queue

    def seal(self, rows: Rows) -> None:
        """Complete the open group, which is about to be written; and keep memory within its bounds."""
        self.open_bytes = 0
        self.counters.seal(rows)
        self.ids.seal(rows)
        self.limits.seal(rows)
        self.counters.trim()
        self.limits.trim()
        if self.tally.rows > ROWS_MAX:
            self._shed()

    def _shed(self) -> None:
        """Let rows go that can be read again."""
        self.limits.trim(records_max=0)
        for queue in list(self.queues.values()):
            if self.tally.rows <= ROWS_MAX // 2:
                return
            queue.let_go()

    # Changes

    def apply(self, change: Change) -> None:
        """Make a job's step true."""
        before, after = change.before, change.after
        rows = self.committer.rows
        copies_before, copies_after = write_change(change, rows)
        if change.job is not None:  # Created or deleted: whatever is cached under its id is another job.
            self.jobs.drop(change.job.tenant, change.job.id)
            if before is None:
                self.ids.add(change.job.id)
            self.open_bytes += change.subject.payload_bytes
        if before is not None:
            self._leave(before, copies_before, after)
        if after is not None:
            self._enter(before, after, copies_after, change.job, rows)
        subject = change.subject
        if subject.limits:
            for floating in change.floating:
                self.apply_floating(None, floating)
            for bucket in change.buckets:
                self.limits.spend(bucket)
            self.limits.move(before, after, rows)
        self.counters.move(subject.tenant, before.status if before else None, after.status if after else None)
        if self.leases.holders:
            self._tell_holder(before, after)
        if self.watchers and (after is None or after.status.is_terminal):
            self._tell_watchers((subject.tenant, subject.job_id))

    def _tell_holder(self, before: Task | None, after: Task | None) -> None:
        """Tell the holder of a lease that it is gone, or that its job was cancelled."""
        if before is None or before.lease is None:
            return
        task_id = before.lease.task_id
        if after is None or after.lease is None:
            holder = self.leases.holders.pop(task_id, None)
            if holder is not None:
                self.once_durable(partial(holder.was_lost, task_id))
        elif after.cancelled_at_ms is not None and before.cancelled_at_ms is None:
            holder = self.leases.holders.get(task_id)
            if holder is not None:
                self.once_durable(partial(holder.was_cancelled, task_id, after.cancelled_at_ms))

    def _tell_watchers(self, name: tuple[str, str]) -> None:
        if name in self.watchers:
            # They stay where they are until then: if the write fails, they are woken as the shard stops.
            self.once_durable(partial(self._wake_watchers_of, name))

    def wake_watchers(self) -> None:
        """Let everyone who watches a job look again."""
        for name in self.watchers:
            self._wake_watchers_of(name)

    def _wake_watchers_of(self, name: tuple[str, str]) -> None:
        for watcher in self.watchers.get(name, ()):
            if not watcher.done():
                watcher.set_result(None)

    def once_durable(self, callback: Callable[[], None]) -> None:
        """Call it, later, when all so far is durable; never, if that fails."""

        def tell(durable: asyncio.Future[None]) -> None:
            if not durable.cancelled() and durable.exception() is None:
                callback()

        self.committer.durable().add_done_callback(tell)

    def apply_floating(self, before: FloatingState | None, after: FloatingState) -> None:
        """Make a floating limit's step true."""
        rows = self.committer.rows
        write_floating(before, after, rows)
        record = keys.floating_key(after.tenant, after.key)
        self.limits.move_alarm(record, before.alarm_at_ms if before else None, after.alarm_at_ms, rows)
        if after.alarm_at_ms is not None:
            self.wake_at(after.alarm_at_ms)
        if before is not None and isinstance(before.refresh, RefreshDue):
            self._leave_queue(before, queue_row(before))
        if before is not None and before.lease is not None and after.lease is None:
            self.leases.drop(before.lease.task_id)
            self._tell_holder(before, after)
        if isinstance(after.refresh, RefreshDue):
            self._enter_queue(after, queue_row(after), None, rows)
        if after.lease is not None:
            self.leases.put(after, after.lease.expiry_ms)
            self.wake_at(after.lease.expiry_ms)
        self.limits.put_floating(before, after)

    def _leave(self, before: JobState, copies: tuple[bytes, ...], after: JobState | None) -> None:
        match before.pending:
            case Ready():
                self._leave_queue(before, copies[-1])
                self.jobs.drop(before.tenant, before.job_id)
            case Delayed() | Checking() | Throttled(due_ms=int()):
                self.timers.drop(copies[-1])
            case Asking():
                self.asking.drop(copies[-1])
            case _:
                pass
        if before.expires_at_ms is not None:
            self.expiries.drop(keys.expiry_key(before.expires_at_ms, before.tenant, before.job_id))
        if before.lease is not None and (after is None or after.lease is None):
            self.leases.drop(before.lease.task_id)

    def _enter(
        self,
        before: JobState | None,
        after: JobState,
        copies: tuple[bytes, ...],
        job: Job | None,
        rows: Rows,
    ) -> None:
        match after.pending:
            case Ready():
                self._enter_queue(after, copies[-1], job, rows)
            case Delayed(due_ms=due_ms) | Checking(due_ms=due_ms) | Throttled(due_ms=int(due_ms)):
                self.timers.put(copies[-1], after, rows)
                self.wake_at(due_ms)
            case Asking(turn=turn):
                self.turns.take(after.tenant, turn)
                self.asking.put(copies[-1], after, rows)
                self.was_asked.set()
            case _:
                pass
        if after.expires_at_ms is not None:
            key = keys.expiry_key(after.expires_at_ms, after.tenant, after.job_id)
            self.expiries.put(key, (after.tenant, after.job_id), rows)
            self.wake_at(after.expires_at_ms)
        if after.lease is not None:
            self.leases.put(after, after.lease.expiry_ms)
            if before is None or before.lease is None:
                self.wake_at(after.lease.expiry_ms)

    def _enter_queue(self, task: Task, key: bytes, job: Job | None, rows: Rows) -> None:
        prefix = keys.queue_prefix(task.task_group, task.tenant)
        self.floors.admit(prefix, key, rows)
        queue = self.queues.get(task.task_group)
        if queue is not None:
            queue.insert(key, task, self.floors.start(prefix))
            if job is not None and self.jobs.has_room(job):
                self.jobs.put(job)
        self.listeners.wake_one(task.task_group)

    def _leave_queue(self, task: Task, key: bytes) -> None:
        queue = self.queues.get(task.task_group)
        if queue is not None:
            queue.remove(key, task.tenant)
