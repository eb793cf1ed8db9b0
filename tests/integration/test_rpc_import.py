"""ImportJobs over a real socket: results in order, exact codes and texts, with tenancy and without."""

from typing import Any  # Messages of grpc are untyped.
from uuid import UUID

import grpc
import pytest

from silo.storage.memory import Fault
from silo.wire import validate
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.integration.rpc_server import GROUP, RpcServer, packed, refusal, rpc_server

FORBIDDEN = grpc.StatusCode.FAILED_PRECONDITION
LEFT, RIGHT = str(UUID(int=1)), str(UUID(int=2))  # The shards of a server with two.
NOWHERE = "ffffffff-ffff-ffff-ffff-ffffffffffff"
IN_LEFT, IN_RIGHT = "test-tenant", "test-tenant-1"  # Hashes 7bda…, c9e3…: either side of 8000….
SCHEDULED, SUCCEEDED, FAILED = pb.JOB_STATUS_SCHEDULED, pb.JOB_STATUS_SUCCEEDED, pb.JOB_STATUS_FAILED
CANCELLED = pb.JOB_STATUS_CANCELLED
ONE_RETRY = pb.RetryPolicy(retry_count=1)
LIMIT = pb.Limit(concurrency=pb.ConcurrencyLimit(key="k", max_concurrency=1))

DONE = pb.ImportAttempt(
    status=pb.ATTEMPT_STATUS_SUCCEEDED, started_at_ms=300, finished_at_ms=400, result=packed(b"\x2a")
)
BROKEN = pb.ImportAttempt(
    status=pb.ATTEMPT_STATUS_FAILED,
    started_at_ms=100,
    finished_at_ms=200,
    error_code="BROKEN",
    error_data=packed(b"\xa3why"),
)
STOPPED = pb.ImportAttempt(status=pb.ATTEMPT_STATUS_CANCELLED, started_at_ms=500, finished_at_ms=600)
RUNNING = pb.ImportAttempt(status=pb.ATTEMPT_STATUS_RUNNING)
UNKNOWN = pb.ImportAttempt(status=7)  # A number from a later protocol.


def an_import(id: str = "j", *attempts: pb.ImportAttempt, **fields: Any) -> pb.ImportJobRequest:
    values = {"shard": LEFT, "task_group": GROUP, "payload": packed(b"\xa1p")} | fields
    return pb.ImportJobRequest(id=id, attempts=attempts, **values)


async def take(server: RpcServer, *jobs: pb.ImportJobRequest) -> list[pb.ImportJobResult]:
    return list((await server.stub.ImportJobs(pb.ImportJobsRequest(jobs=jobs))).results)


def taken(id: str, status: Any) -> pb.ImportJobResult:
    return pb.ImportJobResult(id=id, success=True, status=status)


def not_taken(id: str, error: str) -> pb.ImportJobResult:
    return pb.ImportJobResult(id=id, error=error, status=FAILED)


def status_text(code: str, text: str) -> str:
    return f'status: {code}, message: "{text}", details: [], metadata: MetadataMap {{ headers: {{}} }}'


# Results


async def test_no_jobs_have_no_results() -> None:
    async with rpc_server() as server:
        assert await take(server) == []


@pytest.mark.spec("IMP-1", "W-CC-85", "W-CC-86")
async def test_good_and_bad_jobs_have_their_results_in_the_order_of_the_call() -> None:
    async with rpc_server() as server:
        results = await take(
            server,
            an_import("a", DONE),
            an_import("b", priority=100),
            an_import("c", BROKEN, retry_policy=ONE_RETRY),
            an_import("d", DONE, BROKEN),
            an_import("e", shard=NOWHERE),
            an_import("f", STOPPED),
            an_import("a", DONE),
        )
        assert results == [
            taken("a", SUCCEEDED),
            not_taken("b", status_text("InvalidArgument", "priority must be between 0 and 99")),
            taken("c", SCHEDULED),
            not_taken(
                "d",
                "invalid argument: import attempt 1 must be Failed (only the last attempt may be non-Failed)",
            ),
            not_taken("e", status_text("NotFound", "shard not found")),
            taken("f", CANCELLED),
            not_taken(
                "a",
                "cannot reimport job: cannot reimport job a: job already succeeded (status: Succeeded)",
            ),
        ]
        assert not results[0].HasField("error")
        assert results[1].HasField("error")


