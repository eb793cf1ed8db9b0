"""Tasks by polls, for servers that only speak `silo.v1`: leases, heartbeats and reports one by one."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from silo.client.client import SiloGRPCClient
from silo.client.types import LeasedTasks
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2 as v1
from silo.worker.errors import is_being_cancelled
from silo.worker.heartbeats import Heartbeats
from silo.worker.held import HeldTask
from silo.worker.reports import report_to_v1
from silo.worker.source import Desk

_LONG_POLL_MS = 1000  # How long a server of ours may wait for work; also how long `stop` waits for it.
_TEARDOWN_S = 1.0


class Polling:
    """A worker's pollers and heartbeats. A `Source`."""

    can_hand_back = False

    def __init__(
        self,
        client: SiloGRPCClient,
        desk: Desk,
        *,
        worker_id: str,
        task_groups: Sequence[str],
        pollers: int,
        tasks_per_poll: int,
        poll_interval_ms: int,
        heartbeat_interval_ms: int,
        polled: Callable[[int], None],
    ) -> None:
        """`polled` is called with the number of tasks that each poll brought."""
        self._client = client
        self._desk = desk
        self._worker_id = worker_id
        self._task_groups = task_groups
        self._pollers = pollers
        self._tasks_per_poll = tasks_per_poll
        self._poll_interval_ms = poll_interval_ms
        self._count_poll = polled
        self._expected = 0  # Tasks that polls under way may still bring.
        self._server_index = 0
        self._changed = asyncio.Event()  # The desk has more room, or the worker stops.
        self._stopping = asyncio.Event()
        self._polling: list[asyncio.Task[None]] = []
        self._heartbeats = Heartbeats(
            client, worker_id=worker_id, interval_ms=heartbeat_interval_ms, held=desk.held, within=desk.within
        )

    async def run(self) -> None:
        """Poll until stopped, and beat until closed."""
        loop = asyncio.get_running_loop()
        self._polling = [
            loop.create_task(self._poll_forever(group), name=f"poll {group}")
            for group in self._task_groups
            for _ in range(self._pollers)
        ]
        for held in self._desk.held():
            self._heartbeats.expect(held)  # It came from a server that pushed, and does not any more.
        self._heartbeats.start()
        try:
            await asyncio.wait(self._polling)
            await loop.create_future()  # The heartbeats go on.
        finally:
            ending = {*self._polling, *self._heartbeats.detach()}
            for task in ending:
                task.cancel()
            await asyncio.wait(ending, timeout=_TEARDOWN_S)

    def changed(self) -> None:
        self._changed.set()

    async def stop(self) -> None:
        """Wait for polls under way: what they bring is ours."""
        self._stopping.set()
        self._changed.set()
        if self._polling:
            await asyncio.wait(self._polling)

    async def close(self, timeout_s: float) -> None:
        """Nothing waits here: whoever reported has its answer."""

    async def report(self, held: HeldTask, report: pb.Report) -> None:
        request = report_to_v1(report)
        try:
            if isinstance(request, v1.ReportOutcomeRequest):
                await self._client.send_report(request, shard=held.shard)
            elif request is not None:
                await self._client.send_refresh_report(request, shard=held.shard)
        finally:
            self._desk.forget(held)

    async def _poll_forever(self, task_group: str) -> None:
        while not self._stopping.is_set():
            wanted = min(self._desk.free - self._expected, self._tasks_per_poll)
            if wanted < 1:
                self._changed.clear()
                await self._changed.wait()
                continue
            self._expected += wanted
            started = time.monotonic()
            leased = LeasedTasks()
            try:
                leased = await self._poll(task_group, wanted)
            except asyncio.CancelledError as error:
                if is_being_cancelled():
                    raise
                self._desk.error(error)
            except Exception as error:  # The outermost edge of a poller, which outlives whatever goes wrong.
                if not self._stopping.is_set():
                    self._desk.error(error)
            finally:
                self._expected -= wanted
            delivered = self._desk.deliver(leased.tasks, leased.refresh_tasks)
            for held in delivered:
                self._heartbeats.expect(held)
            waited_ms = (time.monotonic() - started) * 1000
            if not (delivered or leased.tasks) and waited_ms < _LONG_POLL_MS / 2:
                await self._pause(self._poll_interval_ms / 1000)  # This server does not wait for work.

    async def _poll(self, task_group: str, wanted: int) -> LeasedTasks:
        index = self._server_index
        self._server_index += 1
        leased = await self._client.lease_tasks(
            worker_id=self._worker_id,
            max_tasks=wanted,
            task_group=task_group,
            server_index=index,
            wait_ms=_LONG_POLL_MS,
            give_up=self._stopping,
        )
        self._count_poll(len(leased.tasks) + len(leased.refresh_tasks))
        return leased

    async def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._stopping.is_set() and (left := deadline - time.monotonic()) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()
