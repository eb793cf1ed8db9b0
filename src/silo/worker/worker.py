"""SiloWorker: lease tasks of a task group, run a handler on each, keep leases alive, report outcomes."""

import asyncio
import enum
import logging
import signal
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from silo.client.client import SiloGRPCClient
from silo.client.errors import (
    DuplicateTaskDeliveryError,
    SiloClientError,
    SiloFailedPreconditionError,
    TaskLeaseLostError,
    TaskNotFoundError,
)
from silo.client.outcome import Cancelled, Failure, Success
from silo.client.types import LeasedTask
from silo.wire.payload import PayloadError, decode, encode
from silo.worker.context import CancellationSignal, Task, TaskContext

log = logging.getLogger(__name__)

P = TypeVar("P")
M = TypeVar("M", bound=Mapping[str, str])
R = TypeVar("R")

Handler = Callable[[TaskContext[P, M]], Awaitable[Success[R] | Failure | Cancelled | R]]
_LONG_POLL_MS = 1000  # Also the longest that `stop` waits for a poll under way.
_HEARTBEAT_TIMEOUT_S = 8.0  # Below the lease length: a beat that takes longer is worth nothing.


@dataclass(frozen=True)
class ErrorContext:
    """What an error was about."""

    task_id: str | None = None


@dataclass
class WorkerMetrics:
    """Counts since the worker was made."""

    polls: int = 0
    empty_polls: int = 0
    tasks_returned: int = 0
    duplicate_task_deliveries: int = 0


class _Reason(enum.Enum):
    SERVER = "server"
    CLIENT = "client"
    LEASE_LOST = "lease-lost"


class _Active:
    """One task from delivery until its outcome is reported."""

    def __init__(self, leased: LeasedTask) -> None:
        self.leased = leased
        self.signal = CancellationSignal()
        self.reason: _Reason | None = None
        self.is_settled = False

    def cancel(self, reason: _Reason) -> None:
        if self.reason is None or reason is _Reason.LEASE_LOST:
            self.reason = reason
        self.signal.abort()


