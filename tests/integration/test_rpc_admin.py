"""The calls of administrators: flush, compaction, storage facts, profiles and the dump of tasks."""

import asyncio
import os
import re
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from random import Random
from typing import Any  # Stubs and messages of grpc are untyped.
from uuid import UUID

import grpc
import pytest

from silo.clock import SystemClock
from silo.errors import SHARD_NOT_FOUND
from silo.model.shards import ShardInfo, initial_ranges
from silo.node.hosting import host_shards
from silo.node.layout import LAYOUT_VERSION, Layout
from silo.rpc.server import listen
from silo.shard.shard import ShardOptions
from silo.storage.memory import Fault
from silo.storage.slate import SlateStorage
from silo.telemetry import profiling
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2_grpc
from tests.builders import until
from tests.integration.real_silo import real_silo
from tests.integration.rpc_server import RpcServer, packed, refusal, rpc_server
from tests.profiles import read

SHARD_CALLS = ["FlushShard", "CompactShard", "GetShardStorageInfo"]
FOREIGN = "00000000-0000-0000-0000-0000000000FF"
OPERATION = {
    "FlushShard": ("flush", "flush failed"),
    "CompactShard": ("compact", "compaction failed"),
    "GetShardStorageInfo": ("info", "failed to read LSM state"),
}
RUNNING = "a profile is being taken already; try again when it is done"
GUIDE = Path(__file__).parents[2] / "docs/guides/running-a-server.md"


async def call(server: RpcServer, method: str, shard: str | None = None) -> Any:
    request = getattr(pb, f"{method}Request")(shard=server.shard if shard is None else shard)
    return await getattr(server.stub, method)(request)


# Flush, compaction, facts


async def test_flush_and_compaction_answer_with_the_shard_as_it_was_named() -> None:
    async with rpc_server() as server:
        named = "{" + server.shard.upper() + "}"

        flushed = await call(server, "FlushShard", named)
        compacted = await call(server, "CompactShard", named)

        assert flushed.status == f"flushed shard {named}"
        assert compacted.status == f"full compaction submitted for shard {named}"


async def test_storage_facts_say_what_the_store_is_made_of() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        info = await call(server, "GetShardStorageInfo")

        size = sum(len(key) + len(value) for key, value in server.rows()[server.shard].items())
        assert info == pb.GetShardStorageInfoResponse(
            sorted_run_count=1,
            total_sorted_run_size=size,
            sorted_runs=[pb.SortedRunInfo(id=0, sst_count=1, estimated_size=size)],
        )


@pytest.mark.parametrize("text", ["", "not-a-uuid"])
@pytest.mark.parametrize("method", SHARD_CALLS)
async def test_an_id_that_is_none_is_a_wrong_request(method: str, text: str) -> None:
    async with rpc_server() as server:
        refused = await refusal(call(server, method, text))
        assert refused == (grpc.StatusCode.INVALID_ARGUMENT, f"invalid shard ID: {text}")


@pytest.mark.spec("W-CC-93")
@pytest.mark.parametrize("method", SHARD_CALLS)
async def test_a_shard_of_another_node_is_named_and_nobody_is_sent_elsewhere(method: str) -> None:
    async with rpc_server() as server:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(server, method, FOREIGN)

        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert refused.value.details() == f"shard {FOREIGN} not found on this node"
        assert SHARD_NOT_FOUND not in refused.value.details()
        trailers = {key for key, _ in refused.value.trailing_metadata() or ()}
        assert not any(key.startswith("x-silo-shard-owner") for key in trailers)


@pytest.mark.parametrize("method", SHARD_CALLS)
async def test_a_shard_that_is_being_opened_is_not_here_yet(method: str) -> None:
    async with rpc_server() as server:
        for number in range(2, 20):
            server.storage.faults.plan("open", Fault.FAIL_BEFORE, call=number)
        server.storage.faults.plan("write", Fault.FAIL_BEFORE)
        await refusal(server.enqueue("j"))
        await until(lambda: not server.node.open_shards())

        refused = await refusal(call(server, method))
        assert refused == (grpc.StatusCode.NOT_FOUND, f"shard {server.shard} not found on this node")


@pytest.mark.parametrize("method", SHARD_CALLS)
async def test_a_failure_says_what_failed_and_why_and_stops_nothing(method: str) -> None:
    async with rpc_server() as server:
        operation, what = OPERATION[method]
        server.storage.faults.plan(operation, Fault.FAIL_BEFORE)

        code, text = await refusal(call(server, method))

        assert code is grpc.StatusCode.INTERNAL
        assert text == f"{what}: injected: failed before it was applied (operation='{operation}')"
        await server.enqueue("j")
        await call(server, method)


