"""Rows of one family in the order of their time; the next ones are in memory."""

from typing import Generic

from silo.shard.floors import Floors
from silo.shard.window import RowTally, Value, Window
from silo.storage import keys
from silo.storage.store import Rows

WINDOW_ROWS = 512


class Agenda(Generic[Value]):
    """What is to be looked at, and when. Pure: whoever looks reads more when the window runs low."""

    def __init__(self, family: bytes, floors: Floors, tally: RowTally) -> None:
        self.family = family
        self._floors = floors
        self.window: Window[Value] = Window(floors.start(family), tally)

    def __repr__(self) -> str:
        return f"Agenda({self.family!r}, {self.window!r})"

    def put(self, key: bytes, value: Value, rows: Rows) -> None:
        """The row was just written."""
        self._floors.admit(self.family, key, rows)
        self.window.insert(key, value, limit=WINDOW_ROWS)

    def drop(self, key: bytes) -> None:
        """The row was just deleted."""
        self.window.remove(key)

    @property
    def runs_low(self) -> bool:
        """Whether to read more."""
        return not self.window.is_complete and len(self.window) < WINDOW_ROWS // 4

    def first_due(self, now_ms: int) -> tuple[bytes, Value] | None:
        """The first row in memory whose time has come."""
        key = self.window.first_key
        if key is None or keys.read_time(key) > now_ms:
            return None
        return key, self.window.first()

    def next_at_ms(self, now_ms: int) -> int | None:
        """When to look next; `now_ms` if that must be read first, None if there is nothing."""
        key = self.window.first_key
        if key is not None:
            return keys.read_time(key)
        return None if self.window.is_complete else now_ms