# What is wrong with one job: its text, and the order in which it is looked for


def refused_jobs(*, tenancy: bool) -> list[tuple[dict[str, Any], str, str]]:
    """Fields of a job, and code and text of its refusal; each has what later rules refuse too."""
    rules: list[tuple[dict[str, Any], str, str]] = [
        ({"attempts": [UNKNOWN], "limits": [LIMIT]}, "InvalidArgument", "invalid attempt status"),
        (
            {"attempts": [BROKEN, RUNNING, UNKNOWN], "limits": [LIMIT]},
            "InvalidArgument",
            "import attempts must be terminal (not Running)",
        ),
        (
            {"metadata": {"k" * 64: "v"}, "attempts": [RUNNING]},
            "InvalidArgument",
            "metadata key too long (must be < 64 chars)",
        ),
        (
            {"metadata": {"k": "v" * 65_535}},
            "InvalidArgument",
            "metadata value too long (must be < u16::MAX bytes)",
        ),
        (
            {"metadata": {f"k{n}": "" for n in range(17)}},
            "InvalidArgument",
            "metadata has too many entries (max 16)",
        ),
        (
            {"priority": 100, "metadata": {"k" * 64: "v"}},
            "InvalidArgument",
            "priority must be between 0 and 99",
        ),
        ({"task_group": "", "priority": 100}, "InvalidArgument", "task_group is required"),
        ({"id": "", "task_group": ""}, "InvalidArgument", "job id is required for import"),
        ({"limits": [LIMIT] * 257}, "InvalidArgument", "too many limits (max 256)"),
        ({"shard": "x", "tenant": "t" * 65, "id": ""}, "InvalidArgument", "invalid shard ID: x"),
        ({"shard": 'a"\\', "id": ""}, "InvalidArgument", 'invalid shard ID: a\\"\\\\'),
        ({"shard": NOWHERE, "id": ""}, "InvalidArgument", "job id is required for import"),
        ({"shard": NOWHERE}, "NotFound", "shard not found"),
    ]
    if not tenancy:
        text = "tenant must not be provided when tenancy is disabled on the server"
        return [*rules, ({"tenant": "t", "id": ""}, "FailedPrecondition", text)]
    out_of_range = (
        f"tenant '{IN_RIGHT}' is not within shard {LEFT} range [-∞, 8000000000000000); "
        "refresh topology and retry"
    )
    return [
        *rules,
        ({"tenant": "", "id": ""}, "InvalidArgument", "tenant id required"),
        ({"tenant": "t" * 65, "id": ""}, "InvalidArgument", "invalid tenant id"),
        ({"tenant": IN_RIGHT, "id": ""}, "FailedPrecondition", out_of_range),
        ({"tenant": IN_RIGHT, "shard": NOWHERE}, "NotFound", "shard not found"),
    ]


@pytest.mark.spec("IMP-2")
@pytest.mark.parametrize("tenancy", [False, True])
async def test_a_wrong_job_says_what_is_wrong_first_and_changes_nothing(tenancy: bool) -> None:
    rules = refused_jobs(tenancy=tenancy)
    tenant = {"tenant": IN_LEFT} if tenancy else {}
    jobs = [
        pb.ImportJobRequest(**{"shard": LEFT, "id": f"j{number}", "task_group": GROUP} | tenant | fields)
        for number, (fields, _, _) in enumerate(rules)
    ]
    async with rpc_server(shards=2 if tenancy else 1, tenancy=tenancy) as server:
        before = server.rows()
        results = await take(server, *jobs)
        assert results == [
            not_taken(job.id, status_text(code, text))
            for job, (_, code, text) in zip(jobs, rules, strict=True)
        ]
        assert server.rows() == before


async def test_with_tenancy_off_a_job_for_the_wrong_shard_is_refused_too() -> None:
    async with rpc_server(shards=2) as server:  # The hash of "-" is 7a16….
        [wrong, right] = await take(server, an_import("j", shard=RIGHT), an_import("j", shard=LEFT))
        assert "is not within shard" in wrong.error
        assert right == taken("j", SCHEDULED)


@pytest.mark.spec("ENQ-4", "W-CC-35")
async def test_a_long_task_group_is_no_fault_of_an_import() -> None:
    async with rpc_server() as server:
        assert await take(server, an_import("j", task_group="g" * 65)) == [taken("j", SCHEDULED)]
        assert (await server.job()).task_group == "g" * 65


