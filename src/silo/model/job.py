"""Jobs: what a caller asked for, and where each one stands."""

import enum
from typing import TypeAlias

import msgspec

from silo.model.attempt import PastAttempt
from silo.model.limit import Holder, Limit, RateLimit, limits_bytes

PRIORITY_MAX = 99
LEASE_MS = 10_000  # Length of a lease, and what a heartbeat extends it to.
DEFAULT_TENANT = "-"  # The tenant of every job while tenancy is off.


class JobStatus(enum.IntEnum):
    """Numbers are those of the wire and of stored records."""

    SCHEDULED = 0
    RUNNING = 1
    SUCCEEDED = 2
    FAILED = 3
    CANCELLED = 4

    @property
    def is_terminal(self) -> bool:
        return self >= JobStatus.SUCCEEDED

    @property
    def label(self) -> str:
        """The name that error texts and queries show, such as `Scheduled`."""
        return self.name.capitalize()


MOVES: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.SCHEDULED: frozenset(JobStatus),
    JobStatus.RUNNING: frozenset(JobStatus),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(JobStatus) - {JobStatus.RUNNING},
    JobStatus.CANCELLED: frozenset(JobStatus) - {JobStatus.RUNNING},
}
"""The one table of legal status changes. A terminal job can also be deleted.

Only an import, or a rate limit that is out of tries, ends a job that does not run as Succeeded or Failed.
"""


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """How often and how soon a failed attempt is repeated.

    Fields are kept as sent. `max_interval_ms` caps every delay, so 0 means at once.
    """

    retry_count: int
    initial_interval_ms: int
    max_interval_ms: int
    randomize_interval: bool
    backoff_factor: float


class Job(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """What the caller asked for. Nothing here ever changes."""

    tenant: str
    id: str
    enqueue_time_ms: int  # The start the caller asked for, as sent: 0 for "now".
    created_at_ms: int
    payload: bytes
    metadata: tuple[tuple[str, str], ...] = ()


def task_bytes(
    job_id: str, payload: bytes, metadata: tuple[tuple[str, str], ...], limits: tuple[Limit, ...] = ()
) -> int:
    """How much of an answer the texts of a task of this job take, in bytes."""
    size = len(job_id) + len(payload)
    if metadata:
        size += sum(len(name) + len(value.encode()) for name, value in metadata)
    return size + limits_bytes(limits) if limits else size


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """Due: waits in its task group's queue, in the order of `deadline_ms`."""

    deadline_ms: int


class Delayed(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """Waits for `due_ms`. With limits, they are looked at then."""

    due_ms: int


class Waiting(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """Due: waits for a ticket of the concurrency queue `key`."""

    key: str
    line: int  # Those in a line wait for the same maximum.
    moves: int = 0  # How often it was its turn in a queue while another queue that it needs was full.


class Throttled(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """Due: waits in the line of its rate limit's bucket."""

    checks: int  # How often it was over the limit.
    due_ms: int | None = None  # When it counts as over the limit once more, if that has a bound.


class Checking(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """Due: asks its rate limit again at `due_ms`, and has no place in a line."""

    due_ms: int
    checks: int


class Asking(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """Due: an external limiter is asked about it, the smallest `turn` first."""

    turn: int
    checks: int


Pending: TypeAlias = Ready | Delayed | Waiting | Throttled | Checking | Asking


Rank: TypeAlias = tuple[int, int, str]
"""Start, priority and job id: who is ahead among jobs that wait for the same. Smaller goes first."""


class Place(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a job stands in the queue of its task group."""

    start_ms: int
    deadline_ms: int


class Lease(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """A worker's claim on a running attempt. Heartbeats extend it in memory only."""

    task_id: str
    worker_id: str
    started_at_ms: int
    expiry_ms: int
    session: str = ""  # Of the worker's stream; empty for a lease that a worker polled for.
    place: "Place | None" = None  # Where the job stood in its queue; None if it was taken out of turn.


class JobState(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """Where a job stands. Everything about it that changes, changes here.

    Scheduled has `pending` and no `lease`; Running has a `lease` and no
    `pending`; a terminal job has neither.
    """

    tenant: str
    job_id: str
    task_group: str
    priority: int
    retry_policy: RetryPolicy | None
    status: JobStatus
    changed_at_ms: int
    attempts_ended: int  # Attempts with a stored record; the pending or running one is the next.
    relative_attempt_number: int  # Of the pending, running or last attempt; restarts at 1.
    payload_bytes: int = 0  # `task_bytes` of the job, to plan memory and answers before it is read.
    next_start_ms: int | None = None  # Kept when a job is cancelled while Scheduled.
    cancelled_at_ms: int | None = None
    pending: Pending | None = None
    lease: Lease | None = None
    limits: tuple[Limit, ...] = ()  # As the caller gave them, in this order.
    passed: int = 0  # How many of them the pending or running attempt has passed.
    held: tuple[Holder, ...] = ()  # The tickets it holds.
    expires_at_ms: int | None = None  # When a job that has ended is deleted.

    @property
    def rank(self) -> Rank:
        """Its place among jobs that wait for a ticket or a hit."""
        assert self.next_start_ms is not None, "pending work has a start"
        return max(0, self.next_start_ms), self.priority, self.job_id

    @property
    def next_limit(self) -> Limit | None:
        """The first limit that the pending attempt has not passed."""
        return self.limits[self.passed] if self.passed < len(self.limits) else None

    @property
    def rate_limit(self) -> RateLimit:
        """The rate limit that the pending attempt is at."""
        limit = self.next_limit
        assert isinstance(limit, RateLimit), "only asked where a job waits for a rate limit"
        return limit

    @property
    def next_attempt_number(self) -> int:
        """Number of the pending or running attempt, counted over restarts."""
        return self.attempts_ended + 1

    @property
    def is_last_attempt(self) -> bool:
        retries = self.retry_policy.retry_count if self.retry_policy else 0
        return self.relative_attempt_number >= retries + 1


class NewJob(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A job to be admitted; checked at the edge."""

    tenant: str
    id: str | None  # None: the shard draws one.
    task_group: str
    priority: int
    start_at_ms: int  # 0 or less: now.
    payload: bytes
    retry_policy: RetryPolicy | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    limits: tuple[Limit, ...] = ()


class ImportedJob(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A job that has lived elsewhere, with what it went through there; checked at the edge."""

    tenant: str
    id: str
    task_group: str
    priority: int
    enqueue_time_ms: int  # 0 or less: now.
    start_at_ms: int  # 0 or less: now. Only counts when the job has runs to come.
    payload: bytes
    retry_policy: RetryPolicy | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    attempts: tuple[PastAttempt, ...] = ()  # Oldest first.
    limits: tuple[Limit, ...] = ()


class LeasedTask(msgspec.Struct, frozen=True, gc=False):
    """What a worker gets: the job, and its state with the lease."""

    job: Job
    state: JobState
