"""JobHandle: one job, from the side of blocking code."""

import functools
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from silo.client.client import SiloGRPCClient
from silo.client.handle import JobHandle as AsyncJobHandle
from silo.client.types import JobResult

if TYPE_CHECKING:
    from silo.sync.client import SiloClient

P = ParamSpec("P")
R = TypeVar("R")


def _blocking(
    method: Callable[Concatenate[AsyncJobHandle, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate["JobHandle", P], R]:
    """The same method, which waits for what it returns."""

    @functools.wraps(method)
    def call(self: "JobHandle", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._client.run(lambda client: method(client.handle(self.id, self.tenant), *args, **kwargs))

    return call


class JobHandle:
    """A job's id and tenant with the client to ask about it. Making one sends nothing.

    Like `silo.JobHandle`, and each method waits for its answer.
    """

    def __init__(self, client: "SiloClient", id: str, tenant: str | None = None) -> None:
        self._client = client
        self.id = id
        self.tenant = tenant

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r}" + (f", tenant={self.tenant!r})" if self.tenant else ")")

    status = _blocking(AsyncJobHandle.status)
    job = _blocking(AsyncJobHandle.job)
    cancel = _blocking(AsyncJobHandle.cancel)
    restart = _blocking(AsyncJobHandle.restart)
    expedite = _blocking(AsyncJobHandle.expedite)
    delete = _blocking(AsyncJobHandle.delete)

    def result(self, timeout: float | None = None) -> JobResult[Any]:
        """Wait until the job has ended. A failed or cancelled job is a result, not an exception.

        Args:
            timeout: seconds; None waits without end, 0 looks once.

        Raises:
            JobTimeoutError: it had not ended by then.
            JobNotFoundError: there is no such job (any more).
        """
        deadline = None if timeout is None else time.monotonic() + timeout

        async def wait(client: SiloGRPCClient) -> JobResult[Any]:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            return await client.handle(self.id, self.tenant).result(left)

        return self._client.run(wait, resumes=True)
