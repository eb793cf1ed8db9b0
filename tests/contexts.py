"""Contexts for handlers that are run without a worker."""

from collections.abc import Awaitable, Callable
from typing import Any  # A payload is anything.

from silo import Task, TaskContext
from silo.worker.context import CancellationSignal

Context = TaskContext[Any, dict[str, str]]


def a_context(payload: Any = None, *, on_cancel: Callable[[], Awaitable[None]] | None = None) -> Context:
    """A context whose `cancel` sets its signal, and then does what a worker would do to tell the server."""
    signal = CancellationSignal()

    async def cancel() -> None:
        signal.abort()
        if on_cancel is not None:
            await on_cancel()

    task: Task[Any, dict[str, str]] = Task(
        id="t",
        job_id="j",
        payload=payload,
        metadata={"source": "test"},
        attempt_number=1,
        relative_attempt_number=1,
        is_last_attempt=True,
        priority=50,
        task_group="default",
        tenant_id=None,
        shard="s",
        lease_ms=10_000,
    )
    return TaskContext(task, signal, cancel)
