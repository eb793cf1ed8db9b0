"""SlateStore: the store on SlateDB, in memory, on local files, or in an object store by URL."""

import asyncio
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any  # The binding is untyped: its objects are Any throughout this module.

from slatedb import uniffi as slatedb

from silo.errors import StoreCorrupt, StoreError, StoreFenced, StoreUnavailable
from silo.storage import slate_ffi
from silo.storage.durability import Durability
from silo.storage.store import Batch, Row

_BLOCK_CACHE_BYTES = 64 << 20
_SWEEP_S = 5.0
_SCAN_BATCH = 1000
_LOG_FILES_MAX = 1024  # Groups between two table flushes: what opening replays, a round trip each.
_LOCAL_RETRIES_MAX = 3  # A local disk that failed some times in a row is not about to answer.
_PROBE_BYTES = 64 << 10

_DEFAULTS: Mapping[str, object] = {
    "flush_interval": None,
    "max_unflushed_bytes": 256 << 20,
    "garbage_collector_options": {
        "wal_options": {"interval": "10s", "min_age": "30s"},
        "manifest_options": {"interval": "60s", "min_age": "300s"},
        "compacted_options": {"interval": "60s", "min_age": "300s"},
        "compactions_options": {"interval": "60s", "min_age": "300s"},
    },
}


# The sweep, not the age, says which files of a local store may go: see `_LocalFiles`.
_SWEPT: Mapping[str, object] = {
    "garbage_collector_options": {
        "wal_options": {"min_age": "3650d"},
        "manifest_options": {"min_age": "3650d"},
        "compactions_options": {"min_age": "3650d"},
    }
}
_MANIFESTS_KEPT = 16  # Superseded ones that stay for whoever is reading them.


