"""Stores that take time, fail, and show every commit to whoever watches."""

import asyncio
from collections.abc import Callable, Sequence
from random import Random

import msgspec

from silo.errors import StoreUnavailable
from silo.model.storage import StorageInfo
from silo.storage.memory import MemoryStorage, MemoryStore
from silo.storage.store import Batch, Row


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """How good the storage is. Probabilities are for each call."""

    read_ms: tuple[float, float] = (0.0, 1.0)
    write_ms: tuple[float, float] = (0.3, 5.0)
    failed_writes: float = 0.0  # Half of these are kept all the same.
    failed_reads: float = 0.0
    hung_writes: float = 0.0


class SimulatedStorage:
    """What one process sees of the storage, which outlives it."""

    def __init__(
        self,
        shared: MemoryStorage,
        rng: Random,
        disk: Callable[[], Disk],
        committed: Callable[[str], None],
    ) -> None:
        self._shared = shared
        self._rng = rng
        self._disk = disk
        self._committed = committed

    async def open(self, name: str) -> "SimulatedStore":
        await asyncio.sleep(self._rng.uniform(0, 0.02))
        store = await self._shared.open(name)
        return SimulatedStore(store, name, self._rng, self._disk, self._committed)

    async def destroy(self, name: str) -> None:
        await self._shared.destroy(name)


class SimulatedStore:
    """One store of one process."""

    def __init__(
        self,
        store: MemoryStore,
        name: str,
        rng: Random,
        disk: Callable[[], Disk],
        committed: Callable[[str], None],
    ) -> None:
        self._store = store
        self._name = name
        self._rng = rng
        self._disk = disk
        self._committed = committed

    async def _wait(self, span_ms: tuple[float, float]) -> None:
        await asyncio.sleep(self._rng.uniform(*span_ms) / 1000)

    async def _read(self) -> None:
        disk = self._disk()
        await self._wait(disk.read_ms)
        if self._rng.random() < disk.failed_reads:
            raise StoreUnavailable("injected: a read failed")

    async def get(self, key: bytes) -> bytes | None:
        await self._read()
        return await self._store.get(key)

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        await self._read()
        return await self._store.get_many(keys)

    async def scan(self, start: bytes, end: bytes, *, limit: int) -> list[Row]:
        rows = await self._store.scan(start, end, limit=limit)
        await self._read()  # What was seen may be old when it arrives.
        return rows

    async def write(self, batch: Batch) -> None:
        disk = self._disk()
        await self._wait(disk.write_ms)
        fate = self._rng.random()
        if fate < disk.hung_writes:
            await asyncio.get_running_loop().create_future()
        if fate < disk.hung_writes + disk.failed_writes / 2:
            raise StoreUnavailable("injected: a write failed and was not kept")
        await self._store.write(batch)
        self._committed(self._name)
        await self._wait(disk.write_ms)
        if fate > 1 - disk.failed_writes / 2:
            raise StoreUnavailable("injected: a write failed and was kept")

    async def flush(self) -> None:
        await self._store.flush()

    async def compact(self) -> None:
        await self._store.compact()

    async def storage_info(self) -> StorageInfo:
        return await self._store.storage_info()

    async def close(self) -> None:
        await self._store.close()
