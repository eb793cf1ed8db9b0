"""`client.enqueue_many`, and enqueues that travel together: in order, never too many, each by itself."""

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from silo import (
    JobAlreadyExistsError,
    JobHandle,
    NewJob,
    PayloadError,
    RpcOptions,
    SiloGRPCClient,
    SiloGrpcError,
    SiloInvalidArgumentError,
)
from silo.cli.server_process import ServerProcess
from silo.client import batching, enqueue_many
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb
from tests.builders import until
from tests.integration.fake_ext import FakeExt, admitted, fake_ext
from tests.integration.fake_silo import GROUP, Status, a_client, unavailable
from tests.integration.real_silo import real_silo
from tests.integration.workers import Handler, a_worker

batched_and_single = pytest.mark.parametrize("extension", [True, False], ids=["batched", "single"])


def a_new(payload: object = 0, **fields: Any) -> NewJob:
    return NewJob(payload=payload, task_group=GROUP, **fields)


def new_jobs(count: int) -> Iterator[NewJob]:
    return (a_new(number) for number in range(count))


def requests_of(ext: FakeExt) -> list[pb.EnqueueManyRequest]:
    return ext.silo.calls("EnqueueMany")


def held_back(ext: FakeExt) -> asyncio.Event:
    """Let no enqueue be answered before the event is set."""
    released = asyncio.Event()

    async def admit(request: pb.EnqueueManyRequest) -> pb.EnqueueManyResponse:
        await released.wait()
        return admitted(request)

    ext.silo.always("EnqueueMany", admit)
    return released


class Source:
    """An iterable of jobs that says how many were taken from it."""

    def __init__(self) -> None:
        self.taken = 0

    def without_end(self) -> Iterator[NewJob]:
        while True:
            self.taken += 1
            yield a_new(self.taken)

    async def without_end_async(self) -> AsyncIterator[NewJob]:
        for job in self.without_end():
            yield job


# What comes back


@batched_and_single
async def test_handles_come_in_the_order_of_the_jobs(extension: bool) -> None:
    async with (
        real_silo(extension=extension, shards=3) as address,
        a_client(address) as client,
    ):
        jobs = [a_new(number, id=f"j{number}", priority=number % 100) for number in range(1200)]
        handles = [handle async for handle in client.enqueue_many(jobs)]
        assert [handle.id for handle in handles] == [job.id for job in jobs]
        assert {await handle.status() for handle in handles[::100]} == {"Scheduled"}
        assert (await handles[7].job()).payload == 7
        assert (await handles[7].job()).priority == 7


@batched_and_single
async def test_an_async_iterable_is_as_good(extension: bool) -> None:
    async def jobs() -> AsyncIterator[NewJob]:
        for number in range(50):
            await asyncio.sleep(0)
            yield a_new(number)

    async with real_silo(extension=extension) as address, a_client(address) as client:
        handles = [handle async for handle in client.enqueue_many(jobs())]
        assert [(await handle.job()).payload for handle in handles] == list(range(50))


async def test_no_jobs_are_no_calls() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        assert [handle async for handle in client.enqueue_many([])] == []
        assert not ext.silo.received


async def test_every_field_of_a_job_travels() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        job = a_new({"a": 1}, id="me", priority=3, start_at_ms=9, tenant="ada", metadata={"k": "v"})
        [handle] = [handle async for handle in client.enqueue_many([job])]
        assert (handle.id, handle.tenant) == ("me", "ada")
        [sent] = requests_of(ext)[0].jobs
        assert (sent.id, sent.priority, sent.start_at_ms, sent.tenant) == ("me", 3, 9, "ada")
        assert (sent.task_group, dict(sent.metadata)) == (GROUP, {"k": "v"})


async def test_a_handle_does_not_wait_for_the_job_after_it() -> None:
    more = asyncio.Event()

    async def jobs() -> AsyncIterator[NewJob]:
        yield a_new(id="first")
        await more.wait()
        yield a_new(id="second")

    async with fake_ext() as ext, a_client(ext.address) as client:
        handles = client.enqueue_many(jobs())
        async with asyncio.timeout(10):
            assert (await anext(handles)).id == "first"
            more.set()
            assert (await anext(handles)).id == "second"
            assert [handle async for handle in handles] == []


# Together, and not too many


async def test_jobs_travel_together() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        assert len([handle async for handle in client.enqueue_many(new_jobs(2000))]) == 2000
        assert len(requests_of(ext)) <= 20
        assert sum(len(request.jobs) for request in requests_of(ext)) == 2000


async def test_enqueues_at_the_same_time_travel_together() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        await asyncio.gather(*(client.enqueue(payload=n, task_group=GROUP) for n in range(100)))
        assert [len(request.jobs) for request in requests_of(ext)] == [100]


async def test_a_lone_enqueue_does_not_wait_for_others() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        for number in range(3):
            await client.enqueue(payload=number, task_group=GROUP)
        assert [len(request.jobs) for request in requests_of(ext)] == [1, 1, 1]