async def test_a_payload_that_no_answer_could_carry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "PAYLOAD_BYTES_MAX", 10)
    async with rpc_server() as server:
        [result] = await take(server, an_import("j", payload=packed(b"x" * 11)))
        assert result.error == status_text("InvalidArgument", "payload too large (must be <= 10 bytes)")


# The whole call


@pytest.mark.spec("IMP-3", "W-CC-87")
async def test_a_running_job_refuses_the_whole_call() -> None:
    async with rpc_server() as server:
        await server.enqueue("busy")
        await server.lease_one()
        before = server.rows()
        call = take(server, an_import("new"), an_import("busy", DONE), an_import("bad", priority=100))
        assert await refusal(call) == (
            FORBIDDEN,
            "cannot reimport job busy: job is currently running (status: Running)",
        )
        assert server.rows() == before


@pytest.mark.spec("IMP-3")
async def test_what_was_imported_for_earlier_tenants_stays_when_a_job_of_a_later_one_runs() -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        await server.enqueue("busy", shard=RIGHT, tenant=IN_RIGHT)
        await server.lease_one()
        first = an_import("j", tenant=IN_LEFT)
        later = an_import("j", shard=RIGHT, tenant=IN_RIGHT)
        busy = an_import("busy", DONE, shard=RIGHT, tenant=IN_RIGHT)
        last = an_import("late", tenant=IN_LEFT)
        code, _ = await refusal(take(server, first, later, busy, last))
        assert code is FORBIDDEN
        # The last one belongs to the group of the first.
        assert (await server.job("j", tenant=IN_LEFT)).status == SCHEDULED
        assert (await server.job("late", tenant=IN_LEFT)).status == SCHEDULED
        code, _ = await refusal(server.job("j", shard=RIGHT, tenant=IN_RIGHT))
        assert code is grpc.StatusCode.NOT_FOUND


async def test_jobs_of_several_tenants_and_shards_are_each_taken_where_they_belong() -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        braced = "{" + LEFT.upper() + "}"
        results = await take(
            server,
            an_import("j", DONE, tenant=IN_LEFT),
            an_import("j", BROKEN, tenant=IN_RIGHT, shard=RIGHT),
            an_import("j", DONE, tenant=IN_LEFT, shard=braced),
            an_import("k", tenant=IN_RIGHT, shard=RIGHT),
        )
        again = "cannot reimport job: cannot reimport job j: job already succeeded (status: Succeeded)"
        assert results == [
            taken("j", SUCCEEDED),
            taken("j", FAILED),
            not_taken("j", again),
            taken("k", SCHEDULED),
        ]
        assert (await server.job("j", tenant=IN_LEFT)).status == SUCCEEDED
        assert (await server.job("j", tenant=IN_RIGHT, shard=RIGHT)).status == FAILED


async def test_a_shard_that_fails_fails_its_own_jobs_only() -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        server.storage.faults.plan("write", Fault.FAIL_BEFORE)
        first, second = await take(
            server, an_import("j", tenant=IN_LEFT), an_import("j", tenant=IN_RIGHT, shard=RIGHT)
        )
        assert (first.id, first.success, first.status) == ("j", False, FAILED)
        assert first.error.startswith('status: Unavailable, message: "shard closed')
        assert second == taken("j", SCHEDULED)


# What is there afterwards


async def test_an_imported_job_and_its_attempts_are_shown_as_they_were_given() -> None:
    async with rpc_server() as server:
        policy = pb.RetryPolicy(
            retry_count=3, initial_interval_ms=5, randomize_interval=True, backoff_factor=1.5
        )
        await take(
            server,
            an_import(
                "j",
                BROKEN,
                DONE,
                priority=7,
                enqueue_time_ms=50,
                start_at_ms=60,
                retry_policy=policy,
                metadata={"b": "2", "a": "1"},
                payload=packed(b"\xc3"),
                task_group="g",
                limits=[pb.Limit()],
            ),
        )
        job = await server.job("j", include_attempts=True)
        first, second = (attempt.task_id for attempt in job.attempts)
        assert {len(first), len(second)} == {36}
        assert first != second
        assert job == pb.GetJobResponse(
            id="j",
            priority=7,
            enqueue_time_ms=50,
            payload=packed(b"\xc3"),
            retry_policy=policy,
            metadata={"a": "1", "b": "2"},
            status=SUCCEEDED,
            status_changed_at_ms=400,
            task_group="g",
            result=packed(b"\x2a"),
            attempts=[
                pb.JobAttempt(
                    job_id="j",
                    attempt_number=1,
                    task_id=first,
                    status=pb.ATTEMPT_STATUS_FAILED,
                    started_at_ms=100,
                    finished_at_ms=200,
                    error_code="BROKEN",
                    error_data=packed(b"\xa3why"),
                ),
                pb.JobAttempt(
                    job_id="j",
                    attempt_number=2,
                    task_id=second,
                    status=pb.ATTEMPT_STATUS_SUCCEEDED,
                    started_at_ms=300,
                    finished_at_ms=400,
                    result=packed(b"\x2a"),
                ),
            ],
        )


