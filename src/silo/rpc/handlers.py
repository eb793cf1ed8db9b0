"""The calls of `silo.v1.Silo`: check, convert, call, convert.

Every job call starts alike: shard id, shard, tenant, range, in this order; then its arguments.
"""

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast  # grpc is untyped: contexts are Any here.
from urllib.parse import quote

import grpc
from google.protobuf.message import DecodeError, Message

from silo.errors import ErrorKind, SiloError
from silo.node.node import Node
from silo.rpc.status import STATUS
from silo.shard.shard import Shard
from silo.wire import convert, validate
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2_grpc

log = logging.getLogger(__name__)

WAIT_KEY = "silo-wait-ms"  # Our addition: how long a LeaseTasks call may wait for work.
_WAIT_MS = 25
_WAIT_MS_MAX = 30_000
_TEXT_BYTES_MAX = 4096  # A status text travels in a header, of which clients take 8 KiB at most.
_SERVICE = pb.DESCRIPTOR.services_by_name["Silo"]

_Handler = TypeVar("_Handler", bound=Callable[..., Awaitable[Any]])


class DevModeOnly(SiloError):
    kind = ErrorKind.DENIED


def _answering(handler: _Handler) -> _Handler:
    """Turn what a handler raises into a status. Anything unforeseen is INTERNAL, and logged."""

    @functools.wraps(handler)
    async def answer(self: "SiloServicer", request: Any, context: Any) -> Any:
        try:
            return await handler(self, request, context)
        except SiloError as error:
            await context.abort(STATUS[error.kind], _shortened(error.message))
        except Exception as error:
            if context.done() or isinstance(error, grpc.aio.AbortError):
                raise
            log.exception("call failed", extra={"fields": {"method": handler.__name__}})
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")

    return cast(_Handler, answer)


class SiloServicer(silo_pb2_grpc.SiloServicer):
    """Answers for one node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def _job_scope(self, request: Any) -> tuple[Shard, str]:
        """The shard and the tenant of a job call."""
        shard = self._node.shard(validate.shard_id(request.shard))
        tenant = validate.job_tenant(request.tenant, tenancy_enabled=self._node.tenancy_enabled)
        # With tenancy off a client may hash wrongly just as well: work must not land where nobody looks.
        validate.tenant_in_range(tenant, shard=shard.shard_id, hash_range=shard.range)
        return shard, tenant

    def _worker_scope(self, request: Any) -> Shard:
        """The shard of a worker's call."""
        shard = self._node.shard(validate.shard_id(request.shard))
        tenant = validate.worker_tenant(request.tenant_id, tenancy_enabled=self._node.tenancy_enabled)
        if tenant is not None:
            validate.tenant_in_range(tenant, shard=shard.shard_id, hash_range=shard.range)
        return shard

    @_answering
    async def GetClusterInfo(
        self, request: pb.GetClusterInfoRequest, context: Any
    ) -> pb.GetClusterInfoResponse:
        node = self._node
        owners = [
            pb.ShardOwner(
                shard_id=info.shard_id,
                grpc_addr=node.advertised_addr,
                node_id=node.node_id,
                range_start=info.range.start,
                range_end=info.range.end,
            )
            for info in node.shard_map()
        ]
        member = pb.ClusterMember(node_id=node.node_id, grpc_addr=node.advertised_addr)
        return pb.GetClusterInfoResponse(
            num_shards=len(owners),
            shard_owners=owners,
            this_node_id=node.node_id,
            this_grpc_addr=node.advertised_addr,
            members=[member],
        )

    @_answering
    async def GetNodeInfo(self, request: pb.GetNodeInfoRequest, context: Any) -> pb.GetNodeInfoResponse:
        shards = sorted(self._node.open_shards(), key=lambda shard: shard.shard_id)
        return pb.GetNodeInfoResponse(
            node_id=self._node.node_id,
            owned_shards=[
                pb.OwnedShardInfo(
                    shard_id=shard.shard_id,
                    total_jobs=shard.counts.total_jobs,
                    completed_jobs=shard.counts.completed_jobs,
                    cleanup_status="CompactionDone",
                    created_at_ms=shard.created_at_ms,
                )
                for shard in shards
            ],
        )

    @_answering
    async def Enqueue(self, request: pb.EnqueueRequest, context: Any) -> pb.EnqueueResponse:
        shard, tenant = self._job_scope(request)
        validate.priority(request.priority)
        validate.metadata(request.metadata)
        validate.task_group(request.task_group, is_new=True)
        validate.limits(request.limits)
        new = convert.new_job_from_pb(request, tenant=tenant)
        validate.payload(new.payload)
        return pb.EnqueueResponse(id=await shard.enqueue(new))

    @_answering
    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        shard, tenant = self._job_scope(request)
        return convert.job_to_pb(
            await shard.get_job(tenant=tenant, job_id=request.id, with_attempts=request.include_attempts)
        )

    @_answering
    async def GetJobResult(self, request: pb.GetJobResultRequest, context: Any) -> pb.GetJobResultResponse:
        shard, tenant = self._job_scope(request)
        return convert.job_result_to_pb(await shard.get_job(tenant=tenant, job_id=request.id))

    @_answering
    async def DeleteJob(self, request: pb.DeleteJobRequest, context: Any) -> pb.DeleteJobResponse:
        shard, tenant = self._job_scope(request)
        await shard.delete(tenant=tenant, job_id=request.id)
        return pb.DeleteJobResponse()

    @_answering
    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        shard, tenant = self._job_scope(request)
        await shard.cancel(tenant=tenant, job_id=request.id)
        return pb.CancelJobResponse()

    @_answering
    async def RestartJob(self, request: pb.RestartJobRequest, context: Any) -> pb.RestartJobResponse:
        shard, tenant = self._job_scope(request)
        await shard.restart(tenant=tenant, job_id=request.id)
        return pb.RestartJobResponse()

    @_answering
    async def ExpediteJob(self, request: pb.ExpediteJobRequest, context: Any) -> pb.ExpediteJobResponse:
        shard, tenant = self._job_scope(request)
        await shard.expedite(tenant=tenant, job_id=request.id)
        return pb.ExpediteJobResponse()

    @_answering
    async def LeaseTask(self, request: pb.LeaseTaskRequest, context: Any) -> pb.LeaseTaskResponse:
        shard, tenant = self._job_scope(request)
        validate.worker_id(request.worker_id)
        leased = await shard.lease_one(tenant=tenant, job_id=request.id, worker_id=request.worker_id)
        return pb.LeaseTaskResponse(task=convert.task_to_pb(leased, shard=request.shard))

    @_answering
    async def LeaseTasks(self, request: pb.LeaseTasksRequest, context: Any) -> pb.LeaseTasksResponse:
        validate.task_group(request.task_group, is_new=False)
        wait_ms = _wait_ms(context)
        if request.HasField("shard"):
            shard = self._node.shard(validate.shard_id(request.shard))
            tasks = await shard.lease_tasks(
                worker_id=request.worker_id,
                task_group=request.task_group,
                max_tasks=request.max_tasks,
                wait_ms=wait_ms,
            )
            found = [(shard.shard_id, task) for task in tasks]
        else:
            found = await self._node.lease_anywhere(
                worker_id=request.worker_id,
                task_group=request.task_group,
                max_tasks=request.max_tasks,
                wait_ms=wait_ms,
            )
        return pb.LeaseTasksResponse(tasks=[convert.task_to_pb(task, shard=name) for name, task in found])

    @_answering
    async def ReportOutcome(self, request: pb.ReportOutcomeRequest, context: Any) -> pb.ReportOutcomeResponse:
        shard = self._worker_scope(request)
        await shard.report(request.task_id, convert.outcome_from_pb(request))
        return pb.ReportOutcomeResponse()

    @_answering
    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
        shard = self._worker_scope(request)
        cancelled_at_ms = await shard.heartbeat(task_id=request.task_id, worker_id=request.worker_id)
        return pb.HeartbeatResponse(cancelled=cancelled_at_ms is not None, cancelled_at_ms=cancelled_at_ms)

    @_answering
    async def ResetShards(self, request: pb.ResetShardsRequest, context: Any) -> pb.ResetShardsResponse:
        if not self._node.dev_mode:
            raise DevModeOnly("ResetShards is only available in dev mode")
        return pb.ResetShardsResponse(shards_reset=await self._node.reset_shards())


