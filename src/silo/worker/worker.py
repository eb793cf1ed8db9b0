"""SiloWorker: run a handler on the tasks of a task group, several at a time, and report what it did."""

import asyncio
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    Required,
    TypedDict,
    TypeVar,
    Unpack,
    overload,
)

from silo.client.client import SiloGRPCClient
from silo.client.errors import DuplicateTaskDeliveryError, SiloClientError
from silo.client.types import LeasedTask, RefreshTask
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb
from silo.worker.context import CancellationSignal, TaskContext
from silo.worker.errors import ErrorContext, ErrorReports, is_being_cancelled
from silo.worker.execution.choice import execution_for
from silo.worker.execution.execution import Execution
from silo.worker.execution.main_module import refuse_during_import
from silo.worker.held import HeldTask
from silo.worker.jobs import BlockingHandler, Handling, HeldJobTask, OutcomeHandler, ValueHandler
from silo.worker.middleware import Middleware, compose
from silo.worker.polling import Polling
from silo.worker.refresh import NO_REFRESH_HANDLER, HeldRefreshTask, RefreshHandler, no_refresh_handler
from silo.worker.reports import handed_back, refresh_failed
from silo.worker.slots import Slots
from silo.worker.source import Source
from silo.worker.streaming import ExtensionMissing, Streams
from silo.worker.tracing import TaskSpan, Telemetry, within

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter

P = TypeVar("P")
M = TypeVar("M", bound=Mapping[str, object])
R = TypeVar("R")

_WAIT_AHEAD_S = 1.0  # A task that waited so long for a slot is handed back: others may be idle.
_LOOK_S = 0.25
_TEARDOWN_S = 1.0
_LATE_S = 5.0  # For reports that are on their way when everything else has ended.


@dataclass
class WorkerMetrics:
    """Counts since the worker was made."""

    polls: int = 0  # Only of servers that do not push.
    empty_polls: int = 0
    tasks_returned: int = 0  # Pushed or polled.
    duplicate_task_deliveries: int = 0


class WorkerOptions(TypedDict, total=False):
    """What a worker takes beside its handler; see `SiloWorker`."""

    client: Required[SiloGRPCClient]
    worker_id: Required[str]
    task_group: Required[str | Sequence[str]]
    refresh_handler: RefreshHandler | None
    tenant: str | None
    max_concurrent_tasks: int
    timeout: float | None
    middlewares: Sequence[Middleware[TaskContext[Any, Any]]]
    concurrent_pollers: int
    tasks_per_poll: int | None
    poll_interval_ms: int
    heartbeat_interval_ms: int
    on_error: Callable[[BaseException, ErrorContext], None] | None
    meter: "Meter | None"


