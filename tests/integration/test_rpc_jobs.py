"""The life of jobs over a real socket: enqueued, leased, reported, looked up, steered, deleted."""

import asyncio
import random
import time
from typing import Any  # Messages of grpc are untyped.

import grpc
import msgpack
import msgspec
import pytest

from silo.storage.memory import Fault
from silo.wire.payload import decode
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.builders import a_job, until
from tests.integration.child import stub_of
from tests.integration.real_silo import real_silo
from tests.integration.rpc_server import (
    AT_ONCE,
    GROUP,
    WORKER,
    RpcServer,
    packed,
    refusal,
    rpc_server,
)

FORBIDDEN = grpc.StatusCode.FAILED_PRECONDITION
NOT_FOUND = grpc.StatusCode.NOT_FOUND
LONG = (("silo-wait-ms", "30000"),)
BROKEN = pb.Failure(code="BROKEN", data=packed(b"\xa3why"))
# Tenants, each in another one of eight or three shards.
IN_EACH_EIGHTH = [f"tenant-{number}" for number in (10, 3, 0, 14, 6, 4, 15, 1)]
IN_EACH_THIRD = ("customer-123", "test-tenant", "test-tenant-1")
ONE_RETRY = pb.RetryPolicy(
    retry_count=1, initial_interval_ms=1000, max_interval_ms=60_000, backoff_factor=2.0
)
FINISHED = {
    "success": packed(b"\xa4done"),
    "failure": BROKEN,
    "cancelled": pb.Cancelled(),
}


async def a_finished_job(server: RpcServer, outcome: str, id: str = "j") -> None:
    """A job that ran once and ended so."""
    await server.enqueue(id)
    await server.report(await server.lease_one(), **{outcome: FINISHED[outcome]})


async def pass_time(server: RpcServer, duration_ms: int, ready: int = 1) -> list[pb.Task]:
    """Move the clock and lease what has become due by then."""
    server.clock.advance_ms(duration_ms)
    found: list[pb.Task] = []
    async with asyncio.timeout(10):
        while len(found) < ready:
            found += await server.lease(ready)
    return found


# Enqueue, lease, report


@pytest.mark.spec("RD-1", "W-CC-36")
async def test_a_job_is_described_as_it_was_enqueued() -> None:
    async with rpc_server() as server:
        policy = pb.RetryPolicy(
            retry_count=3, initial_interval_ms=5, randomize_interval=True, backoff_factor=1.5
        )
        await server.enqueue(
            "j",
            payload=packed(b"\xc3"),
            priority=7,
            task_group="g",
            metadata={"b": "2", "a": "1"},
            retry_policy=policy,
        )
        now_ms = server.clock.now_ms()
        assert await server.job("j") == pb.GetJobResponse(
            id="j",
            priority=7,
            enqueue_time_ms=0,
            payload=packed(b"\xc3"),
            retry_policy=policy,
            metadata={"a": "1", "b": "2"},
            status=pb.JOB_STATUS_SCHEDULED,
            status_changed_at_ms=now_ms,
            next_attempt_starts_after_ms=now_ms,
            task_group="g",
        )


@pytest.mark.spec("ENQ-5", "W-CC-43")
async def test_a_job_without_payload_has_an_empty_one() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", payload=None)
        job = await server.job("j")
        assert job.HasField("payload")
        assert job.payload.WhichOneof("encoding") == "msgpack"
        assert job.payload.msgpack == b""


async def test_a_job_without_id_gets_one() -> None:
    async with rpc_server() as server:
        first, second = await server.enqueue(""), await server.enqueue("")
        assert first != second
        assert (await server.job(first)).id == first


@pytest.mark.spec("ENQ-10", "LSE-2", "W-CC-37")
@pytest.mark.parametrize("offset_ms", [5_000, 2**40])
async def test_a_delayed_job_is_due_at_its_start(offset_ms: int) -> None:
    async with rpc_server() as server:
        start_at_ms = server.clock.now_ms() + offset_ms
        await server.enqueue("j", start_at_ms=start_at_ms)
        assert await server.lease() == []
        job = await server.job("j")
        assert (job.enqueue_time_ms, job.next_attempt_starts_after_ms) == (start_at_ms, start_at_ms)
        [task] = await pass_time(server, offset_ms)
        assert task.job_id == "j"


@pytest.mark.spec("ENQ-10", "W-CC-38")
async def test_a_negative_start_means_now_and_is_kept_as_sent() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", start_at_ms=-5)
        job = await server.job("j")
        assert (job.enqueue_time_ms, job.next_attempt_starts_after_ms) == (-5, server.clock.now_ms())
        assert (await server.lease_one()).job_id == "j"


