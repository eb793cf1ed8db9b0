"""JobHandle: one job, from the side of whoever enqueued it."""

import asyncio
from typing import TYPE_CHECKING, Any

from silo.client.errors import JobNotTerminalError, JobTimeoutError
from silo.client.types import Job, JobResult, JobStatus

if TYPE_CHECKING:
    from silo.client.client import SiloGRPCClient

_POLL_S_FIRST, _POLL_S_MAX = 0.02, 0.5


class JobHandle:
    """A job's id and tenant with the client to ask about it. Making one sends nothing."""

    def __init__(self, client: "SiloGRPCClient", id: str, tenant: str | None = None) -> None:
        self._client = client
        self.id = id
        self.tenant = tenant

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r}" + (f", tenant={self.tenant!r})" if self.tenant else ")")

    async def status(self) -> JobStatus:
        """Scheduled, Running, Succeeded, Failed or Cancelled."""
        return await self._client.get_job_status(self.id, self.tenant)

    async def job(self, *, include_attempts: bool = False) -> Job:
        """The whole job."""
        return await self._client.get_job(self.id, self.tenant, include_attempts=include_attempts)

    async def result(self, timeout: float | None = None) -> JobResult[Any]:
        """Wait until the job has ended. A failed or cancelled job is a result, not an exception.

        Args:
            timeout: seconds; None waits without end, 0 looks once.

        Raises:
            JobTimeoutError: it had not ended by then.
            JobNotFoundError: there is no such job (any more).
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        pause = _POLL_S_FIRST
        while True:
            try:
                return await self._client.get_job_result(self.id, self.tenant)
            except JobNotTerminalError as error:
                left = None if deadline is None else deadline - loop.time()
                if left is not None and left <= 0:
                    raise JobTimeoutError(self.id, round((timeout or 0) * 1000)) from error
            await asyncio.sleep(pause if left is None else min(pause, left))
            pause = min(1.5 * pause, _POLL_S_MAX)

    async def cancel(self) -> None:
        """Cancel it: at once if it waits, through its worker if it runs."""
        await self._client.cancel_job(self.id, self.tenant)

    async def restart(self) -> None:
        """Run it again, after it failed or was cancelled."""
        await self._client.restart_job(self.id, self.tenant)

    async def expedite(self) -> None:
        """Make it due now, if it was to start later."""
        await self._client.expedite_job(self.id, self.tenant)

    async def delete(self) -> None:
        """Delete it, after it has ended."""
        await self._client.delete_job(self.id, self.tenant)
