"""`SiloExt.WatchJob` and `WatchJobs` over a real socket: told when a job has ended, each in its own time."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any  # Stubs and messages of grpc are untyped.

import grpc
import pytest

from silo.node.memory import Memory
from silo.rpc import watching
from silo.rpc.auth import EVERYTHING, Access, Tokens
from silo.rpc.server import Security
from silo.shard.shard import Shard
from silo.storage.memory import Fault
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2
from tests.builders import until
from tests.integration.rpc_server import GROUP, RpcServer, packed, refusal, rpc_server
from tests.integration.streams import TIMEOUT_S, ext

Code = grpc.StatusCode
ADMIN, ADA, WORKER = (f"{name}-0123456789abcdef" for name in ("admin", "ada", "worker"))
SECURITY = Security(
    tokens=Tokens(
        [
            (ADMIN, EVERYTHING),
            (ADA, Access(tenants=frozenset({"ada"}))),
            (WORKER, Access(task_groups=frozenset({GROUP}))),
        ]
    )
)
IN_LEFT, IN_RIGHT = "test-tenant", "test-tenant-1"  # Hashes 7bda…, c9e3…: either side of 8000….


class Watches:
    """One call of `WatchJobs`. Answers are kept by their numbers."""

    def __init__(self, server: RpcServer, call: Any) -> None:
        self.server = server
        self.call = call
        self.answers: dict[int, pb.Watched] = {}
        self.order: list[int] = []
        self.most = 0  # How many answers came in one message, and how many bytes.
        self.largest = 0

    async def watch(self, jobs: dict[int, str], *, forget: Iterable[int] = (), **fields: Any) -> None:
        """Ask for the ends of jobs, by the numbers of the watches."""
        asked = [
            pb.Watch(**{"number": number, "shard": self.server.shard, "id": id} | fields)
            for number, id in jobs.items()
        ]
        await self.call.write(pb.WatchJobsRequest(watch=asked, forget=forget))

    async def hear(self) -> bool:
        """Read one message; False at the end of the stream."""
        async with asyncio.timeout(TIMEOUT_S):
            message = await self.call.read()
        if message is grpc.aio.EOF:
            return False
        for watched in message.watched:
            assert watched.number not in self.answers, "answered twice"
            assert watched.HasField("result") != watched.HasField("error")
            self.answers[watched.number] = watched
            self.order.append(watched.number)
        self.most = max(self.most, len(message.watched))
        self.largest = max(self.largest, message.ByteSize())
        return True

    async def until(self, count: int) -> dict[int, pb.Watched]:
        """All answers, once there are so many."""
        while len(self.answers) < count:
            assert await self.hear(), "the stream has ended"
        return self.answers

    def error(self, number: int) -> tuple[int, str]:
        return self.answers[number].error.code, self.answers[number].error.message


@asynccontextmanager
async def a_watch(server: RpcServer, *, token: str | None = None) -> AsyncIterator[Watches]:
    metadata = None if token is None else (("authorization", f"Bearer {token}"),)
    call = ext(server).WatchJobs(metadata=metadata)
    try:
        yield Watches(server, call)
    finally:
        call.cancel()


def watch_job(server: RpcServer, id: str = "j", *, token: str | None = None, **fields: Any) -> Any:
    metadata = None if token is None else (("authorization", f"Bearer {token}"),)
    request = pb.WatchJobRequest(**{"shard": server.shard, "id": id} | fields)
    return ext(server).WatchJob(request, metadata=metadata, timeout=TIMEOUT_S)


async def end(server: RpcServer, **outcome: Any) -> None:
    """Lease the next job and report on it."""
    await server.report(await server.lease_one(), **outcome)


def is_watched(server: RpcServer, count: int = 1) -> bool:
    """Whether so many watches wait in the first shard."""
    watchers = server.node.shard(server.shard)._state.watchers  # Nothing public tells.
    return sum(map(len, watchers.values())) == count


# One job


@pytest.mark.parametrize(
    "outcome",
    [{"success": packed(b"\xa4done")}, {"failure": silo_pb2.Failure(code="NO")}, {"cancelled": {}}],
    ids=str,
)
@pytest.mark.parametrize("is_early", [True, False])
async def test_the_end_of_a_job_is_answered_as_its_result_is(outcome: dict[str, Any], is_early: bool) -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        waiting = asyncio.ensure_future(watch_job(server))
        if is_early:
            await until(lambda: is_watched(server))
        await end(server, **outcome)
        answer = await waiting
        assert answer == pb.WatchJobResponse(result=await server.result("j"))
        assert await watch_job(server) == answer


async def test_a_watch_that_takes_too_long_ends_at_the_callers_deadline_and_leaves_nothing_behind() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        request = pb.WatchJobRequest(shard=server.shard, id="j")
        code, _ = await refusal(ext(server).WatchJob(request, timeout=0.1))
        assert code is Code.DEADLINE_EXCEEDED
        await until(lambda: is_watched(server, 0))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"id": "none"}, (Code.NOT_FOUND, "job not found")),
        ({"shard": "x"}, (Code.INVALID_ARGUMENT, "invalid shard ID: x")),
        ({"shard": "00000000-0000-0000-0000-00000000beef"}, (Code.NOT_FOUND, "shard not found")),
        ({"tenant": None}, (Code.INVALID_ARGUMENT, "tenant id required")),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_a_wrong_watch_is_refused_as_a_look_at_the_result_is(
    fields: dict[str, Any], expected: tuple[Code, str]
) -> None:
    async with rpc_server(tenancy=True) as server:
        await server.enqueue("j", tenant="ada")
        given = {"tenant": "ada", "shard": server.shard, "id": "j"} | fields
        look = silo_pb2.GetJobResultRequest(**given)
        assert await refusal(server.stub.GetJobResult(look)) == expected
        assert await refusal(watch_job(server, **given)) == expected
        async with a_watch(server) as watches:
            await watches.watch({1: given["id"]}, shard=given["shard"], tenant=given["tenant"])
            await watches.until(1)
            assert watches.error(1) == (expected[0].value[0], expected[1])


async def test_a_job_that_is_deleted_is_not_found() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        await server.cancel("j")
        await server.delete("j")
        assert await refusal(watch_job(server)) == (Code.NOT_FOUND, "job not found")


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_job_that_is_restarted_before_its_end_is_read_is_waited_for(
    is_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = Shard.get_job
    restarted = asyncio.Event()

    async def restarts(self: Shard, *, tenant: str, job_id: str) -> Any:
        """Between the end that was told and the look at it."""
        if not restarted.is_set():
            await self.restart(tenant=tenant, job_id=job_id)
            restarted.set()
        return await looked(self, tenant=tenant, job_id=job_id)

    async def result(server: RpcServer) -> Any:
        if not is_stream:
            return (await watch_job(server)).result
        async with a_watch(server) as watches:
            await watches.watch({1: "j"})
            return (await watches.until(1))[1].result

    async with rpc_server() as server:
        await server.enqueue("j")
        waiting = asyncio.ensure_future(result(server))
        await until(lambda: is_watched(server))
        with monkeypatch.context() as patch:
            patch.setattr(Shard, "get_job", restarts)
            await server.cancel("j")
            await asyncio.wait_for(restarted.wait(), TIMEOUT_S)
        await until(lambda: is_watched(server))
        await end(server)
        assert (await waiting).status == silo_pb2.JOB_STATUS_SUCCEEDED


# Many jobs


async def test_answers_come_in_the_order_in_which_jobs_end() -> None:
    async with rpc_server() as server, a_watch(server) as watches:
        for number in range(5):
            await server.enqueue(f"j{number}")
        tasks = {task.job_id: task for task in await server.lease(5)}
        await watches.watch({number: f"j{number}" for number in range(5)})
        for count, number in enumerate([3, 0, 4, 1, 2], 1):
            await server.report(tasks[f"j{number}"])
            await watches.until(count)
        assert watches.order == [3, 0, 4, 1, 2]
        for number in range(5):
            assert watches.answers[number].result == await server.result(f"j{number}")


async def test_watches_of_many_tenants_and_shards_share_a_stream() -> None:
    async with rpc_server(shards=2, tenancy=True) as server, a_watch(server) as watches:
        for shard, tenant, number in zip(server.shards, (IN_LEFT, IN_RIGHT), (7, 2**64 - 1), strict=True):
            await server.enqueue("j", shard=shard, tenant=tenant)
            await watches.watch({number: "j"}, shard=shard, tenant=tenant)
            task = await server.lease_one()
            await server.report(task, success=packed(tenant.encode()))
        answers = await watches.until(2)
        assert answers[7].result.success_data.msgpack == IN_LEFT.encode()
        assert answers[2**64 - 1].result.success_data.msgpack == IN_RIGHT.encode()


async def test_one_job_may_be_watched_under_many_numbers() -> None:
    async with rpc_server() as server, a_watch(server) as watches:
        await server.enqueue("j")
        await watches.watch(dict.fromkeys(range(100), "j"))
        await until(lambda: is_watched(server, 100))
        await end(server)
        answers = await watches.until(100)
        assert {answer.result.id for answer in answers.values()} == {"j"}


async def test_a_watch_that_is_refused_leaves_the_others_alone() -> None:
    async with rpc_server() as server, a_watch(server) as watches:
        await server.enqueue("j")
        await watches.watch({1: "none", 2: "j", 3: "neither"})
        await watches.until(2)
        assert watches.error(1) == watches.error(3) == (Code.NOT_FOUND.value[0], "job not found")
        await end(server)
        await watches.until(3)
        assert watches.order[-1] == 2


async def test_a_watch_that_was_forgotten_is_not_answered_and_its_number_is_free() -> None:
    async with rpc_server() as server, a_watch(server) as watches:
        for id in ("a", "b", "c"):
            await server.enqueue(id)
        await watches.watch({1: "a", 2: "b", 3: "c"})
        await until(lambda: is_watched(server, 3))
        await watches.watch({1: "b"}, forget=[1, 3, 99])
        await until(lambda: is_watched(server, 2))
        for id in ("a", "c", "b"):
            await server.cancel(id)
        await watches.until(2)
        await watches.call.done_writing()
        assert not await watches.hear()
        assert {number: answer.result.id for number, answer in watches.answers.items()} == {1: "b", 2: "b"}


async def test_a_watch_that_has_ended_can_be_forgotten_before_it_is_answered() -> None:
    async with rpc_server() as server, a_watch(server) as watches:
        for number in range(30):
            await server.enqueue(f"j{number:02}")
            await end(server, success=packed(b"x" * (2 << 20)))
        await watches.watch({number: f"j{number:02}" for number in range(30)})
        assert await watches.hear()  # All have ended, and most cannot be written before they are read.
        await watches.watch({29: "j00"}, forget=range(20, 30))
        await until(lambda: server.node.shard(server.shard).counts.total_jobs == 30)
        await watches.call.done_writing()
        while await watches.hear():
            pass
        assert sorted(watches.answers) == [*range(20), 29]
        assert watches.answers[29].result.id == "j00"


async def test_a_number_that_is_in_use_is_refused() -> None:
    async with rpc_server() as server, a_watch(server) as watches:
        await server.enqueue("j")
        await watches.watch({1: "j"})
        await watches.watch({1: "j"})
        expected = (Code.INVALID_ARGUMENT, "watch 1 is not answered yet")
        assert await refusal(watches.until(1)) == expected
        await until(lambda: is_watched(server, 0))


async def test_a_number_can_be_used_again_once_it_was_answered() -> None:
    async with rpc_server() as server, a_watch(server) as watches:
        await server.enqueue("j")
        await end(server)
        for count in range(3):
            await watches.watch({1: "j"})
            await watches.until(1)
            del watches.answers[1]
            assert watches.order == [1] * (count + 1)


async def test_a_stream_has_a_bound_of_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "WATCHES_MAX", 10)
    async with rpc_server() as server, a_watch(server) as watches:
        await server.enqueue("j")
        await watches.watch(dict.fromkeys(range(10), "j"))
        await until(lambda: is_watched(server, 10))
        await watches.watch({10: "j"}, forget=[0])
        await watches.watch({11: "j"})
        expected = (Code.RESOURCE_EXHAUSTED, "too many jobs watched on one stream, at most 10")
        assert await refusal(watches.until(1)) == expected


async def test_bytes_that_are_no_request_end_the_stream() -> None:
    async with rpc_server() as server:
        call = server.channel.stream_stream("/silo.ext.v1.SiloExt/WatchJobs")()
        await call.write(b"\xff\xff")
        assert await refusal(call.read()) == (Code.INVALID_ARGUMENT, "the request does not decode")


# The end of a stream


async def test_who_says_no_more_is_answered_to_the_end() -> None:
    async with rpc_server() as server, a_watch(server) as watches:
        for number in range(40):
            await server.enqueue(f"j{number}")
        await watches.watch({number: f"j{number}" for number in range(40)})
        await watches.call.done_writing()
        await until(lambda: is_watched(server, 40))
        for task in await server.lease(40):
            await server.report(task)
        await watches.until(40)
        assert not await watches.hear()
        assert await watches.call.code() is Code.OK


async def test_a_stream_without_watches_ends_when_nothing_more_is_asked() -> None:
    async with rpc_server() as server, a_watch(server) as watches:
        await watches.call.done_writing()
        assert not await watches.hear()
        assert await watches.call.code() is Code.OK


async def test_a_client_that_hangs_up_leaves_nothing_behind() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        async with a_watch(server) as watches:
            await watches.watch(dict.fromkeys(range(50), "j"))
            await until(lambda: is_watched(server, 50))
        await until(lambda: is_watched(server, 0))


async def test_a_node_that_stops_ends_its_streams_and_calls_at_once() -> None:
    async with rpc_server() as server, a_watch(server) as watches:
        await server.enqueue("j")
        await watches.watch({1: "j"})
        waiting = asyncio.ensure_future(refusal(watch_job(server)))
        await until(lambda: is_watched(server, 2))
        started = asyncio.get_running_loop().time()
        server.node.end_waits()
        while await watches.hear():
            pass
        assert await waiting == (Code.UNAVAILABLE, "the node stops")
        assert asyncio.get_running_loop().time() - started < 1.0


async def test_a_shard_that_fails_ends_its_watches_and_no_others() -> None:
    async with rpc_server(shards=2, tenancy=True) as server, a_watch(server) as watches:
        for number, (shard, tenant) in enumerate(zip(server.shards, (IN_LEFT, IN_RIGHT), strict=True)):
            await server.enqueue("j", shard=shard, tenant=tenant)
            await watches.watch({number: "j"}, shard=shard, tenant=tenant)
        await until(lambda: is_watched(server))
        server.storage.faults.plan("write", Fault.FAIL_BEFORE)
        broken = silo_pb2.CancelJobRequest(shard=server.shard, id="j", tenant=IN_LEFT)
        await refusal(server.stub.CancelJob(broken))
        await watches.until(1)
        assert watches.error(0) == (Code.UNAVAILABLE.value[0], "shard closed")
        await until(lambda: len(server.node.open_shards()) == 2)
        cancel = silo_pb2.CancelJobRequest(shard=server.shards[1], id="j", tenant=IN_RIGHT)
        await server.stub.CancelJob(cancel)
        await watches.until(2)
        assert watches.answers[1].result.status == silo_pb2.JOB_STATUS_CANCELLED


# Size and back-pressure


async def test_large_results_come_alone_and_small_ones_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_MESSAGE_BYTES", 10_000)
    async with rpc_server() as server, a_watch(server) as watches:
        sizes = {number: 9_000 if number % 8 == 0 else 10 for number in range(32)}
        for number, size in sizes.items():
            await server.enqueue(f"j{number:02}")
            await end(server, success=packed(bytes(size)))
        await watches.watch({number: f"j{number:02}" for number in sizes})
        answers = await watches.until(32)
        found = {number: len(answer.result.success_data.msgpack) for number, answer in answers.items()}
        assert found == sizes
        assert 2 < watches.most <= watching._ANSWERS
        assert watches.largest < 10_100


async def test_a_result_of_the_largest_size_is_told() -> None:
    async with rpc_server() as server, a_watch(server) as watches:
        result = b"x" * (120 << 20)
        await server.enqueue("j")
        await end(server, success=packed(result))
        await watches.watch({1: "j", 2: "none"})
        answers = await watches.until(2)
        assert answers[1].result.success_data.msgpack == result


async def test_for_a_client_that_does_not_read_no_more_than_a_few_results_are_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with rpc_server() as server, a_watch(server) as watches:
        for number in range(60):
            await server.enqueue(f"j{number:02}")
            await end(server, success=packed(b"x" * (2 << 20)))
        reads = 0
        looked = Shard.get_job

        async def counted(self: Shard, **wanted: Any) -> Any:
            nonlocal reads
            reads += 1
            return await looked(self, **wanted)

        monkeypatch.setattr(Shard, "get_job", counted)
        await watches.watch({number: f"j{number:02}" for number in range(60)})
        before = -1
        while reads > before or not reads:  # Until no more is read.
            before = reads
            await asyncio.sleep(0.1)
        assert reads <= 2 * watching._ANSWERS
        await watches.until(60)
        assert reads == 60


async def test_a_client_that_does_not_read_its_answers_is_not_read_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "_UNREAD_MAX", 100)
    begun = 0
    wait_ended = Shard.wait_ended

    async def counted(self: Shard, **job: str) -> None:
        nonlocal begun
        begun += 1
        await wait_ended(self, **job)

    monkeypatch.setattr(Shard, "wait_ended", counted)
    async with rpc_server() as server, a_watch(server) as watches:
        await server.enqueue("j")
        await end(server, success=packed(b"x" * 100_000))
        for start in range(0, 1_000, 20):  # All of it fits on the wire.
            await watches.watch(dict.fromkeys(range(start, start + 20), "j"))
        before = -1
        while begun > before or not begun:  # Until no more is read.
            before = begun
            await asyncio.sleep(0.1)
        assert begun < 500
        await watches.until(1_000)
        assert begun == 1_000


async def test_large_results_are_not_given_out_while_memory_is_short() -> None:
    memory = Memory(1 << 30, resident_bytes=lambda: 2 << 30)
    async with rpc_server(memory=memory) as server, a_watch(server) as watches:
        expected = (Code.RESOURCE_EXHAUSTED.value[0], "server is short of memory; try again later")
        for id, size in (("large", 1 << 20), ("small", 10)):
            await server.enqueue(id)
            await end(server, success=packed(bytes(size)))
            memory.is_short = False
        await watches.watch({1: "large", 2: "small"})
        answers = await watches.until(2)
        assert watches.error(1) == expected
        assert answers[2].result.success_data.msgpack == bytes(10)
        code, _ = await refusal(watch_job(server, "large"))
        assert code is Code.RESOURCE_EXHAUSTED


async def test_a_thousand_watches_are_answered() -> None:
    async with rpc_server() as server, a_watch(server) as watches:
        jobs = [
            silo_pb2.EnqueueRequest(shard=server.shard, id=f"j{n}", task_group=GROUP, payload=packed(b"\x01"))
            for n in range(1_000)
        ]
        await ext(server).EnqueueMany(pb.EnqueueManyRequest(jobs=jobs))
        await watches.watch({number: f"j{number}" for number in range(1_000)})
        await until(lambda: is_watched(server, 1_000))
        await asyncio.gather(*(server.report(task) for task in await server.lease(1_000)))
        assert len(await watches.until(1_000)) == 1_000


# Tokens


async def test_a_watch_needs_the_scope_of_its_tenant() -> None:
    async with rpc_server(security=SECURITY, tenancy=True) as server:
        admin = (("authorization", f"Bearer {ADMIN}"),)
        for tenant in ("ada", "bob"):
            job = silo_pb2.EnqueueRequest(
                shard=server.shard, id="j", tenant=tenant, task_group=GROUP, payload=packed(b"\x01")
            )
            await server.stub.Enqueue(job, metadata=admin)
            cancel = silo_pb2.CancelJobRequest(shard=server.shard, id="j", tenant=tenant)
            await server.stub.CancelJob(cancel, metadata=admin)
        denied = Code.PERMISSION_DENIED
        for token, allowed in ((ADMIN, {"ada", "bob"}), (ADA, {"ada"}), (WORKER, set[str]())):
            async with a_watch(server, token=token) as watches:
                for number, tenant in enumerate(("ada", "bob")):
                    await watches.watch({number: "j"}, tenant=tenant)
                    answers = await watches.until(number + 1)
                    if tenant in allowed:
                        assert answers[number].HasField("result")
                        assert (await watch_job(server, token=token, tenant=tenant)).HasField("result")
                        continue
                    needed = f"needs a token with scope 'tenant:{tenant}'"
                    assert watches.error(number) == (denied.value[0], f"GetJobResult {needed}")
                    refused = await refusal(watch_job(server, token=token, tenant=tenant))
                    assert refused == (denied, f"WatchJob {needed}")


async def test_watches_need_a_token() -> None:
    async with rpc_server(security=SECURITY) as server:
        expected = (Code.UNAUTHENTICATED, "missing authorization header")
        assert await refusal(watch_job(server)) == expected
        async with a_watch(server) as watches:
            assert await refusal(watches.hear()) == expected
