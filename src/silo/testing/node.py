"""What runs in the thread of a test server: shards in memory on a virtual clock, behind a real socket."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from random import Random

import msgspec

from silo.errors import ShardClosed
from silo.model.job import JobState
from silo.model.shards import ShardInfo, initial_ranges
from silo.model.task import Leased
from silo.node.hosting import HostedNode
from silo.node.layout import LAYOUT_VERSION, Layout
from silo.rpc.server import listen
from silo.shard.shard import ShardOptions
from silo.storage.memory import MemoryStorage
from silo.testing.clock import SteppingClock
from silo.uuids import uuid_text

_ADDR = "127.0.0.1:0"
_SHOWN = 3  # Tasks that a text names.


class GroupLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to do in a task group now."""

    leased: int = 0  # Tasks that somebody has.
    due: int = 0  # Tasks that nobody has taken; at least one while the server has not looked yet.
    some_due: tuple[str, ...] = ()  # What they are.

    @property
    def is_idle(self) -> bool:
        return not self.leased and not self.due

    def __str__(self) -> str:
        named = f" ({', '.join(self.some_due)}{', …' if self.due > len(self.some_due) else ''})"
        return f"{self.leased} leased, {self.due} due{named if self.some_due else ''}"


class JobCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many jobs there are."""

    total: int
    ended: int


class _Node(HostedNode):
    """Polls wait in real time: the virtual clock may stand still until they are given up."""

    is_ending = False

    async def lease_anywhere(
        self, *, worker_id: str, task_group: str, max_tasks: int, wait_ms: int
    ) -> list[tuple[str, Leased]]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_ms / 1000
        while True:
            woken = asyncio.Event()
            with ExitStack() as watching:
                for shard in self.open_shards():
                    watching.callback(shard.on_work(task_group, woken.set))
                taken = await super().lease_anywhere(
                    worker_id=worker_id, task_group=task_group, max_tasks=max_tasks, wait_ms=0
                )
                if taken or max_tasks < 1 or self.is_ending or loop.time() >= deadline:
                    return taken
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        await woken.wait()

    def end_waits(self) -> None:
        self.is_ending = True
        super().end_waits()


class TimedNode:
    """A node and its clock. Everything but `now_ms` is called from the node's event loop."""

    def __init__(self, node: HostedNode, clock: SteppingClock, address: str) -> None:
        self._node = node
        self._clock = clock
        self.address = address

    def now_ms(self) -> int:
        """The time on the clock. Any thread may ask."""
        return self._clock.now_ms()

    async def advance(self, until_ms: int) -> None:
        """Move the clock, and do what becomes due at its own time, in order."""
        while True:
            await self.step(until_ms)
            if self.now_ms() >= until_ms:
                return

    async def step(self, until_ms: int) -> int:
        """Move the clock to the next time at which something is due, at most until then; the time now."""
        self._clock.set_ms(self._clock.next_stop_ms(until_ms))
        # Before the shards see the new time: whoever is connected does not lose a lease by our moving it.
        self._node.sessions.renew()
        await self._do_what_is_due()
        return self.now_ms()

    async def _do_what_is_due(self) -> None:
        for shard in self._node.open_shards():
            with suppress(ShardClosed):
                await shard.tick()

    async def load(self, task_groups: Iterable[str]) -> dict[str, GroupLoad]:
        """What there is to do in these task groups, once all that is due was done."""
        await self._do_what_is_due()
        return {name: self._load_of(name) for name in task_groups}

    def _load_of(self, task_group: str) -> GroupLoad:
        leased = due = 0
        some_due: list[str] = []
        for shard in self._node.open_shards():
            leased += shard.facts().leases.get(task_group, 0)
            queue = shard.queue(task_group)
            if queue is not None and queue.is_empty:
                continue
            tasks = [] if queue is None else queue.preview(1000)
            due += max(1, len(tasks))  # Without a queue, or with one that is being read, there may be some.
            some_due += [
                f"job {task.job_id}" if isinstance(task, JobState) else f"refresh of {task.key}"
                for task in tasks
            ]
        return GroupLoad(leased=leased, due=due, some_due=tuple(some_due[:_SHOWN]))

    async def counts(self) -> JobCounts:
        counts = [shard.counts for shard in self._node.open_shards()]
        return JobCounts(
            total=sum(shard.total_jobs for shard in counts),
            ended=sum(shard.completed_jobs for shard in counts),
        )


@asynccontextmanager
async def timed_node(
    *, shards: int, tenancy: bool, start_at_ms: int, rng: Random
) -> AsyncIterator[TimedNode]:
    """A server on a free loopback port while the block runs."""
    clock = SteppingClock(start_at_ms)
    node = _Node(
        Layout(version=LAYOUT_VERSION, node_id="test-node", shards=_shard_infos(shards, rng)),
        advertised_addr=_ADDR,
        tenancy_enabled=tenancy,
        dev_mode=True,
        storage=MemoryStorage(),
        clock=clock,
        rng=rng,
        options=ShardOptions(),
    )
    try:
        await node.start()
        async with listen(_ADDR, node) as address:
            node.advertised_addr = address
            yield TimedNode(node, clock, address)
            node.end_waits()  # Streams and polls come to their ends now; nothing is left to be waited for.
    finally:
        await node.close()


def _shard_infos(count: int, rng: Random) -> tuple[ShardInfo, ...]:
    return tuple(
        ShardInfo(uuid_text(rng.getrandbits(128), version=4), range) for range in initial_ranges(count)
    )
