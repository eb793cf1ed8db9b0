"""Where live rows of a queue begin.

A queue is consumed from its front, and deleted rows stay in the store until a
compaction drops them. A scan from the front would read them all, so we keep, for
ranges with a backlog, a key below which nothing is alive. It is stored in the same
commit as whatever could make it wrong.
"""

from collections.abc import Iterable, Iterator

from silo.errors import StoreCorrupt
from silo.storage import codec, keys
from silo.storage.store import Rows
from silo.telemetry.logging import Log

log = Log("silo.shard.floors")


class Floors:
    """The known floors of one shard, by range prefix."""

    def __init__(self, stored: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """`stored`: the rows of the floor family."""
        self._floors = dict(_decodable(stored))

    def __len__(self) -> int:
        return len(self._floors)

    def start(self, prefix: bytes) -> bytes:
        """The key from which a scan of this range sees all live rows."""
        return self._floors.get(prefix, prefix)

    def known(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        """Ranges below `prefix` that have a floor, with it, in key order."""
        return sorted(item for item in self._floors.items() if item[0].startswith(prefix))

    def admit(self, prefix: bytes, key: bytes, rows: Rows) -> None:
        """A row is being written at `key`: the floor may not lie above it."""
        floor = self._floors.get(prefix)
        if floor is not None and key < floor:
            self._set(prefix, key, rows)

    def raise_to(self, prefix: bytes, key: bytes, rows: Rows) -> None:
        """No live row of the range lies before `key`."""
        if self._floors.get(prefix) != key:
            self._set(prefix, key, rows)

    def drop(self, prefix: bytes, rows: Rows) -> None:
        """The range is empty: it needs no floor."""
        if self._floors.pop(prefix, None) is not None:
            rows[keys.floor_key(prefix)] = None

    def _set(self, prefix: bytes, key: bytes, rows: Rows) -> None:
        self._floors[prefix] = key
        rows[keys.floor_key(prefix)] = codec.encode(key)


def _decodable(stored: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """The floors, without damaged ones: a range without a floor is merely read from its start."""
    for row, value in stored:
        try:
            yield row[len(keys.FLOORS) :], codec.decode(bytes, value)
        except StoreCorrupt as error:
            log.error("floor passed over: it does not decode", key=row.hex(), reason=str(error))
