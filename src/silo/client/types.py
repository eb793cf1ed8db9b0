"""What the client takes and gives: plain frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from silo.client.limits import Limit
from silo.wire.payload import decode

R = TypeVar("R")

JobStatus = Literal["Scheduled", "Running", "Succeeded", "Failed", "Cancelled"]
AttemptStatus = Literal["Running", "Succeeded", "Failed", "Cancelled"]

JOB_STATUSES: tuple[JobStatus, ...] = ("Scheduled", "Running", "Succeeded", "Failed", "Cancelled")
ATTEMPT_STATUSES: tuple[AttemptStatus, ...] = ("Running", "Succeeded", "Failed", "Cancelled")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how soon a failed attempt is repeated.

    The wait before retry n is `initial_interval_ms × backoff_factor^n`, times a random
    number in [1, 2) with `randomize_interval`, and at most `max_interval_ms`.
    """

    retry_count: int
    initial_interval_ms: int = 1000
    max_interval_ms: int = 60_000
    randomize_interval: bool = True
    backoff_factor: float = 2.0


@dataclass(frozen=True, kw_only=True)
class ShardRouting:
    """How hard the client tries.

    Waits double from `retry_delay_ms` up to 5 s; of each a random part is left out, at most one half.
    With `retry_budget_ms` no try begins later than that after the first, however many retries are left;
    a try that runs then goes on, to its own deadline.
    """

    max_retries: int = 8
    retry_delay_ms: int = 250
    retry_budget_ms: int | None = None  # None: only the retries count.
    topology_refresh_interval_ms: int = 30_000  # Twice that while nothing changes; 0: never.
    topology_refresh_timeout_ms: int = 10_000


@dataclass(frozen=True, kw_only=True)
class RpcOptions:
    """How each single try of a call is sent.

    `timeout_ms` is its deadline, instead of the client's `rpc_timeout_ms`; a question for the topology
    has its own. Names in `metadata` are sent in lower case; those that end in `-bin` have bytes. What the
    client itself sends, such as the token, is stronger.

    Raises:
        ValueError: the timeout is not positive.
    """

    timeout_ms: int | None = None
    metadata: Mapping[str, str | bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.timeout_ms is not None and self.timeout_ms <= 0:
            raise ValueError(f"timeout_ms must be positive, not {self.timeout_ms}")


@dataclass(frozen=True, kw_only=True)
class JobAttempt:
    """One run of a job."""

    job_id: str
    attempt_number: int
    task_id: str
    status: AttemptStatus
    started_at_ms: int
    finished_at_ms: int | None = None
    result: Any = None  # What the handler returned.
    error_code: str | None = None
    error_data: Any = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as the server knows it."""

    id: str
    priority: int
    enqueue_time_ms: int
    payload: Any
    metadata: Mapping[str, str]
    status: JobStatus
    status_changed_at_ms: int
    task_group: str
    retry_policy: RetryPolicy | None = None
    attempts: tuple[JobAttempt, ...] | None = None
    next_attempt_starts_after_ms: int | None = None
    result: Any = None
    limits: tuple[Limit, ...] = ()  # In the order in which the job passes them.


@dataclass(frozen=True, kw_only=True)
class JobResult(Generic[R]):
    """How a job ended. A failed or cancelled job is a result, not an exception."""

    status: JobStatus
    result: R | None = None
    error_code: str | None = None
    error_data: Any = None


@dataclass(frozen=True, kw_only=True)
class LeasedTask:
    """A task as leased. Its payload is still encoded: a worker decodes each one by itself."""

    id: str
    job_id: str
    tenant_id: str | None
    attempt_number: int
    relative_attempt_number: int
    is_last_attempt: bool
    metadata: Mapping[str, str] = field(default_factory=dict)
    payload_bytes: bytes = b""
    priority: int = 0
    shard: str = ""
    task_group: str = ""
    lease_ms: int = 0
    limits: tuple[Limit, ...] = ()

    @property
    def payload(self) -> Any:
        """The payload, decoded now.

        Raises:
            PayloadError: it is not one MessagePack value.
        """
        return decode(self.payload_bytes, field="payload")


@dataclass(frozen=True, kw_only=True)
class RefreshTask:
    """A task that asks for the new maximum of a floating limit."""

    id: str
    queue_key: str
    current_max_concurrency: int
    last_refreshed_at_ms: int = 0  # 0: never.
    metadata: Mapping[str, str] = field(default_factory=dict)  # As given with the limit.
    lease_ms: int = 0
    shard: str = ""
    task_group: str = ""
    tenant: str | None = None


@dataclass(frozen=True, kw_only=True)
class LeasedTasks:
    """What one call leased."""

    tasks: tuple[LeasedTask, ...] = ()
    refresh_tasks: tuple[RefreshTask, ...] = ()


@dataclass(frozen=True)
class Heartbeat:
    """The answer to a heartbeat."""

    cancelled: bool
    cancelled_at_ms: int | None = None
