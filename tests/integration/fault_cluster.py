"""Server, workers and a client as the fault tests run them, and the audit at the end.

Handlers write each run into a ledger, the server keeps attempts. An attempt whose lease ran out is
the only reason for which a job may run twice, and no attempt may run twice.
"""

import asyncio
import itertools
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from silo import Job, JobHandle, RetryPolicy, ShardRouting, SiloGRPCClient
from silo.cli.server_process import ServerProcess
from tests.integration.fault_proxy import FaultProxy, fault_proxy
from tests.integration.fault_worker import GROUP, QUICK_PINGS, Arguments, Work

_ROOT = Path(__file__).parents[2]
_POLICY = RetryPolicy(retry_count=1000, initial_interval_ms=1, max_interval_ms=20)
_PATIENT = ShardRouting(max_retries=1000)  # An enqueue that is given up may have been taken all the same.
_END_S = 60.0
_AUDITED_AT_ONCE = 50
_PRODUCERS = 3
_PAUSE_S = 0.05


@dataclass(frozen=True)
class Audit:
    """What happened to a number of jobs, all of which have succeeded."""

    jobs: int
    runs: int
    lost_leases: int  # Attempts whose lease ran out, whether or not they had begun.

    @property
    def repeated(self) -> int:
        """Runs beyond the first one of each job."""
        return self.runs - self.jobs


class FaultCluster:
    """One server on a data directory, and what connects to it."""

    def __init__(self, folder: Path) -> None:
        self.server = ServerProcess(folder / "data")
        self.folder = folder
        self.ledger = folder / "ledger"
        self._numbers = itertools.count(1)

    @asynccontextmanager
    async def client(
        self, proxy: FaultProxy | None = None, *, pings_quickly: bool = False
    ) -> AsyncIterator[SiloGRPCClient]:
        """A client, behind a proxy if there is one."""
        server, dial = self.server.address, proxy.address if proxy else self.server.address
        async with SiloGRPCClient(
            dial,
            address_map={server: dial},
            shard_routing=_PATIENT,
            grpc_client_options=QUICK_PINGS if pings_quickly else None,
        ) as client:
            yield client

    @asynccontextmanager
    async def proxy(self) -> AsyncIterator[FaultProxy]:
        """A proxy before the server."""
        async with fault_proxy(self.server.address) as proxy:
            yield proxy

    @asynccontextmanager
    async def worker(
        self, proxy: FaultProxy | None = None, *, slots: int = 10, pings_quickly: bool = False
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """A worker that is ready, behind a proxy if there is one; at the end it drains."""
        name = f"worker-{next(self._numbers)}"
        arguments = Arguments(
            server=self.server.address,
            dial=proxy.address if proxy else self.server.address,
            ledger=str(self.ledger),
            worker_id=name,
            slots=slots,
            pings_quickly=pings_quickly,
        )
        with (self.folder / f"{name}.err").open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.integration.fault_worker", msgspec.json.encode(arguments),
                cwd=_ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        assert process.stdout is not None
        try:
            async with asyncio.timeout(30):
                assert await process.stdout.readline() == b"ready\n", self.complaints(name)
            yield process
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(45):
                    await process.wait()
        finally:
            if process.returncode is None:
                process.kill()  # Also one that is stopped.
            await process.communicate()

    def complaints(self, name: str = "worker-1") -> str:
        """What a worker told of errors."""
        return (self.folder / f"{name}.err").read_text()

    def runs(self) -> dict[str, list[int]]:
        """The attempts of which a handler has begun, by job."""
        runs: dict[str, list[int]] = defaultdict(list)
        for line in self.ledger.read_text().splitlines() if self.ledger.exists() else ():
            job_id, attempt, _pid = line.split()
            runs[job_id].append(int(attempt))
        return runs

    async def audit(self, handles: Iterable[JobHandle]) -> Audit:
        """Wait for all jobs there are, and hold what ran against what the server has kept."""
        ids = [handle.id for handle in handles]
        async with self.client() as client:
            for some in _parts(ids):
                results = await asyncio.gather(*(client.handle(id).result(_END_S) for id in some))
                assert {result.status for result in results} == {"Succeeded"}
            runs = self.runs()
            assert runs.keys() == set(ids)
            lost_leases = 0
            for some in _parts(ids):
                for job in await asyncio.gather(*(client.get_job(id, include_attempts=True) for id in some)):
                    lost_leases += _audit(job, runs[job.id])
        return Audit(jobs=len(ids), runs=sum(map(len, runs.values())), lost_leases=lost_leases)


def _parts(ids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(ids), _AUDITED_AT_ONCE):
        yield ids[start : start + _AUDITED_AT_ONCE]


def _audit(job: Job, runs: list[int]) -> int:
    """Check one job that has succeeded; how many of its leases ran out."""
    assert job.attempts is not None
    *before, last = job.attempts
    assert (job.status, last.status, last.result) == ("Succeeded", "Succeeded", job.payload["number"])
    assert {attempt.error_code for attempt in before} <= {"WORKER_CRASHED"}
    assert len(set(runs)) == len(runs), f"an attempt ran twice: {runs}"
    assert last.attempt_number in runs
    assert set(runs) <= {attempt.attempt_number for attempt in job.attempts}
    return len(before)


@asynccontextmanager
async def fault_cluster(folder: Path) -> AsyncIterator[FaultCluster]:
    """A cluster whose server runs when the block begins, and may have come and gone when it ends."""
    cluster = FaultCluster(folder)
    await cluster.server.start()
    try:
        yield cluster
    finally:
        await cluster.server.stop()


class Producer:
    """Enqueues one job after another, a few at a time, for as long as it is told to."""

    def __init__(self, client: SiloGRPCClient, *, takes_s: Sequence[float] = (0.0,)) -> None:
        """`takes_s`: how long jobs take, in turn."""
        self.handles: list[JobHandle] = []
        self._client = client
        self._takes_s = itertools.cycle(takes_s)
        self._numbers = itertools.count()
        self._is_stopping = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Enqueue while the block runs; what was begun is brought to its end."""
        async with asyncio.TaskGroup() as group:
            for _ in range(_PRODUCERS):
                group.create_task(self._enqueue_some())
            try:
                yield
            finally:
                self._is_stopping = True

    async def _enqueue_some(self) -> None:
        while not self._is_stopping:
            handle = await enqueue(self._client, next(self._numbers), takes_s=next(self._takes_s))
            self.handles.append(handle)
            await asyncio.sleep(_PAUSE_S)


async def enqueue(
    client: SiloGRPCClient, number: int, *, takes_s: float = 0.0, how: str = "awaits"
) -> JobHandle:
    """Enqueue a job."""
    work = Work(number=number, takes_s=takes_s, how=how)
    return await client.enqueue(payload=work, task_group=GROUP, retry_policy=_POLICY)
