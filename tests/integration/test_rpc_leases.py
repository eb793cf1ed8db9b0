"""Leases and limits over a real socket: what workers see, what is refused, and where a tenant's data is."""

from typing import Any  # Messages of grpc are untyped.

import grpc
import pytest

from silo.model.counts import QueueCounts
from silo.model.job import DEFAULT_TENANT
from silo.storage import codec, keys
from silo.wire import validate
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.integration.rpc_server import AT_ONCE, GROUP, WORKER, RpcServer, packed, refusal, rpc_server
from tests.invariants import check_snapshot, jobs_in

INVALID = grpc.StatusCode.INVALID_ARGUMENT
FORBIDDEN = grpc.StatusCode.FAILED_PRECONDITION
NOT_FOUND = grpc.StatusCode.NOT_FOUND
IN_LEFT, IN_RIGHT = "test-tenant", "test-tenant-1"  # Hashes 7bda…, c9e3…: either side of 8000….


def fixed(key: str, max_concurrency: int = 1) -> pb.Limit:
    return pb.Limit(concurrency=pb.ConcurrencyLimit(key=key, max_concurrency=max_concurrency))


def floating(key: str, default: int, **fields: Any) -> pb.Limit:
    limit = pb.FloatingConcurrencyLimit(key=key, default_max_concurrency=default, **fields)
    return pb.Limit(floating_concurrency=limit)


def rate(name: str = "n", **fields: Any) -> pb.Limit:
    return pb.Limit(rate_limit=pb.GubernatorRateLimit(name=name, **fields))


async def lease_refresh(server: RpcServer) -> Any:
    """The one refresh that is ready, leased."""
    request = pb.LeaseTasksRequest(worker_id=WORKER, max_tasks=1, task_group=GROUP)
    [task] = (await server.stub.LeaseTasks(request, metadata=AT_ONCE)).refresh_tasks
    return task


# What a worker gets


@pytest.mark.spec("LSE-15")
async def test_a_task_shows_the_limits_of_its_job_in_their_order() -> None:
    policy = pb.RateLimitRetryPolicy(initial_backoff_ms=1, max_backoff_ms=2, backoff_multiplier=3)
    limits = [
        fixed("b", 7),
        rate(unique_key="u", limit=5, duration_ms=1_000, hits=1, retry_policy=policy),
        floating("a", 3, refresh_interval_ms=9, metadata={"k": "v"}),
    ]
    async with rpc_server() as server:
        await server.enqueue("j", limits=limits)
        assert list((await server.lease_one()).limits) == limits
        assert list((await server.job("j")).limits) == limits


@pytest.mark.spec("LEA-1", "LEA-6")
async def test_every_lease_lasts_ten_seconds_and_says_so() -> None:
    async with rpc_server() as server:
        await server.enqueue("waits", limits=[floating("f", 0)])
        refresh = await lease_refresh(server)
        await server.enqueue("j")
        await server.enqueue("by-id")
        by_id = await server.lease_by_id("by-id")
        tasks = [await server.lease_one(), by_id, refresh]
        assert [task.lease_ms for task in tasks] == [10_000] * 3
        server.clock.advance_ms(9_999)
        assert [await server.beat(task) for task in tasks] == [pb.HeartbeatResponse(cancelled=False)] * 3
        server.clock.advance_ms(9_999)
        for task in tasks[:2]:
            await server.report(task)


@pytest.mark.spec("W-CC-74", "W-CC-50")
async def test_the_worker_of_a_cancelled_job_keeps_its_lease_as_long_as_it_sends_heartbeats() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        task = await server.lease_one()
        cancelled_at_ms = server.clock.now_ms()
        await server.cancel("j")
        for _ in range(3):
            server.clock.advance_ms(9_000)
            assert await server.beat(task) == pb.HeartbeatResponse(
                cancelled=True, cancelled_at_ms=cancelled_at_ms
            )
            assert (await server.job("j")).status == pb.JOB_STATUS_RUNNING
        await server.report(task, cancelled=pb.Cancelled())
        assert (await server.job("j")).status == pb.JOB_STATUS_CANCELLED


