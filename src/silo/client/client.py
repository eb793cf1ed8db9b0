"""SiloGRPCClient: enqueue jobs, look at them, and lease them, on any server of a cluster."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, cast, overload  # Payloads are the application's; the grpc stub is untyped.

import grpc

from silo.client import messages
from silo.client.connections import Connections
from silo.client.errors import (
    ClientClosed,
    ClusterUnreachable,
    JobAlreadyExistsError,
    JobNotTerminalError,
    SiloClientError,
    SiloFailedPreconditionError,
    TlsError,
    from_status,
    is_connectivity_error,
    is_wrong_shard,
)
from silo.client.handle import JobHandle
from silo.client.ids import new_job_id
from silo.client.tls import Tls, TlsOptions, is_loopback, plaintext_objection
from silo.client.topology import ShardLocation, Topology, bare_address, split_scheme
from silo.client.types import (
    JOB_STATUSES,
    Heartbeat,
    Job,
    JobResult,
    JobStatus,
    LeasedTask,
    LeasedTasks,
    RetryPolicy,
    ShardRouting,
)
from silo.errors import ConfigError
from silo.wire import payload as values
from silo.wire.pb.silo.v1 import silo_pb2 as pb

log = logging.getLogger(__name__)

Token = str | Callable[[], Awaitable[str]]
Server = str | tuple[str, int]
_DELAY_MS_MAX = 5000
_OWNER_KEY = "x-silo-shard-owner-addr"
_UNREACHABLE = "Failed to refresh cluster topology from any server"


class SiloGRPCClient:
    """A client of a Silo cluster. Safe to share by everything that runs on one event loop.

    It finds out by itself which server has which shard, follows redirects, and rides through
    restarts: a call is repeated with growing waits, for about 23 s with the defaults. An error
    after a repetition says so in `after_retry`: an earlier try may have taken effect.

    Args:
        servers: one address or several, `"host:port"` or `("host", port)` each. `https://` before them
            stands for TLS, `http://` for none.
        token: bearer token, or an async function asked for one before every call. Without TLS everyone
            on the way can read it.
        tls: whether connections are secured, or how: `True` trusts the system's authorities. It holds
            for all servers, those found through others included. Off by default, since a local server
            speaks plaintext.
        use_tls: the same as `tls=True`, by the name that other clients have for it.
        shard_routing: retries and topology refreshes.
        grpc_client_options: channel options, over the defaults.
        rpc_timeout_ms: deadline of each single try; a call that waits for work gets that wait on top.
        address_map: advertised address to the address to dial.

    Raises:
        ConfigError: a file of `tls` is missing or unusable, or `servers` and `tls` contradict each other.
    """

    def __init__(
        self,
        servers: Server | Sequence[Server],
        *,
        token: Token | None = None,
        tls: bool | TlsOptions | None = None,
        use_tls: bool = False,
        shard_routing: ShardRouting | None = None,
        grpc_client_options: Mapping[str, object] | None = None,
        rpc_timeout_ms: int = 30_000,
        address_map: Mapping[str, str] | None = None,
    ) -> None:
        given = _addresses(servers)
        if not given:
            raise ValueError("servers names no server")
        self._servers = [bare_address(address) for address in given]
        if rpc_timeout_ms <= 0:
            raise ValueError(f"rpc_timeout_ms must be positive, not {rpc_timeout_ms}")
        self._token = token
        self._routing = shard_routing or ShardRouting()
        self._address_map = dict(address_map or {})
        tls = True if use_tls and not tls else tls
        options = _tls_options(tls, [*given, *self._address_map.values()])
        self._tls = None if options is None else Tls(options)
        self._connections = Connections(tls=self._tls, options=grpc_client_options or {})
        self._is_token_safe_at: set[str] = set()
        self._warned_of_token = False
        self._timeout_s = rpc_timeout_ms / 1000
        self._topology = Topology()
        self._redirects: dict[str, str] = {}
        self._first_refresh: asyncio.Task[None] | None = None
        self._background: asyncio.Task[None] | None = None
        self._is_closed = False
        self.wrong_shard_retries = 0  # Calls repeated because a server did not have the shard any more.

    def __repr__(self) -> str:
        return f"SiloGRPCClient({self._servers}, {len(self._topology.shards)} shards known)"

    async def __aenter__(self) -> "SiloGRPCClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; calls that run and later ones raise ClientClosed.

        Stop workers that use the client first.
        """
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
            JobAlreadyExistsError: the id is taken; with `after_retry` perhaps by this very call, whose
                first answer was lost.
            SiloInvalidArgumentError: an argument is out of bounds; the text names it.
            PayloadError: the payload cannot be encoded; nothing was sent.
            ClusterUnreachable: no server answered; the job may exist if an id was lost on the way.
        """
        if delay is not None:
            if start_at_ms is not None:
                raise ValueError("give start_at_ms or delay, not both")
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
            response = await self._send(call)
        except JobAlreadyExistsError as error:
            # We drew the id, so it is our own first try that was stored although its answer was lost.
            # With an id of the caller's nobody can tell: that stays an error.
            if id or not error.after_retry:
                raise
            return JobHandle(self, job_id, tenant)
        return JobHandle(self, response.id or job_id, tenant)

    def handle(self, id: str, tenant: str | None = None) -> JobHandle:
        """A handle on a job; nothing is sent, and the job need not exist."""
        return JobHandle(self, id, tenant)

    async def get_job(self, id: str, tenant: str | None = None, *, include_attempts: bool = False) -> Job:
        """The job as it stands.

        Raises:
            JobNotFoundError: the tenant has no such job.
            PayloadError: its payload is not one MessagePack value.
        """
        return messages.job_from_pb(await self._get_job(id, tenant, include_attempts=include_attempts))

    async def _get_job(self, id: str, tenant: str | None, *, include_attempts: bool) -> pb.GetJobResponse:
        request = pb.GetJobRequest(id=id, tenant=tenant or None, include_attempts=include_attempts)
        response: pb.GetJobResponse = await self._send(_Call("GetJob", request, job_id=id, tenant=tenant))
        return response

    async def get_job_status(self, id: str, tenant: str | None = None) -> JobStatus:
        """The job's status."""
        return messages.job_status((await self._get_job(id, tenant, include_attempts=False)).status)

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
            raise JobNotTerminalError(id, tenant, status if status in JOB_STATUSES else None) from error
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
        if not response.HasField("task"):
            raise SiloClientError("leaseTask response missing task")
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
        give_up: asyncio.Event | None = None,
    ) -> LeasedTasks:
        """Lease due tasks from one server; the caller heartbeats and reports.

        Job tasks end with `report_outcome`, refresh tasks of floating limits with `report_refresh_outcome`.

        Args:
            shard: only tasks of this shard.
            server_index: which of the known servers; the next in turn if left out.
            wait_ms: how long a server of ours may wait for some.
            give_up: when set, a call that failed is not repeated any more.
        """
        request = pb.LeaseTasksRequest(
            shard=shard, worker_id=worker_id, max_tasks=max_tasks, task_group=task_group
        )
        call = _Call("LeaseTasks", request, shard=shard, server_index=server_index, is_tenant_routed=False)
        call.give_up = give_up
        if wait_ms is not None:
            call.metadata = (("silo-wait-ms", str(wait_ms)),)
            call.wait_s = wait_ms / 1000
        response = await self._send(call)
        return messages.leased_from_pb(response)

    async def report_outcome(
        self, *, task_id: str, shard: str, outcome: messages.Outcome, tenant: str | None = None
    ) -> None:
        """Report how an attempt ended; returns once that is durable.

        Raises:
            TaskNotFoundError: the lease is gone; the outcome does not count, unless `after_retry` is set:
                then an earlier try, whose answer was lost, may have counted.
            PayloadError: the result or the data cannot be encoded; nothing was sent.
        """
        await self.send_report(messages.report_to_pb(outcome, task_id=task_id, tenant=tenant), shard=shard)

    async def send_report(self, request: pb.ReportOutcomeRequest, *, shard: str) -> None:
        """Like `report_outcome`, for a report that is encoded already."""
        call = _Call("ReportOutcome", request, task_id=request.task_id, shard=shard, is_tenant_routed=False)
        await self._send(call)

    @overload
    async def report_refresh_outcome(
        self, *, task_id: str, shard: str, new_max_concurrency: int, tenant: str | None = ...
    ) -> None: ...

    @overload
    async def report_refresh_outcome(
        self, *, task_id: str, shard: str, failure_code: str, failure_message: str, tenant: str | None = ...
    ) -> None: ...

    async def report_refresh_outcome(
        self,
        *,
        task_id: str,
        shard: str,
        new_max_concurrency: int | None = None,
        failure_code: str | None = None,
        failure_message: str | None = None,
        tenant: str | None = None,
    ) -> None:
        """Report the new maximum of a floating limit, or why there is none.

        Raises:
            TaskNotFoundError: the lease is gone; the report does not count, unless `after_retry` is set:
                then an earlier try, whose answer was lost, may have counted.
            ValueError: the maximum is not from 0 to 4 294 967 295; nothing was sent.
        """
        if new_max_concurrency is not None:
            if failure_code is not None or failure_message is not None:
                raise ValueError("give new_max_concurrency or a failure, not both")
            request = messages.refresh_success_to_pb(new_max_concurrency, task_id=task_id, tenant=tenant)
        elif failure_code is None or failure_message is None:
            raise ValueError("give new_max_concurrency, or failure_code and failure_message")
        else:
            request = messages.refresh_failure_to_pb(
                failure_code, failure_message, task_id=task_id, tenant=tenant
            )
        await self.send_refresh_report(request, shard=shard)

    async def send_refresh_report(self, request: pb.ReportRefreshOutcomeRequest, *, shard: str) -> None:
        """Like `report_refresh_outcome`, for a report that is encoded already."""
        call = _Call(
            "ReportRefreshOutcome", request, task_id=request.task_id, shard=shard, is_tenant_routed=False
        )
        await self._send(call)

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
            try:
                await self._invoke(address, "ResetShards", pb.ResetShardsRequest(), timeout_s=self._timeout_s)
            except grpc.aio.AioRpcError as error:
                raise from_status(error) from error
        self._topology = Topology()
        self._redirects.clear()

    async def refresh_topology(self) -> None:
        """Ask the servers, one after another, who owns which shard.

        Raises:
            ClusterUnreachable: none answered; what was known stays in use.
            TlsError: none answered, because of TLS.
        """
        known = self._connections.addresses()
        failures: list[tuple[str, Exception]] = []
        for address in [*known, *(server for server in self._servers if server not in known)]:
            try:
                response = await self._invoke(
                    address,
                    "GetClusterInfo",
                    pb.GetClusterInfoRequest(),
                    timeout_s=self._routing.topology_refresh_timeout_ms / 1000,
                )
            except ClientClosed:
                raise
            except Exception as error:  # Whatever is wrong with this server: the next one may be well.
                failures.append((address, error))
                if address not in known:
                    self._connections.keep(kept for kept in self._connections.addresses() if kept != address)
                continue
            self._check_open()
            self._adopt(response)
            return
        address, failure = max(reversed(failures), key=_weight)
        if isinstance(failure, TlsError) and all(isinstance(error, TlsError) for _, error in failures):
            before = f"{_UNREACHABLE}: "
            raise TlsError(address, failure.reason, before=before, may_recover=False) from failure
        raise ClusterUnreachable(
            f"{_UNREACHABLE}: {address}: {_summary(failure)}", may_recover=not _is_final((address, failure))
        ) from failure

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
            self._connections.add(address)
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
        try:
            await asyncio.shield(self._first_refresh)
        except asyncio.CancelledError:
            if not _is_being_cancelled():
                self._check_open()
            raise

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClientClosed("the client is closed")

    # One call

    async def _send(self, call: "_Call") -> Any:
        """Send until it is answered, following redirects and topology changes."""
        delay_ms = self._routing.retry_delay_ms
        unreachable: ClusterUnreachable | None = None
        for left in range(self._routing.max_retries, -1, -1):
            try:
                return await self._send_once(call)
            except grpc.aio.AioRpcError as error:
                is_lost = is_connectivity_error(error)
                failure: SiloClientError = call.error_from(error)
                if is_lost and unreachable is not None:
                    failure = ClusterUnreachable(f"{_UNREACHABLE}: {_summary(error)}")
                failure.__cause__ = error
                if not (is_lost or is_wrong_shard(error)) or not left or call.gives_up:
                    raise failure from error
                self._check_open()
                call.is_ambiguous |= is_lost
                self.wrong_shard_retries += not is_lost
                unreachable = None if self._follow_redirect(call, error) else await self._try_to_refresh()
            except ClusterUnreachable as error:
                failure = error
                if not left or not error.may_recover or call.was_insecure:
                    raise
                if isinstance(error, TlsError):
                    # The address may be another's by now, and the shard somewhere else: look once.
                    call.was_insecure = call.is_ambiguous = True
                    await self.refresh_topology()
            await self._pause(call, delay_ms / 1000)
            if call.gives_up:
                raise failure
            delay_ms = min(2 * delay_ms, _DELAY_MS_MAX)
        raise AssertionError("the last try returns or raises")

    async def _pause(self, call: "_Call", seconds: float) -> None:
        """Wait before the next try: less when its server comes back, or when nobody wants it any more."""
        sooner: list[asyncio.Task[Any]] = []
        sooner.append(asyncio.ensure_future(self._connections.reconnected(self._address_for(call))))
        if call.give_up is not None:
            sooner.append(asyncio.ensure_future(call.give_up.wait()))
        try:
            await asyncio.wait(sooner, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in sooner:
                task.cancel()
                task.add_done_callback(_note_exception)

    async def _try_to_refresh(self) -> ClusterUnreachable | None:
        try:
            await self.refresh_topology()
        except ClusterUnreachable as error:
            if not error.may_recover:
                raise
            return error
        return None

    async def _send_once(self, call: "_Call") -> Any:
        self._check_open()
        if call.is_tenant_routed or call.shard is None:
            await self._ensure_topology()
        if call.is_tenant_routed:
            location = self._topology.locate(call.tenant)
            call.request.shard = call.shard = location.shard_id
        elif call.shard is not None:
            call.request.shard = call.shard
        return await self._invoke(
            self._address_for(call),
            call.method,
            call.request,
            timeout_s=self._timeout_s + call.wait_s,
            metadata=call.metadata,
        )

    async def _invoke(
        self,
        address: str,
        method: str,
        request: Any,
        *,
        timeout_s: float,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> Any:
        """One try at one server."""
        token = await self._current_token()
        if token:
            metadata = (*metadata, ("authorization", f"Bearer {token}"))
            if self._tls is None:
                self._note_plaintext_token(address)
        self._check_open()
        with self._connections.use(address) as stub:
            try:
                return await getattr(stub, method)(request, timeout=timeout_s, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    await self._check_tls(address, error)
                raise
            except (asyncio.CancelledError, grpc.aio.UsageError):
                # A channel that is closed under a call cancels it, although nobody cancelled the caller.
                if not _is_being_cancelled():
                    self._check_open()
                raise

    async def _check_tls(self, address: str, error: grpc.aio.AioRpcError) -> None:
        """Raise TlsError if a call was not answered because of TLS."""
        ask = plaintext_objection if self._tls is None else self._tls.objection
        objection = await ask(address, error.details() or "")
        if objection is not None:
            raise TlsError(address, objection) from error

    def _note_plaintext_token(self, address: str) -> None:
        """Warn, once, before a token goes over a network in the clear. Existing clients do it, too."""
        if self._warned_of_token or address in self._is_token_safe_at:
            return
        if is_loopback(address):
            self._is_token_safe_at.add(address)
            return
        self._warned_of_token = True
        log.warning(
            "[SiloGRPCClient] The token is sent to %s without TLS, readable by everyone on the way; "
            "write https:// before the address, or give tls",
            address,
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

    async def _current_token(self) -> str | None:
        if isinstance(self._token, str | None):
            return self._token
        try:
            async with asyncio.timeout(self._timeout_s) as scope:
                return await self._token()
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise SiloClientError(f"the token function did not return within {self._timeout_s} s") from error


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
        self.wait_s = 0.0  # How long the server may take beyond the usual.
        self.is_ambiguous = False  # A try was not answered: it may have taken effect.
        self.give_up: asyncio.Event | None = None
        self.was_insecure = False  # A try failed because of TLS, and the topology was asked for since.

    @property
    def gives_up(self) -> bool:
        return self.give_up is not None and self.give_up.is_set()

    def error_from(self, error: grpc.aio.AioRpcError) -> SiloClientError:
        mapped = from_status(
            error, job_id=self.job_id, task_id=self.task_id, tenant=self.tenant, is_enqueue=self.is_enqueue
        )
        mapped.after_retry = self.is_ambiguous
        return mapped


def _addresses(servers: Server | Sequence[Server]) -> list[str]:
    if isinstance(servers, str) or (len(servers) == 2 and isinstance(servers[1], int)):
        servers = [cast(Server, servers)]  # One server, not a list of them.
    return [
        server if isinstance(server, str) else f"{server[0]}:{server[1]}"
        for server in cast(Sequence[Server], servers)
    ]


def _tls_options(tls: bool | TlsOptions | None, addresses: Sequence[str]) -> TlsOptions | None:
    """What `tls` and the schemes of the addresses come to; None is plaintext.

    Raises:
        ConfigError: they contradict each other.
    """
    schemes = {address: split_scheme(address)[1] for address in addresses}
    secure = next((address for address, asks_for_tls in schemes.items() if asks_for_tls), None)
    plain = next((address for address, asks_for_tls in schemes.items() if asks_for_tls is False), None)
    if secure is not None and plain is not None:
        raise ConfigError(f"{secure} asks for TLS and {plain} for none; a client has one way for all servers")
    if secure is not None and tls is False:
        raise ConfigError(f"{secure} asks for TLS, but tls is off; leave one of them out")
    if plain is not None and tls:
        raise ConfigError(f"{plain} asks for plaintext, but tls is given; write https://, or no scheme")
    if isinstance(tls, TlsOptions):
        return tls
    return TlsOptions() if tls or secure is not None else None


def _is_final(failure: tuple[str, Exception]) -> bool:
    """Whether waiting cannot help: the cluster is there and refuses us, or no call was made at all."""
    _, error = failure
    if isinstance(error, TlsError):
        return False  # It says nothing of the other servers.
    if not isinstance(error, grpc.aio.AioRpcError):
        return True
    return error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def _weight(failure: tuple[str, Exception]) -> int:
    """How much one of several failures says about why no server answered."""
    return 2 if _is_final(failure) else isinstance(failure[1], TlsError)


def _summary(error: Exception) -> str:
    if isinstance(error, TlsError):
        return error.reason
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"


def _is_being_cancelled() -> bool:
    """Whether somebody cancelled this task, so that a CancelledError must pass through."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _note_exception(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # Every caller that still waits gets it; none may be left.
