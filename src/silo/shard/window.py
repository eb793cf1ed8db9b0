"""The head of an ordered range of rows, kept in memory.

A backlog lives in the store; of each range only the smallest keys are in memory.

Invariants:
    HEAD      every row of the range with a key below `bound` is in the window, and no other.
    COMPLETE  `bound` is None when the range has no further rows.

A refill reads the store from `bound` on. Rows written while it reads are noted in a
journal and applied to what it found, so the read needs no lock.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Generic, TypeVar

Value = TypeVar("Value")

_LEFT_MAX = 256  # Keys that have left, before the list may be moved.


class RowTally:
    """How many rows all windows of a shard hold."""

    def __init__(self) -> None:
        self.rows = 0


class Window(Generic[Value]):
    """The smallest rows of one range, by key. Pure: it never touches the store."""

    def __init__(self, start: bytes | None, tally: RowTally | None = None) -> None:
        """Empty; the store may hold rows from `start` on, or none at all when it is None."""
        self._keys: list[bytes] = []  # In order, from `_first` on; those before have left.
        self._first = 0
        self._states: dict[bytes, Value] = {}
        self._tally = tally or RowTally()
        self.bound = start
        self.was_let_go = False
        self._journal: dict[bytes, Value | None] | None = None

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, key: bytes) -> bool:
        return key in self._states

    def __repr__(self) -> str:
        return f"Window({len(self)} rows, bound={self.bound!r})"

    @property
    def is_complete(self) -> bool:
        return self.bound is None

    @property
    def is_refilling(self) -> bool:
        return self._journal is not None

    @property
    def first_key(self) -> bytes | None:
        return self._keys[self._first] if self._states else None

    def first(self) -> Value:
        return self._states[self._keys[self._first]]

    def get(self, key: bytes) -> Value | None:
        return self._states.get(key)

    def state_at(self, index: int) -> Value | None:
        return self._states[self._keys[self._first + index]] if index < len(self._states) else None

    def items(self) -> Iterator[tuple[bytes, Value]]:
        """The rows in memory, in order. Change nothing meanwhile."""
        for key in islice(self._keys, self._first, None):
            yield key, self._states[key]

    def insert(self, key: bytes, state: Value, *, limit: int) -> bool:
        """Add a row that was just written; whether it is in the window now.

        Over twice `limit` rows the larger ones leave: they are in the store.
        """
        if self.bound is not None and key >= self.bound:
            if self._journal is not None:
                self._journal[key] = state
            return False
        if self._states and key < self._keys[-1]:
            insort(self._keys, key, lo=self._first)
        else:
            self._keys.append(key)
        self._states[key] = state
        self._tally.rows += 1
        if len(self._states) > 2 * limit:
            self._trim(limit)
        return True

    def remove(self, key: bytes) -> None:
        """Forget a row that was just deleted."""
        if self._states.pop(key, None) is not None:
            self._tally.rows -= 1
            if self._keys[self._first] == key:
                self._first += 1  # The usual case, and deleting from a list's front moves all the others.
                if self._first > _LEFT_MAX and 2 * self._first > len(self._keys):
                    self._drop_left()
            else:
                del self._keys[bisect_left(self._keys, key, lo=self._first)]
        elif self._journal is not None and self.bound is not None and key >= self.bound:
            self._journal[key] = None

    def _drop_left(self) -> None:
        del self._keys[: self._first]
        self._first = 0

    def _trim(self, limit: int) -> None:
        self._drop_left()
        self.bound = self._keys[limit]
        for key in self._keys[limit:]:
            del self._states[key]
        self._tally.rows -= len(self._keys) - limit
        del self._keys[limit:]
        self._journal = None  # A refill under way started behind the new bound: it is void.

    def let_go(self) -> None:
        """The owner forgets this window: its rows count no more, and a refill under way is void."""
        self.was_let_go = True
        self._tally.rows -= len(self._states)
        self._keys.clear()
        self._first = 0
        self._states.clear()
        self._journal = None

    def begin_refill(self, outstanding: Mapping[bytes, Value | None]) -> bytes:
        """Start reading at the key this returns. `outstanding`: writes the store may not show yet."""
        assert self.bound is not None, "a complete window needs no refill"
        self._journal = dict(outstanding)
        return self.bound

    def finish_refill(self, rows: list[tuple[bytes, Value]], *, read_to: bytes | None) -> None:
        """Take in what the store showed from `bound` on, corrected by what was written since.

        `read_to`: the last key that was read; None when the range was read to its end.
        """
        if self._journal is None:
            return
        journal, self._journal = self._journal, None
        found = dict(rows)
        bound = None if read_to is None else read_to + b"\0"
        for key, state in journal.items():
            if bound is not None and key >= bound:
                continue
            if state is None:
                found.pop(key, None)
            else:
                found[key] = state
        self._keys.extend(sorted(found))
        self._states.update(found)
        self._tally.rows += len(found)
        self.bound = bound

    def abandon_refill(self) -> None:
        self._journal = None
