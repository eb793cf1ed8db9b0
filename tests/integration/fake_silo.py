"""A server of `silo.v1.Silo` on a real loopback socket that answers what a test tells it to."""

import asyncio
import socket
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any  # Requests and answers are messages of any kind.

import grpc
import msgpack

from silo import ShardRouting, SiloGRPCClient
from silo.wire.pb.silo.v1 import silo_pb2 as pb

SHARD = "11111111-1111-4111-8111-111111111111"
GROUP = "g"
FAST = ShardRouting(retry_delay_ms=1, topology_refresh_interval_ms=0, topology_refresh_timeout_ms=2000)
_SERVICE = pb.DESCRIPTOR.services_by_name["Silo"]
_WAIT_S_MAX = 0.05


@dataclass(frozen=True)
class Status:
    """An answer that is an error."""

    code: grpc.StatusCode
    text: str = ""
    owner: str | None = None  # Goes into the trailing metadata, as a redirect.
    node: str | None = None  # As the name of the owner.


Answer = Any  # A message, a Status, or an async function from the request to one of them.


def not_found(text: str, *, owner: str | None = None) -> Status:
    return Status(grpc.StatusCode.NOT_FOUND, text, owner)


def unavailable(text: str = "try again") -> Status:
    return Status(grpc.StatusCode.UNAVAILABLE, text)


def wrong_shard(*, owner: str | None = None) -> Status:
    return not_found("shard not found", owner=owner)


@dataclass(frozen=True)
class Received:
    """One call as it arrived."""

    method: str
    request: Any
    metadata: Mapping[str, str]


@dataclass
class FakeSilo:
    """What it was asked, and what it will answer: first what a test gave it, then the usual."""

    address: str = ""
    received: list[Received] = field(default_factory=list)
    shards: list[tuple[str, str, str, str | None]] = field(default_factory=lambda: [(SHARD, "", "", None)])
    tasks: deque[pb.Task] = field(default_factory=deque)
    refresh_tasks: deque[pb.RefreshFloatingLimitTask] = field(default_factory=deque)
    outcomes: dict[str, pb.ReportOutcomeRequest] = field(default_factory=dict)
    refresh_outcomes: dict[str, pb.ReportRefreshOutcomeRequest] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)  # Tasks whose heartbeats say so.
    in_flight: int = 0
    _answers: dict[str, deque[Answer]] = field(default_factory=lambda: defaultdict(deque))
    _always: dict[str, Answer] = field(default_factory=dict)
    _delivered: asyncio.Event = field(default_factory=asyncio.Event)
    _server: Any = None

    def answer(self, method: str, *answers: Answer) -> None:
        """Answer the next calls of `method` like this, one after another."""
        self._answers[method].extend(answers)

    def always(self, method: str, answer: Answer) -> None:
        """Answer all calls of `method` like this."""
        self._always[method] = answer

    def as_usual(self, method: str) -> None:
        self._always.pop(method, None)

    def calls(self, method: str) -> list[Any]:
        """The requests of `method`, in the order in which they came."""
        return [call.request for call in self.received if call.method == method]

    def metadata(self, method: str) -> list[Mapping[str, str]]:
        return [call.metadata for call in self.received if call.method == method]

    def deliver(self, *tasks: pb.Task | pb.RefreshFloatingLimitTask) -> None:
        """Have these tasks, of either kind, ready for whoever polls."""
        self.tasks.extend(task for task in tasks if isinstance(task, pb.Task))
        self.refresh_tasks.extend(task for task in tasks if not isinstance(task, pb.Task))
        self._delivered.set()

    async def stop(self) -> None:
        await self._server.stop(None)

    # The usual answers

    def _get_cluster_info(self, request: Any) -> pb.GetClusterInfoResponse:
        return pb.GetClusterInfoResponse(
            num_shards=len(self.shards),
            shard_owners=[
                pb.ShardOwner(
                    shard_id=shard_id,
                    range_start=start,
                    range_end=end,
                    grpc_addr=self.address if owner is None else owner,
                )
                for shard_id, start, end, owner in self.shards
            ],
        )

    async def _lease_tasks(self, request: Any) -> pb.LeaseTasksResponse:
        if not self.tasks and not self.refresh_tasks:
            self._delivered.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_WAIT_S_MAX):
                    await self._delivered.wait()
        taken = [self.tasks.popleft() for _ in range(min(request.max_tasks, len(self.tasks)))]
        room = request.max_tasks - len(taken)
        refreshes = [self.refresh_tasks.popleft() for _ in range(min(room, len(self.refresh_tasks)))]
        return pb.LeaseTasksResponse(tasks=taken, refresh_tasks=refreshes)

    def _report_outcome(self, request: Any) -> pb.ReportOutcomeResponse:
        self.outcomes[request.task_id] = request
        return pb.ReportOutcomeResponse()

    def _report_refresh_outcome(self, request: Any) -> pb.ReportRefreshOutcomeResponse:
        self.refresh_outcomes[request.task_id] = request
        return pb.ReportRefreshOutcomeResponse()

    def _import_jobs(self, request: Any) -> pb.ImportJobsResponse:
        return pb.ImportJobsResponse(results=[an_import_result(job.id) for job in request.jobs])

    def _heartbeat(self, request: Any) -> pb.HeartbeatResponse:
        is_cancelled = request.task_id in self.cancelled
        return pb.HeartbeatResponse(cancelled=is_cancelled, cancelled_at_ms=7 if is_cancelled else None)

    async def _usual(self, method: str, request: Any) -> Any:
        match method:
            case "GetClusterInfo":
                return self._get_cluster_info(request)
            case "LeaseTasks":
                return await self._lease_tasks(request)
            case "ReportOutcome":
                return self._report_outcome(request)
            case "ReportRefreshOutcome":
                return self._report_refresh_outcome(request)
            case "Heartbeat":
                return self._heartbeat(request)
            case "Enqueue":
                return pb.EnqueueResponse(id=request.id)
            case "ImportJobs":
                return self._import_jobs(request)
            case _:
                return getattr(pb, _SERVICE.methods_by_name[method].output_type.name)()

    async def respond(self, method: str, request: Any, context: Any) -> Any:
        self.received.append(Received(method, request, dict(context.invocation_metadata() or ())))
        self.in_flight += 1
        try:
            if self._answers[method]:
                answer = self._answers[method].popleft()
            elif method in self._always:
                answer = self._always[method]
            else:
                answer = await self._usual(method, request)
            if callable(answer):
                answer = await answer(request)
        finally:
            self.in_flight -= 1
        if isinstance(answer, Status):
            trailing = {"x-silo-shard-owner-addr": answer.owner, "x-silo-shard-owner-node": answer.node}
            sent = tuple((key, value) for key, value in trailing.items() if value is not None)
            await context.abort(answer.code, answer.text, sent)
        return answer