class SiloWorker(Generic[P, M, R]):
    """Runs `handler` on the tasks of one or more task groups, several at a time.

    The handler is `async def handler(ctx)`, or `def handler(ctx)` with `execution="thread"` or `"process"`.
    It returns `Success(result)`, `Failure(code, data)`, `Cancelled()` or a plain value, which is a
    success. An exception is a failure `HANDLER_ERROR`, and `raise Retry(after=…)` runs the job again
    without counting it.

    Servers push tasks to it and renew their leases as long as the connection lives, whatever the handlers
    do; with a server that only speaks `silo.v1` it polls and beats instead.

    Use `async with worker:`, or `start()` and `stop()`, or `await worker.run()` in a process of its own.

    Args:
        client: may be shared by several workers; it is not closed.
        worker_id: unique among running workers; leases belong to it.
        task_group: one name or several; it sees no others.
        refresh_handler: `async def refresh(ctx)` returns the new maximum of a floating limit. An exception
            is reported as `REFRESH_HANDLER_ERROR`. A worker without it reports that it has none, and the
            limit is refreshed later.
        tenant: accepted for symmetry; a worker serves all tenants of its group.
        payload_type: payloads are checked against it and made into it, if it is a dataclass or a
            msgspec struct; one that does not fit is a failure. Without it they stay plain values.
        execution: where handlers run: on the event loop, in threads, or in processes of their own.
        interrupts: whether an async handler gets a CancelledError when its job is cancelled. Otherwise
            only `ctx.cancelled` tells it.
        recycle_after_jobs: how many jobs a process runs before a new one takes its place.
        recycle_above_mb: above which resident size a process is replaced after a job.
        cancel_grace_s: how long a process may go on after its job was cancelled.
        max_concurrent_tasks: handlers, of both kinds, that run at a time.
        timeout: seconds that a handler may take; then the attempt fails with `TIMEOUT`.
        middlewares: `async def middleware(context, call_next)` around every handler, the first one outermost.
        concurrent_pollers: polls in flight at a time; like the next three only for servers that do not push.
        tasks_per_poll: upper bound of one poll; half of `max_concurrent_tasks` by default.
        poll_interval_ms: pause between polls at a server that cannot wait for work.
        heartbeat_interval_ms: must stay below the lease length of 10 000.
        on_error: called with each error and its context; logs by default.
        meter: where it counts if OpenTelemetry is installed; the global meter `silo-worker` if left out.

    Raises:
        TypeError: the handler does not fit `execution`, or an option does not.
        ValueError: a number is out of range, or other processes cannot import the handler.
    """

    @overload
    def __init__(
        self,
        *,
        handler: OutcomeHandler[P, M, R],
        payload_type: type[P] | None = ...,
        execution: Literal["async"] = ...,
        interrupts: bool = ...,
        **options: Unpack[WorkerOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        *,
        handler: ValueHandler[P, M, R],
        payload_type: type[P] | None = ...,
        execution: Literal["async"] = ...,
        interrupts: bool = ...,
        **options: Unpack[WorkerOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        *,
        handler: BlockingHandler[P, M, R],
        payload_type: type[P] | None = ...,
        execution: Literal["thread", "process"],
        recycle_after_jobs: int | None = ...,
        recycle_above_mb: int | None = ...,
        cancel_grace_s: float = ...,
        **options: Unpack[WorkerOptions],
    ) -> None: ...

    def __init__(
        self,
        *,
        handler: OutcomeHandler[P, M, R] | ValueHandler[P, M, R] | BlockingHandler[P, M, R],
        payload_type: type[P] | None = None,
        execution: Literal["async", "thread", "process"] = "async",
        interrupts: bool = False,
        recycle_after_jobs: int | None = None,
        recycle_above_mb: int | None = None,
        cancel_grace_s: float = 5.0,
        client: SiloGRPCClient,
        worker_id: str,
        task_group: str | Sequence[str],
        refresh_handler: RefreshHandler | None = None,
        tenant: str | None = None,
        max_concurrent_tasks: int = 10,
        timeout: float | None = None,
        middlewares: Sequence[Middleware[TaskContext[Any, Any]]] = (),
        concurrent_pollers: int = 1,
        tasks_per_poll: int | None = None,
        poll_interval_ms: int = 1000,
        heartbeat_interval_ms: int = 5000,
        on_error: Callable[[BaseException, ErrorContext], None] | None = None,
        meter: "Meter | None" = None,
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
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be positive, not {timeout}")
        self._client = client
        self._execution = execution_for(
            execution,
            handler,
            concurrency=max_concurrent_tasks,
            interrupts=interrupts,
            recycle_after_jobs=recycle_after_jobs,
            recycle_above_mb=recycle_above_mb,
            cancel_grace_s=cancel_grace_s,
        )
        self._handling = _handling(self._execution, handler, payload_type, timeout, middlewares)
        self._refresh_handler = refresh_handler
        self._report_error = ErrorReports(on_error)
        self.worker_id = worker_id
        self.task_group = task_group if isinstance(task_group, str) else ", ".join(task_group)
        self.task_groups = (task_group,) if isinstance(task_group, str) else tuple(dict.fromkeys(task_group))
        self.tenant = tenant
        self.max_concurrent_tasks = max_concurrent_tasks
        self.concurrent_pollers = concurrent_pollers
        self.tasks_per_poll = tasks_per_poll or -(-max_concurrent_tasks // 2)
        self.poll_interval_ms = poll_interval_ms
        self.heartbeat_interval_ms = heartbeat_interval_ms
        self.metrics = WorkerMetrics()
        self._telemetry = Telemetry(
            meter,
            worker_id=worker_id,
            task_group=self.task_group,
            available_slots=lambda: self.available_task_slots,
        )
        self._held: dict[str, HeldTask] = {}  # By task id; of two with one id, the later one.
        self._slots = Slots(
            max_concurrent_tasks, run=self._run_held, skipped=self._forget, changed=self._room_changed
        )
        self._source: Source | None = None
        self._bringing: asyncio.Task[None] | None = None
        self._refused: set[asyncio.Task[None]] = set()
        self._stop_signal = CancellationSignal()  # For handlers of refresh tasks.
        self._is_running = False
        self._is_stopping = False

    def __repr__(self) -> str:
        return f"SiloWorker({self.worker_id!r}, {self.task_group!r}, {self.active_tasks} active)"

    @property
    def is_running(self) -> bool:
        """Between `start` and `stop`."""
        return self._is_running

    @property
    def active_tasks(self) -> int:
        """Tasks that have a slot: their handler runs."""
        return self._slots.running

    @property
    def queued_tasks(self) -> int:
        """Tasks delivered that wait for a slot: those that should begin within a moment."""
        return self._slots.waiting

    @property
    def available_task_slots(self) -> int:
        """How many more tasks could start now; below zero if some wait for a slot."""
        return self._slots.limit - self._slots.running - self._slots.waiting

    # Life cycle

    def start(self) -> None:
        """Begin to take tasks. On a running worker it does nothing.

        Raises:
            RuntimeError: it is still stopping; wait for `stop` first. Or a child process imports this script.
        """
        refuse_during_import()
        if self._is_running:
            return
        if self._is_stopping:
            raise RuntimeError("the worker is still stopping")
        self._is_running = True
        self._telemetry.started()
        self._stop_signal = CancellationSignal()
        self._source = Streams(
            self._client,
            _Desk(self),
            worker_id=self.worker_id,
            task_groups=self.task_groups,
        )
        self._bringing = asyncio.get_running_loop().create_task(
            self._bring(self._source), name=f"tasks of {self.worker_id}"
        )

    async def _bring(self, streams: Streams) -> None:
        looking = asyncio.get_running_loop().create_task(self._look_at_waiting(), name="hand back what waits")
        try:
            try:
                await streams.run()
            except ExtensionMissing:
                self._source = self._polling()
                for held, report in streams.left():
                    self._in_background(self._report(held, report))
                if self._is_stopping:
                    await self._source.stop()
                await self._source.run()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # The outermost edge: without a source the worker does nothing.
            self._report_error(error)
        finally:
            looking.cancel()

    def _polling(self) -> Polling:
        return Polling(
            self._client,
            _Desk(self),
            worker_id=self.worker_id,
            task_groups=self.task_groups,
            pollers=self.concurrent_pollers,
            tasks_per_poll=self.tasks_per_poll,
            poll_interval_ms=self.poll_interval_ms,
            heartbeat_interval_ms=self.heartbeat_interval_ms,
            polled=self._count_poll,
        )

    async def _look_at_waiting(self) -> None:
        """Hand back what waits too long behind handlers that take longer than those before them."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if self._slots.waiting and self._source is not None and self._source.can_hand_back:
                await self._hand_back(self._slots.take_waiting(longer_than_s=_WAIT_AHEAD_S))
                self._room_changed()

    async def stop(self, timeout: float = 30.0) -> None:
        """Take no more tasks, and wait `timeout` seconds at most until those that run have ended.

        Tasks that were not begun go back to the server at once, and do not count as attempts. Handlers are
        not interrupted: those that run longer go on without a lease that is renewed, and their outcome
        counts if it still stands when they end. On a worker that is not running, or that somebody
        else stops already, it returns at once.
        """
        if not self._is_running:
            return
        self._begin_to_stop()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                await self._stop_taking()
            me = asyncio.current_task()  # A handler that stops its own worker must not wait for itself.
            while tasks := [task for task in self._slots.tasks() if task is not me]:
                if loop.time() >= deadline:
                    break
                await asyncio.wait(tasks, timeout=deadline - loop.time())
        except TimeoutError:
            pass
        finally:
            self._forget_waiting()
            await self._tear_down()

    async def _stop_taking(self) -> None:
        if self._source is None:
            return
        await self._source.stop()
        if self._source.can_hand_back:
            await self._hand_back(self._slots.take_waiting())

    async def _hand_back(self, tasks: Sequence[HeldTask]) -> None:
        assert self._source is not None, "tasks come from a source"
        for held in tasks:
            if not held.is_lost:
                held.is_settled = True
                await self._source.report(held, handed_back(held))

    def _forget_waiting(self) -> None:
        for held in self._slots.take_waiting():  # Their leases run out.
            self._forget(held)

    def _begin_to_stop(self) -> None:
        self._is_running = False
        self._telemetry.stopped()
        self._is_stopping = True
        self._stop_signal.abort()

    async def _tear_down(self, *interrupted: asyncio.Task[None]) -> None:
        """End these tasks, and the source for good."""
        me = asyncio.current_task()
        ending = [task for task in interrupted if task is not me]
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending, timeout=_TEARDOWN_S)
        try:
            if self._source is not None:
                await self._source.close(_LATE_S)
            bringing, self._bringing = self._bringing, None
            if bringing is not None:
                bringing.cancel()
                await asyncio.wait({bringing}, timeout=_TEARDOWN_S)
            if self._refused:
                await asyncio.wait(self._refused, timeout=_TEARDOWN_S)
            for held in list(self._held.values()):
                if held.is_settled or not held.is_started:  # Nobody will say any more what became of it.
                    self._forget(held)
            if not self._slots.running:
                await self._execution.close()
        finally:
            self._is_stopping = False

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
            if not first.is_set() or second.is_set() or self._slots.running:
                self._begin_to_stop()
                self._forget_waiting()
                await self._tear_down(*self._slots.tasks())
            await self._execution.close()

    # Tasks

    def _deliver(self, tasks: Sequence[LeasedTask], refresh_tasks: Sequence[RefreshTask]) -> list[HeldTask]:
        taken: list[HeldTask] = [
            HeldJobTask(
                task,
                client=self._client,
                handling=self._handling,
                report=self._report,
                report_error=self._report_error,
            )
            for task in tasks
        ]
        if refresh_tasks:
            taken += self._refreshes(refresh_tasks)
        self.metrics.tasks_returned += len(tasks) + len(refresh_tasks)
        self._telemetry.delivered(len(tasks) + len(refresh_tasks))
        taken = [held for held in taken if self._hold(held)]
        if self._telemetry.traces_tasks():
            for held in taken:
                if isinstance(held, HeldJobTask):
                    held.begin_span(self._telemetry)
        if self._is_stopping and self._source is not None and self._source.can_hand_back:
            self._in_background(self._hand_back(taken))
            return []
        for held in taken:
            self._slots.add(held)
        return taken

    def _refreshes(self, tasks: Sequence[RefreshTask]) -> list[HeldTask]:
        made: list[HeldTask] = [
            HeldRefreshTask(
                refresh,
                handler=self._refresh_handler or _no_handler,
                worker_id=self.worker_id,
                stop_signal=self._stop_signal,
                report=self._report,
                report_error=self._report_error,
            )
            for refresh in tasks
        ]
        if self._refresh_handler is not None:
            return made
        if self._is_running:
            self._report_error(SiloClientError(no_refresh_handler(len(tasks))))
        if self._source is not None and self._source.can_hand_back:
            for held in made:  # Not handed back: it would come again at once. A failure makes a pause.
                held.is_settled = True
                self._held[held.id] = held
                self._in_background(
                    self._report(held, refresh_failed(held, NO_REFRESH_HANDLER, no_refresh_handler(1)))
                )
        return []

    def _hold(self, held: HeldTask) -> bool:
        """Whether the task is ours now, and was not before."""
        earlier = self._held.get(held.id)
        if earlier is not None:
            if earlier.bars_redelivery:
                self.metrics.duplicate_task_deliveries += 1
                self._telemetry.dropped_duplicate()
                self._report_error(DuplicateTaskDeliveryError(held.id, held.job_id), held.id)
                return False
            self._forget(earlier)
        self._held[held.id] = held
        return True

    def _forget(self, held: HeldTask) -> None:
        if self._held.get(held.id) is held:
            del self._held[held.id]
            if (span := _span_of(held)) is not None:
                span.let_go()

    async def _run_held(self, held: HeldTask) -> None:
        with within(_span_of(held)):
            try:
                await held.run()
            except asyncio.CancelledError as error:
                if is_being_cancelled():
                    raise
                self._report_failed(held, error)
            except Exception as error:  # The outermost edge of a task: the others go on.
                self._report_failed(held, error)
            finally:
                if held.is_lost or not held.is_settled:
                    self._forget(held)

    def _report_failed(self, held: HeldTask, error: BaseException) -> None:
        if (span := _span_of(held)) is not None:
            span.report_failed(error)
        self._report_error(error, held.id)

    async def _report(self, held: HeldTask, report: pb.Report) -> None:
        assert self._source is not None, "tasks come from a source"
        await self._source.report(held, report)

    def _refuse(self, held: HeldTask, error: SiloClientError) -> None:
        looking = self._in_background(held.report_refused(error))
        if (span := _span_of(held)) is not None:
            span.keep()
            looking.add_done_callback(lambda _: span.let_go())

    def _in_background(self, work: Any) -> asyncio.Task[None]:
        async def run() -> None:
            try:
                await work
            except SiloClientError as error:
                self._report_error(error)

        task = asyncio.get_running_loop().create_task(run(), name="late report")
        self._refused.add(task)
        task.add_done_callback(self._refused.discard)
        return task

    def _room_changed(self) -> None:
        if self._source is not None:
            self._source.changed()

    def _count_poll(self, tasks: int) -> None:
        self.metrics.polls += 1
        self.metrics.empty_polls += not tasks
        self._telemetry.polled(tasks)


class _Desk:
    """The worker as its sources see it."""

    def __init__(self, worker: SiloWorker[Any, Any, Any]) -> None:
        self._worker = worker

    @property
    def slots(self) -> int:
        return self._worker.max_concurrent_tasks

    @property
    def free(self) -> int:
        return self._worker.available_task_slots

    @property
    def waiting(self) -> int:
        return self._worker._slots.waiting

    @property
    def window(self) -> int:
        return self._worker._slots.limit + self._worker._slots.ahead

    def held(self) -> Sequence[HeldTask]:
        return list(self._worker._held.values())

    def deliver(
        self, tasks: Sequence[LeasedTask], refresh_tasks: Sequence[RefreshTask]
    ) -> Sequence[HeldTask]:
        return self._worker._deliver(tasks, refresh_tasks)

    def within(self, held: HeldTask) -> AbstractContextManager[None]:
        return within(_span_of(held))

    def find(self, task_id: str) -> HeldTask | None:
        return self._worker._held.get(task_id)

    def forget(self, held: HeldTask) -> None:
        self._worker._forget(held)

    def refused(self, held: HeldTask, error: SiloClientError) -> None:
        self._worker._refuse(held, error)

    def error(self, error: BaseException, task_id: str | None = None) -> None:
        self._worker._report_error(error, task_id)


def _handling(
    execution: Execution,
    handler: Callable[..., Any],
    payload_type: type[P] | None,
    timeout: float | None,
    middlewares: Sequence[Middleware[TaskContext[P, M]]],
) -> Handling[P, M]:
    async def run(context: TaskContext[P, M]) -> object:
        return await execution.run(handler, context, timeout_s=timeout)

    return Handling(compose(middlewares, run), payload_type)


def _span_of(held: HeldTask) -> TaskSpan | None:
    """Refresh tasks have none."""
    return held.span if isinstance(held, HeldJobTask) else None


async def _no_handler(context: object) -> int:
    raise AssertionError("refresh tasks without a handler are not run")
