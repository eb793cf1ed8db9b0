"""taskiq on Redis streams."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvloop
from taskiq.api import run_receiver_task
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from benchmarks.peers.peer import CONCURRENCY, Peer
from benchmarks.tally import handle_async


class TaskiqPeer(Peer):
    label = "taskiq"
    broker = "redis"
    packages = ("taskiq", "taskiq-redis", "redis")
    settings = "`RedisStreamBroker`, results in Redis"
    worker_killed = "runs again after 10 min"
    calls_at_a_time = 20

    def __init__(self, address: str) -> None:
        super().__init__(address)
        results = RedisAsyncResultBackend(redis_url=address)
        self._broker = RedisStreamBroker(url=address).with_result_backend(results)
        self._task = self._broker.task(task_name="handle")(handle_async)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        await self._broker.startup()
        try:
            yield
        finally:
            await self._broker.shutdown()

    async def enqueue(self, payload: str) -> None:
        await self._task.kiq(payload)

    def work(self) -> None:
        self._broker.is_worker_process = True
        uvloop.run(run_receiver_task(self._broker, max_async_tasks=CONCURRENCY, run_startup=True))


PEER = TaskiqPeer
