"""Which delivered tasks run, which wait, and how many more it pays to ask for."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from silo.worker.held import HeldTask

_AHEAD_S = 0.05  # Tasks that would begin within this time may be here already.
AHEAD_MAX = 1024
_SMOOTHING = 0.1  # How much one more duration counts.


class Slots:
    """Runs at most `limit` tasks at a time, in the order in which they came."""

    def __init__(
        self,
        limit: int,
        *,
        run: Callable[[HeldTask], Awaitable[None]],
        skipped: Callable[[HeldTask], None],
        changed: Callable[[], None],
    ) -> None:
        """`skipped` gets tasks that were lost while they waited. `changed` is called when one has left."""
        self.limit = limit
        self._run = run
        self._skipped = skipped
        self._changed = changed
        self._waiting: deque[HeldTask] = deque()
        self._running: dict[asyncio.Task[None], HeldTask] = {}
        self._mean_s: float | None = None  # What one task takes; None before the first has ended.

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def ahead(self) -> int:
        """How many tasks beyond the slots would begin soon, at the speed of the last ones."""
        if self._mean_s is None:
            return 0
        ahead = min(AHEAD_MAX, int(self.limit * _AHEAD_S / max(self._mean_s, 1e-6)))
        return 1 << (ahead.bit_length() - 1) if ahead else 0  # In coarse steps: each one is told.

    def tasks(self) -> list[asyncio.Task[None]]:
        """Those that run."""
        return list(self._running)

    def add(self, held: HeldTask) -> None:
        held.waits_since = time.monotonic()
        self._waiting.append(held)
        self.fill()

    def take_waiting(self, *, longer_than_s: float = 0.0) -> list[HeldTask]:
        """Give up tasks that have waited so long, the first ones first."""
        before = time.monotonic() - longer_than_s
        taken: list[HeldTask] = []
        while self._waiting and self._waiting[0].waits_since <= before:
            taken.append(self._waiting.popleft())
        if taken and longer_than_s and self._mean_s is not None:
            # What runs now takes longer, nobody knows how much. With many slots one step would not do.
            self._mean_s = max(2 * self._mean_s, longer_than_s)
        return taken

    def fill(self) -> None:
        """Begin what there is a slot for."""
        while self._waiting and len(self._running) < self.limit:
            held = self._waiting.popleft()
            if held.is_lost:
                self._skipped(held)  # It runs elsewhere by now.
                self._changed()
                continue
            held.is_started = True
            task = asyncio.get_running_loop().create_task(self._work(held), name=f"task {held.id}")
            self._running[task] = held
            task.add_done_callback(self._ended)

    async def _work(self, held: HeldTask) -> None:
        began = time.perf_counter()
        await self._run(held)
        took_s = time.perf_counter() - began
        mean_s = self._mean_s
        self._mean_s = took_s if mean_s is None else mean_s + _SMOOTHING * (took_s - mean_s)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self.fill()
        self._changed()
