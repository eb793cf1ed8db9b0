"""A function of an app that runs as a task: called directly, or enqueued with its own signature."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, update_wrapper
from typing import (
    TYPE_CHECKING,
    Any,  # Functions are the application's.
    Generic,
    ParamSpec,
    TypeAlias,
    TypeVar,
)

from silo.client.client import SiloGRPCClient
from silo.client.handle import JobHandle
from silo.client.limits import Limit
from silo.client.outcome import Cancelled, Failure
from silo.client.types import RetryPolicy
from silo.tasks.connection import Connection
from silo.tasks.handle import TaskHandle
from silo.tasks.handlers import AsyncTaskHandler, BlockingTaskHandler
from silo.tasks.signature import Signature
from silo.wire.payload import PayloadError
from silo.worker.execution.choice import ExecutionKind
from silo.worker.execution.execution import Handler

if TYPE_CHECKING:
    from silo.tasks.blocking import BlockingTaskCall

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

TASK_KEY = "silo.task"  # In the metadata of a job: which task of its group it is.


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What a task was declared with; see `App.task`."""

    name: str
    task_group: str
    priority: int
    retry: RetryPolicy | None
    retry_on: tuple[type[Exception], ...] | None
    give_up_on: tuple[type[Exception], ...]
    limits: tuple[Limit, ...]
    timeout_s: float | None
    execution: ExecutionKind


class TaskFunction(ABC, Generic[P, R_co]):
    """A function that was declared as a task. `R_co` is what it returns, failures included.

    What `enqueue` takes is what the function takes.
    """

    def __init__(self, function: Callable[..., Any], declared: Declaration, connection: Connection) -> None:
        wrapper: Any = self  # Subclasses can be called.
        update_wrapper(wrapper, function)
        self.function = function
        self.declared = declared
        self.connection = connection
        self._limits_of: Callable[..., Sequence[Limit]] | None = None

    def __repr__(self) -> str:
        return f"<task {self.name!r} of group {self.declared.task_group!r}>"

    def __reduce__(self) -> str:
        """To other processes it goes as a reference to the module that declares it, as functions do."""
        return self.function.__qualname__

    @property
    def name(self) -> str:
        return self.declared.name

    @property
    @abstractmethod
    def handler(self) -> Handler:
        """What a worker runs."""

    @cached_property
    def signature(self) -> Signature:
        """What the function takes and returns. Types that it names may be defined after it.

        Raises:
            TypeError: an annotation cannot be resolved, or its values have no plain form.
        """
        return Signature(self.name, self.function)

    async def enqueue(
        self: "TaskFunction[P, R | Failure | Cancelled]", *args: P.args, **kwargs: P.kwargs
    ) -> TaskHandle[R]:
        """Enqueue a job that calls the function with these arguments; returns once it is durable.

        Raises:
            TaskArgumentError: the arguments do not fit; nothing was sent.
            TypeError: the task is declared with types that have no plain form.
            SiloClientError: as `SiloGRPCClient.enqueue` says.
        """
        return await self.options().enqueue(*args, **kwargs)

    def options(
        self: "TaskFunction[P, R | Failure | Cancelled]",
        *,
        id: str | None = None,
        priority: int | None = None,
        delay: float | None = None,
        start_at_ms: int | None = None,
        retry: RetryPolicy | None = None,
        tenant: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> "TaskCall[P, R]":
        """The task with options for one job, or for several: `await task.options(delay=60).enqueue(...)`.

        Args:
            id: a second job of the tenant with the same id is refused.
            priority: 0 runs first, 99 last.
            delay: seconds from now.
            start_at_ms: earliest start, epoch milliseconds, instead of `delay`.
            tenant: instead of the app's.
            metadata: labels, beside the one that names the task.
        """
        return TaskCall(
            self,
            id=id,
            priority=self.declared.priority if priority is None else priority,
            delay=delay,
            start_at_ms=start_at_ms,
            retry=self.declared.retry if retry is None else retry,
            tenant=tenant,
            metadata=metadata or {},
        )

    @property
    def sync(self: "TaskFunction[P, R | Failure | Cancelled]") -> "BlockingTaskCall[P, R]":
        """The task for code that waits, as in Django and Flask: `task.sync.enqueue(...)`."""
        return self.options().sync

    def handle(
        self: "TaskFunction[..., R | Failure | Cancelled]", id: str, tenant: str | None = None
    ) -> TaskHandle[R]:
        """A handle on a job of this task that was enqueued earlier, here or elsewhere; nothing is sent.

        Args:
            tenant: the app's if left out.
        """
        return TaskHandle(
            self.connection.client(),
            id,
            tenant or self.connection.tenant,
            task=self.name,
            result_type=self.signature.result,
        )

    def limits(self, function: Callable[P, Sequence[Limit]]) -> Callable[P, Sequence[Limit]]:
        """Declare limits that depend on the arguments, for example one for each user.

        The function is called with the arguments of each `enqueue`. It may leave the ones that it does not
        need to a `**rest: object`. Its limits come after those that the task was declared with.
        """
        self._limits_of = function
        return function

    def limits_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Limit, ...]:
        """The limits of a job with these arguments."""
        if self._limits_of is None:
            return self.declared.limits
        return (*self.declared.limits, *self._limits_of(*args, **kwargs))


