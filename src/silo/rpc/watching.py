"""One stream of watches: which jobs a client waits for, and how they ended."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, TypeAlias  # grpc is untyped: contexts are Any here.

from silo.errors import ErrorKind, InvalidRequest, SiloError
from silo.model.view import JobView
from silo.node.node import Node
from silo.rpc.answering import status_of
from silo.rpc.auth import Access
from silo.rpc.scope import job_scope, view_bytes
from silo.shard.shard import Shard
from silo.wire import convert
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb

WATCHES_MAX = 100_000  # Of one stream.
_UNREAD_MAX = 4096  # Answers that wait to be written, before no more watches are read.
_ANSWERS = 16  # In memory at a time: each may be as large as a result can be.
_MESSAGE_BYTES = 4 << 20  # Answers beyond go with the next message; a larger one goes alone.

_Watch: TypeAlias = asyncio.Task[SiloError | None]
"""Waits for the end of one job; why it will not end, if it will not."""


class TooManyWatches(SiloError):
    """Forget some, or open another stream."""

    kind = ErrorKind.EXHAUSTED


async def ended_job(node: Node, shard: Shard, *, tenant: str, job_id: str) -> JobView:
    """The job, once it has ended.

    Raises:
        JobNotFound: the tenant has no such job, or has none any more.
        ShardClosed: also when the node stops.
        Overloaded: too much waits to be written.
        ShortOfMemory: its result is large, and memory is short.
    """
    while True:
        await shard.wait_ended(tenant=tenant, job_id=job_id)
        view = await shard.get_job(tenant=tenant, job_id=job_id)
        if view.state.status.is_terminal:  # Otherwise it was restarted meanwhile.
            node.memory.check(view_bytes(view))
            return view


class WatchStream:
    """Serves one `WatchJobs` call.

    Jobs are read when their answers can be written. So for a client that does not read, nothing is kept
    but its watches.
    """

    def __init__(self, node: Node, access: Access, context: Any) -> None:
        self._node = node
        self._access = access
        self._context = context
        self._watches: dict[int, _Watch] = {}  # Until they are answered.
        self._asked: dict[_Watch, pb.Watch] = {}
        self._ended: deque[_Watch] = deque()
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()  # Set unless `_UNREAD_MAX` have ended and were not answered.
        self._drained.set()
        self._is_complete = False  # The client asks for nothing more.

    async def run(self, requests: AsyncIterator[pb.WatchJobsRequest]) -> None:
        """Until the client has said all and everything is answered, or the node stops."""
        await self._context.send_initial_metadata(())  # See `answering`.
        loop = asyncio.get_running_loop()
        reader = loop.create_task(self._read(requests), name="read watches")
        writer = loop.create_task(self._write(), name="write watches")
        stopping = loop.create_task(self._node.stopping.wait(), name="node stops")
        try:
            await asyncio.wait({reader, writer, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                reader.result()
                await asyncio.wait({writer, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        finally:
            ending = {reader, writer, stopping, *self._watches.values()}
            for task in ending:
                task.cancel()
            await asyncio.wait(ending)

    async def _read(self, requests: AsyncIterator[pb.WatchJobsRequest]) -> None:
        async for request in requests:
            for number in request.forget:
                if (watch := self._watches.pop(number, None)) is not None:
                    watch.cancel()
            if len(self._watches) + len(request.watch) > WATCHES_MAX:
                raise TooManyWatches(f"too many jobs watched on one stream, at most {WATCHES_MAX}")
            for asked in request.watch:
                if asked.number in self._watches:
                    raise InvalidRequest(f"watch {asked.number} is not answered yet")
                self._begin(asked)
            await self._drained.wait()
        self._is_complete = True
        self._filled.set()

    def _begin(self, asked: pb.Watch) -> None:
        watch = asyncio.get_running_loop().create_task(self._wait_ended(asked), name="watch job")
        self._watches[asked.number] = watch
        self._asked[watch] = asked
        watch.add_done_callback(self._has_ended)

    async def _wait_ended(self, asked: pb.Watch) -> SiloError | None:
        try:
            shard, tenant = self._scope(asked)
            await shard.wait_ended(tenant=tenant, job_id=asked.id)
        except SiloError as refusal:
            refusal.__traceback__ = None
            return refusal
        return None

    def _scope(self, asked: pb.Watch) -> tuple[Shard, str]:
        self._access.check_call("GetJobResult", asked)
        return job_scope(self._node, asked)

    def _has_ended(self, watch: _Watch) -> None:
        if watch.cancelled():
            del self._asked[watch]
        else:
            self._ended.append(watch)
            self._filled.set()
            if len(self._ended) >= _UNREAD_MAX:
                self._drained.clear()

    async def _write(self) -> None:
        while self._watches or not self._is_complete:
            await self._filled.wait()
            self._filled.clear()
            while self._ended:
                ended = [self._ended.popleft() for _ in range(min(_ANSWERS, len(self._ended)))]
                if len(self._ended) < _UNREAD_MAX:
                    self._drained.set()
                answers = await asyncio.gather(*map(self._answer, ended))
                for part in _messages(answer for answer in answers if answer is not None):
                    await self._context.write(pb.WatchJobsResponse(watched=part))

    async def _answer(self, watch: _Watch) -> pb.Watched | None:
        """What there is to say of a job; None if nobody wants to know, or if it was restarted."""
        asked = self._asked.pop(watch)
        answer = pb.Watched(number=asked.number)
        try:
            if (refusal := watch.result()) is not None:
                raise refusal
            shard, tenant = self._scope(asked)
            view = await shard.get_job(tenant=tenant, job_id=asked.id)
            if view.state.status.is_terminal:
                self._node.memory.check(view_bytes(view))
                answer.result.CopyFrom(convert.job_result_to_pb(view))
        except SiloError as error:
            error.__traceback__ = None
            answer.error.CopyFrom(status_of(error))
        if self._watches.get(asked.number) is not watch:  # It was forgotten.
            return None
        if answer.HasField("result") or answer.HasField("error"):
            del self._watches[asked.number]
            return answer
        self._begin(asked)
        return None


def _messages(answers: Iterable[pb.Watched]) -> Iterator[list[pb.Watched]]:
    part: list[pb.Watched] = []
    size = 0
    for answer in answers:
        size += answer.ByteSize()
        if part and size > _MESSAGE_BYTES:
            yield part
            part, size = [], answer.ByteSize()
        part.append(answer)
    if part:
        yield part
