"""Between protobuf messages and model values."""

from collections.abc import Callable, Iterable
from typing import assert_never

from silo.errors import InvalidRequest, StateForbids
from silo.model.attempt import Attempt, Cancelled, Failure, Outcome, PastAttempt, Success
from silo.model.floating import FloatingState, RefreshFailed, RefreshOutcome, RefreshSucceeded
from silo.model.job import (
    DEFAULT_TENANT,
    LEASE_MS,
    ImportedJob,
    JobStatus,
    LeasedTask,
    NewJob,
    RetryPolicy,
)
from silo.model.limit import (
    ConcurrencyLimit,
    FloatingLimit,
    Limit,
    RateAlgorithm,
    RateLimit,
    RateRetryPolicy,
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
        limits=limits_from_pb(request.limits),
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
        limits=limits_from_pb(request.limits),
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


def limits_from_pb(given: Iterable[pb.Limit]) -> tuple[Limit, ...]:
    """The limits in their order. One with nothing set says nothing, and is left out."""
    return tuple(limit for limit in map(_limit_from_pb, given) if limit is not None)


def _limit_from_pb(limit: pb.Limit) -> Limit | None:
    match limit.WhichOneof("limit"):
        case "concurrency":
            fixed = limit.concurrency
            return ConcurrencyLimit(key=fixed.key, max_concurrency=fixed.max_concurrency)
        case "floating_concurrency":
            floating = limit.floating_concurrency
            return FloatingLimit(
                key=floating.key,
                default_max_concurrency=floating.default_max_concurrency,
                refresh_interval_ms=floating.refresh_interval_ms,
                metadata=tuple(sorted(floating.metadata.items())),
            )
        case "rate_limit":
            return _rate_limit_from_pb(limit.rate_limit)
        case _:
            return None


def _rate_limit_from_pb(rate: pb.GubernatorRateLimit) -> RateLimit:
    """Defaults are those of an absent retry policy; zeros in one that is there are zeros."""
    policy = RateRetryPolicy()
    if rate.HasField("retry_policy"):
        given = rate.retry_policy
        policy = RateRetryPolicy(
            initial_backoff_ms=given.initial_backoff_ms,
            max_backoff_ms=given.max_backoff_ms,
            backoff_multiplier=given.backoff_multiplier,
            max_retries=given.max_retries,
        )
    is_leaky = rate.algorithm == pb.GUBERNATOR_ALGORITHM_LEAKY_BUCKET
    return RateLimit(
        name=rate.name,
        unique_key=rate.unique_key,
        limit=rate.limit,
        duration_ms=rate.duration_ms,
        hits=rate.hits,
        algorithm=RateAlgorithm.LEAKY_BUCKET if is_leaky else RateAlgorithm.TOKEN_BUCKET,
        behavior=rate.behavior,
        retry_policy=policy,
    )


def limit_to_pb(limit: Limit) -> pb.Limit:
    match limit:
        case ConcurrencyLimit():
            fixed = pb.ConcurrencyLimit(key=limit.key, max_concurrency=limit.max_concurrency)
            return pb.Limit(concurrency=fixed)
        case FloatingLimit():
            floating = pb.FloatingConcurrencyLimit(
                key=limit.key,
                default_max_concurrency=limit.default_max_concurrency,
                refresh_interval_ms=limit.refresh_interval_ms,
                metadata=dict(limit.metadata),
            )
            return pb.Limit(floating_concurrency=floating)
        case RateLimit(retry_policy=policy):
            rate = pb.GubernatorRateLimit(
                name=limit.name,
                unique_key=limit.unique_key,
                limit=limit.limit,
                duration_ms=limit.duration_ms,
                hits=limit.hits,
                algorithm=pb.GubernatorAlgorithm.Name(limit.algorithm),
                behavior=limit.behavior,
                retry_policy=pb.RateLimitRetryPolicy(
                    initial_backoff_ms=policy.initial_backoff_ms,
                    max_backoff_ms=policy.max_backoff_ms,
                    backoff_multiplier=policy.backoff_multiplier,
                    max_retries=policy.max_retries,
                ),
            )
            return pb.Limit(rate_limit=rate)
        case _:
            assert_never(limit)


def job_to_pb(view: JobView) -> pb.GetJobResponse:
    job, state = view.job, view.state
    response = pb.GetJobResponse(
        id=job.id,
        priority=state.priority,
        enqueue_time_ms=job.enqueue_time_ms,
        payload=pb.SerializedBytes(msgpack=job.payload),
        limits=[limit_to_pb(limit) for limit in state.limits],
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


def task_to_pb(leased: LeasedTask, *, shard: str, make: Callable[..., pb.Task] = pb.Task) -> pb.Task:
    """The task. `make` may be the `add` of a repeated field: then it is made where it goes."""
    job, state = leased.job, leased.state
    assert state.lease is not None, "a task is handed out under a lease"
    message = make(
        id=state.lease.task_id,
        job_id=job.id,
        attempt_number=state.next_attempt_number,
        relative_attempt_number=state.relative_attempt_number,
        is_last_attempt=state.is_last_attempt,
        priority=state.priority,
        shard=shard,
        task_group=state.task_group,
        lease_ms=LEASE_MS,
    )
    message.payload.msgpack = job.payload
    if job.tenant != DEFAULT_TENANT:
        message.tenant_id = job.tenant
    if job.metadata:
        message.metadata.update(job.metadata)
    for limit in state.limits:
        message.limits.append(limit_to_pb(limit))
    return message


def refresh_task_to_pb(leased: FloatingState, *, shard: str) -> pb.RefreshFloatingLimitTask:
    assert leased.lease is not None, "a task is handed out under a lease"
    return pb.RefreshFloatingLimitTask(
        id=leased.lease.task_id,
        queue_key=leased.key,
        current_max_concurrency=leased.max_concurrency,
        last_refreshed_at_ms=leased.last_refreshed_at_ms,
        metadata=dict(leased.metadata),
        lease_ms=LEASE_MS,
        shard=shard,
        task_group=leased.task_group,
        tenant_id=None if leased.tenant == DEFAULT_TENANT else leased.tenant,
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


def refresh_outcome_from_pb(request: pb.ReportRefreshOutcomeRequest) -> RefreshOutcome:
    """The reported outcome of a refresh.

    Raises:
        InvalidRequest: none is set.
    """
    match request.WhichOneof("outcome"):
        case "success":
            return RefreshSucceeded(request.success.new_max_concurrency)
        case "failure":
            return RefreshFailed(request.failure.code, request.failure.message)
        case _:
            raise InvalidRequest("missing outcome")
