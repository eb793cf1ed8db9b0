"""What a handler gets."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from silo.client.limits import Limit

P = TypeVar("P")
M = TypeVar("M", bound=Mapping[str, object])  # Its values are texts; a TypedDict names its keys.


@dataclass(frozen=True, kw_only=True)
class Task(Generic[P, M]):
    """The task to run."""

    id: str  # Differs from attempt to attempt.
    job_id: str
    payload: P
    metadata: M
    attempt_number: int  # From 1, over restarts.
    relative_attempt_number: int  # From 1, since the last restart.
    is_last_attempt: bool
    priority: int
    task_group: str
    tenant_id: str | None
    shard: str
    lease_ms: int
    limits: tuple[Limit, ...] = ()  # Those of the job, in their order.


class CancellationSignal:
    """Set when a handler should come to an end.

    For a job: it was cancelled or its lease was lost, and never because the worker stops. For a
    refresh task: the worker stops.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def aborted(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        """Return once it is set."""
        await self._event.wait()

    def abort(self) -> None:
        self._event.set()


class TaskContext(Generic[P, M]):
    """A task, and what its handler can do about it."""

    def __init__(
        self, task: Task[P, M], signal: CancellationSignal, cancel: Callable[[], Awaitable[None]]
    ) -> None:
        self.task = task
        self.cancellation_signal = signal
        self._cancel = cancel

    @property
    def cancelled(self) -> bool:
        """Whether the handler should stop: nobody waits for its result any more."""
        return self.cancellation_signal.aborted

    async def wait_cancelled(self) -> None:
        """Return once the handler should stop."""
        await self.cancellation_signal.wait()

    async def cancel(self) -> None:
        """Cancel the job. Whatever the handler returns then, the job ends as cancelled."""
        await self._cancel()
