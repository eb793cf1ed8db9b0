"""What a worker runs for a task: from the job's payload to a call of the function, and to an outcome.

A handler bears the names of its function, so that errors speak of that one, and goes to another
process as a reference to its task, which the module of the application declares there as well.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Protocol  # Functions take and return what the application wants.

from silo.client.outcome import Cancelled, Failure
from silo.tasks.current import BlockingContext, Context, current
from silo.tasks.errors import TaskArgumentError
from silo.tasks.signature import Signature


class Runnable(Protocol):
    """A task, as far as its handler is concerned."""

    @property
    def function(self) -> Callable[..., Any]: ...

    @property
    def signature(self) -> Signature: ...


class _TaskHandler:
    def __init__(self, task: Runnable) -> None:
        wrapper: Any = self  # Subclasses can be called.
        update_wrapper(wrapper, task.function)
        self._task = task

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Runnable, str]]:
        return getattr, (self._task, "handler")

    def _outcome(self, returned: object) -> object:
        if isinstance(returned, Failure | Cancelled):
            return returned
        return self._task.signature.result_to_plain(returned)


class AsyncTaskHandler(_TaskHandler):
    """The handler of an `async def`."""

    async def __call__(self, context: Context) -> object:
        try:
            args, kwargs = self._task.signature.arguments_from_plain(context.task.payload)
        except TaskArgumentError as error:
            return _invalid_arguments(error)
        return self._outcome(await self._task.function(*args, **kwargs))


class BlockingTaskHandler(_TaskHandler):
    """The handler of a plain `def`, which runs in a thread or process."""

    def __call__(self, context: BlockingContext) -> object:
        try:
            args, kwargs = self._task.signature.arguments_from_plain(context.task.payload)
        except TaskArgumentError as error:
            return _invalid_arguments(error)
        before = current.set(context)
        try:
            return self._outcome(self._task.function(*args, **kwargs))
        finally:
            current.reset(before)


def _invalid_arguments(error: TaskArgumentError) -> Failure:
    """The same arguments will never fit."""
    data = {"task": error.task, "parameter": error.parameter, "message": error.reason}
    return Failure("INVALID_ARGUMENTS", data, is_final=True)