@pytest.mark.spec("LSE-15", "W-CC-64")
async def test_a_task_says_all_that_a_worker_needs() -> None:
    async with rpc_server(tenancy=True) as server:
        await server.enqueue(
            "j", tenant="t", priority=9, metadata={"k": "v"}, retry_policy=ONE_RETRY, payload=packed(b"\x05")
        )
        task = await server.lease_one()
        assert task == pb.Task(
            id=task.id,
            job_id="j",
            tenant_id="t",
            attempt_number=1,
            relative_attempt_number=1,
            is_last_attempt=False,
            metadata={"k": "v"},
            payload=packed(b"\x05"),
            priority=9,
            shard=server.shard,
            task_group=GROUP,
            lease_ms=10_000,
        )
        assert task.id not in ("", "j")


@pytest.mark.spec("LSE-15", "W-CC-64")
async def test_a_task_of_the_default_tenant_names_none() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        task = await server.lease_one()
        assert not task.HasField("tenant_id")
        assert task.is_last_attempt


@pytest.mark.spec("LSE-12", "LSE-14")
async def test_a_leased_job_is_running_and_handed_out_once() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        task = await server.lease_one()
        assert await server.lease() == []
        job = await server.job("j", include_attempts=True)
        assert job.status == pb.JOB_STATUS_RUNNING
        assert not job.HasField("next_attempt_starts_after_ms")
        assert list(job.attempts) == [
            pb.JobAttempt(
                job_id="j",
                attempt_number=1,
                task_id=task.id,
                status=pb.ATTEMPT_STATUS_RUNNING,
                started_at_ms=server.clock.now_ms(),
            )
        ]


@pytest.mark.spec("RD-1", "W-CC-44")
async def test_a_success_ends_the_job_with_its_result() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        task = await server.lease_one()
        started_at_ms = server.clock.now_ms()
        server.clock.advance_ms(500)
        await server.report(task, success=packed(b"\x07"))
        job = await server.job("j", include_attempts=True)
        assert (job.status, job.status_changed_at_ms) == (pb.JOB_STATUS_SUCCEEDED, started_at_ms + 500)
        assert job.result == packed(b"\x07")
        assert list(job.attempts) == [
            pb.JobAttempt(
                job_id="j",
                attempt_number=1,
                task_id=task.id,
                status=pb.ATTEMPT_STATUS_SUCCEEDED,
                started_at_ms=started_at_ms,
                finished_at_ms=started_at_ms + 500,
                result=packed(b"\x07"),
            )
        ]


@pytest.mark.spec("RD-1", "W-CC-44")
async def test_attempts_are_shown_only_on_request_and_the_result_always() -> None:
    async with rpc_server() as server:
        await a_finished_job(server, "success")
        job = await server.job("j")
        assert list(job.attempts) == []
        assert job.result == packed(b"\xa4done")


async def test_an_empty_result_is_there() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        await server.report(await server.lease_one(), success=pb.SerializedBytes())
        assert (await server.job("j")).HasField("result")
        assert (await server.result("j")).WhichOneof("result") == "success_data"


async def test_a_failure_with_retries_left_is_scheduled_again_after_its_wait() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", retry_policy=ONE_RETRY)
        first = await server.lease_one()
        await server.report(first, failure=BROKEN)
        job = await server.job("j", include_attempts=True)
        assert job.status == pb.JOB_STATUS_SCHEDULED
        assert job.next_attempt_starts_after_ms == server.clock.now_ms() + 2000  # Initial times factor.
        assert not job.HasField("result")
        [attempt] = job.attempts
        assert (attempt.status, attempt.error_code) == (pb.ATTEMPT_STATUS_FAILED, "BROKEN")
        assert attempt.error_data == packed(b"\xa3why")
        assert await server.lease() == []

        [second] = await pass_time(server, 2000)
        assert (second.attempt_number, second.relative_attempt_number) == (2, 2)
        assert second.is_last_attempt
        assert second.id != first.id


@pytest.mark.spec("W-CC-44")
async def test_the_last_failure_ends_the_job_and_keeps_every_attempt() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", retry_policy=ONE_RETRY)
        await server.report(await server.lease_one(), failure=pb.Failure(code="FIRST"))
        [second] = await pass_time(server, 2000)
        await server.report(second, failure=BROKEN)
        job = await server.job("j", include_attempts=True)
        assert job.status == pb.JOB_STATUS_FAILED
        assert not job.HasField("result")
        assert [(a.attempt_number, a.error_code) for a in job.attempts] == [(1, "FIRST"), (2, "BROKEN")]
        assert await server.lease() == []


