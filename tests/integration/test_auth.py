"""Tokens, quotas and connection limits as callers meet them over gRPC."""

import asyncio
import logging
from collections.abc import Awaitable
from pathlib import Path
from typing import Any  # Stubs and messages of grpc are untyped.

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from silo.cli.server_process import free_port
from silo.rpc.auth import EVERYTHING, Access, Tokens
from silo.rpc.server import Security
from silo.shard.shard import ShardOptions
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.builders import until
from tests.integration.child import failure, silo, stub_of
from tests.integration.rpc_server import AT_ONCE, GROUP, RpcServer, packed, refusal, rpc_server

ADMIN, ADA, WORKER, OTHER_WORKER = (
    f"{name}-0123456789abcdef" for name in ("admin", "ada", "worker", "other")
)
SECURITY = Security(
    tokens=Tokens(
        [
            (ADMIN, EVERYTHING),
            (ADA, Access(tenants=frozenset({"ada"}))),
            (WORKER, Access(task_groups=frozenset({GROUP}))),
            (OTHER_WORKER, Access(task_groups=frozenset({"other"}))),
        ]
    )
)
DENIED = grpc.StatusCode.PERMISSION_DENIED
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
SILO = pb.DESCRIPTOR.services_by_name["Silo"]


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def enqueue(server: RpcServer, id: str, *, token: str, tenant: str = "ada") -> Awaitable[Any]:
    request = pb.EnqueueRequest(
        shard=server.shard, id=id, tenant=tenant, task_group=GROUP, payload=packed(b"\xa1p")
    )
    return server.stub.Enqueue(request, metadata=bearer(token))


def lease(server: RpcServer, *, token: str, task_group: str = GROUP) -> Awaitable[Any]:
    request = pb.LeaseTasksRequest(worker_id="w", max_tasks=1, task_group=task_group)
    return server.stub.LeaseTasks(request, metadata=bearer(token) + AT_ONCE)


def report(server: RpcServer, task: pb.Task, *, token: str) -> Awaitable[Any]:
    request = pb.ReportOutcomeRequest(
        shard=task.shard, task_id=task.id, tenant_id=task.tenant_id, success=packed(b"\xa4done")
    )
    return server.stub.ReportOutcome(request, metadata=bearer(token))


def heartbeat(server: RpcServer, task: pb.Task, *, token: str) -> Awaitable[Any]:
    request = pb.HeartbeatRequest(shard=task.shard, task_id=task.id, worker_id="w", tenant_id=task.tenant_id)
    return server.stub.Heartbeat(request, metadata=bearer(token))


@pytest.mark.spec("W-CC-6")
@pytest.mark.parametrize("method", [method.name for method in SILO.methods])
async def test_every_method_asks_for_a_token_before_it_looks_at_anything(method: str) -> None:
    async with rpc_server(security=SECURITY) as server:
        kind = SILO.methods_by_name[method]
        request = getattr(pb, kind.input_type.name)()  # Which is wrong in most cases.
        call = getattr(server.stub, method)(request)
        answer = refusal(anext(aiter(call)) if kind.server_streaming else call)
        assert await answer == (UNAUTHENTICATED, "missing authorization header")


@pytest.mark.spec("W-CC-4", "W-CC-5")
@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        f"bearer {ADMIN}",
        f"Bearer  {ADMIN}",
        f"Bearer {ADMIN}x",
        f"Bearer {ADMIN} x",
        f"Bearer {ADMIN} ",
        f"Basic {ADMIN}",
        ADMIN,
    ],
)
async def test_a_wrong_header_is_refused(value: str) -> None:
    async with rpc_server(security=SECURITY) as server:
        call = server.stub.GetClusterInfo(pb.GetClusterInfoRequest(), metadata=(("authorization", value),))
        assert await refusal(call) == (UNAUTHENTICATED, "invalid auth token")


@pytest.mark.spec("W-CC-6")
async def test_without_tokens_any_header_is_ignored() -> None:
    async with rpc_server() as server:
        info = await server.stub.GetClusterInfo(pb.GetClusterInfoRequest(), metadata=bearer("whatever"))
        assert info.num_shards == 1


