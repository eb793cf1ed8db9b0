"""What goes along with every call, such as deadlines and spans, and how connections behave."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider

import silo
from silo import RpcOptions, ShardRouting, SiloResourceExhaustedError
from silo.client.connections import CHANNEL_DEFAULTS
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.builders import until
from tests.integration.fake_silo import (
    GROUP,
    SHARD,
    FakeSilo,
    Status,
    a_client,
    fake_silo,
    unavailable,
    wrong_shard,
)

ROOT = Path(__file__).parents[2]
ONE_TRY = ShardRouting(max_retries=0, topology_refresh_interval_ms=0)
Code = grpc.StatusCode


async def hang(request: Any) -> Any:
    await asyncio.Event().wait()


# Options of every try


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_deadline_that_is_over_at_once_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match="timeout_ms must be positive"):
        RpcOptions(timeout_ms=wrong)


async def test_metadata_goes_along_with_every_call_in_lower_case() -> None:
    options = RpcOptions(metadata={"X-App": "shop", "x-trace-bin": b"\x00\xff"})
    async with fake_silo() as server, a_client(server, rpc_options=options) as client:
        await client.heartbeat("w", "t", SHARD)
        await client.get_job("j")
        assert len(server.received) == 3, "the topology, too"
        assert {call.metadata["x-app"] for call in server.received} == {"shop"}
        assert {call.metadata["x-trace-bin"] for call in server.received} == {b"\x00\xff"}


async def test_what_the_client_sends_itself_is_stronger() -> None:
    options = RpcOptions(metadata={"Authorization": "Bearer theirs", "silo-wait-ms": "7"})
    async with fake_silo() as server, a_client(server, rpc_options=options, token="ours") as client:
        await client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP, wait_ms=20)
        [sent] = server.metadata("LeaseTasks")
        assert (sent["authorization"], sent["silo-wait-ms"]) == ("Bearer ours", "20")


async def test_a_function_of_options_is_asked_before_every_try() -> None:
    asked = 0

    def options() -> RpcOptions | None:
        nonlocal asked
        asked += 1
        return None if asked == 2 else RpcOptions(metadata={"x-try": str(asked)})

    async with fake_silo() as server, a_client(server, rpc_options=options) as client:
        server.answer("Heartbeat", unavailable(), unavailable())
        await client.heartbeat("w", "t", SHARD)
        tries = [(call.method, call.metadata.get("x-try")) for call in server.received]
        assert tries == [
            ("Heartbeat", "1"),
            ("GetClusterInfo", None),
            ("Heartbeat", "3"),
            ("GetClusterInfo", "4"),
            ("Heartbeat", "5"),
        ]


async def test_a_deadline_counts_for_each_try_by_itself() -> None:
    routing = ShardRouting(retry_delay_ms=1, max_retries=2, topology_refresh_interval_ms=0)
    options = RpcOptions(timeout_ms=50)
    async with fake_silo() as server, a_client(server, rpc_options=options, shard_routing=routing) as client:
        server.answer("GetJob", hang, hang, pb.GetJobResponse(id="j"))
        assert (await client.get_job("j")).id == "j"
        assert len(server.calls("GetJob")) == 3


async def test_a_deadline_that_every_try_misses_is_told() -> None:
    options = RpcOptions(timeout_ms=50)
    async with fake_silo() as server, a_client(server, rpc_options=options, shard_routing=ONE_TRY) as client:
        server.always("GetJob", hang)
        with pytest.raises(silo.SiloDeadlineExceededError):
            await client.get_job("j")


async def test_a_wait_for_work_comes_on_top_of_the_deadline() -> None:
    options = RpcOptions(timeout_ms=200)
    async with fake_silo() as server, a_client(server, rpc_options=options, shard_routing=ONE_TRY) as client:
        release = asyncio.Event()

        async def late(request: Any) -> Any:
            await release.wait()
            return pb.LeaseTasksResponse()

        server.answer("LeaseTasks", late)
        call = client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP, wait_ms=20_000)
        waiting = asyncio.create_task(call)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.5)
        release.set()
        assert (await waiting).tasks == ()


async def test_a_question_for_the_topology_has_its_own_deadline() -> None:
    async with fake_silo() as hung, fake_silo() as server:
        release = asyncio.Event()

        async def late(request: Any) -> Any:
            await release.wait()
            return pb.GetClusterInfoResponse(
                shard_owners=[pb.ShardOwner(shard_id=SHARD, grpc_addr=server.address)]
            )

        hung.answer("GetClusterInfo", late)
        async with a_client(hung, server, rpc_options=RpcOptions(timeout_ms=50)) as client:
            refresh = asyncio.create_task(client.refresh_topology())
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(refresh), 0.5)
            release.set()
            await refresh
            assert server.received == [], "the first one was waited for"


async def test_a_function_of_options_that_fails_fails_the_call_and_nothing_is_sent() -> None:
    def options() -> RpcOptions:
        raise LookupError("no settings")

    async with fake_silo() as server, a_client(server, rpc_options=options) as client:
        with pytest.raises(LookupError, match="no settings"):
            await client.heartbeat("w", "t", SHARD)
        assert server.received == []


# Spans and metrics


async def test_a_call_carries_the_span_in_which_it_is_made_and_the_next_one_none() -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    async with fake_silo() as server, a_client(server) as client:
        with tracer.start_as_current_span("outer") as span:
            await client.get_job("j")
        await client.get_job("j")
        trace_id = format(span.get_span_context().trace_id, "032x")
        inside, outside = server.metadata("GetJob")
        assert inside["traceparent"].split("-")[1] == trace_id
        assert "traceparent" not in outside
        [discovery] = server.metadata("GetClusterInfo")
        assert discovery["traceparent"].split("-")[1] == trace_id


async def test_a_span_is_stronger_than_metadata_of_the_caller() -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    options = RpcOptions(metadata={"Traceparent": "theirs"})
    async with fake_silo() as server, a_client(server, rpc_options=options) as client:
        with tracer.start_as_current_span("outer"):
            await client.heartbeat("w", "t", SHARD)
        await client.heartbeat("w", "t", SHARD)
        inside, outside = server.metadata("Heartbeat")
        assert inside["traceparent"].startswith("00-")
        assert outside["traceparent"] == "theirs"


async def test_refreshes_in_the_background_belong_to_nobodys_span() -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    often = ShardRouting(topology_refresh_interval_ms=5)
    async with fake_silo() as server, a_client(server, shard_routing=often) as client:
        with tracer.start_as_current_span("outer"):
            await client.get_job("j")
        await until(lambda: len(server.calls("GetClusterInfo")) > 2)
        first, *later = server.metadata("GetClusterInfo")
        assert "traceparent" in first
        assert not any("traceparent" in metadata for metadata in later)


def counted(reader: InMemoryMetricReader) -> int:
    """The counter of repetitions; 0 when there is none yet."""
    data: Any = reader.get_metrics_data()
    metrics = [
        metric
        for resource in (data.resource_metrics if data is not None else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == "silo.client.wrong_shard_retries"
    ]
    points = [point for metric in metrics for point in metric.data.data_points]
    assert all(not point.attributes for point in points)
    return sum(point.value for point in points)


@asynccontextmanager
async def metered() -> AsyncIterator[tuple[InMemoryMetricReader, Any]]:
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    try:
        yield reader, provider.get_meter("silo-client")
    finally:
        provider.shutdown()


@pytest.mark.parametrize(
    ("answers", "count"),
    [
        ([wrong_shard(), wrong_shard()], 2),
        ([unavailable(), unavailable()], 0),
        ([Status(Code.DEADLINE_EXCEEDED, "slow"), wrong_shard()], 1),
        ([], 0),
    ],
)
async def test_each_repetition_because_of_a_lost_shard_is_counted(answers: list[Status], count: int) -> None:
    async with metered() as (reader, meter), fake_silo() as server, a_client(server, meter=meter) as client:
        server.answer("Enqueue", *answers)
        await client.enqueue(payload=1, task_group=GROUP)
        assert (counted(reader), client.wrong_shard_retries) == (count, count)


async def test_the_last_lost_shard_is_repeated_no_more_and_not_counted() -> None:
    routing = ShardRouting(retry_delay_ms=1, max_retries=3, topology_refresh_interval_ms=0)
    async with (
        metered() as (reader, meter),
        fake_silo() as server,
        a_client(server, meter=meter, shard_routing=routing) as client,
    ):
        server.always("Enqueue", wrong_shard())
        with pytest.raises(silo.SiloNotFoundError):
            await client.enqueue(payload=1, task_group=GROUP)
        assert (counted(reader), client.wrong_shard_retries) == (3, 3)


async def run_script(script: str) -> None:
    """Run `script` by a Python of its own, which must end in time and well."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", script, cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):
            _, err = await process.communicate()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0, err.decode()


