"""Keep the heads of the queues in memory: read windows, tenants, counters and jobs ahead.

Each read is owned by the shard, not by the call that wanted it: a caller that goes away
cancels only its own wait.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator

from silo.errors import StoreCorrupt
from silo.model.counts import TenantCounts
from silo.model.job import Job, JobState, JobStatus
from silo.shard.committer import Committer
from silo.shard.dispatch import TaskGroupQueue
from silo.shard.floors import Floors
from silo.shard.views import Counters, JobCache
from silo.shard.window import Window
from silo.storage import codec, keys
from silo.storage.batch import pending_key
from silo.storage.store import Row, Store, scan_all
from silo.telemetry.logging import Log

log = Log("silo.shard.feeder")

_LOOKAHEAD_JOBS = 256
_LOOKAHEAD_BYTES = 16 << 20
_REFILL_ROWS = 512
_REFILL_TENANTS = 64  # Windows filled in one step.
_PAGE_ROWS = 512
_PAGE_TENANTS = 256

_Decoded = tuple[bytes, JobState, Job | None]  # The key of a row, and what it holds.


class Feeder:
    """Moves rows from one shard's store into its queues in memory."""

    def __init__(
        self,
        *,
        store: Store,
        committer: Committer,
        floors: Floors,
        counters: Counters,
        jobs: JobCache,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._store = store
        self._committer = committer
        self._floors = floors
        self._counters = counters
        self._jobs = jobs
        self._failed = failed
        self._running: dict[object, asyncio.Task[None]] = {}

    def feed(self, queue: TaskGroupQueue, wanted: int) -> asyncio.Task[None] | None:
        """Start what brings more of the queue into memory; None when nothing is missing.

        The task is the one to wait for when no task could be taken.
        """
        needed: asyncio.Task[None] | None = None
        name = queue.task_group
        previewed = queue.preview(max(wanted, _LOOKAHEAD_JOBS))
        if queue.is_searching:
            needed = self._start((name, "tenants"), lambda: self._find_tenants(queue))
        hungry = queue.hungry(_REFILL_TENANTS)
        if hungry:
            needed = self._start((name, "refill"), lambda: self._refill_all(queue, hungry))
        if any(not self.is_loaded(state) for state in previewed[: max(wanted, _LOOKAHEAD_JOBS // 2)]):
            needed = self._start((name, "jobs"), lambda: self._load(queue, previewed))
        return needed or self._running.get((name, "refill"))

    def is_loaded(self, state: JobState) -> bool:
        """Whether the task can be leased without waiting."""
        return self._jobs.has(state) and self._counters.has(state.tenant)

    async def load_counts(self, tenants: Iterable[str]) -> None:
        """Make the counters of these tenants available."""
        missing = sorted({tenant for tenant in tenants if not self._counters.has(tenant)})
        if missing:
            rows = [keys.counts_key(tenant) for tenant in missing]
            for tenant, stored in zip(missing, await self._committer.read(rows), strict=True):
                try:
                    counts = codec.decode(TenantCounts, stored) if stored else TenantCounts()
                except StoreCorrupt as error:
                    log.error("counters damaged: counting again", tenant=tenant, reason=str(error))
                    counts = await self._counted(tenant)
                self._counters.load(tenant, counts)

    async def _counted(self, tenant: str) -> TenantCounts:
        """The tenant's jobs by status, from the index. None of them changes before its counters are there."""
        await self._committer.durable()
        counts = TenantCounts()
        prefix = keys.status_index_prefix(tenant)
        async for key, _ in scan_all(self._store, prefix, page_rows=_REFILL_ROWS):
            counts = counts.moved(None, JobStatus(key[len(prefix)]))
        return counts

    async def refill_timers(self, window: Window) -> None:
        """Read the next work that is not due yet."""
        await self._once("timers", lambda: self._refill_timers(window))

    async def _refill_timers(self, window: Window) -> None:
        await self._refill(window, keys.TIMERS, keys.range_end(keys.TIMERS))
        self._note_floor(window, keys.TIMERS)

    def stop(self) -> None:
        for task in self._running.values():
            task.cancel()

    def _start(self, name: object, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        task = self._running.get(name)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._run(name, work), name=f"feed {name}")
            self._running[name] = task
        return task

    async def _once(self, name: object, work: Callable[[], Awaitable[None]]) -> None:
        await asyncio.wait({self._start(name, work)})

    async def _run(self, name: object, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as error:  # The outermost edge of this loop: the shard stops with the reason.
            self._failed(error)
        finally:
            del self._running[name]

    async def _refill_all(self, queue: TaskGroupQueue, windows: list[tuple[str, Window]]) -> None:
        for tenant, window in windows:
            if window.is_complete or queue.window(tenant) is not window:
                continue
            prefix = keys.queue_prefix(queue.task_group, tenant)
            rows = await self._refill(window, prefix, keys.range_end(prefix))
            # A window that was let go meanwhile missed what was written: no floor, and no job to keep.
            if queue.window(tenant) is window:
                self._keep_jobs(window, rows)
                self._note_floor(window, prefix)
                queue.settle(tenant)

    async def _refill(self, window: Window, prefix: bytes, end: bytes) -> list[_Decoded]:
        """Read on in a range; the rows that were read."""
        outstanding = self._committer.outstanding(window.bound or prefix, end)
        start = window.begin_refill({key: _state(value) for key, value in outstanding.items()})
        try:
            stored = await self._store.scan(start, end, limit=_REFILL_ROWS)
        except BaseException:
            window.abandon_refill()
            raise
        rows = list(_decodable(stored))
        window.finish_refill(
            [(key, state) for key, state, _ in rows],
            read_to=None if len(stored) < _REFILL_ROWS else stored[-1][0],
        )
        return rows

    def _keep_jobs(self, window: Window, rows: list[_Decoded]) -> None:
        # Last to first: what runs next is the newest in the cache, so no other pushes it out.
        for key, state, job in reversed(rows):
            if job is not None and window.get(key) is state:
                self._jobs.put(job)

    def _note_floor(self, window: Window, prefix: bytes) -> None:
        first = window.first_key
        if window.is_complete:
            self._floors.drop(prefix, self._committer.rows)
        elif first is not None:
            self._floors.raise_to(prefix, first, self._committer.rows)

    async def _load(self, queue: TaskGroupQueue, states: list[JobState]) -> None:
        await self.load_counts(state.tenant for state in states)
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
        found = list(zip(missing, await self._committer.read(rows), strict=True))
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
                # Work that cannot run must not hold up the work behind it. Its rows stay as they are.
                queue.remove(pending_key(state), state.tenant)

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
            rows = await self._store.scan(cursor, end, limit=_PAGE_ROWS)
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
        rows = self._committer.outstanding(queue.prefix, queue.end)
        return {keys.read_text(key, len(queue.prefix))[0] for key, value in rows.items() if value is not None}


def _decodable(stored: Iterable[Row]) -> Iterator[_Decoded]:
    """What the rows hold. A damaged one is passed over: it must not hold up the others."""
    for key, value in stored:
        try:
            state, job = codec.decode_queued(value)
            if state.pending is None or pending_key(state) != key:
                raise StoreCorrupt("the row holds a state that belongs elsewhere")
        except StoreCorrupt as error:
            log.error("row passed over: it is damaged", key=key.hex(), reason=str(error))
        else:
            yield key, state, job


def _state(value: bytes | None) -> JobState | None:
    return None if value is None else codec.decode_queued(value)[0]
