"""App: an application's tasks, how they reach a server, and what surrounds them in a worker."""

import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import (
    TYPE_CHECKING,
    Any,  # Tasks are functions of the application.
    ParamSpec,
    Protocol,
    TypeVar,
    overload,
)

from silo.client.client import SiloGRPCClient
from silo.client.limits import Limit
from silo.client.router import Token
from silo.client.tls import TlsOptions
from silo.client.types import RetryPolicy
from silo.tasks.connection import Connection
from silo.tasks.current import Context
from silo.tasks.function import (
    AnyTask,
    AsyncTaskFunction,
    Declaration,
    PlainTaskFunction,
)
from silo.tasks.names import task_name
from silo.tasks.worker import AppWorker, Lifespan
from silo.worker.errors import ErrorContext
from silo.worker.execution.choice import ExecutionKind
from silo.worker.middleware import Middleware
from silo.worker.refresh import RefreshHandler

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_GROUP = "default"


class TaskDecorator(Protocol):
    """Makes a function a task, with what was given to `App.task`."""

    # Which one a function is shows in what a call returns, and a coroutine is a value like others.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncTaskFunction[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, R], /) -> PlainTaskFunction[P, R]: ...


class App:
    """The tasks of an application, by name.

    Anything that imports them can enqueue; `silo worker module:app`, or `app.worker()`, runs them. One client
    for each event loop is opened with the first call. `async with app:` or `await app.close()` closes it.

    Args:
        servers: one address or several, `"host:port"` each. What is left out comes from `configure`, or from
            `SILO_SERVERS` with commas between them; otherwise it is 127.0.0.1:7450.
        token: likewise, or `SILO_TOKEN`.
        tls: as for `SiloGRPCClient`.
        tenant: of every job that names no other.
        task_group: of every task that names no other.
    """

    def __init__(
        self,
        servers: str | Sequence[str] | None = None,
        *,
        token: Token | None = None,
        tls: bool | TlsOptions | None = None,
        tenant: str | None = None,
        task_group: str = DEFAULT_GROUP,
    ) -> None:
        self._connection = Connection(servers, token=token, tls=tls, tenant=tenant)
        self._task_group = task_group
        self._tasks: dict[str, AnyTask] = {}
        self._middlewares: list[Middleware[Context]] = []
        self._lifespans: list[Lifespan] = []
        self._refresh_handler: RefreshHandler | None = None

    def __repr__(self) -> str:
        return f"App({len(self._tasks)} tasks in {len(self.task_groups)} groups, {self._connection!r})"

    # Connection

    def configure(
        self,
        servers: str | Sequence[str] | None = None,
        *,
        token: Token | None = None,
        tls: bool | TlsOptions | None = None,
        tenant: str | None = None,
        client: SiloGRPCClient | None = None,
    ) -> None:
        """Say later what the constructor was not told; what is left out stays as it is.

        Args:
            client: use this one for everything, until servers are given. Whoever made it closes it.

        Raises:
            RuntimeError: servers, token or tls would change while a client is open.
        """
        self._connection.configure(servers, token=token, tls=tls, tenant=tenant, client=client)

    @property
    def client(self) -> SiloGRPCClient:
        """The client of the running event loop.

        Raises:
            RuntimeError: no event loop runs.
            ConfigError: the settings are no good.
        """
        return self._connection.client()

    @property
    def servers(self) -> tuple[str, ...]:
        """The servers that are asked first; none are known if a client was given."""
        return self._connection.servers

    async def close(self) -> None:
        """Close the client of the running event loop; the next call opens another one."""
        await self._connection.close()

    async def __aenter__(self) -> "App":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Tasks

    @property
    def tasks(self) -> Mapping[str, AnyTask]:
        """All tasks, by name."""
        return MappingProxyType(self._tasks)

    @property
    def task_groups(self) -> tuple[str, ...]:
        """The groups that tasks are in, in the order in which they were first named."""
        return tuple(dict.fromkeys(task.declared.task_group for task in self._tasks.values()))

    @overload
    def task(  # type: ignore[overload-overlap]  # As above.
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncTaskFunction[P, R]: ...

    @overload
    def task(self, function: Callable[P, R], /) -> PlainTaskFunction[P, R]: ...

    @overload
    def task(
        self,
        *,
        task_group: str | None = ...,
        name: str | None = ...,
        priority: int = ...,
        retry: RetryPolicy | None = ...,
        retry_on: Sequence[type[Exception]] | None = ...,
        give_up_on: Sequence[type[Exception]] = ...,
        limits: Sequence[Limit] = ...,
        timeout: float | None = ...,
        execution: ExecutionKind | None = ...,
    ) -> TaskDecorator: ...

    def task(
        self,
        function: Callable[..., Any] | None = None,
        *,
        task_group: str | None = None,
        name: str | None = None,
        priority: int = 50,
        retry: RetryPolicy | None = None,
        retry_on: Sequence[type[Exception]] | None = None,
        give_up_on: Sequence[type[Exception]] = (),
        limits: Sequence[Limit] = (),
        timeout: float | None = None,
        execution: ExecutionKind | None = None,
    ) -> Any:
        """Make a function a task: `@app.task`, or `@app.task(...)` with any of these.

        A job carries the name of its task, and the arguments by the names of their parameters. So a parameter
        may be added if it has a default, and the workers get it first.

        Args:
            name: what jobs call it; the function's module and qualified name if left out. To rename or move
                a function and still run the jobs that wait, give the old one.
            priority: 0 runs first, 99 last.
            retry: when and how often an attempt that failed is repeated; never if left out.
            retry_on: the only exceptions after which it is repeated.
            give_up_on: exceptions after which it is not, even if `retry_on` has them.
            limits: what each job must pass before it runs; see also `TaskFunction.limits`.
            timeout: seconds that one attempt may take.
            execution: "async" for an `async def`; for a plain function "thread", or "process" if it keeps
                a processor busy.

        Raises:
            TypeError: it is no function that can run like that.
            ValueError: another function of the app has that name, or the timeout is not positive.
        """

        def declare(function: Callable[..., Any]) -> AnyTask:
            is_async = _is_async(function)
            mode = execution or ("async" if is_async else "thread")
            if is_async != (mode == "async"):
                fix = "leave execution out" if is_async else 'use "thread" or "process", or make it async'
                raise TypeError(f"{function.__qualname__} cannot run with execution={mode!r}: {fix}")
            declared = Declaration(
                name=name or task_name(function),
                task_group=task_group or self._task_group,
                priority=priority,
                retry=retry,
                retry_on=None if retry_on is None else tuple(retry_on),
                give_up_on=tuple(give_up_on),
                limits=tuple(limits),
                timeout_s=timeout,
                execution=mode,
            )
            kind: type[AnyTask] = AsyncTaskFunction if is_async else PlainTaskFunction
            task = kind(function, declared, self._connection)
            self._add(task)
            return task

        if timeout is not None and timeout <= 0:
            raise ValueError(f"timeout must be positive, not {timeout}")
        return declare if function is None else declare(function)

    def _add(self, task: AnyTask) -> None:
        known = self._tasks.get(task.name)
        if known is not None and _place(known) != _place(task):  # A module may be executed twice.
            raise ValueError(f"there is another task {task.name!r}; give one of them a name of its own")
        self._tasks[task.name] = task

    # Around tasks

    def middleware(self, function: Middleware[Context]) -> Middleware[Context]:
        """Run an `async def middleware(context, call_next)` around every task, the first one outermost.

        It returns what `await call_next(context)` returned: the result as it is stored, a `Failure` or
        `Cancelled`. An exception of the task passes through it, and may become any of these, or `Retry`.
        """
        self._middlewares.append(function)
        return function

    def lifespan(self, function: Lifespan) -> Lifespan:
        """Enter this async context manager before a worker takes its first task, and leave it after the last.

        With several, those declared later begin later and end earlier.

        Raises:
            TypeError: `contextlib.asynccontextmanager` was forgotten.
        """
        if inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function.__qualname__} is no context manager: add @contextlib.asynccontextmanager"
            )
        self._lifespans.append(function)
        return function

    def refresh_handler(self, function: RefreshHandler) -> RefreshHandler:
        """Ask this `async def` for the new maximum of floating limits; see `SiloWorker`."""
        self._refresh_handler = function
        return function

    # Work

    def worker(
        self,
        client: SiloGRPCClient | None = None,
        *,
        groups: Sequence[str] | None = None,
        worker_id: str | None = None,
        max_concurrent_tasks: int = 10,
        processes: int | None = None,
        recycle_after_jobs: int | None = None,
        recycle_above_mb: int | None = None,
        interrupts: bool = False,
        on_error: Callable[[BaseException, ErrorContext], None] | None = None,
        meter: "Meter | None" = None,
    ) -> AppWorker:
        """A worker for the tasks that are declared by now. It does nothing until it is started.

        Args:
            client: the app's if left out.
            groups: the task groups that it works on; those of all tasks if left out.
            worker_id: unique among running workers; made of host name and process id if left out.
            max_concurrent_tasks: tasks that run at a time, those in threads and processes included.
            processes: child processes at most, for tasks with `execution="process"`; one for each processor
                core if left out. They start when they are needed.
            recycle_after_jobs: replace a child process after so many jobs.
            recycle_above_mb: replace a child process whose memory is larger after a job.
            interrupts: async tasks get a CancelledError when their job is cancelled.
            on_error: called with each error around tasks and its context; logs by default.
            meter: where it counts if OpenTelemetry is installed; the global meter `silo-worker` if left out.

        Raises:
            ValueError: the app has no tasks: the module that declares them was not imported. Or other
                processes cannot import a task, or a number is out of range.
            TypeError: a task takes or returns what has no plain form.
        """
        if not self._tasks:
            raise ValueError("the app has no tasks: import the modules that declare them")
        return AppWorker(
            self._connection,
            client,
            tasks=dict(self._tasks),
            middlewares=tuple(self._middlewares),
            lifespans=tuple(self._lifespans),
            refresh_handler=self._refresh_handler,
            groups=self.task_groups if groups is None else groups,
            worker_id=worker_id,
            max_concurrent_tasks=max_concurrent_tasks,
            processes=processes,
            recycle_after_jobs=recycle_after_jobs,
            recycle_above_mb=recycle_above_mb,
            interrupts=interrupts,
            on_error=on_error,
            meter=meter,
        )


def _is_async(function: Callable[..., Any]) -> bool:
    if not inspect.isfunction(function):
        raise TypeError(f"a task is made of a function, not of a {type(function).__name__}")
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(f"{function.__qualname__} is a generator; a task returns its result")
    return inspect.iscoroutinefunction(function)


def _place(task: AnyTask) -> tuple[str, str]:
    code = task.function.__code__
    return code.co_filename, code.co_qualname
