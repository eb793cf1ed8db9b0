"""The clock of a test server."""

import heapq
from collections.abc import Callable

from silo.clock import Alarm, VirtualClock


class SteppingClock(VirtualClock):
    """A virtual clock that knows when it rings next, so that whoever moves it can stop there."""

    def __init__(self, now_ms: int) -> None:
        super().__init__(now_ms)
        self._stops: list[int] = []  # Of all alarms, also of those that were cancelled since.

    def call_at(self, at_ms: int, callback: Callable[[], None]) -> Alarm:
        heapq.heappush(self._stops, at_ms)
        return super().call_at(at_ms, callback)

    def next_stop_ms(self, until_ms: int) -> int:
        """When the next alarm rings, or `until_ms` if that is sooner."""
        while self._stops and self._stops[0] <= self.now_ms():
            heapq.heappop(self._stops)
        return min(until_ms, self._stops[0]) if self._stops else until_ms
