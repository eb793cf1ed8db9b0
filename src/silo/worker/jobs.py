"""Job tasks: run the handler on one, report what it did, give it up when its lease is lost."""

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import msgspec

from silo.client.client import SiloGRPCClient
from silo.client.errors import (
    JobNotFoundError,
    SiloClientError,
    SiloFailedPreconditionError,
    TaskLeaseLostError,
    TaskNotFoundError,
)
from silo.client.messages import Outcome
from silo.client.outcome import Cancelled, Failure, Retry, Success
from silo.client.types import Heartbeat, LeasedTask
from silo.errors import LEASE_NOT_FOUND, LEASE_OWNER_MISMATCH
from silo.wire.payload import decode
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb
from silo.worker.context import CancellationSignal, Task, TaskContext
from silo.worker.errors import ErrorReports, failure_of, is_being_cancelled
from silo.worker.execution.blocking import BlockingTaskContext
from silo.worker.held import HeldTask, Report
from silo.worker.reports import report_of
from silo.worker.tracing import TaskSpan, Telemetry

log = logging.getLogger(__name__)

P = TypeVar("P")
M = TypeVar("M", bound=Mapping[str, object])
R = TypeVar("R")

# Two forms of handlers, because from one type with both `Success[R]` and `R` no type checker tells what R is.
OutcomeHandler = Callable[[TaskContext[P, M]], Awaitable[Success[R] | Failure | Cancelled]]
ValueHandler = Callable[[TaskContext[P, M]], Awaitable[R | Failure | Cancelled]]
BlockingHandler = Callable[[BlockingTaskContext[P, M]], Success[R] | Failure | Cancelled | R]


class _Reason(enum.Enum):
    SERVER = "server"
    CLIENT = "client"
    LEASE_LOST = "lease-lost"


@dataclass(frozen=True)
class Handling(Generic[P, M]):
    """How a worker runs its tasks."""

    run: Callable[[TaskContext[P, M]], Awaitable[object]]
    payload_type: type[P] | None


class HeldJobTask(HeldTask, Generic[P, M]):
    """A task that runs an attempt of a job."""

    def __init__(
        self,
        leased: LeasedTask,
        *,
        client: SiloGRPCClient,
        handling: Handling[P, M],
        report: Report,
        report_error: ErrorReports,
    ) -> None:
        super().__init__(leased, job_id=leased.job_id, tenant=leased.tenant_id)
        self._leased = leased
        self._client = client
        self._handling = handling
        self._report = report
        self._report_error = report_error
        self._signal = CancellationSignal()
        self._reason: _Reason | None = None
        self._is_postponed = False
        self.span: TaskSpan | None = None  # If somebody takes spans.

    def begin_span(self, telemetry: Telemetry) -> None:
        self.span = telemetry.begin_span(self._leased)

    @property
    def is_lost(self) -> bool:
        return self._reason is _Reason.LEASE_LOST

    @property
    def needs_heartbeats(self) -> bool:
        """Also when it was cancelled: the handler may take its time to clean up."""
        return not self.is_settled and not self.is_lost

    @property
    def bars_redelivery(self) -> bool:
        return not self.is_lost

    async def run(self) -> None:
        report = await self._run_handler()
        self.is_settled = True
        # From here to the sending of the report nothing is awaited: what was noticed by now counts.
        if self.is_lost:
            return
        if self._reason is not None:
            report = report_of(self, Cancelled())
        self._is_postponed = report.HasField("postponed")
        try:
            await self._report(self, report)
        except TaskNotFoundError as error:
            await self.report_refused(error)

    async def report_refused(self, error: SiloClientError) -> None:
        is_gone = isinstance(error, TaskNotFoundError)
        if is_gone and not self.is_started:
            return  # It was handed back, and is not ours either way.
        # An earlier try may have counted although its answer was lost. That is no loss.
        if not (is_gone and error.after_retry and await self._has_counted()):
            if self.span is not None:
                self.span.report_failed(error)
            self._report_error(error, self.id)

    async def _run_handler(self) -> pb.Report:
        """Run the handler; whatever it does becomes an outcome that can be sent."""
        outcome: Outcome | Retry
        try:
            returned = await self._handling.run(self._context())
            outcome = returned if isinstance(returned, Success | Failure | Cancelled) else Success(returned)
            return report_of(self, outcome)
        except Retry as retry:
            outcome = retry
        except asyncio.CancelledError as error:
            if is_being_cancelled():
                raise  # The worker is torn down; this is not the handler's own doing.
            outcome = failure_of(error)
        except Exception as error:  # The edge around user code.
            outcome = failure_of(error)
        return report_of(self, outcome)

    def _context(self) -> TaskContext[P, M]:
        leased = self._leased
        payload = decode(leased.payload_bytes, field="payload")
        if self._handling.payload_type is not None:
            payload = msgspec.convert(payload, self._handling.payload_type)
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
            limits=leased.limits,
        )
        return TaskContext(task, self._signal, self._cancel_job)

    async def _cancel_job(self) -> None:
        if self._reason is not None or self.is_settled:
            return
        self._cancel(_Reason.CLIENT)
        job_id = self._leased.job_id
        try:
            await self._client.cancel_job(job_id, self.tenant)
        except SiloClientError as error:
            # Cancelled or over already: either way it ends as cancelled here.
            log.debug("[SiloWorker] Cancel of job %s was refused: %s", job_id, error)

    def _cancel(self, reason: _Reason) -> None:
        if self._reason is None or reason is _Reason.LEASE_LOST:
            self._reason = reason
        self._signal.abort()

    async def _has_counted(self) -> bool:
        """Whether the outcome of this task counted, now that its lease is gone."""
        try:
            job = await self._client.get_job(self._leased.job_id, self.tenant, include_attempts=True)
        except JobNotFoundError:
            return True  # Only jobs that have ended can be deleted.
        except SiloClientError:
            return False  # Nobody says so, or not to this token.
        ended = [
            attempt
            for attempt in job.attempts or ()
            if attempt.task_id == self.id and attempt.status != "Running"
        ]
        if not ended:
            return self._is_postponed  # That leaves no attempt. A lease that ran out does.
        return any(attempt.error_code != "WORKER_CRASHED" for attempt in ended)

    def was_cancelled(self) -> None:
        self._cancel(_Reason.SERVER)

    def was_lost(self, cause: SiloClientError) -> None:
        if not self.is_lost:
            self._cancel(_Reason.LEASE_LOST)
            self._report_error(TaskLeaseLostError(self.id, self._leased.job_id, cause), self.id)

    def heartbeat_answered(self, answer: Heartbeat) -> None:
        if answer.cancelled:
            self.was_cancelled()

    def heartbeat_failed(self, error: BaseException) -> None:
        if self.is_settled:
            return  # The usual race with the report.
        if (isinstance(error, TaskNotFoundError) and LEASE_NOT_FOUND in (error.grpc_message or "")) or (
            isinstance(error, SiloFailedPreconditionError) and LEASE_OWNER_MISMATCH in error.grpc_message
        ):
            self.was_lost(error)
        else:
            self._report_error(error, self.id)
