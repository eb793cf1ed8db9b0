"""JobHandle: one job, from the side of whoever enqueued it."""

import asyncio
from typing import TYPE_CHECKING, Any

from silo.client.errors import JobNotTerminalError, JobTimeoutError
from silo.client.types import Job, JobResult, JobStatus
from silo.client.watching import WatchUnsupported

if TYPE_CHECKING:
    from silo.client.client import SiloGRPCClient

_POLL_S_FIRST, _POLL_S_MAX = 0.02, 0.5
_LOOK_S = 5.0  # How long an answer may take although the time is up.


class _TooSlow(Exception):
    """The server did not answer in time."""


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
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        if timeout is None or timeout > 0:
            try:
                async with asyncio.timeout_at(deadline) as scope:
                    return await self._client.wait_for_result(self.id, self.tenant)
            except WatchUnsupported:
                pass
            except TimeoutError as error:
                if not scope.expired():
                    raise
                raise JobTimeoutError(self.id, round((timeout or 0) * 1000)) from error
        return await self._poll(timeout, deadline)

    async def _poll(self, timeout: float | None, deadline: float | None) -> JobResult[Any]:
        """Look again and again."""
        loop = asyncio.get_running_loop()
        pause_s = _POLL_S_FIRST
        while True:
            try:
                return await self._look(deadline)
            except (JobNotTerminalError, _TooSlow) as error:
                left_s = None if deadline is None else deadline - loop.time()
                if left_s is not None and left_s <= 0:
                    raise JobTimeoutError(self.id, round((timeout or 0) * 1000)) from error
            await asyncio.sleep(pause_s if left_s is None else min(pause_s, left_s))
            pause_s = min(1.5 * pause_s, _POLL_S_MAX)

    async def _look(self, deadline: float | None) -> JobResult[Any]:
        """One look, which must not take much longer than the caller wants to wait."""
        if deadline is None:
            return await self._client.get_job_result(self.id, self.tenant)
        grace_end = asyncio.get_running_loop().time() + _LOOK_S
        try:
            async with asyncio.timeout_at(max(deadline, grace_end)) as scope:
                return await self._client.get_job_result(self.id, self.tenant)
        except TimeoutError as error:
            if scope.expired():
                raise _TooSlow from error
            raise

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
