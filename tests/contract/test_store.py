"""The promises of `Store`, held against every implementation."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Protocol

import boto3
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from silo.errors import StoreFenced, StoreUnavailable
from silo.storage.journal import JournaledStorage
from silo.storage.memory import MemoryStorage
from silo.storage.slate import SlateStorage
from silo.storage.store import Row, Store

_END = b"\xff" * 8
_names = itertools.count()


class Storage(Protocol):
    async def open(self, name: str) -> Store: ...

    async def destroy(self, name: str) -> None: ...


@pytest.fixture(scope="module")
def s3() -> Iterator[pytest.MonkeyPatch]:
    """An S3 server with one bucket, in the environment of this process."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT", f"http://{host}:{port}")
        patch.setenv("AWS_ALLOW_HTTP", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="silo")
        client.close()
        yield patch
    server.stop()


@pytest.fixture(
    params=[
        "memory",
        "slate in memory",
        "slate on files",
        "slate on s3",
        "journal in memory",
        "journal on files",
    ]
)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    match request.param:
        case "memory":
            return MemoryStorage()
        case "slate in memory":
            return SlateStorage("memory://contract")
        case "journal in memory":
            return JournaledStorage(MemoryStorage())
        case "journal on files":
            return JournaledStorage(SlateStorage(str(tmp_path / "journal")))
        case "slate on files":
            return SlateStorage(str(tmp_path / "dätä #1"))
        case _:
            request.getfixturevalue("s3")
            return SlateStorage(f"s3://silo/contract/{next(_names)}")


@pytest.fixture
async def store(storage: Storage) -> AsyncIterator[Store]:
    store = await storage.open("s")
    yield store
    await store.close()


async def _all(store: Store) -> list[Row]:
    return await store.scan(b"\x00", _END, limit=1_000_000)


def _numbered(count: int) -> dict[bytes, bytes]:
    return {f"k{number:06d}".encode(): b"v%d" % number for number in range(count)}


async def test_a_read_sees_a_write_that_has_returned(store: Store) -> None:
    await store.write({b"a": b"1", b"b": b""})

    assert await store.get(b"a") == b"1"
    assert await store.get(b"b") == b""
    assert await store.get(b"c") is None


async def test_get_many_answers_in_the_order_of_the_keys(store: Store) -> None:
    await store.write({b"a": b"1", b"b": b"2"})

    assert await store.get_many([b"b", b"x", b"a", b"b"]) == [b"2", None, b"1", b"2"]
    assert await store.get_many([]) == []


async def test_a_scan_is_ascending_from_start_up_to_but_not_with_end(store: Store) -> None:
    await store.write({b"c": b"3", b"a": b"1", b"d": b"4", b"b": b"2"})

    assert await store.scan(b"a", b"c", limit=10) == [(b"a", b"1"), (b"b", b"2")]
    assert await store.scan(b"aa", b"d\x00", limit=10) == [(b"b", b"2"), (b"c", b"3"), (b"d", b"4")]
    assert await store.scan(b"x", b"z", limit=10) == []


async def test_a_scan_of_an_empty_range_finds_nothing(store: Store) -> None:
    await store.write({b"a": b"1", b"b": b"2"})

    assert await store.scan(b"a", b"a", limit=10) == []
    assert await store.scan(b"b", b"a", limit=10) == []


async def test_a_scan_gives_the_first_rows_up_to_its_limit_and_fewer_only_at_the_end(store: Store) -> None:
    await store.write(_numbered(10))

    assert [key for key, _ in await store.scan(b"k", b"l", limit=3)] == [b"k000000", b"k000001", b"k000002"]
    assert len(await store.scan(b"k", b"l", limit=10)) == 10
    assert len(await store.scan(b"k", b"l", limit=11)) == 10


@pytest.mark.parametrize("limit", [999, 1000, 1001, 4097, 5000, 6000])
async def test_a_scan_crosses_the_batches_of_the_store(storage: Storage, limit: int) -> None:
    store = await storage.open("s")
    rows = _numbered(5000)
    await store.write(rows)

    assert await store.scan(b"k", b"l", limit=limit) == list(rows.items())[:limit]
    await store.close()


async def test_a_deleted_key_is_gone_from_gets_and_scans(store: Store) -> None:
    await store.write({b"a": b"1", b"b": b"2"})
    await store.write({b"a": None, b"never there": None})

    assert await store.get(b"a") is None
    assert await store.get_many([b"a", b"b"]) == [None, b"2"]
    assert await _all(store) == [(b"b", b"2")]


async def test_a_batch_puts_overwrites_and_deletes_together(store: Store) -> None:
    await store.write({b"a": b"1", b"b": b"2"})
    await store.write({b"a": b"9", b"b": None, b"c": b"3"})

    assert await _all(store) == [(b"a", b"9"), (b"c", b"3")]


async def test_a_deleted_key_can_be_written_again(store: Store) -> None:
    for value in (b"1", None, b"2"):
        await store.write({b"a": value})

    assert await store.get(b"a") == b"2"


