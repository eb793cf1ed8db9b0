"""Hosting: shards open, reopen after a failure, close, and none of them disturbs another."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest

from silo.clock import VirtualClock
from silo.config import load_config
from silo.errors import ShardClosed, ShardNotFound, SiloError, StoreUnavailable
from silo.model.shards import ShardInfo, initial_ranges
from silo.node import hosting
from silo.node import serve as serving
from silo.node.hosting import HostedNode, host_shards
from silo.node.layout import LAYOUT_VERSION, Layout, Storage
from silo.rpc.server import listen
from silo.shard.shard import Shard, ShardOptions
from silo.storage.memory import Fault, MemoryStorage, MemoryStore
from tests.builders import DONE, GROUP, a_job, until

FIRST, SECOND, THIRD = "shard-0", "shard-1", "shard-2"


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting, "REOPEN_DELAY_MIN_S", 0.001)
    monkeypatch.setattr(hosting, "REOPEN_DELAY_MAX_S", 0.008)


class PickyStorage(MemoryStorage):
    """Storage where the stores of some names cannot be opened, or take for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: set[str] = set()
        self.hanging: set[str] = set()
        self.opened: list[str] = []

    async def open(self, name: str) -> MemoryStore:
        self.opened.append(name)
        if name in self.broken:
            raise StoreUnavailable("injected: cannot be opened")
        if name in self.hanging:
            await asyncio.get_running_loop().create_future()
        return await super().open(name)


def a_layout(shards: int = 3) -> Layout:
    infos = tuple(ShardInfo(f"shard-{n}", range) for n, range in enumerate(initial_ranges(shards)))
    return Layout(version=LAYOUT_VERSION, node_id="node", shards=infos)


def a_node(storage: Storage, *, clock: VirtualClock | None = None, shards: int = 3) -> HostedNode:
    return HostedNode(
        a_layout(shards),
        advertised_addr="127.0.0.1:7450",
        tenancy_enabled=False,
        dev_mode=True,
        storage=storage,
        clock=clock or VirtualClock(),
        rng=Random(7),
        options=ShardOptions(),
    )


@asynccontextmanager
async def hosted(
    storage: Storage | None = None, *, clock: VirtualClock | None = None, shards: int = 3
) -> AsyncIterator[HostedNode]:
    async with host_shards(
        a_layout(shards),
        advertised_addr="127.0.0.1:7450",
        tenancy_enabled=False,
        dev_mode=True,
        storage=storage or MemoryStorage(),
        clock=clock or VirtualClock(),
        rng=Random(7),
        options=ShardOptions(),
    ) as node:
        yield node


def open_ids(node: HostedNode) -> set[str]:
    return {shard.shard_id for shard in node.open_shards()}


def fields(caplog: pytest.LogCaptureFixture) -> Iterator[dict[str, object]]:
    for record in caplog.records:
        yield {"message": record.getMessage(), **vars(record)["fields"]}


async def lease(node: HostedNode, *, max_tasks: int = 10, wait_ms: int = 0) -> list[tuple[str, str]]:
    taken = await node.lease_anywhere(worker_id="w", task_group=GROUP, max_tasks=max_tasks, wait_ms=wait_ms)
    return [(shard_id, task.job.id) for shard_id, task in taken]


def waits(node: HostedNode) -> bool:
    """Whether someone waits in `lease_anywhere` and has seen that there is nothing yet."""
    return bool(node._opened) and all(
        shard._state.listeners for shard in node.open_shards()
    )  # Nothing public tells.


def is_reopened(node: HostedNode, broken: Shard) -> bool:
    return broken.shard_id in open_ids(node) and node.shard(broken.shard_id) is not broken


async def break_store(storage: MemoryStorage, shard: Shard) -> None:
    """Let the next write of the shard fail."""
    storage.faults.plan("write", Fault.FAIL_BEFORE)
    with pytest.raises(ShardClosed):
        await shard.enqueue(a_job("lost"))


# Opening


async def test_all_shards_are_open_once_the_node_has_started() -> None:
    async with hosted() as node:
        assert open_ids(node) == {FIRST, SECOND, THIRD}
        assert [info.shard_id for info in node.shard_map()] == [FIRST, SECOND, THIRD]
        assert node.shard(SECOND).range == node.shard_map()[1].range


async def test_a_shard_of_another_node_is_not_found() -> None:
    async with hosted() as node:
        with pytest.raises(ShardNotFound, match="shard not found"):
            node.shard("another")


