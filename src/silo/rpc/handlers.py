"""The calls of `silo.v1.Silo`: check, convert, call, convert.

Every job call starts alike: shard id, shard, tenant, range, in this order; then its arguments.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any  # grpc is untyped: contexts are Any here.

import grpc

from silo.errors import ErrorKind, ShardClosed, ShardNotFound, SiloError, StateForbids, describe
from silo.model.floating import FloatingState
from silo.model.job import ImportedJob, JobStatus
from silo.model.shards import HashRange
from silo.model.task import Leased
from silo.node.node import Node
from silo.rpc.answering import answering
from silo.rpc.auth import EVERYTHING, Access
from silo.rpc.scope import job_scope, new_job, view_bytes, worker_scope
from silo.rpc.status import STATUS
from silo.shard.shard import Shard
from silo.telemetry import profiling
from silo.wire import convert, validate
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2_grpc

log = logging.getLogger(__name__)

WAIT_KEY = "silo-wait-ms"  # Our addition: how long a LeaseTasks call may wait for work.
_WAIT_MS = 25
_WAIT_MS_MAX = 30_000
SERVICE = pb.DESCRIPTOR.services_by_name["Silo"]


class DevModeOnly(SiloError):
    kind = ErrorKind.DENIED


class ShardNotHere(SiloError):
    """Whoever asks for administration means this node: no word of where else, and none to match on."""

    kind = ErrorKind.NOT_FOUND


class AdministrationFailed(SiloError):
    """The text says what failed, and why."""

    kind = ErrorKind.INTERNAL


@contextmanager
def _saying(what: str) -> Iterator[None]:
    try:
        yield
    except SiloError as error:
        raise AdministrationFailed(f"{what}: {describe(error)}") from error


class SiloServicer(silo_pb2_grpc.SiloServicer):
    """Answers for one node, to callers with one access."""

    def __init__(self, node: Node, access: Access = EVERYTHING) -> None:
        self._node = node
        self._access = access

    @answering
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

    @answering
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

    @answering
    async def Enqueue(self, request: pb.EnqueueRequest, context: Any) -> pb.EnqueueResponse:
        shard, new = new_job(self._node, request)
        return pb.EnqueueResponse(id=await shard.enqueue(new))

    @answering
    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        shard, tenant = job_scope(self._node, request)
        view = await shard.get_job(tenant=tenant, job_id=request.id, with_attempts=request.include_attempts)
        self._node.memory.check(view_bytes(view))
        return convert.job_to_pb(view)

    @answering
    async def GetJobResult(self, request: pb.GetJobResultRequest, context: Any) -> pb.GetJobResultResponse:
        shard, tenant = job_scope(self._node, request)
        view = await shard.get_job(tenant=tenant, job_id=request.id)
        self._node.memory.check(view_bytes(view))
        return convert.job_result_to_pb(view)

    @answering
    async def DeleteJob(self, request: pb.DeleteJobRequest, context: Any) -> pb.DeleteJobResponse:
        shard, tenant = job_scope(self._node, request)
        await shard.delete(tenant=tenant, job_id=request.id)
        return pb.DeleteJobResponse()

    @answering
    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        shard, tenant = job_scope(self._node, request)
        await shard.cancel(tenant=tenant, job_id=request.id)
        return pb.CancelJobResponse()

    @answering
    async def RestartJob(self, request: pb.RestartJobRequest, context: Any) -> pb.RestartJobResponse:
        shard, tenant = job_scope(self._node, request)
        await shard.restart(tenant=tenant, job_id=request.id)
        return pb.RestartJobResponse()

    @answering
    async def ExpediteJob(self, request: pb.ExpediteJobRequest, context: Any) -> pb.ExpediteJobResponse:
        shard, tenant = job_scope(self._node, request)
        await shard.expedite(tenant=tenant, job_id=request.id)
        return pb.ExpediteJobResponse()

    @answering
    async def DropTenantHolders(
        self, request: pb.DropTenantHoldersRequest, context: Any
    ) -> pb.DropTenantHoldersResponse:
        shard, tenant = job_scope(self._node, request)
        return pb.DropTenantHoldersResponse(holders_dropped=await shard.drop_holders(tenant=tenant))

    @answering
    async def LeaseTask(self, request: pb.LeaseTaskRequest, context: Any) -> pb.LeaseTaskResponse:
        shard, tenant = job_scope(self._node, request)
        validate.worker_id(request.worker_id)
        leased = await shard.lease_one(tenant=tenant, job_id=request.id, worker_id=request.worker_id)
        return pb.LeaseTaskResponse(task=convert.task_to_pb(leased, shard=request.shard))

    @answering
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
            found: list[tuple[str, Leased]] = [(shard.shard_id, task) for task in tasks]
        else:
            found = await self._node.lease_anywhere(
                worker_id=request.worker_id,
                task_group=request.task_group,
                max_tasks=request.max_tasks,
                wait_ms=wait_ms,
            )
        response = pb.LeaseTasksResponse()
        for name, task in found:
            if isinstance(task, FloatingState):
                response.refresh_tasks.append(convert.refresh_task_to_pb(task, shard=name))
            else:
                convert.task_to_pb(task, shard=name, make=response.tasks.add)
        return response

    @answering
    async def ReportOutcome(self, request: pb.ReportOutcomeRequest, context: Any) -> pb.ReportOutcomeResponse:
        shard = worker_scope(self._node, self._access, request)
        await shard.report(request.task_id, convert.outcome_from_pb(request))
        return pb.ReportOutcomeResponse()

    @answering
    async def ReportRefreshOutcome(
        self, request: pb.ReportRefreshOutcomeRequest, context: Any
    ) -> pb.ReportRefreshOutcomeResponse:
        shard = worker_scope(self._node, self._access, request)
        await shard.report_refresh(request.task_id, convert.refresh_outcome_from_pb(request))
        return pb.ReportRefreshOutcomeResponse()

    @answering
    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> pb.HeartbeatResponse:
        shard = worker_scope(self._node, self._access, request)
        cancelled_at_ms = await shard.heartbeat(task_id=request.task_id, worker_id=request.worker_id)
        return pb.HeartbeatResponse(cancelled=cancelled_at_ms is not None, cancelled_at_ms=cancelled_at_ms)

    @answering
    async def ImportJobs(self, request: pb.ImportJobsRequest, context: Any) -> pb.ImportJobsResponse:
        answers: dict[int, JobStatus | str] = {}  # Of each entry: its status, or why it failed.
        groups: dict[tuple[str, str], dict[int, ImportedJob]] = {}
        ranges = {info.shard_id: info.range for info in self._node.shard_map()}
        for number, given in enumerate(request.jobs):
            try:
                shard_id, job = self._imported_job(given, ranges)
            except SiloError as error:
                answers[number] = _status_text(error)
            else:
                groups.setdefault((shard_id, job.tenant), {})[number] = job
        # One after another: when a group refuses the whole call, those before it stay and none follows.
        for (shard_id, tenant), group in groups.items():
            answers |= await self._import_group(shard_id, tenant, group)
        return pb.ImportJobsResponse(
            results=[
                convert.import_result_to_pb(given.id, answers[number])
                for number, given in enumerate(request.jobs)
            ]
        )

    def _imported_job(
        self, given: pb.ImportJobRequest, ranges: Mapping[str, HashRange]
    ) -> tuple[str, ImportedJob]:
        """The shard and the job of one entry; its group finds out whether the shard is here."""
        shard_id = validate.shard_id(given.shard)
        tenant = validate.job_tenant(given.tenant, tenancy_enabled=self._node.tenancy_enabled)
        if shard_id in ranges:
            validate.tenant_in_range(tenant, shard=shard_id, hash_range=ranges[shard_id])
        validate.imported_id(given.id)
        validate.task_group(given.task_group, is_new=False)
        validate.priority(given.priority)
        validate.metadata(given.metadata)
        job = convert.imported_job_from_pb(given, tenant=tenant)
        validate.limits(job.limits)
        validate.payload(job.payload)
        return shard_id, job

    async def _import_group(
        self, shard_id: str, tenant: str, group: Mapping[int, ImportedJob]
    ) -> dict[int, JobStatus | str]:
        """Import the jobs of one tenant; for each its status, or why it failed.

        Raises:
            StateForbids: one of them runs; nothing of the group was changed.
        """
        try:
            shard = self._node.shard(shard_id)
            answers = await shard.import_jobs(tenant=tenant, jobs=list(group.values()))
        except StateForbids:
            raise
        except SiloError as error:
            return dict.fromkeys(group, _status_text(error))
        return {
            number: answer.message if isinstance(answer, SiloError) else answer
            for number, answer in zip(group, answers, strict=True)
        }

    @answering
    async def ResetShards(self, request: pb.ResetShardsRequest, context: Any) -> pb.ResetShardsResponse:
        if not self._node.dev_mode:
            raise DevModeOnly("ResetShards is only available in dev mode")
        return pb.ResetShardsResponse(shards_reset=await self._node.reset_shards())

    # Administration

    def _shard_here(self, text: str) -> Shard:
        """A shard that is open on this node."""
        shard_id = validate.shard_id(text)
        try:
            return self._node.shard(shard_id)
        except (ShardNotFound, ShardClosed) as error:
            raise ShardNotHere(f"shard {text} not found on this node") from error

    @answering
    async def FlushShard(self, request: pb.FlushShardRequest, context: Any) -> pb.FlushShardResponse:
        shard = self._shard_here(request.shard)
        with _saying("flush failed"):
            await shard.flush()
        return pb.FlushShardResponse(status=f"flushed shard {request.shard}")

    @answering
    async def CompactShard(self, request: pb.CompactShardRequest, context: Any) -> pb.CompactShardResponse:
        shard = self._shard_here(request.shard)
        with _saying("compaction failed"):
            await shard.compact()
        return pb.CompactShardResponse(status=f"full compaction submitted for shard {request.shard}")

    @answering
    async def GetShardStorageInfo(
        self, request: pb.GetShardStorageInfoRequest, context: Any
    ) -> pb.GetShardStorageInfoResponse:
        shard = self._shard_here(request.shard)
        with _saying("failed to read LSM state"):
            info = await shard.storage_info()
        return convert.storage_info_to_pb(info)

    @answering
    async def CpuProfile(self, request: pb.CpuProfileRequest, context: Any) -> pb.CpuProfileResponse:
        profile = await profiling.cpu_profile(
            duration_s=request.duration_seconds, frequency_hz=request.frequency
        )
        return pb.CpuProfileResponse(
            profile_data=profile.data, duration_seconds=profile.duration_s, samples=profile.samples
        )

    @answering
    async def HeapProfile(self, request: pb.HeapProfileRequest, context: Any) -> pb.HeapProfileResponse:
        profile = await profiling.heap_profile(duration_s=request.duration_seconds)
        return pb.HeapProfileResponse(profile_data=profile.data, duration_seconds=profile.duration_s)

    @answering
    async def DumpTasks(self, request: pb.DumpTasksRequest, context: Any) -> pb.DumpTasksResponse:
        dump, tasks = profiling.dump_tasks()
        return pb.DumpTasksResponse(dump=dump, task_count=tasks)


def _status_text(error: SiloError) -> str:
    """A status as a text, in the form in which the results of an import have always shown one."""
    code = "".join(word.capitalize() for word in STATUS[error.kind].name.split("_"))
    quoted = error.message.replace("\\", "\\\\").replace('"', '\\"')
    return f'status: {code}, message: "{quoted}", details: [], metadata: MetadataMap {{ headers: {{}} }}'


def _unsupported(method: str) -> Callable[..., Awaitable[Any]]:
    async def refuse(self: SiloServicer, request: Any, context: Any) -> Any:
        del request  # See `_taken_in`.
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED, f"{method} is not supported by this server version yet"
        )

    return refuse


for _method in SERVICE.methods:
    if _method.name not in vars(SiloServicer):
        setattr(SiloServicer, _method.name, _unsupported(_method.name))


def _wait_ms(context: Any) -> int:
    for key, value in context.invocation_metadata() or ():
        if key == WAIT_KEY and isinstance(value, str) and value.isascii() and value.isdigit():
            return min(int(value[:9]), _WAIT_MS_MAX)
    return _WAIT_MS
