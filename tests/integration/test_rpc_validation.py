"""Every rule by which a call of `silo.v1.Silo` is refused: exact code, exact text, nothing changed."""

import asyncio
from typing import Any, NamedTuple  # Messages of grpc are untyped.
from uuid import UUID

import grpc
import pytest

from silo.model.shards import HashRange, hash_tenant
from silo.rpc.server import MESSAGE_BYTES_MAX
from silo.storage.memory import Fault
from silo.wire import validate
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.builders import until
from tests.integration.rpc_server import AT_ONCE, GROUP, RpcServer, packed, refusal, rpc_server

INVALID = grpc.StatusCode.INVALID_ARGUMENT
FORBIDDEN = grpc.StatusCode.FAILED_PRECONDITION
NOT_FOUND = grpc.StatusCode.NOT_FOUND
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED

LEFT, RIGHT = str(UUID(int=1)), str(UUID(int=2))  # The shards of a server with two.
NOWHERE = "ffffffff-ffff-ffff-ffff-ffffffffffff"
IN_LEFT, IN_RIGHT = "test-tenant", "test-tenant-1"  # Hashes 7bda…, c9e3…: either side of 8000….
JOB_CALLS = (
    "Enqueue",
    "GetJob",
    "GetJobResult",
    "DeleteJob",
    "CancelJob",
    "RestartJob",
    "ExpediteJob",
    "LeaseTask",
)
WORKER_CALLS = ("ReportOutcome", "ReportRefreshOutcome", "Heartbeat")
# Enqueue is wrong in its arguments too, and what is checked first wins; LeaseTasks asks for its group first.
WRONG_ARGUMENTS: dict[str, dict[str, Any]] = {
    "Enqueue": {"priority": 100},
    "LeaseTasks": {"task_group": GROUP},
}


class Rule(NamedTuple):
    method: str
    fields: dict[str, Any]
    code: grpc.StatusCode
    text: str


def request_of(method: str, **fields: Any) -> Any:
    return getattr(pb, f"{method}Request")(**fields)


async def call(server: RpcServer, method: str, **fields: Any) -> Any:
    metadata = AT_ONCE if method == "LeaseTasks" else ()
    return await getattr(server.stub, method)(request_of(method, **fields), metadata=metadata)


async def assert_refused(server: RpcServer, rule: Rule) -> None:
    """The call is refused as the rule says, and what is stored is as it was."""
    before = server.rows()
    code, text = await refusal(call(server, rule.method, **rule.fields))
    assert (code, text) == (rule.code, rule.text)
    assert server.rows() == before


def ids(rules: list[Rule]) -> list[str]:
    return [f"{rule.method}-{rule.text[:40]}-{number}" for number, rule in enumerate(rules)]


def new_job(**fields: Any) -> dict[str, Any]:
    return {"shard": LEFT, "id": "new", "task_group": GROUP} | fields


TENANT_GIVEN = "tenant must not be provided when tenancy is disabled on the server"
METADATA_MANY = "metadata has too many entries (max 16)"
METADATA_KEY = "metadata key too long (must be < 64 chars)"
METADATA_VALUE = "metadata value too long (must be < u16::MAX bytes)"
NO_WINDOW = (
    "duration_ms of rate limit 'n' must be 0 to 5 (minute, hour, day, week, month, year) "
    "with DURATION_IS_GREGORIAN"
)
GROUP_LONG = "task_group too long (must be <= 64 chars)"
LIMIT = pb.Limit(concurrency=pb.ConcurrencyLimit(key="k", max_concurrency=1))
WINDOW = pb.Limit(rate_limit=pb.GubernatorRateLimit(name="n", unique_key="u", duration_ms=6, behavior=4))
SEVENTEEN = {f"k{number}": "v" for number in range(17)}