async def test_an_empty_batch_changes_nothing(store: Store) -> None:
    await store.write({b"a": b"1"})
    await store.write({})

    assert await _all(store) == [(b"a", b"1")]


async def test_a_large_value_comes_back_whole(storage: Storage) -> None:
    value = random.Random(6).randbytes(6 << 20)
    store = await storage.open("s")
    await store.write({b"large": value, b"small": b"1"})
    assert await store.get(b"large") == value
    await store.close()

    again = await storage.open("s")
    assert await again.scan(b"a", b"z", limit=2) == [(b"large", value), (b"small", b"1")]
    await again.close()


async def test_keys_sort_as_bytes_zero_and_ff_included(store: Store) -> None:
    keys = [
        b"\x00",
        b"\x00\x00",
        b"\x00\xff",
        b"a",
        b"a\x00",
        b"a\x00\xff",
        b"a\xff",
        b"b",
        b"\xff",
        b"\xff\xff",
    ]
    await store.write({key: key for key in reversed(keys)})

    assert await _all(store) == [(key, key) for key in keys]
    assert await store.scan(b"a", b"a\x00\xff", limit=10) == [(b"a", b"a"), (b"a\x00", b"a\x00")]


async def test_opening_again_sees_everything(storage: Storage) -> None:
    store = await storage.open("s")
    await store.write(_numbered(100))
    await store.flush()
    await store.write({b"k000000": None, b"later": b"1"})
    await store.close()

    again = await storage.open("s")
    rows = dict(_numbered(100), later=b"1")
    del rows[b"k000000"]
    assert await _all(again) == sorted(
        (k if isinstance(k, bytes) else k.encode(), v) for k, v in rows.items()
    )
    await again.close()


async def test_a_store_that_was_never_closed_keeps_what_it_answered(storage: Storage) -> None:
    left = await storage.open("s")
    await left.write({b"a": b"1"})

    store = await storage.open("s")
    assert await store.get(b"a") == b"1"
    await store.close()
    await left.close()


async def test_a_second_opener_fences_the_first(storage: Storage) -> None:
    first = await storage.open("s")
    await first.write({b"a": b"1"})
    second = await storage.open("s")

    with pytest.raises(StoreFenced):
        await first.write({b"a": b"2"})
    with pytest.raises(StoreFenced):
        await first.write({b"b": b"2"})

    await second.write({b"c": b"3"})
    assert await _all(second) == [(b"a", b"1"), (b"c", b"3")]
    await second.close()
    await first.close()


async def test_closing_a_fenced_store_raises_nothing_and_harms_nothing(storage: Storage) -> None:
    first = await storage.open("s")
    second = await storage.open("s")
    with pytest.raises(StoreFenced):
        await first.write({b"a": b"1"})

    await first.close()
    await first.close()

    await second.write({b"b": b"2"})
    assert await _all(second) == [(b"b", b"2")]
    await second.close()


async def test_a_fenced_store_that_has_not_noticed_closes_without_an_error(storage: Storage) -> None:
    first = await storage.open("s")
    second = await storage.open("s")

    await first.close()

    await second.write({b"b": b"2"})
    await second.close()


_CALLS: dict[str, Callable[[Store], Awaitable[object]]] = {
    "get": lambda store: store.get(b"a"),
    "get_many": lambda store: store.get_many([b"a"]),
    "scan": lambda store: store.scan(b"a", b"b", limit=1),
    "write": lambda store: store.write({b"a": b"2"}),
    "an empty write": lambda store: store.write({}),
    "flush": lambda store: store.flush(),
    "compact": lambda store: store.compact(),
    "storage_info": lambda store: store.storage_info(),
}


async def test_a_closed_store_refuses_every_call_and_closes_again(storage: Storage) -> None:
    store = await storage.open("s")
    await store.write({b"a": b"1"})
    await store.close()

    for call in _CALLS.values():
        with pytest.raises(StoreUnavailable, match="closed"):
            await call(store)
    await store.close()


async def test_destroy_forgets_everything(storage: Storage) -> None:
    store = await storage.open("s")
    await store.write({b"\x00": b"1", b"k": b"2", b"\xff\xff": b"3"})
    await store.flush()
    await store.close()
    other = await storage.open("s2")
    await other.write({b"other": b"kept"})

    await storage.destroy("s")
    await storage.destroy("never made")

    store = await storage.open("s")
    assert await _all(store) == []
    await store.write({b"a": b"1"})
    assert await store.get(b"a") == b"1"
    assert await _all(other) == [(b"other", b"kept")]
    await store.close()
    await other.close()


async def test_a_compaction_changes_no_row_and_may_be_asked_for_again(store: Store) -> None:
    await store.compact()  # Of nothing.
    await store.write(_numbered(10))
    await store.flush()
    await store.write({b"k000000": None, b"later": b"1"})
    rows = await _all(store)

    await asyncio.gather(store.compact(), store.compact())
    await store.compact()

    assert await _all(store) == rows
    await store.write({b"after": b"1"})
    assert await store.get(b"after") == b"1"


