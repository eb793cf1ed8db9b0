"""SAQ on Redis."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvloop
from saq import Queue, Worker

from benchmarks.peers.peer import CONCURRENCY, Peer
from benchmarks.tally import handle


async def _handler(ctx: object, *, payload: str) -> str:
    return handle(payload)


class SaqPeer(Peer):
    label = "SAQ"
    broker = "redis"
    packages = ("saq", "redis")
    settings = "defaults"
    worker_killed = "is aborted within 70 s, unless it has retries"
    calls_at_a_time = 20

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        self._queue = Queue.from_url(self.address)
        await self._queue.connect()
        try:
            yield
        finally:
            await self._queue.disconnect()

    async def enqueue(self, payload: str) -> None:
        await self._queue.enqueue("handle", payload=payload)

    def work(self) -> None:
        uvloop.run(self._work())

    async def _work(self) -> None:
        queue = Queue.from_url(self.address)
        await Worker(queue, functions=[("handle", _handler)], concurrency=CONCURRENCY).start()


PEER = SaqPeer
