"""Between messages of the wire and values of the model: every field, there and back."""

from typing import Any  # Messages of protobuf.

import msgspec
import pytest

from silo.errors import InvalidRequest, StateForbids
from silo.model.attempt import Attempt, Cancelled, Failure, Outcome, Success
from silo.model.job import (
    DEFAULT_TENANT,
    Job,
    JobState,
    JobStatus,
    Lease,
    LeasedTask,
    NewJob,
    RetryPolicy,
)
from silo.model.limit import Limit, RateLimit, RateRetryPolicy
from silo.model.view import JobView
from silo.wire import convert
from silo.wire.pb.silo.v1 import silo_pb2 as pb

POLICY = RetryPolicy(
    retry_count=3,
    initial_interval_ms=100,
    max_interval_ms=-1,
    randomize_interval=True,
    backoff_factor=1.5,
)
POLICY_PB = pb.RetryPolicy(
    retry_count=3,
    initial_interval_ms=100,
    max_interval_ms=-1,
    randomize_interval=True,
    backoff_factor=1.5,
)
JOB = Job(
    tenant="t",
    id="j",
    enqueue_time_ms=5,
    created_at_ms=6,
    payload=b"\x01",
    metadata=(("a", "1"), ("b", "2")),
)
STATE = JobState(
    tenant="t",
    job_id="j",
    task_group="g",
    priority=7,
    retry_policy=POLICY,
    status=JobStatus.SCHEDULED,
    changed_at_ms=20,
    attempts_ended=2,
    relative_attempt_number=1,
    next_start_ms=30,
)
LEASE = Lease(task_id="task", worker_id="w", started_at_ms=40, expiry_ms=50)


def packed(data: bytes) -> pb.SerializedBytes:
    return pb.SerializedBytes(msgpack=data)


def a_state(**changes: Any) -> JobState:
    return msgspec.structs.replace(STATE, **changes)


def a_view(status: JobStatus = JobStatus.SCHEDULED, last: Outcome | None = None, **changes: Any) -> JobView:
    return JobView(job=JOB, state=a_state(status=status, **changes), last_outcome=last)


def an_attempt(outcome: Outcome | None, finished_at_ms: int | None = 60) -> Attempt:
    return Attempt(
        attempt_number=3,
        relative_attempt_number=1,
        task_id="task",
        worker_id="w",
        started_at_ms=50,
        finished_at_ms=finished_at_ms,
        outcome=outcome,
    )


# Enqueue


def test_every_field_of_a_new_job_is_taken_over() -> None:
    request = pb.EnqueueRequest(
        shard="s",
        id="j",
        priority=9,
        start_at_ms=-5,
        retry_policy=POLICY_PB,
        payload=packed(b"\x01"),
        tenant="ignored",
        metadata={"b": "2", "a": "1"},
        task_group="g",
    )
    assert convert.new_job_from_pb(request, tenant="t") == NewJob(
        tenant="t",
        id="j",
        task_group="g",
        priority=9,
        start_at_ms=-5,
        payload=b"\x01",
        retry_policy=POLICY,
        metadata=(("a", "1"), ("b", "2")),
    )


def test_what_a_new_job_leaves_out_is_empty() -> None:
    assert convert.new_job_from_pb(pb.EnqueueRequest(), tenant="t") == NewJob(
        tenant="t", id=None, task_group="", priority=0, start_at_ms=0, payload=b"", retry_policy=None
    )


def test_an_empty_retry_policy_is_one() -> None:
    request = pb.EnqueueRequest(retry_policy=pb.RetryPolicy())
    policy = convert.new_job_from_pb(request, tenant="t").retry_policy
    assert policy is not None
    assert policy.retry_count == 0


def test_no_field_of_an_enqueue_is_forgotten() -> None:
    known = {"shard", "tenant", "limits"}  # Decided before the conversion.
    known |= {"id", "priority", "start_at_ms", "retry_policy", "payload", "metadata", "task_group"}
    assert {field.name for field in pb.EnqueueRequest.DESCRIPTOR.fields} == known


def test_a_retry_policy_survives_the_way_there_and_back() -> None:
    assert convert.retry_policy_from_pb(POLICY_PB) == POLICY
    assert convert.retry_policy_to_pb(POLICY) == POLICY_PB


# Limits


def _limit(**fields: Any) -> Limit:
    """The one limit of a list with one."""
    [limit] = convert.limits_from_pb([pb.Limit(**fields)])
    return limit


LIMITS_PB = [
    pb.Limit(concurrency=pb.ConcurrencyLimit(key="a", max_concurrency=7)),
    pb.Limit(
        floating_concurrency=pb.FloatingConcurrencyLimit(
            key="b", default_max_concurrency=3, refresh_interval_ms=-9, metadata={"k": "v"}
        )
    ),
    pb.Limit(
        rate_limit=pb.GubernatorRateLimit(
            name="n",
            unique_key="u",
            limit=5,
            duration_ms=6,
            hits=-2,
            algorithm=pb.GUBERNATOR_ALGORITHM_LEAKY_BUCKET,
            behavior=63,
            retry_policy=pb.RateLimitRetryPolicy(
                initial_backoff_ms=1, max_backoff_ms=2, backoff_multiplier=1.5, max_retries=4
            ),
        )
    ),
]