async def test_a_shard_that_does_not_open_leaves_the_others_alone() -> None:
    storage = PickyStorage()
    storage.broken.add(SECOND)
    async with hosted(storage) as node:
        assert open_ids(node) == {FIRST, THIRD}
        await node.shard(FIRST).enqueue(a_job("j"))
        with pytest.raises(ShardClosed, match="acquisition in progress"):
            node.shard(SECOND)
        storage.broken.clear()
        await until(lambda: open_ids(node) == {FIRST, SECOND, THIRD})


async def test_a_shard_that_hangs_while_it_opens_keeps_the_others_waiting_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosting, "START_TIMEOUT_S", 0.05)
    monkeypatch.setattr(hosting, "CLOSE_TIMEOUT_S", 0.05)
    storage = PickyStorage()
    storage.hanging.add(SECOND)
    async with hosted(storage) as node:
        assert open_ids(node) == {FIRST, THIRD}


async def test_a_data_root_that_does_not_answer_is_an_error_and_not_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*args: object, **kwargs: object) -> Layout:
        return await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(serving, "load_layout", never)
    monkeypatch.setattr(serving, "_LAYOUT_TIMEOUT_S", 0.01)
    config = load_config(
        None,
        {"HOME": str(tmp_path)},
        overrides={"server.grpc_addr": "127.0.0.1:0", "database.backend": "memory"},
    )
    with pytest.raises(StoreUnavailable, match="memory:/// does not answer; check that it exists"):
        await serving.serve(config, listen)


# Reopening


async def test_a_shard_whose_store_failed_opens_again_with_what_was_durable() -> None:
    storage = MemoryStorage()
    async with hosted(storage) as node:
        broken, other = node.shard(FIRST), node.shard(SECOND)
        await broken.enqueue(a_job("kept"))
        await break_store(storage, broken)
        assert node.shard(SECOND) is other
        await until(lambda: is_reopened(node, broken))
        assert (await node.shard(FIRST).get_job(tenant="-", job_id="kept")).job.id == "kept"
        with pytest.raises(SiloError, match="job not found"):
            await node.shard(FIRST).get_job(tenant="-", job_id="lost")


