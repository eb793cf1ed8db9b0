"""The client finds shards, follows them, repeats what was not answered, and says what went wrong."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

import silo
from silo import (
    ClientClosed,
    ClusterUnreachable,
    JobAlreadyExistsError,
    JobNotFoundError,
    JobNotTerminalError,
    JobTimeoutError,
    PayloadError,
    RetryPolicy,
    ShardRouting,
    SiloClientError,
    SiloFailedPreconditionError,
    SiloGRPCClient,
    SiloGrpcError,
    SiloInvalidArgumentError,
    SiloUnavailableError,
    Success,
    TaskNotFoundError,
    TopologyError,
)
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.builders import until
from tests.integration.fake_silo import (
    GROUP,
    SHARD,
    Status,
    a_client,
    a_refresh_task,
    a_task,
    fake_silo,
    nobody,
    not_found,
    unavailable,
    value,
    wrong_shard,
)
from tests.integration.real_silo import real_silo

OTHER_SHARD = "22222222-2222-4222-8222-222222222222"
UNREACHABLE = "Failed to refresh cluster topology from any server"
Code = grpc.StatusCode


def routing(**fields: int) -> ShardRouting:
    return ShardRouting(**({"retry_delay_ms": 1, "topology_refresh_interval_ms": 0} | fields))


PATIENT = routing(retry_delay_ms=60_000)


async def enqueue(client: SiloGRPCClient, **fields: Any) -> silo.JobHandle:
    return await client.enqueue(**({"payload": 1, "task_group": GROUP} | fields))


class Held:
    """An answer that comes only when the test says so."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self.release = asyncio.Event()

    async def __call__(self, request: Any) -> Any:
        await self.release.wait()
        return self._answer


async def hang(request: Any) -> Any:
    await asyncio.Event().wait()


# Making one


@pytest.mark.parametrize(
    ("servers", "addresses"),
    [
        ("a:1", ["a:1"]),
        ("a:1,b:2", ["a:1,b:2"]),
        (["a:1", "http://b:2"], ["a:1", "b:2"]),
        (("a", 1), ["a:1"]),
        ([("a", 1), "b:2"], ["a:1", "b:2"]),
        (("a:1", "b:2"), ["a:1", "b:2"]),
    ],
)
async def test_servers_may_be_given_in_every_form(servers: Any, addresses: list[str]) -> None:
    async with SiloGRPCClient(servers) as client:
        assert repr(client) == f"SiloGRPCClient({addresses}, 0 shards known)"


@pytest.mark.parametrize("wrong", [{"servers": []}, {"servers": "a:1", "rpc_timeout_ms": 0}])
def test_what_cannot_work_is_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"servers|rpc_timeout_ms"):
        SiloGRPCClient(**wrong)


async def test_making_one_sends_nothing() -> None:
    async with fake_silo() as server, a_client(server) as client:
        client.handle("j")
        assert server.received == []


# What is sent


async def test_an_enqueue_without_options_sends_the_defaults() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handle = await enqueue(client, payload={"a": 1})
        [sent] = server.calls("Enqueue")
        assert (sent.shard, sent.priority, sent.start_at_ms, sent.task_group) == (SHARD, 50, 0, GROUP)
        assert sent.payload == value({"a": 1})
        assert not sent.HasField("tenant")
        assert not sent.HasField("retry_policy")
        assert not sent.metadata
        assert sent.id == handle.id != ""


async def test_an_enqueue_sends_every_option() -> None:
    policy = RetryPolicy(
        retry_count=3,
        initial_interval_ms=1,
        max_interval_ms=2,
        randomize_interval=False,
        backoff_factor=1.5,
    )
    async with fake_silo() as server, a_client(server) as client:
        handle = await enqueue(
            client,
            id="j",
            tenant="t",
            priority=0,
            start_at_ms=99,
            retry_policy=policy,
            metadata={"k": "v"},
        )
        [sent] = server.calls("Enqueue")
        assert (sent.id, sent.tenant, sent.priority, sent.start_at_ms) == ("j", "t", 0, 99)
        assert dict(sent.metadata) == {"k": "v"}
        assert (sent.retry_policy.retry_count, sent.retry_policy.backoff_factor) == (3, 1.5)
        assert (handle.id, handle.tenant) == ("j", "t")


async def test_the_handle_has_the_id_that_the_server_answered() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("Enqueue", pb.EnqueueResponse(id="theirs"))
        assert (await enqueue(client)).id == "theirs"


async def test_a_delay_and_a_start_exclude_each_other() -> None:
    async with fake_silo() as server, a_client(server) as client:
        with pytest.raises(ValueError, match="not both"):
            await enqueue(client, delay=1, start_at_ms=1)
        assert server.received == []


async def test_a_payload_without_a_form_is_refused_before_anything_is_sent() -> None:
    async with fake_silo() as server, a_client(server) as client:
        with pytest.raises(PayloadError):
            await enqueue(client, payload={1, 2})
        assert server.received == []


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"priority": -1}, ValueError),
        ({"priority": 2**32}, ValueError),
        ({"priority": 1.5}, TypeError),
        ({"start_at_ms": 2**63}, ValueError),
        ({"retry_policy": RetryPolicy(retry_count=-1)}, ValueError),
        ({"metadata": {"k": 1}}, TypeError),
        ({"metadata": {1: "v"}}, TypeError),
    ],
    ids=str,
)
async def test_what_does_not_fit_into_a_message_is_refused_before_anything_is_sent(
    wrong: dict[str, Any], error: type[Exception]
) -> None:
    async with fake_silo() as server, a_client(server) as client:
        with pytest.raises(error):
            await enqueue(client, **wrong)
        assert server.received == []


async def test_a_dataclass_is_sent_as_a_map() -> None:
    @dataclass
    class Email:
        to: str

    async with fake_silo() as server, a_client(server) as client:
        await enqueue(client, payload=Email("a@b"))
        assert server.calls("Enqueue")[0].payload == value({"to": "a@b"})


async def test_a_lease_call_names_a_shard_only_if_one_is_given() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.deliver(a_task("t1"))
        leased = await client.lease_tasks(worker_id="w", max_tasks=3, task_group=GROUP, wait_ms=20)
        await client.lease_tasks(worker_id="w", max_tasks=3, task_group=GROUP, shard=SHARD)
        anywhere, one_shard = server.calls("LeaseTasks")
        [task] = leased.tasks
        assert (task.id, task.job_id, task.tenant_id) == ("t1", "job-t1", None)
        assert leased.refresh_tasks == ()
        assert not anywhere.HasField("shard")
        assert one_shard.shard == SHARD
        assert [metadata.get("silo-wait-ms") for metadata in server.metadata("LeaseTasks")] == ["20", None]


