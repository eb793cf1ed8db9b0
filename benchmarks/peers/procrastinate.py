"""Procrastinate on PostgreSQL."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import uvloop
from procrastinate import App, PsycopgConnector

from benchmarks.peers.peer import CONCURRENCY, BulkPeer, batches
from benchmarks.tally import handle_async


class ProcrastinatePeer(BulkPeer):
    label = "Procrastinate"
    broker = "postgres"
    packages = ("procrastinate", "psycopg")
    settings = "`concurrency` 10; bulk: `batch_defer` of 200; keeps no results"
    worker_killed = "stays as it is; a task of the user's own must look for such jobs"
    calls_at_a_time = 10

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._app = App(connector=PsycopgConnector(conninfo=address))
        self._task = self._app.task(name="handle")(handle_async)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        async with self._app.open_async():
            await self._app.schema_manager.apply_schema_async()
            yield

    async def enqueue(self, payload: str) -> None:
        await self._task.defer_async(payload=payload)

    async def enqueue_bulk(self, payloads: Sequence[str]) -> None:
        for batch in batches(payloads):
            await self._task.batch_defer_async(*({"payload": payload} for payload in batch))

    async def settle(self) -> None:
        await self._app.connector.execute_query_async("ANALYZE")

    def work(self) -> None:
        uvloop.run(self._work())

    async def _work(self) -> None:
        async with self._app.open_async():
            await self._app.run_worker_async(concurrency=CONCURRENCY)


PEER = ProcrastinatePeer
