"""How many handlers run at a time, and who comes next."""

import asyncio
from collections import deque

from silo.worker.context import CancellationSignal


class Places:
    """A number of places. Those for whom none is free wait in line."""

    def __init__(self, count: int) -> None:
        self._free = count  # Above 0 only while nobody waits.
        self._line: deque[asyncio.Future[None]] = deque()

    async def take(self, signal: CancellationSignal) -> None:
        """Return with a place, to be given back.

        Raises:
            CancelledError: the signal was set before there was one, or `turn_away` was called.
        """
        if signal.aborted:
            raise asyncio.CancelledError
        if self._free:
            self._free -= 1
            return
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._line.append(turn)

        async def leave_when_cancelled() -> None:
            await signal.wait()
            turn.cancel()

        leaver = loop.create_task(leave_when_cancelled())
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # The place came, but too late for a caller that is cancelled.
                self.give_back()
            raise
        finally:
            leaver.cancel()  # Not waited for: it holds nothing.

    def give_back(self) -> None:
        """Free a place for the next in line."""
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def turn_away(self) -> None:
        """Cancel all who wait."""
        for turn in self._line:
            turn.cancel()
        self._line.clear()
