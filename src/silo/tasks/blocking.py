"""Tasks for code that waits: what `task.sync` gives."""

from typing import Generic, ParamSpec, TypeVar

from silo.client.types import JobResult
from silo.sync import JobHandle, SiloClient
from silo.tasks.function import TaskCall
from silo.tasks.handle import rebuilt
from silo.tasks.record import Record

P = ParamSpec("P")
R = TypeVar("R")


class BlockingTaskHandle(JobHandle, Generic[R]):
    """Like `TaskHandle`, and each method waits for its answer."""

    def __init__(
        self, client: SiloClient, id: str, tenant: str | None, *, task: str, result_type: Record
    ) -> None:
        super().__init__(client, id, tenant)
        self._task = task
        self._result_type = result_type

    def result(self, timeout: float | None = None) -> JobResult[R]:
        """Wait until the job has ended, as `TaskHandle.result` does."""
        return rebuilt(super().result(timeout), self._result_type, task=self._task, job_id=self.id)


class BlockingTaskCall(Generic[P, R]):
    """A task whose `enqueue` waits. In a thread that runs an event loop it raises RuntimeError instead."""

    def __init__(self, call: TaskCall[P, R]) -> None:
        self._call = call

    def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> BlockingTaskHandle[R]:
        """Enqueue a job; returns once it is durable. Raises like `TaskFunction.enqueue`."""
        client = self._call.task.connection.blocking_client()
        handle = client.run(self._call.operation(args, kwargs))
        return self.handle(handle.id, handle.tenant)

    def handle(self, id: str, tenant: str | None = None) -> BlockingTaskHandle[R]:
        """A handle on a job that was enqueued earlier, as `TaskFunction.handle` gives."""
        task = self._call.task
        return BlockingTaskHandle(
            task.connection.blocking_client(),
            id,
            tenant or task.connection.tenant,
            task=task.name,
            result_type=task.signature.result,
        )
