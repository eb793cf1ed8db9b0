"""OpenTelemetry in the worker: counts, and a span for each task.

It is used when it is installed, as with the extra `otel`. Without it nothing here does anything, and
without a provider of spans nothing is done for a single task.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from silo.client.types import LeasedTask

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from opentelemetry.trace import Span, Tracer

try:
    from opentelemetry import context, metrics, trace
except ImportError:
    _is_installed = False
else:
    _is_installed = True


class Telemetry:
    """What one worker tells OpenTelemetry.

    Args:
        meter: where it counts; the global meter `silo-worker` if left out.
        available_slots: asked when metrics are collected, by any thread.
    """

    def __init__(
        self,
        meter: "Meter | None",
        *,
        worker_id: str,
        task_group: str,
        available_slots: Callable[[], int],
    ) -> None:
        self.worker_id = worker_id
        self.task_group = task_group
        self.available_slots = available_slots
        self._attributes = {"task_group": task_group}
        self._instruments = _instruments_of(meter) if _is_installed else None
        self._tracer: Tracer | None = None

    def started(self) -> None:
        """The worker takes tasks from now on."""
        if self._instruments is not None:
            self._instruments.workers.add(self)

    def stopped(self) -> None:
        """It takes no more."""
        if self._instruments is not None:
            self._instruments.workers.discard(self)

    def polled(self, tasks: int) -> None:
        """A poll was answered with so many tasks, of both kinds."""
        if self._instruments is not None:
            self._instruments.polls.add(1, self._attributes)
            if not tasks:
                self._instruments.empty_polls.add(1, self._attributes)

    def delivered(self, tasks: int) -> None:
        """So many tasks came, by a poll or pushed."""
        if self._instruments is not None and tasks:
            self._instruments.tasks_returned.add(tasks, self._attributes)

    def dropped_duplicate(self) -> None:
        if self._instruments is not None:
            self._instruments.duplicates.add(1, self._attributes)

    def traces_tasks(self) -> bool:
        """Whether somebody takes spans. Asked once for each delivery: a provider may be set late."""
        if _is_installed and self._tracer is None:
            tracer = trace.get_tracer("silo-worker")
            if not isinstance(tracer, trace.ProxyTracer | trace.NoOpTracer):
                self._tracer = tracer
        return self._tracer is not None

    def begin_span(self, task: LeasedTask) -> "TaskSpan":
        """The span of a task that was delivered now. Only if `traces_tasks`."""
        assert self._tracer is not None
        return TaskSpan(
            self._tracer.start_span(
                "silo.task.lifecycle",
                attributes={
                    "silo.task_id": task.id,
                    "silo.shard": task.shard,
                    "silo.tenant": task.tenant_id or "",
                    "silo.worker_id": self.worker_id,
                    "silo.job_id": task.job_id,
                    "silo.task_group": task.task_group,
                    "silo.attempt_number": task.attempt_number,
                },
            )
        )


class TaskSpan:
    """The span of one task. It ends when the last one who keeps it has let it go; its maker is the first."""

    def __init__(self, span: "Span") -> None:
        self._span = span
        self._keepers = 1

    def keep(self) -> None:
        self._keepers += 1

    def let_go(self) -> None:
        self._keepers -= 1
        if not self._keepers:
            self._span.end()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Keep it during the block, and make it the parent of what begins there."""
        self.keep()
        token = context.attach(trace.set_span_in_context(self._span))
        try:
            yield
        finally:
            context.detach(token)
            self.let_go()

    def report_failed(self, error: BaseException) -> None:
        """The outcome of the task is lost: the only thing that counts as an error of a span."""
        self._span.record_exception(error)
        self._span.set_status(trace.StatusCode.ERROR, str(error))


_NO_SPAN = nullcontext()


def within(span: TaskSpan | None) -> AbstractContextManager[None]:
    """A block that belongs to the span, if there is one."""
    return _NO_SPAN if span is None else span.current()


class _Instruments:
    """Those of one meter, shared by its workers: of two gauges with one name it would drop the second."""

    def __init__(self, meter: "Meter") -> None:
        self.workers: set[Telemetry] = set()  # Those that take tasks.
        self.polls = meter.create_counter("silo.worker.polls", description="Polls that were answered")
        self.empty_polls = meter.create_counter(
            "silo.worker.polls.empty", description="Polls that brought nothing"
        )
        self.tasks_returned = meter.create_counter(
            "silo.worker.polls.tasks_returned", description="Tasks that were delivered, by a poll or pushed"
        )
        self.duplicates = meter.create_counter(
            "silo.worker.duplicate_task_deliveries",
            description="Deliveries dropped because the worker had the task already",
        )
        meter.create_observable_gauge(
            "silo.worker.available_task_slots",
            callbacks=[self._observe_slots],
            description="Tasks that could start now; below zero if some wait",
        )

    def _observe_slots(self, options: "CallbackOptions") -> Iterable["Observation"]:
        slots: dict[str, int] = {}
        for worker in tuple(self.workers):  # They come and go in another thread.
            slots[worker.task_group] = slots.get(worker.task_group, 0) + worker.available_slots()
        return [metrics.Observation(count, {"task_group": group}) for group, count in slots.items()]


_of_meters: "WeakKeyDictionary[Meter, _Instruments]" = WeakKeyDictionary()
_global_meter: "Meter | None" = None


def _instruments_of(meter: "Meter | None") -> _Instruments:
    global _global_meter
    if meter is None:
        if _global_meter is None:
            _global_meter = metrics.get_meter("silo-worker")
        meter = _global_meter
    instruments = _of_meters.get(meter)
    if instruments is None:
        instruments = _of_meters[meter] = _Instruments(meter)
    return instruments
