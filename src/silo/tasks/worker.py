"""AppWorker: a worker for the tasks of an app, with all that they run in and between."""

import itertools
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any  # What jobs carry is the application's.

from silo.client.client import SiloGRPCClient
from silo.tasks.connection import Connection
from silo.tasks.current import Context
from silo.tasks.function import AnyTask
from silo.tasks.running import TaskRunner
from silo.worker.errors import ErrorContext
from silo.worker.execution.choice import ExecutionKind
from silo.worker.execution.execution import Execution
from silo.worker.execution.inline import AsyncExecution
from silo.worker.execution.processes import ProcessExecution
from silo.worker.execution.threads import ThreadExecution
from silo.worker.middleware import Middleware
from silo.worker.refresh import RefreshHandler
from silo.worker.worker import SiloWorker

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter

_numbers = itertools.count(1)  # Of the workers of this process, whose ids must differ.

Lifespan = Callable[[], AbstractAsyncContextManager[object]]


class AppWorker:
    """Runs the tasks of an app; made by `App.worker`.

    Use `async with worker:`, or `start()` and `stop()`, or `await worker.run()` in a process of its own.
    The lifespans of the app are entered before the first task and left after the last.
    """

    def __init__(
        self,
        connection: Connection,
        client: SiloGRPCClient | None,
        *,
        tasks: Mapping[str, AnyTask],
        middlewares: Sequence[Middleware[Context]],
        lifespans: Sequence[Lifespan],
        refresh_handler: RefreshHandler | None,
        groups: Sequence[str],
        worker_id: str | None,
        max_concurrent_tasks: int,
        processes: int | None,
        recycle_after_jobs: int | None,
        recycle_above_mb: int | None,
        interrupts: bool,
        on_error: Callable[[BaseException, ErrorContext], None] | None,
        meter: "Meter | None",
    ) -> None:
        if max_concurrent_tasks < 1:
            raise ValueError(f"max_concurrent_tasks must be at least 1, not {max_concurrent_tasks}")
        self._connection = connection
        self._client = client
        self._tasks = tasks
        self._middlewares = middlewares
        self._lifespans = lifespans
        self._refresh_handler = refresh_handler
        self._processes = (os.cpu_count() or 1) if processes is None else processes
        self._recycle_after_jobs = recycle_after_jobs
        self._recycle_above_mb = recycle_above_mb
        self._interrupts = interrupts
        self._on_error = on_error
        self._meter = meter
        self._stack: AsyncExitStack | None = None
        self._worker: SiloWorker[Any, dict[str, str], Any] | None = None
        self.task_groups = tuple(groups)
        self.worker_id = worker_id or f"{socket.gethostname()}-{os.getpid()}-{next(_numbers)}"
        self.max_concurrent_tasks = max_concurrent_tasks
        self._runner(self._executions())  # What is wrong is told now.

    def __repr__(self) -> str:
        return f"AppWorker({self.worker_id!r}, {', '.join(self.task_groups)}, {len(self.tasks)} tasks)"

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks of its groups.

        It runs the others too: a job may wait in the group that its task was in before.
        """
        return tuple(
            name for name, task in self._tasks.items() if task.declared.task_group in self.task_groups
        )

    async def start(self) -> None:
        """Enter the lifespans, then begin to work. On a running worker it does nothing.

        Raises:
            Exception: a lifespan failed; those before it were left again.
        """
        if self._stack is not None:
            return
        self._stack = AsyncExitStack()
        try:
            self._worker = await self._stack.enter_async_context(self._prepared())
        except BaseException:
            self._stack = None
            raise
        self._worker.start()

    async def stop(self, timeout: float = 30.0) -> None:
        """Take no more tasks, wait for those that run, `timeout` seconds at most, and leave the lifespans.

        Handlers that still run then are interrupted where that can be done.
        """
        stack, self._stack = self._stack, None
        worker, self._worker = self._worker, None
        if stack is None or worker is None:
            return
        async with stack:
            await worker.stop(timeout)

    async def __aenter__(self) -> "AppWorker":
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def run(self, *, stop_timeout: float = 30.0, on_ready: Callable[[], None] | None = None) -> None:
        """Work until SIGINT or SIGTERM, then drain, and close the client of the app.

        Like `SiloWorker.run` in all else; raises like `start`.
        """
        try:
            async with self._prepared() as worker:
                await worker.run(stop_timeout=stop_timeout, on_ready=on_ready)
        finally:
            await self._connection.close()

    @asynccontextmanager
    async def _prepared(self) -> AsyncIterator[SiloWorker[Any, dict[str, str], Any]]:
        """A worker that can start, amid all that its tasks need."""
        executions = self._executions()
        runner = self._runner(executions)
        async with AsyncExitStack() as stack:
            for lifespan in self._lifespans:
                await stack.enter_async_context(lifespan())
            for execution in executions.values():
                stack.push_async_callback(execution.close)
            yield SiloWorker(
                client=self._client or self._connection.client(),
                worker_id=self.worker_id,
                task_group=self.task_groups,
                handler=runner,
                refresh_handler=self._refresh_handler,
                max_concurrent_tasks=self.max_concurrent_tasks,
                on_error=self._on_error,
                meter=self._meter,
            )

    def _executions(self) -> dict[ExecutionKind, Execution]:
        return {
            "async": AsyncExecution(interrupts=self._interrupts),
            "thread": ThreadExecution(self.max_concurrent_tasks),
            "process": ProcessExecution(
                self._processes,
                recycle_after_jobs=self._recycle_after_jobs,
                recycle_above_mb=self._recycle_above_mb,
            ),
        }

    def _runner(self, executions: Mapping[ExecutionKind, Execution]) -> TaskRunner:
        return TaskRunner(self._tasks, executions=executions, middlewares=self._middlewares)
