"""The layout of a data root: ranges without a gap, ids that stay, settings that come too late."""

import logging
from itertools import pairwise
from random import Random
from uuid import UUID

import msgspec
import pytest

from silo.config import CoordinationConfig
from silo.errors import StoreCorrupt
from silo.model.shards import HashRange, hash_tenant, initial_ranges
from silo.node.layout import LAYOUT_STORE, LAYOUT_VERSION, Layout, load_layout
from silo.storage.memory import Fault, MemoryStorage

LAST = "f" * 16


async def a_layout(
    storage: MemoryStorage | None = None, *, seed: int = 7, shards: int = 8, node_id: str | None = None
) -> Layout:
    coordination = CoordinationConfig(initial_shard_count=shards, node_id=node_id)
    return await load_layout(storage or MemoryStorage(), coordination, rng=Random(seed))


async def stored(storage: MemoryStorage, value: bytes) -> None:
    store = await storage.open(LAYOUT_STORE)
    await store.write({b"layout": value})
    await store.close()


@pytest.mark.spec("ENT-1", "W-CC-25")
@pytest.mark.parametrize("count", range(1, 65))
def test_ranges_cover_everything_without_gap_or_overlap(count: int) -> None:
    ranges = initial_ranges(count)
    assert len(ranges) == count
    assert (ranges[0].start, ranges[-1].end) == ("", "")
    for left, right in pairwise(ranges):
        assert left.end == right.start
        assert left.start < left.end
        assert len(left.end) == 16
    for hashed in (hash_tenant(f"tenant {n}") for n in range(50)):
        assert sum(range.contains(hashed) for range in ranges) == 1


@pytest.mark.spec("ENT-1", "W-CC-25", "W-CC-27")
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 16, 64])
def test_a_boundary_belongs_to_the_range_it_begins(count: int) -> None:
    ranges = initial_ranges(count)
    for number, range_ in enumerate(ranges[1:], start=1):
        assert int(range_.start, 16) == number * 2**64 // count
        assert range_.contains(range_.start)
        assert not ranges[number - 1].contains(range_.start)
    assert ranges[-1].contains(LAST)


def test_the_boundaries_are_those_of_the_protocol() -> None:
    assert [range.start for range in initial_ranges(3)] == ["", "5" * 16, "a" * 16]
    assert str(initial_ranges(2)[0]) == "[-∞, 8000000000000000)"
    assert initial_ranges(1) == [HashRange()]


@pytest.mark.spec("W-CC-26")
@pytest.mark.parametrize("tenant", ["-", "test-tenant", "日本"])
def test_a_range_of_one_hash_is_for_one_tenant_alone(tenant: str) -> None:
    hashed = hash_tenant(tenant)
    after = f"{int(hashed, 16) + 1:016x}"
    left, alone, right = HashRange("", hashed), HashRange(hashed, after), HashRange(after, "")
    assert [range.contains(hashed) for range in (left, alone, right)] == [False, True, False]
    for other in (hash_tenant(f"tenant {n}") for n in range(1000)):
        assert not alone.contains(other)
        assert left.contains(other) + right.contains(other) == 1


@pytest.mark.spec("ENT-3")
@pytest.mark.parametrize(("count", "index"), [(2, 0), (4, 1), (8, 3), (16, 7)])
def test_without_tenancy_all_work_is_in_one_shard(count: int, index: int) -> None:
    assert initial_ranges(count)[index].contains(hash_tenant("-"))


def test_no_shards_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one shard"):
        initial_ranges(0)


async def test_ids_are_random_version_4_uuids() -> None:
    layout = await a_layout()
    ids = [layout.node_id, *(info.shard_id for info in layout.shards)]
    assert len(set(ids)) == 9
    assert all(str(UUID(id)) == id and UUID(id).version == 4 for id in ids)
    assert layout.version == LAYOUT_VERSION


async def test_a_restart_finds_the_same_layout() -> None:
    storage = MemoryStorage()
    assert await a_layout(storage, seed=1) == await a_layout(storage, seed=2)


async def test_a_shard_count_that_comes_too_late_is_ignored_with_a_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = MemoryStorage()
    first = await a_layout(storage, shards=4)
    with caplog.at_level(logging.INFO, "silo"):
        assert await a_layout(storage, shards=6) == first
    [record] = caplog.records
    assert record.getMessage() == "initial_shard_count ignored: the shards exist"
    assert vars(record)["fields"] == {"shards": 4, "wanted": 6}


async def test_a_configured_node_id_counts_while_it_is_configured() -> None:
    storage = MemoryStorage()
    first = await a_layout(storage)
    assert (await a_layout(storage, node_id="ada")).node_id == "ada"
    assert await a_layout(storage) == first


@pytest.mark.parametrize(
    "value", [b"", b"{}", b"not json", b"\xff", b'{"version": "1"}', b'{"version": 1, "node_id": 3}']
)
async def test_a_layout_that_does_not_decode_is_refused(value: bytes) -> None:
    storage = MemoryStorage()
    await stored(storage, value)
    with pytest.raises(StoreCorrupt, match="the layout of the data root does not decode"):
        await a_layout(storage)


async def test_a_layout_of_a_newer_version_is_refused_whatever_its_shape() -> None:
    storage = MemoryStorage()
    await stored(storage, msgspec.json.encode({"version": LAYOUT_VERSION + 1, "rings": []}))
    before = storage.snapshot(LAYOUT_STORE)
    with pytest.raises(StoreCorrupt, match="newer silo"):
        await a_layout(storage)
    assert storage.snapshot(LAYOUT_STORE) == before


@pytest.mark.parametrize("fault", [Fault.FAIL_BEFORE, Fault.FAIL_AFTER])
async def test_a_layout_whose_write_failed_is_made_or_found_by_the_next_start(fault: Fault) -> None:
    storage = MemoryStorage()
    storage.faults.plan("write", fault)
    with pytest.raises(Exception, match="injected"):
        await a_layout(storage, seed=1)
    layout = await a_layout(storage, seed=2)
    assert layout == await a_layout(storage, seed=3)
