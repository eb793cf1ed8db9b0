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
from typing import Generic, TypeVar, cast, overload

import msgspec

from silo.client.client import SiloGRPCClient
from silo.client.errors import (
    DuplicateTaskDeliveryError,
    SiloClientError,
    SiloDeadlineExceededError,
    SiloFailedPreconditionError,
    TaskLeaseLostError,
    TaskNotFoundError,
)
from silo.client.messages import Outcome, report_to_pb
from silo.client.outcome import Cancelled, Failure, Success
from silo.client.types import LeasedTask
from silo.wire.payload import decode
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from silo.worker.context import CancellationSignal, Task, TaskContext

log = logging.getLogger(__name__)

P = TypeVar("P")
M = TypeVar("M", bound=Mapping[str, object])
R = TypeVar("R")

# Two forms of handlers, because from one type with both `Success[R]` and `R` no type checker tells what R is.
OutcomeHandler = Callable[[TaskContext[P, M]], Awaitable[Success[R] | Failure | Cancelled]]
ValueHandler = Callable[[TaskContext[P, M]], Awaitable[R | Failure | Cancelled]]
_LONG_POLL_MS = 1000  # Also how long `stop` waits at an idle server.
_LEASE_MS = 10_000  # If a server does not say.
_HEARTBEAT_SHARE = 0.8  # Of the lease: a beat that takes longer is worth nothing.
_TEARDOWN_S = 1.0


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

    def __init__(self, leased: LeasedTask, *, beat_at: float) -> None:
        self.leased = leased
        self.beat_at = beat_at  # When its next heartbeat is due.
        self.signal = CancellationSignal()
        self.reason: _Reason | None = None
        self.is_started = False
        self.is_settled = False

    @property
    def is_lost(self) -> bool:
        return self.reason is _Reason.LEASE_LOST

    @property
    def needs_heartbeats(self) -> bool:
        """Also when it was cancelled: the handler may take its time to clean up."""
        return not self.is_settled and not self.is_lost

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
        payload_type: payloads are checked against it and made into it, if it is a dataclass or a
            msgspec struct; one that does not fit is a failure. Without it they stay plain values.
        max_concurrent_tasks: handlers that run at a time. No more tasks are asked for than can run.
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
        self._payload_type = payload_type
        self._active: dict[str, _Active] = {}  # By task id; a task whose lease was lost is not in it.
        self._tasks: dict[asyncio.Task[None], _Active] = {}  # Whatever was delivered and has not ended.
        self._slots = asyncio.Semaphore(max_concurrent_tasks)
        self._polled = 0  # Tasks that polls under way may still bring.
        self._pollers: list[asyncio.Task[None]] = []
        self._beats: set[asyncio.Task[None]] = set()
        self._beater: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()  # A slot came free, or the worker stops.
        self._stopping = asyncio.Event()
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
        return sum(active.is_started for active in self._tasks.values())

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
        loop = asyncio.get_running_loop()
        self._pollers = [
            loop.create_task(self._poll_forever(), name=f"poll {self.worker_id}")
            for _ in range(self.concurrent_pollers)
        ]
        self._beater = loop.create_task(self._beat_forever(), name=f"heartbeats {self.worker_id}")

    async def stop(self, timeout: float = 30.0) -> None:
        """Stop polling and wait until all tasks have ended and are reported, `timeout` seconds at most.

        A poll under way is waited for, and what it brings is run. Handlers are not interrupted:
        those that run longer go on without heartbeats, and their outcome counts if their lease
        still stands when they end. On a worker that is not running, or that somebody else
        stops already, it returns at once.
        """
        if not self._is_running:
            return
        self._is_running = False
        self._stopping.set()
        self._changed.set()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        try:
            await asyncio.wait(self._pollers, timeout=timeout)
            me = asyncio.current_task()  # A handler that stops its own worker must not wait for itself.
            if tasks := [task for task in self._tasks if task is not me]:
                await asyncio.wait(tasks, timeout=max(0.0, deadline - loop.time()))
        finally:
            abandoned = [task for task, active in self._tasks.items() if not active.is_started]
            await self._tear_down(*abandoned)

    async def _tear_down(self, *tasks: asyncio.Task[None]) -> None:
        """End these tasks, and polling and heartbeats for good."""
        ending = {*tasks, *self._pollers, *self._beats}
        if self._beater is not None:
            ending.add(self._beater)
        ending.discard(cast("asyncio.Task[None]", asyncio.current_task()))
        self._pollers, self._beater = [], None
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

    async def run(self, *, stop_timeout: float = 30.0) -> None:
        """Work until SIGINT or SIGTERM, then drain. A second signal cancels the handlers that still run.

        Being cancelled counts as the second signal. Only for the main thread of a process.
        """
        self.start()
        loop = asyncio.get_running_loop()
        first, second = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            (second if first.is_set() else first).set()

        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, on_signal)
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
            if not first.is_set() or second.is_set() or _is_being_cancelled():
                self._is_running = False
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
            tasks: list[LeasedTask] = []
            try:
                tasks = await self._poll(wanted)
            except asyncio.CancelledError as error:
                if _is_being_cancelled():
                    raise
                self._report_error(error)
            except Exception as error:  # The outermost edge of a poller, which outlives whatever goes wrong.
                if self._is_running:
                    self._report_error(error)
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
            give_up=self._stopping,
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
        loop = asyncio.get_running_loop()
        active = _Active(leased, beat_at=loop.time() + self.heartbeat_interval_ms / 1000)
        self._active[leased.id] = active
        task = loop.create_task(self._work(active), name=f"task {leased.id}")
        self._tasks[task] = active
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        active = self._tasks.pop(task)
        if self._active.get(active.leased.id) is active:
            del self._active[active.leased.id]
        self._changed.set()

    async def _work(self, active: _Active) -> None:
        async with self._slots:
            if active.is_lost:
                return  # While it waited for a slot: it runs elsewhere by now.
            active.is_started = True
            report = await self._run_handler(active)
            active.is_settled = True
            # From here to the sending of the report nothing is awaited: what was noticed by now counts.
            if active.is_lost:
                return
            if active.reason is not None:
                report = self._encoded(active.leased, Cancelled())
            try:
                await self._report(active.leased, report)
            except asyncio.CancelledError as error:
                if _is_being_cancelled():
                    raise
                self._report_error(error, active.leased.id)
            except Exception as error:  # The outermost edge of a task: the others go on.
                self._report_error(error, active.leased.id)

    async def _run_handler(self, active: _Active) -> pb.ReportOutcomeRequest:
        """Run the handler; whatever it does becomes an outcome that can be sent."""
        try:
            returned = await self._handler(self._context(active))
            if not isinstance(returned, Success | Failure | Cancelled):
                returned = Success(returned)
            return self._encoded(active.leased, returned)
        except asyncio.CancelledError as error:
            if _is_being_cancelled():
                raise  # The worker is torn down; this is not the handler's own doing.
            failure = Failure("HANDLER_ERROR", error_data(error))
        except Exception as error:  # The edge around user code.
            failure = Failure("HANDLER_ERROR", error_data(error))
        return self._encoded(active.leased, failure)

    @staticmethod
    def _encoded(leased: LeasedTask, outcome: Outcome) -> pb.ReportOutcomeRequest:
        return report_to_pb(outcome, task_id=leased.id, tenant=leased.tenant_id)

    def _context(self, active: _Active) -> TaskContext[P, M]:
        leased = active.leased
        payload = decode(leased.payload_bytes, field="payload")
        if self._payload_type is not None:
            payload = msgspec.convert(payload, self._payload_type)
        task = Task(
            id=leased.id,
            job_id=leased.job_id,
            payload=cast(P, payload),
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
            if active.reason is not None or active.is_settled:
                return
            active.cancel(_Reason.CLIENT)
            try:
                await self._client.cancel_job(leased.job_id, leased.tenant_id)
            except SiloClientError as error:
                # Cancelled or over already: either way it ends as cancelled here.
                log.debug("[SiloWorker] Cancel of job %s was refused: %s", leased.job_id, error)

        return TaskContext(task, active.signal, cancel)

    async def _report(self, leased: LeasedTask, report: pb.ReportOutcomeRequest) -> None:
        try:
            await self._client.send_report(report, shard=leased.shard)
        except TaskNotFoundError as error:
            # An earlier try may have been stored although its answer was lost. That is no loss.
            if not error.after_retry or not await self._was_stored(leased):
                raise

    async def _was_stored(self, leased: LeasedTask) -> bool:
        job = await self._client.get_job(leased.job_id, leased.tenant_id, include_attempts=True)
        return any(
            attempt.task_id == leased.id
            and attempt.status != "Running"
            and attempt.error_code != "WORKER_CRASHED"
            for attempt in job.attempts or ()
        )

    # Heartbeats

    async def _beat_forever(self) -> None:
        loop = asyncio.get_running_loop()
        interval_s = self.heartbeat_interval_ms / 1000
        while True:
            # A task that comes while this sleeps is due after the end of the sleep.
            now = loop.time()
            due = [active.beat_at for active in self._active.values() if active.needs_heartbeats]
            await asyncio.sleep(min([now + interval_s, *due]) - now)
            now = loop.time()
            for active in list(self._active.values()):
                if active.needs_heartbeats and active.beat_at <= now:
                    active.beat_at = now + interval_s
                    beat = loop.create_task(self._beat(active), name=f"heartbeat {active.leased.id}")
                    self._beats.add(beat)
                    beat.add_done_callback(self._beats.discard)

    async def _beat(self, active: _Active) -> None:
        leased = active.leased
        timeout_s = (leased.lease_ms or _LEASE_MS) / 1000 * _HEARTBEAT_SHARE
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._client.heartbeat(
                    self.worker_id, leased.id, leased.shard, leased.tenant_id
                )
        except TimeoutError:
            self._beat_failed(
                active,
                SiloDeadlineExceededError(
                    "DEADLINE_EXCEEDED", f"no answer to a heartbeat within {timeout_s} s"
                ),
            )
            return
        except asyncio.CancelledError as error:
            if _is_being_cancelled():
                raise
            self._beat_failed(active, error)
            return
        except Exception as error:  # The outermost edge of a heartbeat: the next one may work.
            self._beat_failed(active, error)
            return
        if answer.cancelled:
            active.cancel(_Reason.SERVER)

    def _beat_failed(self, active: _Active, error: BaseException) -> None:
        if active.is_settled:
            return  # The usual race with the report.
        leased = active.leased
        is_lost = (
            isinstance(error, TaskNotFoundError) and "lease not found" in (error.grpc_message or "")
        ) or (isinstance(error, SiloFailedPreconditionError) and "lease owner mismatch" in error.grpc_message)
        if not is_lost:
            self._report_error(error, leased.id)
        elif not active.is_lost:
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
    try:
        message = str(error)
    except Exception:  # The edge around user code.
        message = "<the text of the exception raised an exception>"
    data = {
        "name": type(error).__name__,
        "message": message,
        "stack": "".join(traceback.format_exception(error)),
    }
    code = getattr(error, "code", None)
    if isinstance(code, str):
        data["code"] = code
    # Lone surrogates have no UTF-8 form.
    return {key: text.encode(errors="backslashreplace").decode() for key, text in data.items()}


def _is_being_cancelled() -> bool:
    """Whether somebody cancelled this task, so that a CancelledError must pass through."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
