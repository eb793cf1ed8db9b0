"""Silo: a durable background job queue whose only store is object storage."""

import os

# gRPC's own way of surviving a fork makes children crash; `silo.sync` has another one. It counts at import.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from silo.client.client import SiloGRPCClient
from silo.client.enqueue_many import NewJob
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
    is_connectivity_error,
)
from silo.client.handle import JobHandle
from silo.client.importing import ImportAttempt, ImportJob, ImportJobResult
from silo.client.limits import (
    ConcurrencyLimit,
    FloatingConcurrencyLimit,
    GubernatorAlgorithm,
    GubernatorBehavior,
    Limit,
    RateLimit,
    RateLimitRetryPolicy,
)
from silo.client.outcome import Cancelled, Failure, Retry, Success
from silo.client.querying import QueryColumn, QueryParameter, QueryResult
from silo.client.tls import TlsOptions
from silo.client.topology import ShardLocation, shard_for_tenant
from silo.client.types import (
    AttemptStatus,
    Heartbeat,
    Job,
    JobAttempt,
    JobResult,
    JobStatus,
    LeasedTask,
    LeasedTasks,
    RefreshTask,
    RetryPolicy,
    RpcOptions,
    ShardRouting,
)
from silo.errors import ConfigError
from silo.model.shards import hash_tenant
from silo.tasks.app import App
from silo.tasks.current import current_blocking_task, current_task
from silo.tasks.errors import TaskArgumentError, TaskResultError
from silo.tasks.function import AsyncTaskFunction, PlainTaskFunction, TaskFunction
from silo.tasks.handle import TaskHandle
from silo.tasks.worker import AppWorker
from silo.wire.payload import PayloadError
from silo.worker.context import Task, TaskContext
from silo.worker.errors import ErrorContext
from silo.worker.execution.blocking import BlockingTaskContext
from silo.worker.refresh import RefreshTaskContext
from silo.worker.worker import SiloWorker, WorkerMetrics

__all__ = [
    "App",
    "AppWorker",
    "AsyncTaskFunction",
    "AttemptStatus",
    "BlockingTaskContext",
    "Cancelled",
    "ClientClosed",
    "ClusterUnreachable",
    "ConcurrencyLimit",
    "ConfigError",
    "DuplicateTaskDeliveryError",
    "ErrorContext",
    "Failure",
    "FloatingConcurrencyLimit",
    "GubernatorAlgorithm",
    "GubernatorBehavior",
    "Heartbeat",
    "ImportAttempt",
    "ImportJob",
    "ImportJobResult",
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
    "Limit",
    "NewJob",
    "PayloadError",
    "PlainTaskFunction",
    "QueryColumn",
    "QueryParameter",
    "QueryResult",
    "RateLimit",
    "RateLimitRetryPolicy",
    "RefreshTask",
    "RefreshTaskContext",
    "Retry",
    "RetryPolicy",
    "RpcOptions",
    "ShardLocation",
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
    "TaskArgumentError",
    "TaskContext",
    "TaskFunction",
    "TaskHandle",
    "TaskLeaseLostError",
    "TaskNotFoundError",
    "TaskResultError",
    "TlsError",
    "TlsOptions",
    "TopologyError",
    "WorkerMetrics",
    "current_blocking_task",
    "current_task",
    "hash_tenant",
    "is_connectivity_error",
    "shard_for_tenant",
]
