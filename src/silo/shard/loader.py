"""Brings into memory what a step looks at: counters, queues, floating limits, buckets, and their lines."""

from collections.abc import Iterable

from silo.errors import StoreCorrupt
from silo.model.counts import QueueCounts, TenantCounts
from silo.model.floating import FloatingState
from silo.model.job import JobState, JobStatus
from silo.model.limit import BucketRecord
from silo.shard.agenda import Agenda
from silo.shard.limits import BucketName, Limited, Line, QueueName
from silo.shard.reader import Decode, Reader
from silo.shard.reads import Reads
from silo.shard.state import ShardState
from silo.shard.window import Value
from silo.storage import codec, keys
from silo.storage.batch import pending_keys
from silo.telemetry.logging import Log

log = Log("silo.shard.loader")


class Loader:
    """Loads by name. What was loaded may leave at the end of a group: look again after each wait."""

    def __init__(self, state: ShardState, reader: Reader, reads: Reads) -> None:
        self._counters = state.counters
        self._limits = state.limits
        self._reader = reader
        self._reads = reads

    def has(self, job: Limited) -> bool:
        """Whether all is in memory that a step of this job looks at."""
        return self._counters.has(job.tenant) and self._limits.has_all(job)

    def has_floating(self, state: FloatingState) -> bool:
        """Whether all is in memory that a step of this floating limit looks at."""
        return not self._limits.missing_for_queue((state.tenant, state.key))

    async def load(self, jobs: Iterable[Limited]) -> None:
        """Make all available that steps of these jobs look at."""
        jobs = list(jobs)
        await self.load_counts(job.tenant for job in jobs)
        missing = self._limits.missing(jobs)
        if missing:
            await self._load_records(missing)

    async def load_counts(self, tenants: Iterable[str]) -> None:
        """Make the counters of these tenants available."""
        missing = sorted({tenant for tenant in tenants if not self._counters.has(tenant)})
        if not missing:
            return
        rows = [keys.counts_key(tenant) for tenant in missing]
        for tenant, stored in zip(missing, await self._reader.read(rows), strict=True):
            try:
                counts = codec.decode(TenantCounts, stored) if stored else TenantCounts()
            except StoreCorrupt as error:
                log.error("counters damaged: counting again", tenant=tenant, reason=str(error))
                counts = await self._counted(tenant)
            self._counters.load(tenant, counts)

    async def _counted(self, tenant: str) -> TenantCounts:
        """The tenant's jobs by status, from the index. None of them changes before its counters are there."""
        counts = TenantCounts()
        prefix = keys.status_index_prefix(tenant)
        async for key, _ in self._reader.all_rows(prefix):
            counts = counts.moved(None, JobStatus(key[len(prefix)]))
        return counts

    async def _load_records(self, rows: list[bytes]) -> None:
        for row, stored in zip(rows, await self._reader.read(rows), strict=True):
            names = keys.read_names(row)
            match row[:1], names:
                case b"n", (tenant, key):
                    await self._load_queue((tenant, key), stored)
                case b"f", (tenant, key):
                    self._limits.load_floating((tenant, key), _floating(row, stored))
                case b"b", (tenant, name, unique_key):
                    await self._load_bucket((tenant, name, unique_key), stored)
                case _:
                    raise AssertionError("no record of a limit")

    async def _load_queue(self, name: QueueName, stored: bytes | None) -> None:
        try:
            counts = codec.decode(QueueCounts, stored) if stored else QueueCounts()
        except StoreCorrupt as error:
            log.error("counts of a queue damaged: counting again", tenant=name[0], reason=str(error))
            counts = await self._counted_queue(name)
        self._limits.load_queue(name, counts)

    async def _counted_queue(self, name: QueueName) -> QueueCounts:
        """A queue's tickets and waiters, from their rows, which do not change before the counts are there."""
        holders = await self._reader.count(keys.queue_holders_prefix(*name))
        lines: dict[int, int] = {}
        async for key, _ in self._reader.all_rows(keys.queue_lines_prefix(*name)):
            number = keys.read_line(key)
            lines[number] = lines.get(number, 0) + 1
        return QueueCounts(holders, tuple(sorted(lines.items())))

    async def _load_bucket(self, name: BucketName, stored: bytes | None) -> None:
        try:
            record = codec.decode(BucketRecord, stored) if stored else BucketRecord(None, 0, None)
        except StoreCorrupt as error:
            log.error("bucket of a rate limit damaged: it is full again", tenant=name[0], reason=str(error))
            record = BucketRecord(None, await self._reader.count(keys.bucket_line_prefix(*name)), None)
        self._limits.load_bucket(name, record)

    # Lines and agendas

    async def load_queue(self, name: QueueName) -> bool:
        """Make available what the next step of a queue looks at; whether it is, when this returns."""
        missing = self._limits.missing_for_queue(name)
        if missing:
            await self._load_records(missing)
        if self._limits.missing_for_queue(name):
            return False
        for line in list(self._limits.queue(name).lines.values()):
            if not line.is_known:
                await self._refill_line(line)
        if self._limits.missing_for_queue(name):
            return False
        waiter, is_known = self._limits.next_waiter(name)
        if waiter is None:
            return is_known
        return await self._load_waiter(waiter)

    async def load_bucket(self, name: BucketName) -> bool:
        """Make available what the next step of a bucket looks at; whether it is, when this returns."""
        if not self._limits.has_bucket(name):
            await self._load_records([keys.bucket_key(*name)])
        if not self._limits.has_bucket(name):
            return False
        line = self._limits.bucket_line(name).line
        if not line.is_known:
            await self._refill_line(line)
        if not self._limits.has_bucket(name):
            return False
        line = self._limits.bucket_line(name).line
        return line.is_known and (line.head is None or await self._load_waiter(line.head))

    async def _load_waiter(self, waiter: JobState) -> bool:
        if self.has(waiter):
            return True
        await self.load([waiter])
        return False  # What was awaited may have changed who is next: look again.

    async def load_floating(self, name: QueueName) -> bool:
        """Make a floating limit and its queue available; whether they are, when this returns."""
        if not self._limits.has_floating(name):
            await self._load_records([keys.floating_key(*name)])
        return await self.load_queue(name) and self._limits.has_floating(name)

    def read_ahead(self, line: Line) -> None:
        """Begin to read more of a line that runs low."""
        self._reads.start(line.prefix, lambda: self._read_line(line))

    async def _refill_line(self, line: Line) -> None:
        await self._reads.once(line.prefix, lambda: self._read_line(line))

    async def _read_line(self, line: Line) -> None:
        if not line.window.is_complete and not line.window.was_let_go:
            await self._reader.refill(line.window, line.prefix, pending_job)
            if not line.window.was_let_go:
                self._reader.note_floor(line.window, line.prefix)

    async def refill(self, agenda: Agenda[Value], decode: Decode[Value]) -> None:
        """Read what comes next of an agenda."""

        async def read() -> None:
            await self._reader.refill(agenda.window, agenda.family, decode)
            self._reader.note_floor(agenda.window, agenda.family)

        await self._reads.once(agenda.family, read)


def _floating(row: bytes, stored: bytes | None) -> FloatingState | None:
    try:
        return codec.decode(FloatingState, stored) if stored else None
    except StoreCorrupt as error:
        log.error("floating limit damaged: the next job defines it", key=row.hex(), reason=str(error))
        return None


def pending_job(key: bytes, value: bytes) -> JobState:
    """The job in the row where it waits."""
    state = codec.decode(JobState, value)
    if state.pending is None or key not in pending_keys(state):
        raise StoreCorrupt("the row holds a state that belongs elsewhere")
    return state


def alarm(key: bytes, value: bytes) -> bytes:
    """The row of the record that an alarm is about."""
    return keys.read_alarm(key)


def expiry(key: bytes, value: bytes) -> tuple[str, str]:
    """The tenant and the id of a job that expires."""
    return keys.read_expiry(key)
