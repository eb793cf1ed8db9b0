"""Processes that are killed, stopped or blocked: no job is lost, and only what lost its lease runs again."""

import asyncio
import signal
from pathlib import Path
from random import Random

import pytest

from tests.builders import until
from tests.integration.fault_cluster import Audit, FaultCluster, Producer, enqueue, fault_cluster

# Servers


async def _kill_the_server(folder: Path, *, times: int, seed: int) -> Audit:
    """Kill it again and again, at any moment after a restart, while two workers and a producer go on."""
    rng = Random(seed)
    async with (
        fault_cluster(folder) as cluster,
        cluster.client() as client,
        cluster.worker(slots=20),
        cluster.worker(slots=20),
    ):
        producer = Producer(client, takes_s=(0.0, 0.01, 0.1, 2.0))
        async with producer.running():
            for _ in range(times):
                await asyncio.sleep(rng.uniform(0.0, 1.0))
                await cluster.server.kill()
                await cluster.server.start()
        assert len(producer.handles) > times
        return await cluster.audit(producer.handles)


async def test_a_server_that_is_killed_costs_no_job_and_no_lease(tmp_path: Path) -> None:
    audit = await _kill_the_server(tmp_path, times=3, seed=3)
    assert (audit.lost_leases, audit.repeated) == (0, 0)


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_a_server_that_is_killed_twenty_times_costs_no_job_and_no_lease(tmp_path: Path) -> None:
    audit = await _kill_the_server(tmp_path, times=20, seed=20)
    assert (audit.lost_leases, audit.repeated) == (0, 0)


# Workers


async def _begun(cluster: FaultCluster, jobs: int) -> None:
    await until(lambda: len(cluster.runs()) == jobs)


async def test_a_worker_that_is_stopped_for_a_moment_loses_no_lease(tmp_path: Path) -> None:
    async with fault_cluster(tmp_path) as cluster, cluster.client() as client, cluster.worker() as worker:
        handles = [await enqueue(client, number, takes_s=1.0) for number in range(10)]
        await _begun(cluster, 10)
        worker.send_signal(signal.SIGSTOP)
        async with cluster.worker():
            await asyncio.sleep(4.0)  # Others may take nothing of it.
            worker.send_signal(signal.SIGCONT)
            audit = await cluster.audit(handles)
    assert (audit.lost_leases, audit.repeated) == (0, 0)


async def test_what_a_killed_worker_had_runs_again_elsewhere_and_each_is_counted(tmp_path: Path) -> None:
    async with fault_cluster(tmp_path) as cluster, cluster.client() as client:
        async with cluster.worker(slots=5) as worker:
            handles = [await enqueue(client, number, takes_s=1.0) for number in range(5)]
            await _begun(cluster, 5)
            worker.kill()
            await worker.wait()
        async with cluster.worker():
            audit = await cluster.audit(handles)
    assert (audit.lost_leases, audit.repeated) == (5, 5)


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_a_worker_that_is_stopped_for_long_loses_its_leases_and_what_it_did_does_not_count(
    tmp_path: Path,
) -> None:
    async with (
        fault_cluster(tmp_path) as cluster,
        cluster.client() as client,
        cluster.worker(slots=5) as stopped,
    ):
        handles = [await enqueue(client, number, takes_s=5.0) for number in range(5)]
        await _begun(cluster, 5)
        stopped.send_signal(signal.SIGSTOP)
        async with cluster.worker():
            producer = Producer(client, takes_s=(0.0, 0.1))
            async with producer.running():
                await asyncio.sleep(30.0)  # That long it is stopped.
                stopped.send_signal(signal.SIGCONT)
                await until(lambda: _losses(cluster) == 5)
            audit = await cluster.audit([*handles, *producer.handles])
        assert _losses(cluster) == 5
    assert (audit.lost_leases, audit.repeated) == (5, 5)


def _losses(cluster: FaultCluster) -> int:
    """Of how many tasks the first worker says that it has lost them.

    It hears first of the lost lease, or of the report that does not count.
    """
    lost = ("TaskLeaseLostError(", "TaskNotFoundError(")
    return sum(any(name in line for name in lost) for line in cluster.complaints().splitlines())


# Handlers


async def _block(folder: Path, *, seconds: float) -> Audit:
    """Block one worker's event loop, and the interpreter lock of another one, for so long."""
    async with (
        fault_cluster(folder) as cluster,
        cluster.client() as client,
        cluster.worker(slots=1),
        cluster.worker(slots=1),
    ):
        handles = [
            await enqueue(client, number, takes_s=seconds, how=how)
            for number, how in enumerate(("blocks", "holds"))
        ]
        await _begun(cluster, 2)
        async with cluster.worker():  # It would take what anybody loses.
            return await cluster.audit(handles)


async def test_a_handler_that_blocks_its_process_for_longer_than_a_lease_keeps_it(tmp_path: Path) -> None:
    audit = await _block(tmp_path, seconds=13)
    assert (audit.lost_leases, audit.repeated) == (0, 0)


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_a_handler_that_blocks_its_process_for_a_minute_keeps_its_lease(tmp_path: Path) -> None:
    audit = await _block(tmp_path, seconds=60)
    assert (audit.lost_leases, audit.repeated) == (0, 0)
