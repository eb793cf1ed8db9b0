"""The extension of a fake server: streams whose every message is the test's."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any  # Requests and answers are messages of any kind.

import grpc

from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2 as v1
from tests.builders import until
from tests.integration.fake_silo import FakeSilo, Status, fake_silo, value

_SERVICE = pb.DESCRIPTOR.services_by_name["SiloExt"]


class FakeStream:
    """One stream from a client, as the server sees it."""

    def __init__(self, context: Any) -> None:
        self.requests: list[Any] = []
        self.metadata = dict(context.invocation_metadata() or ())
        self.is_over = False
        self.has_said_all = False  # The client.
        self.outlasts = False  # Goes on when the client has said all.
        self._context = context
        self._end: asyncio.Future[Status | None] = asyncio.get_running_loop().create_future()

    async def send(self, message: Any) -> None:
        await self._context.write(message)

    def end(self, status: Status | None = None) -> None:
        """End it, with an error if there is a status."""
        if not self._end.done():
            self._end.set_result(status)

    async def run(self, requests: AsyncIterator[Any]) -> None:
        reading = asyncio.get_running_loop().create_task(self._read(requests))
        try:
            await asyncio.wait({reading, self._end}, return_when=asyncio.FIRST_COMPLETED)
            if self.outlasts:
                await self._end
            if self._end.done() and (status := self._end.result()) is not None:
                await self._context.abort(status.code, status.text)
        finally:
            self.is_over = True
            reading.cancel()

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        async for request in requests:
            self.requests.append(request)
        self.has_said_all = True


class FakeWorkStream(FakeStream):
    """A worker's stream."""

    @property
    def hello(self) -> pb.Hello:
        return self.requests[0].hello

    @property
    def window(self) -> int:
        return next(request.window for request in reversed(self.requests) if request.HasField("window"))

    @property
    def held(self) -> set[str]:
        """What the worker named when it came."""
        return {held.task_id for held in self.hello.held}

    def reports(self) -> dict[str, str]:
        """How tasks ended, by their ids."""
        reports = (report for request in self.requests for report in request.reports)
        return {report.task_id: report.WhichOneof("outcome") for report in reports}

    async def welcome(self) -> None:
        await self.send(pb.WorkResponse(welcome=pb.Welcome(lease_ms=10_000, window_max=1024)))

    async def deliver(self, *tasks: v1.Task | v1.RefreshFloatingLimitTask, **also: Any) -> None:
        """Send tasks of either kind in one message."""
        await self.send(
            pb.WorkResponse(
                tasks=[task for task in tasks if isinstance(task, v1.Task)],
                refresh_tasks=[task for task in tasks if isinstance(task, v1.RefreshFloatingLimitTask)],
                **also,
            )
        )

    async def acknowledge(self, *task_ids: str, error: pb.Status | None = None) -> None:
        answers = [pb.Acknowledgement(task_id=task_id, error=error) for task_id in task_ids]
        await self.send(pb.WorkResponse(acknowledgements=answers))

    async def lose(self, *task_ids: str) -> None:
        await self.send(pb.WorkResponse(lost_leases=[pb.LostLease(task_id=id) for id in task_ids]))

    async def cancel(self, *task_ids: str) -> None:
        await self.send(pb.WorkResponse(cancellations=[pb.Cancellation(task_id=id) for id in task_ids]))


class FakeWatchStream(FakeStream):
    """A stream of watches."""

    def asked(self) -> dict[str, int]:
        """The jobs that are watched, each with the number of its watch."""
        forgotten = self.forgotten()
        watches = (watch for request in self.requests for watch in request.watch)
        return {watch.id: watch.number for watch in watches if watch.number not in forgotten}

    def forgotten(self) -> set[int]:
        return {number for request in self.requests for number in request.forget}

    async def answer(self, number: int, *, result: object = None, error: pb.Status | None = None) -> None:
        """Say that a job has succeeded, or that there is nothing to wait for."""
        watched = pb.Watched(number=number, error=error)
        if error is None:
            watched.result.status = v1.JOB_STATUS_SUCCEEDED
            watched.result.success_data.CopyFrom(value(result))
        await self.send(pb.WatchJobsResponse(watched=[watched]))


class FakeExt:
    """A fake server with the extension. Streams are welcomed unless the test does it."""

    def __init__(self) -> None:
        self.silo: FakeSilo
        self.work: list[FakeWorkStream] = []
        self.watches: list[FakeWatchStream] = []
        self.welcomes = True
        self.refuses: Status | None = None  # Every stream of a worker.
        self.refuses_watches: Status | None = None  # Every stream of watches.

    @property
    def address(self) -> str:
        return self.silo.address

    async def worker_stream(self, number: int = 1) -> FakeWorkStream:
        """The stream of that number, once its hello is here."""
        await until(lambda: len(self.work) >= number and bool(self.work[number - 1].requests))
        return self.work[number - 1]

    async def watch_stream(self, number: int = 1) -> FakeWatchStream:
        """The stream of watches of that number, once something is watched on it."""
        await until(lambda: len(self.watches) >= number and bool(self.watches[number - 1].requests))
        return self.watches[number - 1]

    async def Work(self, requests: AsyncIterator[Any], context: Any) -> None:
        stream = FakeWorkStream(context)
        self.work.append(stream)
        if self.refuses is not None:
            stream.end(self.refuses)
        elif self.welcomes:
            await stream.welcome()
        await stream.run(requests)

    async def WatchJobs(self, requests: AsyncIterator[Any], context: Any) -> None:
        stream = FakeWatchStream(context)
        self.watches.append(stream)
        if self.refuses_watches is not None:
            stream.end(self.refuses_watches)
        await stream.run(requests)

    async def EnqueueMany(self, request: pb.EnqueueManyRequest, context: Any) -> pb.EnqueueManyResponse:
        answered = await self.silo.respond("EnqueueMany", request, context)
        assert isinstance(answered, pb.EnqueueManyResponse)
        return answered

    def as_usual(self) -> None:
        """Admit all jobs."""

        async def admit(request: pb.EnqueueManyRequest) -> pb.EnqueueManyResponse:
            return admitted(request)

        self.silo.always("EnqueueMany", admit)


def admitted(request: pb.EnqueueManyRequest) -> pb.EnqueueManyResponse:
    """The answer when every job of the request is taken."""
    return pb.EnqueueManyResponse(results=[pb.EnqueueResult(id=job.id) for job in request.jobs])


@asynccontextmanager
async def fake_ext() -> AsyncIterator[FakeExt]:
    """A fake server with the extension that runs while the block runs."""
    ext = FakeExt()
    async with fake_silo(_handlers(ext)) as silo:
        ext.silo = silo
        ext.as_usual()
        try:
            yield ext
        finally:
            for stream in (*ext.work, *ext.watches):
                stream.end()


def _handlers(ext: FakeExt) -> grpc.GenericRpcHandler:
    def handler(name: str) -> Any:
        method = _SERVICE.methods_by_name[name]
        make: Callable[..., Any] = (
            grpc.stream_stream_rpc_method_handler
            if method.client_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(
            getattr(ext, name),
            request_deserializer=getattr(pb, method.input_type.name).FromString,
            response_serializer=getattr(pb, method.output_type.name).SerializeToString,
        )

    return grpc.method_handlers_generic_handler(
        _SERVICE.full_name, {name: handler(name) for name in ("Work", "WatchJobs", "EnqueueMany")}
    )