async def test_refresh_tasks_are_leased_with_all_that_is_known_of_their_limit() -> None:
    async with fake_silo() as server, a_client(server) as client:
        limit = {"metadata": {"api": "mail"}, "last_refreshed_at_ms": 7, "current_max_concurrency": 5}
        server.deliver(a_refresh_task("r1", queue_key="mails", tenant_id="acme", **limit))
        server.deliver(a_refresh_task("r2"))
        leased = await client.lease_tasks(worker_id="w", max_tasks=3, task_group=GROUP)
        given, plain = leased.refresh_tasks
        assert leased.tasks == ()
        assert given == silo.RefreshTask(
            id="r1",
            queue_key="mails",
            lease_ms=10_000,
            shard=SHARD,
            task_group=GROUP,
            tenant="acme",
            **limit,
        )
        assert (plain.tenant, plain.last_refreshed_at_ms, plain.metadata) == (None, 0, {})


async def test_a_server_index_goes_round_the_servers() -> None:
    async with fake_silo() as first, fake_silo() as second, a_client(first) as client:
        first.shards = [(SHARD, "", "8", first.address), (OTHER_SHARD, "8", "", second.address)]
        await client.refresh_topology()
        for index in (0, 1, 2):
            await client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP, server_index=index)
        assert (len(first.calls("LeaseTasks")), len(second.calls("LeaseTasks"))) == (2, 1)


async def test_a_failure_without_data_reports_data_all_the_same() -> None:
    async with fake_silo() as server, a_client(server) as client:
        await client.report_outcome(task_id="t", shard=SHARD, outcome=silo.Failure("NO"))
        await client.report_outcome(task_id="u", shard=SHARD, outcome=silo.Failure("NO", b"\xa1x"))
        without, raw = server.calls("ReportOutcome")
        assert (without.failure.code, without.failure.data.msgpack) == ("NO", b"\xc0")
        assert raw.failure.data.msgpack == b"\xa1x"


async def test_a_refresh_report_has_a_new_maximum_or_a_failure() -> None:
    async with fake_silo() as server, a_client(server) as client:
        for maximum in (0, 2**32 - 1):
            await client.report_refresh_outcome(task_id="r", shard=SHARD, new_max_concurrency=maximum)
        await client.report_refresh_outcome(
            task_id="s", shard=SHARD, failure_code="DOWN", failure_message="no answer", tenant="acme"
        )
        none, most, failed = server.calls("ReportRefreshOutcome")
        assert (none.task_id, none.shard, none.HasField("tenant_id")) == ("r", SHARD, False)
        assert none.WhichOneof("outcome") == "success"
        assert (none.success.new_max_concurrency, most.success.new_max_concurrency) == (0, 2**32 - 1)
        assert (failed.task_id, failed.tenant_id) == ("s", "acme")
        assert failed.failure == pb.RefreshFailure(code="DOWN", message="no answer")


@pytest.mark.parametrize(
    "outcome",
    [
        {},
        {"failure_code": "X"},
        {"failure_message": "why"},
        {"new_max_concurrency": 1, "failure_code": "X", "failure_message": "why"},
        {"new_max_concurrency": 1, "failure_message": "why"},
        {"new_max_concurrency": -1},
        {"new_max_concurrency": 2**32},
        {"new_max_concurrency": 1.0},
        {"new_max_concurrency": True},
    ],
    ids=str,
)
async def test_a_refresh_report_that_says_nothing_clear_is_not_sent(outcome: dict[str, Any]) -> None:
    async with fake_silo() as server, a_client(server) as client:
        with pytest.raises(ValueError, match="max_concurrency"):
            await client.report_refresh_outcome(task_id="r", shard=SHARD, **outcome)
        assert server.received == []


async def test_a_refresh_report_without_a_lease_is_a_task_not_found() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("ReportRefreshOutcome", not_found("lease not found"))
        with pytest.raises(TaskNotFoundError) as raised:
            await client.report_refresh_outcome(task_id="r", shard=SHARD, new_max_concurrency=1)
        assert (raised.value.task_id, raised.value.grpc_message) == ("r", "lease not found")


# Errors


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (Code.INVALID_ARGUMENT, "SiloInvalidArgumentError"),
        (Code.FAILED_PRECONDITION, "SiloFailedPreconditionError"),
        (Code.UNAUTHENTICATED, "SiloUnauthenticatedError"),
        (Code.PERMISSION_DENIED, "SiloPermissionDeniedError"),
        (Code.ALREADY_EXISTS, "JobAlreadyExistsError"),
        (Code.INTERNAL, "SiloGrpcError"),
        (Code.ABORTED, "SiloGrpcError"),
        (Code.UNIMPLEMENTED, "SiloGrpcError"),
        (Code.UNKNOWN, "SiloGrpcError"),
        (Code.CANCELLED, "SiloGrpcError"),
        (Code.DATA_LOSS, "SiloGrpcError"),
    ],
)
async def test_a_refusal_is_not_repeated_and_has_the_class_of_its_status(code: Code, error: str) -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.always("GetJob", Status(code, "because ∞"))
        with pytest.raises(SiloGrpcError, match=r"^because ∞$") as raised:
            await client.get_job("j")
        assert type(raised.value).__name__ == error
        assert (raised.value.grpc_code, raised.value.after_retry) == (code.name, False)
        assert isinstance(raised.value.__cause__, grpc.aio.AioRpcError)
        assert len(server.calls("GetJob")) == 1


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (Code.UNAVAILABLE, "SiloUnavailableError"),
        (Code.DEADLINE_EXCEEDED, "SiloDeadlineExceededError"),
    ],
)
async def test_no_answer_after_all_tries_has_a_class_of_its_own(code: Code, error: str) -> None:
    async with fake_silo() as server, a_client(server, shard_routing=routing(max_retries=2)) as client:
        server.always("GetJob", Status(code, "slow"))
        with pytest.raises(SiloGrpcError) as raised:
            await client.get_job("j")
        assert type(raised.value).__name__ == error
        assert len(server.calls("GetJob")) == 3


@pytest.mark.spec("W-ERR-20")
async def test_an_exhausted_server_is_asked_again_by_the_channel() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("GetJob", Status(Code.RESOURCE_EXHAUSTED, "busy"), pb.GetJobResponse(id="j"))
        assert (await client.get_job("j")).id == "j"
        assert len(server.calls("GetJob")) == 2


@pytest.mark.spec("W-ERR-20")
async def test_a_server_that_stays_exhausted_is_asked_five_times_and_told_so() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.always("GetJob", Status(Code.RESOURCE_EXHAUSTED, "busy"))
        with pytest.raises(silo.SiloResourceExhaustedError, match=r"^busy$"):
            await client.get_job("j")
        sent = [metadata.get("grpc-previous-rpc-attempts") for metadata in server.metadata("GetJob")]
        assert sent == [None, "1", "2", "3", "4"]
        assert len(server.calls("GetClusterInfo")) == 1


