"""What state machines about one shard share: the shard on a memory store, virtual time, and tiny memory."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from types import ModuleType
from typing import Any, TypeVar

import pytest
from hypothesis.stateful import RuleBasedStateMachine

from silo.clock import VirtualClock
from silo.engine import limit_chain
from silo.shard import agenda, dispatch, feeder, limits, reader, state, steps, timekeeper, views
from silo.shard import shard as shard_module
from silo.shard.shard import Shard, ShardOptions
from silo.storage import keys
from silo.storage.memory import MemoryStorage
from tests.builders import SHARD, reopened

T = TypeVar("T")

TINY: dict[ModuleType, dict[str, int]] = {
    dispatch: {"RESIDENTS_MAX": 2, "_WINDOW_MIN": 1, "_WINDOW_MAX": 2, "_ROWS_MAX": 4},
    feeder: {
        "_LOOKAHEAD_JOBS": 2,
        "_LOOKAHEAD_BYTES": 20,
        "_REFILL_TENANTS": 1,
        "_PAGE_ROWS": 2,
        "_PAGE_TENANTS": 1,
    },
    reader: {"_REFILL_ROWS": 2},
    agenda: {"WINDOW_ROWS": 4},
    timekeeper: {"_TICK_TASKS": 3, "_TICK_ALARMS": 2},
    state: {"ROWS_MAX": 8},
    limits: {"_WINDOW_MIN": 1, "_WINDOW_MAX": 2, "_ROWS_MAX": 4},
    steps: {"STEP_JOBS_MAX": 1},
    limit_chain: {"MOVES_MAX": 1},
    shard_module: {"_SCAN_ROWS": 2, "_DROP_ROWS": 2},
    views: {"TENANT_COUNTS_MAX": 2, "JOB_CACHE_BYTES_MAX": 1},
}
"""Room for almost nothing in memory, so that nearly all is read again and again."""


@contextmanager
def tiny_memory() -> Iterator[None]:
    """Shards that are opened in the block have next to no memory."""
    with pytest.MonkeyPatch.context() as patches:
        for module, bounds in TINY.items():
            for name, value in bounds.items():
                patches.setattr(module, name, value)
        assert limits.Limits.trim.__kwdefaults__ is not None
        patches.setitem(limits.Limits.trim.__kwdefaults__, "records_max", 2)
        yield


class ShardMachine(RuleBasedStateMachine):
    """Runs one shard, which may crash."""

    options: ShardOptions | None = None
    is_tiny = False
    storage_type: type[MemoryStorage] = MemoryStorage

    def open(self, seed: int) -> None:
        self.bounds = ExitStack()
        if self.is_tiny:
            self.bounds.enter_context(tiny_memory())
        self.loop = asyncio.new_event_loop()
        self.clock = VirtualClock()
        self.storage = self.storage_type()
        self.rng = Random(seed)
        self.shard = self.run(self.reopen())

    def teardown(self) -> None:
        if hasattr(self, "shard"):
            self.run(self.shard.close())
            self.loop.close()
            self.bounds.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 20))

    async def reopen(self) -> Shard:
        return await reopened(self.storage, clock=self.clock, rng=self.rng, options=self.options)

    def reopen_now(self) -> None:
        """The process dies and comes back."""
        old = self.shard
        self.shard = self.run(self.reopen())
        self.run(old.close())

    def facts(self) -> dict[bytes, bytes]:
        """The durable rows, without the floors: those are hints that reading improves."""
        return {
            key: value
            for key, value in self.storage.snapshot(SHARD).items()
            if not key.startswith(keys.FLOORS)
        }
