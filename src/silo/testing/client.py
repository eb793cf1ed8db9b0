"""The client of a test server."""

import itertools
from collections.abc import Callable
from random import Random
from typing import Any  # Arguments pass through.

from silo.client.client import SiloGRPCClient
from silo.client.handle import JobHandle
from silo.client.types import ShardRouting
from silo.uuids import uuid_text


class JobIds:
    """Ids in the order in which they are drawn.

    On a clock that stands still jobs come at the same time, and of those with the same priority the smaller
    id runs first. So they run in the order in which they were enqueued.
    """

    def __init__(self, rng: Random) -> None:
        self._numbers = itertools.count(1)
        self._rng = rng

    def __call__(self) -> str:
        return uuid_text(next(self._numbers) << 96 | self._rng.getrandbits(96), version=4)


class TimedClient(SiloGRPCClient):
    """A client for which it is as late as for its server, and whose ids come in order."""

    def __init__(self, address: str, *, now_ms: Callable[[], int], new_id: Callable[[], str]) -> None:
        # Nothing moves in a cluster of one.
        super().__init__(address, shard_routing=ShardRouting(topology_refresh_interval_ms=0))
        self._now_ms = now_ms
        self._new_id = new_id

    async def enqueue(self, **given: Any) -> JobHandle:
        if given.get("delay") is not None and given.get("start_at_ms") is None:
            given["start_at_ms"] = self._now_ms() + round(given.pop("delay") * 1000)
        return await super().enqueue(**{**given, "id": given.get("id") or self._new_id()})
