"""What a shard keeps in memory beside its queues: leases, counters, and jobs about to run."""

import heapq
from collections.abc import Iterable
from typing import Protocol

from silo.errors import StoreCorrupt
from silo.model.counts import ShardTotals, TenantCounts
from silo.model.job import Job, JobState, JobStatus, task_bytes
from silo.model.task import Task
from silo.storage import codec, keys
from silo.storage.store import Rows
from silo.telemetry.logging import Log

log = Log("silo.shard.views")

TENANT_COUNTS_MAX = 100_000
JOB_CACHE_BYTES_MAX = 64 << 20
_JOB_OVERHEAD_BYTES = 600


class LeaseHolder(Protocol):
    """Who has leases, and is told what others do to them. Called once that is durable."""

    def was_cancelled(self, task_id: str, cancelled_at_ms: int) -> None:
        """The job was cancelled while it runs."""

    def was_lost(self, task_id: str) -> None:
        """The lease is gone, and not because its holder let go of it."""


class Leases:
    """Running attempts, and refreshes of floating limits, by task id, and when each one expires.

    Heartbeats move an expiry in memory only: after a restart every lease gets a
    full lease time, so no worker loses its task by it.
    """

    def __init__(self) -> None:
        self._states: dict[str, Task] = {}
        self._expiries: dict[str, int] = {}
        self._order: list[tuple[int, str]] = []  # May name a time that a heartbeat has moved.
        self._of_sessions: dict[str, set[str]] = {}
        self.holders: dict[str, LeaseHolder] = {}

    def __len__(self) -> int:
        return len(self._states)

    def get(self, task_id: str) -> Task | None:
        return self._states.get(task_id)

    def tasks(self) -> list[Task]:
        """All that is leased."""
        return list(self._states.values())

    def expiry_ms(self, task_id: str) -> int:
        return self._expiries[task_id]

    def put(self, state: Task, expiry_ms: int) -> None:
        """A lease was granted, or its task's state changed while it runs."""
        assert state.lease is not None, "only leased work is kept here"
        task_id = state.lease.task_id
        self._states[task_id] = state
        if task_id not in self._expiries:
            self._expiries[task_id] = expiry_ms
            heapq.heappush(self._order, (expiry_ms, task_id))
            if state.lease.session:
                self._of_sessions.setdefault(state.lease.session, set()).add(task_id)

    def extend(self, task_id: str, expiry_ms: int) -> None:
        self._expiries[task_id] = expiry_ms

    def drop(self, task_id: str) -> None:
        lease = self._states.pop(task_id).lease
        del self._expiries[task_id]
        if lease is not None and lease.session:
            of_session = self._of_sessions[lease.session]
            of_session.discard(task_id)
            if not of_session:
                del self._of_sessions[lease.session]

    def of_session(self, session: str) -> list[Task]:
        """What was leased for a session."""
        return [self._states[task_id] for task_id in self._of_sessions.get(session, ())]

    def next_expiry_ms(self) -> int | None:
        """When the next lease may expire; None without leases."""
        order = self._order
        while order:
            at_ms, task_id = order[0]
            expiry_ms = self._expiries.get(task_id)
            if expiry_ms == at_ms:
                return at_ms
            heapq.heappop(order)
            if expiry_ms is not None:
                heapq.heappush(order, (expiry_ms, task_id))
        return None

    def expired(self, now_ms: int, limit: int) -> list[Task]:
        """At most `limit` leases that have run out; they stay until dropped."""
        found: list[Task] = []
        seen: list[tuple[int, str]] = []
        while len(found) < limit and (at_ms := self.next_expiry_ms()) is not None and at_ms <= now_ms:
            entry = heapq.heappop(self._order)
            seen.append(entry)
            found.append(self._states[entry[1]])
        for entry in seen:
            heapq.heappush(self._order, entry)
        return found


