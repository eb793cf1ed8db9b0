"""A project that uses the SDK as its types want it."""

from dataclasses import dataclass
from typing import Any, TypedDict, assert_type

from silo import (
    Cancelled,
    ErrorContext,
    Failure,
    Job,
    JobHandle,
    JobResult,
    JobStatus,
    LeasedTask,
    LeasedTasks,
    RefreshTask,
    RefreshTaskContext,
    RetryPolicy,
    SiloGRPCClient,
    SiloWorker,
    Success,
    TaskContext,
)


class EmailPayload(TypedDict):
    to: str
    subject: str


class EmailMetadata(TypedDict):
    source: str


class EmailResult(TypedDict):
    message_id: str
    sent_at: float


@dataclass
class Report:
    month: str


async def send(
    ctx: TaskContext[EmailPayload, EmailMetadata],
) -> Success[EmailResult] | Failure | Cancelled:
    assert_type(ctx.task.payload, EmailPayload)
    assert_type(ctx.task.metadata["source"], str)
    assert_type(ctx.task.tenant_id, str | None)
    assert_type(ctx.task.is_last_attempt, bool)
    if ctx.cancelled:
        return Cancelled()
    if not ctx.task.payload["to"]:
        return Failure("NO_RECIPIENT", {"subject": ctx.task.payload["subject"]})
    return Success({"message_id": "m", "sent_at": 1.5})


async def send_plainly(ctx: TaskContext[EmailPayload, EmailMetadata]) -> EmailResult:
    await ctx.wait_cancelled()
    await ctx.cancel()
    return {"message_id": ctx.task.payload["to"], "sent_at": 0.0}


async def build(ctx: TaskContext[Report, dict[str, str]]) -> str:
    return ctx.task.payload.month


async def either(ctx: TaskContext[Report, dict[str, str]]) -> str | Failure:
    return Failure("NO", ctx.task.metadata)


async def loose(ctx: TaskContext[Any, dict[str, str]]) -> None:
    return None


async def refresh(ctx: RefreshTaskContext) -> int:
    assert_type(ctx.task, RefreshTask)
    assert_type(ctx.task.metadata["api"], str)
    assert_type(ctx.task.tenant, str | None)
    assert_type(ctx.signal.aborted, bool)
    return ctx.task.current_max_concurrency + 1


async def lease_by_hand(client: SiloGRPCClient) -> None:
    leased = await client.lease_tasks(worker_id="w", max_tasks=1, task_group="emails")
    assert_type(leased, LeasedTasks)
    assert_type(leased.tasks, tuple[LeasedTask, ...])
    for task in leased.refresh_tasks:
        await client.report_refresh_outcome(task_id=task.id, shard=task.shard, new_max_concurrency=5)
        await client.report_refresh_outcome(
            task_id=task.id, shard=task.shard, failure_code="X", failure_message="why", tenant=task.tenant
        )


def on_error(error: BaseException, context: ErrorContext) -> None:
    print(error, context.task_id)


async def token() -> str:
    return "token"


async def main() -> None:
    async with SiloGRPCClient(servers=["localhost:7450"], token=token) as client:
        typed = SiloWorker[EmailPayload, EmailMetadata, EmailResult](
            client=client,
            worker_id="w",
            task_group="emails",
            handler=send,
            refresh_handler=refresh,
            tenant=None,
            max_concurrent_tasks=10,
            concurrent_pollers=1,
            tasks_per_poll=5,
            poll_interval_ms=1000,
            heartbeat_interval_ms=5000,
            on_error=on_error,
        )
        plain = SiloWorker[EmailPayload, EmailMetadata, EmailResult](
            client=client, worker_id="w", task_group="emails", handler=send_plainly, payload_type=EmailPayload
        )
        inferred = SiloWorker(
            client=client,
            worker_id="w",
            task_group="reports",
            handler=build,
            payload_type=Report,
            refresh_handler=refresh,
        )
        untyped = SiloWorker(client=client, worker_id="w", task_group="any", handler=loose)
        outcome = SiloWorker(client=client, worker_id="w", task_group="emails", handler=send)
        mixed = SiloWorker(client=client, worker_id="w", task_group="reports", handler=either)
        assert_type(inferred, SiloWorker[Report, dict[str, str], str])
        assert_type(outcome, SiloWorker[EmailPayload, EmailMetadata, EmailResult])
        assert_type(mixed, SiloWorker[Report, dict[str, str], str])
        async with typed, plain, inferred, outcome, mixed:
            handle = await client.enqueue(
                payload=EmailPayload(to="a", subject="b"),
                task_group="emails",
                retry_policy=RetryPolicy(retry_count=3),
                metadata={"source": "shop"},
                delay=1.5,
            )
            assert_type(handle, JobHandle)
            result: JobResult[EmailResult] = await handle.result(timeout=10)
            assert_type(result.result, EmailResult | None)
            assert_type(await handle.status(), JobStatus)
            assert_type(await handle.job(include_attempts=True), Job)
            await client.enqueue(payload=Report("2024-05"), task_group="reports")
        await untyped.run(stop_timeout=10)
