"""SyncServer: the test server for tests that are no coroutines."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from silo.client.client import SiloGRPCClient
from silo.client.types import Job, JobStatus
from silo.sync.client import SiloClient
from silo.sync.handle import JobHandle
from silo.testing.server import Ran, Server, Worker, started


class SyncServer:
    """A server with its own clock, like `silo.testing.Server`; made by `silo.testing.sync_server()`.

    `client` is a `silo.sync.SiloClient`. Workers run in the thread in which its calls run.
    """

    def __init__(self, server: Server) -> None:
        """Use `silo.testing.sync_server`."""
        self._server = server
        self.client = SiloClient.of(server.connect)

    def __repr__(self) -> str:
        return f"Sync{self._server!r}"

    @property
    def address(self) -> str:
        """`host:port`."""
        return self._server.address

    def now_ms(self) -> int:
        """What the server's clock says, in milliseconds since the Unix epoch."""
        return self._server.now_ms()

    def now(self) -> datetime:
        """What the server's clock says, in UTC."""
        return self._server.now()

    def advance(
        self,
        by: timedelta = timedelta(),
        *,
        days: float = 0,
        hours: float = 0,
        minutes: float = 0,
        seconds: float = 0,
        milliseconds: float = 0,
    ) -> None:
        """Move the clock forward by the sum of these; see `Server.advance`."""
        by += timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds, milliseconds=milliseconds)
        self.client.run(lambda _: self._server.advance(by))

    def run_until_idle(self, make: Callable[[SiloGRPCClient], Worker], *, timeout: float = 10.0) -> Ran:
        """Run the worker that `make` makes of a client until no task of its is due and none runs.

        See `Server.run_until_idle`. The client is for the worker and for what its handlers enqueue.
        """
        return self.client.run(lambda client: self._server.run_until_idle(make(client), timeout=timeout))

    def wait_for(self, job: JobHandle, *statuses: JobStatus, timeout: float = 10.0) -> Job:
        """Wait until a job has one of these statuses; see `Server.wait_for`."""

        async def wait(client: SiloGRPCClient) -> Job:
            return await self._server.wait_for(client.handle(job.id, job.tenant), *statuses, timeout=timeout)

        return self.client.run(wait)


@contextmanager
def sync_server(
    *, shards: int = 1, tenancy: bool = False, start_at: datetime | None = None, seed: int = 0
) -> Iterator[SyncServer]:
    """A server for tests that are no coroutines, while the block runs; see `silo.testing.server`."""
    with started(shards=shards, tenancy=tenancy, start_at=start_at, seed=seed) as server:
        running = SyncServer(server)
        try:
            yield running
        finally:
            running.client.close()
