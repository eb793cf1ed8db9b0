"""One worker's stream: messages in, messages out, in step with its session."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any  # grpc is untyped: contexts are Any here.

from silo.errors import InvalidRequest, SiloError
from silo.model.job import LEASE_MS
from silo.node.node import Node
from silo.node.session import WINDOW_MAX, Outbox, Session
from silo.rpc.answering import status_of
from silo.rpc.auth import Access
from silo.rpc.scope import worker_scope
from silo.shard.shard import AnyReport, Shard
from silo.wire import convert_ext, validate
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb

SESSION_CHARS_MAX = 64  # Each of its leases has it.
TASK_GROUPS_MAX = 1_000  # Of one stream.
HELD_MAX = 10_000
REPORTS_MAX = 10_000  # Of one message.
_REPORTS_AT_ONCE = 64  # Batches on their way to the store, before more is read.


class WorkStream:
    """Serves one `Work` call."""

    def __init__(self, node: Node, access: Access, context: Any) -> None:
        self._node = node
        self._access = access
        self._context = context
        self._reporting: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None  # Of a report, unforeseen.

    async def run(self, requests: AsyncIterator[pb.WorkRequest]) -> None:
        """Until the worker has said all and everything is answered, or the session ends."""
        first = await anext(requests, None)
        if first is None or not first.HasField("hello"):
            raise InvalidRequest("the first message of a stream must say hello")
        await self._context.send_initial_metadata(())  # See `answering`.
        session = self._join(first.hello)
        loop = asyncio.get_running_loop()
        reader = loop.create_task(self._read(session, first, requests), name=f"read {session!r}")
        writer = loop.create_task(self._write(session), name=f"write {session!r}")
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                reader.result()
            await writer
            if self._failure is not None:
                raise self._failure
        finally:
            # Reports on their way stay on it: they hold, though nobody hears of it.
            self._node.sessions.leave(session)
            reader.cancel()
            writer.cancel()
            await asyncio.wait({reader, writer})

    def _join(self, hello: pb.Hello) -> Session:
        if not 0 < len(hello.session) <= SESSION_CHARS_MAX:
            raise InvalidRequest(f"session must have from 1 to {SESSION_CHARS_MAX} characters")
        validate.worker_id(hello.worker_id)
        if not 0 < len(hello.task_groups) <= TASK_GROUPS_MAX:
            raise InvalidRequest(f"task_groups must name from 1 to {TASK_GROUPS_MAX}")
        if len(hello.held) > HELD_MAX:
            raise InvalidRequest(f"too many held tasks, at most {HELD_MAX}")
        for task_group in hello.task_groups:
            validate.task_group(task_group, is_new=False)
            self._access.check_task(task_group)
        return self._node.sessions.join(
            session_id=hello.session,
            worker_id=hello.worker_id,
            task_groups=hello.task_groups,
            slots=hello.slots,
            held={held.task_id: validate.shard_id(held.shard) for held in hello.held},
        )

    # In

    async def _read(
        self, session: Session, first: pb.WorkRequest, requests: AsyncIterator[pb.WorkRequest]
    ) -> None:
        self._take(session, first)
        async for request in requests:
            if request.HasField("hello"):
                raise InvalidRequest("only the first message of a stream may say hello")
            self._take(session, request)
            if len(self._reporting) >= _REPORTS_AT_ONCE:
                await asyncio.wait(self._reporting, return_when=asyncio.FIRST_COMPLETED)
            await session.drained.wait()
        session.close()

    def _take(self, session: Session, request: pb.WorkRequest) -> None:
        if request.HasField("window"):
            session.set_window(request.window)
        if len(request.reports) > REPORTS_MAX:
            raise InvalidRequest(f"too many reports in one message, at most {REPORTS_MAX}")
        by_shard: dict[Shard, list[tuple[str, AnyReport]]] = {}
        for report in request.reports:
            try:
                shard = worker_scope(self._node, self._access, report)
                taken = convert_ext.report_from_pb(report)
            except SiloError as refusal:
                refusal.__traceback__ = None  # It has the report in it.
                session.acknowledge([(report.task_id, refusal)])
            else:
                by_shard.setdefault(shard, []).append((report.task_id, taken))
        for shard, reports in by_shard.items():
            task = asyncio.get_running_loop().create_task(session.report(shard, reports), name="reports")
            self._reporting.add(task)
            task.add_done_callback(partial(self._has_reported, session))

    def _has_reported(self, session: Session, task: asyncio.Task[None]) -> None:
        self._reporting.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failure = failure
            session.close()

    # Out

    async def _write(self, session: Session) -> None:
        welcome = pb.Welcome(lease_ms=LEASE_MS, window_max=WINDOW_MAX)
        await self._context.write(pb.WorkResponse(welcome=welcome))
        while not session.is_closed:
            await session.filled.wait()
            session.filled.clear()
            await self._write_outbox(session)
        while self._reporting or session.outbox:  # The stream ends, but not before these are acknowledged.
            if self._reporting:
                await asyncio.wait(self._reporting, return_when=asyncio.FIRST_COMPLETED)
            await self._write_outbox(session)

    async def _write_outbox(self, session: Session) -> None:
        while session.outbox:
            await self._context.write(_message(session.take_outbox()))


def _message(outbox: Outbox) -> pb.WorkResponse:
    response = pb.WorkResponse()
    for task_id, refusal in outbox.acknowledged:
        acknowledgement = response.acknowledgements.add(task_id=task_id)
        if refusal is not None:
            acknowledgement.error.CopyFrom(status_of(refusal))
    for task_id, cancelled_at_ms in outbox.cancelled.items():
        response.cancellations.add(task_id=task_id, cancelled_at_ms=cancelled_at_ms)
    for task_id in outbox.lost:
        response.lost_leases.add(task_id=task_id)
    convert_ext.add_tasks(response, outbox.tasks.values())
    return response
