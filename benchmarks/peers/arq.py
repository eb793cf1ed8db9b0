"""arq on Redis."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvloop
from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import Worker, func

from benchmarks.peers.peer import CONCURRENCY, Peer
from benchmarks.tally import handle

_POLL_DELAY_S = 0.01  # By default 0.5, which would be all that latency shows.


async def _handler(ctx: object, payload: str) -> str:
    return handle(payload)


class ArqPeer(Peer):
    label = "arq"
    broker = "redis"
    packages = ("arq", "redis")
    settings = "`poll_delay` 0.01 s (default 0.5)"
    worker_killed = "runs again after its timeout of 300 s"
    calls_at_a_time = 20

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        self._pool = await create_pool(RedisSettings.from_dsn(self.address))
        try:
            yield
        finally:
            await self._pool.aclose()

    async def enqueue(self, payload: str) -> None:
        await self._pool.enqueue_job("handle", payload)

    def work(self) -> None:
        uvloop.run(self._work())

    async def _work(self) -> None:
        worker = Worker(
            [func(_handler, name="handle")],
            redis_settings=RedisSettings.from_dsn(self.address),
            max_jobs=CONCURRENCY,
            poll_delay=_POLL_DELAY_S,
        )
        await worker.async_run()


PEER = ArqPeer
