"""SiloWorker: lease tasks of a task group, run a handler on each, keep leases alive, report outcomes."""

import asyncio
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar, cast, overload

from silo.client.client import SiloGRPCClient
from silo.client.errors import DuplicateTaskDeliveryError, SiloClientError
from silo.client.types import LeasedTasks
from silo.worker.context import CancellationSignal
from silo.worker.errors import ErrorContext, ErrorReports, is_being_cancelled
from silo.worker.heartbeats import Heartbeats
from silo.worker.held import HeldTask
from silo.worker.jobs import HeldJobTask, OutcomeHandler, ValueHandler
from silo.worker.refresh import HeldRefreshTask, RefreshHandler, no_refresh_handler

P = TypeVar("P")
M = TypeVar("M", bound=Mapping[str, object])
R = TypeVar("R")

_LONG_POLL_MS = 1000  # Also how long `stop` waits at an idle server.
_TEARDOWN_S = 1.0


@dataclass
class WorkerMetrics:
    """Counts since the worker was made."""

    polls: int = 0
    empty_polls: int = 0
    tasks_returned: int = 0
    duplicate_task_deliveries: int = 0


class SiloWorker(Generic[P, M, R]):
    """Runs `handler` on the tasks of one task group, several at a time.

    The handler is `async def handler(ctx)`. It returns `Success(result)`, `Failure(code, data)`,
    `Cancelled()` or a plain value, which is a success; an exception is a failure `HANDLER_ERROR`.

    Use `async with worker:`, or `start()` and `stop()`, or `await worker.run()` in a process of its own.

    Args:
        client: may be shared by several workers; it is not closed.
        worker_id: unique among running workers; leases belong to it.
        task_group: the only one it sees.
        refresh_handler: `async def refresh(ctx)` returns the new maximum of a floating limit. An exception
            is reported as `REFRESH_HANDLER_ERROR`. Without it refresh tasks are left to other workers.
        tenant: accepted for symmetry; a worker serves all tenants of its group.
        payload_type: payloads are checked against it and made into it, if it is a dataclass or a
            msgspec struct; one that does not fit is a failure. Without it they stay plain values.
        max_concurrent_tasks: handlers, of both kinds, that run at a time. No more tasks are asked for
            than can run.
        concurrent_pollers: polls in flight at a time.
        tasks_per_poll: upper bound of one poll; half of `max_concurrent_tasks` by default.
        poll_interval_ms: pause between polls at a server that cannot wait for work.
        heartbeat_interval_ms: must stay below the lease length of 10 000.
        on_error: called with each error and its context; logs by default.
    """

    @overload
    def __init__(
        self,
        *,
        client: SiloGRPCClient,
        worker_id: str,
        task_group: str,
        handler: OutcomeHandler[P, M, R],
        refresh_handler: RefreshHandler | None = ...,
        tenant: str | None = ...,
        payload_type: type[P] | None = ...,
        max_concurrent_tasks: int = ...,
        concurrent_pollers: int = ...,
        tasks_per_poll: int | None = ...,
        poll_interval_ms: int = ...,
        heartbeat_interval_ms: int = ...,
        on_error: Callable[[BaseException, ErrorContext], None] | None = ...,
    ) -> None: ...

    @overload
    def __init__(
        self,
        *,
        client: SiloGRPCClient,
        worker_id: str,
        task_group: str,
        handler: ValueHandler[P, M, R],
        refresh_handler: RefreshHandler | None = ...,
        tenant: str | None = ...,
        payload_type: type[P] | None = ...,
        max_concurrent_tasks: int = ...,
        concurrent_pollers: int = ...,
        tasks_per_poll: int | None = ...,
        poll_interval_ms: int = ...,
        heartbeat_interval_ms: int = ...,
        on_error: Callable[[BaseException, ErrorContext], None] | None = ...,
    ) -> None: ...

    def __init__(
        self,
        *,
        client: SiloGRPCClient,
        worker_id: str,
        task_group: str,
        handler: OutcomeHandler[P, M, R] | ValueHandler[P, M, R],
        refresh_handler: RefreshHandler | None = None,
        tenant: str | None = None,
        payload_type: type[P] | None = None,
        max_concurrent_tasks: int = 10,
        concurrent_pollers: int = 1,
        tasks_per_poll: int | None = None,
        poll_interval_ms: int = 1000,
        heartbeat_interval_ms: int = 5000,
        on_error: Callable[[BaseException, ErrorContext], None] | None = None,
    ) -> None:
        for name, value in (
            ("max_concurrent_tasks", max_concurrent_tasks),
            ("concurrent_pollers", concurrent_pollers),
            ("tasks_per_poll", 1 if tasks_per_poll is None else tasks_per_poll),
            ("poll_interval_ms", poll_interval_ms),
            ("heartbeat_interval_ms", heartbeat_interval_ms),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self._client = client
        self._handler = handler
        self._refresh_handler = refresh_handler
        self._report_error = ErrorReports(on_error)
        self.worker_id = worker_id
        self.task_group = task_group
        self.tenant = tenant
        self.max_concurrent_tasks = max_concurrent_tasks
        self.concurrent_pollers = concurrent_pollers
        self.tasks_per_poll = tasks_per_poll or -(-max_concurrent_tasks // 2)
        self.poll_interval_ms = poll_interval_ms
        self.heartbeat_interval_ms = heartbeat_interval_ms
        self.metrics = WorkerMetrics()
        self._payload_type = payload_type
        self._held: dict[str, HeldTask] = {}  # By task id; of two with one id, the later one.
        self._tasks: dict[asyncio.Task[None], HeldTask] = {}  # Whatever was delivered and has not ended.
        self._slots = asyncio.Semaphore(max_concurrent_tasks)
        self._polled = 0  # Tasks that polls under way may still bring.
        self._pollers: list[asyncio.Task[None]] = []
        self._heartbeats = Heartbeats(
            client, worker_id=worker_id, interval_ms=heartbeat_interval_ms, held=self._held.values
        )
        self._changed = asyncio.Event()  # A slot came free, or the worker stops.
        self._stopping = asyncio.Event()
        self._stop_signal = CancellationSignal()  # The same for handlers of refresh tasks.
        self._is_running = False
        self._server_index = 0

    def __repr__(self) -> str:
        return f"SiloWorker({self.worker_id!r}, {self.task_group!r}, {self.active_tasks} active)"

    @property
    def is_running(self) -> bool:
        """Between `start` and `stop`."""
        return self._is_running

    @property
    def active_tasks(self) -> int:
        """Tasks whose handler runs or whose outcome is being reported."""
        return sum(held.is_started for held in self._tasks.values())

    @property
    def queued_tasks(self) -> int:
        """Tasks delivered that wait for a slot. There are none unless a server sends more than asked for."""
        return len(self._tasks) - self.active_tasks

    @property
    def available_task_slots(self) -> int:
        """How many more tasks could start now; below zero if too many were delivered."""
        return self.max_concurrent_tasks - len(self._tasks)

    # Life cycle

    def start(self) -> None:
        """Begin to poll. On a running worker it does nothing.

        Raises:
            RuntimeError: it is still stopping; wait for `stop` first.
        """
        if self._is_running:
            return
        if self._pollers:
            raise RuntimeError("the worker is still stopping")
        self._is_running = True
        self._changed, self._stopping = asyncio.Event(), asyncio.Event()
        self._stop_signal = CancellationSignal()
        loop = asyncio.get_running_loop()
        self._pollers = [
            loop.create_task(self._poll_forever(), name=f"poll {self.worker_id}")
            for _ in range(self.concurrent_pollers)
        ]
        self._heartbeats.start()

    async def stop(self, timeout: float = 30.0) -> None:
        """Stop polling and wait until all tasks have ended and are reported, `timeout` seconds at most.

        A poll under way is waited for, and what it brings is run. Handlers are not interrupted:
        those that run longer go on without heartbeats, and their outcome counts if their lease
        still stands when they end. On a worker that is not running, or that somebody else
        stops already, it returns at once.
        """
        if not self._is_running:
            return
        self._begin_to_stop()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        try:
            await asyncio.wait(self._pollers, timeout=timeout)
            me = asyncio.current_task()  # A handler that stops its own worker must not wait for itself.
            if tasks := [task for task in self._tasks if task is not me]:
                await asyncio.wait(tasks, timeout=max(0.0, deadline - loop.time()))
        finally:
            abandoned = [task for task, held in self._tasks.items() if not held.is_started]
            await self._tear_down(*abandoned)

    def _begin_to_stop(self) -> None:
        self._is_running = False
        self._stopping.set()
        self._stop_signal.abort()
        self._changed.set()

    async def _tear_down(self, *tasks: asyncio.Task[None]) -> None:
        """End these tasks, and polling and heartbeats for good."""
        ending = {*tasks, *self._pollers, *self._heartbeats.detach()}
        ending.discard(cast("asyncio.Task[None]", asyncio.current_task()))
        self._pollers = []
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending, timeout=_TEARDOWN_S)

    async def __aenter__(self) -> "SiloWorker[P, M, R]":
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def run(self, *, stop_timeout: float = 30.0, on_ready: Callable[[], None] | None = None) -> None:
        """Work until SIGINT or SIGTERM, then drain. A second signal cancels the handlers that still run.

        `on_ready` is called once signals are caught. Being cancelled counts as the second signal.
        Only for the main thread of a process.
        """
        self.start()
        loop = asyncio.get_running_loop()
        first, second = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            (second if first.is_set() else first).set()

        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, on_signal)
            if on_ready is not None:
                on_ready()
            await first.wait()
            stopping = loop.create_task(self.stop(stop_timeout))
            impatient = loop.create_task(second.wait())
            try:
                await asyncio.wait({stopping, impatient}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopping.cancel()
                impatient.cancel()
                await asyncio.wait({stopping, impatient})
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            if not first.is_set() or second.is_set() or is_being_cancelled():
                self._begin_to_stop()
                await self._tear_down(*self._tasks)

    # Polling

    async def _poll_forever(self) -> None:
        while self._is_running:
            wanted = min(self.available_task_slots - self._polled, self.tasks_per_poll)
            if wanted < 1:
                self._changed.clear()
                await self._changed.wait()
                continue
            self._polled += wanted
            started = time.monotonic()
            leased = LeasedTasks()
            try:
                leased = await self._poll(wanted)
            except asyncio.CancelledError as error:
                if is_being_cancelled():
                    raise
                self._report_error(error)
            except Exception as error:  # The outermost edge of a poller, which outlives whatever goes wrong.
                if self._is_running:
                    self._report_error(error)
            finally:
                self._polled -= wanted
            is_delivered = self._deliver(leased)
            waited_ms = (time.monotonic() - started) * 1000
            if not is_delivered and waited_ms < _LONG_POLL_MS / 2:
                await self._pause(self.poll_interval_ms / 1000)  # This server does not wait for work.

    async def _poll(self, wanted: int) -> LeasedTasks:
        index = self._server_index
        self._server_index += 1
        leased = await self._client.lease_tasks(
            worker_id=self.worker_id,
            max_tasks=wanted,
            task_group=self.task_group,
            server_index=index,
            wait_ms=_LONG_POLL_MS,
            give_up=self._stopping,
        )
        self.metrics.polls += 1
        count = len(leased.tasks) + len(leased.refresh_tasks)
        self.metrics.empty_polls += not count
        self.metrics.tasks_returned += count
        return leased

    async def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._is_running and (left := deadline - time.monotonic()) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()

    # One task

    def _deliver(self, leased: LeasedTasks) -> bool:
        """Queue what a poll brought; whether that was anything."""
        for task in leased.tasks:
            self._hold(
                HeldJobTask(
                    task,
                    client=self._client,
                    handler=self._handler,
                    payload_type=self._payload_type,
                    report_error=self._report_error,
                )
            )
        if not leased.refresh_tasks:
            return bool(leased.tasks)
        if self._refresh_handler is None:
            # Their leases run out and they come again, here or at a worker that can run them.
            if self._is_running:
                self._report_error(SiloClientError(no_refresh_handler(len(leased.refresh_tasks))))
            return bool(leased.tasks)
        for refresh in leased.refresh_tasks:
            self._hold(
                HeldRefreshTask(
                    refresh,
                    client=self._client,
                    handler=self._refresh_handler,
                    worker_id=self.worker_id,
                    stop_signal=self._stop_signal,
                    report_error=self._report_error,
                )
            )
        return True

    def _hold(self, held: HeldTask) -> None:
        earlier = self._held.get(held.id)
        if earlier is not None and earlier.bars_redelivery:
            self.metrics.duplicate_task_deliveries += 1
            self._report_error(DuplicateTaskDeliveryError(held.id, held.job_id), held.id)
            return
        self._heartbeats.expect(held)
        self._held[held.id] = held
        task = asyncio.get_running_loop().create_task(self._work(held), name=f"task {held.id}")
        self._tasks[task] = held
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        held = self._tasks.pop(task)
        if self._held.get(held.id) is held:
            del self._held[held.id]
        self._changed.set()

    async def _work(self, held: HeldTask) -> None:
        async with self._slots:
            if held.is_lost:
                return  # While it waited for a slot: it runs elsewhere by now.
            held.is_started = True
            try:
                await held.run()
            except asyncio.CancelledError as error:
                if is_being_cancelled():
                    raise
                self._report_error(error, held.id)
            except Exception as error:  # The outermost edge of a task: the others go on.
                self._report_error(error, held.id)
