"""Benches over gRPC with a real server process, our client and our worker."""

import asyncio
import json
import os
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from silo import NewJob, SiloGRPCClient, SiloWorker, TaskContext
from silo.cli.bench.measure import cpu_seconds, percentile, resident_mb, role_command
from silo.cli.server_process import ServerProcess

_GROUP = "bench"
_PAYLOAD = "x" * 100
_PATIENCE_S = 300.0
_WARM_UP = 20  # Jobs that do not count.
_IDLE_PROCESSES = 4
_GROUPS_OF_WORKER = 10
_REST_S, _LOOK_S = 30.0, 60.0


async def latency(jobs: int | None) -> dict[str, object]:
    """Milliseconds of one job at a time on an idle worker, through a real server.

    From the enqueue call to the start of the handler, from the end of the handler to the return of
    `handle.result()`, and from the cancel call to the handler seeing it.
    """
    count = jobs or 300
    starts: list[float] = []
    results: list[float] = []
    cancels: list[float] = []
    ended = 0.0
    running = asyncio.Event()

    async def handler(ctx: TaskContext[float | None, dict[str, str]]) -> None:
        nonlocal ended
        if ctx.task.payload is None:
            running.set()
            await ctx.wait_cancelled()
        else:
            starts.append(time.perf_counter() - ctx.task.payload)
        ended = time.perf_counter()

    with tempfile.TemporaryDirectory(prefix="silo-bench-") as folder:
        server = ServerProcess(Path(folder))
        await server.start()
        try:
            async with (
                SiloGRPCClient(servers=[server.address]) as client,
                SiloWorker(client=client, worker_id="w", task_group=_GROUP, handler=handler),
            ):
                for _ in range(count + _WARM_UP):
                    job = await client.enqueue(payload=time.perf_counter(), task_group=_GROUP)
                    await job.result(timeout=_PATIENCE_S)
                    results.append(time.perf_counter() - ended)
                    await asyncio.sleep(0.01)  # The worker is idle again before the next one.
                for _ in range(count // 3 + _WARM_UP):
                    running.clear()
                    job = await client.enqueue(payload=None, task_group=_GROUP)
                    await running.wait()
                    began = time.perf_counter()
                    await job.cancel()
                    await job.result(timeout=_PATIENCE_S)
                    cancels.append(ended - began)
        finally:
            await server.stop()
    return {
        **_quantiles("enqueue_to_start", starts),
        **_quantiles("end_to_result", results),
        **_quantiles("cancel_to_seen", cancels),
        "jobs": count,
        "durability": "flushed",
        "protocol": "silo.ext.v1",
    }


def _quantiles(name: str, seconds: list[float]) -> dict[str, object]:
    samples = [each * 1000 for each in seconds[_WARM_UP:]]
    return {
        f"{name}_ms_p50": round(percentile(samples, 0.5), 2),
        f"{name}_ms_p99": round(percentile(samples, 0.99), 2),
    }


async def idle(workers: int | None) -> dict[str, object]:
    """What a server costs at rest with many workers connected, each with ten task groups of its own."""
    count = workers or 1_000
    with tempfile.TemporaryDirectory(prefix="silo-bench-") as folder:
        server = ServerProcess(Path(folder))
        await server.start()
        try:
            before_mb = resident_mb(server.pid)
            shares = [count // _IDLE_PROCESSES] * _IDLE_PROCESSES
            shares[0] += count % _IDLE_PROCESSES
            roles = [await _role("wait", server.address, share) for share in shares]
            await asyncio.gather(*map(_says, roles))
            await asyncio.sleep(_REST_S)
            began_s = cpu_seconds(server.pid)
            await asyncio.sleep(_LOOK_S)
            used_s = cpu_seconds(server.pid) - began_s
            after_mb = resident_mb(server.pid)
            for role in roles:
                role.terminate()
                await role.wait()
        finally:
            await server.stop()
    return {
        "workers": count,
        "idle_task_groups": count * _GROUPS_OF_WORKER,
        "server_cpu_percent_of_a_core": round(100 * used_s / _LOOK_S, 2),
        "server_mb": after_mb,
        "server_grown_mb": round(after_mb - before_mb, 1),
        "looked_s": _LOOK_S,
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


async def wait_for_work(address: str, count: int) -> None:
    """Connect workers, each over a connection of its own, and wait until told to stop."""

    async def handler(ctx: TaskContext[object, dict[str, str]]) -> None:
        raise AssertionError("there is nothing to do")

    async with AsyncExitStack() as stack:
        for number in range(count):
            client = await stack.enter_async_context(
                SiloGRPCClient(servers=[address], grpc_client_options={"grpc.use_local_subchannel_pool": 1})
            )
            name = f"{os.getpid()}-{number}"
            groups = [f"{name}-{group}" for group in range(_GROUPS_OF_WORKER)]
            worker = SiloWorker(client=client, worker_id=name, task_group=groups, handler=handler)
            await stack.enter_async_context(worker)
            await client.refresh_topology()
        print(json.dumps({"at": time.perf_counter()}), flush=True)
        await asyncio.get_running_loop().create_future()
