"""Many enqueues in one call: what is asked for while calls are under way goes with the next one.

Nothing waits for a timer. A lone enqueue is sent at once, and the more there are at a time the
larger the batches become.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from typing import NamedTuple

import grpc

from silo.wire.pb.silo.ext.v1 import ext_pb2 as ext
from silo.wire.pb.silo.v1 import silo_pb2 as pb

BATCH_JOBS_MAX = 500
BATCH_BYTES_MAX = 4 << 20
BATCHES_MAX = 4  # Under way at a time, to one server.

Send = Callable[[ext.EnqueueManyRequest], Awaitable[ext.EnqueueManyResponse]]


class _Waiting(NamedTuple):
    request: pb.EnqueueRequest
    answer: "asyncio.Future[pb.EnqueueResponse]"
    context: Context  # Of its caller: a batch goes with the trace of its first job.


class Batcher:
    """The enqueues to one server."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: list[_Waiting] = []
        self._under_way: set[asyncio.Task[None]] = set()
        self._is_scheduled = False

    async def enqueue(self, request: pb.EnqueueRequest) -> pb.EnqueueResponse:
        """Send it with others.

        A caller that is cancelled leaves the job in its batch.

        Raises:
            AioRpcError: it was refused by itself, or its batch as a whole.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(request, loop.create_future(), copy_context())
        self._waiting.append(waiting)
        if not self._is_scheduled and len(self._under_way) < BATCHES_MAX:
            self._is_scheduled = True
            loop.call_soon(self._begin)  # Whoever is ready to enqueue joins.
        return await waiting.answer

    def _begin(self) -> None:
        self._is_scheduled = False
        while self._waiting and len(self._under_way) < BATCHES_MAX:
            batch = self._take_batch()
            task = asyncio.get_running_loop().create_task(
                self._run(batch), name="enqueue many", context=batch[0].context
            )
            self._under_way.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._begin()

    def _take_batch(self) -> list[_Waiting]:
        size = count = 0
        for waiting in self._waiting[:BATCH_JOBS_MAX]:
            size += waiting.request.ByteSize()
            if count and size > BATCH_BYTES_MAX:
                break
            count += 1
        batch = self._waiting[:count]
        del self._waiting[:count]
        return batch

    async def _run(self, batch: list[_Waiting]) -> None:
        try:
            response = await self._send(ext.EnqueueManyRequest(jobs=[waiting.request for waiting in batch]))
            for waiting, result in zip(batch, response.results, strict=True):
                if waiting.answer.done():
                    continue
                if result.HasField("error"):
                    waiting.answer.set_exception(rpc_error(result.error))
                else:
                    waiting.answer.set_result(pb.EnqueueResponse(id=result.id))
        except asyncio.CancelledError:
            for waiting in batch:
                waiting.answer.cancel()
            raise
        except Exception as error:  # Whatever went wrong: each caller decides whether to try again.
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)


def rpc_error(status: ext.Status) -> grpc.aio.AioRpcError:
    """The error that a call of its own would have ended with."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=status.message)


_CODES = {code.value[0]: code for code in grpc.StatusCode}
