"""The limits of one shard in memory: tickets held, who waits in which line, floating limits and buckets.

Queues, floating limits and buckets are loaded by name before a decision looks at them, and
leave again, the longest unused first, when there are too many. What waits in a line has a
`Window` like all ordered rows, so neither a queue with a million waiters nor a million queues
take memory.

In a concurrency queue jobs stand in *lines*, one for each maximum that they bring along: within a
line whoever is first is served first, and a line that waits for a smaller maximum does not hold up
one with a larger.

Counts are written with the group in which they changed (`seal`). Each record with work to come has
an alarm: a row that says when to look at it. So what a crash interrupts is taken up again.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeAlias, TypeVar

from silo.model.counts import QueueCounts
from silo.model.floating import FloatingState
from silo.model.job import ImportedJob, JobState, NewJob, Rank, Throttled, Waiting
from silo.model.limit import FLOATING_LINE, Bucket, BucketRecord, FloatingLimit, RateLimit
from silo.shard.agenda import Agenda
from silo.shard.floors import Floors
from silo.shard.turns import Turns
from silo.shard.window import RowTally, Window
from silo.storage import codec, keys
from silo.storage.batch import line_prefix, line_row
from silo.storage.store import Rows

RECORDS_MAX = 20_000  # Of each kind in memory.
LINES_MAX = 64  # Of one queue. A job with yet another maximum joins the line of the next smaller one.
_WINDOW_MIN, _WINDOW_MAX, _ROWS_MAX = 16, 512, 50_000

QueueName: TypeAlias = tuple[str, str]  # Tenant and key.
BucketName: TypeAlias = tuple[str, str, str]  # Tenant, name and unique key.


Limited: TypeAlias = JobState | NewJob | ImportedJob
"""What has a tenant and limits."""


class Line:
    """Jobs that wait for the same, in the order of their ranks."""

    def __init__(self, prefix: bytes, start: bytes | None, waiters: int, tally: RowTally) -> None:
        self.prefix = prefix
        self.window: Window[JobState] = Window(start, tally)
        self.waiters = waiters

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits here. Rows that do not decode are not waited for."""
        return not self.waiters or (self.window.is_complete and not len(self.window))

    @property
    def head(self) -> JobState | None:
        """Who is first; None when nobody is, or when it must be read."""
        return self.window.first() if len(self.window) else None

    @property
    def is_known(self) -> bool:
        return self.is_empty or self.head is not None


class Queue:
    """A concurrency queue."""

    def __init__(self, holders: int, alarm_at_ms: int | None) -> None:
        self.holders = holders
        self.alarm_at_ms = alarm_at_ms
        self.lines: dict[int, Line] = {}

    def __repr__(self) -> str:
        waiting = {name: line.waiters for name, line in self.lines.items()}
        return f"Queue(holders={self.holders}, waiting={waiting})"

    @property
    def waiters(self) -> int:
        return sum(line.waiters for line in self.lines.values())


class BucketLine:
    """A bucket, and who waits for it."""

    def __init__(self, bucket: Bucket | None, line: Line, alarm_at_ms: int | None) -> None:
        self.bucket = bucket
        self.line = line
        self.alarm_at_ms = alarm_at_ms


