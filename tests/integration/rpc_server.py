"""A real gRPC server on a free loopback port, over shards in memory and a clock that tests move."""

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any  # Stubs and messages of grpc are untyped.
from uuid import UUID

import grpc

from silo.clock import VirtualClock
from silo.model.shards import ShardInfo, initial_ranges
from silo.node.hosting import HostedNode, host_shards
from silo.node.layout import LAYOUT_VERSION, Layout
from silo.node.memory import Memory
from silo.rpc.server import MESSAGE_BYTES_MAX, OPEN, Security, listen
from silo.shard.limiter import RateLimiter
from silo.shard.shard import ShardOptions
from silo.storage.memory import MemoryStorage
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2_grpc

GROUP = "default"
WORKER = "w1"
AT_ONCE = (("silo-wait-ms", "0"),)  # Metadata of a lease call that does not wait: time stands still.

_CHANNEL = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass
class RpcServer:
    """A running server, and what a test wants to do with it."""

    address: str
    channel: grpc.aio.Channel
    stub: Any
    node: HostedNode
    clock: VirtualClock
    storage: MemoryStorage
    shards: list[str] = field(default_factory=list)

    @property
    def shard(self) -> str:
        return self.shards[0]

    def rows(self) -> dict[str, dict[bytes, bytes]]:
        """Everything that is stored, by shard."""
        return {shard: self.storage.snapshot(shard) for shard in self.shards}

    def has_waiter(self) -> bool:
        """Whether a lease call waits for work of the first shard."""
        return bool(self.node.shard(self.shard)._state.listeners)  # Nothing public tells.

    async def enqueue(self, id: str = "j", **fields: Any) -> str:
        """Enqueue a job of which the test says only what it is about; its id."""
        values = {"shard": self.shard, "task_group": GROUP, "payload": packed(b"\xa1p")} | fields
        response = await self.stub.Enqueue(pb.EnqueueRequest(id=id, **values))
        return str(response.id)

    async def lease(self, max_tasks: int = 1, *, worker_id: str = WORKER, **fields: Any) -> list[pb.Task]:
        """The tasks that are ready now."""
        request = pb.LeaseTasksRequest(
            **{"worker_id": worker_id, "max_tasks": max_tasks, "task_group": GROUP} | fields
        )
        return list((await self.stub.LeaseTasks(request, metadata=AT_ONCE)).tasks)

    async def lease_one(self) -> pb.Task:
        [task] = await self.lease()
        return task

    async def report(self, task: pb.Task, **outcome: Any) -> None:
        """Report `outcome`, or success."""
        await self.stub.ReportOutcome(
            pb.ReportOutcomeRequest(
                shard=task.shard,
                task_id=task.id,
                tenant_id=task.tenant_id,
                **(outcome or {"success": packed(b"\xa4done")}),
            )
        )

    async def beat(self, task: pb.Task, *, worker_id: str = WORKER) -> pb.HeartbeatResponse:
        return await self.stub.Heartbeat(
            pb.HeartbeatRequest(
                shard=task.shard, task_id=task.id, worker_id=worker_id, tenant_id=task.tenant_id
            )
        )

    async def job(self, id: str = "j", **fields: Any) -> pb.GetJobResponse:
        return await self.stub.GetJob(pb.GetJobRequest(**{"shard": self.shard, "id": id} | fields))

    async def result(self, id: str = "j") -> pb.GetJobResultResponse:
        return await self.stub.GetJobResult(pb.GetJobResultRequest(shard=self.shard, id=id))

    async def cancel(self, id: str = "j") -> None:
        await self.stub.CancelJob(pb.CancelJobRequest(shard=self.shard, id=id))

    async def restart(self, id: str = "j") -> None:
        await self.stub.RestartJob(pb.RestartJobRequest(shard=self.shard, id=id))

    async def expedite(self, id: str = "j") -> None:
        await self.stub.ExpediteJob(pb.ExpediteJobRequest(shard=self.shard, id=id))

    async def delete(self, id: str = "j") -> None:
        await self.stub.DeleteJob(pb.DeleteJobRequest(shard=self.shard, id=id))

    async def lease_by_id(self, id: str = "j", *, worker_id: str = WORKER) -> pb.Task:
        response = await self.stub.LeaseTask(
            pb.LeaseTaskRequest(shard=self.shard, id=id, worker_id=worker_id)
        )
        return response.task


@asynccontextmanager
async def rpc_server(
    *,
    shards: int = 1,
    tenancy: bool = False,
    dev_mode: bool = False,
    security: Security = OPEN,
    options: ShardOptions | None = None,
    limiter: RateLimiter | None = None,
    memory: Memory | None = None,
) -> AsyncIterator[RpcServer]:
    """A server with one client connection; both are closed at the end."""
    infos = tuple(
        ShardInfo(str(UUID(int=number)), range)
        for number, range in enumerate(initial_ranges(shards), start=1)
    )
    clock, storage = VirtualClock(), MemoryStorage()
    async with (
        host_shards(
            Layout(version=LAYOUT_VERSION, node_id="node-1", shards=infos),
            advertised_addr="silo.example:7450",
            tenancy_enabled=tenancy,
            dev_mode=dev_mode,
            storage=storage,
            clock=clock,
            rng=Random(7),
            options=options or ShardOptions(),
            limiter=limiter,
            memory=memory,
        ) as node,
        listen("127.0.0.1:0", node, security=security) as address,
        grpc.aio.insecure_channel(address, options=_CHANNEL) as channel,
    ):
        yield RpcServer(
            address=address,
            channel=channel,
            stub=silo_pb2_grpc.SiloStub(channel),
            node=node,
            clock=clock,
            storage=storage,
            shards=[info.shard_id for info in infos],
        )


def packed(data: bytes) -> pb.SerializedBytes:
    return pb.SerializedBytes(msgpack=data)


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    """Code and text of the error with which a call ends."""
    try:
        response = await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError(f"the call was not refused: {response!r}")