WITHOUT_TENANCY = [
    # The shard id.
    *(
        Rule(method, {"shard": text} | WRONG_ARGUMENTS.get(method, {}), INVALID, f"invalid shard ID: {text}")
        for method in (*JOB_CALLS, *WORKER_CALLS, "LeaseTasks")
        for text in ("", "not-a-uuid")
    ),
    Rule("GetJob", {"shard": LEFT[:-1]}, INVALID, f"invalid shard ID: {LEFT[:-1]}"),
    Rule("GetJob", {"shard": LEFT + "0"}, INVALID, f"invalid shard ID: {LEFT}0"),
    Rule("GetJob", {"shard": "{" + LEFT}, INVALID, "invalid shard ID: {" + LEFT),
    Rule("GetJob", {"shard": " " + LEFT}, INVALID, f"invalid shard ID:  {LEFT}"),
    Rule("GetJob", {"shard": "g" * 32}, INVALID, "invalid shard ID: " + "g" * 32),
    Rule("GetJob", {"shard": "١" * 32}, INVALID, "invalid shard ID: " + "١" * 32),
    Rule("GetJob", {"shard": "-" * 36}, INVALID, "invalid shard ID: " + "-" * 36),
    # The shard.
    *(
        Rule(method, {"shard": NOWHERE} | WRONG_ARGUMENTS.get(method, {}), NOT_FOUND, "shard not found")
        for method in (*JOB_CALLS, *WORKER_CALLS, "LeaseTasks")
    ),
    # The tenant: the wrong shard wins over it, and it wins over the arguments.
    *(Rule(method, {"shard": "x", "tenant": "t"}, INVALID, "invalid shard ID: x") for method in JOB_CALLS),
    *(Rule(method, {"shard": NOWHERE, "tenant": "t"}, NOT_FOUND, "shard not found") for method in JOB_CALLS),
    *(
        Rule(
            method,
            {"shard": LEFT, "tenant": "t"} | WRONG_ARGUMENTS.get(method, {}),
            FORBIDDEN,
            TENANT_GIVEN,
        )
        for method in JOB_CALLS
    ),
    # Its arguments, in the order in which they are checked.
    Rule("Enqueue", new_job(priority=100), INVALID, "priority must be between 0 and 99"),
    Rule("Enqueue", new_job(priority=2**32 - 1), INVALID, "priority must be between 0 and 99"),
    Rule("Enqueue", new_job(priority=100, metadata=SEVENTEEN), INVALID, "priority must be between 0 and 99"),
    Rule("Enqueue", new_job(metadata=SEVENTEEN), INVALID, METADATA_MANY),
    Rule("Enqueue", new_job(metadata={"k" * 64: "v"}), INVALID, METADATA_KEY),
    Rule("Enqueue", new_job(metadata={"é" * 64: "v"}), INVALID, METADATA_KEY),
    Rule("Enqueue", new_job(metadata={"k": "v" * 65_535}), INVALID, METADATA_VALUE),
    Rule("Enqueue", new_job(metadata={"k": "é" * 32_768}), INVALID, METADATA_VALUE),
    Rule("Enqueue", new_job(metadata=SEVENTEEN, task_group=""), INVALID, METADATA_MANY),
    Rule("Enqueue", new_job(task_group=""), INVALID, "task_group is required"),
    Rule("Enqueue", new_job(task_group="", limits=[LIMIT]), INVALID, "task_group is required"),
    Rule("Enqueue", new_job(task_group="g" * 65), INVALID, GROUP_LONG),
    Rule("Enqueue", new_job(task_group="é" * 65), INVALID, GROUP_LONG),
    Rule("Enqueue", new_job(limits=[LIMIT] * 257), INVALID, "too many limits (max 256)"),
    Rule("Enqueue", new_job(limits=[LIMIT, WINDOW]), INVALID, NO_WINDOW),
    Rule("Enqueue", new_job(id="old", limits=[WINDOW]), INVALID, NO_WINDOW),
    Rule("Enqueue", new_job(id="old"), grpc.StatusCode.ALREADY_EXISTS, "job already exists with id old"),
    *(
        Rule(method, {"shard": LEFT, "id": "none"}, NOT_FOUND, "job not found")
        for method in ("GetJob", "GetJobResult", "CancelJob", "RestartJob", "ExpediteJob")
    ),
    Rule("LeaseTask", {"shard": LEFT, "id": "none", "worker_id": "w"}, NOT_FOUND, "job not found"),
    Rule("LeaseTask", {"shard": LEFT, "id": "none"}, INVALID, "worker_id is required"),
    Rule("LeaseTask", {"shard": LEFT, "id": "old"}, INVALID, "worker_id is required"),
    Rule("LeaseTasks", {"max_tasks": 1}, INVALID, "task_group is required"),
    Rule("LeaseTasks", {"max_tasks": 1, "shard": "x"}, INVALID, "task_group is required"),
    Rule("ReportOutcome", {"shard": "x"}, INVALID, "invalid shard ID: x"),
    Rule("ReportOutcome", {"shard": LEFT, "task_id": "none"}, INVALID, "missing outcome"),
    Rule("ReportOutcome", {"shard": LEFT, "task_id": "none", "success": {}}, NOT_FOUND, "lease not found"),
    Rule("Heartbeat", {"shard": LEFT, "task_id": "none", "worker_id": "w"}, NOT_FOUND, "lease not found"),
    # What the state forbids.
    Rule("GetJobResult", {"shard": LEFT, "id": "old"}, FORBIDDEN, "job is not complete: status is Scheduled"),
    Rule(
        "DeleteJob",
        {"shard": LEFT, "id": "old"},
        FORBIDDEN,
        "cannot delete job old: job is currently running or has pending requests",
    ),
    Rule(
        "RestartJob",
        {"shard": LEFT, "id": "old"},
        FORBIDDEN,
        "cannot restart job old: job is still in progress (status: Scheduled)",
    ),
    Rule(
        "ExpediteJob",
        {"shard": LEFT, "id": "old"},
        FORBIDDEN,
        "cannot expedite job old: task is already ready to run (not future-scheduled) (status: Scheduled)",
    ),
    Rule("ResetShards", {}, grpc.StatusCode.PERMISSION_DENIED, "ResetShards is only available in dev mode"),
]


