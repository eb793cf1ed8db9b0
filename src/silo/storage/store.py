"""What a shard needs from storage, as a promise that every implementation keeps."""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias

from silo.model.storage import StorageInfo
from silo.storage import keys

Batch: TypeAlias = Mapping[bytes, bytes | None]
"""Key to value; None deletes the key. One key appears once, so order within a batch has no meaning."""

Rows: TypeAlias = dict[bytes, bytes | None]
"""A batch that is being filled."""

Row: TypeAlias = tuple[bytes, bytes]


class Group(Rows):
    """Rows that are told to be new where they are.

    `fresh`: those of its rows that surely were not there before, neither in the store nor in an
    earlier batch. That is a hint: a store may use it to leave out rows that come and go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fresh: set[bytes] = set()

    def note_fresh(self, rows: Iterable[bytes]) -> None:
        """These are about to be added, and were not there before unless they are in this batch."""
        for key in rows:
            if key not in self:
                self.fresh.add(key)


class Store(Protocol):
    """One shard's ordered key space. One writer; keys sort as bytes and are never empty.

    Every call raises `StoreFenced` when another writer has opened the same store,
    `StoreUnavailable` when the store cannot answer, and `StoreCorrupt` when
    stored bytes do not decode. After `close` every call raises `StoreUnavailable`.
    """

    async def get(self, key: bytes) -> bytes | None:
        """The value of `key`, or None. Sees every write that has returned."""

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of `keys`, in their order; cheaper than as many `get`s."""

    async def scan(self, start: bytes, end: bytes, *, limit: int) -> list[Row]:
        """At most `limit` rows with `start <= key < end`, ascending.

        Fewer rows than `limit` mean that the range is exhausted. Sees every write that
        returned before the call; a write made meanwhile may be seen, or in part, or not.
        """

    async def write(self, batch: Batch) -> None:
        """Apply the whole batch or none of it; return once it is durable at the store's level.

        Batches take effect in the order of the calls. The store owns `batch`
        from here on. A caller cancelled while waiting does not know the outcome.

        Raises:
            StoreFenced: another writer opened this store. Close; do not retry.
            StoreUnavailable: the outcome is unknown. Reopen to learn it.
        """

    async def flush(self) -> None:
        """Move what the write-ahead log holds into sorted tables in the object store."""

    async def compact(self) -> None:
        """Have the sorted runs merged in the background, which frees what deleted rows take.

        Returns once that is asked for. The newest run and the tables not yet in a run stay as they
        are, unless there is but one run: it is written anew. Runs that are being merged already
        are left to that. No row changes, so a failure is no reason to close the store. Another
        writer's compaction is not noticed: this may return instead of raising `StoreFenced`.

        Raises:
            StoreUnavailable: not asked for; either the store failed or it is busy merging.
        """

    async def storage_info(self) -> StorageInfo:
        """What the store is made of. May answer instead of raising `StoreFenced`."""

    async def close(self) -> None:
        """Flush and release. Closing twice is harmless. A fenced store closes without an error."""


async def scan_all(store: Store, prefix: bytes, *, page_rows: int) -> AsyncIterator[Row]:
    """Every row whose key starts with `prefix`, ascending, read a page at a time."""
    start, end = prefix, keys.range_end(prefix)
    while True:
        rows = await store.scan(start, end, limit=page_rows)
        for row in rows:
            yield row
        if len(rows) < page_rows:
            return
        start = keys.after(rows[-1][0])