async def test_a_reported_cancellation_ends_the_job_without_retry() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", retry_policy=ONE_RETRY)
        await server.report(await server.lease_one(), cancelled=pb.Cancelled())
        job = await server.job("j", include_attempts=True)
        assert job.status == pb.JOB_STATUS_CANCELLED
        assert [attempt.status for attempt in job.attempts] == [pb.ATTEMPT_STATUS_CANCELLED]
        assert not job.attempts[0].HasField("error_code")


@pytest.mark.spec("LEA-19", "W-CC-66")
async def test_a_second_report_changes_nothing() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        task = await server.lease_one()
        await server.report(task)
        assert await refusal(server.report(task, failure=BROKEN)) == (NOT_FOUND, "lease not found")
        assert (await server.job("j")).status == pb.JOB_STATUS_SUCCEEDED


@pytest.mark.spec("W-CC-71")
async def test_a_lost_worker_costs_one_attempt_and_no_job() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", retry_policy=pb.RetryPolicy(retry_count=1))
        first = await server.lease_one()
        [second] = await pass_time(server, 10_000)
        assert second.attempt_number == 2
        attempt = (await server.job("j", include_attempts=True)).attempts[0]
        assert (attempt.task_id, attempt.error_code) == (first.id, "WORKER_CRASHED")
        text = msgpack.unpackb(attempt.error_data.msgpack)
        assert text.startswith("lease expired at ")
        assert text.endswith(f", worker={WORKER}")
        assert await refusal(server.report(first)) == (NOT_FOUND, "lease not found")


# Results


@pytest.mark.spec("RD-2")
@pytest.mark.parametrize(
    ("outcome", "status", "field"),
    [
        ("success", pb.JOB_STATUS_SUCCEEDED, {"success_data": packed(b"\xa4done")}),
        (
            "failure",
            pb.JOB_STATUS_FAILED,
            {"failure": pb.JobFailure(error_code="BROKEN", error_data=packed(b"\xa3why"))},
        ),
        (
            "cancelled",
            pb.JOB_STATUS_CANCELLED,
            {"cancelled": pb.JobCancelled(cancelled_at_ms=1_700_000_000_000)},
        ),
    ],
)
async def test_the_result_of_an_ended_job(outcome: str, status: Any, field: dict[str, Any]) -> None:
    async with rpc_server() as server:
        await a_finished_job(server, outcome)
        assert await server.result("j") == pb.GetJobResultResponse(
            id="j", status=status, finished_at_ms=server.clock.now_ms(), **field
        )


@pytest.mark.spec("RD-2", "W-ERR-6")
async def test_a_job_that_has_not_ended_has_no_result_yet() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        assert await refusal(server.result("j")) == (FORBIDDEN, "job is not complete: status is Scheduled")
        await server.lease_one()
        assert await refusal(server.result("j")) == (FORBIDDEN, "job is not complete: status is Running")


@pytest.mark.spec("W-CC-47")
async def test_the_result_of_a_job_that_never_ran_says_when_it_was_cancelled() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        server.clock.advance_ms(10)
        await server.cancel("j")
        now_ms = server.clock.now_ms()
        assert await server.result("j") == pb.GetJobResultResponse(
            id="j",
            status=pb.JOB_STATUS_CANCELLED,
            finished_at_ms=now_ms,
            cancelled=pb.JobCancelled(cancelled_at_ms=now_ms),
        )


@pytest.mark.spec("W-CC-46")
async def test_a_job_cancelled_between_retries_ends_as_cancelled_in_every_view() -> None:
    """The reference shows the result of the last attempt, which failed."""
    async with rpc_server() as server:
        await server.enqueue("j", retry_policy=ONE_RETRY)
        await server.report(await server.lease_one(), failure=BROKEN)
        await server.cancel("j")
        assert (await server.job("j")).status == pb.JOB_STATUS_CANCELLED
        assert (await server.result("j")).WhichOneof("result") == "cancelled"


async def test_failure_without_data_has_empty_error_data() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        await server.report(await server.lease_one(), failure=pb.Failure(code="X"))
        failure = (await server.result("j")).failure
        assert failure.HasField("error_data")
        assert failure.error_data.msgpack == b""


# Cancel


@pytest.mark.spec("W-CC-45")
async def test_a_waiting_job_is_cancelled_at_once() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        start_at_ms = server.clock.now_ms()
        server.clock.advance_ms(10)
        await server.cancel("j")
        job = await server.job("j")
        assert job.status == pb.JOB_STATUS_CANCELLED
        assert job.next_attempt_starts_after_ms == start_at_ms
        assert await server.lease() == []
        assert await refusal(server.cancel("j")) == (FORBIDDEN, "job is already cancelled")


