"""Corners where work could be lost, doubled or stuck: memory that is let go, floods, hung stores."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest

import silo.shard.dispatch as dispatch_module
import silo.shard.shard as shard_module
import silo.shard.state as state_module
import silo.shard.views as views_module
from silo.clock import VirtualClock
from silo.errors import Overloaded
from silo.model.job import LeasedTask
from silo.model.shards import ShardInfo, initial_ranges
from silo.node.hosting import HostedNode, host_shards
from silo.node.layout import Layout
from silo.shard.shard import Shard, ShardOptions
from silo.storage import keys
from silo.storage.memory import MemoryStorage, MemoryStore
from silo.storage.store import Row
from silo.wire import convert
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.builders import GROUP, SHARD, a_job, open_shard, reopened, until
from tests.invariants import check_snapshot

TENANT = "-"


async def lease(shard: Shard, max_tasks: int = 1) -> list[LeasedTask]:
    async with asyncio.timeout(5):
        return await shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=max_tasks)


async def test_a_look_ahead_that_comes_too_late_leaves_no_old_payload() -> None:
    async with open_shard() as shard:
        await shard.enqueue(a_job("daily", payload="monday"))
        queue = shard._state.queue(GROUP)
        state = (await shard.get_job(tenant=TENANT, job_id="daily")).state
        await shard.cancel(tenant=TENANT, job_id="daily")
        await shard._feeder._load(queue, [state])  # Previewed before the cancellation, read after it.
        await shard.delete(tenant=TENANT, job_id="daily")

        await shard.enqueue(tuesday := a_job("daily", payload="tuesday"))
        [leased] = await lease(shard)

        assert leased.job.payload == tuesday.payload


async def test_a_shard_whose_store_hangs_delays_no_other_shard() -> None:
    storage = _StallingStorage()
    async with hosted(storage, shards=2) as node:
        stuck, healthy = node.open_shards()
        await healthy.enqueue(a_job("j1"))
        storage.stall(stuck.shard_id)
        # Polls ask in random order: the second meets the stuck shard first, if the first did not.
        async with asyncio.timeout(5):
            found = [
                await node.lease_anywhere(worker_id="w", task_group=GROUP, max_tasks=5, wait_ms=0)
                for _ in range(2)
            ]
        assert any(found)


async def test_a_node_that_stops_ends_polls_of_a_single_shard() -> None:
    async with hosted(MemoryStorage(), shards=1) as node:
        [shard] = node.open_shards()
        poll = asyncio.ensure_future(
            shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=1, wait_ms=30_000)
        )
        await until(lambda: shard.queue(GROUP) is not None)
        node.end_waits()
        try:
            async with asyncio.timeout(2):
                assert await poll == []
        finally:
            poll.cancel()


async def test_a_poll_answers_with_what_it_took_when_the_group_fills_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        for number in range(600):
            await shard.enqueue(a_job(f"j{number:03d}"))
    shard = await reopened(storage, clock=clock)
    try:
        monkeypatch.setattr(shard_module, "GROUP_ROWS_MAX", 500)
        refused = False
        try:
            told = await shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=600)
        except Overloaded:
            refused, told = True, []
        await shard.durable()
        running = [key for key in storage.snapshot(SHARD) if key.startswith(keys.LEASES)]
        assert len(running) == len(told), refused
    finally:
        await shard.close()


async def test_an_answer_to_a_poll_fits_into_a_message() -> None:
    metadata = {f"k{number:02d}": "v" * 65_534 for number in range(16)}
    async with open_shard() as shard:
        await lease(shard)
        for _ in range(140):
            await shard.enqueue(a_job(metadata=metadata))
        tasks = await lease(shard, 1000)
    answer = pb.LeaseTasksResponse(tasks=[convert.task_to_pb(task, shard=SHARD) for task in tasks])
    assert answer.ByteSize() <= 128 << 20


async def test_polls_of_ever_new_task_groups_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "_QUEUES_MAX", 10)
    async with open_shard() as shard:
        for number in range(100):
            await shard.lease_tasks(worker_id="w", task_group=f"g{number}", max_tasks=1)
        known = sum(shard.queue(f"g{number}") is not None for number in range(100))
        assert known <= 10 + 1


async def test_a_refill_of_a_tenant_that_lost_its_window_raises_no_floor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch_module, "RESIDENTS_MAX", 2)
    storage, clock = _StallingStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        for number in range(600):
            await shard.enqueue(a_job(f"j{number:03d}", tenant="b"))
        await shard.enqueue(a_job("other", tenant="a"))
    shard = await reopened(storage, clock=clock)
    try:
        queue = shard._state.queue(GROUP)
        await shard._feeder._find_tenants(queue)
        assert [name for name, _ in queue.hungry(9)] == ["a", "b"]
        window = queue.window("b")
        assert window is not None
        storage.stall(SHARD)
        refill = asyncio.ensure_future(shard._feeder._refill_all(queue, [("b", window)]))
        await until(lambda: storage.stalled > 0)
        queue.make_room()  # As the search for tenants does, which runs beside refills.
        assert queue.window("b") is None
        await shard.enqueue(a_job("urgent", tenant="b", priority=0))
        storage.resume()
        await refill
        await shard.enqueue(a_job("flush", tenant="z"))
        check_snapshot(storage.snapshot(SHARD))
    finally:
        storage.resume()
        await shard.close()


async def test_a_refill_of_a_tenant_that_lost_its_window_leaves_no_old_payload(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch_module, "RESIDENTS_MAX", 2)
    storage, clock = _StallingStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        await shard.enqueue(a_job("daily", tenant="b", payload="monday"))
        await shard.enqueue(a_job("other", tenant="a"))
    shard = await reopened(storage, clock=clock)
    try:
        queue = shard._state.queue(GROUP)
        await shard._feeder._find_tenants(queue)
        window = queue.window("b")
        assert window is not None
        storage.stall(SHARD)
        refill = asyncio.ensure_future(shard._feeder._refill_all(queue, [("b", window)]))
        await until(lambda: storage.stalled > 0)
        queue.make_room()
        await shard.cancel(tenant="b", job_id="daily")
        await shard.delete(tenant="b", job_id="daily")
        with monkeypatch.context() as full:
            full.setattr(views_module, "JOB_CACHE_BYTES_MAX", 1)  # What is enqueued now is not kept.
            await shard.enqueue(tuesday := a_job("daily", tenant="b", payload="tuesday"))
        storage.resume()
        await refill
        payloads = {task.job.id: task.job.payload for task in await lease(shard, 9)}
        assert payloads["daily"] == tuesday.payload
    finally:
        storage.resume()
        await shard.close()


class _StallingStorage(MemoryStorage):
    """Scans of one store wait until `resume`. What they answer with is from before the wait."""

    def __init__(self) -> None:
        super().__init__()
        self._stuck: str | None = None
        self._go = asyncio.Event()
        self.stalled = 0

    def stall(self, name: str) -> None:
        self._stuck = name
        self._go.clear()

    def resume(self) -> None:
        self._stuck = None
        self._go.set()

    async def open(self, name: str) -> MemoryStore:
        store = await super().open(name)
        plain = store.scan

        async def scan(start: bytes, end: bytes, *, limit: int) -> list[Row]:
            rows = await plain(start, end, limit=limit)
            if self._stuck == name:
                self.stalled += 1
                await self._go.wait()
            return rows

        store.scan = scan  # type: ignore[method-assign]
        return store


@asynccontextmanager
async def hosted(storage: MemoryStorage, *, shards: int) -> AsyncIterator[HostedNode]:
    layout = Layout(
        version=1,
        node_id="n",
        shards=tuple(ShardInfo(f"s{index}", part) for index, part in enumerate(initial_ranges(shards))),
    )
    async with host_shards(
        layout,
        advertised_addr="127.0.0.1:1",
        tenancy_enabled=False,
        dev_mode=False,
        storage=storage,
        clock=VirtualClock(),
        rng=Random(3),
        options=ShardOptions(),
    ) as node:
        try:
            yield node
        finally:
            if isinstance(storage, _StallingStorage):
                storage.resume()
