"""Shards on a memory store and the sessions of workers that are connected to them, without a network."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from random import Random

from silo.clock import VirtualClock
from silo.errors import ShardClosed, ShardNotFound, SiloError
from silo.model.floating import FloatingState
from silo.model.job import DEFAULT_TENANT, JobStatus, NewJob
from silo.node.session import Outbox, Session, task_id_of
from silo.node.sessions import Sessions
from silo.shard.shard import AnyReport, Shard, ShardOptions
from silo.storage.memory import MemoryStorage
from tests.builders import DONE, GROUP, reopened
from tests.invariants import check_snapshot

SHARDS = ("shard-1", "shard-2")


class Worker:
    """The far end of a session: it keeps what it was sent and told."""

    def __init__(self, node: "OneNode", session: Session) -> None:
        self.node = node
        self.session = session
        self.tasks: dict[str, str] = {}  # Task ids by job id, or by the key of a refreshed limit.
        self.order: list[str] = []  # What came, in order.
        self.cancelled: list[str] = []  # Task ids.
        self.lost: list[str] = []
        self.answers: list[tuple[str, SiloError | None]] = []
        self._shards: dict[str, str] = {}

    def read(self) -> "Worker":
        """Take what was written to the stream so far."""
        while self.session.outbox:
            self.take(self.session.take_outbox())
        return self

    def take(self, outbox: Outbox) -> None:
        for task_id, (shard_id, task) in outbox.tasks.items():
            name = task.key if isinstance(task, FloatingState) else task.job.id
            assert task_id == task_id_of(task)
            assert task_id not in self._shards, "sent twice"
            self.tasks[name] = task_id
            self.order.append(name)
            self._shards[task_id] = shard_id
        for task_id in outbox.cancelled:
            assert task_id in self._shards, "a cancellation before its task"
        self.cancelled += outbox.cancelled
        self.lost += outbox.lost
        self.answers += outbox.acknowledged

    @property
    def held(self) -> dict[str, str]:
        """What it names when it comes back."""
        answered = {task_id for task_id, _ in self.answers} | set(self.lost)
        return {task_id: shard for task_id, shard in self._shards.items() if task_id not in answered}

    async def report(self, *names: str, what: AnyReport = DONE) -> None:
        """Report on tasks, all in one message, and read the acknowledgements."""
        self.read()
        by_shard: dict[str, list[tuple[str, AnyReport]]] = {}
        for name in names:
            by_shard.setdefault(self._shards[self.tasks[name]], []).append((self.tasks[name], what))
        for shard_id, reports in by_shard.items():
            await self.session.report(self.node.shard(shard_id), reports)
        self.read()


class OneNode:
    """What a node has of shards and sessions. Shards are opened and closed at will."""

    def __init__(self, options: ShardOptions | None) -> None:
        self.storage = MemoryStorage()
        self.clock = VirtualClock()
        self.sessions = Sessions(shard=self.shard, open_shards=self.open_shards)
        self._options = options
        self._rng = Random(7)
        self._open: dict[str, Shard] = {}

    def shard(self, shard_id: str = SHARDS[0]) -> Shard:
        if shard_id in self._open:
            return self._open[shard_id]
        if shard_id in SHARDS:
            raise ShardClosed("shard not ready", shard=shard_id)
        raise ShardNotFound(shard_id)

    def open_shards(self) -> Sequence[Shard]:
        return list(self._open.values())

    def ids(self) -> set[str]:
        """The shards that are open."""
        return set(self._open)

    async def open(self, shard_id: str = SHARDS[0]) -> Shard:
        """Open a shard; an earlier writer of it loses its store."""
        shard = await reopened(
            self.storage, clock=self.clock, rng=self._rng, name=shard_id, options=self._options
        )
        self._open[shard_id] = shard
        self.sessions.shard_opened(shard)
        return shard

    async def close(self, shard_id: str = SHARDS[0]) -> None:
        shard = self._open.pop(shard_id)
        self.sessions.shard_closed()
        await shard.close()

    def join(
        self,
        session_id: str = "s",
        *,
        window: int = 1,
        slots: int = 1,
        task_groups: Iterable[str] = (GROUP,),
        held: Mapping[str, str] | None = None,
    ) -> Worker:
        """A worker connects, or connects again."""
        session = self.sessions.join(
            session_id=session_id,
            worker_id=f"worker of {session_id}",
            task_groups=task_groups,
            slots=slots,
            held=held or {},
        )
        session.set_window(window)
        return Worker(self, session)

    async def enqueue(self, *jobs: NewJob, shard_id: str = SHARDS[0]) -> None:
        await self.shard(shard_id).enqueue_many(jobs)

    async def settle(self) -> None:
        """Let everyone do what they can: rounds, writes and what follows from them."""
        for _ in range(30):
            await asyncio.sleep(0)
            for shard in self._open.values():
                with suppress(ShardClosed):
                    await shard.durable()

    async def wait(self, duration_ms: int) -> None:
        """Let time pass without a renewal, and all that is due by then happen."""
        self.clock.advance_ms(duration_ms)
        for shard in self.open_shards():
            await shard.tick()
        await self.settle()

    def status(self, job_id: str, *, shard_id: str = SHARDS[0]) -> JobStatus:
        """Where a job is, durably; all that is stored is held against what must hold."""
        jobs = check_snapshot(self.storage.snapshot(shard_id), now_ms=self.clock.now_ms())
        return jobs[DEFAULT_TENANT, job_id].state.status

    def attempts(self, job_id: str, *, shard_id: str = SHARDS[0]) -> int:
        """How many attempts of a job have ended."""
        jobs = check_snapshot(self.storage.snapshot(shard_id))
        return len(jobs[DEFAULT_TENANT, job_id].attempts)


@asynccontextmanager
async def one_node(*, shards: int = 1, options: ShardOptions | None = None) -> AsyncIterator[OneNode]:
    """A node with open shards; all is closed at the end."""
    node = OneNode(options)
    for shard_id in SHARDS[:shards]:
        await node.open(shard_id)
    try:
        yield node
    finally:
        node.sessions.close()
        await node.sessions.wait_closed()
        for shard in node.open_shards():
            await shard.close()
