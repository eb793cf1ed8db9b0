"""A store that writes each group as one row first, and the rows themselves later, in the background.

Most rows of a job live for milliseconds: its place in a queue, its lease, its place in an index. A group of
the committer becomes durable as one row, the *journal* entry, which costs a fraction of the rows in
it. What it says is visible at once, in memory. Twice a second, or sooner when there is much, all that
came together is written in one batch with the deletion of its entries. Rows that came and went meanwhile
never reach the store.

Guarantees:
    DURABLE    `write` returns when the entry is durable. After a crash `open` applies what is left.
    ATOMIC     rows and the deletion of their entries are one batch: an entry is applied once or not yet.
    IN ORDER   what an entry says is applied before what later ones say, and before a later large group.
    VISIBLE    reads and scans see every write that has returned.
    BOUNDED    with `ROWS_MAX` rows waiting, a write waits until they are applied. A large group is not
               journaled: it is written itself, after all that waits.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import msgspec

from silo.errors import StoreCorrupt, StoreError, StoreUnavailable
from silo.model.storage import StorageInfo
from silo.storage import keys
from silo.storage.store import Batch, Group, Row, Store, scan_all

APPLY_S = 0.5
ROWS_MANY = 10_000  # Applied at once: many small batches hold up others less than a large one.
ROWS_MAX = 50_000
BATCH_BYTES_MAX = 4 << 20
_PAGE_ROWS = 256
_ABSENT = b"absent"
_JOURNAL_END = keys.range_end(keys.JOURNAL)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(dict[bytes, bytes | None]).decode


class BehindStore(Store, Protocol):
    """A store that can also take rows whose durability nobody waits for."""

    async def write_behind(self, rows: Sequence[tuple[bytes, bytes | None]]) -> None:
        """Like `write`, but durable only with the next `write`; lets others run between parts of the work.

        The keys differ, and cost less in order.
        """


class BehindStorage(Protocol):
    """Where such stores are, by name."""

    async def open(self, name: str) -> BehindStore: ...

    async def destroy(self, name: str) -> None: ...


class JournaledStorage:
    """Journaled stores in another storage."""

    def __init__(self, storage: BehindStorage) -> None:
        self._storage = storage

    async def open(self, name: str) -> "JournaledStore":
        """Open the store of this name, creating it if need be. Any earlier writer is fenced.

        Raises:
            StoreError: the storage does not answer, or what is there does not decode.
        """
        store = await self._storage.open(name)
        try:
            return await JournaledStore.open(store)
        except BaseException:
            with suppress(StoreError):
                await store.close()
            raise

    async def destroy(self, name: str) -> None:
        """Delete everything in the store of this name, which must be closed."""
        await self._storage.destroy(name)


class _Layer:
    """Rows that are not in the store yet, by the families of their keys."""

    def __init__(self) -> None:
        self._families: defaultdict[int, dict[bytes, bytes | None]] = defaultdict(dict)
        self._fresh: set[bytes] = set()  # Rows that the store surely does not have.
        self.entries: list[bytes] = []  # The journal's keys that these rows come from.

    @property
    def rows(self) -> int:
        return sum(map(len, self._families.values()))

    def merge(self, batch: Batch) -> None:
        families, fresh = self._families, self._fresh
        if isinstance(batch, Group):
            fresh.update([key for key in batch.fresh if key not in families[key[0]]])
        for key, value in batch.items():
            if value is None and key in fresh:  # It came and went.
                fresh.discard(key)
                families[key[0]].pop(key, None)
            else:
                families[key[0]][key] = value

    def get(self, key: bytes) -> bytes | None:
        """The value, None for a deletion, `_ABSENT` if it says nothing of this key."""
        return self._families[key[0]].get(key, _ABSENT)

    def within(self, start: bytes, end: bytes) -> dict[bytes, bytes | None]:
        return {
            key: value
            for first, family in self._families.items()
            if start[:1] <= bytes((first,)) <= end[:1]
            for key, value in family.items()
            if start <= key < end
        }

    def all_rows(self) -> list[tuple[bytes, bytes | None]]:
        """Everything, in order but for the entries."""
        rows: list[tuple[bytes, bytes | None]] = []
        for _, family in sorted(self._families.items()):
            rows += sorted(family.items())
        rows += dict.fromkeys(self.entries).items()
        return rows


class JournaledStore:
    """A `Store` on another one. Made by `open`."""

    def __init__(self, store: BehindStore, *, next_entry: int) -> None:
        self._store = store
        self._next_entry = next_entry
        self._new = _Layer()
        self._applying = _Layer()
        self._writing = asyncio.Lock()
        self._turn = asyncio.Lock()  # Held while rows are being written behind.
        self._has_rows = asyncio.Event()
        self._has_many = asyncio.Event()
        self._failure: StoreError | None = None
        self._applier = asyncio.get_running_loop().create_task(self._apply_forever(), name="apply journal")
        self._is_closed = False

    @classmethod
    async def open(cls, store: BehindStore) -> "JournaledStore":
        """Apply what an earlier process left in the journal, and go on.

        Raises:
            StoreCorrupt: an entry of the journal does not decode.
            StoreError: the store failed.
        """
        left = _Layer()
        async for key, entry in scan_all(store, keys.JOURNAL, page_rows=_PAGE_ROWS):
            try:
                left.merge(_decode(entry))
            except (msgspec.DecodeError, ValueError) as error:
                raise StoreCorrupt("an entry of the journal is damaged") from error
            left.entries.append(key)
        if left.entries:
            await store.write(dict(left.all_rows()))
        last = keys.read_journal(left.entries[-1]) if left.entries else 0
        return cls(store, next_entry=last + 1)

    def __repr__(self) -> str:
        return f"JournaledStore({self._new.rows} rows wait, {self._store!r})"

    async def get(self, key: bytes) -> bytes | None:
        [value] = await self.get_many([key])
        return value

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self._check_open()
        known = [self._known(key) for key in keys]
        missing = [key for key, value in zip(keys, known, strict=True) if value is _ABSENT]
        if not missing:
            return known
        found = iter(await self._store.get_many(missing))
        return [next(found) if value is _ABSENT else value for value in known]

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreUnavailable("the store is closed")

    def _known(self, key: bytes) -> bytes | None:
        value = self._new.get(key)
        return self._applying.get(key) if value is _ABSENT else value

    async def scan(self, start: bytes, end: bytes, *, limit: int) -> list[Row]:
        self._check_open()
        changed = self._applying.within(start, end) | self._new.within(start, end)
        if not changed and (end <= keys.JOURNAL or start >= _JOURNAL_END):
            return await self._store.scan(start, end, limit=limit)
        rows: list[Row] = []
        while len(rows) < limit:
            page = await self._store.scan(start, end, limit=limit)
            is_last = len(page) < limit
            upto = end if is_last else keys.after(page[-1][0])
            merged = {
                key: value for key, value in page if key not in changed and not key.startswith(keys.JOURNAL)
            }
            merged |= {
                key: value for key, value in changed.items() if value is not None and start <= key < upto
            }
            rows += sorted(merged.items())
            if is_last:
                break
            start = upto
        return rows[:limit]

    async def write(self, batch: Batch) -> None:
        self._check_open()
        if not batch:
            return
        size = sum(len(value) for value in batch.values() if value is not None)
        async with self._writing:  # In memory, too, they take effect in the order of the calls.
            if self._failure is not None:
                raise self._failure
            if size > BATCH_BYTES_MAX:
                await self._apply()
                await self._store.write(batch)
                return
            if self._new.rows > ROWS_MAX:
                await self._apply()
            key = keys.journal_key(self._next_entry)
            self._next_entry += 1
            await self._store.write({key: _encode(dict(batch))})
            self._new.merge(batch)
            self._new.entries.append(key)
            self._has_rows.set()
            if self._new.rows > ROWS_MANY:
                self._has_many.set()

    async def _apply_forever(self) -> None:
        with suppress(StoreError):
            while True:
                await self._has_rows.wait()
                with suppress(TimeoutError):
                    async with asyncio.timeout(APPLY_S):
                        await self._has_many.wait()
                await self._apply()

    async def _apply(self) -> None:
        """Write all that waits by now."""
        async with self._turn:
            if self._failure is not None:
                raise self._failure  # The journal still has what was not applied: nothing may overtake it.
            if self._applying.entries:
                await self._write_layer()  # Whoever began that was cancelled, and nothing may overtake it.
            self._has_rows.clear()
            self._has_many.clear()
            if self._new.entries:
                self._applying, self._new = self._new, _Layer()
                await self._write_layer()

    async def _write_layer(self) -> None:
        """Write what is being applied. To do that twice is the same as once."""
        try:
            await self._store.write_behind(self._applying.all_rows())
        except StoreError as error:
            self._failure = error  # The next write meets it: then the shard stops, and is opened again.
            raise
        self._applying = _Layer()

    async def flush(self) -> None:
        self._check_open()
        await self._apply()
        await self._store.flush()

    async def compact(self) -> None:
        await self._store.compact()

    async def storage_info(self) -> StorageInfo:
        return await self._store.storage_info()

    async def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._applier.cancel()
            await asyncio.wait({self._applier})
            with suppress(StoreError):  # What is left is applied by whoever opens it next.
                await self._apply()
        await self._store.close()