@pytest.mark.spec("LEA-2", "CAN-3", "CAN-5", "W-CC-50")
async def test_the_worker_of_a_cancelled_job_learns_it_from_its_heartbeat() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        task = await server.lease_one()
        beat = await server.beat(task)
        assert not beat.cancelled
        assert not beat.HasField("cancelled_at_ms")
        await server.cancel("j")
        assert (await server.job("j")).status == pb.JOB_STATUS_RUNNING
        assert await refusal(server.cancel("j")) == (FORBIDDEN, "job is already cancelled")
        cancelled_at_ms = server.clock.now_ms()
        server.clock.advance_ms(5)
        assert await server.beat(task) == pb.HeartbeatResponse(
            cancelled=True, cancelled_at_ms=cancelled_at_ms
        )


@pytest.mark.spec("W-CC-67", "W-CC-68")
@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        ("success", pb.JOB_STATUS_SUCCEEDED),
        ("failure", pb.JOB_STATUS_CANCELLED),
        ("cancelled", pb.JOB_STATUS_CANCELLED),
    ],
)
async def test_how_a_job_that_was_cancelled_while_running_ends(outcome: str, status: Any) -> None:
    """After a failure the reference retries it, and cancels the retry through its first heartbeat."""
    async with rpc_server() as server:
        await server.enqueue("j", retry_policy=ONE_RETRY)
        task = await server.lease_one()
        await server.cancel("j")
        await server.report(task, **{outcome: FINISHED[outcome]})
        assert (await server.job("j")).status == status
        server.clock.advance_ms(60_000)
        assert await server.lease() == []


@pytest.mark.spec("W-CC-51", "W-ERR-15")
@pytest.mark.parametrize("outcome", ["success", "failure"])
async def test_a_job_that_has_ended_cannot_be_cancelled(outcome: str) -> None:
    async with rpc_server() as server:
        await a_finished_job(server, outcome)
        assert await refusal(server.cancel("j")) == (FORBIDDEN, "job is already in terminal state")


@pytest.mark.spec("W-CC-52")
async def test_a_cancellation_that_only_the_worker_reported_can_be_recorded_once() -> None:
    async with rpc_server() as server:
        await a_finished_job(server, "cancelled")
        await server.cancel("j")
        assert await refusal(server.cancel("j")) == (FORBIDDEN, "job is already cancelled")
        assert (await server.job("j")).status == pb.JOB_STATUS_CANCELLED


async def test_heartbeats_keep_a_lease_beyond_its_time() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        task = await server.lease_one()
        for _ in range(3):
            server.clock.advance_ms(9_000)
            await server.beat(task)
        await server.report(task)
        assert (await server.job("j")).status == pb.JOB_STATUS_SUCCEEDED


@pytest.mark.spec("LEA-2", "W-CC-73")
async def test_the_heartbeat_of_another_worker_is_refused() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        task = await server.lease_one()
        assert await refusal(server.beat(task, worker_id="w2")) == (FORBIDDEN, "lease owner mismatch")


# Restart, expedite, delete


@pytest.mark.parametrize("outcome", ["failure", "cancelled"])
async def test_a_restarted_job_runs_again_with_all_its_retries(outcome: str) -> None:
    async with rpc_server() as server:
        await a_finished_job(server, outcome)
        await server.restart("j")
        job = await server.job("j", include_attempts=True)
        assert (job.status, len(job.attempts)) == (pb.JOB_STATUS_SCHEDULED, 1)
        task = await server.lease_one()
        assert (task.attempt_number, task.relative_attempt_number, task.is_last_attempt) == (2, 1, True)
        await server.report(task)
        assert (await server.job("j")).status == pb.JOB_STATUS_SUCCEEDED


@pytest.mark.spec("W-CC-54")
@pytest.mark.parametrize("by_id", [False, True])
async def test_after_a_restart_attempts_are_counted_on_and_the_retries_from_the_beginning(
    by_id: bool,
) -> None:
    """The reference takes both numbers of a lease by id for the same."""
    policy = pb.RetryPolicy(retry_count=1, max_interval_ms=0)
    async with rpc_server() as server:
        await server.enqueue("j", retry_policy=policy)
        numbers = []
        for _ in range(2):
            for _ in range(2):
                task = await (server.lease_by_id() if by_id else server.lease_one())
                numbers.append((task.attempt_number, task.relative_attempt_number, task.is_last_attempt))
                await server.report(task, failure=BROKEN)
            assert (await server.job("j")).status == pb.JOB_STATUS_FAILED
            await server.restart("j")
        assert numbers == [(1, 1, False), (2, 2, True), (3, 1, False), (4, 2, True)]


