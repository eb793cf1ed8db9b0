"""Between protobuf messages and what the client takes and gives."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from silo.client.errors import JobNotTerminalError, SiloClientError
from silo.client.limits import Limit, limits_from_pb, limits_to_pb
from silo.client.outcome import Cancelled, Failure, Success
from silo.client.types import (
    ATTEMPT_STATUSES,
    JOB_STATUSES,
    AttemptStatus,
    Job,
    JobAttempt,
    JobResult,
    JobStatus,
    LeasedTask,
    LeasedTasks,
    RefreshTask,
    RetryPolicy,
)
from silo.wire.payload import decode, decode_tolerant, encode
from silo.wire.pb.silo.ext.v1 import ext_pb2 as ext
from silo.wire.pb.silo.v1 import silo_pb2 as pb

Outcome: TypeAlias = Success[Any] | Failure | Cancelled
_UINT32_MAX = 2**32 - 1
_NEW_MAX = f"the new max_concurrency must be an int from 0 to {_UINT32_MAX}"


def enqueue_to_pb(
    *,
    id: str,
    payload: object,
    task_group: str,
    priority: int,
    start_at_ms: int | None,
    retry_policy: RetryPolicy | None,
    limits: Iterable[Limit],
    tenant: str | None,
    metadata: Mapping[str, str],
) -> pb.EnqueueRequest:
    """The new job; its shard is filled in when it is sent.

    Raises:
        PayloadError: the payload cannot be encoded.
        ValueError: a number is out of the range that the wire has for it.
        TypeError: a value is of another type.
    """
    return pb.EnqueueRequest(
        id=id,
        priority=priority,
        start_at_ms=start_at_ms or 0,
        payload=pb.SerializedBytes(msgpack=encode(payload)),
        retry_policy=None if retry_policy is None else retry_policy_to_pb(retry_policy),
        limits=limits_to_pb(limits),
        tenant=tenant or None,
        metadata=metadata,
        task_group=task_group,
    )


def retry_policy_to_pb(policy: RetryPolicy) -> pb.RetryPolicy:
    return pb.RetryPolicy(
        retry_count=policy.retry_count,
        initial_interval_ms=policy.initial_interval_ms,
        max_interval_ms=policy.max_interval_ms,
        randomize_interval=policy.randomize_interval,
        backoff_factor=policy.backoff_factor,
    )


def job_status(number: int) -> JobStatus:
    if not 0 <= number < len(JOB_STATUSES):
        raise SiloClientError(f"Unknown job status: {number}")
    return JOB_STATUSES[number]


def _attempt_status(number: int) -> AttemptStatus:
    if not 0 <= number < len(ATTEMPT_STATUSES):
        raise SiloClientError(f"Unknown attempt status: {number}")
    return ATTEMPT_STATUSES[number]


def job_from_pb(response: pb.GetJobResponse) -> Job:
    policy = None
    if response.HasField("retry_policy"):
        policy = RetryPolicy(
            retry_count=response.retry_policy.retry_count,
            initial_interval_ms=response.retry_policy.initial_interval_ms,
            max_interval_ms=response.retry_policy.max_interval_ms,
            randomize_interval=response.retry_policy.randomize_interval,
            backoff_factor=response.retry_policy.backoff_factor,
        )
    payload = response.payload.msgpack
    starts = response.next_attempt_starts_after_ms
    return Job(
        id=response.id,
        priority=response.priority,
        enqueue_time_ms=response.enqueue_time_ms,
        payload=decode(payload, field="payload") if payload else None,
        metadata=dict(response.metadata),
        status=job_status(response.status),
        status_changed_at_ms=response.status_changed_at_ms,
        task_group=response.task_group,
        retry_policy=policy,
        attempts=tuple(map(attempt_from_pb, response.attempts)) or None,
        next_attempt_starts_after_ms=starts if response.HasField("next_attempt_starts_after_ms") else None,
        result=decode_tolerant(response.result.msgpack),
        limits=limits_from_pb(response.limits),
    )


def attempt_from_pb(attempt: pb.JobAttempt) -> JobAttempt:
    return JobAttempt(
        job_id=attempt.job_id,
        attempt_number=attempt.attempt_number,
        task_id=attempt.task_id,
        status=_attempt_status(attempt.status),
        started_at_ms=attempt.started_at_ms,
        finished_at_ms=attempt.finished_at_ms if attempt.HasField("finished_at_ms") else None,
        result=decode_tolerant(attempt.result.msgpack),
        error_code=attempt.error_code if attempt.HasField("error_code") else None,
        error_data=decode_tolerant(attempt.error_data.msgpack),
    )


def job_result_from_pb(response: pb.GetJobResultResponse) -> JobResult[Any]:
    status = job_status(response.status)
    match status:
        case "Succeeded":
            return JobResult(status=status, result=decode_tolerant(response.success_data.msgpack))
        case "Failed":
            return JobResult(
                status=status,
                error_code=response.failure.error_code,
                error_data=decode_tolerant(response.failure.error_data.msgpack),
            )
        case "Cancelled":
            return JobResult(status=status)
        case _:
            raise JobNotTerminalError(response.id)


def task_from_pb(task: pb.Task) -> LeasedTask:
    return LeasedTask(
        id=task.id,
        job_id=task.job_id,
        tenant_id=task.tenant_id if task.HasField("tenant_id") else None,
        attempt_number=task.attempt_number,
        relative_attempt_number=task.relative_attempt_number,
        is_last_attempt=task.is_last_attempt,
        metadata=dict(task.metadata),
        payload_bytes=task.payload.msgpack,
        priority=task.priority,
        shard=task.shard,
        task_group=task.task_group,
        lease_ms=task.lease_ms,
        limits=limits_from_pb(task.limits),
    )


def refresh_task_from_pb(task: pb.RefreshFloatingLimitTask) -> RefreshTask:
    return RefreshTask(
        id=task.id,
        queue_key=task.queue_key,
        current_max_concurrency=task.current_max_concurrency,
        last_refreshed_at_ms=task.last_refreshed_at_ms,
        metadata=dict(task.metadata),
        lease_ms=task.lease_ms,
        shard=task.shard,
        task_group=task.task_group,
        tenant=task.tenant_id if task.HasField("tenant_id") else None,
    )


def leased_from_pb(response: pb.LeaseTasksResponse | ext.WorkResponse) -> LeasedTasks:
    return LeasedTasks(
        tasks=tuple(map(task_from_pb, response.tasks)),
        refresh_tasks=tuple(map(refresh_task_from_pb, response.refresh_tasks)),
    )


def report_to_pb(outcome: Outcome, *, task_id: str, tenant: str | None) -> pb.ReportOutcomeRequest:
    """The report; its shard is filled in when it is sent.

    Raises:
        PayloadError: the result or the error data cannot be encoded.
    """
    request = pb.ReportOutcomeRequest(task_id=task_id, tenant_id=tenant or None)
    match outcome:
        case Success(result=result):
            request.success.msgpack = encode(result)
        case Failure(code=code, data=data):
            request.failure.code = code
            request.failure.data.msgpack = data if isinstance(data, bytes) else encode(data)
        case Cancelled():
            request.cancelled.SetInParent()
    return request


def refresh_success_to_pb(
    new_max_concurrency: int, *, task_id: str, tenant: str | None
) -> pb.ReportRefreshOutcomeRequest:
    """The report of a new maximum; its shard is filled in when it is sent.

    Raises:
        ValueError: it is no number that a limit can have.
    """
    return pb.ReportRefreshOutcomeRequest(
        task_id=task_id, tenant_id=tenant or None, success=refresh_success(new_max_concurrency)
    )


def refresh_success(new_max_concurrency: int) -> pb.RefreshSuccess:
    """The new maximum of a floating limit.

    Raises:
        ValueError: it is no number that a limit can have.
    """
    value: object = new_max_concurrency  # It may be what a handler returned, which is anything.
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{_NEW_MAX}, not a {type(value).__name__}")
    if not 0 <= value <= _UINT32_MAX:
        raise ValueError(f"{_NEW_MAX}, not {value if value.bit_length() < 64 else 'a number that large'}")
    return pb.RefreshSuccess(new_max_concurrency=value)


def refresh_failure_to_pb(
    code: str, message: str, *, task_id: str, tenant: str | None
) -> pb.ReportRefreshOutcomeRequest:
    """The report that there is no new maximum; its shard is filled in when it is sent."""
    return pb.ReportRefreshOutcomeRequest(
        task_id=task_id, tenant_id=tenant or None, failure=pb.RefreshFailure(code=code, message=message)
    )
