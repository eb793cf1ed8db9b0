"""What a handler gets that is no async function."""

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from silo.worker.context import Task

P = TypeVar("P")
M = TypeVar("M", bound=Mapping[str, object])


class BlockingSignal(Protocol):
    """A cancellation signal as a thread sees it that is not the event loop's."""

    @property
    def aborted(self) -> bool: ...

    def wait(self, timeout_s: float | None) -> bool:
        """Block until it is set or the time is over; whether it is set."""


class BlockingTaskContext(Generic[P, M]):
    """A task, and what its handler can do about it. Safe to use from several threads."""

    def __init__(self, task: Task[P, M], signal: BlockingSignal, cancel: Callable[[], None]) -> None:
        self.task = task
        self._signal = signal
        self._cancel = cancel

    @property
    def cancelled(self) -> bool:
        """Whether the handler should stop: nobody waits for its result any more. Cheap enough for loops."""
        return self._signal.aborted

    def wait_cancelled(self, timeout: float | None = None) -> bool:
        """Block until the handler should stop, `timeout` seconds at most; whether it should.

        In place of `time.sleep` it makes a pause that ends when the job is cancelled.
        """
        return self._signal.wait(timeout)

    def cancel(self) -> None:
        """Cancel the job. Whatever the handler returns then, the job ends as cancelled.

        It blocks until the server has answered.
        """
        self._cancel()
