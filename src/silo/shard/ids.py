"""Which job ids cannot be taken, told without a look into the store.

Clients draw ids of version 7, which begin with the time at which they were drawn. The shard keeps the
newest time of all ids it ever admitted, and the ids of late. An id with a newer time than all those it
does not remember was never admitted before, unless it is among those it remembers.

Guarantees:
    EXACT      no clock is compared with another: times of ids are only numbers in them. An id with a
               time far ahead makes this useless until clients catch up, and never wrong.
    ONE WAY    `is_new` says "surely not taken" or "look for it", nothing else.
"""

from silo.storage import codec, keys
from silo.storage.store import Rows

REMEMBERED = 25_000  # Ids of each of two generations.


class KnownIds:
    """The ids that one shard admitted of late."""

    def __init__(self, newest_ms: int) -> None:
        """`newest_ms`: the newest time of all ids in the store."""
        self._forgotten_ms = newest_ms  # No id that is not remembered has a newer time.
        self._newest_ms = newest_ms
        self._is_dirty = False
        self._current: set[int] = set()
        self._current_newest_ms = newest_ms
        self._previous: set[int] = set()
        self._previous_newest_ms = newest_ms

    def is_new(self, job_id: str) -> bool:
        """Whether surely no tenant has a job of this id. Otherwise look for it in the store."""
        drawn = _drawn(job_id)
        if drawn is None:
            return False
        at_ms, tail = drawn
        return at_ms > self._forgotten_ms and tail not in self._current and tail not in self._previous

    def add(self, job_id: str) -> None:
        """A job of this id was admitted."""
        drawn = _drawn(job_id)
        if drawn is None:
            return
        at_ms, tail = drawn
        self._current.add(tail)
        self._current_newest_ms = max(self._current_newest_ms, at_ms)
        if at_ms > self._newest_ms:
            self._newest_ms = at_ms
            self._is_dirty = True
        if len(self._current) >= REMEMBERED:
            self._forgotten_ms = max(self._forgotten_ms, self._previous_newest_ms)
            self._previous, self._previous_newest_ms = self._current, self._current_newest_ms
            self._current = set()

    def seal(self, rows: Rows) -> None:
        """Add the newest time to the group that is about to be written."""
        if self._is_dirty:
            rows[keys.NEWEST_ID] = codec.encode(self._newest_ms)
            self._is_dirty = False


def _drawn(job_id: str) -> tuple[int, int] | None:
    """The time in an id of version 7, and its last part, which is random; None for any other id."""
    if len(job_id) != 36 or job_id[14] != "7":
        return None
    try:
        return int(job_id[:8] + job_id[9:13], 16), int(job_id[24:], 16)
    except ValueError:
        return None
