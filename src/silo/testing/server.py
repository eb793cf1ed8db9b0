"""Server: a real server for tests, whose time only passes when the test says so."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Protocol, TypeVar

from silo.client.client import SiloGRPCClient
from silo.client.handle import JobHandle
from silo.client.types import Job, JobStatus
from silo.clock import SystemClock
from silo.sync.loop_thread import LoopThread
from silo.testing.client import JobIds, TimedClient
from silo.testing.node import GroupLoad, TimedNode, timed_node

T = TypeVar("T")
Loads = dict[str, GroupLoad]

PATIENCE_S = 1.0
_STOP_S = 30.0
_LOOK_S_MIN, _LOOK_S_MAX = 0.001, 0.02


class Worker(Protocol):
    """What a test server needs of a worker. `SiloWorker` and the worker of an `App` are such."""

    @property
    def task_groups(self) -> Sequence[str]:
        """The task groups that it works on."""

    async def __aenter__(self) -> object:
        """Start."""

    async def stop(self, timeout: float = ...) -> None:
        """Take no more tasks, and wait so many seconds at most for those that run."""


class NotIdle(TimeoutError):
    """There was still something to do; the text says what."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a run changed."""

    ended: int  # How many more jobs have ended than before.
    waiting: int  # How many have not: they are not due, wait for a limit, or belong to other workers.