async def test_a_restarted_job_is_not_cancelled_any_more() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        await server.cancel("j")
        await server.restart("j")
        assert not (await server.beat(await server.lease_one())).cancelled


@pytest.mark.spec("W-CC-53")
async def test_a_job_cancelled_before_its_time_keeps_it_when_restarted() -> None:
    async with rpc_server() as server:
        start_at_ms = server.clock.now_ms() + 60_000
        await server.enqueue("j", start_at_ms=start_at_ms)
        await server.cancel("j")
        await server.restart("j")
        assert (await server.job("j")).next_attempt_starts_after_ms == start_at_ms
        assert await server.lease() == []


@pytest.mark.spec("RST-1")
async def test_what_cannot_be_restarted() -> None:
    async with rpc_server() as server:
        await a_finished_job(server, "success", "done")
        await server.enqueue("running")
        await server.lease_one()
        assert await refusal(server.restart("done")) == (
            FORBIDDEN,
            "cannot restart job done: job already succeeded (status: Succeeded)",
        )
        assert await refusal(server.restart("running")) == (
            FORBIDDEN,
            "cannot restart job running: job is still in progress (status: Running)",
        )


async def test_an_expedited_job_is_due_now_as_the_same_attempt() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", start_at_ms=server.clock.now_ms() + 60_000)
        server.clock.advance_ms(10)
        await server.expedite("j")
        job, now_ms = await server.job("j"), server.clock.now_ms()
        assert (job.next_attempt_starts_after_ms, job.status_changed_at_ms) == (now_ms, now_ms)
        assert (await server.lease_one()).attempt_number == 1


async def test_an_expedited_retry_does_not_wait() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", retry_policy=ONE_RETRY)
        await server.report(await server.lease_one(), failure=BROKEN)
        await server.expedite("j")
        assert (await server.lease_one()).attempt_number == 2


@pytest.mark.spec("EXP-3", "W-CC-55")
async def test_what_cannot_be_expedited_each_for_its_own_reason() -> None:
    async with rpc_server() as server:
        await a_finished_job(server, "success", "done")
        await server.enqueue("running")
        await server.lease_one()
        await server.enqueue("cancelled")
        await server.cancel("cancelled")
        await server.enqueue("ready")
        reasons = {
            "done": "job is already in terminal state (status: Succeeded)",
            "running": "job is currently running (status: Running)",
            "cancelled": "job is cancelled (status: Cancelled)",
            "ready": "task is already ready to run (not future-scheduled) (status: Scheduled)",
        }
        for job_id, reason in reasons.items():
            expected = (FORBIDDEN, f"cannot expedite job {job_id}: {reason}")
            assert await refusal(server.expedite(job_id)) == expected


@pytest.mark.spec("DEL-3", "DEL-4", "W-CC-49")
async def test_a_deleted_job_is_gone_with_its_attempts_and_its_id_is_free() -> None:
    """The reference keeps the attempts, and shows them under the new job."""
    async with rpc_server() as server:
        await a_finished_job(server, "failure")
        await server.delete("j")
        assert await refusal(server.job("j")) == (NOT_FOUND, "job not found")
        await server.delete("j")
        await server.enqueue("j")
        assert list((await server.job("j", include_attempts=True)).attempts) == []
        assert (await server.lease_one()).attempt_number == 1


@pytest.mark.spec("W-CC-48")
async def test_a_running_job_cannot_be_deleted() -> None:
    """The reference says so with INTERNAL."""
    async with rpc_server() as server:
        await server.enqueue("j")
        task = await server.lease_one()
        before = server.rows()
        code, text = await refusal(server.delete("j"))
        assert code is FORBIDDEN
        assert text == "cannot delete job j: job is currently running or has pending requests"
        assert server.rows() == before
        await server.report(task)
        assert (await server.job("j")).status == pb.JOB_STATUS_SUCCEEDED


# Lease by id


@pytest.mark.spec("LSO-1", "W-CC-56")
async def test_a_job_can_be_leased_by_its_id_before_its_time() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", start_at_ms=server.clock.now_ms() + 60_000)
        task = await server.lease_by_id("j")
        assert (task.job_id, task.attempt_number, task.lease_ms) == ("j", 1, 10_000)
        assert (await server.job("j")).status == pb.JOB_STATUS_RUNNING
        await server.report(task)
        assert (await server.job("j")).status == pb.JOB_STATUS_SUCCEEDED


