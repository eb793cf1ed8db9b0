"""SlateStore: the store on SlateDB, in memory, on local files, or in an object store by URL."""

import asyncio
import fcntl
import os
import shutil
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar  # The binding is untyped: its objects are Any throughout this module.

from slatedb import uniffi as slatedb

from silo.errors import StoreCorrupt, StoreError, StoreFenced, StoreUnavailable
from silo.model.storage import StorageInfo
from silo.storage import slate_ffi
from silo.storage.durability import Durability
from silo.storage.local_files import LocalFiles, make_directory, os_error, plain_path
from silo.storage.slate_compaction import Compactions
from silo.storage.slate_settings import built, effective_settings
from silo.storage.store import Batch, Row

T = TypeVar("T")

_BLOCK_CACHE_BYTES = 64 << 20
_SWEEP_S = 5.0
_SCAN_BATCH = 1000
_CLOCK_TRIES_MAX = 5
_FILL_ROWS = 200  # Put into a batch in one go: about a millisecond.
_LOG_FILES_MAX = 1024  # Groups between two table flushes: what opening replays, a round trip each.


class SlateStorage:
    """The stores of one server process, one SlateDB database for each name under one root.

    `root` is a directory (plain or `file:///…`), `memory://NAME`, or a URL such as
    `s3://bucket/prefix` with credentials in the usual environment variables.

    Raises:
        ConfigError: `settings` names something that SlateDB does not know.
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
        self._settings = effective_settings(
            settings or {},
            durability=durability,
            flush_interval_ms=flush_interval_ms,
            is_local=self.directory is not None,
        )
        self._local_root: str | None = None  # A directory's path as the binding gets it.
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
            make_directory(self.directory)
            self._local_root = self._local_root or plain_path(self.directory)
        path = self._path(name)
        try:
            database = await self._builder(path).build()
        except slatedb.Error as error:
            raise _translated(error) from error
        admin = slatedb.AdminBuilder(path, self._objects).build()
        local = None if self.directory is None else LocalFiles(self.directory / name, admin)
        store = SlateStore(
            database,
            durability=self.durability,
            local=local,
            compactions=Compactions(admin, self._settings),
        )
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
        make_directory(self.directory)
        path = self.directory / "silo.lock"
        try:
            file = path.open("a+")
        except OSError as error:
            raise os_error(self.directory, error) from error
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
        return f"{self._prefix}{name}" if self._local_root is None else f"{self._local_root}/{name}"

    def _resolved(self) -> Any:
        if self._objects is None:
            self._objects = slatedb.ObjectStore.resolve(self._url)
            self._cache = slatedb.DbCache.new_foyer_cache(
                slatedb.FoyerCacheOptions(max_capacity=_BLOCK_CACHE_BYTES, shards=4)
            )
        return self._objects

    def _builder(self, path: str) -> Any:
        objects = self._resolved()
        builder = slatedb.DbBuilder(path, objects)
        builder.with_settings(built(self._settings))
        builder.with_db_cache(self._cache, self._cache_ids.setdefault(path, len(self._cache_ids) + 1))
        return builder


class SlateStore:
    """One SlateDB database as a `Store`. Made by `SlateStorage.open`."""

    def __init__(
        self, database: Any, *, durability: Durability, local: LocalFiles | None, compactions: Compactions
    ) -> None:
        self._database = database
        self._compactions = compactions
        self._durability = durability
        self._local = local
        self._writing = asyncio.Lock()
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
        return await self._call(lambda: _get(self._database, key))

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return await self._call(lambda: _get_many(self._database, keys))

    async def scan(self, start: bytes, end: bytes, *, limit: int) -> list[Row]:
        self._check_open()
        if start >= end:
            return []  # The binding takes this for an error.
        return await self._call(lambda: _scan(self._database, start, end, limit))

    async def write(self, batch: Batch) -> None:
        self._check_open()
        if not batch:
            return
        async with self._writing:  # None overtakes one that is tried again.
            await self._call(lambda: self._database.write(_write_batch(batch)))
        if self._durability is Durability.FLUSHED:
            await self._call(lambda: self._flush(slatedb.FlushType.WAL))
            self._bound_log()

    async def write_behind(self, rows: Sequence[tuple[bytes, bytes | None]]) -> None:
        """Like `write`, but durable only with the next `write`; lets others run between parts of the work.

        The keys differ, and cost less in order.
        """
        self._check_open()
        batch = slatedb.WriteBatch()
        for start in range(0, len(rows), _FILL_ROWS):
            _fill(batch, rows[start : start + _FILL_ROWS])
            await asyncio.sleep(0)
        await self._call(lambda: self._database.write(batch))

    async def flush(self) -> None:
        await self._call(lambda: self._flush(slatedb.FlushType.MEM_TABLE))
        if self._local is not None and self._durability is Durability.FLUSHED:
            await self._local.sweep()

    async def compact(self) -> None:
        await self._call(self._compactions.merge)

    async def storage_info(self) -> StorageInfo:
        return await self._call(self._compactions.info)

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

    async def _call(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Run an operation of the binding that may be run twice, and answer with a store's errors."""
        self._check_open()
        for tries_left in reversed(range(_CLOCK_TRIES_MAX)):
            try:
                return await operation()
            except slatedb.Error as error:
                if not (tries_left and _is_clock_race(error)):
                    raise self._translated(error) from error
        raise AssertionError("the last try returns or raises")

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreUnavailable("the store is closed")

    def _translated(self, error: Exception) -> StoreError:
        if self._local is not None and isinstance(error, slatedb.Error.Unavailable):
            found = self._local.trouble()
            if found is not None:
                return found
        return _translated(error)


