"""Benches over gRPC with a real server process, our client and our worker."""

import asyncio
import tempfile
import time
from pathlib import Path

from silo import SiloGRPCClient, SiloWorker, TaskContext
from silo.cli.bench.measure import percentile, role_command
from silo.cli.server_process import ServerProcess

_GROUP = "bench"
_PAYLOAD = "x" * 100
_IN_FLIGHT = 64


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
    count = jobs or 10_000
    with tempfile.TemporaryDirectory(prefix="silo-bench-") as folder:
        server = ServerProcess(Path(folder))
        await server.start()
        try:
            started = time.perf_counter()
            roles = [
                await asyncio.create_subprocess_exec(*role_command(role, server.address, count))
                for role in ("produce", "work")
            ]
            codes = [await role.wait() for role in roles]
            elapsed = time.perf_counter() - started
        finally:
            await server.stop()
    if any(codes):
        raise RuntimeError(f"producer and worker ended with {codes}")
    return {
        "jobs_per_s": round(count / elapsed),
        "jobs": count,
        "seconds": round(elapsed, 2),
        "durability": "flushed",
        "protocol": "silo.v1",
    }


async def produce(address: str, count: int) -> None:
    left = iter(range(count))
    async with SiloGRPCClient(servers=[address]) as client:

        async def enqueue() -> None:
            for _ in left:
                await client.enqueue(payload=_PAYLOAD, task_group=_GROUP)

        await asyncio.gather(*(enqueue() for _ in range(_IN_FLIGHT)))


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
        SiloWorker(
            client=client,
            worker_id="bench",
            task_group=_GROUP,
            handler=handler,
            max_concurrent_tasks=_IN_FLIGHT,
            tasks_per_poll=_IN_FLIGHT,
        ),
    ):
        await finished.wait()
