"""`silo server` as a process: how it starts, what it says, what it refuses, and how it stops."""

import asyncio
import os
import re
import resource
import signal
import socket
import time
from collections.abc import Awaitable
from pathlib import Path

import msgspec
import pytest

from silo import Failure, JobNotFoundError, ShardRouting, SiloClientError, SiloGRPCClient, Success
from silo.cli.server_process import free_port
from silo.config import load_config
from silo.node.layout import LAYOUT_STORE, LAYOUT_VERSION
from silo.storage.slate import SlateStorage
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.builders import until
from tests.integration.child import Child, failure, silo, stub_of

GROUP = "commands"
STOP_DEADLINE_S = 30.0


def an_address() -> str:
    return f"127.0.0.1:{free_port()}"


def a_file(folder: Path, text: str) -> str:
    path = folder / "silo.toml"
    path.write_text(text)
    return str(path)


async def info_of(address: str) -> pb.GetClusterInfoResponse:
    async with stub_of(address) as stub:
        return await stub.GetClusterInfo(pb.GetClusterInfoRequest(), wait_for_ready=True, timeout=10)


async def enqueue(address: str, *ids: str, **fields: object) -> None:
    async with SiloGRPCClient(address) as client:
        for id in ids:
            await client.enqueue(id=id, payload=fields.get("payload"), task_group=GROUP)


async def has_all(address: str, *ids: str) -> None:
    async with SiloGRPCClient(address) as client:
        for id in ids:
            assert (await client.get_job(id)).id == id


def no_traceback(child: Child) -> None:
    assert "Traceback" not in child.out + child.err


# Starting


def test_without_arguments_it_serves_the_default_address_and_data_directory(
    tmp_path: Path,
) -> None:
    config = load_config(None, {"HOME": str(tmp_path)})
    assert config.server.grpc_addr == "127.0.0.1:7450"
    assert config.database.root == str(tmp_path / ".local/share/silo")


async def test_it_starts_without_configuration_and_greets(tmp_path: Path) -> None:
    address = an_address()
    async with silo(tmp_path, "server", "--grpc-addr", address) as server:
        await server.says("Ctrl-C")
        metrics, lines = re.search("http://.*/metrics", server.out), server.out.splitlines()
        assert metrics is not None
        assert lines == [
            f"Silo serves gRPC on {address} (8 shards)",
            f"  data        {tmp_path}/home/.local/share/silo",
            "  durability  flushed (acknowledged once it is on the disk or in the object store)",
            f"  metrics     {metrics[0]}",
            f"  enqueue     SiloGRPCClient(servers=['{address}'])",
            "  stop        Ctrl-C",
        ]
        assert "server started" in server.err
        await enqueue(address, "j")
        assert await server.stop() == 0
        no_traceback(server)
    assert (tmp_path / "home/.local/share/silo").is_dir()


async def test_a_file_configures_it_and_variables_are_expanded(tmp_path: Path) -> None:
    port = free_port()
    text = """
        [server]
        grpc_addr = "127.0.0.1:${PORT}"
        [coordination]
        initial_shard_count = ${SHARDS:-3}
        node_id = "${NODE:-ada}"
        [database]
        path = "${DATA}/%shard%"
        durability = "buffered"
        [logging]
        format = "json"
    """
    env = {"PORT": str(port), "DATA": str(tmp_path / "elsewhere")}
    async with silo(tmp_path, "server", "-c", a_file(tmp_path, text), env=env) as server:
        await server.says("Ctrl-C")
        assert f"127.0.0.1:{port} (3 shards)" in server.out
        assert f"data        {tmp_path}/elsewhere" in server.out
        assert "a crash may lose the last 100 ms" in server.out
        events = [msgspec.json.decode(line) for line in server.err.splitlines()]
        assert {"message": "server started", "node_id": "ada", "shards": 3}.items() <= events[-1].items()
        assert await server.stop() == 0


async def test_tenancy_can_be_enabled(tmp_path: Path) -> None:
    address = an_address()
    file = a_file(tmp_path, "[tenancy]\nenabled = true")
    async with silo(tmp_path, "server", "-c", file, "--grpc-addr", address) as server:
        await server.says("Ctrl-C")
        async with SiloGRPCClient(address) as client:
            for tenant in ("ada", "grace"):
                await client.enqueue(id="j", payload=tenant, task_group=GROUP, tenant=tenant)
            assert (await client.get_job("j", "ada")).payload == "ada"
            assert (await client.get_job("j", "grace")).payload == "grace"
            with pytest.raises(SiloClientError, match="tenant"):
                await client.enqueue(payload=1, task_group=GROUP)


