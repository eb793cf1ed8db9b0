"""A store as its shard sees it: every call has a deadline, and a store that fails stops the shard.

What a call does that fails is unknown, so memory and store may differ: the shard must be
opened again. A record that does not decode is another matter: it concerns whoever asked
for it. And what an operator asks for (flush, compact, storage_info) neither changes rows nor
reads them, so its failure is answered and nothing else.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from silo.errors import StoreCorrupt, StoreError, StoreUnavailable
from silo.model.storage import StorageInfo
from silo.storage.store import Batch, Row, Store

_Answer = TypeVar("_Answer")


class GuardedStore:
    """A `Store` with a deadline. `failed` is told of each failure before the caller is."""

    def __init__(
        self, store: Store, *, timeout_s: float, failed: Callable[[BaseException], None] | None = None
    ) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._failed = failed

    async def get(self, key: bytes) -> bytes | None:
        return await self._bounded(self._store.get(key))

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return await self._bounded(self._store.get_many(keys))

    async def scan(self, start: bytes, end: bytes, *, limit: int) -> list[Row]:
        return await self._bounded(self._store.scan(start, end, limit=limit))

    async def write(self, batch: Batch) -> None:
        await self._bounded(self._store.write(batch))

    async def flush(self) -> None:
        await self._bounded(self._store.flush(), is_harmless=True)

    async def compact(self) -> None:
        await self._bounded(self._store.compact(), is_harmless=True)

    async def storage_info(self) -> StorageInfo:
        return await self._bounded(self._store.storage_info(), is_harmless=True)

    async def close(self) -> None:
        await self._bounded(self._store.close())

    async def _bounded(self, work: Awaitable[_Answer], *, is_harmless: bool = False) -> _Answer:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await work
        except StoreCorrupt:
            raise
        except StoreError as error:
            if not is_harmless:
                self._tell(error)
            raise
        except TimeoutError as error:
            late = StoreUnavailable("the store did not answer in time", timeout_s=self._timeout_s)
            if not is_harmless:
                self._tell(late)
            raise late from error

    def _tell(self, error: StoreError) -> None:
        if self._failed is not None:
            self._failed(error)
