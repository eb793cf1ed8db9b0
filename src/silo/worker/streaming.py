"""Tasks by push: one stream to each server that has shards, as `silo.ext.v1` describes it.

A report stays here until it is acknowledged. When a stream breaks, the next one to the owner of its
shard sends it again, and names all that the worker still has.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from typing import Any  # The grpc stub is untyped.

import grpc

from silo.client.batching import rpc_error
from silo.client.client import SiloGRPCClient
from silo.client.errors import (
    ClientClosed,
    SiloClientError,
    TaskNotFoundError,
    from_status,
    is_broken_stream,
    is_wrong_shard,
)
from silo.client.ids import new_session_id
from silo.client.messages import leased_from_pb
from silo.errors import LEASE_NOT_FOUND
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2 as v1
from silo.worker.errors import is_being_cancelled
from silo.worker.held import HeldTask
from silo.worker.reports import report_to_v1
from silo.worker.source import Desk

_DELAY_S_MIN, _DELAY_S_MAX = 0.05, 2.0  # Before a broken stream is opened again.
_STEADY_S = 1.0  # A stream that breaks sooner has not worked.
_RESEND_S = 0.2  # Before a report is sent again that a server could not take.
_ELSEWHERE_TIMES = 150  # Half a minute: by then the owners of all shards were asked for anew.
_GATHER_S = 0.001  # How long a report waits for others while there are tasks to run.
_MESSAGE_REPORTS, _MESSAGE_BYTES = 512, 4 << 20
_END_S = 1.0  # How long a server may take to end a stream that we ended.


class ExtensionMissing(Exception):
    """The server only speaks `silo.v1`."""


class _Tries:
    """Tries of one thing until it works: when the next one is due, and what is told of those that failed."""

    def __init__(self, desk: Desk, rng: Random) -> None:
        self._desk = desk
        self._rng = rng
        self._delay_s = _DELAY_S_MIN
        self._told: set[type[BaseException]] = set()
        self.have_failed = False  # Since it last worked.

    def worked(self) -> None:
        """The next failure is the first one."""
        self.have_failed = False
        self._delay_s = _DELAY_S_MIN
        self._told.clear()

    async def failed(self, error: BaseException, *, is_silent: bool = False) -> None:
        """Tell of it, once for each kind since it last worked, and wait before the next try."""
        self.have_failed = True
        if not is_silent and type(error) not in self._told:
            self._told.add(type(error))
            self._desk.error(error)
        await asyncio.sleep(self._delay_s * self._rng.uniform(0.5, 1.0))
        self._delay_s = min(2 * self._delay_s, _DELAY_S_MAX)


class _Sent:
    """A report that was not acknowledged yet."""

    def __init__(self, held: HeldTask, report: pb.Report) -> None:
        self.held = held
        self.report = report
        self.times = 0  # How often it was sent.


class Streams:
    """A worker's streams. A `Source`."""

    can_hand_back = True

    def __init__(
        self, client: SiloGRPCClient, desk: Desk, *, worker_id: str, task_groups: Sequence[str]
    ) -> None:
        self.client = client
        self.router = client.router
        self.desk = desk
        self.worker_id = worker_id
        self.task_groups = task_groups
        self.session = new_session_id()
        self.unanswered: dict[str, _Sent] = {}  # By task id.
        self._rng = Random()
        # What runs since before this session. It goes on without leases that are renewed.
        self._earlier = frozenset(held.id for held in desk.held())
        self._streams: dict[str, _Stream] = {}  # By address.
        self._running: dict[asyncio.Task[None], _Stream] = {}
        self._moved = asyncio.Event()  # The topology has changed.
        self._answered = asyncio.Event()
        self._later: set[asyncio.TimerHandle] = set()
        self._is_stopping = False
        self._is_closed = False

    async def run(self) -> None:
        """Keep a stream to every server that has shards.

        Raises:
            ExtensionMissing: one of them has no such thing.
        """
        unwatch = self.router.watch_topology(self._moved.set)
        try:
            await self._find_servers()
            while not self._is_closed:
                self._moved.clear()
                self._follow_topology()
                moved = asyncio.ensure_future(self._moved.wait())
                try:
                    await asyncio.wait({moved, *self._running}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    moved.cancel()
                for task in [task for task in self._running if task.done()]:
                    stream = self._running.pop(task)
                    if self._streams.get(stream.address) is stream:
                        del self._streams[stream.address]
                    task.result()  # Raises what must end all of them.
        finally:
            unwatch()
            await self._cancel_all()

    def tries(self) -> _Tries:
        return _Tries(self.desk, self._rng)

    async def _find_servers(self) -> None:
        tries = self.tries()
        while True:
            try:
                await self.router.ensure_topology()
            except ClientClosed:
                raise
            except asyncio.CancelledError as error:
                if is_being_cancelled():
                    raise
                failure: BaseException = error
            except Exception as error:  # Whatever a token function raises: the next look may work.
                failure = error
            else:
                return
            await tries.failed(failure)

    async def look_again(self) -> None:
        """Ask who owns what now; a stream that does not come up may have moved."""
        try:
            await self.router.refresh_topology()
        except ClientClosed:
            raise
        except Exception:  # Whoever opens the stream again meets it, too, and tells of it.
            return

    def _follow_topology(self) -> None:
        wanted = self.router.topology.addresses()
        for address in self._streams.keys() - set(wanted):
            self._streams.pop(address).end()
        for address in wanted:
            if address not in self._streams:
                stream = self._streams[address] = _Stream(address, self)
                task = asyncio.get_running_loop().create_task(stream.run(), name=f"work {address}")
                self._running[task] = stream
        self.changed()

    async def _cancel_all(self) -> None:
        for handle in self._later:
            handle.cancel()
        running = list(self._running)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        self._running.clear()
        self._streams.clear()

    def changed(self) -> None:
        window = 0 if self._is_stopping else self.desk.window
        for stream in self._streams.values():
            stream.set_window(max(1, window // len(self._streams)) if window else 0)

    # Reports

    async def report(self, held: HeldTask, report: pb.Report) -> None:
        """Send it with the next message. Refusals come back to the task as `report_refused`."""
        if self._is_closed:
            try:
                await self._report_by_itself(report)
            finally:
                self.desk.forget(held)
            return
        sent = self.unanswered[held.id] = _Sent(held, report)
        self._send(sent)

    async def _report_by_itself(self, report: pb.Report) -> None:
        """There are no streams any more: the handler took longer than its worker was given to stop."""
        request = report_to_v1(report)
        if isinstance(request, v1.ReportOutcomeRequest):
            await self.client.send_report(request, shard=report.shard)
        elif request is not None:
            await self.client.send_refresh_report(request, shard=report.shard)

    def left(self) -> list[tuple[HeldTask, pb.Report]]:
        """Reports that were not answered."""
        return [(sent.held, sent.report) for sent in self.unanswered.values()]

    def _send(self, sent: _Sent) -> None:
        """Put it on the stream to its shard's owner; without one it waits for the next stream there."""
        stream = self._streams.get(self.router.owner_of(sent.report.shard) or "")
        if stream is None and len(self._streams) == 1:
            [stream] = self._streams.values()
        if stream is not None and stream.is_connected:
            stream.send(sent)

    def answered(self, answer: pb.Acknowledgement) -> None:
        sent = self.unanswered.get(answer.task_id)
        if sent is None:
            return
        if answer.HasField("error"):
            error = rpc_error(answer.error)
            is_elsewhere = is_wrong_shard(error) and sent.times < _ELSEWHERE_TIMES
            if error.code() is grpc.StatusCode.UNAVAILABLE or is_elsewhere:
                self._send_later(sent)
                return
            refusal = from_status(error, task_id=answer.task_id)
            refusal.after_retry = sent.times > 1
            self.desk.refused(sent.held, refusal)
        self._done(sent)

    def _done(self, sent: _Sent) -> None:
        del self.unanswered[sent.held.id]
        self.desk.forget(sent.held)
        if not self.unanswered:
            self._answered.set()

    def _send_later(self, sent: _Sent) -> None:
        def send() -> None:
            self._later.discard(handle)
            if self.unanswered.get(sent.held.id) is sent:
                self._send(sent)

        handle = asyncio.get_running_loop().call_later(_RESEND_S, send)
        self._later.add(handle)

    # What a server says of tasks

    def take(self, response: pb.WorkResponse) -> bool:
        """Take one message, in the order of its fields; False if it had tasks that come too late."""
        has_tasks = bool(response.tasks or response.refresh_tasks)
        if has_tasks and not self._is_closed:
            leased = leased_from_pb(response)
            self.desk.deliver(leased.tasks, leased.refresh_tasks)
        for answer in response.acknowledgements:
            self.answered(answer)
        for cancellation in response.cancellations:
            held = self.desk.find(cancellation.task_id)
            if held is not None:
                held.was_cancelled()
        for lost in response.lost_leases:
            held = self.desk.find(lost.task_id)
            if held is not None and not held.is_settled:  # Otherwise the answer to its report decides.
                held.was_lost(TaskNotFoundError(held.id, LEASE_NOT_FOUND))
                self.desk.forget(held)
        return not (has_tasks and self._is_closed)

    def held_at(self, address: str) -> list[HeldTask]:
        """What the worker has of the shards of one server."""
        held = [held for held in self.desk.held() if held.id not in self._earlier]
        return [held for held in held if self.router.owner_of(held.shard) in (address, None)]

    # The end

    async def stop(self) -> None:
        self._is_stopping = True
        self.changed()

    async def close(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.unanswered and (left_s := deadline - loop.time()) > 0:
            self._answered.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._answered.wait()
        self._is_closed = True
        running = list(self._running)
        for stream in self._streams.values():
            stream.end()
        if running:
            await asyncio.wait(running, timeout=_END_S)
        self._moved.set()


class _Stream:
    """The stream to one server, opened again whenever it breaks."""

    def __init__(self, address: str, owner: Streams) -> None:
        self.address = address
        self.is_connected = False
        self._owner = owner
        self._window = 0
        self._window_sent: int | None = None
        self._outgoing: list[_Sent] = []
        self._filled = asyncio.Event()
        self._is_ending = False
        self._has_strays = False  # Tasks came after the end was said.

    def set_window(self, tasks: int) -> None:
        self._window = tasks
        if self._window_sent != tasks:
            self._filled.set()

    def send(self, sent: _Sent) -> None:
        self._outgoing.append(sent)
        self._filled.set()

    def end(self) -> None:
        """Say all there is to say and end."""
        self._is_ending = True
        self._filled.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        tries = self._owner.tries()
        # After the end the session is resumed once more if tasks were still on their way: those that
        # a worker does not name then go back, and are no attempts.
        while not self._is_ending or self._has_strays:
            self._has_strays = is_passing = False
            began = loop.time()
            try:
                await self._serve()
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    raise ExtensionMissing from error
                failure: BaseException = from_status(error)
                failure.__cause__ = error
                is_passing = is_broken_stream(error)
            except ClientClosed:
                raise
            except asyncio.CancelledError as error:
                if is_being_cancelled():
                    raise
                failure = error
            except Exception as error:  # Whatever a token function raises: the next try may work.
                failure = error
            else:
                failure = SiloClientError(f"{self.address} ended the stream of tasks")
            was_connected, self.is_connected = self.is_connected, False
            is_passing |= was_connected
            if self._is_ending:
                continue
            if was_connected and loop.time() - began >= _STEADY_S:
                tries.worked()
            # One break is nothing: servers are restarted.
            await tries.failed(failure, is_silent=is_passing and not tries.have_failed)
            await self._owner.look_again()

    async def _serve(self) -> None:
        """One stream, from hello to its end."""
        async with self._owner.router.stream(self.address, "Work") as call:
            await call.write(self._hello())
            writer: asyncio.Task[None] | None = None
            try:
                while (response := await call.read()) is not grpc.aio.EOF:
                    if writer is None:
                        self.is_connected = True
                        self._outgoing = [
                            sent
                            for sent in self._owner.unanswered.values()
                            if self._owner.router.owner_of(sent.report.shard) in (self.address, None)
                        ]
                        self._filled.set()
                        writer = asyncio.get_running_loop().create_task(self._write(call), name="write work")
                    if not self._owner.take(response):
                        self._has_strays = True
            finally:
                if writer is not None:
                    writer.cancel()
                    await asyncio.wait({writer})

    def _hello(self) -> pb.WorkRequest:
        owner = self._owner
        self._window_sent = self._window
        return pb.WorkRequest(
            hello=pb.Hello(
                worker_id=owner.worker_id,
                task_groups=owner.task_groups,
                session=owner.session,
                slots=owner.desk.slots,
                held=[pb.HeldTask(task_id=held.id, shard=held.shard) for held in owner.held_at(self.address)],
            ),
            window=self._window,
        )

    async def _write(self, call: Any) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # The reader meets it, too.
            while True:
                await self._filled.wait()
                if self._outgoing and self._owner.desk.waiting:
                    await asyncio.sleep(_GATHER_S)
                self._filled.clear()
                request = pb.WorkRequest()
                if self._window != self._window_sent:
                    self._window_sent = request.window = self._window
                self._take_reports(request)
                if request.reports or request.HasField("window"):
                    await call.write(request)
                elif self._is_ending:
                    await call.done_writing()
                    return
                if self._outgoing or self._is_ending:
                    self._filled.set()

    def _take_reports(self, request: pb.WorkRequest) -> None:
        size = taken = 0
        for sent in self._outgoing[:_MESSAGE_REPORTS]:
            size += sent.report.ByteSize()
            if taken and size > _MESSAGE_BYTES:
                break
            taken += 1
            sent.times += 1
            request.reports.append(sent.report)
        del self._outgoing[:taken]
