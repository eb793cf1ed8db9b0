"""`SiloExt.EnqueueMany` over a real socket: each job is admitted or refused as a call of its own would be."""

import asyncio
from collections.abc import Callable
from typing import Any  # Stubs and messages of grpc are untyped.

import grpc
import pytest

from silo.node.memory import Memory
from silo.rpc import intake
from silo.rpc.auth import EVERYTHING, Access, Tokens
from silo.rpc.server import Security
from silo.shard.shard import ShardOptions
from silo.storage.memory import Fault
from silo.wire import validate
from silo.wire.pb.silo.ext.v1 import ext_pb2 as ext_pb
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.builders import until
from tests.integration.rpc_server import GROUP, RpcServer, packed, refusal, rpc_server
from tests.integration.streams import ext
from tests.invariants import check_snapshot, jobs_in

IN_LEFT, IN_RIGHT = "test-tenant", "test-tenant-1"  # Hashes 7bda…, c9e3…: either side of 8000….
Code = grpc.StatusCode
ADMIN, ADA, BOTH, WORKER = (f"{name}-0123456789abcdef" for name in ("admin", "ada", "both", "worker"))
SECURITY = Security(
    tokens=Tokens(
        [
            (ADMIN, EVERYTHING),
            (ADA, Access(tenants=frozenset({"ada"}))),
            (BOTH, Access(tenants=frozenset({"ada", "bob"}))),
            (WORKER, Access(task_groups=frozenset({GROUP}))),
        ]
    )
)


def a_request(server: RpcServer, id: str = "j", **fields: Any) -> pb.EnqueueRequest:
    values = {"shard": server.shard, "task_group": GROUP, "payload": packed(b"\xa1p")} | fields
    return pb.EnqueueRequest(id=id, **values)


async def enqueue(
    server: RpcServer, *jobs: pb.EnqueueRequest, token: str | None = None
) -> list[tuple[str, int, str]]:
    """The results of one call: id, code and text of each."""
    metadata = None if token is None else (("authorization", f"Bearer {token}"),)
    answer = await ext(server).EnqueueMany(ext_pb.EnqueueManyRequest(jobs=jobs), metadata=metadata)
    for result in answer.results:
        assert bool(result.id) != result.HasField("error")
    return [(result.id, result.error.code, result.error.message) for result in answer.results]


def stored(server: RpcServer) -> set[str]:
    """The ids of all jobs, in all shards."""
    found: set[str] = set()
    for rows in server.rows().values():
        found |= {name[1] for name in check_snapshot(rows)}
    return found


async def test_the_jobs_of_a_call_are_what_as_many_calls_would_have_made() -> None:
    fields: list[dict[str, Any]] = [
        {},
        {"priority": 7, "metadata": {"k": "v"}},
        {"start_at_ms": 2_000_000_000_000, "retry_policy": pb.RetryPolicy(retry_count=3)},
        {"limits": [pb.Limit(concurrency=pb.ConcurrencyLimit(key="k", max_concurrency=1))]},
        {"payload": packed(b"x" * 5_000), "task_group": "other"},
    ]
    found = []
    for is_one_call in (True, False):
        async with rpc_server() as server:
            jobs = [a_request(server, f"j{number}", **given) for number, given in enumerate(fields)]
            if is_one_call:
                assert await enqueue(server, *jobs) == [(job.id, 0, "") for job in jobs]
            else:
                for job in jobs:
                    await server.stub.Enqueue(job)
            found.append(jobs_in(server.rows()[server.shard]))
    assert found[0] == found[1]


async def test_jobs_without_an_id_get_one() -> None:
    async with rpc_server() as server:
        results = await enqueue(server, *(a_request(server, "") for _ in range(5)))
        assert len({id for id, _, _ in results}) == 5
        assert {id for id, _, _ in results} == stored(server)


async def test_a_call_without_jobs_is_answered_with_no_results() -> None:
    async with rpc_server() as server:
        assert await enqueue(server) == []


async def test_jobs_of_any_tenants_and_shards_are_answered_in_their_order() -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        places = [(server.shards[0], IN_LEFT), (server.shards[1], IN_RIGHT)]
        jobs = [
            a_request(server, f"j{number}", shard=places[number % 2][0], tenant=places[number % 2][1])
            for number in range(600)
        ]
        assert await enqueue(server, *jobs) == [(job.id, 0, "") for job in jobs]
        assert len(stored(server)) == 600


# Refusals


