"""The scenarios: who plays, and how much goes wrong.

`play` runs one scenario with one seed, and raises what was wrong with it. Afterwards the faults end, workers
succeed, and everything that was asked for must come to its end and leave nothing behind.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import msgspec

from silo.engine.outcomes import WORKER_CRASHED
from silo.engine.retention import Retention
from silo.model.attempt import AttemptStatus, Failure
from silo.model.job import DEFAULT_TENANT, LEASE_MS
from silo.model.limit import RateLimit
from silo.shard.limiter import Answer, LimiterFailed
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.property.machine import tiny_memory
from tests.simulation import loop
from tests.simulation.actors import Client, Habits, Mix, Trouble, Workers, make_trouble
from tests.simulation.loop import Process
from tests.simulation.network import Weather
from tests.simulation.storage import Disk
from tests.simulation.world import Event, World

CALM_S = 900.0  # Until all must have ended once the faults are over.
_CALM_HABITS = Habits(
    fail=0, cancelled=0, forget=0, long=0, run_ms=(1, 50), refresh_fail=0, refresh_values=(3,)
)


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of run. Fields can be made smaller to find a shorter history."""

    mix: Mix = Mix()
    habits: Habits = Habits()
    weather: Weather = Weather()
    disk: Disk = Disk()
    trouble: Trouble = Trouble()
    clients: int = 4
    jobs: int = 20  # Of each client.
    workers: int = 4
    shards: int = 1
    tenants: Sequence[str] = (DEFAULT_TENANT,)
    retention: Retention | None = None
    asks_outside: bool = False
    is_tiny: bool = False  # The server has room for almost nothing in memory.


class Played(msgspec.Struct, frozen=True):
    """What became of a run."""

    history: list[Event]
    failure: BaseException | None
    commits: int
    seconds: float  # Of virtual time.


def fixed(key: str, most: int) -> pb.Limit:
    return pb.Limit(concurrency=pb.ConcurrencyLimit(key=key, max_concurrency=most))


def floating(key: str, default: int, interval_ms: int = 3_000) -> pb.Limit:
    return pb.Limit(
        floating_concurrency=pb.FloatingConcurrencyLimit(
            key=key, default_max_concurrency=default, refresh_interval_ms=interval_ms
        )
    )


def rate(key: str, limit: int, duration_ms: int, *, leaky: bool = False, max_retries: int = 0) -> pb.Limit:
    return pb.Limit(
        rate_limit=pb.GubernatorRateLimit(
            name="rate",
            unique_key=key,
            limit=limit,
            duration_ms=duration_ms,
            hits=1,
            algorithm="GUBERNATOR_ALGORITHM_LEAKY_BUCKET" if leaky else "GUBERNATOR_ALGORITHM_TOKEN_BUCKET",
            retry_policy=pb.RateLimitRetryPolicy(
                initial_backoff_ms=100, max_backoff_ms=2_000, backoff_multiplier=2.0, max_retries=max_retries
            ),
        )
    )


_QUEUES = [[], [fixed("mutex", 1)], [fixed("pair", 2)], [fixed("four", 4)], [fixed("wide", 1_000)]]
_TANGLES = [
    [fixed("a", 1), fixed("b", 1)],
    [fixed("b", 1), fixed("a", 1)],
    [fixed("a", 1), fixed("a", 1)],
    [fixed("a", 1)],
    [fixed("c", 2), fixed("b", 1), fixed("a", 1)],
    [fixed("c", 2)],
]
_BAD_WEATHER = Weather(latency_ms=(0.5, 50), loss=0.05, repeats=0.03)