def _unsupported(method: str) -> Callable[..., Awaitable[Any]]:
    async def refuse(self: SiloServicer, request: Any, context: Any) -> Any:
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED, f"{method} is not supported by this server version yet"
        )

    return refuse


for _method in _SERVICE.methods:
    if _method.name not in vars(SiloServicer):
        setattr(SiloServicer, _method.name, _unsupported(_method.name))


def _wait_ms(context: Any) -> int:
    for key, value in context.invocation_metadata() or ():
        if key == WAIT_KEY and isinstance(value, str) and value.isascii() and value.isdigit():
            return min(int(value[:9]), _WAIT_MS_MAX)
    return _WAIT_MS


def silo_handlers(node: Node) -> grpc.GenericRpcHandler:
    """All methods of `silo.v1.Silo`, by their paths.

    The generated registration answers UNKNOWN, which says nothing, to bytes that
    are no message; here they are a wrong request like any other.
    """
    servicer = SiloServicer(node)
    methods = {}
    for method in _SERVICE.methods:
        answers = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        methods[method.name] = answers(
            _readable(getattr(servicer, method.name)),
            request_deserializer=_reader(getattr(pb, method.input_type.name)),
            response_serializer=getattr(pb, method.output_type.name).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(_SERVICE.full_name, methods)


class _Unreadable:
    """Stands for a request that does not decode."""


def _reader(message: type[Message]) -> Callable[[bytes], Message | _Unreadable]:
    def read(data: bytes) -> Message | _Unreadable:
        try:
            return message.FromString(data)
        except DecodeError:
            return _Unreadable()

    return read


def _readable(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def answer(request: Any, context: Any) -> Any:
        if isinstance(request, _Unreadable):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request does not decode")
        return await handler(request, context)

    return answer


def _shortened(text: str) -> str:
    """`text` without its middle if it is too long: what clients match on stands at either end."""
    if len(quote(text)) <= _TEXT_BYTES_MAX:  # Signs beyond ASCII travel as three bytes for each of theirs.
        return text
    half = _TEXT_BYTES_MAX // 24  # One sign takes twelve bytes at most.
    return f"{text[:half]}…{text[-half:]}"
