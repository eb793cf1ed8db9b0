"""Limits over a real socket: as they are shown, refreshed, and taken away by force."""

from typing import Any  # Messages of grpc are untyped.

import grpc
import msgpack
import pytest

from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.integration.rpc_server import AT_ONCE, GROUP, WORKER, RpcServer, packed, refusal, rpc_server

NOT_FOUND = grpc.StatusCode.NOT_FOUND
IN_LEFT, IN_RIGHT = "test-tenant", "test-tenant-1"  # Of two shards, the one that each lives in.
BROKEN = pb.RefreshFailure(code="BROKEN", message="no answer")


def at_most(maximum: int, key: str = "k") -> pb.Limit:
    return pb.Limit(concurrency=pb.ConcurrencyLimit(key=key, max_concurrency=maximum))


def floating(maximum: int, key: str = "k", **fields: Any) -> pb.Limit:
    values = {"refresh_interval_ms": 60_000} | fields
    limit = pb.FloatingConcurrencyLimit(key=key, default_max_concurrency=maximum, **values)
    return pb.Limit(floating_concurrency=limit)


def a_rate(limit: int, **fields: Any) -> pb.Limit:
    values = {"name": "n", "unique_key": "u", "duration_ms": 1_000, "hits": 1} | fields
    return pb.Limit(rate_limit=pb.GubernatorRateLimit(limit=limit, **values))


async def refreshes(server: RpcServer, **fields: Any) -> list[pb.RefreshFloatingLimitTask]:
    """Refresh tasks that are ready now, leased."""
    values = {"worker_id": WORKER, "max_tasks": 9, "task_group": GROUP} | fields
    answer = await server.stub.LeaseTasks(pb.LeaseTasksRequest(**values), metadata=AT_ONCE)
    return list(answer.refresh_tasks)


async def report_refresh(server: RpcServer, task: pb.RefreshFloatingLimitTask, outcome: Any) -> None:
    if isinstance(outcome, int):
        fields = {"success": pb.RefreshSuccess(new_max_concurrency=outcome)}
    else:
        fields = {"failure": outcome}
    await server.stub.ReportRefreshOutcome(
        pb.ReportRefreshOutcomeRequest(shard=task.shard, task_id=task.id, tenant_id=task.tenant_id, **fields)
    )


async def drop_holders(server: RpcServer, **fields: Any) -> int:
    request = pb.DropTenantHoldersRequest(**{"shard": server.shard} | fields)
    return (await server.stub.DropTenantHolders(request)).holders_dropped


async def a_refresh(server: RpcServer, **fields: Any) -> pb.RefreshFloatingLimitTask:
    """The refresh of a limit of 1: one job holds the ticket, in a group that nobody polls, and `j` waits."""
    await server.enqueue("holder", limits=[floating(1)], task_group="nobody", **fields)
    await server.enqueue("j", limits=[floating(1)], **fields)
    [task] = await refreshes(server)
    return task


# As jobs and tasks show them


@pytest.mark.spec("FLT-3", "LSE-15", "RD-1")
async def test_limits_are_shown_by_jobs_and_tasks_as_they_were_given_and_in_their_order() -> None:
    async with rpc_server() as server:
        policy = pb.RateLimitRetryPolicy(
            initial_backoff_ms=1, max_backoff_ms=2, backoff_multiplier=1.5, max_retries=3
        )
        limits = [
            a_rate(2**63 - 1, duration_ms=2, hits=0, behavior=17, retry_policy=policy),
            floating(2**32 - 1, "f", refresh_interval_ms=7, metadata={"b": "2", "a": "1"}),
            at_most(5),
            a_rate(9, name="leaky", algorithm=pb.GUBERNATOR_ALGORITHM_LEAKY_BUCKET, retry_policy=policy),
        ]
        await server.enqueue("j", limits=limits)
        assert list((await server.job("j")).limits) == limits
        assert list((await server.lease_one()).limits) == limits
        await server.enqueue("i", limits=limits, start_at_ms=server.clock.now_ms() + 1_000)
        assert list((await server.job("i")).limits) == limits


@pytest.mark.spec("W-CC-41")
async def test_a_limit_that_says_nothing_is_not_there() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", limits=[pb.Limit(), at_most(1), pb.Limit()])
        assert list((await server.job("j")).limits) == [at_most(1)]
        assert list((await server.lease_one()).limits) == [at_most(1)]


