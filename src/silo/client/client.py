"""SiloGRPCClient: enqueue jobs, look at them, and lease them, on any server of a cluster."""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload  # Payloads are the application's; the grpc stub is untyped.

from silo.client import importing, messages, querying
from silo.client.enqueue_many import NewJob, enqueue_all
from silo.client.errors import (
    JobAlreadyExistsError,
    JobNotTerminalError,
    SiloClientError,
    SiloFailedPreconditionError,
)
from silo.client.handle import JobHandle
from silo.client.ids import new_job_id
from silo.client.importing import ImportJob, ImportJobResult
from silo.client.limits import Limit
from silo.client.querying import QueryParameter, QueryResult
from silo.client.router import Call, EveryRpc, Router, Server, Token
from silo.client.tls import TlsOptions
from silo.client.topology import ShardLocation
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
from silo.client.watching import Watcher
from silo.wire.pb.silo.v1 import silo_pb2 as pb

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter


class SiloGRPCClient:
    """A client of a Silo cluster. Safe to share by everything that runs on one event loop.

    It finds out by itself which server has which shard, follows redirects, and rides through
    restarts: a call is repeated with growing waits, for 11 to 23 s with the defaults. An error
    after a repetition says so in `after_retry`: an earlier try may have taken effect.

    With OpenTelemetry installed, as by the extra `otel`, each call carries the span in which it is made.

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
        rpc_options: deadline and metadata of each single try, or a function that is asked for them before
            every one and may answer None. With it enqueues travel one by one. Otherwise those that come
            together share a call, and the trace context of the first of them.
        address_map: advertised address to the address to dial.
        meter: where repetitions are counted if OpenTelemetry is installed; the global meter `silo-client`
            if left out.

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
        rpc_options: EveryRpc | None = None,
        address_map: Mapping[str, str] | None = None,
        meter: "Meter | None" = None,
    ) -> None:
        self._router = Router(
            servers,
            token=token,
            tls=True if use_tls and not tls else tls,
            routing=shard_routing or ShardRouting(),
            channel_options=grpc_client_options or {},
            rpc_timeout_ms=rpc_timeout_ms,
            rpc_options=rpc_options,
            address_map=address_map or {},
            meter=meter,
        )
        self._watcher = Watcher(self._router)

    @property
    def wrong_shard_retries(self) -> int:
        """Calls repeated because a server did not have the shard any more."""
        return self._router.wrong_shard_retries

    def __repr__(self) -> str:
        shards = len(self._router.topology.shards)
        return f"SiloGRPCClient({self._router.servers}, {shards} shards known)"

    @property
    def router(self) -> Router:
        """How calls find their servers; for the rest of this SDK."""
        return self._router

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
        await self._watcher.close()
        await self._router.close()

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
        limits: Sequence[Limit] = (),
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
            limits: what the job must pass before it runs, in this order.

        Raises:
            JobAlreadyExistsError: the id is taken; with `after_retry` perhaps by this very call, whose
                first answer was lost.
            SiloInvalidArgumentError: an argument is out of bounds; the text names it.
            PayloadError: the payload cannot be encoded; nothing was sent.
            ValueError, TypeError: an argument does not even fit into a message; nothing was sent.
            ClusterUnreachable: no server answered; the job may exist if an id was lost on the way.
        """
        if delay is not None:
            if start_at_ms is not None:
                raise ValueError("give start_at_ms or delay, not both")
            start_at_ms = time.time_ns() // 1_000_000 + round(delay * 1000)
        job_id = id or new_job_id()
        request = messages.enqueue_to_pb(
            id=job_id,
            payload=payload,
            task_group=task_group,
            priority=priority,
            start_at_ms=start_at_ms,
            retry_policy=retry_policy,
            limits=limits,
            tenant=tenant,
            metadata=metadata or {},
        )
        # Errors name the job only to those who know its id.
        call = Call("Enqueue", request, job_id=id or None, tenant=tenant, is_enqueue=True)
        try:
            response = await self._router.send(call)
        except JobAlreadyExistsError as error:
            # We drew the id, so it is our own first try that was stored although its answer was lost.
            # With an id of the caller's nobody can tell: that stays an error.
            if id or not error.after_retry:
                raise
            return JobHandle(self, job_id, tenant)
        return JobHandle(self, response.id or job_id, tenant)

    def enqueue_many(self, jobs: Iterable[NewJob] | AsyncIterable[NewJob]) -> AsyncIterator[JobHandle]:
        """Enqueue jobs of an iterable of any length; a handle for each, in order, once it is durable.

        ```python
        async for handle in client.enqueue_many(NewJob(payload=n, task_group="g") for n in range(1_000_000)):
            ...
        ```

        Some thousand jobs are under way at a time, and no more of the iterable is read than that. Raises
        like `enqueue` for the first job that is refused; jobs after it may have been enqueued.
        """
        return enqueue_all(self._enqueue_new, jobs)

    async def _enqueue_new(self, job: NewJob) -> JobHandle:
        return await self.enqueue(
            payload=job.payload,
            task_group=job.task_group,
            id=job.id,
            priority=job.priority,
            start_at_ms=job.start_at_ms,
            delay=job.delay,
            retry_policy=job.retry_policy,
            limits=job.limits,
            tenant=job.tenant,
            metadata=job.metadata,
        )

    async def import_jobs(self, jobs: Iterable[ImportJob]) -> list[ImportJobResult]:
        """Import jobs that began elsewhere; returns when those that succeeded are durable.

        Jobs of one tenant travel together, one tenant after another. To import a job again with the same
        id, with further attempts, brings it up to date, unless it runs here or has succeeded.

        Returns:
            One result for each job, in the same order. A job that is refused is a result, not an exception.

        Raises:
            SiloFailedPreconditionError: a job runs here; jobs before it may have been imported.
            SiloClientError: the call failed for one tenant; jobs of tenants before it have been imported.
            PayloadError: a payload, result or error data cannot be encoded; nothing was sent.
            ValueError, TypeError: a job does not fit into a message; nothing was sent.
        """
        return await importing.import_jobs(self._router, jobs)

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
        response: pb.GetJobResponse = await self._router.send(
            Call("GetJob", request, job_id=id, tenant=tenant)
        )
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
            response = await self._router.send(Call("GetJobResult", request, job_id=id, tenant=tenant))
        except SiloFailedPreconditionError as error:
            if "not complete" not in error.grpc_message:
                raise
            status = error.grpc_message.rpartition(" ")[2]
            raise JobNotTerminalError(id, tenant, status if status in JOB_STATUSES else None) from error
        return messages.job_result_from_pb(response)

    async def wait_for_result(self, id: str, tenant: str | None = None) -> JobResult[Any]:
        """How the job ended, once it has: the server tells, and is not asked again and again.

        Raises:
            JobNotFoundError: there is no such job (any more).
            WatchUnsupported: the server only speaks `silo.v1`.
        """
        return await self._watcher.result(id, tenant)

    async def delete_job(self, id: str, tenant: str | None = None) -> None:
        """Delete a job that has ended. One that does not exist is no error."""
        await self._router.send(
            Call("DeleteJob", pb.DeleteJobRequest(id=id, tenant=tenant or None), job_id=id, tenant=tenant)
        )

    async def cancel_job(self, id: str, tenant: str | None = None) -> None:
        """Cancel a job: at once if it waits, through its worker if it runs."""
        await self._router.send(
            Call("CancelJob", pb.CancelJobRequest(id=id, tenant=tenant or None), job_id=id, tenant=tenant)
        )

    async def restart_job(self, id: str, tenant: str | None = None) -> None:
        """Run a failed or cancelled job again."""
        await self._router.send(
            Call("RestartJob", pb.RestartJobRequest(id=id, tenant=tenant or None), job_id=id, tenant=tenant)
        )

    async def expedite_job(self, id: str, tenant: str | None = None) -> None:
        """Make a delayed job due now."""
        await self._router.send(
            Call("ExpediteJob", pb.ExpediteJobRequest(id=id, tenant=tenant or None), job_id=id, tenant=tenant)
        )

    # Tasks

    async def lease_task(self, id: str, *, worker_id: str, tenant: str | None = None) -> LeasedTask:
        """Lease one job's pending attempt, whenever it is due; the caller heartbeats and reports."""
        request = pb.LeaseTaskRequest(id=id, tenant=tenant or None, worker_id=worker_id)
        response = await self._router.send(Call("LeaseTask", request, job_id=id, tenant=tenant))
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
        call = Call("LeaseTasks", request, shard=shard, server_index=server_index, is_tenant_routed=False)
        call.give_up = give_up
        if wait_ms is not None:
            call.metadata = (("silo-wait-ms", str(wait_ms)),)
            call.wait_s = wait_ms / 1000
        response = await self._router.send(call)
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
        call = Call("ReportOutcome", request, task_id=request.task_id, shard=shard, is_tenant_routed=False)
        await self._router.send(call)

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
        call = Call(
            "ReportRefreshOutcome", request, task_id=request.task_id, shard=shard, is_tenant_routed=False
        )
        await self._router.send(call)

    async def heartbeat(
        self, worker_id: str, task_id: str, shard: str, tenant: str | None = None
    ) -> Heartbeat:
        """Extend a lease, and learn whether the job was cancelled."""
        request = pb.HeartbeatRequest(worker_id=worker_id, task_id=task_id, tenant_id=tenant or None)
        call = Call("Heartbeat", request, task_id=task_id, shard=shard, is_tenant_routed=False)
        response = await self._router.send(call)
        at_ms = response.cancelled_at_ms if response.HasField("cancelled_at_ms") else None
        return Heartbeat(response.cancelled, at_ms)

    # Cluster

    async def query(
        self, sql: str, tenant: str | None = None, parameters: Iterable[QueryParameter] = ()
    ) -> QueryResult:
        """Run SQL in one shard, that of the tenant.

        The result is not restricted to the tenant: say so in the SQL.

        Args:
            parameters: values of `$1`, `$2` and so on. An int beyond 63 bits is sent unsigned, a float always
                as a float.

        Raises:
            SiloInvalidArgumentError: the SQL or its parameters are wrong.
            SiloResourceExhaustedError: too many statements run, or the result is too large.
            SiloDeadlineExceededError: it took longer than the server lets statements run; not tried again.
            ValueError, TypeError: a parameter has no form in SQL; nothing was sent.
        """
        request = querying.query_to_pb(sql, tenant=tenant, parameters=parameters)
        return querying.result_from_pb(await self._router.send(Call("Query", request, tenant=tenant)))

    async def reset_shards(self) -> None:
        """Delete everything on every server, which must be in development mode."""
        await self._router.reset_shards()

    async def refresh_topology(self) -> None:
        """Ask the servers, one after another, who owns which shard.

        Raises:
            ClusterUnreachable: none answered; what was known stays in use.
            TlsError: none answered, because of TLS.
        """
        await self._router.refresh_topology()

    def get_topology(self) -> list[ShardLocation]:
        """The shards known, ascending by range."""
        return list(self._router.topology.shards)

    def get_shard_for_tenant(self, tenant: str) -> str:
        """The id of the shard that covers a tenant.

        Raises:
            TopologyError: none is known.
        """
        return self._router.topology.locate(tenant).shard_id