async def test_no_batch_is_larger_than_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "BATCH_BYTES_MAX", 10_000)
    async with fake_ext() as ext, a_client(ext.address) as client:
        jobs = [a_new("x" * 3000) for _ in range(20)] + [a_new("x" * 20_000)] + list(new_jobs(1000))
        assert len([handle async for handle in client.enqueue_many(jobs)]) == 1021
        for request in requests_of(ext):
            assert len(request.jobs) <= batching.BATCH_JOBS_MAX
            assert len(request.jobs) == 1 or request.ByteSize() < 11_000


async def test_only_some_batches_are_under_way_at_a_time() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        released = held_back(ext)
        enqueues = [
            asyncio.create_task(client.enqueue(payload=n, task_group=GROUP))
            for n in range(10 * batching.BATCH_JOBS_MAX)
        ]
        await until(lambda: ext.silo.in_flight == batching.BATCHES_MAX)
        released.set()
        await asyncio.gather(*enqueues)
        assert len(requests_of(ext)) == 10


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_an_iterable_without_end_is_read_as_far_as_the_bound(is_async: bool) -> None:
    bound = enqueue_many.UNDER_WAY_MAX
    async with fake_ext() as ext, a_client(ext.address) as client:
        released, source = held_back(ext), Source()
        jobs = source.without_end_async() if is_async else source.without_end()
        async with aclosing(client.enqueue_many(jobs)) as handles:  # type: ignore[type-var]
            first = asyncio.ensure_future(anext(handles))
            await until(lambda: source.taken > bound)
            assert source.taken == bound + 1  # The last one waits for its place.
            released.set()
            await first
            for _ in range(10):
                await anext(handles)
            await until(lambda: source.taken > bound + 10)
            assert source.taken <= bound + 12


async def test_batches_of_different_servers_do_not_mix() -> None:
    shards = ["11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"]
    async with fake_ext() as here, fake_ext() as there, a_client(here.address) as client:
        here.silo.shards = [(shards[0], "", "8", None), (shards[1], "8", "", there.address)]
        jobs = (a_new(number, tenant=f"tenant-{number}") for number in range(100))
        assert len([handle async for handle in client.enqueue_many(jobs)]) == 100
        for ext, shard in zip((here, there), shards, strict=True):
            sent = [job for request in requests_of(ext) for job in request.jobs]
            assert sent
            assert {job.shard for job in sent} == {shard}


# Errors


@batched_and_single
async def test_the_first_job_that_is_refused_ends_it_after_the_handles_before(extension: bool) -> None:
    jobs = [a_new(id="a"), a_new(id="b"), a_new(id="a"), a_new(id="c"), a_new(id="b")]
    got = []
    async with real_silo(extension=extension) as address, a_client(address) as client:
        with pytest.raises(JobAlreadyExistsError, match="a"):
            async for handle in client.enqueue_many(jobs):
                got.append(handle.id)
        assert got == ["a", "b"]


@batched_and_single
async def test_a_job_that_is_refused_does_not_touch_the_others_of_its_batch(extension: bool) -> None:
    async with real_silo(extension=extension) as address, a_client(address) as client:
        answers = await asyncio.gather(
            *(
                client.enqueue(payload=0, task_group=group, id=f"j{number}")
                for number, group in enumerate([GROUP, "", "x" * 100, GROUP])
            ),
            return_exceptions=True,
        )
        good = [answer for answer in answers if isinstance(answer, JobHandle)]
        bad = [answer for answer in answers if isinstance(answer, SiloInvalidArgumentError)]
        assert ([handle.id for handle in good], len(bad)) == (["j0", "j3"], 2)


async def test_a_payload_that_cannot_be_encoded_ends_it_and_was_not_sent() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        with pytest.raises(PayloadError):
            async for _ in client.enqueue_many([a_new(object())]):
                pass
        assert not requests_of(ext)


async def test_what_the_iterable_raises_comes_after_the_handles_before() -> None:
    def jobs() -> Iterator[NewJob]:
        yield a_new(id="a")
        yield a_new(id="b")
        raise RuntimeError("out of jobs")

    got = []
    async with fake_ext() as ext, a_client(ext.address) as client:
        with pytest.raises(RuntimeError, match="out of jobs"):
            async for handle in client.enqueue_many(jobs()):
                got.append(handle.id)
    assert got == ["a", "b"]


async def test_errors_behind_the_first_one_are_not_complained_of() -> None:
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    async with real_silo() as address, a_client(address) as client:
        with pytest.raises(SiloInvalidArgumentError):
            async for _ in client.enqueue_many(NewJob(payload=0, task_group="") for _ in range(20)):
                pass
    gc.collect()
    assert [text for text in complaints if "never retrieved" in text] == []


