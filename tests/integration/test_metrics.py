"""Metrics of a server over HTTP: what they say, what else the port answers, and whose port it is."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from silo import Failure, SiloGRPCClient, SiloWorker, Success, TaskContext
from silo.cli.server_process import free_port
from silo.config import DEFAULT_METRICS_ADDR, MetricsConfig
from silo.node.memory import Memory
from silo.node.readings import NodeReadings, readings_served
from silo.telemetry import metrics
from silo.telemetry.metrics import CONTENT_TYPE, MetricsNotServed, Reading, metrics_served
from tests.builders import until
from tests.integration.child import Child, failure, silo
from tests.integration.rpc_server import GROUP, rpc_server

Samples = dict[str, dict[tuple[str, ...], float]]
ONE = [Reading(name="silo_one", kind="gauge", help="One.", values={(): 1})]


async def answer(address: str, request: bytes) -> bytes:
    """What comes back before the connection is closed."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    async with asyncio.timeout(20):
        try:
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()


async def get(address: str, path: str = "/metrics", *, method: str = "GET") -> tuple[int, str, str]:
    """Status, head and body."""
    response = (await answer(address, f"{method} {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())).decode()
    head, _, body = response.partition("\r\n\r\n")
    assert f"Content-Length: {len(body.encode())}" in head
    return int(head.split()[1]), head, body


def parsed(text: str) -> Samples:
    """The values of each metric, by the values of its labels."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sample.labels.values())
            assert labels not in samples.setdefault(sample.name, {})
            samples[sample.name][labels] = sample.value
    return samples


async def scrape(address: str) -> Samples:
    status, _, body = await get(address)
    assert status == 200
    return parsed(body)


def address_in(server: Child) -> str:
    found = re.search(r"http://(.*)/metrics", server.out)
    assert found is not None
    return found[1]


# What they say


async def test_a_server_tells_of_its_shards_and_jobs(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    file = tmp_path / "silo.toml"
    file.write_text("[coordination]\ninitial_shard_count = 1\n[server]\nmax_memory_mb = 4096\n")
    async with (
        silo(tmp_path, "server", "-c", str(file), "--grpc-addr", address) as server,
        SiloGRPCClient(address) as client,
    ):
        await server.says("Ctrl-C")
        at = address_in(server)
        assert f"metrics_addr={at}" in server.err
        for id in ("done", "failed", "runs", "waits", "is delayed"):
            await client.enqueue(
                id=id, payload=1, task_group=GROUP, delay=3600 if id == "is delayed" else None
            )
        for id, outcome in (("done", Success(1)), ("failed", Failure("BROKEN")), ("runs", None)):
            task = await client.lease_task(id, worker_id="w")
            if outcome is not None:
                await client.report_outcome(task_id=task.id, shard=task.shard, outcome=outcome)
        await client.lease_tasks(worker_id="w", max_tasks=1, task_group="nothing", wait_ms=0)
        samples = await scrape(at)
        [shard] = [location.shard_id for location in client.get_topology()]
        assert samples["silo_shards_owned"] == samples["silo_coordination_shards_open"] == {(): 1}
        assert samples["silo_durability_info"] == {("flushed",): 1}
        assert samples["silo_short_of_memory"] == {(): 0}
        assert samples["silo_memory_bound_bytes"] == {(): 4096 << 20}
        assert samples["silo_shard_jobs"] == {(shard,): 5}
        assert samples["silo_shard_terminal_jobs"] == {(shard,): 2}
        assert samples["silo_shard_pending_jobs"] == {(shard,): 2}
        assert samples["silo_task_leases_active"] == {(shard, GROUP): 1}
        assert samples["silo_shard_queues_in_memory"][shard,] >= 1
        assert samples["silo_shard_rows_in_memory"][shard,] >= 1
        written = samples["silo_store_groups_written_total"][shard,]
        assert written >= 10
        assert samples["process_resident_memory_bytes"][()] > 1 << 20
        await client.cancel_job("waits")
        samples = await scrape(at)
        assert samples["silo_store_groups_written_total"][shard,] == written + 1
        assert samples["silo_shard_terminal_jobs"] == {(shard,): 3}
        text = (await get(at))[2]
        assert "tenant" not in text
        assert await server.stop() == 0


async def test_a_counter_goes_on_when_its_shard_is_opened_again() -> None:
    async with rpc_server(dev_mode=True) as server:
        readings = NodeReadings(server.node, durability="none")

        def written() -> float:
            return one(readings.read(), "silo_store_groups_written_total")[server.shard,]

        await server.enqueue("a")
        await server.enqueue("b")
        before = written()
        await server.node.reset_shards()
        assert written() == before
        await server.enqueue("a")
        assert written() == before + 1


async def test_a_shard_that_is_closed_is_not_told_of() -> None:
    async with rpc_server(shards=2) as server:
        readings = NodeReadings(server.node, durability="none")
        assert set(one(readings.read(), "silo_shard_jobs")) == {(shard,) for shard in server.shards}
        await server.node.close()
        assert one(readings.read(), "silo_shards_owned") == {(): 0}
        assert one(readings.read(), "silo_shard_jobs") == {}


async def test_shortage_of_memory_is_told() -> None:
    memory = Memory(100, resident_bytes=lambda: 101)
    async with rpc_server(memory=memory) as server:
        memory.look()
        readings = NodeReadings(server.node, durability="none")
        assert one(readings.read(), "silo_short_of_memory") == {(): 1}
        assert one(readings.read(), "silo_memory_bound_bytes") == {(): 100}


def one(readings: Iterable[Reading], name: str) -> dict[tuple[str, ...], float]:
    [found] = [reading for reading in readings if reading.name == name]
    return dict(found.values)


# The port


@asynccontextmanager
async def an_endpoint() -> AsyncIterator[str]:
    async with metrics_served("127.0.0.1", 0, lambda: ONE) as address:
        yield address


async def test_the_format_is_the_one_that_prometheus_has_always_read() -> None:
    async with an_endpoint() as address:
        status, head, body = await get(address)
    assert status == 200
    assert CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"
    assert f"Content-Type: {CONTENT_TYPE}\r\n" in head
    assert "# HELP silo_one One.\n# TYPE silo_one gauge\nsilo_one 1.0\n" in body


async def test_a_query_is_no_part_of_the_path() -> None:
    async with an_endpoint() as address:
        assert (await get(address, "/metrics?x=1"))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/metricsx", 404), ("POST", "/metrics", 405), ("HEAD", "/x", 404)],
)
async def test_nothing_else_is_served(method: str, path: str, status: int) -> None:
    async with an_endpoint() as address:
        assert (await get(address, path, method=method))[0] == status


@pytest.mark.parametrize(
    "request_bytes",
    [b"\x16\x03\x01\x02\x00" + b"x" * 100_000, b"\r\n\r\n", b"GET\r\n\r\n", b"\xff\xfe \r\n\r\n"],
)
async def test_what_is_no_request_ends_with_its_connection(
    request_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "SCRAPE_TIMEOUT_S", 0.2)
    async with an_endpoint() as address:
        assert b"200 OK" not in await answer(address, request_bytes)
        assert (await get(address))[0] == 200


async def test_who_says_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SCRAPE_TIMEOUT_S", 0.05)
    async with an_endpoint() as address:
        assert await answer(address, b"") == b""
        assert await answer(address, b"GET /metrics HTTP/1.1\r\n") == b""


async def test_so_many_scrapes_are_served_at_a_time_and_those_beyond_are_turned_away() -> None:
    async with an_endpoint() as address:
        host, _, port = address.rpartition(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(metrics.SCRAPES_MAX)]
        assert await answer(address, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
        for _, writer in silent:
            writer.close()
        while not await answer(address, b"GET /metrics HTTP/1.1\r\n\r\n"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_the_end_does_not_wait_for_who_says_nothing() -> None:
    async with asyncio.timeout(2), an_endpoint() as address:
        host, _, port = address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        await get(address)
    writer.close()


async def test_metrics_that_cannot_be_collected_are_an_error_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken() -> list[Reading]:
        raise RuntimeError("on purpose")

    async with metrics_served("127.0.0.1", 0, broken) as address:
        for _ in range(2):
            status, _, body = await get(address)
            assert (status, body) == (500, "metrics could not be collected; the log says why\n")
    assert caplog.text.count("RuntimeError: on purpose") >= 2


# The address


async def test_they_can_be_switched_off(tmp_path: Path) -> None:
    file = tmp_path / "silo.toml"
    file.write_text("[metrics]\nenabled = false\n")
    address = f"127.0.0.1:{free_port()}"
    async with silo(tmp_path, "server", "-c", str(file), "--grpc-addr", address) as server:
        await server.says("Ctrl-C")
        assert "  metrics     not served\n" in server.out
        assert "metrics_addr=none" in server.err


async def test_a_configured_address_that_is_taken_keeps_the_server_from_starting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        address = f"127.0.0.1:{free_port()}"
        line = await failure(tmp_path, "server", "--grpc-addr", address, metrics_addr=taken)
    assert line == (
        f"Error: cannot serve metrics on {taken}: Address already in use; "
        "choose another with metrics.addr, or set metrics.enabled = false"
    )
    assert not (tmp_path / "home").exists()  # Nothing was made on the way.


async def test_the_address_of_the_calls_is_taken_too(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    async with silo(tmp_path, "server", "--grpc-addr", address, metrics_addr=address) as server:
        assert await server.ended() == 1
        assert server.err.splitlines()[-1].startswith(f"Error: cannot serve metrics on {address}: ")


async def test_an_address_that_is_none_is_one_line(tmp_path: Path) -> None:
    line = await failure(tmp_path, "server", metrics_addr="nowhere")
    assert line.startswith("Config error: metrics.addr = 'nowhere' is no address; write host:port")


async def test_the_default_address_may_be_taken(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers on one machine start without any configuration."""
    assert DEFAULT_METRICS_ADDR == "127.0.0.1:9090"
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setattr("silo.node.readings.DEFAULT_METRICS_ADDR", taken)
        async with rpc_server() as server:
            async with readings_served(MetricsConfig(), server.node, durability="none") as address:
                assert address is None
            [record] = caplog.records
            assert record.getMessage() == (
                "metrics are not served: set metrics.addr, or metrics.enabled = false"
            )
            assert record.fields["addr"] == taken  # type: ignore[attr-defined]
            configured = MetricsConfig(addr=taken)
            with pytest.raises(MetricsNotServed, match=f"cannot serve metrics on {taken}"):
                async with readings_served(configured, server.node, durability="none"):
                    pass
    async with (
        rpc_server() as server,
        readings_served(MetricsConfig(), server.node, durability="none") as address,
    ):
        assert address == taken
        assert (await scrape(taken))["silo_durability_info"] == {("none",): 1}


async def test_workers_to_which_tasks_are_pushed_are_told_of_with_their_tasks() -> None:
    release = asyncio.Event()

    async def handler(ctx: TaskContext[object, dict[str, str]]) -> None:
        await release.wait()

    async with rpc_server() as server:
        server.node.advertised_addr = server.address
        readings = NodeReadings(server.node, durability="none")

        def told() -> tuple[float, float]:
            now = list(readings.read())
            return one(now, "silo_workers_connected")[()], one(now, "silo_tasks_pushed")[()]

        assert told() == (0, 0)
        async with (
            SiloGRPCClient(server.address) as client,
            SiloWorker(client=client, worker_id="w", task_group=GROUP, handler=handler),
        ):
            await client.enqueue(payload=1, task_group=GROUP)
            await until(lambda: told() == (1, 1))
            release.set()
        await until(lambda: told() == (0, 0))
