"""Wait for jobs without asking again and again: one stream of watches to each server."""

import asyncio
from contextlib import suppress
from random import Random
from typing import Any  # The grpc stub is untyped.

import grpc

from silo.client.batching import rpc_error
from silo.client.errors import SiloClientError, from_status, is_broken_stream, is_wrong_shard
from silo.client.messages import job_result_from_pb
from silo.client.router import Router
from silo.client.types import JobResult
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb

_DELAY_S_MIN, _DELAY_S_MAX = 0.05, 2.0  # Before jobs are watched again after a stream broke.
_IDLE_S = 30.0  # A stream that nobody waits on ends.
WATCHES_MAX = 50_000  # On one stream; a server of ours takes twice as many.
_PASSING = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED})


class WatchUnsupported(Exception):
    """The server only speaks `silo.v1`."""


class _Lost(Exception):
    """The stream broke, or the shard is elsewhere: look again where it is."""


class Watcher:
    """All waits of one client."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._newest: dict[str, _WatchStream] = {}  # By address: the stream that takes more.
        self._running: set[asyncio.Task[None]] = set()
        self._looking: asyncio.Task[None] | None = None
        self._delay_s = _DELAY_S_MIN
        self._rng = Random()

    async def result(self, id: str, tenant: str | None) -> JobResult[Any]:
        """How the job ended, once it has.

        Rides through restarts of servers without end: the caller has the deadline.

        Raises:
            JobNotFoundError: there is no such job (any more).
            WatchUnsupported: the server cannot tell by itself.
            ClientClosed: the client was closed.
        """
        while True:
            self._router.check_open()
            await self._router.ensure_topology()
            shard = self._router.topology.locate(tenant).shard_id
            address = self._router.owner_of(shard) or self._router.servers[0]
            if self._router.is_plain(address):
                raise WatchUnsupported
            try:
                watched = await self._stream(address).watch(shard=shard, id=id, tenant=tenant)
            except _Lost:
                pass
            else:
                if not watched.HasField("error"):
                    self._delay_s = _DELAY_S_MIN
                    return job_result_from_pb(watched.result)
                error = rpc_error(watched.error)
                if error.code() not in _PASSING and not is_wrong_shard(error):
                    raise from_status(error, job_id=id, tenant=tenant)
            await self._look_again()

    def _stream(self, address: str) -> "_WatchStream":
        stream = self._newest.get(address)
        if stream is None or not stream.has_room:
            stream = self._newest[address] = _WatchStream(address, self._router)
            running = asyncio.get_running_loop().create_task(stream.run(), name=f"watch jobs at {address}")
            self._running.add(running)
            running.add_done_callback(self._running.discard)
        return stream

    async def _look_again(self) -> None:
        """Wait a moment and ask who owns what: once for all who lost the same server."""
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look(), name="look for owners")
        await asyncio.wait({self._looking})

    async def _look(self) -> None:
        try:
            await asyncio.sleep(self._delay_s * self._rng.uniform(0.5, 1.0))
            self._delay_s = min(2 * self._delay_s, _DELAY_S_MAX)
            with suppress(SiloClientError):
                await self._router.refresh_topology()
        finally:
            self._looking = None

    async def close(self) -> None:
        """End all streams. Waits that go on find that the client is closed."""
        ending = {*self._running, *([self._looking] if self._looking is not None else ())}
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending)


class _WatchStream:
    """One stream, from the first job that is watched on it until it breaks or nobody waits."""

    def __init__(self, address: str, router: Router) -> None:
        self._address = address
        self._router = router
        self._number = 0
        self._waiting: dict[int, asyncio.Future[pb.Watched]] = {}
        self._to_watch: dict[int, pb.Watch] = {}
        self._to_forget: list[int] = []
        self._filled = asyncio.Event()
        self._is_over = False

    @property
    def has_room(self) -> bool:
        """Whether more can be watched on it."""
        return not self._is_over and len(self._waiting) < WATCHES_MAX

    async def watch(self, *, shard: str, id: str, tenant: str | None) -> pb.Watched:
        """What the server says of the job, once it has ended.

        Raises:
            _Lost: the stream broke first.
            WatchUnsupported: there is no such call at this server.
            Exception: it could not be opened, for whatever reason of the server, or of a token function.
        """
        self._number += 1
        number = self._number
        self._to_watch[number] = pb.Watch(number=number, shard=shard, id=id, tenant=tenant or None)
        answer: asyncio.Future[pb.Watched] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._filled.set()
        try:
            return await answer
        finally:
            is_answered = self._waiting.pop(number, None) is None
            was_sent = self._to_watch.pop(number, None) is None
            if was_sent and not is_answered:  # The caller waits no longer.
                self._to_forget.append(number)
                self._filled.set()

    async def run(self) -> None:
        failure: Exception = _Lost()
        try:
            async with self._router.stream(self._address, "WatchJobs") as call:
                writer = asyncio.get_running_loop().create_task(self._write(call), name="write watches")
                try:
                    await self._read(call)
                finally:
                    writer.cancel()
                    await asyncio.wait({writer})
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                self._router.note_plain(self._address)
                failure = WatchUnsupported()
            elif error.code() not in _PASSING and not is_broken_stream(error):
                failure = from_status(error)
        except Exception as error:  # Of a token function, too: whoever waits gets it, as from any call.
            failure = error
        finally:
            self._is_over = True
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(failure)
            self._waiting.clear()

    async def _read(self, call: Any) -> None:
        while (response := await call.read()) is not grpc.aio.EOF:
            for watched in response.watched:
                answer = self._waiting.pop(watched.number, None)
                if answer is not None and not answer.done():
                    answer.set_result(watched)

    async def _write(self, call: Any) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # The reader meets it, too.
            while True:
                try:
                    async with asyncio.timeout(_IDLE_S):
                        await self._filled.wait()
                except TimeoutError:
                    if not self._waiting:
                        self._is_over = True
                        await call.done_writing()
                        return
                    continue
                self._filled.clear()
                request = pb.WatchJobsRequest(watch=self._to_watch.values(), forget=self._to_forget)
                self._to_watch.clear()
                self._to_forget.clear()
                if request.watch or request.forget:
                    await call.write(request)
