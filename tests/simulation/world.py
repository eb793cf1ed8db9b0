"""One simulated run: a server that crashes, clients that ask for much, workers that come and go.

Every commit of the server is held against the invariants of `tests/invariants.py`; every answer that
a client or worker gets is noted in the history and held against what the snapshots say.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from random import Random
from typing import Any  # Messages of grpc are untyped.

import grpc
import msgspec

from silo.engine.retention import Retention
from silo.model.job import DEFAULT_TENANT
from silo.model.limit import RateLimit
from silo.model.shards import ShardInfo, hash_tenant, initial_ranges
from silo.node.hosting import host_shards
from silo.node.layout import LAYOUT_VERSION, Layout
from silo.rpc.ext_handlers import SiloExtServicer
from silo.rpc.handlers import SiloServicer
from silo.shard.limiter import RateLimiter
from silo.shard.shard import ShardOptions
from silo.storage.memory import MemoryStorage
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.invariants import Name, Stored, check_grants, check_snapshot, check_step
from tests.simulation.loop import Process, SimulatedClock, SimulatedLoop, start
from tests.simulation.network import Failed, Network, Server, Weather
from tests.simulation.storage import Disk, SimulatedStorage

UNKNOWN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
"""What these say: it may have happened or not."""

BUSY = grpc.StatusCode.RESOURCE_EXHAUSTED


class Event(msgspec.Struct, frozen=True):
    """One line of a history."""

    at_s: float
    who: str
    what: str

    def __str__(self) -> str:
        return f"{self.at_s:10.4f}  {self.who:10}  {self.what}"


class Broken(AssertionError):
    """Something that must hold did not."""


class World:
    """What a scenario plays in."""

    def __init__(
        self,
        seed: str,
        *,
        weather: Weather,
        disk: Disk,
        shards: int = 1,
        tenants: Sequence[str] = (DEFAULT_TENANT,),
        retention: Retention | None = None,
        limiter: RateLimiter | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        self.loop = loop
        self.clock = SimulatedClock(loop)
        self.seed = seed
        self.disk = disk
        self.tenants = tenants
        self.network = Network(self.rng("network"), weather)
        self.history: list[Event] = []
        self.were_dropped = False  # Tickets were taken away by force.
        self.is_calm = False  # The faults have ended.
        self.problems: list[BaseException] = []
        self._shared = MemoryStorage()
        self.options = ShardOptions(store_timeout_s=3.0, retention=retention or Retention())
        self._limiter = limiter
        ranges = initial_ranges(shards)
        names = [f"{number:08x}-0000-4000-8000-000000000000" for number in range(shards)]
        self._layout = Layout(
            version=LAYOUT_VERSION,
            node_id="node",
            shards=tuple(ShardInfo(name, part) for name, part in zip(names, ranges, strict=True)),
        )
        self._seen: dict[str, dict[Name, Stored]] = {name: {} for name in names}
        self._hits: dict[tuple[str, str, str], deque[int]] = {}  # When jobs passed rate limits.
        self._servers = 0
        self.commits = 0

    def rng(self, name: str) -> Random:
        """A source of randomness of its own, so that a change in one place changes no other."""
        return Random(f"{self.seed}/{name}")

    def note(self, who: str, what: str) -> None:
        self.history.append(Event(self.loop.now, who, what))

    # The server

    async def start_server(self) -> None:
        """A new server process; one that is still up loses its stores to it."""
        self._servers += 1
        server = Server(Process(f"server {self._servers}"))
        self.note("server", f"starts for the {self._servers}. time")
        self.network.server = server
        start(server.process, self._serve(server), name="main")

    async def _serve(self, server: Server) -> None:
        storage = SimulatedStorage(
            self._shared, self.rng(server.process.name), lambda: self.disk, self._committed
        )
        try:
            async with host_shards(
                self._layout,
                advertised_addr="server:1",
                tenancy_enabled=tuple(self.tenants) != (DEFAULT_TENANT,),
                dev_mode=False,
                storage=storage,
                clock=self.clock,
                rng=self.rng(f"{server.process.name} ids"),
                options=self.options,
                limiter=self._limiter,
            ) as node:
                server.servicer = SiloServicer(node)
                server.extension = SiloExtServicer(node)
                await asyncio.get_running_loop().create_future()
        except Exception as error:
            self.problems.append(error)

    def kill_server(self) -> None:
        """As kill -9 does."""
        server = self.network.server
        if server is not None and not server.process.is_dead:
            self.note("server", "killed")
            server.process.kill()
            server.died.set_result(None)
            self.network.server = None

    def _committed(self, shard: str) -> None:
        """A group is durable: hold it against what must be."""
        self.commits += 1
        rows = self._shared.snapshot(shard)
        try:
            after = check_snapshot(rows, now_ms=self.clock.now_ms(), were_dropped=self.were_dropped)
            before = self._seen[shard]
            check_step(before, after)
            check_grants(before, after, rows, were_dropped=self.were_dropped)
        except AssertionError as error:
            self.note("server", f"commit {self.commits} breaks an invariant: {error!r}")
            self.problems.append(error)
            return
        self._note_changes(before, after)
        self._note_hits(before, after)
        self._seen[shard] = after

    def _note_changes(self, before: dict[Name, Stored], after: dict[Name, Stored]) -> None:
        for name, job in after.items():
            old = before.get(name)
            if old is None or old.state != job.state:
                state = job.state
                held = ",".join(holder.key for holder in state.held)
                self.note("commit", f"{name[1]} {state.status.label} {state.pending or ''} holds [{held}]")
        for name in before.keys() - after.keys():
            self.note("commit", f"{name[1]} deleted")

    def _note_hits(self, before: dict[Name, Stored], after: dict[Name, Stored]) -> None:
        """No bucket lets through more than two windows' worth in the time of one (57, RAT-16)."""
        now_ms = self.clock.now_ms()
        for name, job in after.items():
            old = before.get(name)
            is_same = old is not None and old.state.next_attempt_number == job.state.next_attempt_number
            passed = old.state.passed if old is not None and is_same else 0
            for limit in job.state.limits[passed : job.state.passed]:
                if isinstance(limit, RateLimit):
                    hits = self._hits.setdefault((name[0], limit.name, limit.unique_key), deque())
                    hits.append(now_ms)
                    while hits[0] <= now_ms - limit.duration_ms:
                        hits.popleft()
                    if len(hits) > 2 * limit.limit:
                        text = f"{len(hits)} hits of {limit.unique_key} in {limit.duration_ms} ms"
                        self.problems.append(Broken(text))

    @property
    def jobs(self) -> dict[Name, Stored]:
        """Every job as the last commits left it."""
        return {name: job for seen in self._seen.values() for name, job in seen.items()}

    def rows(self) -> list[bytes]:
        """The keys of everything that is stored."""
        return [key for shard in self._seen for key in self._shared.snapshot(shard)]

    def shard_of(self, tenant: str) -> str:
        hashed = hash_tenant(tenant)
        return next(info.shard_id for info in self._layout.shards if info.range.contains(hashed))

    def has_tenancy(self) -> bool:
        return tuple(self.tenants) != (DEFAULT_TENANT,)

    # Clients and workers

    async def call(self, who: str, method: str, request: Any, **options: Any) -> Any:
        """A call over the network, noted in the history.

        Raises:
            Failed: it was not answered, or refused. Nobody ever hears INTERNAL.
        """
        try:
            answer = await self.network.call(who, method, request, **options)
        except Failed as failure:
            self.note(who, f"{method}({_named(request)}) -> {failure}")
            if failure.code not in _EXPECTED:
                self.problems.append(Broken(f"{who}: {method} was answered with {failure}"))
            raise
        self.note(who, f"{method}({_named(request)}) -> ok{_outcome(answer)}")
        return answer

    async def calm(self) -> None:
        """The faults end."""
        self.note("world", "calm")
        self.is_calm = True
        self.disk = Disk()
        self.network.weather = Weather()
        self.network.cut_off.clear()
        if self.network.server is None:
            await self.start_server()

    def check(self) -> None:
        """Raise what went wrong so far."""
        if self.problems:
            raise self.problems[0]

    def require(self, claim: bool, text: str) -> None:
        if not claim:
            self.note("check", text)
            raise Broken(text)


_EXPECTED = {
    *UNKNOWN,
    BUSY,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
}


def _named(request: Any) -> str:
    for field in ("id", "task_id", "task_group"):
        if getattr(request, field, ""):
            return str(getattr(request, field))
    return ""


def _outcome(answer: Any) -> str:
    if isinstance(answer, pb.LeaseTasksResponse):
        tasks = [f"{task.job_id}/{task.attempt_number}" for task in answer.tasks]
        refreshes = [task.queue_key for task in answer.refresh_tasks]
        return f" {tasks}{' refreshes ' + str(refreshes) if refreshes else ''}"
    return ""