class SiloWorker(Generic[P, M, R]):
    """Runs `handler` on the tasks of one task group, several at a time.

    The handler is `async def handler(ctx)`. It returns `Success(result)`, `Failure(code, data)`,
    `Cancelled()` or a plain value, which is a success; an exception is a failure `HANDLER_ERROR`.

    Use `async with worker:`, or `start()` and `stop()`, or `await worker.run()` in a process of its own.

    Args:
        client: may be shared by several workers; it is not closed.
        worker_id: unique among running workers; leases belong to it.
        task_group: the only one it sees.
        tenant: accepted for symmetry; a worker serves all tenants of its group.
        max_concurrent_tasks: handlers that run at a time. No more tasks are leased than can run.
        concurrent_pollers: polls in flight at a time.
        tasks_per_poll: upper bound of one poll; half of `max_concurrent_tasks` by default.
        poll_interval_ms: pause between polls at a server that cannot wait for work.
        heartbeat_interval_ms: must stay below the lease length of 10 000.
        on_error: called with each error and its context; logs by default.
    """

    def __init__(
        self,
        *,
        client: SiloGRPCClient,
        worker_id: str,
        task_group: str,
        handler: Handler[P, M, R],
        tenant: str | None = None,
        max_concurrent_tasks: int = 10,
        concurrent_pollers: int = 1,
        tasks_per_poll: int | None = None,
        poll_interval_ms: int = 1000,
        heartbeat_interval_ms: int = 5000,
        on_error: Callable[[BaseException, ErrorContext], None] | None = None,
    ) -> None:
        if max_concurrent_tasks < 1 or concurrent_pollers < 1:
            raise ValueError("max_concurrent_tasks and concurrent_pollers must be at least 1")
        self._client = client
        self._handler = handler
        self._on_error = on_error
        self.worker_id = worker_id
        self.task_group = task_group
        self.tenant = tenant
        self.max_concurrent_tasks = max_concurrent_tasks
        self.concurrent_pollers = concurrent_pollers
        self.tasks_per_poll = tasks_per_poll or -(-max_concurrent_tasks // 2)
        self.poll_interval_ms = poll_interval_ms
        self.heartbeat_interval_ms = heartbeat_interval_ms
        self.metrics = WorkerMetrics()
        self._active: dict[str, _Active] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._polled = 0  # Tasks that polls under way may still bring.
        self._pollers: list[asyncio.Task[None]] = []
        self._beats: set[asyncio.Task[None]] = set()
        self._beater: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()  # A slot came free, or the worker stops.
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
        return len(self._running)

    @property
    def available_task_slots(self) -> int:
        return self.max_concurrent_tasks - len(self._running)

    # Life cycle

    def start(self) -> None:
        """Begin to poll. On a running worker it does nothing."""
        if self._is_running:
            return
        self._is_running = True
        self._changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._pollers = [
            loop.create_task(self._poll_forever(), name=f"poll {self.worker_id}")
            for _ in range(self.concurrent_pollers)
        ]
        self._beater = loop.create_task(self._beat_forever(), name=f"heartbeats {self.worker_id}")

    async def stop(self, timeout: float = 30.0) -> None:
        """Stop polling and wait until all tasks have ended and are reported, `timeout` seconds at most.

        Handlers are not interrupted. Those that run longer go on without heartbeats, and
        their outcome counts if their lease still stands when they end.
        """
        if not self._is_running:
            return
        self._is_running = False
        self._changed.set()
        await asyncio.wait(self._pollers)
        if self._running:
            await asyncio.wait(set(self._running), timeout=timeout)
        await self._end_heartbeats()

    async def _end_heartbeats(self) -> None:
        if self._beater is not None:
            self._beater.cancel()
            await asyncio.wait({self._beater, *self._beats}, timeout=_HEARTBEAT_TIMEOUT_S)
            self._beater = None

    async def __aenter__(self) -> "SiloWorker[P, M, R]":
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def run(self, *, stop_timeout: float = 30.0) -> None:
        """Work until SIGINT or SIGTERM, then drain. A second signal ends it at once."""
        loop = asyncio.get_running_loop()
        first, second = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            (second if first.is_set() else first).set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        try:
            self.start()
            await first.wait()
            stopping = loop.create_task(self.stop(stop_timeout))
            impatient = loop.create_task(second.wait())
            await asyncio.wait({stopping, impatient}, return_when=asyncio.FIRST_COMPLETED)
            for task in (stopping, impatient, *(self._running if second.is_set() else ())):
                task.cancel()
            await asyncio.wait({stopping, impatient})
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

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
            try:
                tasks = await self._poll(wanted)
            except SiloClientError as error:
                if self._is_running:
                    self._report_error(error)
                tasks = []
            finally:
                self._polled -= wanted
            for leased in tasks:
                self._deliver(leased)
            waited_ms = (time.monotonic() - started) * 1000
            if not tasks and waited_ms < _LONG_POLL_MS / 2:
                await self._pause(self.poll_interval_ms / 1000)  # This server does not wait for work.

    async def _poll(self, wanted: int) -> list[LeasedTask]:
        index = self._server_index
        self._server_index += 1
        tasks = await self._client.lease_tasks(
            worker_id=self.worker_id,
            max_tasks=wanted,
            task_group=self.task_group,
            server_index=index,
            wait_ms=_LONG_POLL_MS,
        )
        self.metrics.polls += 1
        self.metrics.empty_polls += not tasks
        self.metrics.tasks_returned += len(tasks)
        return tasks

    async def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._is_running and (left := deadline - time.monotonic()) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()

    # One task

    def _deliver(self, leased: LeasedTask) -> None:
        if leased.id in self._active:
            self.metrics.duplicate_task_deliveries += 1
            self._report_error(DuplicateTaskDeliveryError(leased.id, leased.job_id), leased.id)
            return
        active = self._active[leased.id] = _Active(leased)
        task = asyncio.get_running_loop().create_task(self._work(active), name=f"task {leased.id}")
        self._running.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._changed.set()

    async def _work(self, active: _Active) -> None:
        leased = active.leased
        try:
            outcome = await self._outcome(active)
            active.is_settled = True
            if active.reason is _Reason.LEASE_LOST:
                return
            if active.reason is not None:
                outcome = Cancelled()
            await self._report(leased, outcome)
        except SiloClientError as error:
            self._report_error(error, leased.id)
        finally:
            if self._active.get(leased.id) is active:
                del self._active[leased.id]

    async def _outcome(self, active: _Active) -> Success[Any] | Failure | Cancelled:
        """Run the handler; whatever it does becomes an outcome."""
        try:
            context = self._context(active)
            returned = await self._handler(context)
            match returned:
                case Success(result=result):
                    encode(result)
                    return returned
                case Failure(data=data):
                    if not isinstance(data, bytes):
                        encode(data)
                    return returned
                case Cancelled():
                    return returned
                case _:
                    encode(returned)
                    return Success(returned)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # We are being torn down, not the handler's own doing.
            return Failure("HANDLER_ERROR", error_data(error))
        except Exception as error:  # The edge around user code.
            return Failure("HANDLER_ERROR", error_data(error))

    def _context(self, active: _Active) -> TaskContext[P, M]:
        leased = active.leased
        task = Task(
            id=leased.id,
            job_id=leased.job_id,
            payload=cast(P, decode(leased.payload_bytes, field="payload")),
            metadata=cast(M, leased.metadata),
            attempt_number=leased.attempt_number,
            relative_attempt_number=leased.relative_attempt_number,
            is_last_attempt=leased.is_last_attempt,
            priority=leased.priority,
            task_group=leased.task_group,
            tenant_id=leased.tenant_id,
            shard=leased.shard,
            lease_ms=leased.lease_ms,
        )

        async def cancel() -> None:
            if active.reason is None:
                active.cancel(_Reason.CLIENT)
                with suppress(SiloClientError):  # It may be cancelled or over already.
                    await self._client.cancel_job(leased.job_id, leased.tenant_id)

        return TaskContext(task, active.signal, cancel)

    async def _report(self, leased: LeasedTask, outcome: Success[Any] | Failure | Cancelled) -> None:
        await self._client.report_outcome(
            task_id=leased.id, shard=leased.shard, outcome=outcome, tenant=leased.tenant_id
        )

    # Heartbeats

    async def _beat_forever(self) -> None:
        while True:
            await asyncio.sleep(self.heartbeat_interval_ms / 1000)
            for active in list(self._active.values()):
                if not active.is_settled and active.reason is not _Reason.LEASE_LOST:
                    beat = asyncio.get_running_loop().create_task(self._beat(active))
                    self._beats.add(beat)
                    beat.add_done_callback(self._beats.discard)

    async def _beat(self, active: _Active) -> None:
        leased = active.leased
        try:
            async with asyncio.timeout(_HEARTBEAT_TIMEOUT_S):
                answer = await self._client.heartbeat(
                    self.worker_id, leased.id, leased.shard, leased.tenant_id
                )
        except (SiloClientError, TimeoutError) as error:
            if not active.is_settled:
                self._beat_failed(active, error)
            return
        if answer.cancelled:
            active.cancel(_Reason.SERVER)

    def _beat_failed(self, active: _Active, error: Exception) -> None:
        leased = active.leased
        is_lost = (
            isinstance(error, TaskNotFoundError) and "lease not found" in (error.grpc_message or "")
        ) or (isinstance(error, SiloFailedPreconditionError) and "lease owner mismatch" in error.grpc_message)
        if not is_lost:
            self._report_error(error, leased.id)
        elif active.reason is not _Reason.LEASE_LOST:
            active.cancel(_Reason.LEASE_LOST)
            if self._active.get(leased.id) is active:
                del self._active[leased.id]
            self._report_error(TaskLeaseLostError(leased.id, leased.job_id, error), leased.id)

    def _report_error(self, error: BaseException, task_id: str | None = None) -> None:
        if self._on_error is None:
            log.error("[SiloWorker] Error%s: %s", f" (task {task_id})" if task_id else "", error)
            return
        try:
            self._on_error(error, ErrorContext(task_id))
        except Exception:  # The edge around user code: it must not stop the worker.
            log.exception("on_error raised")


def error_data(error: BaseException) -> dict[str, object]:
    """What is stored of an exception: its name, message, stack, and code if it has a text of that name."""
    data: dict[str, object] = {
        "name": type(error).__name__,
        "message": str(error),
        "stack": "".join(traceback.format_exception(error)),
    }
    code = getattr(error, "code", None)
    if isinstance(code, str):
        data["code"] = code
    try:
        encode(data)
    except PayloadError:
        return {"name": type(error).__name__, "message": repr(error)}
    return data