AnyTask: TypeAlias = TaskFunction[..., Any]


class AsyncTaskFunction(TaskFunction[P, R_co]):
    """A task whose function is `async def`."""

    @cached_property
    def handler(self) -> Handler:
        return AsyncTaskHandler(self)

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the function here and now, as if it were no task."""
        called: Coroutine[Any, Any, R_co] = self.function(*args, **kwargs)
        return await called


class PlainTaskFunction(TaskFunction[P, R_co]):
    """A task whose function is a plain `def`."""

    @cached_property
    def handler(self) -> Handler:
        return BlockingTaskHandler(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the function here and now, as if it were no task."""
        returned: R_co = self.function(*args, **kwargs)
        return returned


class TaskCall(Generic[P, R]):
    """A task with the options of one call; made by `TaskFunction.options`."""

    def __init__(
        self,
        task: TaskFunction[P, Any],
        *,
        id: str | None,
        priority: int,
        delay: float | None,
        start_at_ms: int | None,
        retry: RetryPolicy | None,
        tenant: str | None,
        metadata: Mapping[str, str],
    ) -> None:
        self.task = task
        self._id = id
        self._priority = priority
        self._delay = delay
        self._start_at_ms = start_at_ms
        self._retry = retry
        self._tenant = tenant
        self._metadata = metadata

    async def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[R]:
        """Like `TaskFunction.enqueue`, with these options."""
        handle = await self.operation(args, kwargs)(self.task.connection.client())
        return self.task.handle(handle.id, handle.tenant)

    @property
    def sync(self) -> "BlockingTaskCall[P, R]":
        """The same for code that waits."""
        from silo.tasks.blocking import BlockingTaskCall  # noqa: PLC0415  # Its thread and fork hooks cost.

        return BlockingTaskCall(self)

    def operation(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[SiloGRPCClient], Coroutine[Any, Any, JobHandle]]:
        """What enqueues a job with these arguments, which are checked now, once there is a client.

        Raises:
            TaskArgumentError: they do not fit.
        """
        task = self.task
        plain = task.signature.arguments_to_plain(args, kwargs)
        limits = task.limits_of(args, kwargs)

        async def enqueue(client: SiloGRPCClient) -> JobHandle:
            try:
                return await client.enqueue(
                    payload=plain,
                    task_group=task.declared.task_group,
                    id=self._id,
                    priority=self._priority,
                    delay=self._delay,
                    start_at_ms=self._start_at_ms,
                    retry_policy=self._retry,
                    limits=limits,
                    tenant=self._tenant or task.connection.tenant,
                    metadata={**self._metadata, TASK_KEY: task.name},
                )
            except PayloadError as error:
                raise task.signature.blame(plain, error) from None

        return enqueue