@pytest.mark.spec("W-ERR-7", "W-ERR-16")
async def test_a_stale_range_is_told_to_the_caller_at_once() -> None:
    """The routing client of other tools refreshes and tries again; this one leaves that to its caller."""
    async with fake_silo() as server, a_client(server) as client:
        text = f"tenant 't' is not within shard {SHARD} range [-∞, 8); refresh topology and retry"
        server.always("Enqueue", Status(Code.FAILED_PRECONDITION, text))
        with pytest.raises(SiloFailedPreconditionError) as raised:
            await enqueue(client, tenant="t")
        assert raised.value.grpc_message == text
        assert (len(server.calls("Enqueue")), len(server.calls("GetClusterInfo"))) == (1, 1)


@pytest.mark.spec("W-ERR-11", "W-ERR-12")
async def test_not_found_is_about_the_task_or_the_job_of_the_call_whatever_its_text() -> None:
    async with fake_silo() as server, a_client(server) as client:
        for method in ("Heartbeat", "GetJob"):
            server.always(method, not_found("nothing like that"))
        with pytest.raises(TaskNotFoundError) as task:
            await client.heartbeat("w", "t", SHARD)
        assert (task.value.task_id, task.value.grpc_message) == ("t", "nothing like that")
        with pytest.raises(JobNotFoundError) as job:
            await client.get_job("j")
        assert job.value.job_id == "j"
        assert len(server.received) == 3, "the topology and one try each"


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.get_job("j", "t"),
        lambda client: client.get_job_status("j", "t"),
        lambda client: client.get_job_result("j", "t"),
        lambda client: client.delete_job("j", "t"),
        lambda client: client.cancel_job("j", "t"),
        lambda client: client.restart_job("j", "t"),
        lambda client: client.expedite_job("j", "t"),
        lambda client: client.lease_task("j", worker_id="w", tenant="t"),
    ],
)
async def test_an_unknown_job_is_named_with_its_tenant(
    call: Callable[[SiloGRPCClient], Awaitable[Any]],
) -> None:
    async with fake_silo() as server, a_client(server) as client:
        for method in (
            "GetJob",
            "GetJobResult",
            "DeleteJob",
            "CancelJob",
            "RestartJob",
            "ExpediteJob",
            "LeaseTask",
        ):
            server.always(method, not_found("job not found", owner="elsewhere:1"))
        with pytest.raises(JobNotFoundError, match=r'^Job "j" not found in tenant "t"$') as raised:
            await call(client)
        assert (raised.value.job_id, raised.value.tenant) == ("j", "t")
        assert not isinstance(raised.value, SiloGrpcError)
        assert len(server.received) == 2, "the topology and one try"


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.heartbeat("w", "t", SHARD),
        lambda client: client.report_outcome(task_id="t", shard=SHARD, outcome=Success(1)),
        lambda client: client.report_refresh_outcome(task_id="t", shard=SHARD, new_max_concurrency=1),
    ],
)
async def test_an_unknown_lease_names_the_task(call: Callable[[SiloGRPCClient], Awaitable[Any]]) -> None:
    async with fake_silo() as server, a_client(server) as client:
        for method in ("Heartbeat", "ReportOutcome", "ReportRefreshOutcome"):
            server.always(method, not_found("lease not found"))
        with pytest.raises(TaskNotFoundError, match=r'^Task "t" not found: lease not found$') as raised:
            await call(client)
        assert raised.value.grpc_message == "lease not found"
        assert not raised.value.after_retry


async def test_a_call_about_no_job_in_particular_finds_none_missing() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.always("Enqueue", not_found("nothing like that"))
        server.always("LeaseTasks", not_found("nothing like that"))
        server.always("ResetShards", not_found("nothing like that"))
        for call in (
            enqueue(client),
            client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP),
            client.reset_shards(),
        ):
            with pytest.raises(silo.SiloNotFoundError, match=r"^nothing like that$"):
                await call
        with pytest.raises(JobNotFoundError, match=r'^Job "mine" not found$'):
            await enqueue(client, id="mine")


@pytest.mark.spec("W-ERR-13", "W-ERR-14")
@pytest.mark.parametrize(
    "status",
    [
        Status(Code.ALREADY_EXISTS, "job already exists with id j"),
        Status(Code.ALREADY_EXISTS, "taken"),
        Status(Code.INTERNAL, "x: job already exists with id j"),
    ],
)
async def test_a_taken_id_is_recognised_in_both_forms(status: Status) -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.always("Enqueue", status)
        with pytest.raises(JobAlreadyExistsError) as raised:
            await enqueue(client, id="j", tenant="t")
        assert (raised.value.job_id, raised.value.tenant) == ("j", "t")
        assert not raised.value.after_retry


@pytest.mark.spec("W-ERR-6")
async def test_a_job_that_goes_on_is_no_result_and_says_its_status() -> None:
    """The reference takes every FAILED_PRECONDITION for a job that goes on."""
    async with fake_silo() as server, a_client(server) as client:
        server.answer(
            "GetJobResult",
            Status(Code.FAILED_PRECONDITION, "job is not complete: status is Running"),
            Status(Code.FAILED_PRECONDITION, "job is not complete"),
            Status(Code.FAILED_PRECONDITION, "tenancy is off"),
        )
        with pytest.raises(JobNotTerminalError, match=r"\(current status: Running\)$"):
            await client.get_job_result("j")
        with pytest.raises(JobNotTerminalError, match=r"is not in a terminal state$"):
            await client.get_job_result("j")
        with pytest.raises(SiloFailedPreconditionError, match="tenancy is off"):
            await client.get_job_result("j")


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (JobNotFoundError("j"), 'Job "j" not found', "SILO_JOB_NOT_FOUND"),
        (JobNotFoundError("j", "t"), 'Job "j" not found in tenant "t"', "SILO_JOB_NOT_FOUND"),
        (
            JobNotTerminalError("j", "t", "Running"),
            'Job "j" in tenant "t" is not in a terminal state (current status: Running)',
            "SILO_JOB_NOT_TERMINAL",
        ),
        (JobNotTerminalError("j"), 'Job "j" is not in a terminal state', "SILO_JOB_NOT_TERMINAL"),
        (TaskNotFoundError("t"), 'Task "t" not found', "SILO_TASK_NOT_FOUND"),
        (TaskNotFoundError("t", "why"), 'Task "t" not found: why', "SILO_TASK_NOT_FOUND"),
        (
            silo.TaskLeaseLostError("t", "j", ValueError("why")),
            'Lease lost for task "t" (job "j"): why',
            "SILO_TASK_LEASE_LOST",
        ),
        (
            silo.DuplicateTaskDeliveryError("t", "j"),
            'Task "t" for job "j" delivered while already executing on this worker',
            "SILO_DUPLICATE_TASK_DELIVERY",
        ),
        (
            silo.DuplicateTaskDeliveryError("t"),
            'Task "t" delivered while already executing on this worker',
            "SILO_DUPLICATE_TASK_DELIVERY",
        ),
        (JobAlreadyExistsError("j", "t"), 'Job "j" already exists in tenant "t"', "SILO_JOB_ALREADY_EXISTS"),
        (JobAlreadyExistsError(), "Job already exists", "SILO_JOB_ALREADY_EXISTS"),
        (JobAlreadyExistsError("j", None, "theirs"), "theirs", "SILO_JOB_ALREADY_EXISTS"),
    ],
)
def test_the_texts_of_errors_are_those_of_every_client(error: SiloClientError, text: str, code: str) -> None:
    assert (str(error), error.message, error.code) == (text, text, code)