async def test_a_batch_that_is_refused_as_a_whole_refuses_each_of_its_jobs() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        ext.silo.always("EnqueueMany", Status(grpc.StatusCode.INTERNAL, "broken"))
        answers = await asyncio.gather(
            *(client.enqueue(payload=n, task_group=GROUP) for n in range(10)), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [SiloGrpcError] * 10
        assert len(requests_of(ext)) == 1


async def test_what_is_too_much_at_the_moment_is_sent_one_by_one() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        busy = pb.EnqueueResult(error=pb.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]))
        done = pb.EnqueueResult(id="j0")
        ext.silo.answer("EnqueueMany", pb.EnqueueManyResponse(results=[done, busy]))
        handles = await asyncio.gather(
            *(client.enqueue(payload=0, task_group=GROUP, id=f"j{n}") for n in range(2))
        )
        assert [handle.id for handle in handles] == ["j0", "j1"]
        assert [request.id for request in ext.silo.calls("Enqueue")] == ["j1"]


# Giving up


async def test_leaving_half_way_reads_nothing_more_and_leaves_nothing_under_way() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        source = Source()
        async with aclosing(client.enqueue_many(source.without_end())) as handles:  # type: ignore[type-var]
            await anext(handles)
        taken = source.taken
        await until(lambda: ext.silo.in_flight == 0)
        await client.enqueue(payload=0, task_group=GROUP)
        assert source.taken == taken
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "read new jobs"]


async def test_a_cancelled_caller_reads_nothing_more() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        held_back(ext)
        source = Source()

        async def enqueue_all() -> None:
            async for _ in client.enqueue_many(source.without_end()):
                pass

        enqueuing = asyncio.create_task(enqueue_all())
        await until(lambda: ext.silo.in_flight > 0)
        enqueuing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await enqueuing
        await until(lambda: not [t for t in asyncio.all_tasks() if t.get_name() == "read new jobs"])


async def test_a_caller_that_gives_up_leaves_the_others_of_its_batch_alone() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        released = held_back(ext)
        first, second = (
            asyncio.create_task(client.enqueue(payload=0, task_group=GROUP, id=id)) for id in ("a", "b")
        )
        await until(lambda: ext.silo.in_flight == 1)
        first.cancel()
        released.set()
        assert (await second).id == "b"
        assert first.cancelled()


# Other servers, and servers that go


async def test_a_server_without_the_extension_is_asked_once_in_a_while() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        ext.silo.always("EnqueueMany", Status(grpc.StatusCode.UNIMPLEMENTED))
        assert len([handle async for handle in client.enqueue_many(new_jobs(100))]) == 100
        await client.enqueue(payload=0, task_group=GROUP)
        assert len(ext.silo.calls("Enqueue")) == 101
        assert len(requests_of(ext)) == 1


async def test_enqueues_with_metadata_of_their_own_travel_alone() -> None:
    options = {"rpc_options": lambda: RpcOptions(metadata={"k": "v"})}
    async with fake_ext() as ext, a_client(ext.address, **options) as client:
        assert len([handle async for handle in client.enqueue_many(new_jobs(3))]) == 3
        assert not requests_of(ext)
        assert [metadata["k"] for metadata in ext.silo.metadata("Enqueue")] == ["v"] * 3


async def test_a_batch_whose_answer_was_lost_is_sent_again_and_found_to_exist() -> None:
    known: set[str] = set()

    async def admit(request: pb.EnqueueManyRequest) -> Any:
        results = []
        for job in request.jobs:
            exists = pb.Status(code=grpc.StatusCode.ALREADY_EXISTS.value[0], message="job already exists")
            results.append(pb.EnqueueResult(error=exists) if job.id in known else pb.EnqueueResult(id=job.id))
        known.update(job.id for job in request.jobs)
        return unavailable() if len(requests_of(ext)) == 1 else pb.EnqueueManyResponse(results=results)

    async with fake_ext() as ext, a_client(ext.address) as client:
        ext.silo.always("EnqueueMany", admit)
        handles = [handle async for handle in client.enqueue_many(new_jobs(20))]
        assert {handle.id for handle in handles} == known
        assert len(known) == 20
        with pytest.raises(JobAlreadyExistsError):  # An id of the caller's: nobody can tell whose job it is.
            await client.enqueue(payload=0, task_group=GROUP, id=handles[0].id)


async def test_jobs_enqueued_while_a_server_is_killed_again_and_again_exist_once(tmp_path: Path) -> None:
    handler = Handler()
    server = ServerProcess(tmp_path)
    await server.start()
    try:
        async with SiloGRPCClient(server.address) as client:
            enqueuing = asyncio.create_task(_enqueue_slowly(client, 2000))
            for _ in range(2):
                await asyncio.sleep(0.1)  # Into the middle of it.
                await server.kill()
                await server.start()
            handles = await enqueuing
            async with a_worker(client, handler, max_concurrent_tasks=50):
                for handle in handles:
                    await handle.result(timeout=30)
            assert sorted(ctx.task.payload for ctx in handler.contexts) == list(range(2000))
            assert {ctx.task.job_id for ctx in handler.contexts} == {handle.id for handle in handles}
    finally:
        await server.stop()


async def _enqueue_slowly(client: SiloGRPCClient, count: int) -> list[JobHandle]:
    async def jobs() -> AsyncIterator[NewJob]:
        for number in range(count):
            if number % 100 == 0:
                await asyncio.sleep(0.01)
            yield a_new(number)

    return [handle async for handle in client.enqueue_many(jobs())]