class SlateStorage:
    """The stores of one server process, one SlateDB database for each name under one root.

    `root` is a directory (plain or `file:///…`), `memory://NAME`, or a URL such as
    `s3://bucket/prefix` with credentials in the usual environment variables.
    """

    def __init__(
        self,
        root: str,
        *,
        durability: Durability = Durability.FLUSHED,
        flush_interval_ms: int = 100,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.root = root.removeprefix("file://") if root.startswith("file://") else root
        self.directory = None if "://" in self.root else Path(self.root).absolute()
        # The binding takes the bucket from the URL, and the rest from the path of each database.
        self._url, self._prefix = _split_url(self.root if self.directory is None else "file:///")
        self.durability = durability
        self._settings = _merged(_DEFAULTS, settings or {})
        if durability is Durability.BUFFERED:
            self._settings["flush_interval"] = f"{flush_interval_ms}ms"
        if self.directory is not None:
            self._settings.setdefault("object_store_max_retries", _LOCAL_RETRIES_MAX)
            if durability is Durability.FLUSHED:
                self._settings = _merged(self._settings, _SWEPT)
        self._objects: Any = None
        self._cache: Any = None
        self._cache_ids: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"SlateStorage({self.root!r}, {self.durability.value})"

    async def open(self, name: str) -> "SlateStore":
        """Open the database of this name, creating it if need be. Any earlier writer is fenced.

        Raises:
            StoreUnavailable: the place cannot be reached or written; the text says why.
        """
        if self.directory is not None:
            _make_directory(self.directory)
        path = self._path(name)
        try:
            database = await self._builder(path).build()
        except slatedb.Error as error:
            raise _translated(error) from error
        local = None
        if self.directory is not None:
            admin = slatedb.AdminBuilder(path, self._objects).build()
            local = _LocalFiles(Path(path), admin)
        store = SlateStore(database, durability=self.durability, local=local)
        try:
            await store.start()
        except BaseException:
            with suppress(StoreError):
                await store.close()
            raise
        return store

    async def destroy(self, name: str) -> None:
        """Delete everything in the database of this name, which must be closed."""
        if self.directory is not None:
            await asyncio.to_thread(shutil.rmtree, self.directory / name, True)
            return
        try:
            await slatedb.AdminBuilder(self._path(name), self._resolved()).build().delete_db(True)
        except slatedb.Error as error:
            raise _translated(error) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the local directory for this process; nothing to do for other roots.

        Raises:
            StoreUnavailable: another process holds it, or it cannot be written.
        """
        if self.directory is None:
            yield
            return
        _make_directory(self.directory)
        path = self.directory / "silo.lock"
        try:
            file = path.open("a+")
        except OSError as error:
            raise _os_error(self.directory, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise StoreUnavailable(
                    f"data directory {self.directory} is in use by process {holder}"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def _path(self, name: str) -> str:
        return str(self.directory / name) if self.directory is not None else f"{self._prefix}{name}"

    def _resolved(self) -> Any:
        if self._objects is None:
            self._objects = slatedb.ObjectStore.resolve(self._url)
            self._cache = slatedb.DbCache.new_foyer_cache(
                slatedb.FoyerCacheOptions(max_capacity=_BLOCK_CACHE_BYTES, shards=4)
            )
        return self._objects

    def _builder(self, path: str) -> Any:
        objects = self._resolved()
        settings = slatedb.Settings.default()
        for key, value in _flattened(self._settings):
            settings.set(key, json.dumps(value))
        builder = slatedb.DbBuilder(path, objects)
        builder.with_settings(settings)
        builder.with_db_cache(self._cache, self._cache_ids.setdefault(path, len(self._cache_ids) + 1))
        return builder


class SlateStore:
    """One SlateDB database as a `Store`. Made by `SlateStorage.open`."""

    def __init__(self, database: Any, *, durability: Durability, local: "_LocalFiles | None") -> None:
        self._database = database
        self._durability = durability
        self._local = local
        self._is_closed = False
        self._sweep: asyncio.Task[None] | None = None
        self._log_files = 0
        self._table_flush: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to keep local files on disk."""
        if self._local is not None and self._durability is Durability.FLUSHED:
            await self._local.sync_log()  # What was replayed may be read from now on, so it must last.
            await self._local.sweep()
            self._sweep = asyncio.get_running_loop().create_task(self._run_sweep(), name="sync tables")

    async def get(self, key: bytes) -> bytes | None:
        self._check_open()
        try:
            return await _get(self._database, key)
        except slatedb.Error as error:
            raise self._translated(error) from error

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self._check_open()
        try:
            return await _get_many(self._database, keys)
        except slatedb.Error as error:
            raise self._translated(error) from error

    async def scan(self, start: bytes, end: bytes, *, limit: int) -> list[Row]:
        self._check_open()
        if start >= end:
            return []  # The binding takes this for an error.
        span = slatedb.KeyRange(start=start, start_inclusive=True, end=end, end_inclusive=False)
        rows: list[Row] = []
        try:
            iterator = await self._database.scan(span)
            while len(rows) < limit:
                wanted = min(_SCAN_BATCH, limit - len(rows))
                batch = await _next_batch(iterator, wanted)
                rows.extend(batch)
                if len(batch) < wanted:
                    break
        except slatedb.Error as error:
            raise self._translated(error) from error
        return rows

    async def write(self, batch: Batch) -> None:
        self._check_open()
        if not batch:
            return
        try:
            await self._database.write(_write_batch(batch))
            if self._durability is Durability.FLUSHED:
                await self._flush(slatedb.FlushType.WAL)
                self._bound_log()
        except slatedb.Error as error:
            raise self._translated(error) from error

    async def flush(self) -> None:
        self._check_open()
        try:
            await self._flush(slatedb.FlushType.MEM_TABLE)
        except slatedb.Error as error:
            raise self._translated(error) from error
        if self._local is not None and self._durability is Durability.FLUSHED:
            await self._local.sweep()

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self._sweep is not None:
            self._sweep.cancel()
            await asyncio.wait({self._sweep})
        if self._table_flush is not None:
            await asyncio.wait({self._table_flush})
        try:
            await self._database.shutdown()
        except slatedb.Error as error:
            translated = self._translated(error)
            if not isinstance(translated, StoreFenced) and not _is_closed_error(error):
                raise translated from error
        finally:
            if self._local is not None:
                await self._local.close(last_sync=self._durability is Durability.FLUSHED)

    async def _flush(self, kind: Any) -> None:
        await self._database.flush_with_options(slatedb.FlushOptions(flush_type=kind))
        if self._local is not None and self._durability is Durability.FLUSHED:
            await self._local.sync_log()

    def _bound_log(self) -> None:
        self._log_files += 1
        if self._log_files >= _LOG_FILES_MAX and self._table_flush is None:
            self._log_files = 0
            self._table_flush = asyncio.get_running_loop().create_task(
                self._flush_table(), name="flush table"
            )

    async def _flush_table(self) -> None:
        try:
            await self._database.flush_with_options(
                slatedb.FlushOptions(flush_type=slatedb.FlushType.MEM_TABLE)
            )
        except slatedb.Error:
            pass  # Whatever is wrong, the next write meets it too, and that one is answered for.
        finally:
            self._table_flush = None

    async def _run_sweep(self) -> None:
        assert self._local is not None
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                await self._local.sweep()
            except StoreUnavailable:
                return  # Remembered there: the next write is answered with it.
            except slatedb.Error:
                continue  # A manifest could not be read: its logs stay until a sweep that can.

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreUnavailable("the store is closed")

    def _translated(self, error: Exception) -> StoreError:
        if self._local is not None and isinstance(error, slatedb.Error.Unavailable):
            found = self._local.trouble()
            if found is not None:
                return found
        return _translated(error)


class _LocalFiles:
    """Puts on disk what SlateDB has written to local files: it never calls fsync itself.

    A log file is synced, with its directory, before its group is answered. Tables and manifests
    follow in sweeps. The garbage collector goes by the age of a file, which says nothing about
    whatever replaces it: so logs and manifests look young to it, until a sweep has put their
    successors on disk and dates them back. Old tables are kept by the compactor's checkpoints.

    After a failed sync nothing is synced any more: the kernel may have dropped the pages and
    would say yes the next time.
    """

    def __init__(self, path: Path, admin: Any) -> None:
        self._path = path
        self._admin = admin
        self._log = path / "wal"
        self._next_log = 0
        self._synced: dict[str, set[str]] = {}
        self._released = 0
        self._failure: StoreUnavailable | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="silo-fsync")

    async def sync_log(self) -> None:
        await self._run(self._sync_log, self._thread)

    async def sweep(self) -> None:
        """Sync tables and manifests, then let the logs go that they replace."""
        manifest = await self._admin.read_manifest(None)
        await self._run(self._sync_tables)
        await self._run(lambda: self._release(manifest.replay_after_wal_id if manifest else 0))

    async def close(self, *, last_sync: bool) -> None:
        try:
            if last_sync:
                await self._run(self._sync_tables)
        finally:
            self._thread.shutdown(wait=False)

    def trouble(self) -> StoreUnavailable | None:
        """Why nothing can be written here, when the operating system says so."""
        probe = self._log / "probe"
        try:
            try:
                probe.write_bytes(bytes(_PROBE_BYTES))
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            return _os_error(self._path, error)
        return None

    async def _run(self, work: Callable[[], None], thread: ThreadPoolExecutor | None = None) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            # Shielded: a caller that goes away must not leave a half-synced group behind.
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(thread, work))
        except OSError as error:
            self._failure = _os_error(self._path, error)
            raise self._failure from error

    def _sync_log(self) -> None:
        is_new = False
        while self._next_log and _sync_file(self._log / f"{self._next_log:020d}.sst"):
            self._next_log += 1
            is_new = True
        if not is_new:
            # The first time; or another write was faster; or the collector was, and left a gap.
            for number in self._logs():
                if number >= self._next_log:
                    _sync_file(self._log / f"{number:020d}.sst")
                    self._next_log = number + 1
                    is_new = True
        if is_new:
            _sync_directory(self._log)

    def _sync_tables(self) -> None:
        for folder in ("compacted", "manifest", "compactions"):
            path = self._path / folder
            if not path.is_dir():
                continue
            present = {entry.name for entry in os.scandir(path) if entry.is_file()}
            known = self._synced.get(folder, set())
            for name in present - known:
                _sync_file(path / name)
            if present - known:
                _sync_directory(path)
            self._synced[folder] = present
        _sync_directory(self._path)
        _sync_directory(self._path.parent)

    def _release(self, last_log: int) -> None:
        """Let the collector have what is superseded on disk."""
        first = self._released + 1
        numbers = range(first, last_log + 1) if self._released else self._logs()
        for number in numbers:
            if number <= last_log:
                _date_back(self._log / f"{number:020d}.sst")
        self._released = max(self._released, last_log)
        for folder in ("manifest", "compactions"):
            for name in sorted(self._synced.get(folder, ()))[:-_MANIFESTS_KEPT]:
                _date_back(self._path / folder / name)

    def _logs(self) -> list[int]:
        """Numbers of the log files, ascending. Files in the making have longer names."""
        names = [entry.name for entry in os.scandir(self._log)]
        return sorted(int(name[:20]) for name in names if name[20:] == ".sst" and name[:20].isdigit())