# Finding shards


async def test_the_topology_is_asked_for_once() -> None:
    async with fake_silo() as server, a_client(server) as client:
        await asyncio.gather(*(enqueue(client) for _ in range(5)))
        await enqueue(client)
        assert len(server.calls("GetClusterInfo")) == 1
        assert len(server.calls("Enqueue")) == 6


async def test_two_hundred_calls_at_once_all_succeed() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handles = await asyncio.gather(*(enqueue(client) for _ in range(200)))
        assert len({handle.id for handle in handles}) == 200


async def test_thousands_of_calls_at_once_all_succeed() -> None:
    async with real_silo() as address, a_client(address) as client:
        ends = await asyncio.gather(*(enqueue(client) for _ in range(4000)), return_exceptions=True)
        assert {str(end) for end in ends if isinstance(end, Exception)} == set()


async def test_a_tenant_goes_to_the_owner_of_its_shard() -> None:
    async with fake_silo() as low, fake_silo() as high, a_client(low) as client:
        low.shards = [(OTHER_SHARD, "8", "", high.address), (SHARD, "", "8", low.address)]
        await enqueue(client, tenant="customer-123")  # 0bb6…
        await enqueue(client, tenant="env-0")  # 9aae…
        await enqueue(client)  # 7a16…
        assert [request.shard for request in low.calls("Enqueue")] == [SHARD, SHARD]
        assert [request.tenant for request in low.calls("Enqueue")] == ["customer-123", ""]
        assert [request.shard for request in high.calls("Enqueue")] == [OTHER_SHARD]
        assert client.get_shard_for_tenant("env-0") == OTHER_SHARD
        assert [shard.shard_id for shard in client.get_topology()] == [SHARD, OTHER_SHARD]


async def test_a_server_that_is_down_does_not_hide_the_next_one() -> None:
    async with fake_silo() as server, a_client(nobody(), server) as client:
        await client.refresh_topology()
        assert [shard.server_addr for shard in client.get_topology()] == [server.address]


async def test_a_server_that_hangs_does_not_hide_the_next_one() -> None:
    async with fake_silo() as hung, fake_silo() as server:
        hung.always("GetClusterInfo", hang)
        short = routing(topology_refresh_timeout_ms=50)
        async with a_client(hung, server, shard_routing=short) as client:
            assert await client.refresh_topology() is None
            assert [shard.server_addr for shard in client.get_topology()] == [server.address]


async def test_with_all_servers_down_the_old_topology_stays() -> None:
    async with fake_silo() as server, a_client(server) as client:
        await client.refresh_topology()
        known = client.get_topology()
        server.always("GetClusterInfo", Status(Code.INTERNAL, "broken"))
        with pytest.raises(ClusterUnreachable, match=f"{UNREACHABLE}: .*INTERNAL: broken"):
            await client.refresh_topology()
        assert client.get_topology() == known


async def test_an_unreachable_cluster_is_reported_when_the_tries_are_used_up() -> None:
    async with a_client(nobody(), shard_routing=routing(max_retries=2)) as client:
        with pytest.raises(ClusterUnreachable, match=UNREACHABLE) as raised:
            await enqueue(client)
        assert isinstance(raised.value.__cause__, grpc.aio.AioRpcError)


async def test_a_cluster_that_went_away_is_reported_with_the_last_failure() -> None:
    async with fake_silo() as server, a_client(server, shard_routing=routing(max_retries=2)) as client:
        await enqueue(client)
        await server.stop()
        with pytest.raises(ClusterUnreachable, match=f"{UNREACHABLE}: UNAVAILABLE"):
            await enqueue(client)


async def test_a_call_goes_on_as_soon_as_its_server_is_back() -> None:
    async with AsyncExitStack() as stack:
        async with real_silo() as address:
            client = await stack.enter_async_context(a_client(address, shard_routing=PATIENT))
            await enqueue(client)
        waiting = asyncio.ensure_future(enqueue(client))
        assert not (await asyncio.wait({waiting}, timeout=0.5))[0]
        async with real_silo(address), asyncio.timeout(30):  # Half of its pause.
            await waiting


async def test_a_shard_without_an_owner_is_not_found() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.shards = [(SHARD, "", "8", ""), (OTHER_SHARD, "8", "", None)]
        with pytest.raises(TopologyError, match='No shard found for tenant "-"'):
            await enqueue(client)


def connections(client: SiloGRPCClient) -> list[str]:
    """The addresses to which the client has channels."""
    return client._router._connections.addresses()


async def test_a_cluster_without_owners_is_found_again_when_it_has_some() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.shards = [(SHARD, "", "", "")]
        with pytest.raises(TopologyError):
            await enqueue(client)
        assert connections(client) == []
        server.shards = [(SHARD, "", "", None)]
        await client.refresh_topology()
        assert (await enqueue(client, id="j")).id == "j"


async def test_an_owner_that_left_is_forgotten() -> None:
    async with fake_silo() as old, fake_silo() as new, a_client(old) as client:
        old.shards = [(SHARD, "", "", new.address)]
        await client.refresh_topology()
        await client.refresh_topology()
        assert len(old.calls("GetClusterInfo")) == 1, "the second went to the only owner"
        assert len(new.calls("GetClusterInfo")) == 1


async def test_a_server_keeps_one_connection_under_the_name_that_it_tells_of_itself() -> None:
    async with fake_silo() as server:
        port = server.address.rpartition(":")[2]
        async with a_client(f"localhost:{port}") as client:
            await client.refresh_topology()
            assert connections(client) == [server.address]


async def test_servers_that_were_given_are_asked_when_all_that_are_known_are_gone() -> None:
    async with fake_silo() as given, fake_silo() as owner, a_client(given) as client:
        given.shards = [(SHARD, "", "", owner.address)]
        await client.refresh_topology()
        assert connections(client) == [owner.address]
        await owner.stop()
        given.shards = [(SHARD, "", "", given.address)]
        await client.refresh_topology()
        assert connections(client) == [given.address]
        assert len(given.calls("GetClusterInfo")) == 2