async def test_results_of_imported_jobs_can_be_asked_for() -> None:
    async with rpc_server() as server:
        await take(
            server, an_import("done", DONE), an_import("broken", BROKEN), an_import("stopped", STOPPED)
        )
        done, broken, stopped = [await server.result(id) for id in ("done", "broken", "stopped")]
        assert (done.finished_at_ms, done.success_data) == (400, packed(b"\x2a"))
        assert (broken.finished_at_ms, broken.failure.error_code) == (200, "BROKEN")
        assert stopped.cancelled.cancelled_at_ms == 600


async def test_details_that_are_missing_are_empty_and_those_of_another_status_are_ignored() -> None:
    async with rpc_server() as server:
        failed = pb.ImportAttempt(status=pb.ATTEMPT_STATUS_FAILED, result=packed(b"\x2a"))
        bare = pb.ImportAttempt(status=pb.ATTEMPT_STATUS_SUCCEEDED, error_code="X")
        await take(server, an_import("j", failed, bare))
        first, second = (await server.job("j", include_attempts=True)).attempts
        assert (first.HasField("result"), first.error_code, first.error_data) == (False, "", packed(b""))
        assert (second.HasField("error_code"), second.result) == (False, packed(b""))
        assert (first.started_at_ms, first.finished_at_ms, first.HasField("finished_at_ms")) == (0, 0, True)


async def test_an_imported_job_goes_on_where_it_stopped() -> None:
    async with rpc_server() as server:
        await take(server, an_import("j", BROKEN, retry_policy=ONE_RETRY))
        task = await server.lease_one()
        assert (task.job_id, task.attempt_number, task.relative_attempt_number) == ("j", 2, 2)
        assert task.is_last_attempt
        await server.report(task)
        assert (await server.job("j")).status == SUCCEEDED


@pytest.mark.spec("IMP-9", "IMP-12", "IMP-17", "W-CC-89")
async def test_more_history_of_a_job_is_taken_when_it_repeats_what_is_here() -> None:
    async with rpc_server() as server:
        await take(server, an_import("j", BROKEN, priority=3, limits=[LIMIT]))
        [refused] = await take(server, an_import("j", BROKEN))
        assert refused.error == (
            "cannot reimport job: cannot reimport job j: "
            "reimport must include at least one new attempt (status: Failed)"
        )
        other = pb.ImportAttempt(status=pb.ATTEMPT_STATUS_FAILED, started_at_ms=1)
        [refused] = await take(server, an_import("j", other, DONE))
        assert refused.error == (
            "cannot reimport job: cannot reimport job j: "
            "existing attempt 1 does not match reimport data (status: Failed)"
        )
        [refused] = await take(server, an_import("j"))
        assert refused.error == (
            "cannot reimport job: cannot reimport job j: "
            "reimport has 0 attempts but job has 1 existing attempts (status: Failed)"
        )
        again = an_import("j", BROKEN, DONE, priority=9, payload=packed(b"\xa3new"))
        assert await take(server, again) == [taken("j", SUCCEEDED)]
        job = await server.job("j")
        assert (job.priority, job.payload.msgpack, list(job.limits)) == (3, b"\xa1p", [LIMIT])


async def test_an_import_is_counted_by_the_node() -> None:
    async with rpc_server() as server:
        await take(server, an_import("a", DONE), an_import("b"), an_import("c", BROKEN))
        [shard] = (await server.stub.GetNodeInfo(pb.GetNodeInfoRequest())).owned_shards
        assert (shard.total_jobs, shard.completed_jobs) == (3, 2)
