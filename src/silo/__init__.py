"""Silo: a durable background job queue whose only store is object storage."""

from silo.client.client import SiloGRPCClient
from silo.client.errors import (
    ClientClosed,
    ClusterUnreachable,
    DuplicateTaskDeliveryError,
    JobAlreadyExistsError,
    JobNotFoundError,
    JobNotTerminalError,
    JobTimeoutError,
    SiloAlreadyExistsError,
    SiloClientError,
    SiloDeadlineExceededError,
    SiloFailedPreconditionError,
    SiloGrpcError,
    SiloInvalidArgumentError,
    SiloNotFoundError,
    SiloPermissionDeniedError,
    SiloResourceExhaustedError,
    SiloUnauthenticatedError,
    SiloUnavailableError,
    TaskLeaseLostError,
    TaskNotFoundError,
    TlsError,
    TopologyError,
)
from silo.client.handle import JobHandle
from silo.client.outcome import Cancelled, Failure, Success
from silo.client.tls import TlsOptions
from silo.client.types import (
    Job,
    JobAttempt,
    JobResult,
    JobStatus,
    LeasedTask,
    LeasedTasks,
    RefreshTask,
    RetryPolicy,
    ShardRouting,
)
from silo.errors import ConfigError
from silo.model.shards import hash_tenant
from silo.wire.payload import PayloadError
from silo.worker.context import Task, TaskContext
from silo.worker.errors import ErrorContext
from silo.worker.refresh import RefreshTaskContext
from silo.worker.worker import SiloWorker, WorkerMetrics

__all__ = [
    "Cancelled",
    "ClientClosed",
    "ClusterUnreachable",
    "ConfigError",
    "DuplicateTaskDeliveryError",
    "ErrorContext",
    "Failure",
    "Job",
    "JobAlreadyExistsError",
    "JobAttempt",
    "JobHandle",
    "JobNotFoundError",
    "JobNotTerminalError",
    "JobResult",
    "JobStatus",
    "JobTimeoutError",
    "LeasedTask",
    "LeasedTasks",
    "PayloadError",
    "RefreshTask",
    "RefreshTaskContext",
    "RetryPolicy",
    "ShardRouting",
    "SiloAlreadyExistsError",
    "SiloClientError",
    "SiloDeadlineExceededError",
    "SiloFailedPreconditionError",
    "SiloGRPCClient",
    "SiloGrpcError",
    "SiloInvalidArgumentError",
    "SiloNotFoundError",
    "SiloPermissionDeniedError",
    "SiloResourceExhaustedError",
    "SiloUnauthenticatedError",
    "SiloUnavailableError",
    "SiloWorker",
    "Success",
    "Task",
    "TaskContext",
    "TaskLeaseLostError",
    "TaskNotFoundError",
    "TlsError",
    "TlsOptions",
    "TopologyError",
    "WorkerMetrics",
    "hash_tenant",
]
