"""Keep the heads of the task groups' queues in memory: read windows, tenants, counters and jobs ahead.

Each read is owned by the shard, not by the call that wanted it: a caller that goes away
cancels only its own wait.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from silo.errors import StoreCorrupt
from silo.model.job import Job, JobState, Ready
from silo.model.task import Task
from silo.shard.dispatch import TaskGroupQueue
from silo.shard.loader import Loader
from silo.shard.reader import Reader
from silo.shard.reads import Reads
from silo.shard.state import ShardState
from silo.shard.window import Window
from silo.storage import codec, keys
from silo.storage.batch import queue_row
from silo.telemetry.logging import Log

log = Log("silo.shard.feeder")

_LOOKAHEAD_JOBS = 256
_LOOKAHEAD_BYTES = 16 << 20
_REFILL_TENANTS = 64  # Windows filled in one step.
_PAGE_ROWS = 512
_PAGE_TENANTS = 256


class Feeder:
    """Moves rows from one shard's store into the queues of its task groups in memory."""

    def __init__(
        self,
        state: ShardState,
        reader: Reader,
        reads: Reads,
        loader: Loader,
        *,
        free_tickets: Callable[[JobState], Awaitable[None]],
    ) -> None:
        """`free_tickets` takes the tickets from a job that can never run."""
        self._free_tickets = free_tickets
        self._floors = state.floors
        self._counters = state.counters
        self._jobs = state.jobs
        self._reader = reader
        self._reads = reads
        self._loader = loader

    def feed(self, queue: TaskGroupQueue, wanted: int) -> asyncio.Task[None] | None:
        """Start what brings more of the queue into memory; None when nothing is missing.

        The task is the one to wait for when no task could be taken.
        """
        needed: asyncio.Task[None] | None = None
        name = queue.task_group
        previewed = queue.preview(max(wanted, _LOOKAHEAD_JOBS))
        if queue.is_searching:
            needed = self._reads.start((name, "tenants"), lambda: self._find_tenants(queue))
        hungry = queue.hungry(_REFILL_TENANTS)
        if hungry:
            needed = self._reads.start((name, "refill"), lambda: self._refill_all(queue, hungry))
        if any(not self.is_loaded(state) for state in previewed[: max(wanted, _LOOKAHEAD_JOBS // 2)]):
            needed = self._reads.start((name, "jobs"), lambda: self._load(queue, previewed))
        return needed or self._reads.running((name, "refill"))

    def is_loaded(self, task: Task) -> bool:
        """Whether the task can be leased without waiting."""
        return not isinstance(task, JobState) or (self._jobs.has(task) and self._counters.has(task.tenant))

    async def _refill_all(self, queue: TaskGroupQueue, windows: list[tuple[str, Window[Task]]]) -> None:
        for tenant, window in windows:
            if window.is_complete or queue.window(tenant) is not window:
                continue
            prefix = keys.queue_prefix(queue.task_group, tenant)
            jobs: dict[bytes, tuple[Task, Job]] = {}
            await self._reader.refill(window, prefix, partial(_queued, jobs))
            # A window that was let go meanwhile missed what was written: no floor, and no job to keep.
            if queue.window(tenant) is window:
                self._keep_jobs(window, jobs)
                self._reader.note_floor(window, prefix)
                queue.settle(tenant)

    def _keep_jobs(self, window: Window[Task], jobs: dict[bytes, tuple[Task, Job]]) -> None:
        # Last to first: what runs next is the newest in the cache, so no other pushes it out.
        for key, (task, job) in reversed(jobs.items()):
            if window.get(key) is task:
                self._jobs.put(job)

    async def _load(self, queue: TaskGroupQueue, tasks: list[Task]) -> None:
        states = [task for task in tasks if isinstance(task, JobState)]
        await self._loader.load_counts(state.tenant for state in states)
        missing: list[JobState] = []
        size = 0
        for state in states:
            if self._jobs.has(state):
                continue
            size += state.payload_bytes
            if missing and size > _LOOKAHEAD_BYTES:
                break
            missing.append(state)
        rows = [keys.job_key(state.tenant, state.job_id) for state in missing]
        found = list(zip(missing, await self._reader.read(rows), strict=True))
        # Last to first: what runs next is the newest in the cache, so no other pushes it out.
        for state, value in reversed(found):
            try:
                job = None if value is None else codec.decode(Job, value)
            except StoreCorrupt as error:
                job = None
                log.error("job passed over: it does not decode", job_id=state.job_id, reason=str(error))
            if job is not None:
                self._jobs.put(job)
            else:
                # Work that cannot run must hold up nobody: neither who is behind it, nor who wants its
                # tickets. Its rows stay as they are otherwise.
                queue.remove(queue_row(state), state.tenant)
                if state.held:
                    await self._free_tickets(state)

    async def _find_tenants(self, queue: TaskGroupQueue) -> None:
        """Advance the cursor over at most a page of tenants that have rows."""
        queue.make_room()
        cursor = queue.beyond
        if cursor is None:
            return
        for tenant in self._outstanding_tenants(queue):
            if not queue.admit(tenant, self._floors.start(keys.queue_prefix(queue.task_group, tenant))):
                break
        found = 0
        while found < _PAGE_TENANTS:
            skips = [item for item in self._floors.known(queue.prefix) if item[0] >= cursor]
            end = skips[0][0] if skips else queue.end
            rows = await self._reader.scan(cursor, end, limit=_PAGE_ROWS)
            if not rows and not skips:
                queue.reached(None)
                return
            if not rows:
                rows = [skips[0]]  # A tenant with a floor: its rows start there, not at its prefix.
            for key, _ in rows:
                if key < cursor:
                    continue
                try:
                    tenant, _end = keys.read_text(key, len(queue.prefix))
                except ValueError as error:
                    log.error("row passed over: its key is damaged", key=key.hex(), reason=str(error))
                    cursor = keys.after(key)
                    continue
                prefix = keys.queue_prefix(queue.task_group, tenant)
                if not queue.admit(tenant, self._floors.start(prefix)):
                    queue.reached(cursor)
                    return
                found += 1
                cursor = keys.range_end(prefix)
        queue.reached(cursor)

    def _outstanding_tenants(self, queue: TaskGroupQueue) -> set[str]:
        rows = self._reader.outstanding(queue.prefix, queue.end)
        return {keys.read_text(key, len(queue.prefix))[0] for key, value in rows.items() if value is not None}


def _queued(jobs: dict[bytes, tuple[Task, Job]], key: bytes, value: bytes) -> Task:
    """The task in a queue row; its job, if it is there too, goes to `jobs`."""
    task, job = codec.decode_queued(value)
    is_queued = isinstance(task.pending, Ready) if isinstance(task, JobState) else task.is_refresh_due
    if not is_queued or queue_row(task) != key:
        raise StoreCorrupt("the row holds a task that belongs elsewhere")
    if job is not None:
        jobs[key] = (task, job)
    return task
