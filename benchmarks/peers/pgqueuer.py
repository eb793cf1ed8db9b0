"""PgQueuer on PostgreSQL."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgPoolDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

from benchmarks.peers.peer import CONCURRENCY, BulkPeer, batches
from benchmarks.tally import handle


class PgQueuerPeer(BulkPeer):
    label = "PgQueuer"
    broker = "postgres"
    packages = ("pgqueuer", "asyncpg")
    settings = "`batch_size` 10; bulk: `enqueue` of 200; keeps no results"
    worker_killed = "runs again after 30 s without a sign of the worker"
    calls_at_a_time = 10
    batch_size = CONCURRENCY

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        async with asyncpg.create_pool(self.address) as self._pool:
            self._queries = Queries(AsyncpgPoolDriver(self._pool))
            await self._queries.install()
            yield

    async def enqueue(self, payload: str) -> None:
        await self._queries.enqueue("handle", payload.encode())

    async def enqueue_bulk(self, payloads: Sequence[str]) -> None:
        for batch in batches(payloads):
            await self._queries.enqueue(
                ["handle"] * len(batch), [payload.encode() for payload in batch], [0] * len(batch)
            )

    async def settle(self) -> None:
        await self._pool.execute("ANALYZE")

    def work(self) -> None:
        uvloop.run(self._work())

    async def _work(self) -> None:
        async with asyncpg.create_pool(self.address) as pool:
            queuer = PgQueuer(AsyncpgPoolDriver(pool))

            @queuer.entrypoint("handle")
            async def run(job: Job) -> None:
                handle(job.payload.decode())

            await queuer.run(batch_size=self.batch_size)


PEER = PgQueuerPeer