async def test_jobs_that_have_ended_are_deleted_when_the_file_says_so(tmp_path: Path) -> None:
    address = an_address()
    file = a_file(tmp_path, "[database]\ncompleted_job_expire_s = 1")
    async with (
        silo(tmp_path, "server", "-c", file, "--grpc-addr", address) as server,
        SiloGRPCClient(address) as client,
    ):
        await server.says("Ctrl-C")
        for id in ("done", "failed"):
            await client.enqueue(id=id, payload=1, task_group=GROUP)
            task = await client.lease_task(id, worker_id="w")
            outcome = Success("result") if id == "done" else Failure("BROKEN")
            await client.report_outcome(task_id=task.id, shard=task.shard, outcome=outcome)
        assert (await client.get_job_result("done")).result == "result"
        async with asyncio.timeout(20):
            while await exists(client, "done"):  # noqa: ASYNC110  # Nobody is told of it.
                await asyncio.sleep(0.05)
        assert await exists(client, "failed")
        await client.enqueue(id="done", payload=2, task_group=GROUP)  # The id is free again.


async def exists(client: SiloGRPCClient, id: str) -> bool:
    try:
        return (await client.get_job(id)).id == id
    except JobNotFoundError:
        return False


# Refusing to start


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "[server]\ngrpc_adr = 'x'",
            "Config error: unknown key server.grpc_adr; did you mean server.grpc_addr?",
        ),
        ("[servr]", "Config error: unknown section [servr]; did you mean server?"),
        ("[server", "Config error: {file} is not valid TOML: "),
        ("[server]\ngrpc_addr = 'nowhere'", "Config error: server.grpc_addr = 'nowhere' is no address; "),
        ("[database]\npath = 'x'", "Config error: database.path = 'x' must end in /%shard%"),
        ("[database.slatedb]\na = 1979-05-27", "Config error: database.slatedb: "),
    ],
)
async def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    file = a_file(tmp_path, text)
    assert (await failure(tmp_path, "server", "-c", file)).startswith(line.format(file=file))


async def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    line = await failure(tmp_path, "server", "-c", "none.toml")
    assert line == "Config error: cannot read none.toml: No such file or directory"


async def test_an_unknown_log_level_is_one_line(tmp_path: Path) -> None:
    line = await failure(tmp_path, "server", env={"SILO_LOG": "loud"})
    assert line.startswith("Config error: SILO_LOG: unknown level 'loud'; known are: ")


async def test_a_secret_in_a_url_is_not_repeated(tmp_path: Path) -> None:
    file = a_file(tmp_path, "[database]\nbackend = 'url'\npath = 'ftp://ada:hunter2@host/%shard%'")
    line = await failure(tmp_path, "server", "-c", file, "--grpc-addr", an_address())
    assert "ftp://(hidden)@host" in line


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("127.0.0.1", "Config error: server.grpc_addr = '127.0.0.1' is no address; write host:port"),
        ("*:7450", "Config error: server.grpc_addr = '*:7450' is no address; write 0.0.0.0"),
        ("192.0.2.1:7450", "Error: 192.0.2.1:7450 is no address of this machine; choose another --grpc-addr"),
        ("no-such-host.invalid:7450", "Error: no-such-host.invalid:7450: "),
    ],
)
async def test_a_bad_address_is_one_line(tmp_path: Path, address: str, line: str) -> None:
    assert (await failure(tmp_path, "server", "--grpc-addr", address)).startswith(line)
    assert not (tmp_path / "home").exists()  # Nothing was made on the way.


async def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        line = await failure(tmp_path, "server", "--grpc-addr", address)
    assert line == f"Error: {address} is in use; stop what listens there or choose another --grpc-addr"