@pytest.mark.spec("W-CC-72")
@pytest.mark.parametrize("tenant", [None, IN_LEFT])
async def test_a_cancelled_job_whose_worker_vanished_ends_as_cancelled_for_every_tenant(
    tenant: str | None,
) -> None:
    """The reference does not find the cancellation of a tenant, and retries the job."""
    async with rpc_server(tenancy=tenant is not None) as server:
        await server.enqueue("j", tenant=tenant, retry_policy=pb.RetryPolicy(retry_count=9))
        task = await server.lease_one()
        await server.stub.CancelJob(pb.CancelJobRequest(shard=server.shard, id="j", tenant=tenant))
        server.clock.advance_ms(10_000)
        await server.node.shard(server.shard).tick()
        job = await server.job("j", tenant=tenant, include_attempts=True)
        assert job.status == pb.JOB_STATUS_CANCELLED
        assert [attempt.status for attempt in job.attempts] == [pb.ATTEMPT_STATUS_CANCELLED]
        assert await refusal(server.beat(task)) == (NOT_FOUND, "lease not found")
        assert await server.lease() == []


@pytest.mark.spec("LSE-8")
async def test_a_poll_asks_the_shards_in_another_order_each_time() -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        for number in range(12):
            await server.enqueue(f"l{number}", shard=server.shards[0], tenant=IN_LEFT)
            await server.enqueue(f"r{number}", shard=server.shards[1], tenant=IN_RIGHT)
        firsts = [(await server.lease_one()).shard for _ in range(12)]
        assert set(firsts) == set(server.shards)
        both = await server.lease(100)
        assert len(both) == 12
        assert {task.shard for task in both} == set(server.shards)


# Whose lease, what kind


@pytest.mark.spec("LEA-7")
async def test_the_tenant_of_a_workers_call_finds_the_shard_and_the_lease_says_which_job_is_meant() -> None:
    async with rpc_server(tenancy=True) as server:
        for tenant in ("a", "b"):
            await server.enqueue("j", tenant=tenant)
        tasks = {task.tenant_id: task for task in await server.lease(2)}
        task = tasks["a"]
        task.tenant_id = "b"
        assert not (await server.beat(task)).cancelled
        await server.report(task)
        assert (await server.job("j", tenant="a")).status == pb.JOB_STATUS_SUCCEEDED
        assert (await server.job("j", tenant="b")).status == pb.JOB_STATUS_RUNNING


@pytest.mark.spec("LEA-22", "W-CC-65")
@pytest.mark.parametrize("is_leased", [True, False])
async def test_a_report_without_an_outcome_is_refused_and_ends_nothing(is_leased: bool) -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        task_id = (await server.lease_one()).id if is_leased else "none"
        before = server.rows()
        for method in ("ReportOutcome", "ReportRefreshOutcome"):
            request = getattr(pb, f"{method}Request")(shard=server.shard, task_id=task_id)
            assert await refusal(getattr(server.stub, method)(request)) == (INVALID, "missing outcome")
        assert server.rows() == before


@pytest.mark.spec("LEA-24")
async def test_a_report_of_the_wrong_kind_is_refused_and_the_right_one_still_counts() -> None:
    """The reference takes a job's outcome for a refresh too, and writes it for a job without id."""
    async with rpc_server() as server:
        await server.enqueue("waits", limits=[floating("f", 0)])
        refresh = await lease_refresh(server)
        await server.enqueue("j")
        task = await server.lease_one()
        before = server.rows()

        code, text = await refusal(server.report(refresh))
        assert (code, text) == (FORBIDDEN, "task is the refresh of a floating limit")
        as_refresh = pb.ReportRefreshOutcomeRequest(
            shard=server.shard, task_id=task.id, success=pb.RefreshSuccess(new_max_concurrency=1)
        )
        assert await refusal(server.stub.ReportRefreshOutcome(as_refresh)) == (
            grpc.StatusCode.INTERNAL,
            "codec error: task is not a RefreshFloatingLimit",
        )
        assert server.rows() == before

        await server.report(task)
        as_refresh.task_id = refresh.id
        await server.stub.ReportRefreshOutcome(as_refresh)
        assert (await server.lease_one()).job_id == "waits"


@pytest.mark.spec("LEA-19", "LEA-21")
async def test_a_late_report_with_a_tenant_finds_no_lease_and_no_ticket_to_give_back() -> None:
    async with rpc_server(tenancy=True) as server:
        for job_id in ("lost", "next"):
            await server.enqueue(job_id, tenant="t", limits=[fixed("k")])
        lost = await server.lease_one()
        server.clock.advance_ms(10_000)
        await server.node.shard(server.shard).tick()
        [task] = await server.lease()
        assert task.job_id == "next"
        before = server.rows()
        assert await refusal(server.report(lost)) == (NOT_FOUND, "lease not found")
        assert await refusal(server.beat(lost)) == (NOT_FOUND, "lease not found")
        assert server.rows() == before
        counts = before[server.shard][keys.queue_counts_key("t", "k")]
        assert codec.decode(QueueCounts, counts).holders == 1