class Server:
    """A server with its own clock; made by `silo.testing.server()`.

    It is a real one, in a thread of its own: calls pass through gRPC and a socket, and only the store is kept
    in memory. Its clock stands still until `advance` moves it. Delays, backoffs, rate limits, leases and the
    times that jobs carry all go by this clock. How long a handler runs does not, nor do timeouts of calls.
    """

    def __init__(self, thread: LoopThread[TimedNode], new_id: JobIds) -> None:
        """Use `silo.testing.server`."""
        self._thread = thread
        self._node = thread.entered
        self._new_id = new_id
        self._running: list[Worker] = []
        self.client: SiloGRPCClient = self.connect()

    def __repr__(self) -> str:
        return f"Server({self.address}, {self.now().isoformat()})"

    @property
    def address(self) -> str:
        """`host:port`."""
        return self._node.address

    def connect(self) -> SiloGRPCClient:
        """One more client, for another event loop for example. It is the caller's, who closes it.

        Clients of this server take `delay` by its clock, and draw ids that let jobs run in the order in which
        they are enqueued. A client that you make yourself takes `delay` by the clock on the wall.
        """
        return TimedClient(self.address, now_ms=self._node.now_ms, new_id=self._new_id)

    # Time

    def now_ms(self) -> int:
        """What the server's clock says, in milliseconds since the Unix epoch."""
        return self._node.now_ms()

    def now(self) -> datetime:
        """What the server's clock says, in UTC."""
        return datetime.fromtimestamp(self.now_ms() / 1000, UTC)

    async def advance(
        self,
        by: timedelta = timedelta(),
        *,
        days: float = 0,
        hours: float = 0,
        minutes: float = 0,
        seconds: float = 0,
        milliseconds: float = 0,
    ) -> None:
        """Move the clock forward by the sum of these.

        It stops wherever something is due, and the server does all of that before time goes on. So jobs
        become due, leases run out and limits let jobs pass at their own times and in order.

        A worker that is connected keeps its leases, however far the clock is moved, and tasks that become due
        go to it. Time does not wait for it, unless it runs by `running`. Tasks that were leased by hand run
        out after 10 s unless somebody sends heartbeats.

        Raises:
            ValueError: it would go back.
        """
        more = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds, milliseconds=milliseconds)
        duration_ms = round((by + more) / timedelta(milliseconds=1))
        if duration_ms < 0:
            raise ValueError(f"time goes forward only, not by {by + more}")
        until_ms = self.now_ms() + duration_ms
        if not self._running:
            await self._call(self._node.advance(until_ms))
            return
        stuck = await self._settle({})
        while await self._call(self._node.step(until_ms)) < until_ms:
            stuck = await self._settle(stuck)
        await self._settle(stuck)

    # Workers

    @asynccontextmanager
    async def running(self, *workers: Worker) -> AsyncIterator[None]:
        """Run workers while the block runs, and let time wait for them.

        In the block `advance` waits wherever it stops until these workers have nothing to do, and that is
        when time goes on. So what handlers do later, such as enqueueing the next job of a chain, happens at
        the right time. A handler that takes longer than one real second is not waited for any more.
        """
        started: list[Worker] = []
        stop_s = PATIENCE_S
        try:
            for worker in workers:
                await worker.__aenter__()
                started.append(worker)
            self._running += workers
            yield
            stop_s = _STOP_S
        finally:
            self._running = [worker for worker in self._running if worker not in started]
            await asyncio.gather(*(worker.stop(stop_s) for worker in started))

    async def run_until_idle(self, *workers: Worker, timeout: float = 10.0) -> Ran:
        """Run workers until no task of theirs is due and none runs; then stop them.

        Without workers it waits for those that `running` runs. The clock stands still meanwhile, so a job
        that fails and is to be repeated after a while is left for a later run.

        Args:
            timeout: real seconds.

        Raises:
            NotIdle: there was still something to do then.
            ValueError: there is no worker.
        """
        if not workers and not self._running:
            raise ValueError("name a worker, or have one running")
        before = await self._call(self._node.counts())
        async with self.running(*workers):
            loads = await self._wait_idle(timeout, {})
            if busy := {name: load for name, load in loads.items() if not load.is_idle}:
                listed = "; ".join(f"{name}: {load}" for name, load in busy.items())
                raise NotIdle(f"not idle after {timeout:g} s: {listed}")
        after = await self._call(self._node.counts())
        return Ran(ended=after.ended - before.ended, waiting=after.total - after.ended)

    async def wait_for(self, job: JobHandle, *statuses: JobStatus, timeout: float = 10.0) -> Job:
        """Wait until a job has one of these statuses; the job as it is then.

        Args:
            timeout: real seconds.

        Raises:
            TimeoutError: it has another one.
            JobNotFoundError: there is no such job (any more).
        """
        deadline = time.monotonic() + timeout
        while True:
            found = await job.job()
            if found.status in statuses:
                return found
            if time.monotonic() >= deadline:
                wanted = " or ".join(statuses)
                raise TimeoutError(f"job {job.id} is {found.status} after {timeout:g} s, not {wanted}")
            await asyncio.sleep(_LOOK_S_MAX)

    async def _settle(self, stuck: Loads) -> Loads:
        """Wait until the workers have nothing to do, or only what they were stuck with; what that is."""
        return await self._wait_idle(PATIENCE_S, stuck)

    async def _wait_idle(self, timeout: float, stuck: Loads) -> Loads:
        """What there is to do for the workers that run: as soon as that is nothing, or when time is up."""
        names = dict.fromkeys(name for worker in self._running for name in worker.task_groups)
        deadline = time.monotonic() + timeout
        pause_s = _LOOK_S_MIN
        while True:
            loads = await self._call(self._node.load(names))
            is_settled = loads == stuck or all(load.is_idle for load in loads.values())
            if is_settled or time.monotonic() >= deadline:
                return loads
            await asyncio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _LOOK_S_MAX)

    async def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something where the server runs."""
        return await asyncio.wrap_future(self._thread.submit(work))


@contextmanager
def started(
    *, shards: int = 1, tenancy: bool = False, start_at: datetime | None = None, seed: int = 0
) -> Iterator[Server]:
    """A server while the block runs, from code that blocks. Its client is left to whoever used it."""
    if start_at is not None and start_at.tzinfo is None:
        raise ValueError("start_at needs a time zone, such as datetime.UTC")
    rng = Random(seed)
    new_id = JobIds(Random(rng.getrandbits(64)))
    start_at_ms = SystemClock().now_ms() if start_at is None else round(start_at.timestamp() * 1000)
    thread = LoopThread(
        "silo.testing",
        around=lambda: timed_node(shards=shards, tenancy=tenancy, start_at_ms=start_at_ms, rng=rng),
    )
    try:
        yield Server(thread, new_id)
    finally:
        thread.stop(_STOP_S)


@asynccontextmanager
async def server(
    *, shards: int = 1, tenancy: bool = False, start_at: datetime | None = None, seed: int = 0
) -> AsyncIterator[Server]:
    """A server for tests while the block runs, with a client that is closed at its end.

    Args:
        shards: how many shards it has.
        tenancy: whether jobs belong to tenants.
        start_at: where its clock begins, with a time zone; the time now if left out.
        seed: ids and other random choices come from it, so that they are the same in each run. Intervals
            of `RetryPolicy` are among them.

    Raises:
        ValueError: there is no shard, or `start_at` has no time zone.
    """
    starting = started(shards=shards, tenancy=tenancy, start_at=start_at, seed=seed)
    running = await asyncio.to_thread(starting.__enter__)
    try:
        yield running
    finally:
        await running.client.close()
        await asyncio.to_thread(starting.__exit__, None, None, None)