async def test_a_refresh_that_fails_leaves_the_connections_that_there_were() -> None:
    async with fake_silo() as server, a_client(nobody(), nobody(), server) as client:
        await client.refresh_topology()
        assert connections(client) == [server.address]
        server.always("GetClusterInfo", Status(Code.INTERNAL, "broken"))
        with pytest.raises(ClusterUnreachable):
            await client.refresh_topology()
        assert connections(client) == [server.address]


async def test_what_is_told_of_the_topology_may_be_changed_without_effect() -> None:
    async with fake_silo() as server, a_client(server) as client:
        await client.refresh_topology()
        client.get_topology().clear()
        assert [shard.shard_id for shard in client.get_topology()] == [SHARD]


async def test_a_call_outlives_the_connection_it_runs_on() -> None:
    async with fake_silo() as old, fake_silo() as new, a_client(old) as client:
        await client.refresh_topology()
        held = Held(pb.GetJobResponse(id="j"))
        old.answer("GetJob", held)
        call = asyncio.create_task(client.get_job("j"))
        await until(lambda: len(old.calls("GetJob")) == 1)
        old.shards = [(SHARD, "", "", new.address)]
        await client.refresh_topology()
        held.release.set()
        assert (await call).id == "j"


async def test_addresses_are_mapped_wherever_they_are_learned() -> None:
    async with fake_silo() as first, fake_silo() as second:
        # Servers that are given are dialled as they are given, whatever the book says.
        book = {first.address: nobody(), "first:1": first.address, "second:1": f"http://{second.address}"}
        async with a_client(first, address_map=book) as client:
            first.shards = [(SHARD, "", "", "first:1")]
            first.answer("Enqueue", wrong_shard(owner="second:1"))
            await enqueue(client)
            assert (len(first.calls("Enqueue")), len(second.calls("Enqueue"))) == (1, 1)


async def test_the_topology_is_refreshed_in_the_background_whatever_happens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with fake_silo() as server:
        often = routing(topology_refresh_interval_ms=5)
        async with a_client(server, shard_routing=often) as client:
            await client.refresh_topology()
            server.always("GetClusterInfo", Status(Code.INTERNAL, "broken"))
            await until(lambda: len(server.calls("GetClusterInfo")) > 3)
            server.as_usual("GetClusterInfo")
            server.shards = [(OTHER_SHARD, "", "", None)]
            await until(lambda: client.get_shard_for_tenant("a") == OTHER_SHARD)
    assert f"[SiloGRPCClient] Failed to refresh topology: {UNREACHABLE}" in caplog.text


# Redirects and repetitions


@pytest.mark.spec("W-CC-9", "W-ERR-1", "W-ERR-2")
async def test_a_redirect_is_followed_without_asking_for_the_topology() -> None:
    async with fake_silo() as old, fake_silo() as new, a_client(old) as client:
        old.always("Enqueue", wrong_shard(owner=new.address))
        await enqueue(client)
        await enqueue(client)
        assert len(old.calls("GetClusterInfo")) == 1
        assert (len(old.calls("Enqueue")), len(new.calls("Enqueue"))) == (1, 2), "and remembered"
        assert client.wrong_shard_retries == 1


@pytest.mark.spec("W-ERR-2")
async def test_a_chain_of_redirects_is_followed() -> None:
    async with fake_silo() as a, fake_silo() as b, fake_silo() as c, a_client(a) as client:
        a.always("Enqueue", wrong_shard(owner=b.address))
        b.always("Enqueue", wrong_shard(owner=c.address))
        await enqueue(client)
        assert len(c.calls("Enqueue")) == 1


@pytest.mark.spec("W-ERR-1")
@pytest.mark.parametrize("owner", [None, ""])
async def test_a_wrong_shard_without_a_redirect_asks_for_the_topology(owner: str | None) -> None:
    async with fake_silo() as old, fake_silo() as new, a_client(old) as client:
        await client.refresh_topology()
        old.shards = [(SHARD, "", "", new.address)]
        old.always("Enqueue", wrong_shard(owner=owner))
        await enqueue(client)
        assert len(old.calls("GetClusterInfo")) == 2
        assert len(new.calls("Enqueue")) == 1


@pytest.mark.spec("W-ERR-3")
@pytest.mark.parametrize("owner", [True, False])
async def test_the_name_of_the_owner_changes_nothing(owner: bool) -> None:
    async with fake_silo() as old, fake_silo() as new, a_client(old) as client:
        await client.refresh_topology()
        old.shards = [(SHARD, "", "", new.address)]
        refused = wrong_shard(owner=new.address if owner else None)
        old.always("Enqueue", dataclasses.replace(refused, node="node-2"))
        await enqueue(client)
        assert len(old.calls("GetClusterInfo")) == (1 if owner else 2)
        assert (len(old.calls("Enqueue")), len(new.calls("Enqueue"))) == (1, 1)


@pytest.mark.spec("W-CC-92")
async def test_after_a_split_the_repetition_names_the_new_shard() -> None:
    async with fake_silo() as server, a_client(server) as client:
        await client.refresh_topology()
        server.shards = [(OTHER_SHARD, "", "", None)]
        server.answer("Enqueue", wrong_shard())
        await enqueue(client)
        assert [request.shard for request in server.calls("Enqueue")] == [SHARD, OTHER_SHARD]


async def test_a_worker_call_finds_the_owner_before_any_topology() -> None:
    async with fake_silo() as any_server, fake_silo() as owner, a_client(any_server) as client:
        any_server.always("Heartbeat", wrong_shard(owner=owner.address))
        beat = await client.heartbeat("w", "t", SHARD)
        assert not beat.cancelled
        assert any_server.calls("GetClusterInfo") == []


@pytest.mark.spec("W-ERR-21")
async def test_a_worker_call_to_a_vanished_shard_fails_in_the_end() -> None:
    async with fake_silo() as server, a_client(server, shard_routing=routing(max_retries=2)) as client:
        calls = {
            "Heartbeat": lambda: client.heartbeat("w", "t", SHARD),
            "ReportOutcome": lambda: client.report_outcome(task_id="t", shard=SHARD, outcome=Success(1)),
            "ReportRefreshOutcome": lambda: client.report_refresh_outcome(
                task_id="t", shard=SHARD, new_max_concurrency=1
            ),
        }
        for method, call in calls.items():
            server.always(method, wrong_shard())
            with pytest.raises(TaskNotFoundError, match="shard not found"):
                await call()
            assert [request.shard for request in server.calls(method)] == [SHARD] * 3
        assert client.wrong_shard_retries == 2 * len(calls)


