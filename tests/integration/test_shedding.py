"""Short of memory: what a server refuses, and what goes on."""

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from silo import ShardRouting, SiloGRPCClient, SiloResourceExhaustedError
from silo.cli.server_process import free_port
from silo.node.memory import LARGE_BYTES, Memory
from silo.rpc import intake
from silo.rpc.auth import EVERYTHING, Access, Tokens
from silo.rpc.server import Security
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.integration.child import silo
from tests.integration.rpc_server import GROUP, RpcServer, packed, refusal, rpc_server

SHORT = (grpc.StatusCode.RESOURCE_EXHAUSTED, "server is short of memory; try again later")
BOUND = 100 << 20
TOKEN = "admin-0123456789abcdef"


class Resident:
    """The memory of the server, as a test has it."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self) -> int:
        return self.bytes


@asynccontextmanager
async def a_server(**options: Any) -> AsyncIterator[tuple[RpcServer, Memory, Resident]]:
    resident = Resident()
    memory = Memory(BOUND, resident_bytes=resident, release=lambda: None)
    async with rpc_server(memory=memory, **options) as server:
        yield server, memory, resident


async def import_one(server: RpcServer) -> pb.ImportJobsResponse:
    job = pb.ImportJobRequest(shard=server.shard, id="i", task_group=GROUP, payload=packed(b"\xc0"))
    return await server.stub.ImportJobs(pb.ImportJobsRequest(jobs=[job]))


async def test_new_work_is_refused_while_memory_is_short() -> None:
    async with a_server() as (server, memory, resident):
        await server.enqueue("before")
        resident.bytes = BOUND + 1
        memory.look()
        assert await refusal(server.enqueue("j")) == SHORT
        assert await refusal(import_one(server)) == SHORT
        assert server.node.shard(server.shard).counts.total_jobs == 1
        resident.bytes = BOUND * 94 // 100
        memory.look()
        await server.enqueue("j")
        [result] = (await import_one(server)).results
        assert result.success


async def test_what_ends_work_goes_on() -> None:
    async with a_server() as (server, memory, resident):
        for id in ("done", "cancelled", "failed", "other"):
            await server.enqueue(id)
        resident.bytes = BOUND + 1
        memory.look()
        tasks = {task.job_id: task for task in await server.lease(3)}
        done, *_, last = tasks.values()
        await server.beat(done)
        await server.report(done)
        assert (await server.result(done.job_id)).status == pb.JobStatus.JOB_STATUS_SUCCEEDED
        await server.cancel(last.job_id)
        assert (await server.beat(last)).cancelled
        await server.report(last, cancelled=pb.Cancelled())
        await server.restart(last.job_id)
        await server.delete(done.job_id)
        assert (await server.job(last.job_id)).id == last.job_id
        assert (await server.stub.GetClusterInfo(pb.GetClusterInfoRequest())).num_shards == 1


async def test_a_large_request_is_judged_by_the_memory_of_its_moment() -> None:
    async with a_server() as (server, _, resident):
        resident.bytes = BOUND + 1  # Nobody has looked yet.
        await server.enqueue("small")
        assert await refusal(server.enqueue("large", payload=packed(b"x" * LARGE_BYTES))) == SHORT
        assert await refusal(server.enqueue("small, later")) == SHORT


async def test_a_large_answer_waits_until_there_is_memory_for_it() -> None:
    """Who asks again and again, and does not read the answers, would fill memory otherwise."""
    async with a_server() as (server, memory, resident):
        await server.enqueue("large", payload=packed(b"x" * LARGE_BYTES))
        await server.enqueue("large result")
        task = (await server.lease(2))[1]
        await server.report(task, success=packed(b"x" * LARGE_BYTES))
        resident.bytes = BOUND + 1
        assert await refusal(server.job("large")) == SHORT
        assert await refusal(server.result(task.job_id)) == SHORT
        resident.bytes = 0
        memory.look()
        assert len((await server.job("large")).payload.msgpack) == LARGE_BYTES
        assert len((await server.result(task.job_id)).success_data.msgpack) == LARGE_BYTES


async def test_who_has_no_token_does_not_learn_of_it() -> None:
    security = Security(tokens=Tokens([(TOKEN, EVERYTHING)]))
    async with a_server(security=security) as (server, memory, resident):
        resident.bytes = BOUND + 1
        memory.look()
        code, _ = await refusal(server.enqueue("j"))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        request = pb.EnqueueRequest(shard=server.shard, task_group=GROUP, payload=packed(b"\xc0"))
        metadata = (("authorization", f"Bearer {TOKEN}"),)
        assert await refusal(server.stub.Enqueue(request, metadata=metadata)) == SHORT


async def test_requests_that_add_work_are_bounded_by_their_bytes_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intake, "REQUEST_BYTES_MAX", 3000)
    async with a_server() as (server, _, _):
        poll = asyncio.ensure_future(  # Any request counts; this one is held for as long as a test likes.
            server.stub.LeaseTasks(
                pb.LeaseTasksRequest(worker_id="w" * 2000, max_tasks=1, task_group="nothing"),
                metadata=(("silo-wait-ms", "30000"),),
            )
        )
        while not server.has_waiter():  # noqa: ASYNC110  # Nothing tells of it.
            await asyncio.sleep(0.005)
        payload = packed(b"x" * 1500)
        text = "too many bytes of requests at once; try again"
        assert await refusal(server.enqueue("j", payload=payload)) == (SHORT[0], text)
        await server.enqueue("small")
        assert (await server.job("small")).id == "small"
        server.node.end_waits()
        await poll
        await server.enqueue("j", payload=payload)


def requests_in_memory() -> int:
    return sum(
        isinstance(thing, pb.HeartbeatRequest | pb.EnqueueRequest | pb.QueryRequest)
        for thing in gc.get_objects()
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda server: server.stub.Heartbeat(pb.HeartbeatRequest(shard=server.shard, task_id="t")),
        lambda server: server.enqueue("j", priority=1000),
        lambda server: server.stub.Query(pb.QueryRequest(shard=server.shard)),
    ],
    ids=["refused by the shard", "refused by its arguments", "not supported"],
)
@pytest.mark.parametrize("is_admin", [True, False])
async def test_a_refused_request_is_not_kept_until_the_garbage_collector_comes(
    call: Callable[[RpcServer], Awaitable[Any]], is_admin: bool
) -> None:
    access = EVERYTHING if is_admin else Access(tenants=frozenset({"-"}), task_groups=frozenset({GROUP}))
    security = Security(tokens=Tokens([(TOKEN, access)]))
    async with a_server(security=security) as (server, _, _):
        server.stub = with_token(server.channel)
        gc.collect()
        gc.disable()
        try:
            before = requests_in_memory()
            for _ in range(5):
                await refusal(call(server))
            await server.stub.GetClusterInfo(pb.GetClusterInfoRequest())  # The last one is over by now.
            assert requests_in_memory() == before
        finally:
            gc.enable()


def with_token(channel: grpc.aio.Channel) -> Any:
    class Stub:
        def __getattr__(self, method: str) -> Any:
            def call(request: Any) -> Any:
                answer = pb.DESCRIPTOR.services_by_name["Silo"].methods_by_name[method].output_type.name
                return channel.unary_unary(
                    f"/silo.v1.Silo/{method}",
                    request_serializer=type(request).SerializeToString,
                    response_deserializer=getattr(pb, answer).FromString,
                )(request, metadata=(("authorization", f"Bearer {TOKEN}"),))

            return call

    return Stub()


async def test_the_setting_reaches_a_real_server(tmp_path: Path) -> None:
    file = tmp_path / "silo.toml"
    file.write_text("[server]\nmax_memory_mb = 1\n")  # Less than any server needs.
    address = f"127.0.0.1:{free_port()}"
    options = {"grpc.enable_retries": 0}
    routing = ShardRouting(topology_refresh_interval_ms=0)
    async with (
        silo(tmp_path, "server", "-c", str(file), "--grpc-addr", address) as server,
        SiloGRPCClient(address, grpc_client_options=options, shard_routing=routing) as client,
    ):
        await server.says("Ctrl-C")
        for _ in range(3):
            with pytest.raises(SiloResourceExhaustedError, match=f"^{SHORT[1]}$"):
                await client.enqueue(payload=1, task_group=GROUP)
        leased = await client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP, wait_ms=0)
        assert leased.tasks == ()
        assert server.err.count("short of memory") == 1
        assert "max_memory_mb=1" in server.err
