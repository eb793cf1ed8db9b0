"""What a local store has answered outlives kill -9, failing disks and wrong places."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

from silo.errors import StoreUnavailable
from silo.storage import slate
from silo.storage.durability import Durability
from silo.storage.slate import SlateStorage, SlateStore
from tests.builders import until
from tests.contract import store_process

_VALUE_BYTES = 400


@contextmanager
def _process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, store_process.__file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@asynccontextmanager
async def _opened(root: Path, **options: object) -> AsyncIterator[SlateStore]:
    store = await SlateStorage(str(root), **options).open("s")  # type: ignore[arg-type]
    try:
        yield store
    finally:
        await store.close()


async def _rows(store: SlateStore) -> dict[bytes, bytes]:
    return dict(await store.scan(b"\x00", b"\xff", limit=10_000_000))


def _numbers(rows: dict[bytes, bytes]) -> list[int]:
    return sorted({int(key.split(b"/")[1]) for key in rows})


async def test_ten_kills_lose_no_answered_batch_and_leave_none_half_written(tmp_path: Path) -> None:
    rng = random.Random(10)
    first = 1
    for _ in range(10):
        acknowledged = _written_until_killed(tmp_path, first, wanted=rng.randrange(5, 120))
        async with _opened(tmp_path) as store:
            rows = await _rows(store)
        last = max(_numbers(rows))
        # The batch under way when the kill came may be there too.
        assert last in (acknowledged, acknowledged + 1)
        assert rows == store_process.expected(range(1, last + 1), _VALUE_BYTES)
        first = last + 1


def _written_until_killed(root: Path, first: int, *, wanted: int) -> int:
    """Let a process write and kill it once `wanted` batches are answered; the last number it printed."""
    with _process("write", str(root), str(first), str(_VALUE_BYTES)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        for _ in range(wanted):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        printed = [int(line) for line in process.stdout.read().split()]
        return max(printed, default=first + wanted - 1)


class _Syncs:
    """Records what is synced, and lets it fail or wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[Path] = []
        self.fails = False
        self.go = threading.Event()
        self.go.set()
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._recorded(getattr(os, name)))

    def _recorded(self, sync: Callable[[int], None]) -> Callable[[int], None]:
        def call(handle: int) -> None:
            path = Path(f"/proc/self/fd/{handle}").readlink()
            self.go.wait()
            if self.fails:
                raise OSError(5, "Input/output error")
            sync(handle)
            self.paths.append(path)

        return call


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Syncs]:
    syncs = _Syncs(monkeypatch)
    yield syncs
    syncs.go.set()


async def test_a_write_returns_after_its_log_file_and_then_the_directory_were_synced(
    tmp_path: Path, syncs: _Syncs
) -> None:
    log = tmp_path / "s" / "wal"
    async with _opened(tmp_path) as store:
        for number in range(5):
            before = set(log.iterdir())
            syncs.paths.clear()
            await store.write({b"k": b"%d" % number})
            new = set(log.iterdir()) - before
            assert len(new) == 1
            assert syncs.paths == [*new, log]


async def test_a_write_does_not_return_while_its_sync_has_not(tmp_path: Path, syncs: _Syncs) -> None:
    async with _opened(tmp_path) as store:
        syncs.go.clear()
        try:
            write = asyncio.ensure_future(store.write({b"k": b"v"}))
            await until(lambda: len(list((tmp_path / "s" / "wal").glob("*.sst"))) == 2)
            assert not write.done()
        finally:
            syncs.go.set()
        await write


async def test_opening_syncs_the_logs_that_a_killed_process_left_behind(
    tmp_path: Path, syncs: _Syncs
) -> None:
    _written_until_killed(tmp_path, 1, wanted=5)
    left = set((tmp_path / "s" / "wal").glob("*.sst"))

    async with _opened(tmp_path):
        assert left <= set(syncs.paths)
        assert tmp_path / "s" / "wal" in syncs.paths
        assert set((tmp_path / "s" / "manifest").iterdir()) & set(syncs.paths)


async def test_a_new_data_directory_is_synced_into_its_parents(tmp_path: Path, syncs: _Syncs) -> None:
    async with _opened(tmp_path / "a" / "b"):
        assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(syncs.paths)


