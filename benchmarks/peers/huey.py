"""Huey on Redis."""

from huey import RedisHuey

from benchmarks.peers.peer import CONCURRENCY, Peer
from benchmarks.tally import handle


class HueyPeer(Peer):
    label = "Huey"
    broker = "redis"
    packages = ("huey", "redis")
    settings = "10 threads, results in Redis"
    worker_killed = "is lost"
    calls_at_a_time = 1

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._huey = RedisHuey("comparison", url=address)
        self._task = self._huey.task(name="handle")(handle)

    async def enqueue(self, payload: str) -> None:
        self._task(payload)

    def work(self) -> None:
        self._huey.create_consumer(workers=CONCURRENCY, worker_type="thread", periodic=False).run()


PEER = HueyPeer
