"""Keeps the shards of this node open: opens, reopens after a failure, closes.

Each shard has one task that opens it, waits until it stops and opens it again, later
each time. Nothing else opens or closes shards, so a shard is open at most once. While a
shard is away its callers are told to try again; the other shards do not notice.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from random import Random

from silo.clock import Clock
from silo.errors import Overloaded, ShardClosed, ShardNotFound, SiloError, StoreError, StoreFenced, describe
from silo.model.shards import ShardInfo
from silo.model.task import Leased
from silo.node.layout import Layout, Storage
from silo.node.memory import Memory
from silo.node.sessions import Sessions
from silo.shard.dispatch import Room
from silo.shard.limiter import RateLimiter
from silo.shard.shard import Shard, ShardOptions
from silo.telemetry.logging import Log

REOPEN_DELAY_MIN_S = 0.05
REOPEN_DELAY_MAX_S = 5.0
START_TIMEOUT_S = 30.0  # After it the node serves what is open; the rest goes on opening.
OPEN_TIMEOUT_S = 60.0
READ_PATIENCE_S = 1.0  # How long a poll waits for a shard that reads, with nothing in hand, ...
READ_MORE_PATIENCE_S = 0.05  # ... and with something.
DURABLE_TIMEOUT_S = 5.0  # Of leases, which are 10 s long: those of a slower shard run out.
CLOSE_TIMEOUT_S = 25.0  # With the drain of the listener before it: 30 s in all.
_STEADY_S = 60.0  # A shard that was open this long is reopened after the shortest delay again.

log = Log("silo.node.hosting")


class HostedNode:
    """A node that owns every shard of its data root. Implements `Node`; made by `host_shards`."""

    def __init__(
        self,
        layout: Layout,
        *,
        advertised_addr: str,
        tenancy_enabled: bool,
        dev_mode: bool,
        storage: Storage,
        clock: Clock,
        rng: Random,
        options: ShardOptions,
        limiter: RateLimiter | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.node_id = layout.node_id
        self.advertised_addr = advertised_addr
        self.tenancy_enabled = tenancy_enabled
        self.dev_mode = dev_mode
        self.memory = memory or Memory(None)
        self._shard_map = {info.shard_id: info for info in layout.shards}
        self._storage = storage
        self._clock = clock
        self._rng = rng
        self._options = options
        self._limiter = limiter
        self._open: dict[str, Shard] = {}
        self._opened: dict[Callable[[], None], None] = {}  # Called when a shard has opened.
        self._keepers: list[asyncio.Task[None]] = []
        self._stop = asyncio.Event()
        self.stopping = asyncio.Event()
        self._turn = asyncio.Lock()  # Held by whoever starts or stops the keepers.
        self._reset: asyncio.Task[int] | None = None
        self.sessions = Sessions(shard=self.shard, open_shards=self.open_shards)

    def __repr__(self) -> str:
        return f"HostedNode({self.node_id}, {len(self._open)} of {len(self._shard_map)} shards open)"

    @property
    def _is_closing(self) -> bool:
        return self.stopping.is_set()

    def shard_map(self) -> Sequence[ShardInfo]:
        return list(self._shard_map.values())

    def shard(self, shard_id: str) -> Shard:
        """The open shard `shard_id`.

        Raises:
            ShardNotFound: there is no such shard.
            ShardClosed: it is being opened; try again.
        """
        shard = self._open.get(shard_id)
        if shard is not None:
            return shard
        if shard_id not in self._shard_map:
            raise ShardNotFound(shard_id)
        raise ShardClosed("shard not ready: acquisition in progress", shard=shard_id)

    def open_shards(self) -> Sequence[Shard]:
        return list(self._open.values())

    async def lease_anywhere(
        self, *, worker_id: str, task_group: str, max_tasks: int, wait_ms: int
    ) -> list[tuple[str, Leased]]:
        """Lease up to `max_tasks` tasks with the ids of their shards, waiting up to `wait_ms` for the first.

        Shards are asked in random order, and one that fails is passed over. A caller that
        goes away while it waits leaves nothing behind; tasks it had already taken run into
        their leases' ends.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_ms / 1000  # Callers wait, whatever the clock of the jobs does.
        taken = await self._lease_ready(worker_id, task_group, max_tasks)
        while not taken and max_tasks > 0 and not self._is_closing and loop.time() < deadline:
            woken = asyncio.Event()
            with ExitStack() as watching:
                # Watch first and look afterwards: work that comes in between is not missed.
                self._opened[woken.set] = None
                watching.callback(self._opened.pop, woken.set)
                for shard in self._open.values():
                    watching.callback(shard.on_work(task_group, woken.set))
                watching.callback(loop.call_at(deadline, woken.set).cancel)
                taken = await self._lease_ready(worker_id, task_group, max_tasks)
                if not taken:
                    await woken.wait()
        return taken

    async def _lease_ready(self, worker_id: str, task_group: str, max_tasks: int) -> list[tuple[str, Leased]]:
        """What the shards have, without waiting long for one that does not answer."""
        room = Room(max_tasks)
        taken: dict[Shard, list[Leased]] = {}
        while not room.is_full:
            reading: set[asyncio.Task[None]] = set()
            for shard in self._rng.sample(list(self._open.values()), len(self._open)):
                with suppress(ShardClosed, StoreError, Overloaded):
                    tasks, feeding = shard.take_loaded(worker_id=worker_id, task_group=task_group, room=room)
                    if tasks:
                        taken.setdefault(shard, []).extend(tasks)
                    if feeding is not None:
                        reading.add(feeding)
            if not reading:
                break
            patience_s = READ_PATIENCE_S if not taken else READ_MORE_PATIENCE_S
            read, _ = await asyncio.wait(reading, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if not read:
                break
        return await _once_durable(taken) if taken else []

    async def reset_shards(self) -> int:
        """Delete everything in all shards; how many were emptied. Goes on when the caller does not.

        Raises:
            StoreError: the storage failed; some shards may be emptied and some not.
            ShardClosed: the node stops; nothing was deleted.
        """
        if self._is_closing:
            raise ShardClosed("the node stops")
        if self._reset is None or self._reset.done():
            self._reset = asyncio.create_task(self._empty(), name="reset shards")
        return await asyncio.shield(self._reset)

    async def _empty(self) -> int:
        async with self._turn:
            await self._stop_keepers()
            try:
                for shard_id in self._shard_map:
                    await self._storage.destroy(shard_id)
            finally:
                if not self._is_closing:
                    await self._start_keepers()
        return len(self._shard_map)

    # Life cycle

    async def start(self) -> None:
        """Begin to open all shards; return once each was opened or has failed once.

        A shard that does neither keeps the others waiting for `START_TIMEOUT_S` at most.
        A node that was closed stays closed.
        """
        async with self._turn:
            if not self._is_closing and not self._keepers:
                await self._start_keepers()

    def end_waits(self) -> None:
        """Let everyone who waits for work in any shard go home, now and from now on."""
        self.stopping.set()
        self.sessions.close()
        for wake in list(self._opened):
            wake()
        for shard in self._open.values():
            shard.end_waits()

    async def close(self) -> None:
        """Close all shards. What was acknowledged is durable either way. Closing twice is harmless."""
        self.end_waits()
        await self.sessions.wait_closed()
        async with self._turn:
            await self._stop_keepers()
        if self._reset is not None:
            await asyncio.wait({self._reset})

    async def _start_keepers(self) -> None:
        self._stop = asyncio.Event()
        tried = []
        for info in self._shard_map.values():
            first = asyncio.Event()
            keeper = self._keep_open(info, Random(self._rng.getrandbits(128)), self._stop, first)
            self._keepers.append(asyncio.create_task(keeper, name=f"keep open {info.shard_id}"))
            tried.append(asyncio.create_task(first.wait()))
        try:
            await asyncio.wait(tried, timeout=START_TIMEOUT_S)
        finally:
            for waiting in tried:
                waiting.cancel()

    async def _stop_keepers(self) -> None:
        self._stop.set()
        if self._keepers:
            _, late = await asyncio.wait(self._keepers, timeout=CLOSE_TIMEOUT_S)
            for keeper in late:
                log.error("shard did not close in time", task=keeper.get_name())
                keeper.cancel()
            if late:
                await asyncio.wait(late, timeout=1.0)
        self._keepers.clear()

    async def _keep_open(
        self, info: ShardInfo, rng: Random, stop: asyncio.Event, first: asyncio.Event
    ) -> None:
        loop = asyncio.get_running_loop()
        shard_log = log.bind(node_id=self.node_id, shard_id=info.shard_id)
        delay_s = REOPEN_DELAY_MIN_S
        while not stop.is_set():
            began_s = loop.time()
            trouble: BaseException | None
            trace: BaseException | None = None
            try:
                trouble = await self._host(info, rng, stop, first)
                is_fenced = isinstance(trouble, StoreFenced)
                message = f"shard {'taken by another writer' if is_fenced else 'stopped'}: reopening"
            except (SiloError, OSError, TimeoutError) as error:
                trouble = error
                message = "shard not opened or closed cleanly: trying again"
            except Exception as error:  # The outermost edge of a shard's life: the others go on.
                trouble = trace = error
                message = "shard failed: trying again"
            finally:
                first.set()
            if loop.time() - began_s >= _STEADY_S:
                delay_s = REOPEN_DELAY_MIN_S
            if trouble is not None:
                again_in_ms = round(delay_s * 1000)
                shard_log.error(message, reason=describe(trouble), again_in_ms=again_in_ms, exc_info=trace)
            await _set_within(stop, delay_s)
            delay_s = min(REOPEN_DELAY_MAX_S, 2 * delay_s)

    async def _host(
        self, info: ShardInfo, rng: Random, stop: asyncio.Event, first: asyncio.Event
    ) -> BaseException | None:
        """Serve one shard until it or the node stops; the failure that stopped it, if one did."""
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            store = await self._storage.open(info.shard_id)
        shard = await Shard.open(
            shard_id=info.shard_id,
            range=info.range,
            store=store,
            clock=self._clock,
            rng=rng,
            options=self._options,
            limiter=self._limiter,
        )
        closed = asyncio.create_task(shard.wait_closed(), name=f"watch {info.shard_id}")
        stopping = asyncio.create_task(stop.wait(), name=f"stop {info.shard_id}")
        try:
            self._open[info.shard_id] = shard
            self.sessions.shard_opened(shard)
            first.set()
            for wake in list(self._opened):
                wake()
            await asyncio.wait({closed, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._open[info.shard_id]
            self.sessions.shard_closed()
            closed.cancel()
            stopping.cancel()
            await asyncio.wait({closed, stopping})
            await shard.close()
        return None if closed.cancelled() else closed.result()


async def _once_durable(taken: dict[Shard, list[Leased]]) -> list[tuple[str, Leased]]:
    """The tasks whose leases are durable soon enough to be worth anything. Nobody was told of the others."""
    waits = {asyncio.ensure_future(shard.durable()): shard for shard in taken}
    try:
        done, _ = await asyncio.wait(waits, timeout=DURABLE_TIMEOUT_S)
    finally:
        for wait in waits:
            wait.cancel()
    kept = [shard for wait, shard in waits.items() if wait in done and wait.exception() is None]
    return [(shard.shard_id, task) for shard in kept for task in taken[shard]]


@asynccontextmanager
async def host_shards(
    layout: Layout,
    *,
    advertised_addr: str,
    tenancy_enabled: bool,
    dev_mode: bool,
    storage: Storage,
    clock: Clock,
    rng: Random,
    options: ShardOptions,
    limiter: RateLimiter | None = None,
    memory: Memory | None = None,
) -> AsyncIterator[HostedNode]:
    """Host the shards of `layout` while the block runs; see `Shard.open` for the `limiter`."""
    node = HostedNode(
        layout,
        advertised_addr=advertised_addr,
        tenancy_enabled=tenancy_enabled,
        dev_mode=dev_mode,
        storage=storage,
        clock=clock,
        rng=rng,
        options=options,
        limiter=limiter,
        memory=memory,
    )
    try:
        await node.start()
        yield node
    finally:
        await node.close()


async def _set_within(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
