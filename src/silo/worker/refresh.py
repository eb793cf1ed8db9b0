"""Refresh tasks of floating limits: ask the handler for a new maximum, and report it.

They share slots and heartbeats with job tasks, but nothing about them is given up early: there is
no job to cancel, and a lost lease shows when the report is refused, which harms nobody, since the
limit is refreshed again.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from silo.client.errors import SiloClientError, TaskNotFoundError
from silo.client.types import Heartbeat, RefreshTask
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb
from silo.worker.context import CancellationSignal
from silo.worker.errors import ErrorReports, error_message, is_being_cancelled
from silo.worker.held import HeldTask, Report
from silo.worker.reports import refresh_failed, refresh_succeeded


@dataclass(frozen=True, kw_only=True)
class RefreshTaskContext:
    """A refresh task, and whether its worker still has time for it."""

    task: RefreshTask
    shard: str
    worker_id: str
    signal: CancellationSignal  # Set as soon as the worker stops: the handler should come to an end.


RefreshHandler = Callable[[RefreshTaskContext], Awaitable[int]]


NO_REFRESH_HANDLER = "NO_REFRESH_HANDLER"


def no_refresh_handler(count: int) -> str:
    """What is told when refresh tasks come and nobody is there to run them."""
    return (
        f"Worker received {count} floating limit refresh task(s) but no refreshHandler is configured. "
        "Configure a refreshHandler in SiloWorkerOptions to handle floating concurrency limits."
    )


class HeldRefreshTask(HeldTask):
    """A task that refreshes a floating limit."""

    def __init__(
        self,
        task: RefreshTask,
        *,
        handler: RefreshHandler,
        worker_id: str,
        stop_signal: CancellationSignal,
        report: Report,
        report_error: ErrorReports,
    ) -> None:
        super().__init__(task, job_id=None, tenant=task.tenant)
        self._handler = handler
        self._report = report
        self._report_error = report_error
        self._context = RefreshTaskContext(
            task=task, shard=task.shard, worker_id=worker_id, signal=stop_signal
        )

    @property
    def is_lost(self) -> bool:
        return False  # Nobody looks for it: its report is refused then.

    @property
    def needs_heartbeats(self) -> bool:
        return not self.is_settled

    @property
    def bars_redelivery(self) -> bool:
        return not self.is_settled

    async def run(self) -> None:
        report = await self._run_handler()
        self.is_settled = True
        await self._report(self, report)

    async def _run_handler(self) -> pb.Report:
        """Run the handler; whatever it does becomes an outcome that can be sent."""
        try:
            maximum = await self._handler(self._context)
            return refresh_succeeded(self, maximum)
        except asyncio.CancelledError as error:
            if is_being_cancelled():
                raise  # The worker is torn down; this is not the handler's own doing.
            message = error_message(error)
        except Exception as error:  # The edge around user code.
            message = error_message(error)
        return refresh_failed(self, "REFRESH_HANDLER_ERROR", message)

    def was_cancelled(self) -> None:
        """There is no job that could have been cancelled."""

    def was_lost(self, cause: SiloClientError) -> None:
        self._report_error(cause, self.id)

    async def report_refused(self, error: SiloClientError) -> None:
        if not (isinstance(error, TaskNotFoundError) and error.after_retry):  # Then an earlier try counted.
            self._report_error(error, self.id)

    def heartbeat_answered(self, answer: Heartbeat) -> None:
        """There is no job that could have been cancelled."""

    def heartbeat_failed(self, error: BaseException) -> None:
        self._report_error(error, self.id)