async def test_a_failed_sync_fails_the_write_and_every_later_one(tmp_path: Path, syncs: _Syncs) -> None:
    store = await SlateStorage(str(tmp_path)).open("s")
    await store.write({b"kept": b"1"})
    syncs.fails = True
    with pytest.raises(StoreUnavailable, match=r"cannot write to data directory .*: Input/output error"):
        await store.write({b"lost": b"1"})
    # The next sync would say yes without having written anything: the kernel reports an error once.
    syncs.fails = False
    with pytest.raises(StoreUnavailable, match="Input/output error"):
        await store.write({b"later": b"1"})
    with pytest.raises(StoreUnavailable):
        await store.close()

    async with _opened(tmp_path) as again:
        assert await again.get(b"kept") == b"1"


async def test_a_failed_sweep_fails_the_next_write(
    tmp_path: Path, syncs: _Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slate, "_SWEEP_S", 0.01)
    store = await SlateStorage(str(tmp_path)).open("s")
    syncs.fails = True
    sweep = store._sweep
    assert sweep is not None
    await until(sweep.done)
    syncs.fails = False
    with pytest.raises(StoreUnavailable, match="Input/output error"):
        await store.write({b"k": b"v"})
    with pytest.raises(StoreUnavailable):
        await store.close()


async def test_a_gap_among_the_log_files_does_not_end_the_syncing(tmp_path: Path, syncs: _Syncs) -> None:
    log = tmp_path / "s" / "wal"
    async with _opened(tmp_path) as store:
        assert store._local is not None
        for number in range(3):
            await store.write({b"k": b"%d" % number})
        store._local._next_log = 1
        (log / f"{1:020d}.sst").unlink()  # As the collector does, a moment before it would be synced.
        syncs.paths.clear()
        await store.write({b"k": b"last"})
        assert max(log.glob("*.sst")) in syncs.paths


async def test_the_logs_that_opening_replays_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slate, "_LOG_FILES_MAX", 10)
    async with _opened(tmp_path) as store:
        for number in range(65):
            await store.write({b"k%d" % number: b"v"})
            await until(lambda: store._table_flush is None)
        local = store._local
        assert local is not None
        manifest = await local._admin.read_manifest(None)
        newest = max(int(path.stem) for path in (tmp_path / "s" / "wal").glob("*.sst"))
        assert newest - manifest.replay_after_wal_id <= 10


async def test_replaced_logs_are_collected_once_their_tables_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slate, "_SWEEP_S", 0.02)
    often = {"garbage_collector_options": {"wal_options": {"interval": "20ms"}}}
    log = tmp_path / "s" / "wal"
    async with _opened(tmp_path, settings=often) as store:
        for number in range(50):
            await store.write({b"k%d" % number: b"v"})
        await store.flush()
        await until(lambda: len(list(log.glob("*.sst"))) <= 3)
        assert len(await _rows(store)) == 50
    async with _opened(tmp_path) as again:
        assert len(await _rows(again)) == 50


