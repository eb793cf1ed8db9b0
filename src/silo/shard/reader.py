"""Reads the rows of one shard: its store, corrected by what waits to be written.

A row that does not decode is passed over with a word in the log: it must not hold up the others.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from silo.errors import StoreCorrupt
from silo.shard.committer import Committer
from silo.shard.floors import Floors
from silo.shard.window import Value, Window
from silo.storage import keys
from silo.storage.store import Row, Rows, Store, scan_all
from silo.telemetry.logging import Log

log = Log("silo.shard.reader")

_REFILL_ROWS = 512

Decode = Callable[[bytes, bytes], Value]
"""From the key and the value of a row to what a window holds. Raises StoreCorrupt or ValueError."""


class Reader:
    """Fills windows and reads records."""

    def __init__(self, store: Store, committer: Committer, floors: Floors) -> None:
        self._store = store
        self._committer = committer
        self._floors = floors

    async def read(self, rows: list[bytes]) -> list[bytes | None]:
        """The current values of these rows; see `Committer.read`."""
        return await self._committer.read(rows)

    def outstanding(self, start: bytes, end: bytes) -> Rows:
        """What of a range waits to be written."""
        return self._committer.outstanding(start, end)

    async def scan(self, start: bytes, end: bytes, *, limit: int) -> list[Row]:
        """What the store holds of a range; what waits to be written is not in it."""
        return await self._store.scan(start, end, limit=limit)

    async def count(self, prefix: bytes) -> int:
        """How many rows start with `prefix`. Nothing may write them meanwhile."""
        count = 0
        async for _ in self.all_rows(prefix):
            count += 1
        return count

    async def all_rows(self, prefix: bytes) -> AsyncIterator[Row]:
        """Every row that starts with `prefix`. Nothing may write them meanwhile."""
        await self._committer.durable()
        async for row in scan_all(self._store, prefix, page_rows=_REFILL_ROWS):
            yield row

    async def refill(self, window: Window[Value], prefix: bytes, decode: Decode[Value]) -> None:
        """Read on in the range of a window, which must not be complete."""
        end = keys.range_end(prefix)
        outstanding = self._committer.outstanding(window.bound or prefix, end)
        start = window.begin_refill(
            {key: None if value is None else decode(key, value) for key, value in outstanding.items()}
        )
        try:
            stored = await self._store.scan(start, end, limit=_REFILL_ROWS)
        except BaseException:
            window.abandon_refill()
            raise
        window.finish_refill(
            list(_decodable(stored, decode)),
            read_to=None if len(stored) < _REFILL_ROWS else stored[-1][0],
        )

    def note_floor(self, window: Window[Value], prefix: bytes) -> None:
        """Remember where the rows of a window's range begin. The window must not have been let go."""
        first = window.first_key
        if window.is_complete:
            self._floors.drop(prefix, self._committer.rows)
        elif first is not None:
            self._floors.raise_to(prefix, first, self._committer.rows)


def _decodable(stored: Sequence[Row], decode: Decode[Value]) -> Iterator[tuple[bytes, Value]]:
    for key, value in stored:
        try:
            found = decode(key, value)
        except (StoreCorrupt, ValueError) as error:
            log.error("row passed over: it is damaged", key=key.hex(), reason=str(error))
        else:
            yield key, found