async def test_storage_info_counts_what_a_flush_has_put_into_tables(store: Store) -> None:
    empty = await store.storage_info()
    assert (empty.level0_tables, empty.level0_bytes, empty.sorted_runs) == (0, 0, ())

    await store.write(_numbered(1000))
    await store.flush()

    info = await store.storage_info()
    assert info.level0_tables + sum(run.tables for run in info.sorted_runs) >= 1
    assert info.level0_bytes + sum(run.bytes for run in info.sorted_runs) >= 1000
    assert [run.id for run in info.sorted_runs] == sorted({run.id for run in info.sorted_runs}, reverse=True)


async def test_concurrent_writes_take_effect_in_the_order_of_the_calls(store: Store) -> None:
    writes = [store.write({b"last": b"%d" % number, b"n%03d" % number: b""}) for number in range(50)]
    await asyncio.gather(*writes)

    assert await store.get(b"last") == b"49"
    assert len(await store.scan(b"n", b"o", limit=100)) == 50


async def test_a_cancelled_write_leaves_the_store_usable_and_is_whole_or_absent(store: Store) -> None:
    for number in range(10):
        write = asyncio.ensure_future(store.write({b"a%d" % number: b"1", b"b%d" % number: b"1"}))
        for _ in range(number):
            await asyncio.sleep(0)
        write.cancel()
        await asyncio.wait({write})

    await store.write({b"c": b"1"})
    rows = dict(await _all(store))
    assert rows.pop(b"c") == b"1"
    assert {key[1:] for key in rows if key[:1] == b"a"} == {key[1:] for key in rows if key[:1] == b"b"}


async def test_reads_go_on_while_a_write_is_under_way(store: Store) -> None:
    await store.write({b"a": b"1"})
    write = asyncio.ensure_future(store.write({b"b": b"2"}))

    assert await store.get(b"a") == b"1"
    assert (await _all(store))[0] == (b"a", b"1")
    await write


async def test_cancelled_reads_leave_the_store_usable(store: Store) -> None:
    await store.write(_numbered(3000))
    await store.flush()
    for turns in range(20):
        calls: list[Awaitable[object]] = [store.scan(b"k", b"l", limit=3000) for _ in range(4)]
        calls += [store.get_many(list(_numbered(50))) for _ in range(4)]
        reads = [asyncio.ensure_future(call) for call in calls]
        for _ in range(turns):
            await asyncio.sleep(0)
        for read in reads:
            read.cancel()
        await asyncio.wait(reads)

    assert await store.get(b"k000007") == b"v7"


_keys = st.lists(st.sampled_from([b"\x00", b"a", b"b", b"\xff"]), min_size=1, max_size=3).map(b"".join)
_batches = st.dictionaries(_keys, st.none() | st.binary(max_size=20), max_size=8)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), _batches),
        st.tuples(st.just("scan"), st.tuples(_keys, _keys, st.integers(1, 12))),
        st.tuples(st.just("get_many"), st.lists(_keys, max_size=6)),
        st.tuples(st.just("flush"), st.none()),
        st.tuples(st.just("reopen"), st.none()),
    ),
    max_size=12,
)
_EXAMPLES = {"memory": 150, "slate in memory": 25, "slate on files": 12, "slate on s3": 4}


@pytest.fixture(params=_EXAMPLES)
def model_check(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, int]:
    examples = _EXAMPLES[request.param]
    match request.param:
        case "memory":
            return MemoryStorage(), examples
        case "slate in memory":
            return SlateStorage("memory://model"), examples
        case "slate on files":
            return SlateStorage(str(tmp_path)), examples
        case _:
            request.getfixturevalue("s3")
            return SlateStorage(f"s3://silo/model/{next(_names)}"), examples


def test_any_sequence_of_calls_agrees_with_a_dict(model_check: tuple[Storage, int]) -> None:
    storage, examples = model_check
    with asyncio.Runner() as runner:

        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(_steps)
        def check(steps: list[tuple[str, object]]) -> None:
            runner.run(_agrees_with_a_dict(storage, f"model-{next(_names)}", steps))

        check()


async def _agrees_with_a_dict(storage: Storage, name: str, steps: list[tuple[str, object]]) -> None:
    model: dict[bytes, bytes] = {}
    store = await storage.open(name)
    for step in steps:
        match step:
            case ("write", dict(batch)):
                await store.write(dict(batch))
                for key, value in batch.items():
                    model.pop(key, None)
                    if value is not None:
                        model[key] = value
            case ("scan", (one, other, limit)):
                start, end = min(one, other), max(one, other)
                expected = sorted(row for row in model.items() if start <= row[0] < end)[:limit]
                assert await store.scan(start, end, limit=limit) == expected
            case ("get_many", list(keys)):
                assert await store.get_many(keys) == [model.get(key) for key in keys]
            case ("flush", _):
                await store.flush()
            case _:
                await store.close()
                store = await storage.open(name)
        assert await _all(store) == sorted(model.items())
    await store.close()
