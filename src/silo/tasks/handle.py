"""TaskHandle: one job of a typed task, from the side of whoever enqueued it."""

from dataclasses import replace
from typing import Any, Generic, TypeVar

from silo.client.client import SiloGRPCClient
from silo.client.handle import JobHandle
from silo.client.types import JobResult
from silo.tasks.errors import TaskResultError
from silo.tasks.record import Misfit, Record

R = TypeVar("R")

RESULT = "result"  # The only field of the record that a result is.


class TaskHandle(JobHandle, Generic[R]):
    """A job's id and tenant with the client to ask about it, and the type that its result has."""

    def __init__(
        self, client: SiloGRPCClient, id: str, tenant: str | None, *, task: str, result_type: Record
    ) -> None:
        super().__init__(client, id, tenant)
        self._task = task
        self._result_type = result_type

    async def result(self, timeout: float | None = None) -> JobResult[R]:
        """Wait until the job has ended. A failed or cancelled job is a result, not an exception.

        The result of one that succeeded is what the task returned, rebuilt as its annotation says.

        Args:
            timeout: seconds; None waits without end, 0 looks once.

        Raises:
            JobTimeoutError: it had not ended by then.
            JobNotFoundError: there is no such job (any more).
            TaskResultError: what is stored is not of that type.
        """
        end = await super().result(timeout)
        return rebuilt(end, self._result_type, task=self._task, job_id=self.id)


def rebuilt(end: JobResult[Any], result_type: Record, *, task: str, job_id: str) -> JobResult[Any]:
    """The end of a job, with its result as the task returned it.

    Raises:
        TaskResultError: what is stored is not of that type.
    """
    if end.status != "Succeeded":
        return end
    try:
        values = result_type.from_plain({RESULT: end.result})
    except Misfit as misfit:
        raise TaskResultError(task, job_id, misfit.reason) from None
    return replace(end, result=values[RESULT])
