"""RQ on Redis."""

from collections.abc import Sequence

from redis import Redis
from rq import Queue, SimpleWorker

from benchmarks.peers.peer import BulkPeer, batches
from benchmarks.tally import handle


class RqPeer(BulkPeer):
    label = "RQ"
    broker = "redis"
    packages = ("rq", "redis")
    settings = "`SimpleWorker`: no fork, one job at a time; bulk: `enqueue_many` of 200"
    worker_killed = "fails as abandoned, unless it has retries"
    calls_at_a_time = 1

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._redis = Redis.from_url(address)
        self._queue = Queue(connection=self._redis)

    async def enqueue(self, payload: str) -> None:
        self._queue.enqueue(handle, payload)

    async def enqueue_bulk(self, payloads: Sequence[str]) -> None:
        for batch in batches(payloads):
            self._queue.enqueue_many([Queue.prepare_data(handle, args=(payload,)) for payload in batch])

    def work(self) -> None:
        SimpleWorker([self._queue], connection=self._redis).work()


PEER = RqPeer