@pytest.mark.parametrize("below", ["", "/below"])
async def test_a_file_in_place_of_the_data_directory_is_one_line(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    data = f"{tmp_path}/file{below}"
    line = await failure(tmp_path, "server", "--grpc-addr", an_address(), "--data", data)
    assert line == f"Error: {data} is not a folder; choose another --data"


async def test_a_data_directory_without_permission_is_one_line(tmp_path: Path) -> None:
    data = (
        "/sys/silo" if os.geteuid() == 0 else str(tmp_path / "locked" / "data")
    )  # Root may write elsewhere.
    (tmp_path / "locked").mkdir(mode=0o500)
    line = await failure(tmp_path, "server", "--grpc-addr", an_address(), "--data", data)
    assert line == f"Error: no permission to write to data directory {data}; choose another --data"


@pytest.mark.parametrize("name", ["my data", "Jürgen #1 100%"])
async def test_a_data_directory_may_have_any_name(tmp_path: Path, name: str) -> None:
    address = an_address()
    async with silo(tmp_path, "server", "--grpc-addr", address, "--data", name) as server:
        await server.says("Ctrl-C")
        await enqueue(address, "j")
    assert (tmp_path / name / "silo.lock").is_file()
    assert list((tmp_path / name).glob("*/wal/*.sst"))


async def test_a_second_server_on_the_same_data_names_the_first(tmp_path: Path) -> None:
    async with silo(tmp_path, "server", "--grpc-addr", an_address()) as first:
        await first.says("Ctrl-C")
        line = await failure(tmp_path, "server", "--grpc-addr", an_address())
        assert (
            line
            == f"Error: data directory {tmp_path}/home/.local/share/silo is in use by process {first.pid}"
        )
        assert first.process.returncode is None


async def test_data_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    store = await SlateStorage(str(tmp_path / "data")).open(LAYOUT_STORE)
    newer = {"version": LAYOUT_VERSION + 1, "shards": "of another shape"}
    await store.write({b"layout": msgspec.json.encode(newer)})
    await store.close()
    line = await failure(tmp_path, "server", "--grpc-addr", an_address(), "--data", "data")
    assert line == "Error: a newer silo wrote this data root; start that version (version=2)"


async def test_an_unknown_setting_of_slatedb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "silo.toml").write_text('[database.slatedb]\nflush_intervall = "1s"\n')
    line = await failure(tmp_path, "server", "-c", "silo.toml", "--grpc-addr", an_address())
    expected = "unknown key database.slatedb.flush_intervall; did you mean database.slatedb.flush_interval?"
    assert line == f"Config error: {expected}"


# Stopping and starting again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_in_time_under_long_polls_and_silent_connections(
    tmp_path: Path, number: signal.Signals
) -> None:
    address = an_address()
    async with silo(tmp_path, "server", "--grpc-addr", address) as server, stub_of(address) as stub:
        await server.says("Ctrl-C")
        silent = [await connected(address), await connected(address, b"PRI * HTTP/2.0\r\n")]
        polls = [asyncio.ensure_future(a_long_poll(stub)) for _ in range(3)]
        await until_held(address, polls)
        began = time.monotonic()
        assert await server.stop(number, timeout_s=STOP_DEADLINE_S) == 0
        took_s = time.monotonic() - began
        answers = await asyncio.gather(*polls)
        assert [list(answer.tasks) for answer in answers] == [[], [], []]
        assert "server stopped" in server.err
        assert took_s < STOP_DEADLINE_S
        no_traceback(server)
        for writer in silent:
            writer.close()


async def connected(address: str, first: bytes = b"") -> asyncio.StreamWriter:
    host, _, port = address.partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(first)
    return writer


def a_long_poll(stub: object) -> Awaitable[pb.LeaseTasksResponse]:
    request = pb.LeaseTasksRequest(worker_id="w", max_tasks=1, task_group=GROUP)
    answer: Awaitable[pb.LeaseTasksResponse] = stub.LeaseTasks(  # type: ignore[attr-defined]
        request, metadata=(("silo-wait-ms", "30000"),), wait_for_ready=True
    )
    return answer


