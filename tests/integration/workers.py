"""Workers for tests, the handlers that they run, and what they complain of."""

import asyncio
from typing import Any

from silo import ErrorContext, SiloGRPCClient, SiloWorker, TaskContext
from tests.integration.fake_silo import GROUP

Context = TaskContext[Any, dict[str, str]]
FAST_MS = 5


class Handler:
    """A handler that says what runs, and ends tasks when the test lets it."""

    def __init__(self, result: Any = "done", *, holds: bool = False) -> None:
        self.result = result
        self.contexts: list[Context] = []
        self.running = 0
        self.most_running = 0
        self.release = asyncio.Event()
        if not holds:
            self.release.set()

    async def __call__(self, ctx: Context) -> Any:
        self.contexts.append(ctx)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.release.wait()
        finally:
            self.running -= 1
        return self.result

    @property
    def ids(self) -> list[str]:
        return [ctx.task.id for ctx in self.contexts]


class Errors:
    """What a worker reported through on_error."""

    def __init__(self) -> None:
        self.seen: list[tuple[BaseException, str | None]] = []

    def __call__(self, error: BaseException, context: ErrorContext) -> None:
        self.seen.append((error, context.task_id))

    def of(self, kind: type[BaseException]) -> list[str | None]:
        return [task_id for error, task_id in self.seen if isinstance(error, kind)]


def a_worker(client: SiloGRPCClient, handler: Any, **options: Any) -> SiloWorker[Any, Any, Any]:
    """A worker whose errors fail the test that does not look at them."""
    given = {"worker_id": "w", "task_group": GROUP, "poll_interval_ms": FAST_MS} | options
    return SiloWorker(client=client, handler=handler, **given)
