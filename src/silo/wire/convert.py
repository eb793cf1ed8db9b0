"""Between protobuf messages and model values."""

from silo.errors import InvalidRequest, StateForbids
from silo.model.attempt import Attempt, Cancelled, Failure, Outcome, PastAttempt, Success
from silo.model.job import (
    DEFAULT_TENANT,
    LEASE_MS,
    ImportedJob,
    JobStatus,
    LeasedTask,
    NewJob,
    RetryPolicy,
)
from silo.model.storage import StorageInfo
from silo.model.view import JobView
from silo.wire.pb.silo.v1 import silo_pb2 as pb


def new_job_from_pb(request: pb.EnqueueRequest, *, tenant: str) -> NewJob:
    policy = retry_policy_from_pb(request.retry_policy) if request.HasField("retry_policy") else None
    return NewJob(
        tenant=tenant,
        id=request.id or None,
        task_group=request.task_group,
        priority=request.priority,
        start_at_ms=request.start_at_ms,
        payload=request.payload.msgpack,
        retry_policy=policy,
        metadata=tuple(sorted(request.metadata.items())),
    )


def imported_job_from_pb(request: pb.ImportJobRequest, *, tenant: str) -> ImportedJob:
    policy = retry_policy_from_pb(request.retry_policy) if request.HasField("retry_policy") else None
    return ImportedJob(
        tenant=tenant,
        id=request.id,
        task_group=request.task_group,
        priority=request.priority,
        enqueue_time_ms=request.enqueue_time_ms,
        start_at_ms=request.start_at_ms,
        payload=request.payload.msgpack,
        retry_policy=policy,
        metadata=tuple(sorted(request.metadata.items())),
        attempts=tuple(past_attempt_from_pb(attempt) for attempt in request.attempts),
    )


def past_attempt_from_pb(attempt: pb.ImportAttempt) -> PastAttempt:
    """Details that do not belong to its status are ignored; one that is missing is empty.

    Raises:
        InvalidRequest: it has not ended, or in no way that is known.
    """
    outcome: Outcome
    match attempt.status:
        case pb.ATTEMPT_STATUS_SUCCEEDED:
            outcome = Success(attempt.result.msgpack)
        case pb.ATTEMPT_STATUS_FAILED:
            outcome = Failure(attempt.error_code, attempt.error_data.msgpack)
        case pb.ATTEMPT_STATUS_CANCELLED:
            outcome = Cancelled()
        case pb.ATTEMPT_STATUS_RUNNING:
            raise InvalidRequest("import attempts must be terminal (not Running)")
        case _:
            raise InvalidRequest("invalid attempt status")
    return PastAttempt(
        started_at_ms=attempt.started_at_ms, finished_at_ms=attempt.finished_at_ms, outcome=outcome
    )


def retry_policy_from_pb(policy: pb.RetryPolicy) -> RetryPolicy:
    return RetryPolicy(
        retry_count=policy.retry_count,
        initial_interval_ms=policy.initial_interval_ms,
        max_interval_ms=policy.max_interval_ms,
        randomize_interval=policy.randomize_interval,
        backoff_factor=policy.backoff_factor,
    )


def retry_policy_to_pb(policy: RetryPolicy) -> pb.RetryPolicy:
    return pb.RetryPolicy(
        retry_count=policy.retry_count,
        initial_interval_ms=policy.initial_interval_ms,
        max_interval_ms=policy.max_interval_ms,
        randomize_interval=policy.randomize_interval,
        backoff_factor=policy.backoff_factor,
    )


def job_to_pb(view: JobView) -> pb.GetJobResponse:
    job, state = view.job, view.state
    response = pb.GetJobResponse(
        id=job.id,
        priority=state.priority,
        enqueue_time_ms=job.enqueue_time_ms,
        payload=pb.SerializedBytes(msgpack=job.payload),
        metadata=dict(job.metadata),
        status=pb.JobStatus.Name(state.status),
        status_changed_at_ms=state.changed_at_ms,
        attempts=[attempt_to_pb(attempt, job_id=job.id) for attempt in view.attempts],
        task_group=state.task_group,
    )
    if state.retry_policy is not None:
        response.retry_policy.CopyFrom(retry_policy_to_pb(state.retry_policy))
    if state.next_start_ms is not None:
        response.next_attempt_starts_after_ms = state.next_start_ms
    if state.status is JobStatus.SUCCEEDED and isinstance(view.last_outcome, Success):
        response.result.msgpack = view.last_outcome.result
    return response