@asynccontextmanager
async def server_on_files(path: Path) -> AsyncIterator[tuple[Any, str]]:
    """A stub for a server with one shard on local files, and the shard's id."""
    shard = ShardInfo(str(UUID(int=1)), initial_ranges(1)[0])
    async with (
        host_shards(
            Layout(version=LAYOUT_VERSION, node_id="node-1", shards=(shard,)),
            advertised_addr="silo.example:7450",
            tenancy_enabled=False,
            dev_mode=False,
            storage=SlateStorage(str(path)),
            clock=SystemClock(),
            rng=Random(7),
            options=ShardOptions(),
        ) as node,
        listen("127.0.0.1:0", node) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield silo_pb2_grpc.SiloStub(channel), shard.shard_id


async def test_a_flush_moves_the_log_into_tables_that_the_facts_show(tmp_path: Path) -> None:
    async with server_on_files(tmp_path) as (stub, shard):
        await stub.Enqueue(
            pb.EnqueueRequest(shard=shard, id="j", task_group="default", payload=packed(b"\xa1p"))
        )
        before = await stub.GetShardStorageInfo(pb.GetShardStorageInfoRequest(shard=shard))
        await stub.FlushShard(pb.FlushShardRequest(shard=shard))
        after = await stub.GetShardStorageInfo(pb.GetShardStorageInfoRequest(shard=shard))
        status = (await stub.CompactShard(pb.CompactShardRequest(shard=shard))).status

        assert before.l0_sst_count == before.total_l0_size == 0
        assert after.l0_sst_count == 1
        assert after.total_l0_size > 0
        assert (after.sorted_run_count, list(after.sorted_runs)) == (0, [])
        assert status == f"full compaction submitted for shard {shard}"


# Profiles


def spin_for_the_profile(stop: threading.Event) -> None:
    while not stop.is_set():
        sum(range(1000))


@contextmanager
def busy_thread() -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=spin_for_the_profile, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def test_a_cpu_profile_names_the_busy_function_and_the_server_answers_meanwhile() -> None:
    async with rpc_server() as server:
        with busy_thread():
            profile = asyncio.ensure_future(
                server.stub.CpuProfile(pb.CpuProfileRequest(duration_seconds=1, frequency=100))
            )
            answered = 0
            while not profile.done():
                await server.enqueue("")
                answered += 1
        response = await profile

    found = read(response.profile_data)
    assert any("spin_for_the_profile" in stack.functions for stack in found.stacks)
    assert response.duration_seconds == 1
    assert response.samples > 0
    assert found.types == [("samples", "count"), ("cpu", "nanoseconds")]
    assert answered > 5


async def test_a_heap_profile_names_who_keeps_memory_and_the_server_answers_meanwhile() -> None:
    async with rpc_server() as server:
        profile = asyncio.ensure_future(server.stub.HeapProfile(pb.HeapProfileRequest(duration_seconds=1)))
        answered = 0
        while not profile.done():
            await server.enqueue("")
            answered += 1
        response = await profile

    found = read(response.profile_data)
    assert any(name.endswith("Enqueue") for stack in found.stacks for name in stack.functions)
    assert response.duration_seconds == 1
    assert found.types == [("inuse_objects", "count"), ("inuse_space", "bytes")]
    assert answered > 5


async def test_a_frequency_beyond_the_most_is_lowered_to_it() -> None:
    async with rpc_server() as server:
        response = await server.stub.CpuProfile(pb.CpuProfileRequest(duration_seconds=1, frequency=2**32 - 1))
    assert read(response.profile_data).period == 1_000_000


@pytest.mark.parametrize("method", ["CpuProfile", "HeapProfile"])
async def test_a_second_profile_is_refused_and_one_after_a_hung_up_call_is_not(method: str) -> None:
    async with rpc_server() as server:
        first = asyncio.ensure_future(server.stub.CpuProfile(pb.CpuProfileRequest(duration_seconds=300)))
        await until(profiling._turn.locked)
        second = getattr(pb, f"{method}Request")(duration_seconds=1)
        refused = await refusal(getattr(server.stub, method)(second))
        assert refused == (grpc.StatusCode.RESOURCE_EXHAUSTED, RUNNING)

        first.cancel()
        await until(lambda: not profiling._turn.locked())
        assert (await getattr(server.stub, method)(second)).duration_seconds == 1


# Tasks


async def test_a_dump_shows_the_tasks_of_a_shard_and_no_payload() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", payload=packed(b"\xa6secret"), metadata={"key": "hidden"})
        response = await server.stub.DumpTasks(pb.DumpTasksRequest())

    assert f'task "commit {server.shard}"\n' in response.dump
    assert "in Committer.run\n" in response.dump
    assert 'thread "MainThread"\n' in response.dump
    assert response.task_count == response.dump.count('\ntask "')
    assert "secret" not in response.dump
    assert "hidden" not in response.dump


# The guide


async def test_the_example_of_the_guide_takes_profiles_that_open(tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    async with real_silo() as address:
        for printed, ours in (("localhost:7450", address), ("duration_seconds=30", "duration_seconds=1")):
            assert printed in example
            example = example.replace(printed, ours)
        (tmp_path / "example.py").write_text(example)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-W",
            "error",
            "example.py",
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": os.environ["PATH"]},
        )
        try:
            async with asyncio.timeout(60):
                output, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()

    assert (process.returncode, errors.decode()) == (0, "")
    assert "samples in 1 s" in output.decode()
    assert read((tmp_path / "cpu.pb").read_bytes()).types[-1] == ("cpu", "nanoseconds")
    assert read((tmp_path / "heap.pb").read_bytes()).types[-1] == ("inuse_space", "bytes")
    assert 'thread "MainThread"' in (tmp_path / "tasks.txt").read_text()