class Counters:
    """Job counts. Those of tenants are loaded on demand, and kept while they matter."""

    def __init__(self, totals: ShardTotals) -> None:
        self._totals = [totals.total_jobs, totals.completed_jobs]
        self._tenants: dict[str, list[int]] = {}  # By status.
        self._dirty: set[str] = set()
        self._totals_are_dirty = False

    @property
    def totals(self) -> ShardTotals:
        return ShardTotals(*self._totals)

    def has(self, tenant: str) -> bool:
        return tenant in self._tenants

    def get(self, tenant: str) -> TenantCounts:
        scheduled, running, succeeded, failed, cancelled = self._tenants[tenant]
        return TenantCounts((scheduled, running, succeeded, failed, cancelled))

    def pending(self, tenant: str) -> int:
        return self._tenants[tenant][JobStatus.SCHEDULED]

    def load(self, tenant: str, counts: TenantCounts) -> None:
        self._tenants.setdefault(tenant, list(counts.by_status))

    def move(self, tenant: str, before: JobStatus | None, after: JobStatus | None) -> None:
        """One job of `tenant` went from one status to another; None stands for "does not exist"."""
        if before is after:
            return
        counts = self._tenants[tenant]
        self._dirty.add(tenant)
        had_ended = before is not None and before.is_terminal
        has_ended = after is not None and after.is_terminal
        if before is not None:
            counts[before] -= 1
        if after is not None:
            counts[after] += 1
        if before is None or after is None or had_ended is not has_ended:
            self._totals[0] += (after is not None) - (before is not None)
            self._totals[1] += has_ended - had_ended
            self._totals_are_dirty = True

    def seal(self, rows: Rows) -> None:
        """Add the counters that changed since the last group to this one."""
        for tenant in self._dirty:
            counts = self.get(tenant)
            rows[keys.counts_key(tenant)] = None if counts.is_empty else codec.encode(counts)
        self._dirty.clear()
        if self._totals_are_dirty:
            rows[keys.TOTALS] = codec.encode(self.totals)
            self._totals_are_dirty = False

    def trim(self) -> None:
        """Forget tenants over the bound, oldest first. Call when nothing is dirty and all is durable."""
        excess = len(self._tenants) - TENANT_COUNTS_MAX
        if excess > 0 and not self._dirty:
            for tenant in list(self._tenants)[:excess]:
                del self._tenants[tenant]


class JobCache:
    """Descriptions of jobs that will run soon, within a bound in bytes; oldest leave first."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[str, str], Job] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def get(self, tenant: str, job_id: str) -> Job | None:
        return self._jobs.get((tenant, job_id))

    def has(self, state: JobState) -> bool:
        return (state.tenant, state.job_id) in self._jobs

    def has_room(self, job: Job) -> bool:
        return self._bytes + _size(job) <= JOB_CACHE_BYTES_MAX

    def put(self, job: Job) -> None:
        key = (job.tenant, job.id)
        if key in self._jobs:
            return
        self._jobs[key] = job
        self._bytes += _size(job)
        while self._bytes > JOB_CACHE_BYTES_MAX and len(self._jobs) > 1:
            self.drop(*next(iter(self._jobs)))

    def drop(self, tenant: str, job_id: str) -> None:
        job = self._jobs.pop((tenant, job_id), None)
        if job is not None:
            self._bytes -= _size(job)

    def pop(self, state: JobState) -> Job:
        job = self._jobs[state.tenant, state.job_id]
        self.drop(state.tenant, state.job_id)
        return job


def _size(job: Job) -> int:
    return _JOB_OVERHEAD_BYTES + task_bytes(job.id, job.payload, job.metadata)


def leases_from(rows: Iterable[tuple[bytes, bytes]], *, grace_until_ms: int) -> Leases:
    """The leases that stood when the shard was last open, each valid at least until `grace_until_ms`."""
    leases = Leases()
    for key, value in rows:
        try:
            state = codec.decode_task(value)
            if state.lease is None or keys.lease_key(state.lease.task_id) != key:
                raise StoreCorrupt("the row holds a state that belongs elsewhere")
        except StoreCorrupt as error:  # One damaged row must not keep the shard closed.
            log.error("lease passed over: it is damaged", key=key.hex(), reason=str(error))
            continue
        leases.put(state, max(state.lease.expiry_ms, grace_until_ms))
    return leases
