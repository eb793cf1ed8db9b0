"""A server killed with -9 at random moments, while clients enqueue and a worker runs, loses nothing."""

import asyncio
import random
from pathlib import Path
from typing import Any  # grpc is untyped.

import grpc
import pytest

from silo import Failure, RetryPolicy, SiloClientError, SiloGRPCClient, SiloWorker, Success
from silo.cli.server_process import ServerProcess
from silo.node.layout import LAYOUT_STORE
from silo.storage.slate import SlateStorage
from silo.wire.payload import decode
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2_grpc
from silo.worker.context import TaskContext
from tests.invariants import check_snapshot

_GROUP = "crash"
_RETRY = RetryPolicy(
    retry_count=1000, initial_interval_ms=1, max_interval_ms=20, randomize_interval=True, backoff_factor=2.0
)


async def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    await _survive(tmp_path, kills=20, seed=20)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_three_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    await _survive(tmp_path, kills=300, seed=300)


async def _survive(folder: Path, *, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    server = ServerProcess(folder)
    await server.start()
    acknowledged: dict[str, int] = {}  # Job id to payload.
    reported: dict[str, tuple[str, str]] = {}  # Task id to job id and how its attempt ended.
    stop = asyncio.Event()
    try:
        async with SiloGRPCClient(servers=[server.address]) as client:

            async def handler(ctx: TaskContext[int, dict[str, str]]) -> int:
                if ctx.task.payload % 7 == 0 and ctx.task.attempt_number == 1:
                    raise ValueError("fails once on purpose")
                return ctx.task.payload * 2

            worker = SiloWorker(
                client=client,
                worker_id="w",
                task_group=_GROUP,
                handler=handler,
                max_concurrent_tasks=16,
                poll_interval_ms=50,
                heartbeat_interval_ms=1000,
                on_error=lambda error, context: None,
            )
            async with worker:
                bookkeeper = asyncio.create_task(_report_and_note(client, stop, reported))
                producers = [asyncio.create_task(_produce(client, stop, acknowledged)) for _ in range(4)]
                for _ in range(kills):
                    await asyncio.sleep(rng.uniform(0.02, 0.4))
                    await server.kill()
                    await server.start()
                stop.set()
                await asyncio.gather(*producers, bookkeeper)
                await _all_succeed(client, acknowledged)
                await _all_stand(client, reported)
    finally:
        await server.stop()
    assert len(acknowledged) > kills
    await _check_shards(folder, acknowledged)


async def _produce(client: SiloGRPCClient, stop: asyncio.Event, acknowledged: dict[str, int]) -> None:
    count = 0
    while not stop.is_set():
        count += 1
        handle = await client.enqueue(payload=count, task_group=_GROUP, retry_policy=_RETRY)
        acknowledged[handle.id] = count
        await asyncio.sleep(0.005)


async def _report_and_note(
    client: SiloGRPCClient, stop: asyncio.Event, reported: dict[str, tuple[str, str]]
) -> None:
    """A worker that keeps books: every outcome it got an acknowledgement for."""
    while not stop.is_set():
        try:
            leased = await client.lease_tasks(worker_id="b", max_tasks=4, task_group=_GROUP, wait_ms=50)
            for task in leased.tasks:
                ends_well = task.attempt_number % 2 == 0
                payload = decode(task.payload_bytes, field="payload")
                outcome = Success(payload * 2) if ends_well else Failure("ODD", None)
                await client.report_outcome(task_id=task.id, shard=task.shard, outcome=outcome)
                reported[task.id] = (task.job_id, "Succeeded" if ends_well else "Failed")
        except SiloClientError:
            continue  # Not acknowledged: whatever became of it, nothing was promised.


async def _all_stand(client: SiloGRPCClient, reported: dict[str, tuple[str, str]]) -> None:
    """No acknowledged outcome was undone."""
    assert reported
    for task_id, (job_id, status) in reported.items():
        job = await client.handle(job_id).job(include_attempts=True)
        assert (task_id, status) in [(attempt.task_id, attempt.status) for attempt in job.attempts or ()]


async def _all_succeed(client: SiloGRPCClient, acknowledged: dict[str, int]) -> None:
    for job_id, payload in acknowledged.items():
        handle = client.handle(job_id)
        result = await handle.result(timeout=60)
        job = await handle.job(include_attempts=True)
        assert result.status == "Succeeded", (job_id, result)
        successes = [attempt for attempt in job.attempts or () if attempt.status == "Succeeded"]
        assert len(successes) == 1, (job_id, job.attempts)
        assert result.result == payload * 2


async def _check_shards(folder: Path, acknowledged: dict[str, int]) -> None:
    """Read every row of every shard and hold it against the invariants."""
    storage = SlateStorage(str(folder))
    found: set[str] = set()
    for name in _shard_names(folder):
        store = await storage.open(name)
        try:
            rows = await store.scan(b"\x00", b"\xff", limit=10_000_000)
        finally:
            await store.close()
        found |= {job_id for _, job_id in check_snapshot(dict(rows))}
    assert acknowledged.keys() <= found


def _shard_names(folder: Path) -> list[str]:
    return [path.name for path in sorted(folder.iterdir()) if path.is_dir() and path.name != LAYOUT_STORE]


async def test_heap_profiles_of_a_busy_server_leave_it_alive(tmp_path: Path) -> None:
    """The end of tracemalloc kills a process whose store allocates in threads of its own; ours is another."""
    server = ServerProcess(tmp_path)
    await server.start()
    try:
        async with SiloGRPCClient(servers=[server.address]) as client, asyncio.TaskGroup() as group:
            channel = grpc.aio.insecure_channel(server.address)
            stub = silo_pb2_grpc.SiloStub(channel)
            profiling = group.create_task(_profile(stub, rounds=4))
            for _ in range(8):
                group.create_task(_enqueue_until(client, profiling))
        await channel.close()
        assert server.exit_code is None
    finally:
        await server.stop()


async def _profile(stub: Any, *, rounds: int) -> None:
    for _ in range(rounds):
        answer = await stub.HeapProfile(pb.HeapProfileRequest(duration_seconds=1))
        assert answer.profile_data


async def _enqueue_until(client: SiloGRPCClient, done: "asyncio.Task[None]") -> None:
    while not done.done():
        await client.enqueue(payload="x", task_group="g")
