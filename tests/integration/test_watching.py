"""`handle.result()`: told by the server when the job ends, through whatever happens in between."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from silo import (
    Cancelled,
    ClientClosed,
    Failure,
    JobHandle,
    JobNotFoundError,
    JobResult,
    JobTimeoutError,
    NewJob,
    RetryPolicy,
    SiloGRPCClient,
    SiloInvalidArgumentError,
    SiloUnauthenticatedError,
)
from silo.cli.server_process import ServerProcess
from silo.client import watching
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2 as v1
from tests.builders import until
from tests.integration.fake_ext import FakeExt, fake_ext
from tests.integration.fake_silo import GROUP, Status, a_client, not_found, unavailable
from tests.integration.real_silo import real_silo
from tests.integration.workers import Context, Handler, a_worker

CLOSED = pb.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="shard closed")
OVERLOADED = pb.Status(
    code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="too much waits to be written"
)
ELSEWHERE = pb.Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="shard not found")
NO_JOB = pb.Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="job not found")
INVALID = pb.Status(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message="no such tenant")

told_and_polled = pytest.mark.parametrize("extension", [True, False], ids=["told", "polled"])


@asynccontextmanager
async def a_cluster(*, extension: bool = True, shards: int = 1) -> AsyncIterator[SiloGRPCClient]:
    async with real_silo(extension=extension, shards=shards) as address, a_client(address) as client:
        yield client


@asynccontextmanager
async def fake_cluster(**options: Any) -> AsyncIterator[tuple[FakeExt, SiloGRPCClient]]:
    async with fake_ext() as ext, a_client(ext.address, **options) as client:
        yield ext, client


def waiting(client: SiloGRPCClient, *ids: str) -> "list[asyncio.Task[JobResult[Any]]]":
    return [asyncio.create_task(client.handle(id).result(timeout=20)) for id in ids]


async def enqueued(client: SiloGRPCClient) -> JobHandle:
    return await client.enqueue(payload=0, task_group=GROUP)


# How jobs end


@told_and_polled
@pytest.mark.parametrize(
    ("outcome", "result"),
    [
        (7, JobResult(status="Succeeded", result=7)),
        (Failure("BAD", [1]), JobResult(status="Failed", error_code="BAD", error_data=[1])),
        (Cancelled(), JobResult(status="Cancelled")),
    ],
    ids=["success", "failure", "cancelled"],
)
async def test_a_result_is_how_the_job_ended(
    outcome: object, result: JobResult[Any], extension: bool
) -> None:
    handler = Handler(outcome, holds=True)
    async with a_cluster(extension=extension) as client, a_worker(client, handler):
        handle = await enqueued(client)
        before = asyncio.create_task(handle.result(timeout=20))
        await until(lambda: handler.running == 1)
        assert not before.done()
        handler.release.set()
        assert await before == result
        assert await handle.result(timeout=20) == result  # When it has ended, too.
        assert await handle.result(timeout=0) == result


@told_and_polled
async def test_a_job_that_is_cancelled_before_it_runs_ends_every_wait(extension: bool) -> None:
    async with a_cluster(extension=extension) as client:
        handle = await enqueued(client)
        waits = [asyncio.create_task(handle.result(timeout=20)) for _ in range(10)]
        await handle.cancel()
        assert {(await wait).status for wait in waits} == {"Cancelled"}


@told_and_polled
async def test_a_job_that_is_not_there_raises(extension: bool) -> None:
    async with a_cluster(extension=extension) as client:
        with pytest.raises(JobNotFoundError, match="unknown"):
            await client.handle("unknown").result(timeout=20)
        handle = await enqueued(client)
        await handle.cancel()
        await handle.delete()
        with pytest.raises(JobNotFoundError):
            await handle.result(timeout=20)


@told_and_polled
async def test_a_retry_is_no_end(extension: bool) -> None:
    async def handler(ctx: Context) -> Any:
        return Failure("AGAIN") if ctx.task.attempt_number == 1 else "done"

    policy = RetryPolicy(retry_count=1, initial_interval_ms=1)
    async with a_cluster(extension=extension) as client, a_worker(client, handler):
        handle = await client.enqueue(payload=0, task_group=GROUP, retry_policy=policy)
        assert (await handle.result(timeout=20)).result == "done"


@told_and_polled
async def test_a_job_that_runs_again_is_waited_for_again(extension: bool) -> None:
    handler = Handler(holds=True)
    async with a_cluster(extension=extension) as client:
        handle = await enqueued(client)
        await handle.cancel()
        assert (await handle.result(timeout=20)).status == "Cancelled"
        await handle.restart()
        again = asyncio.create_task(handle.result(timeout=20))
        async with a_worker(client, handler):
            await until(lambda: handler.running == 1)
            assert not again.done()
            handler.release.set()
            assert (await again).result == "done"


async def test_results_of_all_tenants_and_shards_come_over_one_stream() -> None:
    async with a_cluster(shards=4) as client, a_worker(client, Handler()):
        handles = [await enqueued(client) for _ in range(50)]
        results = await asyncio.gather(*(handle.result(timeout=20) for handle in handles))
        assert {result.result for result in results} == {"done"}


# Time


@told_and_polled
@pytest.mark.parametrize("timeout", [0, 0.05])
async def test_a_job_that_does_not_end_in_time_raises_and_goes_on(extension: bool, timeout: float) -> None:
    async with a_cluster(extension=extension) as client:
        handle = await enqueued(client)
        with pytest.raises(JobTimeoutError, match=f"{round(timeout * 1000)}ms"):
            await handle.result(timeout=timeout)
        assert await handle.status() == "Scheduled"


async def test_a_caller_that_gives_up_is_forgotten_by_the_server() -> None:
    async with fake_cluster() as (ext, client):
        kept, given_up = waiting(client, "kept", "given up")
        stream = await ext.watch_stream()
        await until(lambda: len(stream.asked()) == 2)
        number = stream.asked()["given up"]
        given_up.cancel()
        await until(lambda: stream.forgotten() == {number})
        await stream.answer(stream.asked()["kept"], result=1)
        assert (await kept).result == 1
        assert stream.forgotten() == {number}


async def test_a_caller_that_gives_up_before_anything_was_sent_is_not_sent() -> None:
    opened = asyncio.Event()
    opened.set()

    async def token() -> str:
        await opened.wait()
        return "token"

    async with fake_cluster(token=token) as (ext, client):
        await client.refresh_topology()
        opened.clear()
        with pytest.raises(JobTimeoutError):
            await client.handle("late").result(timeout=0.01)
        [kept] = waiting(client, "kept")
        opened.set()
        stream = await ext.watch_stream()
        await stream.answer(stream.asked()["kept"], result=1)
        assert (await kept).result == 1
        asked = [watch.id for request in stream.requests for watch in request.watch]
        assert (asked, stream.forgotten()) == (["kept"], set())


async def test_an_answer_that_crosses_with_giving_up_harms_nobody() -> None:
    async with fake_cluster() as (ext, client):
        kept, given_up = waiting(client, "kept", "given up")
        stream = await ext.watch_stream()
        await until(lambda: len(stream.asked()) == 2)
        numbers = stream.asked()
        given_up.cancel()
        await stream.answer(numbers["given up"], result=1)
        await stream.answer(999, result=1)
        await stream.answer(numbers["kept"], result=2)
        assert (await kept).result == 2


async def test_a_wait_that_is_cancelled_raises_that() -> None:
    async with fake_cluster() as (ext, client):
        [task] = waiting(client, "j")
        await ext.watch_stream()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


# What servers say


@pytest.mark.parametrize("error", [CLOSED, OVERLOADED, ELSEWHERE], ids=["closed", "overloaded", "elsewhere"])
async def test_what_passes_is_asked_again(error: pb.Status) -> None:
    async with fake_cluster() as (ext, client):
        [task] = waiting(client, "j")
        stream = await ext.watch_stream()
        seen: set[int] = set()
        for _ in range(3):
            await until(lambda: stream.asked()["j"] not in seen)
            seen.add(stream.asked()["j"])
            await stream.answer(stream.asked()["j"], error=error)
        await until(lambda: stream.asked()["j"] not in seen)
        await stream.answer(stream.asked()["j"], result=1)
        assert (await task).result == 1
        assert len(ext.watches) == 1


@pytest.mark.parametrize(
    ("error", "raised"), [(NO_JOB, JobNotFoundError), (INVALID, SiloInvalidArgumentError)]
)
async def test_what_does_not_pass_is_raised_by_the_wait_alone(
    error: pb.Status, raised: type[BaseException]
) -> None:
    async with fake_cluster() as (ext, client):
        bad, good = waiting(client, "bad", "good")
        stream = await ext.watch_stream()
        await until(lambda: len(stream.asked()) == 2)
        await stream.answer(stream.asked()["bad"], error=error)
        with pytest.raises(raised):
            await bad
        await stream.answer(stream.asked()["good"], result=1)
        assert (await good).result == 1


async def test_all_waits_share_one_stream_and_go_to_the_next_when_it_breaks() -> None:
    ids = [f"j{number}" for number in range(300)]
    async with fake_cluster() as (ext, client):
        tasks = waiting(client, *ids)
        stream = await ext.watch_stream()
        await until(lambda: len(stream.asked()) == 300)
        await stream.answer(stream.asked()["j0"], result=0)
        await tasks[0]
        looked = len(ext.silo.calls("GetClusterInfo"))
        stream.end(unavailable())
        again = await ext.watch_stream(2)
        await until(lambda: again.asked().keys() == set(ids[1:]))
        assert len(ext.silo.calls("GetClusterInfo")) == looked + 1  # All together.
        for id, number in again.asked().items():
            await again.answer(number, result=id)
        assert [(await task).result for task in tasks[1:]] == ids[1:]
        assert len(again.requests) <= 3
        assert len(ext.watches) == 2


async def test_a_stream_that_is_refused_for_good_ends_every_wait() -> None:
    async with fake_cluster() as (ext, client):
        ext.refuses_watches = Status(grpc.StatusCode.UNAUTHENTICATED, "unauthenticated")
        for task in waiting(client, "a", "b"):
            with pytest.raises(SiloUnauthenticatedError):
                await task


async def test_a_stream_that_is_refused_for_now_is_opened_again() -> None:
    async with fake_cluster() as (ext, client):
        ext.refuses_watches = Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")
        [task] = waiting(client, "j")
        await until(lambda: len(ext.watches) == 3)
        ext.refuses_watches = None
        await until(lambda: "j" in ext.watches[-1].asked())
        stream = ext.watches[-1]
        await stream.answer(stream.asked()["j"], result=1)
        assert (await task).result == 1


async def test_what_a_token_function_raises_is_raised() -> None:
    fails = False

    async def token() -> str:
        if fails:
            raise RuntimeError("no token today")
        return "token"

    async with fake_cluster(token=token) as (_, client):
        await client.refresh_topology()
        fails = True
        with pytest.raises(RuntimeError, match="no token today"):
            await client.handle("j").result(timeout=20)


async def test_closing_the_client_ends_every_wait() -> None:
    async with fake_cluster() as (ext, client):
        tasks = waiting(client, "a", "b")
        await ext.watch_stream()
        await client.close()
        for task in tasks:
            with pytest.raises(ClientClosed):
                await task
        with pytest.raises(ClientClosed):
            await client.handle("c").result(timeout=20)


async def test_a_client_that_is_closed_while_it_looks_for_the_owner_ends_every_wait() -> None:
    async with fake_cluster() as (ext, client):
        [task] = waiting(client, "a")
        stream = await ext.watch_stream()
        looked = asyncio.Event()

        async def hang(request: object) -> object:
            looked.set()
            await asyncio.Event().wait()
            raise AssertionError

        ext.silo.always("GetClusterInfo", hang)
        stream.end()
        await looked.wait()
        await client.close()
        with pytest.raises(ClientClosed):
            await task


# Streams


async def test_more_waits_than_a_stream_takes_open_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "WATCHES_MAX", 2)
    async with fake_cluster() as (ext, client):
        tasks = waiting(client, "a", "b", "c")
        first, second = await ext.watch_stream(), await ext.watch_stream(2)
        assert (first.asked().keys(), second.asked().keys()) == ({"a", "b"}, {"c"})
        await first.answer(first.asked()["a"], result=1)
        assert (await tasks[0]).result == 1
        await client.close()
        for task in tasks[1:]:
            with pytest.raises(ClientClosed):
                await task
        await until(lambda: first.is_over and second.is_over)


async def test_a_stream_that_nobody_waits_on_ends_and_the_next_wait_opens_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "_IDLE_S", 0.02)
    async with fake_cluster() as (ext, client):
        for number in (1, 2):
            [task] = waiting(client, "j")
            stream = await ext.watch_stream(number)
            await asyncio.sleep(0.05)  # Whoever waits may wait for long.
            assert not stream.has_said_all
            await stream.answer(stream.asked()["j"], result=number)
            assert (await task).result == number
            await until(lambda stream=stream: stream.has_said_all)


# Servers that only speak silo.v1


async def test_a_server_that_cannot_tell_is_polled_and_not_asked_again_soon() -> None:
    async with fake_cluster() as (ext, client):
        ext.refuses_watches = Status(grpc.StatusCode.UNIMPLEMENTED)
        ended = v1.GetJobResultResponse(id="j", status=v1.JOB_STATUS_CANCELLED)
        for _ in range(3):
            ext.silo.answer(
                "GetJobResult", Status(grpc.StatusCode.FAILED_PRECONDITION, "not complete"), ended
            )
            assert (await client.handle("j").result(timeout=20)).status == "Cancelled"
        ext.silo.answer("GetJobResult", not_found("job not found"))
        with pytest.raises(JobNotFoundError):
            await client.handle("j").result(timeout=20)
        assert len(ext.watches) == 1


# Restarts


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "stopped"])
async def test_a_thousand_results_are_awaited_through_a_restart_of_the_server(
    tmp_path: Path, kill: bool
) -> None:
    server = ServerProcess(tmp_path)
    await server.start()
    try:
        async with SiloGRPCClient(server.address) as client:
            jobs = (NewJob(payload=number, task_group=GROUP) for number in range(1000))
            handles = [handle async for handle in client.enqueue_many(jobs)]
            waits = [asyncio.create_task(handle.result(timeout=60)) for handle in handles]
            await (server.kill() if kill else server.stop())
            await server.start()
            async with a_worker(client, Handler(), max_concurrent_tasks=50, on_error=lambda *_: None):
                results = await asyncio.gather(*waits)
        assert {result.status for result in results} == {"Succeeded"}
    finally:
        await server.stop()
