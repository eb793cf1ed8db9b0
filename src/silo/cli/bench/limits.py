"""Benches of limits on one shard without a network, on local files, flushed."""

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path

from silo.cli.bench.engine import enqueue, lease, lifecycles_per_s, new_job, open_shard, report
from silo.cli.bench.measure import percentile, resident_mb
from silo.model.change import Change
from silo.model.job import NewJob
from silo.model.limit import ConcurrencyLimit, Limit
from silo.shard.shard import Shard

_KEYS = 100  # Queues that the jobs of a run spread over.
_GRANTS = 2_000


async def limits(jobs: int | None) -> dict[str, object]:
    """Lifecycles a second with limits; memory, and time of a grant, with many queues or a long one."""
    count = jobs or 40_000
    many = 1_000_000 if jobs is None else 10 * jobs
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="silo-bench-") as folder:
        for number, wide in ((0, 10_000), (1, 10_000), (3, 10_000), (1, 2)):
            name = f"{number}_limits" if wide > 2 else "1_limit_that_is_full"
            async with open_shard(Path(folder) / name) as shard:
                await _run(shard, count // 10, number, wide)
                figures[f"lifecycles_per_s_with_{name}"] = round(await _run(shard, count, number, wide))
        async with open_shard(Path(folder) / "keys") as shard:
            figures |= await _grants(shard, "many_keys", _one_each(many), 2 * many)
        async with open_shard(Path(folder) / "waiters") as shard:
            figures |= await _grants(
                shard, "many_waiters", repeat(new_job(limits=_limits("k", most=10)), many), many
            )
    ratio = int(str(figures["lifecycles_per_s_with_1_limits"])) / int(
        str(figures["lifecycles_per_s_with_0_limits"])
    )
    return {
        **figures,
        "ratio_of_1_limit": round(ratio, 3),
        "jobs": count,
        "many": many,
        "durability": "flushed",
        "store": "local files",
    }


def _limits(*names: str, most: int) -> tuple[Limit, ...]:
    return tuple(ConcurrencyLimit(key=name, max_concurrency=most) for name in names)


async def _run(shard: Shard, count: int, limits_each: int, most: int) -> float:
    jobs = [
        new_job(limits=_limits(*(f"limit{limit}-{key}" for limit in range(limits_each)), most=most))
        for key in range(_KEYS)
    ]
    return await lifecycles_per_s(shard, [jobs[number % _KEYS] for number in range(count)])


def _one_each(keys: int) -> Iterator[NewJob]:
    """For each key a job that runs, and later one that waits for it."""
    for _ in range(2):
        for number in range(keys):
            yield new_job(limits=_limits(f"k{number}", most=1))


async def _grants(shard: Shard, name: str, jobs: Iterable[NewJob], count: int) -> dict[str, object]:
    """Enqueue all, then let jobs end one at a time; how long each step takes that hands a ticket on."""
    before_mb = resident_mb(os.getpid())
    await enqueue(shard, jobs)
    grown_mb = resident_mb(os.getpid()) - before_mb
    steps_us: list[float] = []
    steps = shard._steps  # The time of a step alone shows in no answer.
    plain = steps.take

    def timed(change: Change) -> Change:
        started = time.perf_counter()
        taken = plain(change)
        steps_us.append((time.perf_counter() - started) * 1e6)
        return taken

    steps.take = timed  # type: ignore[method-assign]  # Only for this measurement.
    reports_ms: list[float] = []
    while len(steps_us) < min(_GRANTS, count // 2):
        for task in await lease(shard, "w", 10):
            started = time.perf_counter()
            await report(shard, task)
            reports_ms.append((time.perf_counter() - started) * 1000)
    return {
        f"{name}_grown_mb": round(grown_mb, 1),
        f"{name}_grant_us_p50": round(percentile(steps_us, 0.5)),
        f"{name}_grant_us_p99": round(percentile(steps_us, 0.99)),
        f"{name}_report_ms_p50": round(percentile(reports_ms, 0.5), 2),
        f"{name}_report_ms_p99": round(percentile(reports_ms, 0.99), 2),
    }