async def until_held(address: str, polls: list[asyncio.Future[pb.LeaseTasksResponse]]) -> None:
    """Calls made before are under way once a later one on the same server was answered."""
    for _ in range(3):
        await info_of(address)
    assert not any(poll.done() for poll in polls)


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    address = an_address()
    async with silo(tmp_path, "server", "--grpc-addr", address) as server, stub_of(address) as stub:
        await server.says("Ctrl-C")
        await enqueue(address, "kept")
        [shard, *_] = [owner.shard_id for owner in (await info_of(address)).shard_owners]
        request = pb.LeaseTasksRequest(shard=shard, worker_id="w", max_tasks=1, task_group=GROUP)
        poll = asyncio.ensure_future(stub.LeaseTasks(request, metadata=(("silo-wait-ms", "30000"),)))
        await until_held(address, [poll])
        server.process.send_signal(signal.SIGINT)
        await server.says("server stopping")  # And it waits for the poll, which holds one shard.
        assert await server.stop(signal.SIGINT) == -signal.SIGINT
        no_traceback(server)
        await asyncio.gather(poll, return_exceptions=True)
    async with silo(tmp_path, "server", "--grpc-addr", address) as server:
        await server.says("Ctrl-C")
        await has_all(address, "kept")


async def test_a_restart_finds_the_node_the_shards_and_all_jobs(tmp_path: Path) -> None:
    address = an_address()
    async with silo(tmp_path, "server", "--grpc-addr", address) as server:
        await server.says("Ctrl-C")
        await enqueue(address, "a", "b", "c")
        before = await info_of(address)
        assert await server.stop() == 0
    file = a_file(tmp_path, "[coordination]\ninitial_shard_count = 2")
    async with silo(tmp_path, "server", "-c", file, "--grpc-addr", address) as server:
        await server.says("Ctrl-C")
        await has_all(address, "a", "b", "c")
        assert await info_of(address) == before
        assert "initial_shard_count ignored: the shards exist" in server.err


async def test_twenty_starts_and_stops_leave_nothing_behind(tmp_path: Path) -> None:
    address, data = an_address(), tmp_path / "data"
    stores: set[str] = set()
    for round in range(20):
        async with silo(tmp_path, "server", "--grpc-addr", address, "--data", str(data)) as server:
            await server.says("Ctrl-C")
            if round in (0, 19):
                await enqueue(address, f"job {round}")
            assert await server.stop() == 0
            assert server.err.count("\n") <= 4
        names = {path.name for path in data.iterdir()}
        stores = stores or names
        assert names == stores
    assert len(stores) == 8 + 2  # The shards, the layout and the lock file.
    assert list((tmp_path / "home").rglob("*")) == []


async def test_a_signal_while_it_starts_is_no_traceback(tmp_path: Path) -> None:
    async with silo(tmp_path, "server", "--grpc-addr", an_address()) as server:
        await until((tmp_path / "home/.local/share/silo/silo.lock").exists)
        code = await server.stop(signal.SIGINT)
        assert code in (0, 130, -signal.SIGINT)
        no_traceback(server)


# A full disk


async def test_a_full_disk_is_told_to_the_caller_and_loses_no_acknowledged_job(tmp_path: Path) -> None:
    address = an_address()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    routing = ShardRouting(max_retries=1)
    async with silo(tmp_path, "server", "--grpc-addr", address, before=limit) as server:
        await server.says("Ctrl-C")
        await enqueue(address, "before")
        async with SiloGRPCClient(address, shard_routing=routing, rpc_timeout_ms=5_000) as client:
            with pytest.raises(SiloClientError) as caught:
                await client.enqueue(id="large", payload="x" * 1_000_000, task_group=GROUP)
        assert "Traceback" not in str(caught.value)
        await server.says("shard stopped: reopening")
        await enqueue(address, "between")  # What has room is taken again.
        no_traceback(server)
        assert await server.stop() == 0
    async with silo(tmp_path, "server", "--grpc-addr", address) as server:
        await server.says("Ctrl-C")
        await has_all(address, "before", "between")
        await enqueue(address, "after")


# Help


async def test_version_and_help(tmp_path: Path) -> None:
    async with silo(tmp_path, "--version") as version:
        assert await version.ended() == 0
        assert version.out == "silo 0.1.0\n"
    async with silo(tmp_path, "--help") as help:
        assert await help.ended() == 0
        assert all(command in help.out for command in ("server", "worker", "bench", "demo"))
    async with silo(tmp_path, "server", "--help") as help:
        assert await help.ended() == 0
        assert all(option in help.out for option in ("--config", "-c", "--grpc-addr", "--data", "--verbose"))


async def test_a_usage_error_suggests_and_exits_with_2(tmp_path: Path) -> None:
    async with silo(tmp_path, "serve") as command:
        assert await command.ended() == 2
        assert "Did you mean 'server'?" in command.err
