"""From a job to its task, and from an exception to what follows."""

from collections.abc import Mapping, Sequence

from silo.client.outcome import Failure, Retry
from silo.tasks.current import Context, current
from silo.tasks.function import TASK_KEY, AnyTask, Declaration
from silo.worker.errors import failure_of
from silo.worker.execution.choice import ExecutionKind
from silo.worker.execution.errors import HandlerCrashed, RemoteError
from silo.worker.execution.execution import Execution
from silo.worker.middleware import Middleware, compose


class TaskRunner:
    """The handler of a worker that runs tasks of an app.

    Args:
        tasks: those that it runs, by name.
        executions: how it runs them.
        middlewares: around every task, the first one outermost.

    Raises:
        TypeError: a task takes or returns what has no plain form, or cannot run as it is declared.
        ValueError: other processes cannot import a task.
    """

    def __init__(
        self,
        tasks: Mapping[str, AnyTask],
        *,
        executions: Mapping[ExecutionKind, Execution],
        middlewares: Sequence[Middleware[Context]],
    ) -> None:
        self._tasks = tasks
        self._executions = executions
        self._run_within = compose(middlewares, self._run)
        for task in tasks.values():
            _ = task.signature  # A wrong one is told now, not by every job.
            executions[task.declared.execution].check(task.handler)

    async def __call__(self, context: Context) -> object:
        """Run the task that a job names; what is returned or raised is the outcome of the attempt."""
        name = context.task.metadata.get(TASK_KEY)
        task = self._tasks.get(name or "")
        if task is None:
            # Not final: a worker of a newer version may know it.
            return Failure("UNKNOWN_TASK", {"task": name, "known": sorted(self._tasks)})
        before = current.set(context)
        try:
            return await self._run_within(context)
        except Retry:
            raise
        except Exception as error:  # The edge around user code.
            if not _is_final(error, task.declared):
                raise
            return failure_of(error, is_final=True)
        finally:
            current.reset(before)

    async def _run(self, context: Context) -> object:
        task = self._tasks[context.task.metadata[TASK_KEY]]
        execution = self._executions[task.declared.execution]
        return await execution.run(task.handler, context, timeout_s=task.declared.timeout_s)


def _is_final(error: Exception, declared: Declaration) -> bool:
    """Whether the task does not want to be repeated after this."""
    if isinstance(error, HandlerCrashed):
        return False  # What killed its process, the task cannot know.
    if _is_one_of(error, declared.give_up_on):
        return True
    return declared.retry_on is not None and not _is_one_of(error, declared.retry_on)


def _is_one_of(error: Exception, kinds: tuple[type[Exception], ...]) -> bool:
    if isinstance(error, RemoteError):  # Its class did not come along, only the name.
        return error.name in {kind.__name__ for kind in kinds}
    return isinstance(error, kinds)