@pytest.mark.spec("W-ERR-21")
async def test_a_job_in_a_vanished_shard_is_not_found_in_the_end() -> None:
    async with fake_silo() as server, a_client(server, shard_routing=routing(max_retries=2)) as client:
        for method in ("GetJob", "LeaseTasks"):
            server.always(method, wrong_shard())
        with pytest.raises(JobNotFoundError):
            await client.get_job("j")
        assert len(server.calls("GetJob")) == 3
        with pytest.raises(silo.SiloNotFoundError, match="shard not found"):
            await client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP, shard=SHARD)
        assert len(server.calls("LeaseTasks")) == 3


@pytest.mark.spec("W-ERR-8", "W-ERR-9", "W-ERR-10")
@pytest.mark.parametrize(
    "status",
    [unavailable(), Status(Code.DEADLINE_EXCEEDED, "slow"), Status(Code.INTERNAL, "Received RST_STREAM")],
    ids=lambda status: status.code.name,
)
async def test_between_tries_the_topology_is_asked_for_and_the_waits_about_double(
    status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fake_silo() as server, a_client(server, shard_routing=routing(retry_delay_ms=250)) as client:
        waits: list[float] = []

        async def pause(call: Any, seconds: float) -> None:
            waits.append(seconds)

        monkeypatch.setattr(client._router, "_pause", pause)
        server.always("GetJob", status)
        with pytest.raises(SiloGrpcError, match=status.text):
            await client.get_job("j")
        doubling = [0.25, 0.5, 1, 2, 4, 5, 5, 5]
        assert all(whole / 2 <= wait <= whole for wait, whole in zip(waits, doubling, strict=True))
        assert (len(server.calls("GetJob")), len(server.calls("GetClusterInfo"))) == (9, 9)


@pytest.mark.spec("W-ERR-8", "W-ERR-9", "W-ERR-10")
@pytest.mark.parametrize(
    "status",
    [
        unavailable(),
        Status(Code.DEADLINE_EXCEEDED, "slow"),
        Status(Code.INTERNAL, "Received RST_STREAM with error code 2"),
    ],
)
async def test_what_was_not_answered_is_repeated(status: Status) -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("GetJob", status, status, pb.GetJobResponse(id="j"))
        assert (await client.get_job("j")).id == "j"
        assert client.wrong_shard_retries == 0


async def test_what_was_not_answered_is_repeated_where_its_shard_is_now() -> None:
    async with fake_silo() as old, fake_silo() as new, a_client(old) as client:
        await client.refresh_topology()
        old.shards = [(SHARD, "", "", new.address)]
        old.always("Enqueue", unavailable())
        await enqueue(client)
        assert (len(old.calls("Enqueue")), len(new.calls("Enqueue"))) == (1, 1)


async def test_a_lease_call_looks_for_another_server_when_its_own_does_not_answer() -> None:
    async with fake_silo() as first, fake_silo() as second, a_client(first) as client:
        first.shards = [(SHARD, "", "8", first.address), (OTHER_SHARD, "8", "", second.address)]
        await client.refresh_topology()
        first.always("LeaseTasks", unavailable())
        first.shards = [(SHARD, "", "", second.address)]
        second.deliver(a_task("t"))
        leased = await client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP, server_index=0)
        assert [task.id for task in leased.tasks] == ["t"]
        assert (len(first.calls("LeaseTasks")), len(second.calls("LeaseTasks"))) == (1, 1)


async def test_when_its_budget_is_used_up_a_call_is_repeated_no_more() -> None:
    async with fake_silo() as server, a_client(server, shard_routing=routing(retry_budget_ms=0)) as client:
        server.always("Enqueue", unavailable())
        with pytest.raises(SiloUnavailableError):
            await enqueue(client)
        assert len(server.calls("Enqueue")) == len(server.calls("GetClusterInfo")) == 1


async def test_a_budget_ends_a_call_long_before_its_retries_do() -> None:
    patient = routing(retry_budget_ms=300, retry_delay_ms=60_000)
    async with fake_silo() as server, a_client(server, shard_routing=patient) as client:
        server.always("Enqueue", unavailable())
        with pytest.raises(SiloUnavailableError):
            async with asyncio.timeout(20):
                await enqueue(client)
        assert len(server.calls("Enqueue")) == 2, "the last one when the budget ends"


async def test_without_retries_there_is_one_call_and_no_refresh() -> None:
    async with fake_silo() as server, a_client(server, shard_routing=routing(max_retries=0)) as client:
        server.always("Enqueue", unavailable())
        with pytest.raises(SiloUnavailableError):
            await enqueue(client)
        assert len(server.calls("Enqueue")) == len(server.calls("GetClusterInfo")) == 1


async def test_a_hung_server_does_not_hang_a_call() -> None:
    async with fake_silo() as server:
        options = {"rpc_timeout_ms": 50, "shard_routing": routing(max_retries=1)}
        async with a_client(server, **options) as client:
            server.always("GetJob", hang)
            with pytest.raises(silo.SiloDeadlineExceededError):
                await client.get_job("j")
            await until(lambda: server.in_flight == 0)


async def test_a_wait_for_work_may_take_longer_than_other_calls() -> None:
    async with fake_silo() as server, a_client(server, rpc_timeout_ms=200) as client:
        held = Held(pb.LeaseTasksResponse(tasks=[a_task("t")]))
        server.answer("LeaseTasks", held)
        call = client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP, wait_ms=20_000)
        waiting = asyncio.create_task(call)
        await until(lambda: len(server.calls("LeaseTasks")) == 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.3)
        held.release.set()
        assert [task.id for task in (await waiting).tasks] == ["t"]


async def test_a_lease_call_gives_up_when_it_is_told_to() -> None:
    async with (
        fake_silo() as server,
        a_client(server, shard_routing=PATIENT) as client,
    ):
        server.always("LeaseTasks", unavailable())
        give_up = asyncio.Event()
        call = client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP, give_up=give_up)
        waiting = asyncio.create_task(call)
        await until(lambda: len(server.calls("GetClusterInfo")) == 2)
        give_up.set()
        with pytest.raises(SiloUnavailableError):
            await waiting


# Answers that were lost


async def test_an_enqueue_whose_first_answer_was_lost_succeeds() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("Enqueue", unavailable(), Status(Code.ALREADY_EXISTS, "job already exists"))
        handle = await enqueue(client)
        first, second = server.calls("Enqueue")
        assert first.id == second.id == handle.id


async def test_with_an_id_of_the_callers_a_repeated_enqueue_cannot_tell_and_says_so() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("Enqueue", unavailable(), Status(Code.ALREADY_EXISTS, "job already exists"))
        with pytest.raises(JobAlreadyExistsError) as raised:
            await enqueue(client, id="mine")
        assert raised.value.after_retry