async def test_without_opentelemetry_everything_works_but_that() -> None:
    await run_script("""
import sys
sys.modules["opentelemetry"] = None

import asyncio
from tests.integration.fake_silo import GROUP, a_client, fake_silo, wrong_shard

async def main():
    async with fake_silo() as server, a_client(server) as client:
        server.answer("Enqueue", wrong_shard())
        await client.enqueue(payload=1, task_group=GROUP)
        assert client.wrong_shard_retries == 1
        assert "traceparent" not in server.metadata("Enqueue")[0]

asyncio.run(main())
""")


async def test_a_client_that_nobody_closed_does_not_keep_its_process_alive() -> None:
    await run_script("""
import asyncio
from silo import ShardRouting
from tests.integration.fake_silo import GROUP, a_client, fake_silo

async def main():
    async with fake_silo() as server:
        client = a_client(server, shard_routing=ShardRouting(topology_refresh_interval_ms=3_600_000))
        await client.enqueue(payload=1, task_group=GROUP)

asyncio.run(main())
""")


# Channels


def test_channels_have_the_options_of_every_client() -> None:
    wanted = {
        "grpc.keepalive_time_ms": 5000,
        "grpc.keepalive_timeout_ms": 1000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
        "grpc.http2.ping_timeout_ms": 5000,
        "grpc.max_send_message_length": 134217728,
        "grpc.max_receive_message_length": 134217728,
        "grpc.max_metadata_size": 65536,
        "grpc.enable_retries": 1,
    }
    assert {name: CHANNEL_DEFAULTS[name] for name in wanted} == wanted


