"""Benches over gRPC with a real server process, our client and our worker."""

import asyncio
import json
import tempfile
import time
from pathlib import Path

from silo import NewJob, SiloGRPCClient, SiloWorker, TaskContext
from silo.cli.bench.measure import percentile, role_command
from silo.cli.server_process import ServerProcess

_GROUP = "bench"
_PAYLOAD = "x" * 100
_PATIENCE_S = 300.0


async def latency(jobs: int | None) -> dict[str, object]:
    """Milliseconds from the enqueue call to the start of the handler, one job at a time."""
    count = jobs or 300
    waits: list[float] = []
    started = asyncio.Event()

    async def handler(ctx: TaskContext[float, dict[str, str]]) -> None:
        waits.append((time.perf_counter() - ctx.task.payload) * 1000)
        started.set()

    with tempfile.TemporaryDirectory(prefix="silo-bench-") as folder:
        server = ServerProcess(Path(folder))
        await server.start()
        try:
            async with (
                SiloGRPCClient(servers=[server.address]) as client,
                SiloWorker(client=client, worker_id="w", task_group=_GROUP, handler=handler),
            ):
                for _ in range(count + 20):
                    started.clear()
                    await client.enqueue(payload=time.perf_counter(), task_group=_GROUP)
                    await started.wait()
                    await asyncio.sleep(0.01)  # The worker is idle again before the next one.
        finally:
            await server.stop()
    samples = waits[20:]
    return {
        "p50_ms": round(percentile(samples, 0.5), 2),
        "p99_ms": round(percentile(samples, 0.99), 2),
        "max_ms": round(max(samples), 2),
        "jobs": len(samples),
        "durability": "flushed",
        "protocol": "silo.v1",
    }


async def end_to_end(jobs: int | None) -> dict[str, object]:
    """Jobs a second through server, producer and worker, each a process of its own."""
    count = jobs or 20_000
    with tempfile.TemporaryDirectory(prefix="silo-bench-") as folder:
        server = ServerProcess(Path(folder))
        await server.start()
        try:
            worker = await _role("work", server.address, count)
            await _says(worker)  # It is connected.
            producer = await _role("produce", server.address, count)
            produced, finished = await asyncio.gather(_says(producer), _says(worker))
            codes = [await role.wait() for role in (producer, worker)]
        finally:
            await server.stop()
    if any(codes):
        raise RuntimeError(f"producer and worker ended with {codes}")
    elapsed = finished["at"] - produced["began"]
    return {
        "jobs_per_s": round(count / elapsed),
        "enqueues_per_s": round(count / (produced["at"] - produced["began"])),
        "jobs": count,
        "seconds": round(elapsed, 2),
        "durability": "flushed",
        "protocol": "silo.ext.v1",
    }


async def _role(role: str, address: str, count: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *role_command(role, address, count), stdout=asyncio.subprocess.PIPE
    )


async def _says(role: asyncio.subprocess.Process) -> dict[str, float]:
    """The next line of a role."""
    assert role.stdout is not None, "roles have a pipe"
    async with asyncio.timeout(_PATIENCE_S):
        line = await role.stdout.readline()
    if not line:
        raise RuntimeError(f"a role of the bench ended with {await role.wait()}")
    said: dict[str, float] = json.loads(line)
    return said


async def produce(address: str, count: int) -> None:
    async with SiloGRPCClient(servers=[address]) as client:
        await client.refresh_topology()
        began = time.perf_counter()
        jobs = (NewJob(payload=_PAYLOAD, task_group=_GROUP) for _ in range(count))
        async for _ in client.enqueue_many(jobs):
            pass
        print(json.dumps({"began": began, "at": time.perf_counter()}), flush=True)


async def work(address: str, count: int) -> None:
    done = 0
    finished = asyncio.Event()

    async def handler(ctx: TaskContext[str, dict[str, str]]) -> str:
        nonlocal done
        done += 1
        if done >= count:
            finished.set()
        return "ok"

    async with (
        SiloGRPCClient(servers=[address]) as client,
        SiloWorker(client=client, worker_id="bench", task_group=_GROUP, handler=handler),
    ):
        await client.refresh_topology()
        print(json.dumps({"at": time.perf_counter()}), flush=True)
        await finished.wait()
        print(json.dumps({"at": time.perf_counter()}), flush=True)