@pytest.mark.spec(
    "ENQ-1",
    "ENQ-2",
    "ENQ-3",
    "ENQ-4",
    "LSE-1",
    "LSE-8",
    "LEA-22",
    "SM-7",
    "LSO-1",
    "RAT-17",
    "RD-2",
    "W-CC-12",
    "W-CC-17",
    "W-CC-20",
    "W-CC-32",
    "W-CC-33",
    "W-CC-35",
    "W-CC-56",
    "W-CC-57",
    "W-CC-65",
    "W-CC-73",
    "W-CC-90",
)
@pytest.mark.parametrize("rule", WITHOUT_TENANCY, ids=ids(WITHOUT_TENANCY))
async def test_without_tenancy_a_wrong_call_is_refused_and_changes_nothing(rule: Rule) -> None:
    async with rpc_server() as server:
        await server.enqueue("old")
        await assert_refused(server, rule)


def out_of(shard: str, tenant: str) -> str:
    range_text = "[-∞, 8000000000000000)" if shard == LEFT else "[8000000000000000, +∞)"
    return f"tenant '{tenant}' is not within shard {shard} range {range_text}; refresh topology and retry"


TENANT_WORKER = "tenant_id is required for worker operations when tenancy is enabled"

WITH_TENANCY = [
    *(
        Rule(
            method,
            {"shard": "x", "tenant": "t" * 65} | WRONG_ARGUMENTS.get(method, {}),
            INVALID,
            "invalid shard ID: x",
        )
        for method in JOB_CALLS
    ),
    *(
        Rule(method, {"shard": NOWHERE}, NOT_FOUND, "shard not found")
        for method in (*JOB_CALLS, *WORKER_CALLS)
    ),
    *(
        Rule(
            method,
            {"shard": LEFT, "tenant": tenant} | WRONG_ARGUMENTS.get(method, {}),
            INVALID,
            "tenant id required" if not tenant else "invalid tenant id",
        )
        for method in JOB_CALLS
        for tenant in (None, "", "t" * 65, "é" * 65)
    ),
    *(
        Rule(
            method,
            {"shard": shard, "tenant": tenant} | WRONG_ARGUMENTS.get(method, {}),
            FORBIDDEN,
            out_of(shard, tenant),
        )
        for method in JOB_CALLS
        for shard, tenant in ((LEFT, IN_RIGHT), (RIGHT, IN_LEFT))
    ),
    *(
        Rule(method, {"shard": LEFT, "tenant_id": tenant}, INVALID, TENANT_WORKER)
        for method in WORKER_CALLS
        for tenant in (None, "")
    ),
    *(
        Rule(method, {"shard": LEFT, "tenant_id": IN_RIGHT}, FORBIDDEN, out_of(LEFT, IN_RIGHT))
        for method in WORKER_CALLS
    ),
    Rule("ReportOutcome", {"shard": LEFT, "tenant_id": IN_LEFT}, INVALID, "missing outcome"),
    Rule("Heartbeat", {"shard": LEFT, "tenant_id": IN_LEFT}, NOT_FOUND, "lease not found"),
    Rule(
        "Enqueue",
        new_job(tenant=IN_LEFT, id="old"),
        grpc.StatusCode.ALREADY_EXISTS,
        "job already exists with id old",
    ),
    Rule("GetJob", {"shard": RIGHT, "tenant": IN_RIGHT, "id": "old"}, NOT_FOUND, "job not found"),
]


