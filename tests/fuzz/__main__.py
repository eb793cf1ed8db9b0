"""Send a live server requests that no client would send: `python -m tests.fuzz --minutes 5`.

Finds a server that dies, hangs, leaks, answers INTERNAL or UNKNOWN, or stores what must not be. Whatever is
found is printed with the request that did it.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any  # grpc is untyped.

import grpc
import uvloop

from silo.cli.bench.measure import resident_mb
from silo.cli.server_process import ServerProcess
from silo.storage.slate import SlateStorage
from silo.storage.store import scan_all
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.fuzz.requests import SERVICE, Known, Maker
from tests.invariants import check_snapshot

CALLERS = 8
CALL_TIMEOUT_S = 10.0
_SLOW_TIMEOUT_S = 40.0  # A compaction waits for others; a profile takes as long as it is told to.
GROWTH_MB_MAX = 400.0  # Of the server, between its warm-up and the end.
_RARE = {
    "CpuProfile": 0.002,
    "HeapProfile": 0.002,
    "CompactShard": 0.02,
    "FlushShard": 0.02,
    "ResetShards": 0.0,
}
_NOT_YET = {grpc.StatusCode.UNIMPLEMENTED}
_SLOW = {"CompactShard", "FlushShard", "CpuProfile", "HeapProfile"}
_BAD = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
}
_EXPECTED_TEXTS = ("codec error: task is not a RefreshFloatingLimit", "compaction failed", "RST_STREAM")


class Found(Exception):
    """What a fuzz run is for."""


class Fuzzer:
    """Callers against one server."""

    def __init__(self, channel: Any, known: Known, seed: int) -> None:
        self._channel = channel
        self._known = known
        self._seed = seed
        self.calls: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()

    async def run(self, until: float) -> None:
        async with asyncio.TaskGroup() as callers:
            for number in range(CALLERS):
                callers.create_task(self._call_on(Random(f"{self._seed}/{number}"), until))

    async def _call_on(self, rng: Random, until: float) -> None:
        maker = Maker(rng, self._known)
        methods = [method.name for method in SERVICE.methods]
        while time.monotonic() < until:
            name = rng.choice(methods)
            if rng.random() < _RARE.get(name, 1.0):
                await self._call(name, maker.request(name))

    async def _call(self, name: str, request: bytes) -> None:
        method = SERVICE.methods_by_name[name]
        timeout_s = _SLOW_TIMEOUT_S if name in _SLOW else CALL_TIMEOUT_S
        open_call = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        call = open_call(f"/{SERVICE.full_name}/{name}")(request, timeout=timeout_s)
        self.calls[name] += 1
        try:
            answer = await call.read() if method.server_streaming else await call
        except grpc.aio.AioRpcError as error:
            self.codes[error.code().name] += 1
            text = error.details() or ""
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and name.endswith("Profile"):
                return
            if error.code() in _BAD and not any(known in text for known in _EXPECTED_TEXTS):
                shown = request[:2_000].hex()
                raise Found(f"{name} was answered with {error.code().name}: {text}\n{shown}") from error
            return
        self.codes["OK"] += 1
        self._known.learn(getattr(pb, method.output_type.name).FromString(bytes(answer)))


async def fuzz(minutes: float, seed: int) -> None:
    """Run one round.

    Raises:
        Found: the server did something that it must not.
    """
    with tempfile.TemporaryDirectory(prefix="silo-fuzz-") as folder:
        server = ServerProcess(Path(folder))
        await server.start()
        try:
            await _attack(server, minutes, seed)
        except* Found:
            print(f"the server ended with {server.exit_code}; its log ends with:\n{_log(server)[-6_000:]}")
            raise
        finally:
            await server.stop()
        if "Traceback" in _log(server):
            raise Found(f"the server logged an exception:\n{_log(server)[-6_000:]}")
        await _check_stores(server.data)


def _log(server: ServerProcess) -> str:
    return (server.data / "server.log").read_text(errors="replace")


async def _attack(server: ServerProcess, minutes: float, seed: int) -> None:
    options = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
    async with grpc.aio.insecure_channel(server.address, options=options) as channel:
        cluster = await _ask(channel, "GetClusterInfo", pb.GetClusterInfoRequest())
        owners = pb.GetClusterInfoResponse.FromString(cluster).shard_owners
        home = next(o for o in owners if o.range_start <= "7a162ebe4ce6fc55" < (o.range_end or "g"))
        known = Known([home.shard_id])
        fuzzer = Fuzzer(channel, known, seed)
        started = time.monotonic()
        until = started + minutes * 60
        await fuzzer.run(min(until, started + 20))
        warm_mb, warm_tasks = resident_mb(server.pid), await _tasks(channel)
        while time.monotonic() < until:
            await fuzzer.run(min(until, time.monotonic() + 20))
            print(
                f"{time.monotonic() - started:6.0f} s  {sum(fuzzer.calls.values()):8} calls  "
                f"{resident_mb(server.pid):7.1f} MB  {await _tasks(channel):4} tasks",
                flush=True,
            )
        grown_mb, tasks = resident_mb(server.pid) - warm_mb, await _tasks(channel)
        print(f"calls: {dict(fuzzer.calls)}\ncodes: {dict(fuzzer.codes)}\ngrown: {grown_mb:.1f} MB")
        if grown_mb > GROWTH_MB_MAX:
            raise Found(f"the server grew by {grown_mb:.0f} MB")
        if tasks > warm_tasks + 50:
            raise Found(f"{tasks} tasks run in the server, {warm_tasks} did after its warm-up")


async def _ask(channel: Any, name: str, request: Any) -> bytes:
    call = channel.unary_unary(f"/{SERVICE.full_name}/{name}")
    return bytes(await call(request.SerializeToString(), timeout=CALL_TIMEOUT_S))


async def _tasks(channel: Any) -> int:
    answer = pb.DumpTasksResponse.FromString(await _ask(channel, "DumpTasks", pb.DumpTasksRequest()))
    return int(answer.task_count)


async def _check_stores(data: Path) -> None:
    """What the server left behind holds all invariants."""
    storage = SlateStorage(str(data))
    names = await asyncio.to_thread(lambda: sorted(path.name for path in data.iterdir() if path.is_dir()))
    for name in names:
        if name == "_layout":
            continue
        store = await storage.open(name)
        try:
            rows = {}
            for first in range(256):
                prefix = bytes((first,))
                if first < 255:
                    rows |= {key: value async for key, value in scan_all(store, prefix, page_rows=1000)}
            jobs = check_snapshot(rows, were_dropped=True)
            print(f"{name}: {len(jobs)} jobs, {len(rows)} rows, all consistent")
        finally:
            await store.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    options = parser.parse_args()
    print(f"seed {options.seed}")
    found: list[BaseException] = []
    try:
        uvloop.run(fuzz(options.minutes, options.seed))
    except* Found as group:
        found += group.exceptions
    for error in found:
        print(error)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
