"""SiloGRPCClient: enqueue jobs, look at them, and lease them, on any server of a cluster."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar  # Payloads are the application's; the grpc stub is untyped.

import grpc

from silo.client import messages
from silo.client.connections import Connections
from silo.client.errors import (
    ClientClosed,
    ClusterUnreachable,
    JobAlreadyExistsError,
    JobNotTerminalError,
    SiloFailedPreconditionError,
    TaskNotFoundError,
    from_status,
    is_connectivity_error,
    is_wrong_shard,
)
from silo.client.handle import JobHandle
from silo.client.ids import new_job_id
from silo.client.topology import ShardLocation, Topology, bare_address
from silo.client.types import Heartbeat, Job, JobResult, JobStatus, LeasedTask, RetryPolicy, ShardRouting
from silo.wire import payload as values
from silo.wire.pb.silo.v1 import silo_pb2 as pb

log = logging.getLogger(__name__)

Token = str | Callable[[], Awaitable[str]]
T = TypeVar("T")
_DELAY_MS_MAX = 5000
_OWNER_KEY = "x-silo-shard-owner-addr"
_UNREACHABLE = "Failed to refresh cluster topology from any server"


class SiloGRPCClient:
    """A client of a Silo cluster. Safe to share by everything that runs on one event loop.

    It finds out by itself which server has which shard, follows redirects, and rides through
    restarts: a call is repeated with growing waits, for about 23 s with the defaults.

    Args:
        servers: one address or several, `"host:port"` each.
        token: bearer token, or an async function asked for one before every call.
        use_tls: TLS with the system's roots. Off by default, since a local server speaks plaintext.
        shard_routing: retries and topology refreshes.
        grpc_client_options: channel options, over the defaults.
        rpc_timeout_ms: deadline of each single try; none by default.
        address_map: advertised address to the address to dial.
    """

    def __init__(
        self,
        servers: str | Sequence[str],
        *,
        token: Token | None = None,
        use_tls: bool = False,
        shard_routing: ShardRouting | None = None,
        grpc_client_options: Mapping[str, object] | None = None,
        rpc_timeout_ms: int | None = None,
        address_map: Mapping[str, str] | None = None,
    ) -> None:
        listed = [servers] if isinstance(servers, str) else list(servers)
        self._servers = [bare_address(server) for server in listed]
        self._token = token
        self._routing = shard_routing or ShardRouting()
        self._connections = Connections(use_tls=use_tls, options=grpc_client_options or {})
        self._timeout_s = None if rpc_timeout_ms is None else rpc_timeout_ms / 1000
        self._address_map = dict(address_map or {})
        self._topology = Topology()
        self._redirects: dict[str, str] = {}
        self._first_refresh: asyncio.Task[None] | None = None
        self._background: asyncio.Task[None] | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        return f"SiloGRPCClient({self._servers}, {len(self._topology.shards)} shards known)"

    async def __aenter__(self) -> "SiloGRPCClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; later calls raise ClientClosed. Stop workers that use the client first."""
        self._is_closed = True
        for task in (self._background, self._first_refresh):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        await self._connections.close()

    # Jobs

    async def enqueue(
        self,
        *,
        payload: object,
        task_group: str,
        id: str | None = None,
        priority: int = 50,
        start_at_ms: int | None = None,
        delay: float | None = None,
        retry_policy: RetryPolicy | None = None,
        tenant: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> JobHandle:
        """Enqueue a job; returns once it is durable.

        Args:
            payload: any value MessagePack can hold; dataclasses and msgspec structs become maps.
            id: a second job of the tenant with the same id is refused. Drawn by the client if left out,
                so that a call repeated after a lost answer cannot create two jobs.
            priority: 0 runs first, 99 last.
            start_at_ms: earliest start, epoch milliseconds; now if left out.
            delay: seconds from now, instead of `start_at_ms`.

        Raises:
            JobAlreadyExistsError: the id is taken.
            SiloInvalidArgumentError: an argument is out of bounds; the text names it.
            PayloadError: the payload cannot be encoded; nothing was sent.
            ClusterUnreachable: no server answered; the job may exist if an id was lost on the way.
        """
        if delay is not None:
            start_at_ms = time.time_ns() // 1_000_000 + round(delay * 1000)
        job_id = id or new_job_id()
        request = pb.EnqueueRequest(
            id=job_id,
            priority=priority,
            start_at_ms=start_at_ms or 0,
            payload=pb.SerializedBytes(msgpack=values.encode(payload)),
            tenant=tenant or None,
            metadata=metadata or {},
            task_group=task_group,
            retry_policy=None if retry_policy is None else messages.retry_policy_to_pb(retry_policy),
        )
        call = _Call("Enqueue", request, job_id=job_id, tenant=tenant, is_enqueue=True)
        try:
            await self._send(call)
        except JobAlreadyExistsError:
            # Our own first try may have been stored although its answer was lost.
            if id or not call.was_retried:
                raise
        return JobHandle(self, job_id, tenant)

    def handle(self, id: str, tenant: str | None = None) -> JobHandle:
        """A handle on a job; nothing is sent, and the job need not exist."""
        return JobHandle(self, id, tenant)

    async def get_job(self, id: str, tenant: str | None = None, *, include_attempts: bool = False) -> Job:
        """The job as it stands.

        Raises:
            JobNotFoundError: the tenant has no such job.
        """
        request = pb.GetJobRequest(id=id, tenant=tenant or None, include_attempts=include_attempts)
        return messages.job_from_pb(await self._send(_Call("GetJob", request, job_id=id, tenant=tenant)))

    async def get_job_status(self, id: str, tenant: str | None = None) -> JobStatus:
        """The job's status."""
        return (await self.get_job(id, tenant)).status

    async def get_job_result(self, id: str, tenant: str | None = None) -> JobResult[Any]:
        """How the job ended.

        Raises:
            JobNotFoundError: the tenant has no such job.
            JobNotTerminalError: it has not ended.
        """
        request = pb.GetJobResultRequest(id=id, tenant=tenant or None)
        try:
            response = await self._send(_Call("GetJobResult", request, job_id=id, tenant=tenant))
        except SiloFailedPreconditionError as error:
            if "not complete" not in error.grpc_message:
                raise
            status = error.grpc_message.rpartition(" ")[2]
            raise JobNotTerminalError(id, tenant, status) from error
        return messages.job_result_from_pb(response)

    async def delete_job(self, id: str, tenant: str | None = None) -> None:
        """Delete a job that has ended. One that does not exist is no error."""
        await self._send(
            _Call("DeleteJob", pb.DeleteJobRequest(id=id, tenant=tenant or None), job_id=id, tenant=tenant)
        )

    async def cancel_job(self, id: str, tenant: str | None = None) -> None:
        """Cancel a job: at once if it waits, through its worker if it runs."""
        await self._send(
            _Call("CancelJob", pb.CancelJobRequest(id=id, tenant=tenant or None), job_id=id, tenant=tenant)
        )

    async def restart_job(self, id: str, tenant: str | None = None) -> None:
        """Run a failed or cancelled job again."""
        await self._send(
            _Call("RestartJob", pb.RestartJobRequest(id=id, tenant=tenant or None), job_id=id, tenant=tenant)
        )

    async def expedite_job(self, id: str, tenant: str | None = None) -> None:
        """Make a delayed job due now."""
        await self._send(
            _Call(
                "ExpediteJob", pb.ExpediteJobRequest(id=id, tenant=tenant or None), job_id=id, tenant=tenant
            )
        )

    # Tasks

    async def lease_task(self, id: str, *, worker_id: str, tenant: str | None = None) -> LeasedTask:
        """Lease one job's pending attempt, whenever it is due; the caller heartbeats and reports."""
        request = pb.LeaseTaskRequest(id=id, tenant=tenant or None, worker_id=worker_id)
        response = await self._send(_Call("LeaseTask", request, job_id=id, tenant=tenant))
        return messages.task_from_pb(response.task)

    async def lease_tasks(
        self,
        *,
        worker_id: str,
        max_tasks: int,
        task_group: str,
        shard: str | None = None,
        server_index: int | None = None,
        wait_ms: int | None = None,
    ) -> list[LeasedTask]:
        """Lease due tasks from one server. `wait_ms`: how long a server of ours may wait for some."""
        request = pb.LeaseTasksRequest(
            shard=shard, worker_id=worker_id, max_tasks=max_tasks, task_group=task_group
        )
        call = _Call("LeaseTasks", request, shard=shard, server_index=server_index, is_tenant_routed=False)
        if wait_ms is not None:
            call.metadata = (("silo-wait-ms", str(wait_ms)),)
        response = await self._send(call)
        return [messages.task_from_pb(task) for task in response.tasks]

    async def report_outcome(
        self, *, task_id: str, shard: str, outcome: messages.Outcome, tenant: str | None = None
    ) -> None:
        """Report how an attempt ended; returns once that is durable.

        Raises:
            TaskNotFoundError: the lease is gone; the outcome does not count.
        """
        request = messages.report_to_pb(outcome, task_id=task_id, tenant=tenant)
        call = _Call("ReportOutcome", request, task_id=task_id, shard=shard, is_tenant_routed=False)
        try:
            await self._send(call)
        except TaskNotFoundError as error:
            # Our own first try may have been stored although its answer was lost.
            if not call.was_retried or "lease not found" not in (error.grpc_message or ""):
                raise

    async def heartbeat(
        self, worker_id: str, task_id: str, shard: str, tenant: str | None = None
    ) -> Heartbeat:
        """Extend a lease, and learn whether the job was cancelled."""
        request = pb.HeartbeatRequest(worker_id=worker_id, task_id=task_id, tenant_id=tenant or None)
        call = _Call("Heartbeat", request, task_id=task_id, shard=shard, is_tenant_routed=False)
        response = await self._send(call)
        at_ms = response.cancelled_at_ms if response.HasField("cancelled_at_ms") else None
        return Heartbeat(response.cancelled, at_ms)

    # Cluster

    async def reset_shards(self) -> None:
        """Delete everything on every server, which must be in development mode."""
        await self._ensure_topology()
        for address in self._topology.addresses():
            stub = self._connections.stub(address)
            try:
                await stub.ResetShards(pb.ResetShardsRequest(), metadata=await self._metadata(()))
            except grpc.aio.AioRpcError as error:
                raise from_status(error) from error
        self._topology = Topology()

    async def refresh_topology(self) -> None:
        """Ask the servers, one after another, who owns which shard.

        Raises:
            ClusterUnreachable: none answered; what was known stays in use.
        """
        if self._is_closed:
            raise ClientClosed("the client is closed")
        known = self._connections.addresses()
        failure: BaseException | None = None
        for address in [*known, *(server for server in self._servers if server not in known)]:
            stub = self._connections.stub(address)
            try:
                response = await stub.GetClusterInfo(
                    pb.GetClusterInfoRequest(),
                    timeout=self._routing.topology_refresh_timeout_ms / 1000,
                    metadata=await self._metadata(()),
                )
            except grpc.aio.AioRpcError as error:
                failure = error
                if address not in known:
                    self._connections.keep(kept for kept in self._connections.addresses() if kept != address)
                continue
            self._adopt(response)
            return
        raise ClusterUnreachable(_UNREACHABLE) from failure

    def get_topology(self) -> list[ShardLocation]:
        """The shards known, ascending by range."""
        return list(self._topology.shards)

    def get_shard_for_tenant(self, tenant: str) -> str:
        """The id of the shard that covers a tenant.

        Raises:
            TopologyError: none is known.
        """
        return self._topology.locate(tenant).shard_id

    def _adopt(self, response: pb.GetClusterInfoResponse) -> None:
        self._topology = Topology.of(
            ShardLocation(owner.shard_id, self._mapped(owner.grpc_addr), owner.range_start, owner.range_end)
            for owner in response.shard_owners
        )
        self._redirects.clear()
        addresses = self._topology.addresses()
        for address in addresses:
            self._connections.stub(address)
        self._connections.keep(addresses)
        if self._background is None and self._routing.topology_refresh_interval_ms:
            self._background = asyncio.get_running_loop().create_task(self._refresh_forever())

    def _mapped(self, address: str) -> str:
        return bare_address(self._address_map.get(address, address))

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(self._routing.topology_refresh_interval_ms / 1000)
            try:
                await self.refresh_topology()
            except ClusterUnreachable as error:
                log.warning("[SiloGRPCClient] Failed to refresh topology: %s", error)

    async def _ensure_topology(self) -> None:
        """Load the topology once; callers that come meanwhile share the call."""
        if self._topology.is_known:
            return
        if self._first_refresh is None or self._first_refresh.done():
            self._first_refresh = asyncio.get_running_loop().create_task(self.refresh_topology())
            self._first_refresh.add_done_callback(_note_exception)
        await asyncio.shield(self._first_refresh)

    # One call

    async def _send(self, call: "_Call") -> Any:
        """Send until it is answered, following redirects and topology changes."""
        delay_ms = self._routing.retry_delay_ms
        for left in range(self._routing.max_retries, -1, -1):
            if self._is_closed:
                raise ClientClosed("the client is closed")
            try:
                return await self._send_once(call)
            except grpc.aio.AioRpcError as error:
                retryable = is_connectivity_error(error) or is_wrong_shard(error)
                if not left or not retryable:
                    raise call.error_from(error) from error
                call.was_retried = True
                if not self._follow_redirect(call, error):
                    with suppress(ClusterUnreachable):
                        await self.refresh_topology()
            except ClusterUnreachable:
                if not left:
                    raise
            await asyncio.sleep(delay_ms / 1000)
            delay_ms = min(2 * delay_ms, _DELAY_MS_MAX)
        raise AssertionError("the last try returns or raises")

    async def _send_once(self, call: "_Call") -> Any:
        if call.is_tenant_routed or call.shard is None:
            await self._ensure_topology()
        if call.is_tenant_routed:
            location = self._topology.locate(call.tenant)
            call.request.shard = call.shard = location.shard_id
        elif call.shard is not None:
            call.request.shard = call.shard
        stub = self._connections.stub(self._address_for(call))
        return await getattr(stub, call.method)(
            call.request, timeout=self._timeout_s, metadata=await self._metadata(call.metadata)
        )

    def _address_for(self, call: "_Call") -> str:
        if call.shard is not None:
            owner = self._redirects.get(call.shard) or self._topology.address_of(call.shard)
            if owner is not None:
                return owner
        elif call.server_index is not None:
            known = self._connections.addresses()
            if known:
                return known[call.server_index % len(known)]
        return self._connections.any_address() or self._servers[0]

    def _follow_redirect(self, call: "_Call", error: grpc.aio.AioRpcError) -> bool:
        if call.shard is None or not is_wrong_shard(error):
            return False
        for key, value in error.trailing_metadata() or ():
            if key == _OWNER_KEY and value:
                self._redirects[call.shard] = self._mapped(str(value))
                return True
        return False

    async def _metadata(self, given: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        token = self._token if isinstance(self._token, str | None) else await self._token()
        return (*given, ("authorization", f"Bearer {token}")) if token else given


class _Call:
    """One operation, through all of its tries."""

    def __init__(
        self,
        method: str,
        request: Any,
        *,
        job_id: str | None = None,
        task_id: str | None = None,
        tenant: str | None = None,
        shard: str | None = None,
        server_index: int | None = None,
        is_tenant_routed: bool = True,
        is_enqueue: bool = False,
    ) -> None:
        self.method = method
        self.request = request
        self.job_id = job_id
        self.task_id = task_id
        self.tenant = tenant
        self.shard = shard
        self.server_index = server_index
        self.is_tenant_routed = is_tenant_routed
        self.is_enqueue = is_enqueue
        self.metadata: tuple[tuple[str, str], ...] = ()
        self.was_retried = False

    def error_from(self, error: grpc.aio.AioRpcError) -> Exception:
        return from_status(
            error, job_id=self.job_id, task_id=self.task_id, tenant=self.tenant, is_enqueue=self.is_enqueue
        )


def _note_exception(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # Every caller that still waits gets it; none may be left.