async def test_bytes_that_are_no_message_are_no_way_around_the_token() -> None:
    async with rpc_server(security=SECURITY) as server:
        call = server.channel.unary_unary("/silo.v1.Silo/Enqueue")
        assert await refusal(call(b"\xff\xff")) == (UNAUTHENTICATED, "missing authorization header")
        code, _ = await refusal(call(b"\xff\xff", metadata=bearer(ADA)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_large_request_without_a_token_is_refused_like_a_small_one() -> None:
    async with rpc_server(security=SECURITY) as server:
        call = server.stub.Enqueue(pb.EnqueueRequest(payload=packed(b"x" * (32 << 20))))
        assert await refusal(call) == (UNAUTHENTICATED, "missing authorization header")


@pytest.mark.spec("W-CC-3", "W-CC-7")
async def test_health_and_reflection_need_no_token() -> None:
    async with rpc_server(security=SECURITY) as server:
        refused = await refusal(server.stub.GetClusterInfo(pb.GetClusterInfoRequest()))
        assert refused == (UNAUTHENTICATED, "missing authorization header")
        health = health_pb2_grpc.HealthStub(server.channel)
        for name in ("", "silo.v1.Silo"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        ask = server.channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        call = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        [answer] = [answer async for answer in call]
        assert "silo.v1.Silo" in [service.name for service in answer.list_services_response.service]


@pytest.mark.spec("W-CC-6")
async def test_a_producer_and_a_worker_do_their_work_with_narrow_tokens() -> None:
    async with rpc_server(security=SECURITY, tenancy=True) as server:
        await enqueue(server, "j", token=ADA)
        [task] = (await lease(server, token=WORKER)).tasks
        await heartbeat(server, task, token=WORKER)
        await report(server, task, token=WORKER)
        request = pb.GetJobRequest(shard=server.shard, id="j", tenant="ada")
        job = await server.stub.GetJob(request, metadata=bearer(ADA))
        assert job.status == pb.JOB_STATUS_SUCCEEDED


async def test_a_token_does_not_reach_another_tenant() -> None:
    async with rpc_server(security=SECURITY, tenancy=True) as server:
        await enqueue(server, "j", token=ADMIN, tenant="bob")
        before = server.rows()
        needed = "needs a token with scope 'tenant:bob'"
        assert await refusal(enqueue(server, "k", token=ADA, tenant="bob")) == (DENIED, f"Enqueue {needed}")
        for method in ("GetJob", "GetJobResult", "CancelJob", "RestartJob", "ExpediteJob", "DeleteJob"):
            request = getattr(pb, f"{method}Request")(shard=server.shard, id="j", tenant="bob")
            call = getattr(server.stub, method)(request, metadata=bearer(ADA))
            assert await refusal(call) == (DENIED, f"{method} {needed}")
        assert server.rows() == before


async def test_a_job_that_belongs_to_no_tenant_is_not_reached_by_leaving_the_tenant_out() -> None:
    async with rpc_server(security=SECURITY, tenancy=True) as server:
        code, _ = await refusal(enqueue(server, "j", token=ADA, tenant=""))
        assert code is DENIED


async def test_a_worker_leases_from_its_task_group_only() -> None:
    async with rpc_server(security=SECURITY, tenancy=True) as server:
        await enqueue(server, "j", token=ADA)
        expected = (DENIED, f"LeaseTasks needs a token with scope 'worker:{GROUP}'")
        assert await refusal(lease(server, token=OTHER_WORKER)) == expected
        assert await refusal(lease(server, token=ADA)) == expected
        assert not (await lease(server, token=OTHER_WORKER, task_group="other")).tasks


async def test_a_worker_reports_on_leases_of_its_task_group_only() -> None:
    async with rpc_server(security=SECURITY, tenancy=True) as server:
        await enqueue(server, "j", token=ADA)
        [task] = (await lease(server, token=WORKER)).tasks
        before = server.rows()
        expected = (DENIED, f"this task needs a token with scope 'worker:{GROUP}'")
        assert await refusal(heartbeat(server, task, token=OTHER_WORKER)) == expected
        assert await refusal(report(server, task, token=OTHER_WORKER)) == expected
        assert (await refusal(report(server, task, token=ADA)))[0] is DENIED
        assert server.rows() == before
        await report(server, task, token=ADMIN)


async def test_a_lease_that_is_gone_is_gone_for_every_worker() -> None:
    async with rpc_server(security=SECURITY, tenancy=True) as server:
        await enqueue(server, "j", token=ADA)
        [task] = (await lease(server, token=WORKER)).tasks
        await report(server, task, token=WORKER)
        for token in (WORKER, OTHER_WORKER, ADMIN):
            code, _ = await refusal(report(server, task, token=token))
            assert code is grpc.StatusCode.NOT_FOUND


async def test_a_very_long_name_does_not_break_the_answer() -> None:
    async with rpc_server(security=SECURITY, tenancy=True) as server:
        code, text = await refusal(enqueue(server, "j", token=ADA, tenant="é" * 100_000))
        assert code is DENIED
        assert text.startswith("Enqueue needs a token with scope 'tenant:é")


async def test_refusals_leave_no_token_in_logs_or_answers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "wrong-0123456789abcdef"
    async with rpc_server(security=SECURITY, tenancy=True) as server:
        for token in (wrong, ADA):
            _, text = await refusal(server.stub.FlushShard(pb.FlushShardRequest(), metadata=bearer(token)))
            assert token not in text
    logged = "\n".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert wrong not in logged
    assert ADA not in logged


async def test_a_quota_is_answered_with_resource_exhausted() -> None:
    async with rpc_server(options=ShardOptions(max_pending_jobs=1)) as server:
        await server.enqueue("a")
        code, text = await refusal(server.enqueue("b"))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "its limit of 1 pending jobs (tenancy.max_pending_jobs)" in text


async def test_connections_beyond_the_limit_are_closed_and_the_others_are_served() -> None:
    async with rpc_server(security=Security(max_connections=1)) as server:
        request = pb.GetClusterInfoRequest()
        await server.stub.GetClusterInfo(request)
        async with stub_of(server.address) as second:
            code, _ = await refusal(second.GetClusterInfo(request, timeout=10))
            assert code is grpc.StatusCode.UNAVAILABLE
        assert (await server.stub.GetClusterInfo(request)).num_shards == 1


async def test_calls_beyond_the_streams_of_a_connection_wait_for_their_turn() -> None:
    async with rpc_server(security=Security(max_streams_per_connection=2)) as server:
        info = pb.GetClusterInfoRequest()
        await server.stub.GetClusterInfo(info)  # From here on the client knows the limit.
        wait = pb.LeaseTasksRequest(worker_id="w", max_tasks=1, task_group=GROUP)
        waiting = [
            asyncio.ensure_future(server.stub.LeaseTasks(wait, metadata=(("silo-wait-ms", "30000"),)))
            for _ in range(2)
        ]
        await until(server.has_waiter)
        third = asyncio.ensure_future(server.stub.GetClusterInfo(info))
        async with stub_of(server.address) as other:
            await other.GetClusterInfo(info)  # Another connection has streams of its own.
            assert not third.done()
            shard = server.shard
            for id in ("a", "b"):
                await other.Enqueue(
                    pb.EnqueueRequest(shard=shard, id=id, task_group=GROUP, payload=packed(b"\xa1p"))
                )
        answers = await asyncio.gather(*waiting)
        assert sum(len(answer.tasks) for answer in answers) == 2
        assert (await third).num_shards == 1


async def test_the_command_serves_with_the_tokens_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "silo.toml"
    file.write_text(
        "[server]\nauth_token = '${ADMIN}'\n[tenancy]\nenabled = true\n"
        f"[[auth.tokens]]\ntoken = '{ADA}'\nscopes = ['tenant:ada']\n"
    )
    address = f"127.0.0.1:{free_port()}"
    arguments = ("server", "-c", str(file), "--grpc-addr", address, "-v")
    async with silo(tmp_path, *arguments, env={"ADMIN": ADMIN}) as server:
        await server.says("Ctrl-C")
        async with stub_of(address) as stub:
            ask = pb.GetNodeInfoRequest()
            assert (await refusal(stub.GetNodeInfo(ask)))[0] is UNAUTHENTICATED
            assert (await refusal(stub.GetNodeInfo(ask, metadata=bearer(ADA))))[0] is DENIED
            assert len((await stub.GetNodeInfo(ask, metadata=bearer(ADMIN))).owned_shards) == 8
        assert await server.stop() == 0
        for token in (ADMIN, ADA):
            assert token not in server.out + server.err


async def test_the_command_does_not_start_with_a_token_whose_variable_is_not_set(tmp_path: Path) -> None:
    file = tmp_path / "silo.toml"
    file.write_text("[server]\nauth_token = '${SILO_ADMIN_TOKEN}'")
    line = await failure(tmp_path, "server", "-c", str(file))
    assert line.startswith("Config error: server.auth_token is empty")
