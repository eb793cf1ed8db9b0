"""A project with mistakes: each line that ends in a marker must be reported, and no other."""

from typing import TypedDict

from silo import RefreshTaskContext, SiloGRPCClient, SiloWorker, Success, TaskContext


class Payload(TypedDict):
    to: str


class Other(TypedDict):
    name: int


async def handler(ctx: TaskContext[Payload, dict[str, str]]) -> Success[str]:
    print(ctx.task.payload["too"])  # error: typeddict-item
    print(ctx.task.job_idd)  # error: attr-defined
    ctx.task.payload = Payload(to="b")  # error: misc
    await ctx.cancel(now=True)  # error: call-arg
    ctx.cancel()  # error: unused-coroutine
    return Success(5)  # error: arg-type


async def good(ctx: TaskContext[Payload, dict[str, str]]) -> Success[str]:
    return Success("fine")


async def plain(ctx: TaskContext[Payload, dict[str, str]]) -> str:
    return "not an int"


def blocking(ctx: TaskContext[Payload, dict[str, str]]) -> Success[str]:
    return Success("but not async")


async def refresh(ctx: RefreshTaskContext) -> str:
    print(ctx.task.job_id)  # error: attr-defined
    return "5"


async def main() -> None:
    client = SiloGRPCClient(servers=5)  # error: arg-type
    await client.enqueue(payload=1)  # error: call-arg
    await client.enqueue(payload=1, task_group="g", priority="high")  # error: arg-type
    handle = await client.enqueue(payload=1, task_group="g")
    await handle.result(timeout="soon")  # error: arg-type
    if await handle.status() == "Done":  # error: comparison-overlap
        pass
    SiloWorker(client=client, worker_id="w", handler=good)  # error: call-overload
    SiloWorker(client=client, worker_id="w", task_group="g", handler=blocking)  # error: arg-type
    SiloWorker(  # error: call-overload
        client=client, worker_id="w", task_group="g", handler=good, max_concurrent_task=1
    )
    SiloWorker[Other, dict[str, str], str](
        client=client,
        worker_id="w",
        task_group="g",
        handler=good,  # error: arg-type
    )
    SiloWorker[Payload, dict[str, str], int](
        client=client,
        worker_id="w",
        task_group="g",
        handler=good,  # error: arg-type
    )
    SiloWorker[Payload, dict[str, str], int](
        client=client,
        worker_id="w",
        task_group="g",
        handler=plain,  # error: arg-type
    )
    SiloWorker(
        client=client,
        worker_id="w",
        task_group="g",
        handler=good,
        refresh_handler=refresh,  # error: arg-type
    )
    await client.report_refresh_outcome(task_id="r", shard="s")  # error: call-overload
    await client.report_refresh_outcome(  # error: call-overload
        task_id="r", shard="s", new_max_concurrency=1, failure_code="X", failure_message="why"
    )