def _sync_file(path: Path) -> bool:
    """Put a file on disk; False when it is not there."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        os.fdatasync(handle)
    finally:
        os.close(handle)
    return True


def _sync_directory(path: Path) -> None:
    """Put a directory's names on disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _date_back(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.utime(path, (0, 0))


async def _get(database: Any, key: bytes) -> bytes | None:
    if slate_ffi.AVAILABLE:
        return await slate_ffi.get(database, key)
    found: bytes | None = await database.get(key)
    return found


async def _get_many(database: Any, keys: Sequence[bytes]) -> list[bytes | None]:
    if slate_ffi.AVAILABLE:
        return await slate_ffi.get_many(database, keys)
    return [await database.get(key) for key in keys]


async def _next_batch(iterator: Any, count: int) -> list[Row]:
    if slate_ffi.AVAILABLE:
        return await slate_ffi.next_batch(iterator, count)
    return [(row.key, row.value) for row in await iterator.next_batch(count)]


def _write_batch(rows: Batch) -> Any:
    batch = slatedb.WriteBatch()
    if slate_ffi.AVAILABLE:
        slate_ffi.fill(batch, rows)
        return batch
    for key, value in rows.items():
        if value is None:
            batch.delete(key)
        else:
            batch.put(key, value)
    return batch


