"""Backoff: when the tries of one call follow each other."""

import math
import time
from collections.abc import Callable
from random import Random

from silo.client.types import ShardRouting

_DELAY_MS_MAX = 5000


class Backoff:
    """The waits between the tries of one call, which begins now.

    They double from `retry_delay_ms` up to 5 s. Each is then drawn between one half of that and all of it,
    so that clients that lost the same server do not come back at the same moments.
    """

    def __init__(
        self, routing: ShardRouting, rng: Random, *, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._now_s = now_s
        self._rng = rng
        self._retries_left = routing.max_retries
        self._delay_ms = routing.retry_delay_ms
        budget_ms = routing.retry_budget_ms
        self._end_s = math.inf if budget_ms is None else now_s() + budget_ms / 1000

    @property
    def is_used_up(self) -> bool:
        """Whether the last try was the last one."""
        return self._retries_left <= 0 or self._now_s() >= self._end_s

    def next_wait_s(self) -> float | None:
        """How long to wait before the next try, which counts as begun; None when there is none."""
        left_s = self._end_s - self._now_s()
        if self._retries_left <= 0 or left_s <= 0:
            return None
        self._retries_left -= 1
        wait_s = self._rng.uniform(0.5, 1.0) * self._delay_ms / 1000
        self._delay_ms = min(2 * self._delay_ms, _DELAY_MS_MAX)
        return min(wait_s, left_s)  # The last try comes when the budget ends, so that all of it is used.
