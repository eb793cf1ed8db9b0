"""What holds for the port and for every method: standard services, what is missing, and hostile bytes."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any  # Messages of grpc are untyped.

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.integration.rpc_server import AT_ONCE, GROUP, RpcServer, refusal, rpc_server

SERVICE = pb.DESCRIPTOR.services_by_name["Silo"]
IMPLEMENTED = (
    "GetClusterInfo",
    "GetNodeInfo",
    "Enqueue",
    "GetJob",
    "GetJobResult",
    "DeleteJob",
    "CancelJob",
    "RestartJob",
    "ExpediteJob",
    "LeaseTask",
    "LeaseTasks",
    "ReportOutcome",
    "Heartbeat",
    "ImportJobs",
    "ResetShards",
    "FlushShard",
    "CompactShard",
    "GetShardStorageInfo",
    "CpuProfile",
    "HeapProfile",
    "DumpTasks",
    "ReportRefreshOutcome",
    "DropTenantHolders",
)
BRIEF = [name for name in IMPLEMENTED if not name.endswith("Profile")]  # A profile takes a second at least.
MISSING = [method.name for method in SERVICE.methods if method.name not in IMPLEMENTED]
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


async def assert_serves(server: RpcServer) -> None:
    """A client with a connection of its own does useful work."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(server.address, options=options) as channel:
        call = channel.unary_unary(
            "/silo.v1.Silo/GetNodeInfo", response_deserializer=pb.GetNodeInfoResponse.FromString
        )
        assert (await call(b"", timeout=10)).node_id == "node-1"
    await server.enqueue("")
    await server.report(await server.lease_one())


# What is not there


def test_the_service_has_all_29_methods_and_these_are_implemented() -> None:
    assert len(SERVICE.methods) == 29
    assert len(MISSING) + len(IMPLEMENTED) == 29


@pytest.mark.parametrize("method", MISSING)
async def test_a_method_that_is_not_there_yet_says_so_by_name(method: str) -> None:
    async with rpc_server() as server:
        request = getattr(pb, f"{method}Request")()
        call = getattr(server.stub, method)(request)
        answer = call.read() if SERVICE.methods_by_name[method].server_streaming else call
        text = f"{method} is not supported by this server version yet"
        assert await refusal(answer) == (UNIMPLEMENTED, text)


@pytest.mark.parametrize(
    "path", ["/silo.v1.Silo/Nothing", "/silo.v2.Silo/GetJob", "/silo.ext.v1.SiloExt/Nothing"]
)
async def test_an_unknown_method_or_service_is_unimplemented(path: str) -> None:
    async with rpc_server() as server:
        code, _ = await refusal(server.channel.unary_unary(path)(b""))
        assert code is UNIMPLEMENTED


# Standard services


@pytest.mark.parametrize("service", ["", "silo.v1.Silo"])
async def test_health_is_serving(service: str) -> None:
    async with rpc_server() as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        request = health_pb2.HealthCheckRequest(service=service)
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(request)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_health_of_another_service_is_not_found() -> None:
    async with rpc_server() as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        code, _ = await refusal(health.Check(health_pb2.HealthCheckRequest(service="silo.v1.Other")))
        assert code is grpc.StatusCode.NOT_FOUND


async def reflect(server: RpcServer, path: str = REFLECTION, **request: Any) -> Any:
    call = server.channel.stream_stream(
        path,
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )()
    await call.write(reflection_pb2.ServerReflectionRequest(**request))
    await call.done_writing()
    return await call.read()


async def test_reflection_lists_the_service() -> None:
    async with rpc_server() as server:
        response = await reflect(server, list_services="")
        names = {service.name for service in response.list_services_response.service}
        assert {"silo.v1.Silo", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"} <= names


async def test_reflection_serves_the_file_of_the_service() -> None:
    async with rpc_server() as server:
        response = await reflect(server, file_containing_symbol="silo.v1.Silo")
        [raw] = response.file_descriptor_response.file_descriptor_proto
        file = FileDescriptorProto.FromString(raw)
        assert (file.package, [service.name for service in file.service]) == ("silo.v1", ["Silo"])


async def test_reflection_is_served_as_v1_only() -> None:
    async with rpc_server() as server:
        path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        code, _ = await refusal(reflect(server, path, list_services=""))
        assert code is UNIMPLEMENTED


# Connections


@asynccontextmanager
async def connection(server: RpcServer) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = server.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()
        await asyncio.wait({asyncio.ensure_future(writer.wait_closed())})


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7


def frame(kind: int, flags: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, 0) + payload


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    head = await reader.readexactly(9)
    length = int.from_bytes(head[:3])
    return head[3], head[4], await reader.readexactly(length)


@pytest.mark.spec("W-CC-1")
async def test_an_idle_client_may_ping_as_often_as_it_likes() -> None:
    async with rpc_server() as server, connection(server) as (reader, writer), asyncio.timeout(10):
        writer.write(PREFACE + frame(SETTINGS))
        for number in range(20):  # By default the third ping of an idle client costs it the connection.
            body = struct.pack(">Q", number)
            writer.write(frame(PING, payload=body))
            while True:
                kind, flags, payload = await read_frame(reader)
                assert kind != GOAWAY, payload
                if (kind, flags) == (PING, 1):
                    assert payload == body
                    break


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: silo\r\n\r\n",
        bytes(range(256)) * 40,
        PREFACE + b"\xff" * 100,
        PREFACE + frame(SETTINGS) + frame(0, payload=b"data for no stream"),
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
    ids=["http1", "garbage", "bad frame", "stray data", "tls"],
)
async def test_bytes_that_are_no_grpc_disturb_nobody(sent: bytes) -> None:
    async with rpc_server() as server, connection(server) as (_, writer):
        writer.write(sent)
        await writer.drain()
        await assert_serves(server)


