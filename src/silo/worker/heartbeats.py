"""Keeps the leases of a worker's tasks alive."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from silo.client.client import SiloGRPCClient
from silo.client.errors import SiloDeadlineExceededError
from silo.worker.errors import is_being_cancelled
from silo.worker.held import HeldTask

_LEASE_MS = 10_000  # If a server does not say.
_SHARE_OF_LEASE = 0.8  # A beat that takes longer is worth nothing.


class Heartbeats:
    """A beat per interval for each held task that needs it; a slow one does not delay the next.

    Args:
        held: the tasks held at the moment.
        within: a block that belongs to the span of a task.
    """

    def __init__(
        self,
        client: SiloGRPCClient,
        *,
        worker_id: str,
        interval_ms: int,
        held: Callable[[], Iterable[HeldTask]],
        within: Callable[[HeldTask], AbstractContextManager[None]],
    ) -> None:
        self._client = client
        self._worker_id = worker_id
        self._interval_s = interval_ms / 1000
        self._held = held
        self._within = within
        self._beater: asyncio.Task[None] | None = None
        self._beats: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._beater = asyncio.get_running_loop().create_task(
            self._beat_forever(), name=f"heartbeats {self._worker_id}"
        )

    def detach(self) -> set[asyncio.Task[None]]:
        """All that is under way, for the caller to end."""
        detached = {*self._beats, *([self._beater] if self._beater else ())}
        self._beater = None
        return detached

    def expect(self, held: HeldTask) -> None:
        """Send the first beat for a task one interval from now."""
        held.beat_at = asyncio.get_running_loop().time() + self._interval_s

    async def _beat_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # A task that comes while this sleeps is due after the end of the sleep.
            now = loop.time()
            due = [held.beat_at for held in self._held() if held.needs_heartbeats]
            await asyncio.sleep(min([now + self._interval_s, *due]) - now)
            now = loop.time()
            for held in list(self._held()):
                if held.needs_heartbeats and held.beat_at <= now:
                    held.beat_at = now + self._interval_s
                    with self._within(held):
                        beat = loop.create_task(self._beat(held), name=f"heartbeat {held.id}")
                    self._beats.add(beat)
                    beat.add_done_callback(self._beats.discard)

    async def _beat(self, held: HeldTask) -> None:
        timeout_s = (held.lease_ms or _LEASE_MS) / 1000 * _SHARE_OF_LEASE
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._client.heartbeat(self._worker_id, held.id, held.shard, held.tenant)
        except TimeoutError:
            held.heartbeat_failed(
                SiloDeadlineExceededError(
                    "DEADLINE_EXCEEDED", f"no answer to a heartbeat within {timeout_s} s"
                )
            )
        except asyncio.CancelledError as error:
            if is_being_cancelled():
                raise
            held.heartbeat_failed(error)
        except Exception as error:  # The outermost edge of a heartbeat: the next one may work.
            held.heartbeat_failed(error)
        else:
            held.heartbeat_answered(answer)
