"""Celery on Redis."""

from celery import Celery

from benchmarks.peers.peer import CONCURRENCY, Peer
from benchmarks.tally import handle

_QUIET = ("--without-gossip", "--without-mingle", "--without-heartbeat")


class CeleryPeer(Peer):
    label = "Celery"
    broker = "redis"
    packages = ("celery", "kombu", "redis")
    settings = "10 threads, `task_acks_late`, no gossip, mingle or heartbeat"
    worker_killed = "runs again after the visibility timeout of 1 h"
    calls_at_a_time = 1

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._app = Celery("comparison", broker=address, backend=address)
        self._app.conf.update(task_acks_late=True)
        self._task = self._app.task(name="handle")(handle)

    async def enqueue(self, payload: str) -> None:
        self._task.delay(payload)

    def work(self) -> None:
        threads = ("--pool", "threads", "--concurrency", str(CONCURRENCY))
        self._app.worker_main(["worker", "--loglevel", "ERROR", *threads, *_QUIET])


PEER = CeleryPeer
