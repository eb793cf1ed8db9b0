"""Silo."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import uvloop

from benchmarks.peers.peer import CONCURRENCY, BulkPeer
from benchmarks.tally import handle
from silo import NewJob, SiloGRPCClient, SiloWorker, TaskContext

_GROUP = "comparison"


async def _handler(ctx: TaskContext[str, dict[str, str]]) -> str:
    return handle(ctx.task.payload)


class SiloPeer(BulkPeer):
    label = "Silo"
    broker = "silo"
    packages = ("slatedb", "grpcio")
    settings = "defaults; bulk: `enqueue_many`"
    worker_killed = "runs again when its lease is out, after 10 s"
    calls_at_a_time = 500

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        async with SiloGRPCClient(servers=[self.address]) as self._client:
            yield

    async def enqueue(self, payload: str) -> None:
        await self._client.enqueue(payload=payload, task_group=_GROUP)

    async def enqueue_bulk(self, payloads: Sequence[str]) -> None:
        async for _ in self._client.enqueue_many(
            NewJob(payload=payload, task_group=_GROUP) for payload in payloads
        ):
            pass

    def work(self) -> None:
        uvloop.run(self._work())

    async def _work(self) -> None:
        async with SiloGRPCClient(servers=[self.address]) as client:
            await SiloWorker(
                client=client,
                worker_id="comparison",
                task_group=_GROUP,
                handler=_handler,
                max_concurrent_tasks=CONCURRENCY,
            ).run()


PEER = SiloPeer