async def test_a_refusal_by_the_wrong_server_leaves_no_doubt() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("Enqueue", wrong_shard(), Status(Code.ALREADY_EXISTS, "job already exists"))
        with pytest.raises(JobAlreadyExistsError) as raised:
            await enqueue(client)
        assert not raised.value.after_retry


async def test_a_report_whose_first_answer_was_lost_says_that_it_cannot_tell() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("ReportOutcome", unavailable(), not_found("lease not found"))
        with pytest.raises(TaskNotFoundError) as raised:
            await client.report_outcome(task_id="t", shard=SHARD, outcome=Success(1))
        assert raised.value.after_retry


# Tokens


async def test_without_a_token_there_is_no_header() -> None:
    async with fake_silo() as server, a_client(server, token="") as client:
        await enqueue(client)
        assert all("authorization" not in call.metadata for call in server.received)


async def test_a_token_is_sent_with_every_call() -> None:
    async with fake_silo() as server, a_client(server, token="secret") as client:
        await enqueue(client)
        await client.heartbeat("w", "t", SHARD)
        assert [call.metadata["authorization"] for call in server.received] == ["Bearer secret"] * 3


async def test_a_token_function_is_asked_before_every_call() -> None:
    asked = 0

    async def token() -> str:
        nonlocal asked
        asked += 1
        return f"token-{asked}"

    async with fake_silo() as server, a_client(server, token=token) as client:
        await client.get_job("j")
        await client.get_job("j")
        assert [call.metadata["authorization"] for call in server.received] == [
            "Bearer token-1",
            "Bearer token-2",
            "Bearer token-3",
        ]


async def test_a_token_function_that_fails_fails_the_call_and_nothing_is_sent() -> None:
    async def token() -> str:
        raise OSError("no vault")

    async with fake_silo() as server, a_client(server, token=token) as client:
        with pytest.raises(OSError, match="no vault"):
            await client.heartbeat("w", "t", SHARD)
        with pytest.raises(ClusterUnreachable, match="no vault"):
            await enqueue(client)
        assert server.received == []


async def test_a_token_function_that_hangs_does_not_hang_the_call() -> None:
    async def token() -> str:
        await asyncio.Event().wait()
        raise AssertionError

    async with fake_silo() as server, a_client(server, token=token, rpc_timeout_ms=20) as client:
        with pytest.raises(SiloClientError, match="token function did not return"):
            await client.heartbeat("w", "t", SHARD)


async def test_a_wrong_token_is_reported_at_once() -> None:
    async with fake_silo() as server, a_client(server, token="wrong", shard_routing=PATIENT) as client:
        server.always("GetClusterInfo", Status(Code.UNAUTHENTICATED, "invalid auth token"))
        with pytest.raises(ClusterUnreachable, match=f"{UNREACHABLE}: .*invalid auth token"):
            await enqueue(client)
        assert len(server.calls("GetClusterInfo")) == 1


# Closing and cancelling


async def test_a_closed_client_refuses_every_call() -> None:
    async with fake_silo() as server, a_client(server) as client:
        await enqueue(client)
        await client.close()
        await client.close()
        before = len(server.received)
        for call in (
            enqueue(client),
            client.heartbeat("w", "t", SHARD),
            client.refresh_topology(),
            client.reset_shards(),
        ):
            with pytest.raises(ClientClosed):
                await call
        assert len(server.received) == before


@pytest.mark.parametrize("method", ["GetClusterInfo", "Enqueue"])
async def test_closing_ends_calls_that_run_with_an_error_not_a_cancellation(method: str) -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.always(method, hang)
        calls = [asyncio.create_task(enqueue(client)) for _ in range(2)]
        await until(lambda: bool(server.calls(method)))
        await client.close()
        for call in calls:
            with pytest.raises(ClientClosed):
                await call


async def test_a_cancelled_call_is_cancelled_at_the_server_and_leaves_nothing_behind() -> None:
    async with fake_silo() as server, a_client(server) as client:
        await client.refresh_topology()
        server.always("GetJob", hang)
        before = len(asyncio.all_tasks())
        call = asyncio.create_task(client.get_job("j"))
        await until(lambda: server.in_flight == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: server.in_flight == 0)
        await until(lambda: len(asyncio.all_tasks()) <= before)


async def test_a_cancelled_first_call_does_not_spoil_the_topology_for_others() -> None:
    async with fake_silo() as server, a_client(server) as client:
        held = Held(pb.GetClusterInfoResponse(shard_owners=[pb.ShardOwner(shard_id=SHARD, grpc_addr="")]))
        server.answer("GetClusterInfo", held)
        first, second = (asyncio.create_task(enqueue(client)) for _ in range(2))
        await until(lambda: len(server.calls("GetClusterInfo")) == 1)
        first.cancel()
        held.release.set()
        with pytest.raises(TopologyError):
            await second
        assert len(server.calls("GetClusterInfo")) == 1


async def test_a_cancelled_wait_between_tries_ends_at_once() -> None:
    async with (
        fake_silo() as server,
        a_client(server, shard_routing=PATIENT) as client,
    ):
        server.always("GetJob", unavailable())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.get_job("j")


# Reading


async def test_a_job_is_read_in_full() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer(
            "GetJob",
            pb.GetJobResponse(
                id="j",
                priority=7,
                enqueue_time_ms=1,
                payload=value({"a": 1}),
                retry_policy=pb.RetryPolicy(retry_count=2),
                metadata={"k": "v"},
                status="JOB_STATUS_SUCCEEDED",
                status_changed_at_ms=5,
                task_group=GROUP,
                result=value("done"),
                attempts=[
                    pb.JobAttempt(
                        attempt_number=1,
                        status="ATTEMPT_STATUS_FAILED",
                        error_code="X",
                        error_data=pb.SerializedBytes(msgpack=b"boom"),
                    ),
                    pb.JobAttempt(attempt_number=2, status="ATTEMPT_STATUS_SUCCEEDED", result=value("done")),
                ],
            ),
        )
        job = await client.get_job("j", include_attempts=True)
        assert server.calls("GetJob")[0].include_attempts
        assert (job.id, job.priority, job.payload, job.metadata) == ("j", 7, {"a": 1}, {"k": "v"})
        assert (job.status, job.result, job.task_group) == ("Succeeded", "done", GROUP)
        assert job.retry_policy is not None
        assert job.retry_policy.retry_count == 2
        assert job.next_attempt_starts_after_ms is None
        failed, succeeded = job.attempts or ()
        assert (failed.status, failed.error_code, failed.error_data) == ("Failed", "X", "boom")
        assert (succeeded.status, succeeded.result, succeeded.error_code) == ("Succeeded", "done", None)


async def test_attempts_are_absent_when_there_are_none() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("GetJob", pb.GetJobResponse(id="j"))
        job = await client.get_job("j", include_attempts=True)
        assert (job.attempts, job.payload, job.result) == (None, None, None)