@pytest.mark.spec(
    "ENQ-1", "LEA-7", "SM-7", "W-CC-10", "W-CC-17", "W-CC-18", "W-CC-19", "W-CC-22", "W-CC-23", "W-ERR-16"
)
@pytest.mark.parametrize("rule", WITH_TENANCY, ids=ids(WITH_TENANCY))
async def test_with_tenancy_a_wrong_call_is_refused_and_changes_nothing(rule: Rule) -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        await server.enqueue("old", tenant=IN_LEFT)
        await assert_refused(server, rule)


async def test_a_payload_that_no_answer_could_carry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert validate.PAYLOAD_BYTES_MAX + 16 * (63 * 4 + 65_534) + 1024 < MESSAGE_BYTES_MAX
    monkeypatch.setattr(validate, "PAYLOAD_BYTES_MAX", 10)
    async with rpc_server() as server:
        text = "payload too large (must be <= 10 bytes)"
        await assert_refused(server, Rule("Enqueue", new_job(payload=packed(b"x" * 11)), INVALID, text))
        await server.enqueue("j", payload=packed(b"x" * 10))


def redirects(error: grpc.aio.AioRpcError) -> list[str]:
    return [key for key, _ in error.trailing_metadata() or () if key.startswith("x-silo")]


@pytest.mark.spec("W-CC-13", "W-ERR-1")
async def test_an_unknown_shard_sends_nobody_elsewhere() -> None:
    async with rpc_server() as server:
        with pytest.raises(grpc.aio.AioRpcError, match="shard not found") as caught:
            await server.job(shard=NOWHERE)
        assert caught.value.code() is NOT_FOUND
        assert redirects(caught.value) == []


@pytest.mark.spec("W-CC-11")
@pytest.mark.parametrize(
    "written",
    [
        LEFT.upper(),
        LEFT.replace("-", ""),
        "{" + LEFT + "}",
        f"urn:uuid:{LEFT}",
        f"{{{LEFT.replace('-', '')}}}",
    ],
)
async def test_a_shard_id_is_accepted_in_every_usual_form(written: str) -> None:
    async with rpc_server() as server:
        await server.enqueue("j", shard=written)
        assert (await server.job("j")).id == "j"


async def test_the_nil_uuid_is_a_shard_id() -> None:
    async with rpc_server() as server:
        assert await refusal(server.job(shard=str(UUID(int=0)))) == (NOT_FOUND, "shard not found")


@pytest.mark.spec("ENQ-2", "ENQ-3", "ENQ-4", "W-CC-20", "W-CC-32", "W-CC-33", "W-CC-34", "W-CC-35")
@pytest.mark.parametrize(
    "fields",
    [
        {"priority": 0},
        {"priority": 99},
        {"metadata": {f"k{number}": "v" for number in range(16)}},
        {"metadata": {"k" * 63: "v"}},
        {"metadata": {"é" * 63: "v"}},
        {"metadata": {"k": "v" * 65_534}},
        {"metadata": {"": ""}},
        {"task_group": "g" * 64},
        {"task_group": "é" * 64},
        {"limits": [pb.Limit(), pb.Limit()]},
        {"payload": None},
        {"tenant": ""},
        {"start_at_ms": -1},
        {"start_at_ms": 2**63 - 1},
        {"retry_policy": pb.RetryPolicy(retry_count=2**32 - 1, backoff_factor=float("nan"))},
    ],
    ids=str,
)
async def test_a_job_at_a_bound_is_accepted(fields: dict[str, Any]) -> None:
    async with rpc_server() as server:
        await server.enqueue("j", **fields)
        assert (await server.job("j")).status == pb.JOB_STATUS_SCHEDULED


@pytest.mark.spec("ENQ-1", "W-CC-19")
@pytest.mark.parametrize("tenant", ["t" * 64, "é" * 64, "-", "with space\0"])
async def test_with_tenancy_a_tenant_of_up_to_64_signs_is_accepted(tenant: str) -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        shard = LEFT if hash_tenant(tenant) < "8" else RIGHT
        await server.enqueue("j", shard=shard, tenant=tenant)
        assert (await server.job("j", shard=shard, tenant=tenant)).id == "j"


