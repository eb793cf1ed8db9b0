"""Benches of one shard without a network, on local files, flushed."""

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import repeat
from pathlib import Path
from random import Random

from silo.cli.bench.measure import resident_mb, role_command
from silo.clock import SystemClock
from silo.model.attempt import Success
from silo.model.job import DEFAULT_TENANT, LeasedTask, NewJob
from silo.model.limit import Limit
from silo.model.shards import HashRange
from silo.shard.shard import Shard
from silo.storage.journal import JournaledStorage
from silo.storage.slate import SlateStorage

PAYLOAD = b"x" * 100
GROUP = "bench"
_PRODUCERS = 400
_WORKERS = 4
_LEASE = 50


@asynccontextmanager
async def open_shard(root: Path) -> AsyncIterator[Shard]:
    store = await JournaledStorage(SlateStorage(str(root))).open("bench")
    shard = await Shard.open(
        shard_id="bench", range=HashRange(), store=store, clock=SystemClock(), rng=Random(os.getpid())
    )
    try:
        yield shard
    finally:
        await shard.close()


def new_job(tenant: str = DEFAULT_TENANT, limits: tuple[Limit, ...] = ()) -> NewJob:
    return NewJob(
        tenant=tenant,
        id=None,
        task_group=GROUP,
        priority=50,
        start_at_ms=0,
        payload=PAYLOAD,
        limits=limits,
    )


async def enqueue(shard: Shard, jobs: Iterable[NewJob]) -> None:
    """Enqueue all, many at a time."""
    left = iter(jobs)

    async def produce() -> None:
        for job in left:
            await shard.enqueue(job)

    await asyncio.gather(*(produce() for _ in range(_PRODUCERS)))


async def lease(shard: Shard, worker: str, count: int = _LEASE) -> list[LeasedTask]:
    leased = await shard.lease_tasks(worker_id=worker, task_group=GROUP, max_tasks=count, wait_ms=20)
    return [task for task in leased if isinstance(task, LeasedTask)]


async def report(shard: Shard, task: LeasedTask) -> None:
    assert task.state.lease is not None
    await shard.report(task.state.lease.task_id, Success(b"ok"))


async def lifecycles_per_s(shard: Shard, jobs: Sequence[NewJob]) -> float:
    """Enqueue, lease and report all, as fast as it goes."""
    count, done = len(jobs), 0

    async def work(worker: str) -> None:
        nonlocal done
        while done < count:
            tasks = await lease(shard, worker)
            done += len(tasks)
            await asyncio.gather(*(report(shard, task) for task in tasks))

    started = time.perf_counter()
    await asyncio.gather(enqueue(shard, jobs), *(work(f"w{n}") for n in range(_WORKERS)))
    return count / (time.perf_counter() - started)


async def lifecycles(jobs: int | None) -> dict[str, object]:
    """Lifecycles a second with nothing else in the shard, and with a backlog of a million."""
    count = jobs or 60_000
    pending = 1_000_000 if jobs is None else 10 * jobs
    with tempfile.TemporaryDirectory(prefix="silo-bench-") as folder:
        async with open_shard(Path(folder) / "empty") as shard:
            await lifecycles_per_s(shard, [new_job()] * (count // 10))
            empty = await lifecycles_per_s(shard, [new_job()] * count)
        async with open_shard(Path(folder) / "backlog") as shard:
            started = time.perf_counter()
            await enqueue(shard, repeat(new_job(), pending))
            enqueue_rate = pending / (time.perf_counter() - started)
            loaded = await lifecycles_per_s(shard, [new_job()] * count)
    return {
        "lifecycles_per_s": round(empty),
        "lifecycles_per_s_with_backlog": round(loaded),
        "ratio": round(loaded / empty, 3),
        "enqueues_per_s": round(enqueue_rate),
        "jobs": count,
        "backlog": pending,
        "durability": "flushed",
        "store": "local files",
    }


async def fairness(jobs: int | None) -> dict[str, object]:
    """How many more jobs of a busy tenant start before the first one of a new tenant."""
    count = jobs or 100_000
    with tempfile.TemporaryDirectory(prefix="silo-bench-") as folder:
        async with open_shard(Path(folder)) as shard:
            await enqueue(shard, repeat(new_job("a"), count))
            await lease(shard, "w", 10)
            await shard.enqueue(new_job("b"))
            before = 0
            while True:
                tasks = await lease(shard, "w", 10)
                tenants = [task.job.tenant for task in tasks]
                if "b" in tenants:
                    before += tenants.index("b")
                    break
                before += len(tasks)
    return {
        "starts_of_a_before_b": before,
        "backlog_of_a": count,
        "durability": "flushed",
        "store": "local files",
    }


async def backlog(jobs: int | None) -> dict[str, object]:
    """Memory of a process with one and two million pending jobs; time to the first lease after kill -9."""
    count = jobs or 2_000_000
    with tempfile.TemporaryDirectory(prefix="silo-bench-") as folder:
        child = await asyncio.create_subprocess_exec(
            *role_command("fill", folder, count), stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout is not None
        half_mb = float(await child.stdout.readline())
        full_mb = float(await child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        await child.wait()
        started = time.perf_counter()
        async with open_shard(Path(folder)) as shard:
            opened_s = time.perf_counter() - started
            tasks = await lease(shard, "w", 1)
            first_lease_s = time.perf_counter() - started
            total = shard.counts.total_jobs
    if not tasks or total != count:
        raise RuntimeError(f"{total} of {count} jobs survived the kill")
    return {
        "resident_mb": full_mb,
        "resident_mb_at_half": half_mb,
        "growth_mb": round(full_mb - half_mb, 1),
        "reopen_s": round(opened_s, 3),
        "first_lease_s": round(first_lease_s, 3),
        "backlog": count,
        "durability": "flushed",
        "store": "local files",
    }


async def fill(folder: Path, count: int) -> None:
    """The child of `backlog`: print resident memory at half and at all, then wait to be killed."""
    async with open_shard(folder) as shard:
        for _ in range(2):
            await enqueue(shard, repeat(new_job(), count // 2))
            await lease(shard, "w", 1)
            print(resident_mb(os.getpid()), flush=True)
        await asyncio.Event().wait()