async def _get(database: Any, key: bytes) -> bytes | None:
    if slate_ffi.AVAILABLE:
        return await slate_ffi.get(database, key)
    found: bytes | None = await database.get(key)
    return found


async def _get_many(database: Any, keys: Sequence[bytes]) -> list[bytes | None]:
    if slate_ffi.AVAILABLE:
        return await slate_ffi.get_many(database, keys)
    return [await database.get(key) for key in keys]


async def _scan(database: Any, start: bytes, end: bytes, limit: int) -> list[Row]:
    span = slatedb.KeyRange(start=start, start_inclusive=True, end=end, end_inclusive=False)
    rows: list[Row] = []
    iterator = await database.scan(span)
    while len(rows) < limit:
        wanted = min(_SCAN_BATCH, limit - len(rows))
        batch = await _next_batch(iterator, wanted)
        rows.extend(batch)
        if len(batch) < wanted:
            break
    return rows


async def _next_batch(iterator: Any, count: int) -> list[Row]:
    if slate_ffi.AVAILABLE:
        return await slate_ffi.next_batch(iterator, count)
    return [(row.key, row.value) for row in await iterator.next_batch(count)]


def _write_batch(rows: Batch) -> Any:
    batch = slatedb.WriteBatch()
    _fill(batch, rows.items())
    return batch


def _fill(batch: Any, rows: Iterable[tuple[bytes, bytes | None]]) -> None:
    if slate_ffi.AVAILABLE:
        slate_ffi.fill(batch, rows)
        return
    for key, value in rows:
        if value is None:
            batch.delete(key)
        else:
            batch.put(key, value)


def _is_closed_error(error: Exception) -> bool:
    return isinstance(error, slatedb.Error.Closed)


def _is_clock_race(error: Exception) -> bool:
    """Whether the call did nothing because the clock seemed to go back.

    Threads of the store may read the clock in one order and note it in the other. SlateDB waits and
    looks once more, and on a busy machine that meets the same race.
    """
    return isinstance(error, slatedb.Error.Invalid) and "clock tick" in error.message


def _translated(error: Any) -> StoreError:
    text = getattr(error, "message", None) or str(error)
    if _is_closed_error(error):
        if error.reason is slatedb.CloseReason.FENCED:
            return StoreFenced("another writer has opened this store")
        return StoreUnavailable("the store is closed", reason=text)
    if isinstance(error, slatedb.Error.Data):
        return StoreCorrupt("stored data is damaged", reason=text)
    return StoreUnavailable("the store failed", reason=text)


def _split_url(root: str) -> tuple[str, str]:
    """The URL of the object store, and what the paths in it start with."""
    if root.startswith("memory:"):
        return "memory:///", ""
    scheme, _, rest = root.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    return f"{scheme}://{bucket}" + ("/" if not bucket else ""), f"{prefix}/" if prefix else ""
