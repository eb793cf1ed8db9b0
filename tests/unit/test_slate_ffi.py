"""The short way over the binding gives byte for byte what its public calls give."""

import asyncio
import faulthandler
import gc
import importlib.metadata
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from slatedb import uniffi as slatedb

from silo.storage import slate, slate_ffi
from silo.storage.slate import SlateStorage, SlateStore

pytestmark = pytest.mark.skipif(not slate_ffi.AVAILABLE, reason="another version of the binding")

_SIZES = (0, 1, 2, 3, 4, 5, 127, 128, 255, 256, 65_535, 65_536, 1 << 20)


@pytest.fixture
async def store() -> AsyncIterator[SlateStore]:
    store = await SlateStorage("memory://ffi").open("s")
    yield store
    await store.close()


@pytest.fixture
def deadlock_guard() -> Iterator[None]:
    """A thread that holds the interpreter lock for ever also stops the timeout of the test."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def _random_rows(seed: int) -> dict[bytes, bytes]:
    rng = random.Random(seed)
    rows = {b"size/%08d" % size: rng.randbytes(size) for size in _SIZES}
    for _ in range(300):
        rows[rng.randbytes(rng.randint(1, 40))] = rng.randbytes(rng.randint(0, 300))
    return rows


async def _public_write(database: Any, rows: dict[bytes, bytes | None]) -> None:
    batch = slatedb.WriteBatch()
    for key, value in rows.items():
        if value is None:
            batch.delete(key)
        else:
            batch.put(key, value)
    await database.write(batch)


async def _public_scan(database: Any) -> list[tuple[bytes, bytes]]:
    span = slatedb.KeyRange(start=b"\x00", start_inclusive=True, end=None, end_inclusive=False)
    iterator = await database.scan(span)
    return [(row.key, row.value) for row in await iterator.next_batch(100_000)]


async def test_rows_written_the_short_way_are_read_the_same_by_the_public_calls(store: SlateStore) -> None:
    rows = _random_rows(1)
    await store.write(rows)

    assert await _public_scan(store._database) == sorted(rows.items())
    for key, value in rows.items():
        assert await store._database.get(key) == value


async def test_rows_written_by_the_public_calls_are_read_the_same_the_short_way(store: SlateStore) -> None:
    rows = _random_rows(2)
    await _public_write(store._database, dict(rows))

    assert await store.scan(b"\x00", b"\xff" * 50, limit=100_000) == sorted(rows.items())
    assert await store.get_many(list(rows)) == list(rows.values())
    assert await store.get(b"absent") is None


async def test_deletes_are_the_same_both_ways(store: SlateStore) -> None:
    other = await SlateStorage("memory://ffi").open("other")
    rows = _random_rows(3)
    gone = dict.fromkeys(random.Random(4).sample(sorted(rows), 100))
    await store.write(rows)
    await store.write(gone)
    await _public_write(other._database, dict(rows))
    await _public_write(other._database, dict(gone))

    left = sorted(row for row in rows.items() if row[0] not in gone)
    assert await _public_scan(store._database) == await _public_scan(other._database) == left
    assert await store.get_many(list(gone)) == [None] * 100
    await other.close()


async def test_rows_with_an_expiry_are_lifted_the_same(store: SlateStore) -> None:
    batch = slatedb.WriteBatch()
    options = slatedb.PutOptions(ttl=slatedb.Ttl.EXPIRE_AFTER_MILLIS(10_000_000))
    for number in range(5):
        batch.put_with_options(b"e%d" % number, b"v%d" % number, options)
        batch.put(b"n%d" % number, b"")
    await store._database.write(batch)

    assert await store.scan(b"\x00", b"\xff", limit=100) == await _public_scan(store._database)


async def test_batches_of_a_scan_are_the_same_both_ways(store: SlateStore) -> None:
    await store.write(_random_rows(5))
    span = slatedb.KeyRange(start=b"\x00", start_inclusive=True, end=None, end_inclusive=False)
    short, public = await store._database.scan(span), await store._database.scan(span)
    for count in (1, 2, 7, 100, 1000, 5):
        expected = [(row.key, row.value) for row in await public.next_batch(count)]
        assert await slate_ffi.next_batch(short, count) == expected


async def test_an_error_of_the_binding_is_raised_and_the_next_call_works(store: SlateStore) -> None:
    with pytest.raises(slatedb.Error):
        slate_ffi.fill(slatedb.WriteBatch(), [(b"", b"an empty key")])
    other = await SlateStorage("memory://ffi").open("other")
    await other._database.shutdown()
    with pytest.raises(slatedb.Error.Closed):
        await slate_ffi.get(other._database, b"k")

    await store.write({b"k": b"v"})
    assert await store.get(b"k") == b"v"


def test_another_version_or_shape_of_the_binding_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(slate_ffi, "version", lambda name: "0.18.0")
        assert not slate_ffi._is_available()
    with monkeypatch.context() as patch:
        patch.setattr(slate_ffi.binding, "_UniffiLib", object())
        assert not slate_ffi._is_available()
    with monkeypatch.context() as patch:
        patch.delattr(slate_ffi.binding, "_UniffiLib")
        assert not slate_ffi._is_available()
    assert slate_ffi._is_available()
    assert importlib.metadata.version("slatedb") == slate_ffi._VERSION


async def test_the_store_works_the_same_without_the_short_way(
    store: SlateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slate_ffi, "AVAILABLE", False)
    for name in ("fill", "get", "next_batch"):
        monkeypatch.delattr(slate_ffi, name)
    rows = {key: value for key, value in _random_rows(6).items() if len(value) < 70_000}
    await store.write(rows)
    key = min(rows)
    await store.write({key: None})

    assert await store.get(key) is None
    del rows[key]
    assert await store.scan(b"\x00", b"\xff" * 50, limit=100_000) == sorted(rows.items())
    assert await store.get_many(list(rows)) == list(rows.values())


@pytest.mark.usefixtures("deadlock_guard")
async def test_reads_that_wait_for_the_disk_finish_cancelled_or_not(tmp_path: Path) -> None:
    rng = random.Random(7)
    values = {b"k%06d" % number: rng.randbytes(2000) for number in range(8000)}
    store = await SlateStorage(str(tmp_path)).open("s")
    await store.write(values)
    await store.flush()
    await store.close()

    waits = 0
    for _ in range(3):  # A new cache each time, so that reads are cold.
        store = await SlateStorage(str(tmp_path)).open("s")
        for turn in range(250):
            keys = [b"k%06d" % rng.randrange(8000) for _ in range(8)]
            reads = [asyncio.ensure_future(store.get(key)) for key in keys]
            await asyncio.sleep(0)
            waits += sum(not read.done() for read in reads)
            for read in reads[: turn % 9]:
                read.cancel()
            for key, read in zip(keys, reads, strict=True):
                await asyncio.wait({read})
                assert read.cancelled() or read.result() == values[key]
        await store.close()
    assert waits > 100
    polled = slate_ffi._polled
    assert polled is not None
    assert not polled._waiting
    assert not polled._codes


async def test_two_hundred_thousand_puts_and_gets_do_not_leak(store: SlateStore) -> None:
    await store.write({b"k%03d" % number: b"v" * 1000 for number in range(100)})
    keys = [b"k%03d" % number for number in range(100)]

    async def work(rounds: int) -> None:
        for _ in range(rounds):
            slate._write_batch(dict.fromkeys(keys, b"v" * 1000))
            await store.get_many(keys)

    await work(200)
    before = _resident_bytes()
    await work(2000)
    assert _resident_bytes() - before < 60 << 20  # A leak of one buffer each would be 400 MB.


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
