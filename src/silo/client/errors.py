"""Typed errors of the client, and which gRPC status becomes which."""

from typing import ClassVar

import grpc

from silo.errors import CONNECTION_RESET, JOB_EXISTS, SHARD_NOT_FOUND, SiloError

# What gRPC's own library says instead of a status when a stream breaks in the middle of a write.
_CORE_FAILED = "Internal error from Core"


class SiloClientError(SiloError):
    """Base of everything the client raises on purpose. Its text is `message`.

    `after_retry`: an earlier try of the same call was not answered and may have taken
    effect, so that for example "already exists" may speak of what this very call did.
    """

    code: ClassVar[str] = "SILO_CLIENT_ERROR"
    after_retry: bool = False


def _in(tenant: str | None) -> str:
    return f' in tenant "{tenant}"' if tenant else ""


class ClusterUnreachable(SiloClientError):
    """No server said who owns which shard, within the retry budget. The last failure is the cause.

    `may_recover`: later the same call may work, without a change of servers or token.
    """

    code = "SILO_CLUSTER_UNREACHABLE"

    def __init__(self, message: str, *, may_recover: bool = True) -> None:
        super().__init__(message)
        self.may_recover = may_recover


class TlsError(ClusterUnreachable):
    """A server and this client do not agree on TLS: a certificate is not accepted, or one side speaks none.

    The text names the address and says what is wrong.
    """

    code = "SILO_TLS"

    def __init__(self, address: str, reason: str, *, before: str = "", may_recover: bool = True) -> None:
        super().__init__(f"{before}{address}: {reason}", may_recover=may_recover)
        self.address = address
        self.reason = reason


class TopologyError(SiloClientError):
    """No shard is known for a tenant."""

    code = "SILO_TOPOLOGY"


class ClientClosed(SiloClientError):
    """The client was closed."""

    code = "SILO_CLIENT_CLOSED"


class JobNotFoundError(SiloClientError):
    code = "SILO_JOB_NOT_FOUND"

    def __init__(self, job_id: str, tenant: str | None = None) -> None:
        super().__init__(f'Job "{job_id}" not found{_in(tenant)}')
        self.job_id = job_id
        self.tenant = tenant


class JobNotTerminalError(SiloClientError):
    code = "SILO_JOB_NOT_TERMINAL"

    def __init__(self, job_id: str, tenant: str | None = None, current_status: str | None = None) -> None:
        status = f" (current status: {current_status})" if current_status else ""
        super().__init__(f'Job "{job_id}"{_in(tenant)} is not in a terminal state{status}')
        self.job_id = job_id
        self.tenant = tenant
        self.current_status = current_status


class JobTimeoutError(SiloClientError, TimeoutError):
    """A job did not end within the time given; it goes on."""

    code = "SILO_JOB_TIMEOUT"

    def __init__(self, job_id: str, timeout_ms: int) -> None:
        super().__init__(f"Timeout waiting for job {job_id} to complete after {timeout_ms}ms")
        self.job_id = job_id


class TaskNotFoundError(SiloClientError):
    code = "SILO_TASK_NOT_FOUND"

    def __init__(self, task_id: str, grpc_message: str | None = None) -> None:
        super().__init__(f'Task "{task_id}" not found' + (f": {grpc_message}" if grpc_message else ""))
        self.task_id = task_id
        self.grpc_message = grpc_message


class TaskLeaseLostError(SiloClientError):
    """A worker lost a task: it must stop working on it, and its outcome does not count."""

    code = "SILO_TASK_LEASE_LOST"

    def __init__(self, task_id: str, job_id: str, cause: BaseException) -> None:
        super().__init__(f'Lease lost for task "{task_id}" (job "{job_id}"): {cause}')
        self.task_id = task_id
        self.job_id = job_id
        self.cause = cause
        self.__cause__ = cause


class DuplicateTaskDeliveryError(SiloClientError):
    code = "SILO_DUPLICATE_TASK_DELIVERY"

    def __init__(self, task_id: str, job_id: str | None = None) -> None:
        job = f' for job "{job_id}"' if job_id else ""
        super().__init__(f'Task "{task_id}"{job} delivered while already executing on this worker')
        self.task_id = task_id
        self.job_id = job_id