@pytest.mark.spec("W-CC-21")
async def test_without_tenancy_workers_may_name_any_tenant() -> None:
    async with rpc_server(shards=2) as server:
        await server.enqueue("j")
        task = await server.lease_one()
        task.tenant_id = IN_RIGHT
        assert not (await server.beat(task)).cancelled
        await server.report(task)
        assert (await server.job("j")).status == pb.JOB_STATUS_SUCCEEDED

        limit = pb.FloatingConcurrencyLimit(key="k", default_max_concurrency=0)
        await server.enqueue("waits", limits=[pb.Limit(floating_concurrency=limit)])
        [refresh] = (await call(server, "LeaseTasks", max_tasks=1, task_group=GROUP)).refresh_tasks
        fields = {"shard": refresh.shard, "task_id": refresh.id, "tenant_id": IN_RIGHT}
        await call(server, "ReportRefreshOutcome", success={"new_max_concurrency": 1}, **fields)
        assert (await server.lease_one()).job_id == "waits"


async def test_without_tenancy_work_for_a_shard_that_does_not_own_it_is_refused() -> None:
    async with rpc_server(shards=2) as server:
        rule = Rule("Enqueue", new_job(shard=RIGHT), FORBIDDEN, out_of(RIGHT, "-"))
        await assert_refused(server, rule)


@pytest.mark.spec("ENT-4", "W-CC-40")
async def test_with_tenancy_one_id_is_a_job_of_its_own_for_each_tenant() -> None:
    async with rpc_server(tenancy=True) as server:
        await server.enqueue("j", tenant="a", payload=packed(b"\x01"))
        await server.enqueue("j", tenant="b", payload=packed(b"\x02"))
        assert (await server.job("j", tenant="a")).payload.msgpack == b"\x01"
        assert (await server.job("j", tenant="b")).payload.msgpack == b"\x02"


@pytest.mark.spec("DEL-3", "W-CC-48")
async def test_deleting_a_job_that_does_not_exist_succeeds() -> None:
    async with rpc_server() as server:
        before = server.rows()
        await server.delete("none")
        assert server.rows() == before


@pytest.mark.spec("LSE-1")
async def test_lease_tasks_checks_neither_the_length_of_the_group_nor_the_worker() -> None:
    async with rpc_server() as server:
        assert await server.lease(task_group="g" * 1000, worker_id="") == []


@pytest.mark.spec("LSE-1", "W-CC-58")
async def test_lease_tasks_takes_no_tasks_when_none_are_wanted() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        assert await server.lease(0) == []
        assert await server.lease(0, shard=server.shard) == []
        assert (await server.job("j")).status == pb.JOB_STATUS_SCHEDULED


async def test_the_refusal_of_a_very_long_id_still_arrives() -> None:
    async with rpc_server() as server:
        await server.enqueue("é" * 50_000)
        code, text = await refusal(server.enqueue("é" * 50_000))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert text.startswith("job already exists with id éé")


async def test_the_reason_stays_at_the_end_of_a_shortened_refusal() -> None:
    async with rpc_server() as server:
        job_id = "x" * 50_000
        await server.enqueue(job_id)
        code, text = await refusal(server.restart(job_id))
        assert code is FORBIDDEN
        assert text.endswith("job is still in progress (status: Scheduled)")


@pytest.mark.spec("W-CC-14", "W-ERR-19")
async def test_a_shard_that_failed_is_unavailable_until_it_is_open_again() -> None:
    async with rpc_server() as server, asyncio.timeout(10):
        await server.enqueue("old")
        faults = server.storage.faults
        for call in range(1, 4):
            faults.plan("open", Fault.FAIL_BEFORE, call=faults.calls["open"] + call)
        faults.plan("write", Fault.FAIL_BEFORE)
        assert (await refusal(server.enqueue("new")))[0] is grpc.StatusCode.UNAVAILABLE
        texts = set()
        while True:
            try:
                assert (await server.job("old")).id == "old"
                break
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert redirects(error) == []
                texts.add(error.details())
                assert await server.lease(task_group="other") == []  # Of no shard in particular: no error.
        assert "shard not ready: acquisition in progress" in texts
        assert await refusal(server.job("new")) == (NOT_FOUND, "job not found")