async def test_a_log_stays_until_the_table_that_replaces_it_was_synced(
    tmp_path: Path, syncs: _Syncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = {"garbage_collector_options": {"wal_options": {"interval": "5ms"}}}
    log = tmp_path / "s" / "wal"
    async with _opened(tmp_path, settings=often) as store:
        for number in range(10):
            await store.write({b"k%d" % number: b"v"})
        for path in log.glob("*.sst"):
            yesterday = path.stat().st_mtime - 86_400
            os.utime(path, (yesterday, yesterday))
        syncs.go.clear()
        try:
            flush = asyncio.ensure_future(store.flush())
            await until(lambda: any((tmp_path / "s" / "compacted").glob("*.sst")))
            for _ in range(40):  # Many turns of the collector, which must not use them.
                await asyncio.sleep(0.005)
                assert len(list(log.glob("*.sst"))) == 11
        finally:
            syncs.go.set()
        await flush
        await until(lambda: len(list(log.glob("*.sst"))) <= 2)


def test_garbage_collection_is_on_by_default(tmp_path: Path) -> None:
    for root in ("memory://x", "s3://bucket", str(tmp_path)):
        collector = SlateStorage(root)._settings["garbage_collector_options"]
        assert isinstance(collector, dict)
        for kind in ("wal", "manifest", "compacted", "compactions"):
            assert collector[f"{kind}_options"]["interval"].endswith("s")


async def test_buffered_answers_without_a_sync_and_flushes_within_the_interval(
    tmp_path: Path, syncs: _Syncs
) -> None:
    options = {"durability": Durability.BUFFERED, "flush_interval_ms": 50}
    log = tmp_path / "s" / "wal"
    async with _opened(tmp_path, **options) as store:
        syncs.paths.clear()
        at_first = len(list(log.glob("*.sst")))
        await store.write({b"k": b"v"})
        assert await store.get(b"k") == b"v"
        assert syncs.paths == []
        await until(lambda: len(list(log.glob("*.sst"))) > at_first)
    async with _opened(tmp_path) as again:
        assert await again.get(b"k") == b"v"


async def test_buffered_writes_are_kept_by_an_orderly_close(tmp_path: Path) -> None:
    options = {"durability": Durability.BUFFERED, "flush_interval_ms": 60_000}
    async with _opened(tmp_path, **options) as store:
        await store.write({b"k": b"v"})
    async with _opened(tmp_path, **options) as again:
        assert await again.get(b"k") == b"v"


async def test_a_file_in_the_place_of_the_data_directory_is_named(tmp_path: Path) -> None:
    place = tmp_path / "data"
    place.write_text("not a directory")
    with pytest.raises(StoreUnavailable, match=rf"cannot write to data directory {place}: "):
        await SlateStorage(str(place)).open("s")
    with (
        pytest.raises(StoreUnavailable, match=rf"cannot write to data directory {place}: "),
        SlateStorage(str(place)).lock(),
    ):
        raise AssertionError("there is nothing to lock")
    assert place.read_text() == "not a directory"


async def test_a_data_directory_without_permission_is_named(tmp_path: Path) -> None:
    place = tmp_path / "data"
    place.mkdir(mode=0o500)
    with _unprivileged(), pytest.raises(StoreUnavailable, match=rf"{place}/below: Permission denied"):
        await SlateStorage(str(place / "below")).open("s")


@contextmanager
def _unprivileged() -> Iterator[None]:
    """Lay down the rights of root, which may write anywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


async def test_a_place_that_fails_under_way_gives_an_error_and_loses_nothing_answered(tmp_path: Path) -> None:
    store = await SlateStorage(str(tmp_path)).open("s")
    await store.write({b"a": b"1"})
    moved = (tmp_path / "s").rename(tmp_path / "away")
    (tmp_path / "s").write_text("in the way")
    with pytest.raises(StoreUnavailable, match=r"cannot write to data directory .*: Not a directory"):
        await store.write({b"b": b"2"})
    with pytest.raises(StoreUnavailable):
        await store.write({b"c": b"3"})
    with suppress(StoreUnavailable):  # It may still fail to sync what cannot be there.
        await store.close()

    (tmp_path / "s").unlink()
    moved.rename(tmp_path / "s")
    async with _opened(tmp_path) as again:
        assert await again.get(b"a") == b"1"


async def test_a_disk_that_takes_no_more_fails_the_write_and_keeps_what_was_answered(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    answered = _written_until_killed(tmp_path, 1, wanted=10)
    with _process("write", str(tmp_path), str(answered + 2), "64000", "60000") as process:
        assert process.stdout is not None
        *numbers, failure = process.stdout.read().splitlines()
    assert numbers in ([], ["open"])
    assert failure.startswith("failed: StoreUnavailable: ")

    async with _opened(tmp_path) as store:
        rows = await _rows(store)
    last = max(_numbers(rows))
    assert last in (answered, answered + 1)
    assert rows == store_process.expected(range(1, last + 1), _VALUE_BYTES)


def test_a_second_process_is_refused_with_the_pid_of_the_holder(tmp_path: Path) -> None:
    with _process("lock", str(tmp_path)) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with _process("lock", str(tmp_path)) as second:
            refusal, _ = second.communicate(timeout=30)
        assert refusal.startswith("failed: StoreUnavailable: ")
        assert f"is in use by process {holder.pid}" in refusal


def test_the_lock_goes_with_the_process_that_held_it(tmp_path: Path) -> None:
    with _process("lock", str(tmp_path)) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        holder.kill()
        holder.wait()
        with SlateStorage(str(tmp_path)).lock():
            assert (tmp_path / "silo.lock").read_text() == str(os.getpid())


def test_the_lock_is_free_after_the_block_and_other_roots_have_none(tmp_path: Path) -> None:
    storage = SlateStorage(f"file://{tmp_path}/data")
    for _ in range(2):
        with storage.lock():
            assert (tmp_path / "data" / "silo.lock").read_text() == str(os.getpid())
    memory = SlateStorage("memory://x")
    with memory.lock(), memory.lock():
        assert memory.directory is None