def test_every_field_of_a_limit_survives_the_way_there_and_back() -> None:
    limits = convert.limits_from_pb(LIMITS_PB)
    assert [convert.limit_to_pb(limit) for limit in limits] == LIMITS_PB
    for limit in LIMITS_PB:
        [(_, message)] = limit.ListFields()
        assert len(message.ListFields()) == len(message.DESCRIPTOR.fields)  # None was left out above.


@pytest.mark.spec("ENT-12")
def test_a_rate_limit_without_retry_policy_has_the_defaults() -> None:
    limit = _limit(rate_limit=pb.GubernatorRateLimit(name="n"))
    assert isinstance(limit, RateLimit)
    policy = limit.retry_policy
    assert (policy.initial_backoff_ms, policy.max_backoff_ms) == (100, 30_000)
    assert (policy.backoff_multiplier, policy.max_retries) == (2.0, 0)


@pytest.mark.spec("ENT-12")
def test_zeros_in_a_retry_policy_that_is_there_are_zeros() -> None:
    policy = pb.RateLimitRetryPolicy()
    limit = _limit(rate_limit=pb.GubernatorRateLimit(name="n", retry_policy=policy))
    assert isinstance(limit, RateLimit)
    assert limit.retry_policy == RateRetryPolicy(
        initial_backoff_ms=0, max_backoff_ms=0, backoff_multiplier=0.0, max_retries=0
    )
    assert limit.hits == 0  # Other fields have no defaults either.


def test_limits_keep_their_order_and_one_that_says_nothing_is_left_out() -> None:
    limits = convert.limits_from_pb([pb.Limit(), *LIMITS_PB, pb.Limit(), LIMITS_PB[0]])
    assert limits == (*convert.limits_from_pb(LIMITS_PB), *convert.limits_from_pb(LIMITS_PB[:1]))


# GetJob


def test_every_field_of_a_job_is_shown() -> None:
    attempt = an_attempt(Success(b"\x02"))
    view = JobView(job=JOB, state=STATE, attempts=(attempt,))
    assert convert.job_to_pb(view) == pb.GetJobResponse(
        id="j",
        priority=7,
        enqueue_time_ms=5,
        payload=packed(b"\x01"),
        retry_policy=POLICY_PB,
        metadata={"a": "1", "b": "2"},
        status=pb.JOB_STATUS_SCHEDULED,
        status_changed_at_ms=20,
        attempts=[convert.attempt_to_pb(attempt, job_id="j")],
        next_attempt_starts_after_ms=30,
        task_group="g",
    )


def test_no_field_of_a_job_is_forgotten() -> None:
    view = a_view(JobStatus.SUCCEEDED, Success(b"\x02"))
    message = convert.job_to_pb(msgspec.structs.replace(view, attempts=(an_attempt(None),)))
    fields = {field.name for field, _ in message.ListFields()}
    assert {field.name for field in message.DESCRIPTOR.fields} - fields == {"limits"}


def test_what_a_job_lacks_is_absent() -> None:
    message = convert.job_to_pb(a_view(retry_policy=None, next_start_ms=None))
    assert not message.HasField("retry_policy")
    assert not message.HasField("next_attempt_starts_after_ms")
    assert not message.HasField("result")


def test_a_start_at_zero_is_there() -> None:
    assert convert.job_to_pb(a_view(next_start_ms=0)).HasField("next_attempt_starts_after_ms")


def test_an_empty_payload_is_there() -> None:
    view = msgspec.structs.replace(a_view(), job=msgspec.structs.replace(JOB, payload=b""))
    message = convert.job_to_pb(view)
    assert message.HasField("payload")
    assert message.payload.WhichOneof("encoding") == "msgpack"


@pytest.mark.parametrize("status", list(JobStatus))
def test_a_status_keeps_its_number(status: JobStatus) -> None:
    assert convert.job_to_pb(a_view(status)).status == status
    assert pb.JobStatus.Name(status) == f"JOB_STATUS_{status.name}"


@pytest.mark.parametrize("status", list(JobStatus))
def test_only_a_succeeded_job_shows_a_result(status: JobStatus) -> None:
    message = convert.job_to_pb(a_view(status, Success(b"")))
    assert message.HasField("result") == (status is JobStatus.SUCCEEDED)


# Attempts


@pytest.mark.parametrize(
    ("outcome", "fields"),
    [
        (Success(b"\x02"), {"status": pb.ATTEMPT_STATUS_SUCCEEDED, "result": packed(b"\x02")}),
        (Success(b""), {"status": pb.ATTEMPT_STATUS_SUCCEEDED, "result": packed(b"")}),
        (
            Failure("E", b"\x03"),
            {"status": pb.ATTEMPT_STATUS_FAILED, "error_code": "E", "error_data": packed(b"\x03")},
        ),
        (
            Failure("", b""),
            {"status": pb.ATTEMPT_STATUS_FAILED, "error_code": "", "error_data": packed(b"")},
        ),
        (Cancelled(), {"status": pb.ATTEMPT_STATUS_CANCELLED}),
    ],
)
def test_an_ended_attempt_shows_how_it_ended(outcome: Outcome, fields: dict[str, Any]) -> None:
    assert convert.attempt_to_pb(an_attempt(outcome), job_id="j") == pb.JobAttempt(
        job_id="j", attempt_number=3, task_id="task", started_at_ms=50, finished_at_ms=60, **fields
    )