async def test_a_lease_by_id_echoes_the_shard_as_it_was_written() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        written = "{" + server.shard.upper() + "}"
        request = pb.LeaseTaskRequest(shard=written, id="j", worker_id=WORKER)
        task = (await server.stub.LeaseTask(request)).task
        assert task.shard == written
        await server.report(task)


async def test_what_cannot_be_leased_by_id_each_for_its_own_reason() -> None:
    async with rpc_server() as server:
        await a_finished_job(server, "success", "succeeded")
        await a_finished_job(server, "failure", "failed")
        await server.enqueue("running")
        await server.lease_by_id("running")
        await server.enqueue("cancelled")
        await server.cancel("cancelled")
        reasons = {
            "succeeded": "job is already in terminal state (status: Succeeded)",
            "failed": "job is already in terminal state (status: Failed)",
            "running": "job is currently running (status: Running)",
            "cancelled": "job is cancelled (status: Cancelled)",
        }
        for job_id, reason in reasons.items():
            expected = (FORBIDDEN, f"cannot lease job {job_id}: {reason}")
            assert await refusal(server.lease_by_id(job_id)) == expected


@pytest.mark.spec("LEA-18")
async def test_one_of_many_leases_by_id_wins() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        calls = [server.lease_by_id("j", worker_id=f"w{number}") for number in range(10)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(answer, pb.Task) for answer in answers) == 1


# Lease from the queue


@pytest.mark.spec("LSE-8")
async def test_tasks_come_from_all_shards_or_from_the_one_asked() -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        left, right = server.shards
        for number in range(2):
            await server.enqueue(f"l{number}", shard=left, tenant="test-tenant")
            await server.enqueue(f"r{number}", shard=right, tenant="test-tenant-1")
        [only] = await server.lease(1, shard=right)
        assert (only.shard, only.tenant_id) == (right, "test-tenant-1")
        others = await server.lease(10)
        assert sorted(task.job_id for task in others) == sorted({"l0", "l1", "r0", "r1"} - {only.job_id})
        assert all(task.shard == (left if task.job_id.startswith("l") else right) for task in others)


@pytest.mark.spec("LSE-3", "W-CC-59")
async def test_max_tasks_bounds_what_all_shards_give_together() -> None:
    async with rpc_server(shards=3, tenancy=True) as server:
        for shard, tenant in zip(server.shards, IN_EACH_THIRD, strict=True):
            for number in range(2):
                await server.enqueue(f"j{number}", shard=shard, tenant=tenant)
        assert [len(await server.lease(4)), len(await server.lease(10))] == [4, 2]


@pytest.mark.spec("W-CC-60")
async def test_a_shard_that_is_away_keeps_nobody_from_the_tasks_of_the_others() -> None:
    """Away because it is being opened; shards are not split yet, so none is paused."""
    async with rpc_server(shards=2, tenancy=True) as server:
        left, right = server.shards
        await server.enqueue("l", shard=left, tenant="test-tenant")
        await server.enqueue("r", shard=right, tenant="test-tenant-1")
        faults = server.storage.faults
        for number in range(1, 30):
            faults.plan("open", Fault.FAIL_BEFORE, call=faults.calls["open"] + number)
        faults.plan("write", Fault.FAIL_BEFORE)
        await refusal(server.enqueue("lost", shard=left, tenant="test-tenant"))
        await until(lambda: len(server.node.open_shards()) == 1)
        code, text = await refusal(server.lease(shard=left))
        assert (code, text) == (grpc.StatusCode.UNAVAILABLE, "shard not ready: acquisition in progress")
        assert [task.job_id for task in await server.lease(9)] == ["r"]


@pytest.mark.spec("W-CC-61")
async def test_an_idle_server_answers_a_poll_soon() -> None:
    """The fastest of ten counts, since this machine may be busy."""
    async with real_silo() as address, stub_of(address) as stub:
        request = pb.LeaseTasksRequest(worker_id=WORKER, max_tasks=1, task_group=GROUP)
        took_s = []
        for _ in range(10):
            began_s = time.monotonic()
            assert await stub.LeaseTasks(request) == pb.LeaseTasksResponse()
            took_s.append(time.monotonic() - began_s)
        assert min(took_s) < 0.1


async def test_tasks_of_another_group_are_not_handed_out() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", task_group="other")
        assert await server.lease() == []
        assert [task.job_id for task in await server.lease(task_group="other")] == ["j"]


@pytest.mark.parametrize("shard", [None, "00000000-0000-0000-0000-000000000001"])
async def test_a_waiting_worker_gets_a_job_as_soon_as_it_is_enqueued(shard: str | None) -> None:
    async with rpc_server() as server, asyncio.timeout(10):
        request = pb.LeaseTasksRequest(shard=shard, worker_id=WORKER, max_tasks=5, task_group=GROUP)
        waiting = server.stub.LeaseTasks(request, metadata=LONG)
        await until(server.has_waiter)
        assert not waiting.done()
        await server.enqueue("j")  # Time stands still: only the work can wake it.
        assert [task.job_id for task in (await waiting).tasks] == ["j"]