_BASIC: dict[str, Scenario] = {
    "chaos": Scenario(
        mix=Mix(limits=_QUEUES, cancel=0.2, expedite=0.2, restart=0.5),
        weather=_BAD_WEATHER,
        trouble=Trouble(partitions=0.3, worker_kills=0.1, server_kills=0.15),
        tenants=("t1", "t2"),
        shards=2,
    ),
    "concurrency limits": Scenario(
        mix=Mix(limits=[*_QUEUES, *_TANGLES], groups=("g1", "g2")), clients=6, workers=5
    ),
    "grant race": Scenario(
        mix=Mix(limits=[[fixed("five", 5)]], delayed=0, pause_ms=(0, 1), cancel=0, expedite=0),
        habits=Habits(run_ms=(100, 101), long=0, slots=2),
        clients=8,
        jobs=10,
        workers=8,
    ),
    "high latency": Scenario(
        mix=Mix(limits=[*_QUEUES, [fixed("eight", 8)]]), weather=Weather(latency_ms=(50, 500))
    ),
    "high loss": Scenario(
        mix=Mix(limits=_QUEUES), weather=Weather(latency_ms=(0.5, 20), loss=0.15, repeats=0.05)
    ),
    "lease expiry": Scenario(
        mix=Mix(limits=_QUEUES, retries=0.8),
        habits=Habits(forget=0.3),
        trouble=Trouble(worker_kills=0.3),
    ),
    "retry releases tickets": Scenario(
        mix=Mix(limits=[[fixed("mutex", 1)]], retries=1.0, delayed=0, cancel=0),
        habits=Habits(fail=0.6, long=0, run_ms=(5, 100)),
    ),
    "cancel releases tickets": Scenario(
        mix=Mix(limits=[[fixed("mutex", 1)], _TANGLES[4]], cancel=0.6, restart=0.5, pause_ms=(0, 100))
    ),
    "expedite": Scenario(
        mix=Mix(limits=[[fixed("mutex", 1)], []], delayed=0.7, expedite=0.8, retries=0.6),
        habits=Habits(fail=0.4),
    ),
    "floating": Scenario(
        mix=Mix(
            limits=[
                [floating("f", 2)],
                [floating("g", 0, interval_ms=0)],
                [floating("f", 2), fixed("a", 1)],
                [fixed("f", 3)],
            ],
            groups=("g1", "g2"),
        ),
        habits=Habits(long=0, run_ms=(5, 300)),
        trouble=Trouble(worker_kills=0.15, server_kills=0.15),
    ),
    "rate limits": Scenario(
        mix=Mix(
            limits=[
                [rate("token", 3, 1_000)],
                [rate("leaky", 3, 1_000, leaky=True)],
                [rate("token", 3, 1_000, max_retries=2)],
                [fixed("a", 1), rate("token", 3, 1_000), fixed("b", 1)],
                [rate("leaky", 3, 1_000, leaky=True), rate("token", 3, 1_000)],
            ],
            pause_ms=(0, 100),
        ),
        trouble=Trouble(server_kills=0.2),
    ),
    "rate limits asked outside": Scenario(
        mix=Mix(
            limits=[
                [rate("x", 3, 1_000)],
                [rate("x", 3, 1_000, max_retries=2)],
                [fixed("a", 1), rate("y", 2, 2_000), fixed("b", 1)],
            ],
            pause_ms=(0, 100),
            expedite=0.2,
        ),
        trouble=Trouble(server_kills=0.2),
        asks_outside=True,
    ),
    "flood": Scenario(
        mix=Mix(
            limits=[*([fixed(f"full {number}", 1)] for number in range(30)), [fixed("live", 1)]],
            pause_ms=(0, 5),
            delayed=0,
            cancel=0.05,
        ),
        clients=6,
        jobs=20,
        workers=4,
    ),
    "mixed": Scenario(
        mix=Mix(
            limits=[*_QUEUES, *_TANGLES, [rate("token", 3, 500)], [floating("f", 1)]],
            groups=("g1", "g2"),
            retries=0.6,
            cancel=0.3,
            restart=0.5,
            expedite=0.3,
            delete=0.2,
            reimport=0.2,
            lease_one=0.1,
            drop_holders=0.05,
        ),
        habits=Habits(fail=0.3, forget=0.05),
        weather=_BAD_WEATHER,
        trouble=Trouble(server_kills=0.15, worker_kills=0.15, partitions=0.15),
        retention=Retention(succeeded_s=30, unsuccessful_s=60),
        tenants=("t1", "t2", "t3"),
        shards=2,
    ),
    "crash loop": Scenario(
        mix=Mix(limits=[*_QUEUES, *_TANGLES], retries=0.8),
        trouble=Trouble(server_kills=1.0),
    ),
    "bad disk": Scenario(
        mix=Mix(limits=[*_QUEUES, *_TANGLES, [rate("token", 3, 500)], [floating("f", 1)]], retries=0.5),
        disk=Disk(
            read_ms=(0, 20), write_ms=(0.3, 40), failed_writes=0.02, failed_reads=0.01, hung_writes=0.003
        ),
    ),
}


SCENARIOS: Mapping[str, Scenario] = {
    **_BASIC,
    "tiny memory": msgspec.structs.replace(_BASIC["mixed"], is_tiny=True),
    "streams": msgspec.structs.replace(_BASIC["chaos"], habits=Habits(streams=1.0)),
    "streams and polls": msgspec.structs.replace(
        _BASIC["mixed"], habits=msgspec.structs.replace(_BASIC["mixed"].habits, streams=0.5)
    ),
}