def test_a_running_attempt_has_no_end() -> None:
    message = convert.attempt_to_pb(an_attempt(None, finished_at_ms=None), job_id="j")
    assert message == pb.JobAttempt(
        job_id="j", attempt_number=3, task_id="task", status=pb.ATTEMPT_STATUS_RUNNING, started_at_ms=50
    )
    assert not message.HasField("finished_at_ms")


# GetJobResult


@pytest.mark.parametrize(
    ("status", "outcome", "fields"),
    [
        (JobStatus.SUCCEEDED, Success(b"\x02"), {"success_data": packed(b"\x02")}),
        (JobStatus.SUCCEEDED, Success(b""), {"success_data": packed(b"")}),
        (JobStatus.SUCCEEDED, None, {"success_data": packed(b"")}),
        (
            JobStatus.FAILED,
            Failure("E", b"\x03"),
            {"failure": pb.JobFailure(error_code="E", error_data=packed(b"\x03"))},
        ),
        (JobStatus.FAILED, None, {"failure": pb.JobFailure(error_data=packed(b""))}),
        (JobStatus.CANCELLED, Cancelled(), {"cancelled": pb.JobCancelled(cancelled_at_ms=20)}),
        (JobStatus.CANCELLED, Failure("E", b""), {"cancelled": pb.JobCancelled(cancelled_at_ms=20)}),
        (JobStatus.CANCELLED, None, {"cancelled": pb.JobCancelled(cancelled_at_ms=20)}),
    ],
)
def test_a_result_follows_the_status(
    status: JobStatus, outcome: Outcome | None, fields: dict[str, Any]
) -> None:
    assert convert.job_result_to_pb(a_view(status, outcome)) == pb.GetJobResultResponse(
        id="j", status=int(status), finished_at_ms=20, **fields
    )


@pytest.mark.parametrize("status", [JobStatus.SCHEDULED, JobStatus.RUNNING])
def test_a_job_that_goes_on_has_no_result(status: JobStatus) -> None:
    with pytest.raises(StateForbids, match=f"^job is not complete: status is {status.label}$"):
        convert.job_result_to_pb(a_view(status))


# Tasks


def test_every_field_of_a_task_is_shown() -> None:
    state = a_state(status=JobStatus.RUNNING, lease=LEASE)
    assert convert.task_to_pb(LeasedTask(JOB, state), shard="S") == pb.Task(
        id="task",
        job_id="j",
        tenant_id="t",
        attempt_number=3,
        relative_attempt_number=1,
        is_last_attempt=False,
        metadata={"a": "1", "b": "2"},
        payload=packed(b"\x01"),
        priority=7,
        shard="S",
        task_group="g",
        lease_ms=10_000,
    )


def test_no_field_of_a_task_is_forgotten() -> None:
    state = a_state(status=JobStatus.RUNNING, lease=LEASE, retry_policy=None)
    message = convert.task_to_pb(LeasedTask(JOB, state), shard="S")
    fields = {field.name for field, _ in message.ListFields()}
    assert {field.name for field in message.DESCRIPTOR.fields} - fields == {"limits"}


def test_a_task_of_the_default_tenant_names_none() -> None:
    job = msgspec.structs.replace(JOB, tenant=DEFAULT_TENANT)
    state = a_state(tenant=DEFAULT_TENANT, status=JobStatus.RUNNING, lease=LEASE)
    assert not convert.task_to_pb(LeasedTask(job, state), shard="S").HasField("tenant_id")


@pytest.mark.spec("ATT-6")
@pytest.mark.parametrize(("relative", "is_last"), [(1, False), (3, False), (4, True), (5, True)])
def test_the_last_attempt_follows_the_number_since_the_restart(relative: int, is_last: bool) -> None:
    state = a_state(status=JobStatus.RUNNING, lease=LEASE, relative_attempt_number=relative)
    assert convert.task_to_pb(LeasedTask(JOB, state), shard="S").is_last_attempt == is_last


# Outcomes


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"success": packed(b"\x02")}, Success(b"\x02")),
        ({"success": pb.SerializedBytes()}, Success(b"")),
        ({"failure": pb.Failure(code="E", data=packed(b"\x03"))}, Failure("E", b"\x03")),
        ({"failure": pb.Failure()}, Failure("", b"")),
        ({"cancelled": pb.Cancelled()}, Cancelled()),
    ],
)
def test_a_reported_outcome_is_taken_over(fields: dict[str, Any], outcome: Outcome) -> None:
    assert convert.outcome_from_pb(pb.ReportOutcomeRequest(**fields)) == outcome


def test_a_report_without_outcome_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^missing outcome$"):
        convert.outcome_from_pb(pb.ReportOutcomeRequest(task_id="task"))
