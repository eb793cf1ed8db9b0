"""Wait for jobs without asking again and again: one stream of watches to each server."""

import asyncio
from contextlib import suppress
from random import Random
from typing import Any  # The grpc stub is untyped.

import grpc

from silo.client.batching import rpc_error
from silo.client.errors import ClientClosed, SiloClientError, from_status, is_wrong_shard
from silo.client.messages import job_result_from_pb
from silo.client.router import Router
from silo.client.types import JobResult
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb

_DELAY_S_MIN, _DELAY_S_MAX = 0.05, 2.0  # Before jobs are watched again after a stream broke.
_IDLE_S = 30.0  # A stream that nobody waits on ends.


class WatchUnsupported(Exception):
    """The server only speaks `silo.v1`."""


class _Lost(Exception):
    """The stream broke, or the shard is elsewhere: look again where it is."""


class Watcher:
    """All waits of one client."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._streams: dict[str, _WatchStream] = {}
        self._rng = Random()

    async def result(self, id: str, tenant: str | None) -> JobResult[Any]:
        """How the job ended, once it has.

        Rides through restarts of servers without end: the caller has the deadline.

        Raises:
            JobNotFoundError: there is no such job (any more).
            WatchUnsupported: the server cannot tell by itself.
            ClientClosed: the client was closed.
        """
        delay_s = _DELAY_S_MIN
        while True:
            try:
                await self._router.ensure_topology()
                shard = self._router.topology.locate(tenant).shard_id
                address = self._router.owner_of(shard) or self._router.servers[0]
                watched = await self._stream(address).watch(shard=shard, id=id, tenant=tenant)
            except (ClientClosed, WatchUnsupported):
                raise
            except _Lost:
                pass
            else:
                if not watched.HasField("error"):
                    return job_result_from_pb(watched.result)
                error = rpc_error(watched.error)
                if error.code() is not grpc.StatusCode.UNAVAILABLE and not is_wrong_shard(error):
                    raise from_status(error, job_id=id, tenant=tenant)
            await asyncio.sleep(delay_s * self._rng.uniform(0.5, 1.0))
            delay_s = min(2 * delay_s, _DELAY_S_MAX)
            with suppress(SiloClientError):
                await self._router.refresh_topology()

    def _stream(self, address: str) -> "_WatchStream":
        stream = self._streams.get(address)
        if stream is None or stream.is_over:
            stream = self._streams[address] = _WatchStream(address, self._router)
        return stream

    async def close(self) -> None:
        for stream in self._streams.values():
            await stream.close()
        self._streams.clear()


class _WatchStream:
    """One stream, from the first job that is watched on it until it breaks or nobody waits."""

    def __init__(self, address: str, router: Router) -> None:
        self._address = address
        self._router = router
        self._number = 0
        self._waiting: dict[int, asyncio.Future[pb.Watched]] = {}
        self._outgoing = pb.WatchJobsRequest()
        self._filled = asyncio.Event()
        self._is_ending = False
        self._running = asyncio.get_running_loop().create_task(self._run(), name=f"watch jobs at {address}")

    @property
    def is_over(self) -> bool:
        return self._is_ending or self._running.done()

    async def watch(self, *, shard: str, id: str, tenant: str | None) -> pb.Watched:
        self._number += 1
        number = self._number
        answer: asyncio.Future[pb.Watched] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._outgoing.watch.append(pb.Watch(number=number, shard=shard, id=id, tenant=tenant or None))
        self._filled.set()
        try:
            return await answer
        finally:
            if self._waiting.pop(number, None) is not None and not self.is_over:
                self._outgoing.forget.append(number)
                self._filled.set()

    async def _run(self) -> None:
        failure: Exception = _Lost()
        try:
            async with self._router.stream(self._address, "WatchJobs") as call:
                writer = asyncio.get_running_loop().create_task(self._write(call), name="write watches")
                try:
                    while (response := await call.read()) is not grpc.aio.EOF:
                        for watched in response.watched:
                            answer = self._waiting.pop(watched.number, None)
                            if answer is not None and not answer.done():
                                answer.set_result(watched)
                finally:
                    writer.cancel()
                    await asyncio.wait({writer})
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                failure = WatchUnsupported()
            elif error.code() is not grpc.StatusCode.UNAVAILABLE:
                failure = from_status(error)
        except (SiloClientError, ClientClosed) as error:
            failure = error
        finally:
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(failure)
            self._waiting.clear()

    async def _write(self, call: Any) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # The reader meets it, too.
            while True:
                try:
                    async with asyncio.timeout(_IDLE_S):
                        await self._filled.wait()
                except TimeoutError:
                    if not self._waiting:
                        self._is_ending = True
                        await call.done_writing()
                        return
                    continue
                self._filled.clear()
                outgoing, self._outgoing = self._outgoing, pb.WatchJobsRequest()
                await call.write(outgoing)

    async def close(self) -> None:
        self._running.cancel()
        await asyncio.wait({self._running})
