"""MemoryStore: the reference implementation, with faults on demand. For tests and simulations."""

import asyncio
import enum
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from silo.errors import StoreFenced, StoreUnavailable
from silo.model.storage import SortedRun, StorageInfo
from silo.storage.store import Batch, Row

_Result = TypeVar("_Result")


class Fault(enum.Enum):
    """What goes wrong with one call."""

    FAIL_BEFORE = "fail before"  # Nothing is applied, and the call fails.
    FAIL_AFTER = "fail after"  # It is applied, and yet the call fails.
    HANG = "hang"  # It is not applied, and the call never returns.


class Faults:
    """Which calls of a storage fail. Calls are counted per operation, from 1."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._planned: dict[tuple[str, int], Fault] = {}

    def plan(self, operation: str, fault: Fault, *, call: int | None = None) -> None:
        """Let the next call, or the `call`-th, of an operation fail.

        Operations are open, close, get, scan, write, flush, compact and info.
        """
        self._planned[operation, self.calls[operation] + 1 if call is None else call] = fault

    def clear(self) -> None:
        self._planned.clear()

    async def run(self, operation: str, work: Callable[[], _Result]) -> _Result:
        self.calls[operation] += 1
        fault = self._planned.pop((operation, self.calls[operation]), None)
        await asyncio.sleep(0)  # Every call gives way, as a real store does.
        match fault:
            case None:
                return work()
            case Fault.FAIL_BEFORE:
                raise StoreUnavailable("injected: failed before it was applied", operation=operation)
            case Fault.FAIL_AFTER:
                work()
                raise StoreUnavailable("injected: failed after it was applied", operation=operation)
            case Fault.HANG:
                await asyncio.get_running_loop().create_future()
                raise AssertionError("a hung call never returns")


class _Database:
    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}
        self.keys: list[bytes] = []
        self.epoch = 0


class MemoryStorage:
    """Stores that live as long as this object."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self._databases: dict[str, _Database] = {}

    async def open(self, name: str) -> "MemoryStore":
        """Open the store of this name; any earlier writer is fenced."""

        def work() -> MemoryStore:
            database = self._databases.setdefault(name, _Database())
            database.epoch += 1
            return MemoryStore(database, self.faults)

        return await self.faults.run("open", work)

    async def destroy(self, name: str) -> None:
        """Forget everything in the store of this name."""
        self._databases.pop(name, None)

    def snapshot(self, name: str) -> dict[bytes, bytes]:
        """A copy of all rows that are durable now."""
        return dict(self._databases[name].rows)


class MemoryStore:
    """A `Store` in a dict and a sorted list. Made by `MemoryStorage.open`."""

    def __init__(self, database: _Database, faults: Faults) -> None:
        self._database = database
        self._faults = faults
        self._epoch = database.epoch
        self._is_closed = False

    async def get(self, key: bytes) -> bytes | None:
        return await self._run("get", lambda: self._database.rows.get(key))

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return await self._run("get", lambda: [self._database.rows.get(key) for key in keys])

    async def scan(self, start: bytes, end: bytes, *, limit: int) -> list[Row]:
        def work() -> list[Row]:
            first = bisect_left(self._database.keys, start)
            last = min(bisect_left(self._database.keys, end), first + limit)
            return [(key, self._database.rows[key]) for key in self._database.keys[first:last]]

        return await self._run("scan", work)

    async def write(self, batch: Batch) -> None:
        def work() -> None:
            rows, keys = self._database.rows, self._database.keys
            for key, value in batch.items():
                if value is None:
                    if rows.pop(key, None) is not None:
                        del keys[bisect_left(keys, key)]
                else:
                    if key not in rows:
                        insort(keys, key)
                    rows[key] = value

        await self._run("write", work)

    async def write_behind(self, rows: Sequence[tuple[bytes, bytes | None]]) -> None:
        """The same as `write`: here nothing takes time."""
        await self.write(dict(rows))

    async def flush(self) -> None:
        await self._run("flush", lambda: None)

    async def compact(self) -> None:
        await self._run("compact", lambda: None)

    async def storage_info(self) -> StorageInfo:
        """All rows as one run of one table."""

        def work() -> StorageInfo:
            rows = self._database.rows
            size = sum(len(key) + len(value) for key, value in rows.items())
            runs = (SortedRun(id=0, tables=1, bytes=size),) if rows else ()
            return StorageInfo(level0_tables=0, level0_bytes=0, sorted_runs=runs)

        return await self._run("info", work)

    async def close(self) -> None:
        if not self._is_closed:
            await self._faults.run("close", lambda: None)
            self._is_closed = True

    def _run(self, operation: str, work: Callable[[], _Result]) -> Awaitable[_Result]:
        def checked() -> _Result:
            if self._is_closed:
                raise StoreUnavailable("the store is closed")
            if self._database.epoch != self._epoch:
                raise StoreFenced("another writer has opened this store")
            return work()

        return self._faults.run(operation, checked)