@asynccontextmanager
async def fake_silo(*services: grpc.GenericRpcHandler) -> AsyncIterator[FakeSilo]:
    """A fake server that runs while the block runs, with `services` beside it."""
    silo = FakeSilo()
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    server.add_generic_rpc_handlers((_handlers(silo), *services))
    silo.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    silo._server = server
    await server.start()
    try:
        yield silo
    finally:
        await server.stop(None)


def _handlers(silo: FakeSilo) -> grpc.GenericRpcHandler:
    def handler(name: str) -> Callable[[Any, Any], Awaitable[Any]]:
        async def handle(request: Any, context: Any) -> Any:
            return await silo.respond(name, request, context)

        return handle

    return grpc.method_handlers_generic_handler(
        _SERVICE.full_name,
        {
            method.name: grpc.unary_unary_rpc_method_handler(
                handler(method.name),
                request_deserializer=getattr(pb, method.input_type.name).FromString,
                response_serializer=getattr(pb, method.output_type.name).SerializeToString,
            )
            for method in _SERVICE.methods
        },
    )


def a_client(*servers: FakeSilo | str, **options: Any) -> SiloGRPCClient:
    """A client of these servers that does not wait long between tries."""
    addresses = [server if isinstance(server, str) else server.address for server in servers]
    return SiloGRPCClient(addresses, **{"shard_routing": FAST, **options})


def a_task(id: str = "t", *, payload: Any = "payload", **fields: Any) -> pb.Task:
    """A task as a server would send it."""
    given = {"job_id": f"job-{id}", "shard": SHARD, "task_group": GROUP, "attempt_number": 1} | fields
    packed = payload if isinstance(payload, pb.SerializedBytes) else value(payload)
    return pb.Task(id=id, payload=packed, lease_ms=10_000, **given)


def a_refresh_task(id: str = "r", **fields: Any) -> pb.RefreshFloatingLimitTask:
    """A refresh task as a server would send it."""
    given = {"queue_key": "q", "current_max_concurrency": 5, "shard": SHARD, "task_group": GROUP} | fields
    return pb.RefreshFloatingLimitTask(id=id, lease_ms=10_000, **given)


def an_import_result(id: str = "j", error: str | None = None, **fields: Any) -> pb.ImportJobResult:
    """What became of an imported job: it waits for its next attempt, unless there is an error."""
    return pb.ImportJobResult(id=id, success=error is None, error=error, **fields)


def value(plain: Any) -> pb.SerializedBytes:
    return pb.SerializedBytes(msgpack=msgpack.packb(plain))


def nobody() -> str:
    """An address at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"
