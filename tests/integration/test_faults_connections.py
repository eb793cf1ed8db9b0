"""Connections that are cut, silent, late or half gone: no job is lost, and none runs twice for it."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path

import pytest

from tests.builders import until
from tests.integration.fault_cluster import FaultCluster, Producer, enqueue, fault_cluster
from tests.integration.fault_proxy import BOTH, FaultProxy, Way

Fault = Callable[[FaultProxy], Awaitable[None]]


async def cut(proxy: FaultProxy) -> None:
    await proxy.cut()


async def reset(proxy: FaultProxy) -> None:
    await proxy.reset()


async def cut_and_refuse(proxy: FaultProxy) -> None:
    proxy.refuses = True
    await proxy.cut()
    await asyncio.sleep(0.5)  # An outage takes its time.
    proxy.heal()


async def half_close_up(proxy: FaultProxy) -> None:
    proxy.half_close(Way.UP)


async def half_close_down(proxy: FaultProxy) -> None:
    proxy.half_close(Way.DOWN)


async def late(proxy: FaultProxy) -> None:
    proxy.delay_s = 0.1
    await asyncio.sleep(0.5)
    proxy.heal()


def black_hole(*ways: Way, seconds: float) -> Fault:
    async def fault(proxy: FaultProxy) -> None:
        proxy.black_hole(*ways)
        await asyncio.sleep(seconds)
        proxy.heal()

    return fault


SHORT: dict[str, Fault] = {
    "cut": cut,
    "reset": reset,
    "cut and refused": cut_and_refuse,
    "half closed up": half_close_up,
    "half closed down": half_close_down,
    "late": late,
    "silent for a moment": black_hole(*BOTH, seconds=0.2),
    "silent up": black_hole(Way.UP, seconds=1.2),
    "silent down": black_hole(Way.DOWN, seconds=1.2),
    "silent": black_hole(*BOTH, seconds=1.2),
}


async def goes_on(cluster: FaultCluster, count: int = 10) -> None:
    """Wait until so many more jobs have begun."""
    seen = len(cluster.runs())
    await until(lambda: len(cluster.runs()) >= seen + count)


async def test_a_worker_rides_through_every_fault_of_its_connection_and_runs_each_job_once(
    tmp_path: Path,
) -> None:
    async with (
        fault_cluster(tmp_path) as cluster,
        cluster.client() as client,
        cluster.proxy() as proxy,
        cluster.worker(proxy, slots=40, pings_quickly=True),
    ):
        producer = Producer(client, takes_s=(0.0, 0.01, 0.1, 1.0))
        async with producer.running():
            for fault in SHORT.values():
                await goes_on(cluster)
                await fault(proxy)
            await goes_on(cluster)
        audit = await cluster.audit(producer.handles)
    assert (audit.lost_leases, audit.repeated) == (0, 0)


async def test_a_client_rides_through_every_fault_of_its_connection_and_enqueues_each_job_once(
    tmp_path: Path,
) -> None:
    async with (
        fault_cluster(tmp_path) as cluster,
        cluster.proxy() as proxy,
        cluster.client(proxy, pings_quickly=True) as client,
        cluster.worker(),
    ):
        producer = Producer(client, takes_s=(0.0, 0.2))
        async with producer.running():
            for fault in SHORT.values():
                await goes_on(cluster)
                waits = [asyncio.create_task(handle.result(60)) for handle in producer.handles[-20:]]
                await fault(proxy)
                for wait in waits:
                    assert (await wait).status == "Succeeded"
            await goes_on(cluster)
        audit = await cluster.audit(producer.handles)
    assert (audit.lost_leases, audit.repeated) == (0, 0)


async def test_a_silence_that_ends_a_connection_costs_no_lease(tmp_path: Path) -> None:
    """Its worker notices soon and comes back to what it has. The server hears nothing of it for a while."""
    async with (
        fault_cluster(tmp_path) as cluster,
        cluster.client() as client,
        cluster.proxy() as proxy,
        cluster.worker(proxy, pings_quickly=True),
    ):
        handles = [await enqueue(client, number, takes_s=5.0) for number in range(5)]
        await until(lambda: len(cluster.runs()) == 5)
        proxy.black_hole(*BOTH)
        await until(lambda: proxy.accepted > 1)  # It has given up the first connection.
        proxy.heal()
        audit = await cluster.audit(handles)
    assert (audit.lost_leases, audit.repeated) == (0, 0)


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ways", [(Way.UP,), (Way.DOWN,), BOTH], ids=["up", "down", "both"])
async def test_a_silence_shorter_than_a_lease_costs_none(tmp_path: Path, ways: tuple[Way, ...]) -> None:
    """Either side may give its connection up after 3.5 s: its leases are good for 7.5 s then, or more."""
    async with (
        fault_cluster(tmp_path) as cluster,
        cluster.client() as client,
        cluster.proxy() as proxy,
        cluster.worker(proxy),
    ):
        handles = [await enqueue(client, number, takes_s=15.0) for number in range(5)]
        await until(lambda: len(cluster.runs()) == 5)
        await black_hole(*ways, seconds=5.0)(proxy)
        audit = await cluster.audit(handles)
    assert (audit.lost_leases, audit.repeated) == (0, 0)


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_a_silence_longer_than_a_lease_has_its_jobs_run_elsewhere_and_each_is_counted(
    tmp_path: Path,
) -> None:
    numbers = count()
    async with (
        fault_cluster(tmp_path) as cluster,
        cluster.client() as client,
        cluster.proxy() as proxy,
        cluster.worker(proxy, slots=5),
    ):
        handles = [await enqueue(client, next(numbers), takes_s=30.0) for _ in range(5)]
        await until(lambda: len(cluster.runs()) == 5)
        async with cluster.worker():
            proxy.black_hole(*BOTH)
            await until(lambda: sum(map(len, cluster.runs().values())) == 10, timeout_s=60)
            proxy.heal()
            audit = await cluster.audit(handles)
        assert "TaskLeaseLostError" in cluster.complaints()
    assert (audit.lost_leases, audit.repeated) == (5, 5)