@pytest.mark.spec("W-CC-42")
async def test_a_rate_limit_without_a_retry_policy_is_shown_with_the_default_one() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", limits=[a_rate(5)])
        policy = pb.RateLimitRetryPolicy(
            initial_backoff_ms=100, max_backoff_ms=30_000, backoff_multiplier=2.0, max_retries=0
        )
        assert list((await server.job("j")).limits) == [a_rate(5, retry_policy=policy)]
        assert list((await server.lease_one()).limits) == [a_rate(5, retry_policy=policy)]


@pytest.mark.spec("FLT-3", "FLT-2")
async def test_each_job_shows_its_own_definition_of_a_floating_limit_whatever_is_in_force() -> None:
    async with rpc_server() as server:
        for number in (1, 2, 3):
            limit = floating(number, refresh_interval_ms=number, metadata={"n": str(number)})
            await server.enqueue(f"j{number}", limits=[limit])
        [task] = await refreshes(server)
        assert (task.current_max_concurrency, task.metadata) == (1, {"n": "1"})
        await report_refresh(server, task, 9)
        for number in (1, 2, 3):
            [limit] = (await server.job(f"j{number}")).limits
            assert limit.floating_concurrency.default_max_concurrency == number
            assert limit.floating_concurrency.metadata == {"n": str(number)}


@pytest.mark.spec("CON-6", "CNT-3")
async def test_a_job_that_no_limit_lets_through_is_scheduled_and_can_be_cancelled() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", limits=[at_most(0)])
        assert await server.lease() == []
        assert (await server.job("j")).status == pb.JOB_STATUS_SCHEDULED
        await server.cancel("j")
        assert (await server.job("j")).status == pb.JOB_STATUS_CANCELLED
        assert server.node.shard(server.shard).counts.completed_jobs == 1


@pytest.mark.spec("RAT-5")
async def test_a_job_that_stays_over_its_rate_limit_fails_with_a_code() -> None:
    async with rpc_server() as server:
        policy = pb.RateLimitRetryPolicy(initial_backoff_ms=100, max_backoff_ms=100, max_retries=1)
        await server.enqueue("j", limits=[a_rate(0, retry_policy=policy)])
        server.clock.advance_ms(100)
        await server.node.shard(server.shard).tick()
        failure = (await server.result("j")).failure
        assert failure.error_code == "RATE_LIMIT_EXCEEDED"
        text = msgpack.unpackb(failure.error_data.msgpack)
        assert text == "over rate limit 'n' in each of 2 checks"


@pytest.mark.spec("W-CC-56")
async def test_a_job_that_waits_for_a_ticket_cannot_be_leased_by_its_id() -> None:
    async with rpc_server() as server:
        await server.enqueue("holder", limits=[at_most(1)])
        await server.enqueue("j", limits=[at_most(1)])
        before = server.rows()
        assert await refusal(server.lease_by_id("j")) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "cannot lease job j: job has no pending task in queue (status: Scheduled)",
        )
        assert server.rows() == before


# Refreshes


@pytest.mark.spec("FLT-13", "FLT-10")
async def test_a_refresh_comes_beside_jobs_with_all_that_its_worker_needs() -> None:
    async with rpc_server() as server:
        for number in range(2):
            await server.enqueue(f"j{number}", limits=[floating(1, metadata={"m": "1"})])
        answer = await server.stub.LeaseTasks(
            pb.LeaseTasksRequest(worker_id=WORKER, max_tasks=5, task_group=GROUP), metadata=AT_ONCE
        )
        assert [task.job_id for task in answer.tasks] == ["j0"]
        [task] = answer.refresh_tasks
        assert task == pb.RefreshFloatingLimitTask(
            id=task.id,
            queue_key="k",
            current_max_concurrency=1,
            last_refreshed_at_ms=0,
            metadata={"m": "1"},
            lease_ms=10_000,
            shard=server.shard,
            task_group=GROUP,
        )
        assert not task.HasField("tenant_id")
        beat = await server.stub.Heartbeat(
            pb.HeartbeatRequest(shard=server.shard, task_id=task.id, worker_id=WORKER)
        )
        assert beat == pb.HeartbeatResponse(cancelled=False)
        assert await refreshes(server) == []


@pytest.mark.spec("W-CC-63")
async def test_a_refresh_does_not_count_against_the_jobs_that_a_poll_asks_for() -> None:
    async with rpc_server() as server:
        await server.enqueue("waits", limits=[floating(0)])
        for number in range(2):
            await server.enqueue(f"j{number}")
        answer = await server.stub.LeaseTasks(
            pb.LeaseTasksRequest(worker_id=WORKER, max_tasks=2, task_group=GROUP), metadata=AT_ONCE
        )
        assert [task.job_id for task in answer.tasks] == ["j0", "j1"]
        assert [task.queue_key for task in answer.refresh_tasks] == ["k"]


