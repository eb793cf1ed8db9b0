"""The promise that every way of running handlers keeps."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from silo.worker.context import TaskContext

P = TypeVar("P")
M = TypeVar("M", bound=Mapping[str, object])

# Takes a TaskContext or a BlockingTaskContext. Of which payload, and what it returns, is the application's.
Handler = Callable[..., Any]


class Execution(Protocol):
    """Runs handlers, many at a time. It belongs to the event loop that first runs one."""

    def check(self, handler: Handler) -> None:
        """Refuse a handler that can never run here.

        Raises:
            TypeError: it is of the wrong kind, such as an async function for threads.
            ValueError: other processes cannot import it.
        """

    async def run(self, handler: Handler, context: TaskContext[P, M], *, timeout_s: float | None) -> object:
        """Run the handler to its end and return what it returned.

        If there are more runs than it has places for, the later ones wait. The time counts from when the
        handler begins. If the caller is cancelled, the handler is told to stop, or made to.

        Raises:
            Exception: whatever the handler raised.
            HandlerTimeout: it did not end in time. What it does later does not count.
            HandlerCrashed: it ended its thread or process instead of returning.
            CancelledError: it was interrupted or not begun, because its job was cancelled or the
                execution closed; the caller's task has not been cancelled, and its `cancelling()` says so.
        """

    async def close(self) -> None:
        """Interrupt what runs or waits for its turn, and give up threads and processes.

        The next run starts new ones. A call while another one closes returns at once.
        """
