"""What is measured of a queue, each on a server of its own that was just started.

All but `drain` begin with a few jobs that are not counted, so that connections and code paths are warm.
"""

import asyncio
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers import peer_named
from benchmarks.peers.peer import BulkPeer, Peer
from benchmarks.processes import Child, running
from benchmarks.tally import Finish, finish_in, payload

Figures = dict[str, float]
_Fill = Callable[[Sequence[str]], Awaitable[None]]

LATENCY_JOBS = 200
WARM_UP = 20

_PAUSE_S = 0.03  # Between two jobs of which latency is measured: the worker is idle again.
_LOOK_S = 0.01
_PATIENCE_S = 300.0


class Stage:
    """A queue on its server, without workers."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.peer: Peer = peer_named(name)(address)
        self._name = name
        self._folder = folder

    @contextmanager
    def worker(self, jobs: int) -> Iterator["_Worker"]:
        """A worker process for so many jobs beside those of the warm-up."""
        command = (sys.executable, "-m", "benchmarks.worker", self._name, self.peer.address, self._folder)
        # It is killed: all that it could still do is of no interest, nor is its server afterwards.
        with running(
            *command, str(WARM_UP), str(jobs), log=self._folder / "worker.log", end_with=signal.SIGKILL
        ) as process:
            yield _Worker(process, self._folder)


class _Worker:
    def __init__(self, process: Child, folder: Path) -> None:
        self._process = process
        self._folder = folder

    async def is_warm(self) -> None:
        """Wait until it has handled the warm-up."""
        await self._wrote("ready")

    async def finished(self) -> Finish:
        """Wait until it has handled everything."""
        return await self._wrote("done")

    async def _wrote(self, name: str) -> Finish:
        async with asyncio.timeout(_PATIENCE_S):
            while (finish := finish_in(self._folder / name)) is None:
                self._process.check()
                await asyncio.sleep(_LOOK_S)
        return finish


async def enqueue(stage: Stage, jobs: int) -> Figures:
    """Jobs that one producer enqueues a second while no worker runs, with a call for each."""
    return {"enqueue_per_s": await _enqueue_rate(stage, jobs, stage.peer.enqueue_each)}


async def bulk_enqueue(stage: Stage, jobs: int) -> Figures:
    """The same, many in a call."""
    return {"bulk_enqueue_per_s": await _enqueue_rate(stage, jobs, _bulk_of(stage.peer))}


async def drain(stage: Stage, jobs: int) -> Figures:
    """Jobs that one worker handles a second, from its start as a process, of those that wait for it."""
    peer = stage.peer
    fill = peer.enqueue_bulk if isinstance(peer, BulkPeer) else peer.enqueue_each
    async with peer.connected():
        await fill(_payloads(WARM_UP + jobs))
        await peer.settle()
        began_s = time.monotonic()
        with stage.worker(jobs) as worker:
            finish = await worker.finished()
    return {"drain_per_s_incl_boot": (WARM_UP + jobs) / (finish.at_s - began_s)}


async def end_to_end(stage: Stage, jobs: int) -> Figures:
    """Jobs a second from the first call of one producer to the start of the last handler, a call for each."""
    return {"end_to_end_per_s": await _end_to_end_rate(stage, jobs, stage.peer.enqueue_each)}


async def bulk_end_to_end(stage: Stage, jobs: int) -> Figures:
    """The same, many in a call."""
    return {"bulk_end_to_end_per_s": await _end_to_end_rate(stage, jobs, _bulk_of(stage.peer))}


async def latency(stage: Stage, jobs: int) -> Figures:
    """From the enqueue call to the start of the handler, one job at a time, in milliseconds."""
    async with stage.peer.connected():
        with stage.worker(jobs) as worker:
            await _warm_up(stage.peer.enqueue_each)
            await worker.is_warm()
            for number in range(jobs):
                await asyncio.sleep(_PAUSE_S)
                await stage.peer.enqueue(payload(number))
            waits_ms = sorted(wait_s * 1000 for wait_s in (await worker.finished()).waits_s)
    return {
        "lat_p50_ms": waits_ms[len(waits_ms) // 2],
        "lat_p99_ms": waits_ms[int(len(waits_ms) * 0.99)],
    }


async def _enqueue_rate(stage: Stage, jobs: int, fill: _Fill) -> float:
    async with stage.peer.connected():
        await _warm_up(fill)
        payloads = _payloads(jobs)
        began_s = time.monotonic()
        await fill(payloads)
        return jobs / (time.monotonic() - began_s)


async def _end_to_end_rate(stage: Stage, jobs: int, fill: _Fill) -> float:
    async with stage.peer.connected():
        with stage.worker(jobs) as worker:
            await _warm_up(fill)
            await worker.is_warm()
            payloads = _payloads(jobs)
            began_s = time.monotonic()
            await fill(payloads)
            finish = await worker.finished()
    return jobs / (finish.at_s - began_s)


async def _warm_up(fill: _Fill) -> None:
    await fill([payload(-number) for number in range(1, WARM_UP + 1)])


def _payloads(count: int) -> list[str]:
    return [payload(number) for number in range(count)]


def _bulk_of(peer: Peer) -> _Fill:
    if not isinstance(peer, BulkPeer):
        raise TypeError(f"{peer.label} has no call for many jobs")
    return peer.enqueue_bulk


MEASUREMENTS: Mapping[str, Callable[[Stage, int], Coroutine[None, None, Figures]]] = {
    "enqueue": enqueue,
    "bulk_enqueue": bulk_enqueue,
    "drain": drain,
    "end_to_end": end_to_end,
    "bulk_end_to_end": bulk_end_to_end,
    "latency": latency,
}


def applies_to(measurement: str, peer: type[Peer]) -> bool:
    """Whether this can be measured of this queue."""
    return issubclass(peer, BulkPeer) or MEASUREMENTS[measurement] not in (bulk_enqueue, bulk_end_to_end)
