"""A damaged row in the store concerns whoever needs it, and delays nothing else."""

import asyncio
from random import Random

import pytest

from silo.clock import VirtualClock
from silo.model.job import LEASE_MS, LeasedTask
from silo.shard.shard import Shard
from silo.storage import codec, keys
from silo.storage.memory import MemoryStorage
from tests.builders import GROUP, SHARD, a_job, a_policy, at_most, open_shard, reopened
from tests.invariants import check_snapshot

TENANT = "-"
_AT_ONCE = a_policy(1, initial_interval_ms=0)


async def lease(shard: Shard, max_tasks: int = 1) -> list[LeasedTask]:
    async with asyncio.timeout(5):
        return await shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=max_tasks)


async def _damage(storage: MemoryStorage, prefix: bytes) -> None:
    """Overwrite the first row of a range."""
    [key, *_] = sorted(row for row in storage.snapshot(SHARD) if row.startswith(prefix))
    store = await storage.open(SHARD)
    await store.write({key: b"\x01damaged"})
    await store.close()


@pytest.mark.spec("LSE-24")
@pytest.mark.parametrize("family", ["queue", "job", "lease", "timer"])
async def test_a_damaged_row_delays_nothing_else(family: str) -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        await shard.enqueue(a_job("1-leased", retry_policy=_AT_ONCE))
        await lease(shard)
        payload = bytes(2_000) if family == "job" else b""  # Too large to be in the queue row too.
        for job_id in ("2", "3"):
            await shard.enqueue(a_job(job_id, payload=payload))
            await shard.enqueue(a_job(f"{job_id}-later", start_at_ms=clock.now_ms() + 1_000))
    prefixes = {"queue": b"q", "job": keys.job_key("-", "2"), "lease": b"l", "timer": b"t"}
    await _damage(storage, prefixes[family])
    async with open_shard(storage, clock=clock) as shard:
        clock.advance_ms(2 * LEASE_MS)
        await shard.tick()
        leased = [task.job.id for task in await lease(shard, 10)]
    expected = {"1-leased", "2", "3", "2-later", "3-later"}
    damaged = {"queue": "2", "job": "2", "lease": "1-leased", "timer": "2-later"}[family]
    assert set(leased) == expected - {damaged}


async def test_a_damaged_counter_row_does_not_stop_the_shard() -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        await shard.enqueue(a_job("j1", tenant="bad"))
        await shard.enqueue(a_job("j2", tenant="good"))
    await (await storage.open(SHARD)).write({keys.counts_key("bad"): b"\xff"})

    shard = await reopened(storage, clock=clock, rng=Random(1))
    try:
        leased = await lease(shard, 2)
        assert "good" in [task.job.tenant for task in leased]
    finally:
        await shard.close()


async def test_a_damaged_floor_row_does_not_keep_the_shard_closed() -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        await shard.enqueue(a_job("j1"))
    prefix = keys.queue_prefix("other", TENANT)
    await (await storage.open(SHARD)).write({keys.floor_key(prefix): b"\xff"})

    shard = await reopened(storage, clock=clock)
    try:
        assert len(await lease(shard)) == 1
    finally:
        await shard.close()


async def test_a_timer_row_with_another_state_does_not_stop_the_shard() -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        await shard.enqueue(a_job("j1"))
    row = storage.snapshot(SHARD)[keys.state_key(TENANT, "j1")]
    await (await storage.open(SHARD)).write({keys.timer_key(clock.now_ms() - 1, TENANT, "j1"): row})

    shard = await reopened(storage, clock=clock)
    try:
        assert len(await lease(shard)) == 1
        await asyncio.sleep(0)
        assert shard.groups_written
        await shard.enqueue(a_job("j2"))
    finally:
        await shard.close()


async def test_a_lease_row_with_another_state_does_not_keep_the_shard_closed() -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        await shard.enqueue(a_job("j1"))
    row = storage.snapshot(SHARD)[keys.state_key(TENANT, "j1")]
    await (await storage.open(SHARD)).write({keys.lease_key("t1"): row})

    shard = await reopened(storage, clock=clock)
    try:
        assert len(await lease(shard)) == 1
    finally:
        await shard.close()


@pytest.mark.spec("LSE-24")
async def test_a_damaged_queue_key_does_not_stop_the_shard() -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        await shard.enqueue(a_job("j1"))
    row = codec.encode(b"")
    await (await storage.open(SHARD)).write({keys.queue_group_prefix(GROUP) + b"\x01garbage": row})

    shard = await reopened(storage, clock=clock)
    try:
        assert len(await lease(shard)) == 1
    finally:
        await shard.close()


async def test_damaged_counters_are_counted_again() -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        for number in range(3):
            await shard.enqueue(a_job(f"j{number}"))
        await shard.cancel(tenant=TENANT, job_id="j0")
    await (await storage.open(SHARD)).write({keys.counts_key(TENANT): b"\xff"})
    async with open_shard(storage, clock=clock) as shard:
        await shard.cancel(tenant=TENANT, job_id="j1")
    check_snapshot(storage.snapshot(SHARD))


@pytest.mark.spec("LSE-19")
@pytest.mark.parametrize("is_running", [False, True])
async def test_the_ticket_of_a_job_without_description_goes_to_the_next(is_running: bool) -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        await shard.enqueue(a_job("damaged", payload=bytes(2_000), limits=[at_most(1)]))
        if is_running:
            await lease(shard)
        await shard.enqueue(a_job("next", limits=[at_most(1)]))
    await (await storage.open(SHARD)).write({keys.job_key(TENANT, "damaged"): None})
    async with open_shard(storage, clock=clock) as shard:
        if is_running:
            clock.advance_ms(LEASE_MS)
            await shard.tick()
        assert [task.job.id for task in await lease(shard, 9)] == ["next"]
        assert await lease(shard, 9) == []


async def test_a_waiting_job_without_description_can_be_cancelled() -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        await shard.enqueue(a_job("first", limits=[at_most(1)]))
        await shard.enqueue(a_job("damaged", payload=bytes(2_000), limits=[at_most(1)]))
    await (await storage.open(SHARD)).write({keys.job_key(TENANT, "damaged"): None})
    async with open_shard(storage, clock=clock) as shard:
        await shard.cancel(tenant=TENANT, job_id="damaged")
        assert [task.job.id for task in await lease(shard, 9)] == ["first"]


async def test_a_job_that_does_not_decode_keeps_no_others_tickets_from_being_dropped() -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        for number in range(3):
            await shard.enqueue(a_job(f"j{number}", limits=[at_most(3)]))
    await (await storage.open(SHARD)).write({keys.state_key(TENANT, "j1"): b"\x01damaged"})
    async with open_shard(storage, clock=clock) as shard:
        assert await shard.drop_holders(tenant=TENANT) == 2
        await shard.enqueue(a_job("after", limits=[at_most(3)]))