async def test_cluster_info_lists_every_shard_by_its_range() -> None:
    async with rpc_server(shards=4) as server:
        info = await server.stub.GetClusterInfo(pb.GetClusterInfoRequest())
        assert info.num_shards == 4
        assert [owner.shard_id for owner in info.shard_owners] == server.shards
        assert [owner.range_start for owner in info.shard_owners] == [
            "", "4000000000000000", "8000000000000000", "c000000000000000",
        ]  # fmt: skip
        assert [owner.range_end for owner in info.shard_owners] == [
            "4000000000000000", "8000000000000000", "c000000000000000", "",
        ]  # fmt: skip
        assert {(owner.grpc_addr, owner.node_id) for owner in info.shard_owners} == {
            ("silo.example:7450", "node-1")
        }
        assert not any(owner.HasField("placement_ring") for owner in info.shard_owners)
        assert (info.this_node_id, info.this_grpc_addr) == ("node-1", "silo.example:7450")
        assert list(info.members) == [pb.ClusterMember(node_id="node-1", grpc_addr="silo.example:7450")]


@pytest.mark.spec("W-CC-28")
async def test_a_shard_that_is_not_open_is_listed_and_counted_like_the_others() -> None:
    """Without a cluster it still has an owner, this node."""
    async with rpc_server(shards=2) as server:
        before = await server.stub.GetClusterInfo(pb.GetClusterInfoRequest())
        faults = server.storage.faults
        for number in range(1, 30):
            faults.plan("open", Fault.FAIL_BEFORE, call=faults.calls["open"] + number)
        faults.plan("write", Fault.FAIL_BEFORE)
        await refusal(server.enqueue("j"))
        await until(lambda: len(server.node.open_shards()) == 1)
        assert len((await server.stub.GetNodeInfo(pb.GetNodeInfoRequest())).owned_shards) == 1
        assert await server.stub.GetClusterInfo(pb.GetClusterInfoRequest()) == before
        assert before.num_shards == len(before.shard_owners) == 2


@pytest.mark.spec("W-CC-29")
async def test_fifty_ask_for_the_shard_map_at_once_and_get_the_same_one_although_the_storage_hangs() -> None:
    """Without a cluster the map is in memory: there is no backend that one of them would ask for all."""
    async with rpc_server(shards=4) as server, asyncio.timeout(10):
        faults = server.storage.faults
        for operation in ("get", "scan"):
            for number in range(1, 100):
                faults.plan(operation, Fault.HANG, call=faults.calls[operation] + number)
        answers = await asyncio.gather(
            *(server.stub.GetClusterInfo(pb.GetClusterInfoRequest()) for _ in range(50))
        )
        assert answers == answers[:1] * 50
        assert answers[0].num_shards == 4
        faults.clear()


@pytest.mark.spec("W-ERR-7", "W-ERR-16")
async def test_who_is_refused_by_a_stale_range_finds_the_right_shard_in_a_fresh_map() -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        for _ in range(2):  # However often it is tried.
            refused = Rule("Enqueue", new_job(tenant=IN_RIGHT), FORBIDDEN, out_of(LEFT, IN_RIGHT))
            await assert_refused(server, refused)
        info = await server.stub.GetClusterInfo(pb.GetClusterInfoRequest())
        [shard] = [
            owner.shard_id
            for owner in info.shard_owners
            if HashRange(owner.range_start, owner.range_end).contains(hash_tenant(IN_RIGHT))
        ]
        await call(server, "Enqueue", **new_job(tenant=IN_RIGHT, shard=shard))
        assert (await server.job("new", tenant=IN_RIGHT, shard=shard)).id == "new"


async def test_node_info_counts_the_jobs_of_each_open_shard() -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        for job_id in ("a", "b", "c"):
            await server.enqueue(job_id, tenant=IN_LEFT)
        await server.report(await server.lease_one())
        info = await server.stub.GetNodeInfo(pb.GetNodeInfoRequest())
        assert info.node_id == "node-1"
        assert list(info.placement_rings) == []
        assert list(info.owned_shards) == [
            pb.OwnedShardInfo(
                shard_id=shard,
                total_jobs=total,
                completed_jobs=completed,
                cleanup_status="CompactionDone",
                created_at_ms=server.clock.now_ms(),
            )
            for shard, total, completed in ((LEFT, 3, 1), (RIGHT, 0, 0))
        ]
