"""Minutes of faults of every kind. A seed makes the same ones, though not at quite the same moments."""

import asyncio
import os
import signal
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import pytest

from tests.integration.fault_cluster import Audit, FaultCluster, Producer, fault_cluster
from tests.integration.fault_proxy import BOTH, FaultProxy, Way

_WORKERS = 3
_SEED = int(os.environ.get("SILO_FAULT_SEED", "7"))


class _Chaos:
    """Does one fault after another to a cluster."""

    def __init__(self, cluster: FaultCluster, proxies: list[FaultProxy], rng: Random) -> None:
        self.done: Counter[str] = Counter()
        self._cluster = cluster
        self._proxies = proxies
        self._rng = rng
        self._workers: list[asyncio.subprocess.Process] = []

    def add(self, worker: asyncio.subprocess.Process) -> None:
        self._workers.append(worker)

    async def one(self, *, silence_s_max: float) -> None:
        rng, proxy = self._rng, self._rng.choice(self._proxies)
        kind = rng.choice(["cut", "reset", "half", "refuse", "late", "silence", "kill", "stop"])
        self.done[kind] += 1
        match kind:
            case "cut":
                await proxy.cut()
            case "reset":
                await proxy.reset()
            case "half":
                proxy.half_close(rng.choice(BOTH))
            case "refuse":
                proxy.refuses = True
                await proxy.cut()
                await asyncio.sleep(rng.uniform(0.1, 3.0))
            case "late":
                proxy.delay_s = rng.uniform(0.01, 0.3)
                await asyncio.sleep(rng.uniform(0.5, 3.0))
            case "silence":
                proxy.black_hole(*rng.choice([(Way.UP,), (Way.DOWN,), BOTH]))
                await asyncio.sleep(rng.uniform(0.5, silence_s_max))
            case "kill":
                await self._cluster.server.kill()
                await asyncio.sleep(rng.uniform(0.0, 1.0))
                await self._cluster.server.start()
            case "stop":
                worker = rng.choice(self._workers)
                worker.send_signal(signal.SIGSTOP)
                await asyncio.sleep(rng.uniform(0.5, silence_s_max))
                worker.send_signal(signal.SIGCONT)
        proxy.heal()
        await asyncio.sleep(rng.uniform(0.0, 1.0))


async def _survive(folder: Path, *, seconds: float, silence_s_max: float) -> Audit:
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(fault_cluster(folder))
        proxies = [await stack.enter_async_context(cluster.proxy()) for _ in range(1 + _WORKERS)]
        client = await stack.enter_async_context(cluster.client(proxies[0]))
        chaos = _Chaos(cluster, proxies, Random(_SEED))
        for proxy in proxies[1:]:
            chaos.add(await stack.enter_async_context(cluster.worker(proxy, slots=20)))
        producer = Producer(client, takes_s=(0.0, 0.01, 0.1, 1.0, 5.0))
        async with producer.running():
            end = asyncio.get_running_loop().time() + seconds
            while asyncio.get_running_loop().time() < end:
                await chaos.one(silence_s_max=silence_s_max)
        audit = await cluster.audit(producer.handles)
    print(f"seed {_SEED}: {audit}, {dict(chaos.done)}")
    return audit


@pytest.mark.soak
@pytest.mark.timeout(1200)
async def test_minutes_of_short_faults_cost_no_job_and_no_lease(tmp_path: Path) -> None:
    audit = await _survive(tmp_path, seconds=240, silence_s_max=6.0)
    assert (audit.lost_leases, audit.repeated) == (0, 0)


@pytest.mark.soak
@pytest.mark.timeout(1200)
async def test_minutes_of_faults_of_any_length_cost_no_job_and_repeat_only_what_lost_its_lease(
    tmp_path: Path,
) -> None:
    audit = await _survive(tmp_path, seconds=240, silence_s_max=30.0)
    assert 0 < audit.repeated <= audit.lost_leases