async def test_an_option_of_the_channel_replaces_one_default_and_leaves_the_others() -> None:
    options = {"grpc.max_receive_message_length": 1000}
    async with fake_silo() as server, a_client(server, grpc_client_options=options) as client:
        exhausted = Status(Code.RESOURCE_EXHAUSTED, "busy")
        server.answer("GetJob", exhausted, pb.GetJobResponse(id="j"))
        assert (await client.get_job("j")).id == "j", "the channel asks an exhausted server again, as usual"
        server.always("GetJob", pb.GetJobResponse(id="x" * 2000))
        with pytest.raises(SiloResourceExhaustedError, match="larger than max"):
            await client.get_job("j")


async def test_a_service_config_of_the_caller_replaces_all_of_ours() -> None:
    async with (
        fake_silo() as server,
        a_client(server, grpc_client_options={"grpc.service_config": "{}"}) as client,
    ):
        server.always("GetJob", Status(Code.RESOURCE_EXHAUSTED, "busy"))
        with pytest.raises(SiloResourceExhaustedError):
            await client.get_job("j")
        assert len(server.calls("GetJob")) == 1


class Wire:
    """A connection to a server that can be cut without either side being told."""

    def __init__(self) -> None:
        self.address = ""
        self._whole = asyncio.Event()
        self._whole.set()

    def cut(self) -> None:
        self._whole.clear()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._whole.wait()
                writer.write(data)
        finally:
            writer.close()


@asynccontextmanager
async def a_wire_to(server: FakeSilo) -> AsyncIterator[Wire]:
    wire = Wire()
    ends: list[asyncio.Task[None]] = []

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = server.address.rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        ends.append(asyncio.create_task(wire.carry(reader, far_writer)))
        ends.append(asyncio.create_task(wire.carry(far_reader, writer)))

    listener = await asyncio.start_server(connect, "127.0.0.1", 0)
    wire.address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield wire
    finally:
        listener.close()
        for end in ends:
            end.cancel()
        await asyncio.gather(*ends, return_exceptions=True)


async def test_a_server_that_is_cut_off_is_noticed_long_before_the_deadline() -> None:
    pings = {"grpc.keepalive_time_ms": 100, "grpc.http2.ping_timeout_ms": 100}
    async with fake_silo() as server, a_wire_to(server) as wire:
        server.shards = [(SHARD, "", "", wire.address)]
        async with a_client(wire.address, grpc_client_options=pings, shard_routing=ONE_TRY) as client:
            server.always("GetJob", hang)
            call = asyncio.create_task(client.get_job("j"))
            await until(lambda: len(server.calls("GetJob")) == 1)
            wire.cut()
            with pytest.raises(silo.SiloUnavailableError, match="ping timeout"):
                async with asyncio.timeout(15):
                    await call