class SiloGrpcError(SiloClientError):
    """The server refused; `grpc_code` is the name of the status, such as `INTERNAL`."""

    code = "SILO_GRPC_ERROR"

    def __init__(self, grpc_code: str, grpc_message: str) -> None:
        super().__init__(grpc_message)
        self.grpc_code = grpc_code
        self.grpc_message = grpc_message


class SiloAlreadyExistsError(SiloGrpcError):
    code = "SILO_ALREADY_EXISTS"


class JobAlreadyExistsError(SiloAlreadyExistsError):
    code = "SILO_JOB_ALREADY_EXISTS"

    def __init__(
        self, job_id: str | None = None, tenant: str | None = None, grpc_message: str | None = None
    ) -> None:
        job = f'Job "{job_id}"' if job_id else "Job"
        super().__init__("ALREADY_EXISTS", grpc_message or f"{job} already exists{_in(tenant)}")
        self.job_id = job_id
        self.tenant = tenant


class SiloNotFoundError(SiloGrpcError):
    code = "SILO_NOT_FOUND"


class SiloInvalidArgumentError(SiloGrpcError):
    code = "SILO_INVALID_ARGUMENT"


class SiloFailedPreconditionError(SiloGrpcError):
    code = "SILO_FAILED_PRECONDITION"


class SiloUnauthenticatedError(SiloGrpcError):
    code = "SILO_UNAUTHENTICATED"


class SiloPermissionDeniedError(SiloGrpcError):
    code = "SILO_PERMISSION_DENIED"


class SiloResourceExhaustedError(SiloGrpcError):
    code = "SILO_RESOURCE_EXHAUSTED"


class SiloUnavailableError(SiloGrpcError):
    code = "SILO_UNAVAILABLE"


class SiloDeadlineExceededError(SiloGrpcError):
    code = "SILO_DEADLINE_EXCEEDED"


_BY_STATUS: dict[grpc.StatusCode, type[SiloGrpcError]] = {
    grpc.StatusCode.ALREADY_EXISTS: SiloAlreadyExistsError,
    grpc.StatusCode.NOT_FOUND: SiloNotFoundError,
    grpc.StatusCode.INVALID_ARGUMENT: SiloInvalidArgumentError,
    grpc.StatusCode.FAILED_PRECONDITION: SiloFailedPreconditionError,
    grpc.StatusCode.UNAUTHENTICATED: SiloUnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: SiloPermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: SiloResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: SiloUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: SiloDeadlineExceededError,
}


def from_status(
    error: grpc.aio.AioRpcError,
    *,
    job_id: str | None = None,
    task_id: str | None = None,
    tenant: str | None = None,
    is_enqueue: bool = False,
) -> SiloClientError:
    """The error for a status, by what the call was about."""
    status, text = error.code(), error.details() or ""
    if status is grpc.StatusCode.ALREADY_EXISTS and (is_enqueue or job_id is not None):
        return JobAlreadyExistsError(job_id, tenant, text)
    if is_enqueue and status is grpc.StatusCode.INTERNAL and JOB_EXISTS in text:
        return JobAlreadyExistsError(job_id, tenant, text)
    if status is grpc.StatusCode.NOT_FOUND:
        if task_id is not None:
            return TaskNotFoundError(task_id, text)
        if job_id is not None:
            return JobNotFoundError(job_id, tenant)
    return _BY_STATUS.get(status, SiloGrpcError)(status.name, text)


def is_connectivity_error(error: BaseException) -> bool:
    """Whether the server could not be reached or did not answer, so that another try may help.

    The error is one of gRPC, which errors of this client have as their `__cause__`; False for any other.
    """
    if not isinstance(error, grpc.aio.AioRpcError):
        return False
    text = error.details() or ""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "statement timeout" not in text
    return error.code() is grpc.StatusCode.UNAVAILABLE or (
        error.code() is grpc.StatusCode.INTERNAL and CONNECTION_RESET in text
    )


def is_broken_stream(error: grpc.aio.AioRpcError) -> bool:
    """Whether a stream ended because of its connection, so that another one may live longer."""
    if is_connectivity_error(error):
        return True
    return error.code() is grpc.StatusCode.INTERNAL and _CORE_FAILED in (error.details() or "")


def is_wrong_shard(error: BaseException) -> bool:
    """Whether the server does not have the shard."""
    return (
        isinstance(error, grpc.aio.AioRpcError)
        and error.code() is grpc.StatusCode.NOT_FOUND
        and SHARD_NOT_FOUND in (error.details() or "")
    )