# What is accepted


STRANGE = [
    fixed("", 0),
    fixed("", 2**32 - 1),
    fixed("k\0", 0),
    floating("", 0, refresh_interval_ms=-(2**63)),
    floating("f", 2**32 - 1, refresh_interval_ms=2**63 - 1, metadata={"": ""}),
    rate("", unique_key=""),
    rate(limit=-(2**63), duration_ms=-(2**63), hits=-(2**31), behavior=-1 & ~4),
    rate(limit=2**63 - 1, duration_ms=2**63 - 1, hits=2**31 - 1),
    rate(limit=0, duration_ms=0, hits=0),
]


@pytest.mark.spec("ENT-14")
@pytest.mark.parametrize("limit", [*STRANGE, None], ids=lambda limit: str(limit).replace("\n", " ")[:60])
async def test_strange_limits_are_taken_as_they_are(limit: Any) -> None:
    """The reference takes any number of them; here at most 256, and calendar windows must be real ones."""
    limits = [limit] if limit is not None else STRANGE * 28
    for given in limits:
        if given.HasField("rate_limit"):
            given.rate_limit.retry_policy.SetInParent()
    async with rpc_server() as server:
        await server.enqueue("j", limits=limits)
        assert list((await server.job("j")).limits) == limits
        for _ in range(3):
            server.clock.advance_ms(60_000)
            await server.node.shard(server.shard).tick()
            await server.lease(9)
        assert list((await server.job("j")).limits) == limits
        check_snapshot(server.rows()[server.shard], now_ms=server.clock.now_ms())


@pytest.mark.spec("ENQ-5")
async def test_the_largest_payload_goes_in_and_out() -> None:
    """At most 126 MiB, so that its task fits into a message of 128 MiB."""
    payload = b"\xc6" + bytes(validate.PAYLOAD_BYTES_MAX - 1)
    async with rpc_server() as server:
        await server.enqueue("j", payload=packed(payload))
        assert (await server.lease_one()).payload.msgpack == payload


# Where the data of a tenant is


@pytest.mark.spec("ENT-2")
async def test_all_that_concerns_a_tenant_is_in_its_shard_and_no_other() -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        left, right = server.shards
        untouched = server.rows()[right]
        limits = [fixed("k"), floating("f", 1), rate(limit=9, duration_ms=60_000, hits=1)]
        for job_id in ("a", "b", "c"):
            await server.enqueue(job_id, tenant=IN_LEFT, limits=limits, metadata={"k": "v"})
        await server.report(await server.lease_one(), failure=pb.Failure(code="E"))
        await server.lease(9)
        code, text = await refusal(server.enqueue("d", shard=right, tenant=IN_LEFT))
        assert (code, text.partition(";")[0]) == (
            FORBIDDEN,
            f"tenant '{IN_LEFT}' is not within shard {right} range [8000000000000000, +∞)",
        )
        assert server.rows()[right] == untouched
        assert {name[0] for name in jobs_in(server.rows()[left])} == {IN_LEFT}


@pytest.mark.spec("ENT-3")
async def test_without_tenancy_every_record_is_of_the_default_tenant() -> None:
    async with rpc_server() as server:
        limits = [fixed("k"), floating("f", 1), rate(limit=1, duration_ms=60_000, hits=1)]
        await server.enqueue("ran", limits=limits, metadata={"k": "v"})
        await server.report(await server.lease_one())
        await server.enqueue("holds", limits=limits[:2])
        await server.enqueue("waits", limits=limits[:2])
        await server.enqueue("throttled", limits=limits[2:])
        rows = server.rows()[server.shard]
        assert {name[0] for name in jobs_in(rows)} == {DEFAULT_TENANT}
        begin_with_the_tenant = (b"j", b"i", b"m", b"h", b"r", b"n", b"f", b"b", b"v", b"c")
        assert {row[:1] for row in rows} >= set(begin_with_the_tenant)
        tenants = {keys.read_text(row, 1)[0] for row in rows if row[:1] in begin_with_the_tenant}
        assert tenants == {DEFAULT_TENANT}