def _is_closed_error(error: Exception) -> bool:
    return isinstance(error, slatedb.Error.Closed)


def _translated(error: Any) -> StoreError:
    text = getattr(error, "message", None) or str(error)
    if _is_closed_error(error):
        if error.reason is slatedb.CloseReason.FENCED:
            return StoreFenced("another writer has opened this store")
        return StoreUnavailable("the store is closed", reason=text)
    if isinstance(error, slatedb.Error.Data):
        return StoreCorrupt("stored data is damaged", reason=text)
    return StoreUnavailable("the store failed", reason=text)


def _os_error(path: Path, error: OSError) -> StoreUnavailable:
    return StoreUnavailable(f"cannot write to data directory {path}: {error.strerror or error}")


def _make_directory(path: Path) -> None:
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            _sync_directory(folder.parent)
    except OSError as error:
        raise _os_error(path, error) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise StoreUnavailable(f"cannot write to data directory {path}: Permission denied")


def _split_url(root: str) -> tuple[str, str]:
    """The URL of the object store, and what the paths in it start with."""
    if root.startswith("memory:"):
        return "memory:///", ""
    scheme, _, rest = root.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    return f"{scheme}://{bucket}" + ("/" if not bucket else ""), f"{prefix}/" if prefix else ""


def _merged(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = _merged(below, value)
        else:
            merged[key] = value
    return merged


def _flattened(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
