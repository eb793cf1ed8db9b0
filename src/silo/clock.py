"""Time as a given thing: the wall clock in production, a hand-driven one in tests."""

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from typing import Protocol


class Alarm(Protocol):
    """A call that is due later."""

    def cancel(self) -> None:
        """Make sure that it is not called, unless it was already."""


class Clock(Protocol):
    """Epoch milliseconds, and calls that are due at such a time."""

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch."""

    def call_at(self, at_ms: int, callback: Callable[[], None]) -> Alarm:
        """Call `callback` from the event loop once the time is `at_ms` or later, never before."""


class SystemClock:
    """The machine's wall clock. `call_at` works within a running event loop."""

    _RECHECK_S = 60.0  # A wall clock that is set forward is noticed at least this soon.

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def call_at(self, at_ms: int, callback: Callable[[], None]) -> Alarm:
        alarm = _LoopAlarm(self, at_ms, callback)
        alarm.arm()
        return alarm

    def delay_s(self, at_ms: int) -> float:
        return min(self._RECHECK_S, max(0, at_ms - self.now_ms()) / 1000)


class _LoopAlarm:
    def __init__(self, clock: SystemClock, at_ms: int, callback: Callable[[], None]) -> None:
        self._clock = clock
        self._at_ms = at_ms
        self._callback = callback
        self._timer: asyncio.TimerHandle | None = None

    def arm(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._clock.delay_s(self._at_ms), self._ring)

    def _ring(self) -> None:
        if self._clock.now_ms() < self._at_ms:
            self.arm()  # The loop's timer ran a little ahead of the wall clock.
        else:
            self._callback()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class VirtualClock:
    """A clock that stands still until a test moves it."""

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self._now_ms = now_ms
        self._order = itertools.count()
        self._alarms: list[tuple[int, int, _VirtualAlarm]] = []

    def now_ms(self) -> int:
        return self._now_ms

    def call_at(self, at_ms: int, callback: Callable[[], None]) -> Alarm:
        alarm = _VirtualAlarm(callback)
        heapq.heappush(self._alarms, (at_ms, next(self._order), alarm))
        return alarm

    def advance_ms(self, duration_ms: int) -> None:
        """Move time forward, ringing each alarm at its own time, in order."""
        self.set_ms(self._now_ms + duration_ms)

    def set_ms(self, now_ms: int) -> None:
        while self._alarms and self._alarms[0][0] <= now_ms:
            at_ms, _, alarm = heapq.heappop(self._alarms)
            self._now_ms = max(self._now_ms, at_ms)
            alarm.ring()
        self._now_ms = now_ms


class _VirtualAlarm:
    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self._callback = None

    def ring(self) -> None:
        if self._callback is not None:
            self._callback()