@pytest.mark.parametrize("sent", [b"", b"PRI * HT", PREFACE, PREFACE + b"\x00\x00"])
async def test_connections_that_say_nothing_more_disturb_nobody(sent: bytes) -> None:
    async with rpc_server() as server, connection(server) as (_, one), connection(server) as (_, two):
        one.write(sent)
        two.write(sent)
        await one.drain()
        await assert_serves(server)


async def test_a_connection_cut_in_the_middle_of_a_call_disturbs_nobody() -> None:
    async with rpc_server() as server:
        async with connection(server) as (_, writer):
            writer.write(PREFACE + frame(SETTINGS) + b"\x00\x10\x00\x01\x04\x00\x00\x00\x01" + b"half")
            await writer.drain()
            writer.transport.abort()
        await assert_serves(server)


async def test_a_compressed_request_is_understood() -> None:
    async with rpc_server() as server:
        request = pb.EnqueueRequest(shard=server.shard, id="j", task_group=GROUP)
        request.payload.msgpack = b"a" * 10_000
        await server.stub.Enqueue(request, compression=grpc.Compression.Gzip)
        assert (await server.job("j")).payload.msgpack == b"a" * 10_000


# Requests


@pytest.mark.parametrize("method", [method.name for method in SERVICE.methods])
async def test_bytes_that_are_no_message_are_a_wrong_request(method: str) -> None:
    async with rpc_server() as server:
        path, body = f"/silo.v1.Silo/{method}", b"\xff\xff\xff"
        if SERVICE.methods_by_name[method].server_streaming:
            answer = server.channel.unary_stream(path)(body).read()
        else:
            answer = server.channel.unary_unary(path)(body)
        assert await refusal(answer) == (grpc.StatusCode.INVALID_ARGUMENT, "the request does not decode")


async def test_a_text_that_is_no_utf_8_is_a_wrong_request() -> None:
    async with rpc_server() as server:
        code, _ = await refusal(server.channel.unary_unary("/silo.v1.Silo/GetJob")(b"\x0a\x02\xc3\x28"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


SHARD = "00000000-0000-0000-0000-000000000001"
TEXTS = st.sampled_from(["", "a", "b", GROUP, SHARD, "\0", "日本"]) | st.text(max_size=70)
INT32 = st.sampled_from([0, 1, 2, 99, 2**31 - 1, -1, -(2**31)]) | st.integers(-(2**31), 2**31 - 1)
INT64 = st.sampled_from([0, 1, 1_700_000_000_000, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)
UINT32 = st.sampled_from([0, 1, 50, 2**32 - 1]) | st.integers(0, 2**32 - 1)
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: TEXTS,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=20),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_INT32: INT32,
    FieldDescriptor.TYPE_INT64: INT64,
    FieldDescriptor.TYPE_UINT32: UINT32,
    FieldDescriptor.TYPE_ENUM: INT32,
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
}


@st.composite
def messages(draw: st.DrawFn, name: str) -> Any:
    """A message of this type with any subset of its fields set to anything that fits."""
    message = getattr(pb, name)()
    for field in message.DESCRIPTOR.fields:
        # Calls must get past their first checks often enough.
        if field.name == "shard" and draw(st.integers(0, 9)):
            message.shard = SHARD
        elif field.name == "task_group" and draw(st.integers(0, 9)):
            message.task_group = GROUP
        elif field.name in ("id", "worker_id", "task_id") and draw(st.integers(0, 4)):
            setattr(message, field.name, draw(st.sampled_from(["a", "b"])))
        elif (field.name in ("tenant", "limits") and draw(st.integers(0, 9))) or not draw(st.booleans()):
            continue
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, field.name).update(draw(st.dictionaries(TEXTS, TEXTS, max_size=20)))
        elif field.message_type is not None and field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(messages(field.message_type.name), max_size=3)))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(draw(messages(field.message_type.name)))
        else:
            setattr(message, field.name, draw(SCALARS[field.type]))
    return message


def calls(bodies: Any) -> st.SearchStrategy[list[tuple[str, bytes]]]:
    """Some calls in a row."""
    one = st.sampled_from(BRIEF).flatmap(lambda method: st.tuples(st.just(method), bodies(method)))
    return st.lists(one, min_size=1, max_size=12)


async def send_all(sequence: list[tuple[str, bytes]]) -> None:
    """Send raw requests one after another. None fails for a reason inside, and the server stays well."""
    async with rpc_server(dev_mode=True) as server:
        for method, body in sequence:
            call = server.channel.unary_unary(f"/silo.v1.Silo/{method}")
            try:
                await call(body, timeout=10, metadata=AT_ONCE)
            except grpc.aio.AioRpcError as error:
                assert error.code() not in (
                    grpc.StatusCode.INTERNAL,
                    grpc.StatusCode.UNKNOWN,
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                ), (method, body, error.details())
        server.clock.advance_ms(20_000)  # Leases run out, delayed jobs become due.
        await server.enqueue("", task_group="check")
        await server.report((await server.lease(task_group="check"))[0])


@settings(max_examples=60, deadline=None)
@given(calls(lambda method: st.binary(max_size=60)))
async def test_random_bytes_are_answered_and_break_nothing(sequence: list[tuple[str, bytes]]) -> None:
    await send_all(sequence)


@settings(max_examples=100, deadline=None)
@given(calls(lambda method: messages(f"{method}Request").map(lambda message: message.SerializeToString())))
async def test_random_messages_are_answered_and_break_nothing(sequence: list[tuple[str, bytes]]) -> None:
    await send_all(sequence)