@pytest.mark.spec("FLT-14", "FLT-13")
async def test_a_refresh_with_tenancy_names_its_tenant_and_a_new_maximum_counts_at_once() -> None:
    async with rpc_server(tenancy=True) as server:
        task = await a_refresh(server, tenant=IN_LEFT)
        assert task.tenant_id == IN_LEFT
        await report_refresh(server, task, 2)
        assert [task.job_id for task in await server.lease(9)] == ["j"]


@pytest.mark.spec("FLT-15", "FLT-17")
async def test_a_failed_refresh_is_offered_again_after_a_second() -> None:
    async with rpc_server() as server:
        first = await a_refresh(server)
        await report_refresh(server, first, BROKEN)
        assert await refreshes(server) == []
        server.clock.advance_ms(1_000)
        await server.node.shard(server.shard).tick()
        [second] = await refreshes(server)
        assert second.id != first.id
        assert second.current_max_concurrency == 1


@pytest.mark.spec("FLT-18")
async def test_a_refresh_that_nobody_has_is_not_found_and_a_jobs_task_is_none() -> None:
    async with rpc_server() as server:
        refresh = await a_refresh(server)
        await report_refresh(server, refresh, 1)
        assert await refusal(report_refresh(server, refresh, 1)) == (NOT_FOUND, "lease not found")
        await server.enqueue("plain")
        job = await server.lease_one()
        refresh.id = job.id
        assert await refusal(report_refresh(server, refresh, 1)) == (
            grpc.StatusCode.INTERNAL,
            "codec error: task is not a RefreshFloatingLimit",
        )
        await server.report(job)


async def test_a_report_of_a_refresh_without_outcome_is_a_wrong_request() -> None:
    async with rpc_server() as server:
        task = await a_refresh(server)
        call = server.stub.ReportRefreshOutcome(
            pb.ReportRefreshOutcomeRequest(shard=server.shard, task_id=task.id)
        )
        assert await refusal(call) == (grpc.StatusCode.INVALID_ARGUMENT, "missing outcome")
        await report_refresh(server, task, 1)


@pytest.mark.spec("FLT-20")
async def test_a_refresh_whose_worker_vanished_is_offered_to_the_next() -> None:
    async with rpc_server() as server:
        lost = await a_refresh(server)
        server.clock.advance_ms(10_000)
        await server.node.shard(server.shard).tick()
        [again] = await refreshes(server, worker_id="w2")
        assert again.id != lost.id
        assert await refusal(report_refresh(server, lost, 5)) == (NOT_FOUND, "lease not found")
        await report_refresh(server, again, 5)


# Tickets taken by force


@pytest.mark.spec("CON-39", "CON-40", "CON-41")
async def test_dropping_the_tickets_of_a_tenant_counts_them_and_lets_those_who_wait_run() -> None:
    async with rpc_server() as server:
        assert await drop_holders(server) == 0
        await server.enqueue("running", limits=[at_most(1), at_most(1, "m")])
        running = await server.lease_one()
        await server.enqueue("waiting", limits=[at_most(1)])
        assert await server.lease() == []
        assert await drop_holders(server) == 2
        waiting = await server.lease_one()
        assert waiting.job_id == "waiting"
        for task in (running, waiting):
            assert (await server.job(task.job_id)).status == pb.JOB_STATUS_RUNNING
            await server.report(task, success=packed(b"\x01"))
        assert await drop_holders(server) == 0


@pytest.mark.spec("CON-40")
async def test_dropping_the_tickets_of_a_tenant_leaves_those_of_others() -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        left, right = server.shards
        await server.enqueue("j", shard=left, tenant=IN_LEFT, limits=[at_most(1)])
        await server.enqueue("j", shard=right, tenant=IN_RIGHT, limits=[at_most(1)])
        assert await drop_holders(server, shard=right, tenant=IN_RIGHT) == 1
        assert await drop_holders(server, shard=right, tenant=IN_RIGHT) == 0
        assert await drop_holders(server, shard=left, tenant=IN_LEFT) == 1


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"shard": "x"}, grpc.StatusCode.INVALID_ARGUMENT, "invalid shard ID: x"),
        ({"tenant": ""}, grpc.StatusCode.INVALID_ARGUMENT, "tenant id required"),
    ],
)
async def test_a_wrong_call_takes_no_ticket_away(fields: Any, code: grpc.StatusCode, text: str) -> None:
    async with rpc_server(tenancy=True) as server:
        await server.enqueue("j", tenant=IN_LEFT, limits=[at_most(1)])
        before = server.rows()
        assert await refusal(drop_holders(server, **fields)) == (code, text)
        assert server.rows() == before