async def test_each_failure_in_a_row_doubles_the_delay_up_to_a_bound(
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = PickyStorage()
    storage.broken.add(FIRST)
    async with hosted(storage):
        await until(lambda: storage.opened.count(FIRST) >= 7)
    events = list(fields(caplog))
    assert [event["again_in_ms"] for event in events][:6] == [1, 2, 4, 8, 8, 8]
    for event in events:
        assert event["message"] == "shard not opened or closed cleanly: trying again"
        assert (event["node_id"], event["shard_id"]) == ("node", FIRST)
        assert event["reason"] == "injected: cannot be opened"


async def test_a_shard_that_another_writer_took_says_so(caplog: pytest.LogCaptureFixture) -> None:
    storage = MemoryStorage()
    async with hosted(storage) as node:
        thief = await storage.open(FIRST)
        with pytest.raises(SiloError):
            await node.shard(FIRST).enqueue(a_job("j"))
        await until(lambda: bool(caplog.records))
        await thief.close()
    [event] = fields(caplog)
    assert event["message"] == "shard taken by another writer: reopening"
    assert event["reason"] == "another writer has opened this store"


async def test_a_failure_nobody_foresaw_is_logged_with_its_traceback_and_tried_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = MemoryStorage()
    opened = storage.open
    failures = iter([ZeroDivisionError("boom")])

    async def open(name: str) -> MemoryStore:
        if name == FIRST and (failure := next(failures, None)):
            raise failure
        return await opened(name)

    monkeypatch.setattr(storage, "open", open)
    async with hosted(storage) as node:
        await until(lambda: len(open_ids(node)) == 3)
    [record] = caplog.records
    assert record.getMessage() == "shard failed: trying again"
    assert record.exc_info is not None


async def test_a_store_that_does_not_close_is_opened_again_all_the_same() -> None:
    storage = MemoryStorage()
    async with hosted(storage) as node:
        broken = node.shard(FIRST)
        storage.faults.plan("close", Fault.FAIL_BEFORE)
        await break_store(storage, broken)
        await until(lambda: is_reopened(node, broken))
        await node.shard(FIRST).enqueue(a_job("j"))


# Leasing


async def test_work_is_found_in_any_shard() -> None:
    async with hosted() as node:
        for shard_id in (FIRST, SECOND, THIRD):
            await node.shard(shard_id).enqueue(a_job(f"of {shard_id}"))
        taken = await lease(node)
        assert sorted(taken) == [(name, f"of {name}") for name in (FIRST, SECOND, THIRD)]


async def test_no_more_is_leased_than_was_asked_for() -> None:
    async with hosted() as node:
        for shard_id in (FIRST, SECOND, THIRD):
            for n in range(3):
                await node.shard(shard_id).enqueue(a_job(f"{shard_id} {n}"))
        taken = [len(await lease(node, max_tasks=4)) for _ in range(4)]
        assert taken == [4, 4, 1, 0]


async def test_asking_for_nothing_answers_at_once() -> None:
    async with hosted() as node:
        assert await lease(node, max_tasks=0, wait_ms=60_000) == []


@pytest.mark.parametrize("shard_id", [FIRST, SECOND, THIRD])
async def test_a_waiting_worker_wakes_when_work_appears_in_any_shard(shard_id: str) -> None:
    async with hosted() as node:
        waiting = asyncio.create_task(lease(node, wait_ms=60_000))
        await until(lambda: waits(node))
        await node.shard(shard_id).enqueue(a_job("j"))
        async with asyncio.timeout(10):
            assert await waiting == [(shard_id, "j")]
        assert not node._opened


async def test_a_waiting_worker_wakes_when_a_shard_with_work_opens() -> None:
    storage = PickyStorage()
    async with hosted(storage) as node:
        await node.shard(SECOND).enqueue(a_job("j"))
    storage.broken.add(SECOND)
    async with hosted(storage) as node:
        waiting = asyncio.create_task(lease(node, wait_ms=60_000))
        await until(lambda: waits(node))
        storage.broken.clear()
        async with asyncio.timeout(10):
            assert await waiting == [(SECOND, "j")]


async def test_waiting_ends_at_its_time_though_the_clock_of_the_jobs_stands_still() -> None:
    async with hosted(clock=VirtualClock()) as node:
        assert await lease(node, wait_ms=30) == []


async def test_waiting_does_not_end_because_the_clock_of_the_jobs_was_moved() -> None:
    clock = VirtualClock()
    async with hosted(clock=clock) as node:
        waiting = asyncio.create_task(lease(node, wait_ms=60_000))
        await until(lambda: waits(node))
        clock.advance_ms(60_000)
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()


async def test_a_worker_that_goes_away_leaves_the_work_and_nothing_behind() -> None:
    async with hosted() as node:
        waiting = asyncio.create_task(lease(node, wait_ms=60_000))
        await until(lambda: waits(node))
        waiting.cancel()
        await asyncio.wait({waiting})
        assert not node._opened
        assert not any(shard._state.listeners for shard in node.open_shards())
        await node.shard(FIRST).enqueue(a_job("j"))
        assert await lease(node) == [(FIRST, "j")]


async def test_a_shard_that_fails_is_passed_over() -> None:
    storage = MemoryStorage()
    async with hosted(storage) as node:
        await node.shard(SECOND).enqueue(a_job("j"))
        await break_store(storage, node.shard(FIRST))
        assert await lease(node) == [(SECOND, "j")]


async def test_work_that_becomes_due_wakes_a_waiting_worker() -> None:
    clock = VirtualClock()
    async with hosted(clock=clock) as node:
        await node.shard(THIRD).enqueue(a_job("j", start_at_ms=clock.now_ms() + 1_000))
        waiting = asyncio.create_task(lease(node, wait_ms=60_000))
        await until(lambda: waits(node))
        clock.advance_ms(1_000)
        async with asyncio.timeout(10):
            assert await waiting == [(THIRD, "j")]


# Reset


async def test_a_reset_empties_every_shard_and_goes_on() -> None:
    async with hosted() as node:
        for shard_id in (FIRST, SECOND, THIRD):
            await node.shard(shard_id).enqueue(a_job("j"))
        assert await node.reset_shards() == 3
        assert open_ids(node) == {FIRST, SECOND, THIRD}
        assert [shard.counts.total_jobs for shard in node.open_shards()] == [0, 0, 0]
        assert await lease(node) == []
        await node.shard(FIRST).enqueue(a_job("j"))


async def test_a_reset_goes_on_when_its_caller_goes_away() -> None:
    async with hosted() as node:
        await node.shard(FIRST).enqueue(a_job("j"))
        caller = asyncio.create_task(node.reset_shards())
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait({caller})
        assert await node.reset_shards() == 3  # The one under way, or one more after it.
        assert open_ids(node) == {FIRST, SECOND, THIRD}
        assert node.shard(FIRST).counts.total_jobs == 0


async def test_a_reset_that_fails_says_so_and_opens_the_shards_again(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()

    async def destroy(name: str) -> None:
        raise StoreUnavailable("injected: not destroyed")

    async with hosted(storage) as node:
        await node.shard(FIRST).enqueue(a_job("j"))
        monkeypatch.setattr(storage, "destroy", destroy)
        with pytest.raises(StoreUnavailable, match="not destroyed"):
            await node.reset_shards()
        assert await lease(node) == [(FIRST, "j")]


async def test_a_node_that_stops_refuses_to_reset() -> None:
    storage = MemoryStorage()
    async with hosted(storage) as node:
        await node.shard(FIRST).enqueue(a_job("j"))
        await node.close()
        with pytest.raises(ShardClosed, match="the node stops"):
            await node.reset_shards()
    assert storage.snapshot(FIRST)


# Closing


async def test_closing_sends_waiting_workers_home_and_leaves_no_task() -> None:
    before = asyncio.all_tasks()
    async with hosted() as node:
        waiting = asyncio.create_task(lease(node, wait_ms=60_000))
        await until(lambda: waits(node))
        await node.close()
        async with asyncio.timeout(10):
            assert await waiting == []
        assert await lease(node, wait_ms=60_000) == []
    assert asyncio.all_tasks() <= before


async def test_waits_can_end_before_the_shards_close() -> None:
    async with hosted() as node:
        waiting = asyncio.create_task(lease(node, wait_ms=60_000))
        await until(lambda: waits(node))
        node.end_waits()
        async with asyncio.timeout(10):
            assert await waiting == []
        await node.shard(FIRST).enqueue(a_job("j"))
        [(shard_id, task)] = await node.lease_anywhere(
            worker_id="w", task_group=GROUP, max_tasks=1, wait_ms=0
        )
        assert task.state.lease is not None
        await node.shard(shard_id).report(task.state.lease.task_id, DONE)


async def test_a_node_that_was_never_started_closes_and_stays_closed() -> None:
    node = a_node(MemoryStorage())
    await node.close()
    await node.start()
    assert open_ids(node) == set()


async def test_starting_and_closing_twice_are_harmless() -> None:
    storage = PickyStorage()
    node = a_node(storage)
    await node.start()
    await node.start()
    assert sorted(storage.opened) == [FIRST, SECOND, THIRD]
    await node.close()
    await node.close()
    assert open_ids(node) == set()


async def test_a_start_that_is_given_up_closes_what_it_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting, "CLOSE_TIMEOUT_S", 0.05)
    storage = PickyStorage()
    storage.hanging.add(THIRD)
    before = asyncio.all_tasks()

    async def run() -> None:
        async with hosted(storage):
            raise AssertionError("it cannot start")

    starting = asyncio.create_task(run())
    await until(lambda: storage.opened == [FIRST, SECOND, THIRD])
    starting.cancel()
    await asyncio.wait({starting})
    assert starting.cancelled()
    assert asyncio.all_tasks() <= before


async def test_closing_during_a_reset_ends_closed() -> None:
    before = asyncio.all_tasks()
    node = a_node(MemoryStorage())
    await node.start()
    reset = asyncio.create_task(node.reset_shards())
    await asyncio.sleep(0)
    await node.close()
    assert await reset == 3
    assert open_ids(node) == set()
    assert asyncio.all_tasks() - {reset} <= before


async def test_closing_while_a_shard_waits_to_be_opened_again_is_quick() -> None:
    storage = PickyStorage()
    storage.broken.add(SECOND)
    async with hosted(storage) as node:
        await until(lambda: storage.opened.count(SECOND) >= 3)
        async with asyncio.timeout(10):
            await node.close()
        tried = len(storage.opened)
    assert len(storage.opened) == tried


async def test_a_shard_that_does_not_close_in_time_is_left_behind(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "CLOSE_TIMEOUT_S", 0.05)
    storage = MemoryStorage()
    async with hosted(storage) as node:
        storage.faults.plan("close", Fault.HANG)
        async with asyncio.timeout(10):
            await node.close()
    assert [record.getMessage() for record in caplog.records] == ["shard did not close in time"]


async def test_many_starts_and_stops_in_any_order_keep_every_job() -> None:
    storage = MemoryStorage()
    rng = Random(3)
    for round in range(30):
        async with hosted(storage) as node:
            shard = node.shard(rng.choice([FIRST, SECOND, THIRD]))
            await shard.enqueue(a_job(f"job {round}"))
            match rng.randrange(4):
                case 0:
                    await node.close()
                case 1:
                    await break_store(storage, shard)
                case 2:
                    await asyncio.gather(node.close(), node.close())
    async with hosted(storage) as node:
        assert {job_id for _, job_id in await lease(node, max_tasks=100)} == {f"job {n}" for n in range(30)}


async def test_a_reopened_shard_starts_with_the_shortest_delay_after_it_was_steady(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "_STEADY_S", 0.0)
    storage = MemoryStorage()
    with caplog.at_level(logging.ERROR):
        async with hosted(storage) as node:
            for _ in range(4):
                broken = node.shard(FIRST)
                await break_store(storage, broken)
                await until(lambda broken=broken: is_reopened(node, broken))
    assert {event["again_in_ms"] for event in fields(caplog)} == {1}