async def test_a_payload_that_is_no_value_fails_the_job_but_not_its_status() -> None:
    broken = pb.GetJobResponse(id="j", payload=pb.SerializedBytes(msgpack=b"boom"))
    async with fake_silo() as server, a_client(server) as client:
        server.always("GetJob", broken)
        with pytest.raises(PayloadError, match="payload"):
            await client.get_job("j")
        assert await client.get_job_status("j") == "Scheduled"


async def test_a_status_of_the_future_is_an_error() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.always("GetJob", pb.GetJobResponse(id="j", status=9))
        with pytest.raises(SiloClientError, match="Unknown job status: 9"):
            await client.get_job("j")


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (
            pb.GetJobResultResponse(status="JOB_STATUS_SUCCEEDED", success_data=value(5)),
            ("Succeeded", 5, None, None),
        ),
        (pb.GetJobResultResponse(status="JOB_STATUS_SUCCEEDED"), ("Succeeded", None, None, None)),
        (
            pb.GetJobResultResponse(
                status="JOB_STATUS_FAILED", failure=pb.JobFailure(error_code="X", error_data=value("why"))
            ),
            ("Failed", None, "X", "why"),
        ),
        (
            pb.GetJobResultResponse(status="JOB_STATUS_CANCELLED", cancelled=pb.JobCancelled()),
            ("Cancelled", None, None, None),
        ),
    ],
)
async def test_every_end_of_a_job_is_a_result(answer: Any, result: tuple[Any, ...]) -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("GetJobResult", answer)
        got = await client.handle("j").result()
        assert (got.status, got.result, got.error_code, got.error_data) == result
        assert len(server.calls("GetJobResult")) == 1


async def test_an_answer_without_a_task_is_an_error() -> None:
    async with fake_silo() as server, a_client(server) as client:
        with pytest.raises(SiloClientError, match="missing task"):
            await client.lease_task("j", worker_id="w")
        server.answer("LeaseTask", pb.LeaseTaskResponse(task=a_task("t", tenant_id="x")))
        assert (await client.lease_task("j", worker_id="w")).tenant_id == "x"


async def test_a_reset_reaches_every_owner_and_forgets_the_topology() -> None:
    async with fake_silo() as first, fake_silo() as second, a_client(first) as client:
        first.shards = [(SHARD, "", "8", first.address), (OTHER_SHARD, "8", "", second.address)]
        await client.reset_shards()
        assert len(first.calls("ResetShards")) == len(second.calls("ResetShards")) == 1
        assert client.get_topology() == []
        await enqueue(client)
        assert len(first.calls("GetClusterInfo")) == 2


async def test_a_refused_reset_says_why() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.always("ResetShards", Status(Code.PERMISSION_DENIED, "only in dev mode"))
        with pytest.raises(silo.SiloPermissionDeniedError, match="dev mode"):
            await client.reset_shards()


# Handles

_GOES_ON = Status(Code.FAILED_PRECONDITION, "job is not complete: status is Running")
_DONE = pb.GetJobResultResponse(status="JOB_STATUS_SUCCEEDED", success_data=value("done"))


@pytest.mark.spec("W-ERR-6")
async def test_a_result_is_waited_for() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("GetJobResult", _GOES_ON, _GOES_ON, _DONE)
        assert (await client.handle("j", "t").result(timeout=10)).result == "done"
        assert [request.tenant for request in server.calls("GetJobResult")] == ["t"] * 3


async def test_a_result_that_does_not_come_in_time_is_a_timeout() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.always("GetJobResult", _GOES_ON)
        text = "^Timeout waiting for job j to complete after 50ms$"
        with pytest.raises(JobTimeoutError, match=text) as raised:
            await client.handle("j").result(timeout=0.05)
        assert isinstance(raised.value, TimeoutError)
        assert isinstance(raised.value.__cause__, JobNotTerminalError)


async def test_a_timeout_of_zero_looks_once() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.always("GetJobResult", _GOES_ON)
        with pytest.raises(JobTimeoutError):
            await client.handle("j").result(timeout=0)
        assert len(server.calls("GetJobResult")) == 1


async def test_a_hung_server_does_not_hang_the_wait_for_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silo.client.handle._LOOK_S", 0.05)
    async with fake_silo() as server, a_client(server) as client:
        server.always("GetJobResult", hang)
        with pytest.raises(JobTimeoutError):
            await client.handle("j").result(timeout=0.1)


async def test_a_job_that_is_deleted_while_waited_for_is_not_found() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("GetJobResult", _GOES_ON, not_found("job not found"))
        with pytest.raises(JobNotFoundError):
            await client.handle("j").result(timeout=10)


async def test_a_wait_for_a_result_can_be_cancelled() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.always("GetJobResult", _GOES_ON)
        waiting = asyncio.create_task(client.handle("j").result())
        await until(lambda: len(server.calls("GetJobResult")) >= 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_handle_passes_its_id_and_tenant_on() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handle = client.handle("j", "t")
        await handle.cancel()
        await handle.restart()
        await handle.expedite()
        await handle.delete()
        assert await handle.status() == "Scheduled"
        await handle.job(include_attempts=True)
        sent = [call for call in server.received if call.method != "GetClusterInfo"]
        assert [call.method for call in sent] == [
            "CancelJob",
            "RestartJob",
            "ExpediteJob",
            "DeleteJob",
            "GetJob",
            "GetJob",
        ]
        assert {(call.request.id, call.request.tenant) for call in sent} == {("j", "t")}
        assert repr(handle) == "JobHandle('j', tenant='t')"


async def test_wrong_arguments_come_back_in_the_words_of_the_server() -> None:
    async with fake_silo() as server, a_client(server) as client:
        text = "priority must be between 0 and 99"
        server.always("Enqueue", Status(Code.INVALID_ARGUMENT, text))
        with pytest.raises(SiloInvalidArgumentError, match=text):
            await enqueue(client, priority=100)


async def test_five_mebibytes_go_and_come_with_the_default_options() -> None:
    async with real_silo() as address, a_client(address) as client:
        big = "x" * (5 << 20)
        handle = await enqueue(client, payload=big)
        assert (await handle.job()).payload == big


async def test_a_job_that_waits_has_no_result_and_says_so() -> None:
    async with real_silo() as address, a_client(address) as client:
        handle = await enqueue(client)
        with pytest.raises(JobNotTerminalError) as raised:
            await client.get_job_result(handle.id)
        assert raised.value.current_status == "Scheduled"


async def test_a_job_that_does_not_exist_is_deleted_without_an_error() -> None:
    async with real_silo() as address, a_client(address) as client:
        await client.delete_job("nobody")
        for call in (client.cancel_job, client.restart_job, client.expedite_job):
            with pytest.raises(JobNotFoundError, match=r'^Job "nobody" not found$'):
                await call("nobody")
