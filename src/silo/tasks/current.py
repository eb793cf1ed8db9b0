"""The task that runs at the moment, for functions that are called with arguments and not with a context."""

from contextvars import ContextVar
from typing import Any  # A payload is whatever the task takes.

from silo.worker.context import TaskContext
from silo.worker.execution.blocking import BlockingTaskContext

Context = TaskContext[Any, dict[str, str]]
BlockingContext = BlockingTaskContext[Any, dict[str, str]]

current: ContextVar[Context | BlockingContext] = ContextVar("silo.current_task")


def current_task() -> Context:
    """What an async task can know of its job, and do about it. Its payload is the map of the arguments.

    Raises:
        RuntimeError: no worker called this code, or it runs in a thread or process.
    """
    match current.get(None):
        case TaskContext() as context:
            return context
        case None:
            raise RuntimeError("no task runs here")
        case _:
            raise RuntimeError("this is no async task: ask current_blocking_task()")


def current_blocking_task() -> BlockingContext:
    """The same for a task that runs in a thread or process; what waits, blocks.

    Raises:
        RuntimeError: no worker called this code, or it runs on the event loop.
    """
    match current.get(None):
        case BlockingTaskContext() as context:
            return context
        case None:
            raise RuntimeError("no task runs here")
        case _:
            raise RuntimeError("this is an async task: ask current_task()")
