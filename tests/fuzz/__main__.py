"""Send a live server requests that no client would send: `python -m tests.fuzz --minutes 5`.

Finds a server that dies, hangs, leaks, answers INTERNAL or UNKNOWN, or stores what must not be. Whatever is
found is printed with the request that did it.
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any  # grpc is untyped.

import grpc
import uvloop
from google.protobuf.message_factory import GetMessageClass

from silo.cli.bench.measure import resident_mb
from silo.cli.server_process import ServerProcess
from silo.storage.slate import SlateStorage
from silo.storage.store import scan_all
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.fuzz.requests import METHODS, Known, Maker
from tests.invariants import check_snapshot

CALLERS = 8
CALL_TIMEOUT_S = 10.0
# A compaction waits for others; a profile takes as long as it is told to; a watch may wait for ever.
_TIMEOUTS_S = {
    **dict.fromkeys(("CompactShard", "FlushShard", "CpuProfile", "HeapProfile"), 40.0),
    "WatchJob": 0.2,
}
GROWTH_MB_MAX = 400.0  # Of the server, between its warm-up and the end.
_RARE = {
    "CpuProfile": 0.002,
    "HeapProfile": 0.002,
    "CompactShard": 0.02,
    "FlushShard": 0.02,
    "ResetShards": 0.0,
}
_BAD = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
}
_EXPECTED_TEXTS = (
    "codec error: task is not a RefreshFloatingLimit",
    "compaction failed",
    "RST_STREAM",
    "Internal error from Core",  # What this side says when it writes to a stream that has just ended.
)


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
        while time.monotonic() < until:
            name = rng.choice(list(METHODS))
            if rng.random() >= _RARE.get(name, 1.0):
                continue
            self.calls[name] += 1
            if METHODS[name].client_streaming:
                await self._stream(name, maker.requests(name), rng)
            else:
                await self._call(name, maker.request(name))

    async def _call(self, name: str, request: bytes) -> None:
        method = METHODS[name]
        open_call = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        call = open_call(_path(method))(request, timeout=_TIMEOUTS_S.get(name, CALL_TIMEOUT_S))
        try:
            answer = await call.read() if method.server_streaming else await call
        except grpc.aio.AioRpcError as error:
            self._judge(name, error, [request])
            return
        self._learn(method, answer)

    async def _stream(self, name: str, requests: list[bytes], rng: Random) -> None:
        """Say some, hear some, and end in one way or another."""
        method = METHODS[name]
        call = self._channel.stream_stream(_path(method))(timeout=CALL_TIMEOUT_S)
        try:
            for request in requests:
                await call.write(request)
            if rng.random() < 0.5 and name == "Work":  # Watches end when their jobs do.
                await call.done_writing()
                await self._hear_all(method, call)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rng.choice([0.0, 0.05, 0.5])):
                        await self._hear_all(method, call)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # The status says why.
        finally:
            call.cancel()
        code = await call.code()
        if code is not grpc.StatusCode.CANCELLED:
            details = await call.details()
            error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)
            self._judge(name, error, requests)

    async def _hear_all(self, method: Any, call: Any) -> None:
        while (answer := await call.read()) is not grpc.aio.EOF:
            self._learn(method, answer)

    def _judge(self, name: str, error: grpc.aio.AioRpcError, requests: list[bytes]) -> None:
        code, text = error.code(), error.details() or ""
        self.codes[code.name] += 1
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and (name == "WatchJob" or name.endswith("Profile")):
            return
        if code in _BAD and not any(known in text for known in _EXPECTED_TEXTS):
            shown = "\n".join(request[:2_000].hex() for request in requests)
            raise Found(f"{name} was answered with {code.name}: {text}\n{shown}") from error

    def _learn(self, method: Any, answer: bytes) -> None:
        self.codes["OK"] += 1
        self._known.learn(GetMessageClass(method.output_type).FromString(bytes(answer)))


def _path(method: Any) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


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
    call = channel.unary_unary(_path(METHODS[name]))
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