def spoiled(**fields: Any) -> Callable[[pb.EnqueueRequest], None]:
    def spoil(job: pb.EnqueueRequest) -> None:
        for name, value in fields.items():
            if value is None:
                job.ClearField(name)
            elif name in ("metadata", "limits"):
                job.MergeFrom(pb.EnqueueRequest(**{name: value}))
            elif name in ("payload", "retry_policy"):
                getattr(job, name).CopyFrom(value)
            else:
                setattr(job, name, value)

    return spoil


WRONG: dict[str, Callable[[pb.EnqueueRequest], None]] = {
    "no shard id": spoiled(shard="x"),
    "another shard": spoiled(shard="00000000-0000-0000-0000-00000000beef"),
    "no tenant": spoiled(tenant=None),
    "a long tenant": spoiled(tenant="x" * 65),
    "a tenant of another shard": spoiled(tenant=IN_RIGHT),
    "priority": spoiled(priority=100),
    "metadata": spoiled(metadata={f"k{n}": "v" for n in range(17)}),
    "no task group": spoiled(task_group=""),
    "a long task group": spoiled(task_group="x" * 65),
    "limits": spoiled(limits=[pb.Limit(concurrency=pb.ConcurrencyLimit(key="k"))] * 257),
    "everything at once": spoiled(shard="x", tenant=None, priority=100, task_group=""),
    "an id that exists": spoiled(id="there"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_wrong_job_is_refused_as_a_call_of_its_own_is_and_the_others_are_admitted(what: str) -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        await server.enqueue("there", tenant=IN_LEFT)
        jobs = [a_request(server, f"j{number}", tenant=IN_LEFT) for number in range(3)]
        WRONG[what](jobs[1])
        code, text = await refusal(server.stub.Enqueue(jobs[1]))
        assert await enqueue(server, *jobs) == [("j0", 0, ""), ("", code.value[0], text), ("j2", 0, "")]
        assert stored(server) == {"there", "j0", "j2"}


async def test_a_payload_that_is_too_large_for_a_task_is_refused_by_itself() -> None:
    async with rpc_server() as server:
        large = a_request(server, "large", payload=packed(b"x" * (validate.PAYLOAD_BYTES_MAX + 1)))
        [first, second] = await enqueue(server, a_request(server, "j"), large)
        assert (first, second[1]) == (("j", 0, ""), Code.INVALID_ARGUMENT.value[0])


async def test_of_an_id_that_comes_twice_the_first_is_admitted() -> None:
    async with rpc_server() as server:
        jobs = [a_request(server, "j", payload=packed(bytes([number]))) for number in range(3)]
        exists = ("", Code.ALREADY_EXISTS.value[0], "job already exists with id j")
        assert await enqueue(server, *jobs) == [("j", 0, ""), exists, exists]
        assert (await server.job("j")).payload.msgpack == b"\x00"


async def test_the_quota_of_a_tenant_is_counted_within_a_call() -> None:
    async with rpc_server(tenancy=True, options=ShardOptions(max_pending_jobs=2)) as server:
        jobs = [a_request(server, f"{tenant}{n}", tenant=tenant) for n in range(3) for tenant in "ab"]
        codes = [code for _, code, _ in await enqueue(server, *jobs)]
        assert codes == [0, 0, 0, 0, *[Code.RESOURCE_EXHAUSTED.value[0]] * 2]


async def test_too_many_jobs_are_refused_as_a_whole() -> None:
    async with rpc_server() as server:
        job = a_request(server, "")
        refused = await refusal(ext(server).EnqueueMany(ext_pb.EnqueueManyRequest(jobs=[job] * 10_001)))
        assert refused == (Code.INVALID_ARGUMENT, "too many jobs in one call: 10001, at most 10000")
        assert stored(server) == set()


async def test_ten_thousand_jobs_are_admitted_and_others_are_answered_meanwhile() -> None:
    async with rpc_server() as server:
        jobs = [a_request(server, f"j{number:05}") for number in range(10_000)]
        calling = asyncio.ensure_future(enqueue(server, *jobs))
        looks = 0
        while not calling.done():
            await server.stub.GetClusterInfo(pb.GetClusterInfoRequest())
            looks += 1
        assert [id for id, _, _ in calling.result()] == [job.id for job in jobs]
        assert looks > 3
        assert server.node.shard(server.shard).counts.total_jobs == 10_000


@pytest.mark.parametrize("data", [b"\xff\xff", b"\x0a\x05\x0a"])
async def test_bytes_that_are_no_request_are_refused(data: bytes) -> None:
    async with rpc_server() as server:
        call = server.channel.unary_unary("/silo.ext.v1.SiloExt/EnqueueMany")(data)
        assert await refusal(call) == (Code.INVALID_ARGUMENT, "the request does not decode")


# Durability


async def test_results_are_durable_when_they_are_answered() -> None:
    async with rpc_server() as server:
        await enqueue(server, *(a_request(server, f"j{number}") for number in range(50)))
        assert len(stored(server)) == 50


@pytest.mark.parametrize("fault", [Fault.FAIL_BEFORE, Fault.FAIL_AFTER])
async def test_when_one_shard_fails_its_jobs_may_be_repeated_and_those_of_others_are_done(
    fault: Fault,
) -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        left, right = server.shards
        broken = server.node.shard(left)
        await broken.close()  # The writes of the other one are not counted then.
        await until(lambda: broken not in server.node.open_shards() and len(server.node.open_shards()) == 2)
        jobs = [a_request(server, f"l{n}", shard=left, tenant=IN_LEFT) for n in range(3)] + [
            a_request(server, f"r{n}", shard=right, tenant=IN_RIGHT) for n in range(3)
        ]
        await server.node.shard(left).durable()
        server.storage.faults.plan("write", fault)
        results = await enqueue(server, *jobs)
        failed = {code for _, code, _ in results if code}
        assert failed == {Code.UNAVAILABLE.value[0]}
        done = [id for id, code, _ in results if not code]
        assert done in ([f"l{n}" for n in range(3)], [f"r{n}" for n in range(3)])
        await until(lambda: len(server.node.open_shards()) == 2)
        again = await enqueue(server, *jobs)
        exists = Code.ALREADY_EXISTS.value[0]
        assert {code for _, code, _ in again} == ({exists} if fault is Fault.FAIL_AFTER else {0, exists})
        assert stored(server) == {job.id for job in jobs}


# Tokens and memory


@pytest.mark.parametrize(
    ("token", "codes"),
    [
        (ADMIN, [0, 0, 0]),
        (BOTH, [0, 0, Code.PERMISSION_DENIED.value[0]]),
        (ADA, [0, Code.PERMISSION_DENIED.value[0], Code.PERMISSION_DENIED.value[0]]),
    ],
)
async def test_each_job_needs_the_scope_of_its_tenant(token: str, codes: list[int]) -> None:
    async with rpc_server(security=SECURITY, tenancy=True) as server:
        jobs = [a_request(server, f"of-{tenant}", tenant=tenant) for tenant in ("ada", "bob", "eve")]
        results = await enqueue(server, *jobs, token=token)
        assert [code for _, code, _ in results] == codes
        for tenant, (_, code, text) in zip(("ada", "bob", "eve"), results, strict=True):
            assert text == ("" if not code else f"Enqueue needs a token with scope 'tenant:{tenant}'")
        assert len(stored(server)) == codes.count(0)


async def test_a_call_needs_a_token_that_can_enqueue_at_all() -> None:
    async with rpc_server(security=SECURITY, tenancy=True) as server:
        call = ext(server).EnqueueMany(
            ext_pb.EnqueueManyRequest(), metadata=(("authorization", f"Bearer {WORKER}"),)
        )
        expected = (Code.PERMISSION_DENIED, "EnqueueMany needs a token with a scope 'tenant:<id>'")
        assert await refusal(call) == expected
        call = ext(server).EnqueueMany(ext_pb.EnqueueManyRequest())
        assert await refusal(call) == (Code.UNAUTHENTICATED, "missing authorization header")


async def test_a_server_short_of_memory_takes_no_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(None)
    async with rpc_server(memory=memory) as server:
        jobs = ext_pb.EnqueueManyRequest(jobs=[a_request(server)])
        memory.is_short = True
        code, text = await refusal(ext(server).EnqueueMany(jobs))
        assert (code, text) == (Code.RESOURCE_EXHAUSTED, "server is short of memory; try again later")
        memory.is_short = False
        with monkeypatch.context() as patch:
            patch.setattr(intake, "REQUEST_BYTES_MAX", 10)
            code, text = await refusal(ext(server).EnqueueMany(jobs))
            assert (code, text) == (Code.RESOURCE_EXHAUSTED, "too many bytes of requests at once; try again")
        assert stored(server) == set()
        await enqueue(server, a_request(server))


async def test_work_that_is_enqueued_is_leased_in_its_order() -> None:
    async with rpc_server() as server:
        await enqueue(server, *(a_request(server, f"j{number:02}") for number in range(30)))
        assert [task.job_id for task in await server.lease(30)] == [f"j{number:02}" for number in range(30)]