class Limits:
    """What decisions look at (`LimitsView`) and changes move. Pure: it never touches the store."""

    def __init__(self, floors: Floors, alarms: Agenda[bytes], turns: Turns, tally: RowTally) -> None:
        self._floors = floors
        self._alarms = alarms
        self._turns = turns
        self._tally = tally
        self._queues: dict[QueueName, Queue] = {}
        self._floating: dict[QueueName, FloatingState | None] = {}  # None: no such limit is stored.
        self._buckets: dict[BucketName, BucketLine] = {}
        self._dirty_queues: set[QueueName] = set()
        self._dirty_buckets: set[BucketName] = set()
        # What the next step must look at, in order; see `Steps`.
        self.freed: dict[QueueName, None] = {}  # Queues that may have a ticket for who waits there.
        self.stirred: dict[QueueName, str] = {}  # Floating limits to refresh, maybe, by which task group.
        self.touched: dict[BucketName, None] = {}  # Buckets that may have hits for who waits there.

    def __repr__(self) -> str:
        return (
            f"Limits({len(self._queues)} queues, {len(self._floating)} floating limits, "
            f"{len(self._buckets)} buckets)"
        )

    # What decisions look at

    def has_ticket(self, tenant: str, key: str, *, capacity: int, rank: Rank) -> bool:
        name = (tenant, key)
        queue = self._queues[name]
        if queue.holders >= capacity:
            return False
        return not any(line.head is None or line.head.rank < rank for line in self._served_lines(name))

    def line_for(self, tenant: str, key: str, wanted: int) -> int:
        lines = self._queues[tenant, key].lines
        if wanted in lines or len(lines) < LINES_MAX or wanted == FLOATING_LINE:
            return wanted
        return max((line for line in lines if line < wanted), default=min(lines))

    def floating(self, tenant: str, key: str) -> FloatingState | None:
        return self._floating[tenant, key]

    def bucket(self, tenant: str, name: str, unique_key: str) -> Bucket | None:
        return self._buckets[tenant, name, unique_key].bucket

    def is_next(self, tenant: str, name: str, unique_key: str, *, rank: Rank) -> bool:
        line = self._buckets[tenant, name, unique_key].line
        return line.is_empty or (line.head is not None and line.head.rank >= rank)

    def asking_turn(self, tenant: str, *, now_ms: int) -> int:
        return self._turns.next(tenant, now_ms=now_ms)

    # What services look at

    def queue(self, name: QueueName) -> Queue:
        return self._queues[name]

    def bucket_line(self, name: BucketName) -> BucketLine:
        return self._buckets[name]

    def next_waiter(self, name: QueueName) -> tuple[JobState | None, bool]:
        """Who gets the next free ticket of a queue; and whether that is known, or must be read first."""
        best: JobState | None = None
        for line in self._served_lines(name):
            head = line.head
            if head is None:
                return None, False
            if best is None or head.rank < best.rank:
                best = head
        return best, True

    def waiting_group(self, name: QueueName) -> str:
        """The task group of a job that is first in a line of this queue; empty if none is in memory."""
        heads = (line.head for line in self._queues[name].lines.values())
        return next((head.task_group for head in heads if head is not None), "")

    def _served_lines(self, name: QueueName) -> Iterator[Line]:
        """Lines that are not empty and whose maximum leaves a ticket free."""
        queue = self._queues[name]
        for number, line in queue.lines.items():
            if line.is_empty:
                continue
            if number == FLOATING_LINE:
                floating = self._floating.get(name)
                if floating is not None and queue.holders >= floating.max_concurrency:
                    continue
            elif queue.holders >= number:
                continue
            yield line

    # Loading

    def has_all(self, job: Limited) -> bool:
        """Whether all that the chain of this job may look at is in memory."""
        return not job.limits or next(self._missing(job), None) is None

    def missing(self, jobs: Iterable[Limited]) -> list[bytes]:
        """The records to load before these jobs are decided about."""
        return list(dict.fromkeys(row for job in jobs for row in self._missing(job)))

    def _missing(self, job: Limited) -> Iterator[bytes]:
        tenant = job.tenant
        for limit in job.limits:
            if isinstance(limit, RateLimit):
                if (tenant, limit.name, limit.unique_key) not in self._buckets:
                    yield keys.bucket_key(tenant, limit.name, limit.unique_key)
                continue
            name = (tenant, limit.key)
            queue = self._queues.get(name)
            if queue is None:
                yield keys.queue_counts_key(tenant, limit.key)
            is_floating = isinstance(limit, FloatingLimit) or (
                queue is not None and FLOATING_LINE in queue.lines
            )
            if is_floating and name not in self._floating:
                yield keys.floating_key(tenant, limit.key)

    def missing_for_queue(self, name: QueueName) -> list[bytes]:
        """The records to load before a queue is served."""
        rows: list[bytes] = []
        if name not in self._queues:
            rows.append(keys.queue_counts_key(*name))
        if name not in self._floating:
            rows.append(keys.floating_key(*name))
        return rows

    def has_bucket(self, name: BucketName) -> bool:
        return name in self._buckets

    def has_floating(self, name: QueueName) -> bool:
        return name in self._floating

    def load_queue(self, name: QueueName, counts: QueueCounts) -> None:
        if name in self._queues:
            return
        queue = self._queues[name] = Queue(counts.holders, counts.alarm_at_ms)
        for number, waiters in counts.lines:
            prefix = keys.ticket_line_prefix(*name, number)
            queue.lines[number] = Line(prefix, self._floors.start(prefix), waiters, self._tally)

    def load_floating(self, name: QueueName, state: FloatingState | None) -> None:
        self._floating.setdefault(name, state)

    def load_bucket(self, name: BucketName, record: BucketRecord) -> None:
        if name in self._buckets:
            return
        prefix = keys.bucket_line_prefix(*name)
        start = self._floors.start(prefix) if record.waiters else None
        line = Line(prefix, start, record.waiters, self._tally)
        self._buckets[name] = BucketLine(record.bucket, line, record.alarm_at_ms)

    # Changes

    def move(self, before: JobState | None, after: JobState | None, rows: Rows) -> None:
        """A job went from one state to another; its rows are written."""
        if before is not None and isinstance(before.pending, Waiting | Throttled):
            self._leave(before, rows)
        if after is not None and isinstance(after.pending, Waiting | Throttled):
            self._enter(after, rows)
        held_before = before.held if before is not None else ()
        held_after = after.held if after is not None else ()
        if held_before is not held_after:
            subject = after or before
            assert subject is not None
            was_held = {holder.key: None for holder in held_before}
            is_held = {holder.key: None for holder in held_after}
            for key in was_held:
                if key not in is_held:
                    self._count(subject.tenant, key, -1)
                    self.freed[subject.tenant, key] = None
            for key in is_held:
                if key not in was_held:
                    self._count(subject.tenant, key, 1)

    def _count(self, tenant: str, key: str, tickets: int) -> None:
        queue = self._queues[tenant, key]
        queue.holders += tickets
        assert queue.holders >= 0, "more tickets came back than were held"
        self._dirty_queues.add((tenant, key))

    def spend(self, bucket: Bucket) -> None:
        """A bucket has another level now."""
        name = (bucket.tenant, bucket.name, bucket.unique_key)
        self._buckets[name].bucket = bucket
        self._dirty_buckets.add(name)
        self.touched[name] = None

    def forget_bucket(self, name: BucketName) -> None:
        """A bucket is as if it had never been used, and nobody waits for it."""
        self._buckets[name].bucket = None
        self._dirty_buckets.add(name)

    def put_floating(self, before: FloatingState | None, after: FloatingState) -> None:
        name = (after.tenant, after.key)
        self._floating[name] = after
        has_grown = before is None or after.max_concurrency > before.max_concurrency
        if has_grown and name in self._queues:  # A refresh is leased with nothing of its queue in memory.
            self.freed[name] = None

    def _enter(self, state: JobState, rows: Rows) -> None:
        prefix, key = line_prefix(state), line_row(state)
        if isinstance(state.pending, Waiting):
            name = (state.tenant, state.pending.key)
            lines = self._queues[name].lines
            line = lines.get(state.pending.line)
            if line is None:
                line = lines[state.pending.line] = Line(prefix, None, 0, self._tally)
            self._dirty_queues.add(name)
            if state.pending.line == FLOATING_LINE:
                self.stirred[name] = state.task_group
        else:
            limit = state.rate_limit
            bucket = (state.tenant, limit.name, limit.unique_key)
            line = self._buckets[bucket].line
            self._dirty_buckets.add(bucket)
            self.touched[bucket] = None
        line.waiters += 1
        self._floors.admit(prefix, key, rows)
        line.window.insert(key, state, limit=self._window_limit)

    def _leave(self, state: JobState, rows: Rows) -> None:
        if isinstance(state.pending, Waiting):
            name = (state.tenant, state.pending.key)
            queue = self._queues[name]
            line = queue.lines[state.pending.line]
            if line.waiters == 1:
                del queue.lines[state.pending.line]
            self._dirty_queues.add(name)
            self.freed[name] = None  # Whoever is behind it may be luckier.
        else:
            limit = state.rate_limit
            bucket = (state.tenant, limit.name, limit.unique_key)
            line = self._buckets[bucket].line
            self._dirty_buckets.add(bucket)
            self.touched[bucket] = None
        line.waiters -= 1
        line.window.remove(line_row(state))
        if not line.waiters:
            self._floors.drop(line.prefix, rows)
            line.window.let_go()
            if not isinstance(state.pending, Waiting):
                self._buckets[bucket].line = Line(line.prefix, None, 0, self._tally)

    @property
    def _window_limit(self) -> int:
        share = _ROWS_MAX // max(1, len(self._queues) + len(self._buckets))
        return max(_WINDOW_MIN, min(_WINDOW_MAX, share))

    def runs_low(self, line: Line) -> bool:
        """Whether to read more of a line."""
        window = line.window
        return not window.is_complete and len(window) <= self._window_limit // 4 and not window.is_refilling

    # Alarms

    def set_queue_alarm(self, name: QueueName, at_ms: int | None, rows: Rows) -> None:
        """Look at a queue then, and not at the time set before; None: not at all."""
        queue = self._queues[name]
        self.move_alarm(keys.queue_counts_key(*name), queue.alarm_at_ms, at_ms, rows)
        queue.alarm_at_ms = at_ms
        self._dirty_queues.add(name)

    def set_bucket_alarm(self, name: BucketName, at_ms: int | None, rows: Rows) -> None:
        """Look at a bucket then, and not at the time set before; None: not at all."""
        bucket = self._buckets[name]
        self.move_alarm(keys.bucket_key(*name), bucket.alarm_at_ms, at_ms, rows)
        bucket.alarm_at_ms = at_ms
        self._dirty_buckets.add(name)

    def move_alarm(self, record: bytes, before_ms: int | None, after_ms: int | None, rows: Rows) -> None:
        """Move the alarm of the record that is stored under `record`."""
        if before_ms == after_ms:
            return
        if before_ms is not None:
            key = keys.alarm_key(before_ms, record)
            rows[key] = None
            self._alarms.drop(key)
        if after_ms is not None:
            key = keys.alarm_key(after_ms, record)
            rows[key] = b""
            self._alarms.put(key, record, rows)

    # Groups

    def seal(self, rows: Rows) -> None:
        """Add the counts that changed since the last group to this one."""
        for name in self._dirty_queues:
            queue = self._queues[name]
            lines = tuple(sorted((number, line.waiters) for number, line in queue.lines.items()))
            counts = QueueCounts(queue.holders, lines, queue.alarm_at_ms)
            is_unused = counts.is_empty and queue.alarm_at_ms is None
            rows[keys.queue_counts_key(*name)] = None if is_unused else codec.encode(counts)
        for bucket in self._dirty_buckets:
            found = self._buckets[bucket]
            record = BucketRecord(found.bucket, found.line.waiters, found.alarm_at_ms)
            is_unused = found.bucket is None and not record.waiters
            rows[keys.bucket_key(*bucket)] = None if is_unused else codec.encode(record)
        self._dirty_queues.clear()
        self._dirty_buckets.clear()

    def trim(self, *, records_max: int = RECORDS_MAX) -> None:
        """Forget records over the bound, oldest first. Call between two steps, when nothing is dirty."""
        assert not self._dirty_queues and not self._dirty_buckets, "sealed before"
        for queue in _oldest(self._queues, records_max):
            for line in self._queues.pop(queue).lines.values():
                line.window.let_go()
        for bucket in _oldest(self._buckets, records_max):
            self._buckets.pop(bucket).line.window.let_go()
        for floating in _oldest(self._floating, records_max):
            del self._floating[floating]


_Name = TypeVar("_Name")


def _oldest(records: Mapping[_Name, object], most: int) -> list[_Name]:
    return list(islice(records, len(records) - most)) if len(records) > most else []