async def test_a_waiting_worker_gets_a_delayed_job_when_it_is_due() -> None:
    async with rpc_server() as server, asyncio.timeout(10):
        await server.enqueue("j", start_at_ms=server.clock.now_ms() + 20_000)
        waiting = server.stub.LeaseTasks(
            pb.LeaseTasksRequest(worker_id=WORKER, max_tasks=1, task_group=GROUP), metadata=LONG
        )
        await until(server.has_waiter)
        server.clock.advance_ms(20_000)
        assert [task.job_id for task in (await waiting).tasks] == ["j"]


@pytest.mark.spec("LSE-10", "W-CC-61")
@pytest.mark.parametrize(
    ("metadata", "wait_ms"), [((), 25), (LONG, 30_000), ((("silo-wait-ms", "9" * 30),), 30_000)]
)
async def test_an_idle_lease_call_waits_as_it_asks_and_half_a_minute_at_most(
    metadata: Any, wait_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference answers at once, and cannot be asked for more."""
    async with rpc_server() as server, asyncio.timeout(10):
        asked: list[int] = []
        lease_anywhere = server.node.lease_anywhere

        async def hurried(**given: Any) -> Any:
            asked.append(given["wait_ms"])
            return await lease_anywhere(**given | {"wait_ms": 20})

        monkeypatch.setattr(server.node, "lease_anywhere", hurried)
        request = pb.LeaseTasksRequest(worker_id=WORKER, max_tasks=1, task_group=GROUP)
        assert list((await server.stub.LeaseTasks(request, metadata=metadata)).tasks) == []
        assert asked == [wait_ms]


# Ids, sizes, resets


@pytest.mark.spec("ENQ-8", "W-CC-39")
async def test_exactly_one_of_many_enqueues_of_an_id_wins() -> None:
    """The losers get ALREADY_EXISTS, where the reference sends INTERNAL with the same text."""
    async with rpc_server() as server:
        calls = [server.enqueue("j", payload=packed(bytes([number]))) for number in range(20)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        winners = [number for number, answer in enumerate(answers) if answer == "j"]
        assert len(winners) == 1
        errors = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert {(error.code(), error.details()) for error in errors} == {
            (grpc.StatusCode.ALREADY_EXISTS, "job already exists with id j")
        }
        assert len(errors) == 19
        assert (await server.job("j")).payload.msgpack == bytes(winners)


async def test_an_id_stays_taken_after_its_job_has_ended() -> None:
    async with rpc_server() as server:
        await a_finished_job(server, "success")
        assert await refusal(server.enqueue("j")) == (
            grpc.StatusCode.ALREADY_EXISTS,
            "job already exists with id j",
        )


@pytest.mark.spec("ENT-10", "ENT-25", "W-CC-8")
async def test_five_mebibytes_go_in_and_come_back_unchanged() -> None:
    payload, result = random.Random(1).randbytes(5 << 20), random.Random(2).randbytes(5 << 20)
    async with rpc_server() as server:
        await server.enqueue("j", payload=packed(payload))
        assert (await server.job("j")).payload.msgpack == payload
        task = await server.lease_one()
        assert task.payload.msgpack == payload
        await server.report(task, success=packed(result))
        job = await server.job("j", include_attempts=True)
        assert (job.payload.msgpack, job.result.msgpack, job.attempts[0].result.msgpack) == (
            payload,
            result,
            result,
        )
        assert (await server.result("j")).success_data.msgpack == result


@pytest.mark.spec("W-CC-98")
async def test_the_extension_that_means_no_value_comes_back_as_it_was_stored() -> None:
    stored = b"\xd4\x00\x00"
    async with rpc_server() as server:
        await server.enqueue("j", payload=packed(stored))
        assert (await server.job("j")).payload.msgpack == stored
        task = await server.lease_one()
        assert task.payload.msgpack == stored
        assert decode(task.payload.msgpack, field="payload") is None
        await server.report(task, success=packed(stored))
        assert (await server.result("j")).success_data.msgpack == stored


@pytest.mark.spec("ENQ-9")
async def test_two_hundred_enqueues_at_once_on_one_connection_all_succeed() -> None:
    async with rpc_server() as server:
        ids = await asyncio.gather(*(server.enqueue(f"j{number}") for number in range(200)))
        assert len(set(ids)) == 200
        assert server.node.open_shards()[0].counts.total_jobs == 200


async def test_large_tasks_of_several_shards_come_in_answers_that_can_be_sent() -> None:
    async with rpc_server(shards=3, tenancy=True) as server:
        assert await server.lease() == []  # From now on jobs of this group are kept at hand.
        payload = bytes(24 << 20)
        for shard, tenant in zip(server.shards, IN_EACH_THIRD, strict=True):
            for number in range(2):
                job = a_job(str(number), tenant=tenant)
                await server.node.shard(shard).enqueue(msgspec.structs.replace(job, payload=payload))
        assert await server.lease(1000)


@pytest.mark.spec("W-CC-90")
async def test_a_reset_empties_all_shards_and_they_accept_work_at_once() -> None:
    async with rpc_server(shards=8, tenancy=True, dev_mode=True) as server:
        homes = dict(zip(server.shards, IN_EACH_EIGHTH, strict=True))
        for round in range(5):
            for shard, tenant in homes.items():
                await server.enqueue("j", shard=shard, tenant=tenant)
            tasks = await server.lease(8)
            assert {task.shard for task in tasks} == homes.keys()
            assert (await server.stub.ResetShards(pb.ResetShardsRequest())).shards_reset == 8
            for shard, tenant in homes.items():
                call = server.job("j", shard=shard, tenant=tenant)
                assert await refusal(call) == (NOT_FOUND, "job not found"), round
            for task in tasks:
                assert await refusal(server.report(task)) == (NOT_FOUND, "lease not found")
            info = await server.stub.GetNodeInfo(pb.GetNodeInfoRequest())
            assert [shard.total_jobs for shard in info.owned_shards] == [0] * 8
            cluster = await server.stub.GetClusterInfo(pb.GetClusterInfoRequest())
            assert [owner.shard_id for owner in cluster.shard_owners] == server.shards
        for shard, tenant in homes.items():
            await server.enqueue("j", shard=shard, tenant=tenant)


# Clients that go away


@pytest.mark.spec("LSE-18", "W-CC-62")
async def test_a_worker_that_hangs_up_while_it_waits_leaves_the_next_job_to_others() -> None:
    async with rpc_server() as server:
        for fields in ({}, {"shard": server.shard}):
            request = pb.LeaseTasksRequest(worker_id="gone", max_tasks=1, task_group=GROUP, **fields)
            waiting = server.stub.LeaseTasks(request, metadata=LONG)
            await until(server.has_waiter)
            waiting.cancel()
            await until(lambda: not server.has_waiter())
        await server.enqueue("j")
        assert (await server.lease_one()).job_id == "j"


@pytest.mark.spec("W-CC-62")
async def test_a_call_whose_deadline_passes_leaves_the_next_job_to_others() -> None:
    async with rpc_server() as server:
        request = pb.LeaseTasksRequest(worker_id="gone", max_tasks=1, task_group=GROUP)
        code, _ = await refusal(server.stub.LeaseTasks(request, metadata=LONG, timeout=0.05))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: not server.has_waiter())
        await server.enqueue("j")
        assert (await server.lease_one()).job_id == "j"


async def test_a_client_that_hangs_up_during_its_enqueue_leaves_a_job_or_none_and_no_half() -> None:
    async with rpc_server() as server:
        for number in range(50):
            call = server.stub.Enqueue(
                pb.EnqueueRequest(shard=server.shard, id=f"j{number}", task_group=GROUP)
            )
            for _ in range(number % 10):
                await asyncio.sleep(0)
            call.cancel()
        await server.enqueue("last")
        leased = await server.lease(100)
        assert len(leased) == server.node.open_shards()[0].counts.total_jobs
        for task in leased:
            await server.report(task)
        assert "last" in {task.job_id for task in leased}


@pytest.mark.spec("LSE-17", "W-CC-62")
async def test_tasks_of_a_worker_that_hung_up_during_its_lease_run_again_after_the_lease() -> None:
    async with rpc_server() as server:
        policy = pb.RetryPolicy(retry_count=100, max_interval_ms=0)
        for number in range(20):
            await server.enqueue(f"j{number}", retry_policy=policy)
        request = pb.LeaseTasksRequest(worker_id="gone", max_tasks=1, task_group=GROUP)
        for number in range(20):
            call = server.stub.LeaseTasks(request, metadata=AT_ONCE)
            for _ in range(number):
                await asyncio.sleep(0)
            call.cancel()
        await server.stub.GetNodeInfo(pb.GetNodeInfoRequest())
        found = await pass_time(server, 10_000, ready=20)
        assert sorted(task.job_id for task in found) == sorted(f"j{number}" for number in range(20))
