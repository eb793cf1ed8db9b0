"""Dramatiq on Redis."""

import signal

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from benchmarks.peers.peer import CONCURRENCY, Peer
from benchmarks.tally import handle

_PREFETCH = 500  # By default twice the threads; jobs come out of a backlog faster with more.


class DramatiqPeer(Peer):
    label = "Dramatiq"
    broker = "redis"
    packages = ("dramatiq", "redis")
    settings = "10 threads, `dramatiq_queue_prefetch` 500; keeps no results"
    worker_killed = "runs again after 60 s without a sign of the worker"
    calls_at_a_time = 1

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._broker = RedisBroker(url=address)
        self._actor = dramatiq.actor(handle, broker=self._broker)

    async def enqueue(self, payload: str) -> None:
        self._actor.send(payload)

    def work(self) -> None:
        worker = dramatiq.Worker(self._broker, worker_threads=CONCURRENCY)
        worker.queue_prefetch = _PREFETCH  # As the variable `dramatiq_queue_prefetch` does.
        worker.start()
        signal.pause()


PEER = DramatiqPeer
