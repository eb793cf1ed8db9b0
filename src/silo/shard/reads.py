"""Reads under way in one shard, each owned by the shard and not by whoever wanted it."""

import asyncio
from collections.abc import Awaitable, Callable


class Reads:
    """At most one read of each name at a time. A caller that goes away cancels only its own wait."""

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._running: dict[object, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def running(self, name: object) -> asyncio.Task[None] | None:
        return self._running.get(name)

    def start(self, name: object, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """The read of this name, begun now unless it is under way."""
        task = self._running.get(name)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._run(name, work), name=f"read {name}")
            self._running[name] = task
        return task

    async def once(self, name: object, work: Callable[[], Awaitable[None]]) -> None:
        """Wait for the read of this name. A failure stops the shard, and is not told here."""
        await asyncio.wait({self.start(name, work)})

    async def _run(self, name: object, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as error:  # The outermost edge of this loop: the shard stops with the reason.
            self._failed(error)
        finally:
            del self._running[name]

    def stop(self) -> None:
        for task in self._running.values():
            task.cancel()