def attempt_to_pb(attempt: Attempt, *, job_id: str) -> pb.JobAttempt:
    message = pb.JobAttempt(
        job_id=job_id,
        attempt_number=attempt.attempt_number,
        task_id=attempt.task_id,
        status=pb.AttemptStatus.Name(attempt.status),
        started_at_ms=attempt.started_at_ms,
        finished_at_ms=attempt.finished_at_ms,
    )
    match attempt.outcome:
        case Success(result=result):
            message.result.msgpack = result
        case Failure(code=code, data=data):
            message.error_code = code
            message.error_data.msgpack = data
        case Cancelled() | None:
            pass
    return message


def job_result_to_pb(view: JobView) -> pb.GetJobResultResponse:
    """The result by the job's status.

    Raises:
        StateForbids: the job has not ended.
    """
    state = view.state
    response = pb.GetJobResultResponse(
        id=state.job_id,
        status=pb.JobStatus.Name(state.status),
        finished_at_ms=state.changed_at_ms,
    )
    match state.status:
        case JobStatus.SUCCEEDED:
            result = view.last_outcome.result if isinstance(view.last_outcome, Success) else b""
            response.success_data.msgpack = result
        case JobStatus.FAILED:
            failure = view.last_outcome if isinstance(view.last_outcome, Failure) else Failure("", b"")
            response.failure.error_code = failure.code
            response.failure.error_data.msgpack = failure.data
        case JobStatus.CANCELLED:
            response.cancelled.cancelled_at_ms = state.changed_at_ms
        case _:
            raise StateForbids(f"job is not complete: status is {state.status.label}")
    return response


def import_result_to_pb(job_id: str, answer: JobStatus | str) -> pb.ImportJobResult:
    """`answer`: the status that an import gave the job, or why it did not."""
    if isinstance(answer, str):
        return pb.ImportJobResult(id=job_id, error=answer, status=pb.JOB_STATUS_FAILED)
    return pb.ImportJobResult(id=job_id, success=True, status=pb.JobStatus.Name(answer))


def task_to_pb(leased: LeasedTask, *, shard: str) -> pb.Task:
    job, state = leased.job, leased.state
    assert state.lease is not None, "a task is handed out under a lease"
    return pb.Task(
        id=state.lease.task_id,
        job_id=job.id,
        tenant_id=None if job.tenant == DEFAULT_TENANT else job.tenant,
        attempt_number=state.next_attempt_number,
        relative_attempt_number=state.relative_attempt_number,
        is_last_attempt=state.is_last_attempt,
        metadata=dict(job.metadata),
        payload=pb.SerializedBytes(msgpack=job.payload),
        priority=state.priority,
        shard=shard,
        task_group=state.task_group,
        lease_ms=LEASE_MS,
    )


def storage_info_to_pb(info: StorageInfo) -> pb.GetShardStorageInfoResponse:
    return pb.GetShardStorageInfoResponse(
        l0_sst_count=info.level0_tables,
        total_l0_size=info.level0_bytes,
        sorted_run_count=len(info.sorted_runs),
        total_sorted_run_size=sum(run.bytes for run in info.sorted_runs),
        sorted_runs=[
            pb.SortedRunInfo(id=run.id, sst_count=run.tables, estimated_size=run.bytes)
            for run in info.sorted_runs
        ],
    )


def outcome_from_pb(request: pb.ReportOutcomeRequest) -> Outcome:
    """The reported outcome.

    Raises:
        InvalidRequest: none is set.
    """
    match request.WhichOneof("outcome"):
        case "success":
            return Success(request.success.msgpack)
        case "failure":
            return Failure(request.failure.code, request.failure.data.msgpack)
        case "cancelled":
            return Cancelled()
        case _:
            raise InvalidRequest("missing outcome")