class _Flipping:
    """An external limiter that counts in windows, and sometimes fails."""

    def __init__(self) -> None:
        self._world: World | None = None
        self._spent: dict[tuple[str, str, int], int] = {}

    def attach(self, world: World) -> None:
        self._world = world
        self._rng = world.rng("limiter")

    async def check(self, limit: RateLimit) -> Answer:
        world = self._world
        assert world is not None
        await asyncio.sleep(self._rng.uniform(0.001, 0.3))
        if not world.is_calm and self._rng.random() < 0.2:
            raise LimiterFailed("injected")
        now_ms = world.clock.now_ms()
        window = now_ms // limit.duration_ms
        name = (limit.name, limit.unique_key, window)
        reset_at_ms = (window + 1) * limit.duration_ms
        if self._spent.get(name, 0) + limit.hits > limit.limit:
            return Answer(False, reset_at_ms)
        self._spent[name] = self._spent.get(name, 0) + limit.hits
        return Answer(True, reset_at_ms)


def play(name: str, seed: str, scenario: Scenario | None = None) -> Played:
    """Run a scenario; the same name, seed and scenario give the same history."""
    chosen = scenario or SCENARIOS[name]
    with tiny_memory() if chosen.is_tiny else nullcontext():
        return loop.run(_play(chosen, f"{name}/{seed}"), seed=f"{name}/{seed}")


async def _play(scenario: Scenario, seed: str) -> Played:
    limiter = _Flipping() if scenario.asks_outside else None
    world = World(
        seed,
        weather=scenario.weather,
        disk=scenario.disk,
        shards=scenario.shards,
        tenants=scenario.tenants,
        retention=scenario.retention,
        limiter=limiter,
    )
    if limiter is not None:
        limiter.attach(world)
    failure: BaseException | None = None
    try:
        await _run(scenario, world)
    except Exception as error:  # Whatever it is, it is what this run has found.
        failure = error
    return Played(world.history, failure, world.commits, world.loop.now)


async def _run(scenario: Scenario, world: World) -> None:
    await world.start_server()
    workers = Workers(world)

    def habits() -> Habits:
        return _CALM_HABITS if world.is_calm else scenario.habits

    for number in range(scenario.workers):
        workers.employ(f"worker {number + 1}", habits)
    clients = [
        Client(world, f"client{number + 1}", scenario.mix, scenario.jobs)
        for number in range(scenario.clients)
    ]
    trouble = loop.start(
        Process("trouble"), make_trouble(world, workers, scenario.trouble, habits), name="main"
    )
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.run())
    await asyncio.sleep(2.0)
    world.check()
    await world.calm()
    await _drain(world)
    world.check()
    trouble.cancel()
    _check_end(world, workers, clients)


async def _drain(world: World) -> None:
    """Wait until everything that was asked for has ended (75, 76)."""
    deadline = world.loop.now + CALM_S
    while world.loop.now < deadline:
        await asyncio.sleep(1.0)
        world.check()
        if all(job.state.status.is_terminal for job in world.jobs.values()):
            await asyncio.sleep(1.0)
            return
    left = [f"{name[1]}: {job.state}" for name, job in world.jobs.items() if not job.state.status.is_terminal]
    world.require(False, f"still not ended: {left}")


def _check_end(world: World, workers: Workers, clients: Sequence[Client]) -> None:
    """What was acknowledged is there, what was accepted is recorded, and nothing is left over."""
    jobs = world.jobs
    attempts = {attempt.task_id: attempt for job in jobs.values() for attempt in job.attempts}
    if world.options.retention.is_off:
        for client in clients:
            for name in client.acked - client.deleted:
                world.require(name in jobs, f"{name[1]} was acknowledged and is gone")
    statuses = {
        "success": AttemptStatus.SUCCEEDED,
        "failure": AttemptStatus.FAILED,
        "cancelled": AttemptStatus.CANCELLED,
    }
    for task_id, outcome in workers.accepted.items():
        if task_id in attempts:
            is_same = attempts[task_id].status is statuses[outcome]
            world.require(is_same, f"{task_id} was reported as {outcome}: {attempts[task_id]}")
    for attempt in attempts.values():
        assert attempt.finished_at_ms is not None
        if isinstance(attempt.outcome, Failure) and attempt.outcome.code == WORKER_CRASHED:
            lasted_ms = attempt.finished_at_ms - attempt.started_at_ms
            world.require(lasted_ms >= LEASE_MS, f"a lease ran out after {lasted_ms} ms")  # 31
    leftovers = [key for key in world.rows() if key[:1] in (b"h", b"r", b"n", b"v", b"x", b"t")]
    world.require(not leftovers, f"left over: {leftovers}")  # 20, 75
