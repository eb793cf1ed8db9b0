"""`SiloExt.Work` over a real socket: every rule that `ext.proto` states, and what comes when it is broken."""

import asyncio
from collections.abc import Callable
from typing import Any  # Stubs and messages of grpc are untyped.

import grpc
import pytest

from silo.model.floating import RefreshDue
from silo.model.job import LEASE_MS
from silo.node import sessions as sessions_module
from silo.node.session import UNREAD_MAX, WINDOW_MAX
from silo.rpc import work
from silo.rpc.auth import EVERYTHING, Access, Tokens
from silo.rpc.server import Security
from silo.shard.shard import Shard, ShardOptions
from silo.storage.memory import Fault
from silo.wire import validate
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2
from tests.builders import until
from tests.integration.rpc_server import GROUP, RpcServer, packed, refusal, rpc_server
from tests.integration.streams import (
    TIMEOUT_S,
    Stream,
    a_hello,
    a_report,
    a_stream,
    ext,
    welcomed,
)
from tests.invariants import check_snapshot

INVALID = grpc.StatusCode.INVALID_ARGUMENT
DENIED = grpc.StatusCode.PERMISSION_DENIED
NOT_FOUND, WRONG_STATE, UNAVAILABLE, INTERNAL, INVALID_CODE, DENIED_CODE = 5, 9, 14, 13, 3, 7
ADMIN, ADA, WORKER_TOKEN = (f"{name}-0123456789abcdef" for name in ("admin", "ada", "worker"))
SECURITY = Security(
    tokens=Tokens(
        [
            (ADMIN, EVERYTHING),
            (ADA, Access(tenants=frozenset({"ada"}))),
            (WORKER_TOKEN, Access(task_groups=frozenset({GROUP, "second"}))),
        ]
    )
)
SUCCEEDED, FAILED, CANCELLED, SCHEDULED, RUNNING = (
    silo_pb2.JobStatus.Value(f"JOB_STATUS_{name}")
    for name in ("SUCCEEDED", "FAILED", "CANCELLED", "SCHEDULED", "RUNNING")
)


async def refused(server: RpcServer, *messages: pb.WorkRequest | bytes, token: str | None = None) -> Any:
    """Code and text with which a stream ends that says this."""
    metadata = None if token is None else (("authorization", f"Bearer {token}"),)
    call = server.channel.stream_stream("/silo.ext.v1.SiloExt/Work")(metadata=metadata)

    async def read_all() -> None:
        for message in messages:
            await call.write(message if isinstance(message, bytes) else message.SerializeToString())
        await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            pass
        assert await call.code() is grpc.StatusCode.OK
        raise AssertionError("the stream was not refused")

    return await refusal(asyncio.wait_for(read_all(), TIMEOUT_S))


def hello(**fields: Any) -> pb.WorkRequest:
    return pb.WorkRequest(hello=a_hello(**fields))


async def status(server: RpcServer, id: str = "j", **fields: Any) -> Any:
    return (await server.job(id, **fields)).status


# Beginning


async def test_the_first_message_of_the_server_says_welcome() -> None:
    async with rpc_server() as server, a_stream(server) as stream:
        await stream.hear()
        assert stream.welcome == pb.Welcome(lease_ms=LEASE_MS, window_max=WINDOW_MAX)


async def test_a_task_comes_as_a_poll_would_bring_it() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", metadata={"k": "v"}, retry_policy=silo_pb2.RetryPolicy(retry_count=1))
        async with a_stream(server) as stream:
            [task] = await stream.hear_tasks(1)
            await stream.say(window=0, reports=[a_report(task, failure=pb.Failure(code="NO"))])
            await stream.hear_answers(1)
        polled = await server.lease_one()
        assert (task.attempt_number, polled.attempt_number) == (1, 2)
        for one in (task, polled):
            one.ClearField("attempt_number")
            one.ClearField("relative_attempt_number")
            one.ClearField("is_last_attempt")
            one.ClearField("id")
        assert task == polled


async def test_work_that_comes_later_is_pushed() -> None:
    async with rpc_server() as server, a_stream(server) as stream:
        await welcomed(stream)
        for number in range(3):
            await server.enqueue(f"j{number}")
            await stream.hear_tasks(number + 1)
        await server.enqueue("later", start_at_ms=server.clock.now_ms() + 5_000)
        server.clock.advance_ms(5_000)
        assert [task.job_id for task in await stream.hear_tasks(4)] == ["j0", "j1", "j2", "later"]


async def test_a_stream_serves_several_task_groups() -> None:
    async with rpc_server() as server, a_stream(server, task_groups=["a", "b"]) as stream:
        for group in ("a", "b", "other"):
            await server.enqueue(group, task_group=group)
        assert {task.task_group for task in await stream.hear_tasks(2)} == {"a", "b"}
        assert len(stream.tasks) == 2


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ((), "the first message of a stream must say hello"),
        ((pb.WorkRequest(window=3),), "the first message of a stream must say hello"),
        ((pb.WorkRequest(),), "the first message of a stream must say hello"),
        ((hello(), hello()), "only the first message of a stream may say hello"),
        ((hello(session=""),), "session must have from 1 to 64 characters"),
        ((hello(session="x" * 65),), "session must have from 1 to 64 characters"),
        ((hello(worker_id=""),), "worker_id is required"),
        ((hello(task_groups=[]),), "task_groups must name from 1 to 1000"),
        (
            (hello(task_groups=[f"g{n}" for n in range(1_001)]),),
            "task_groups must name from 1 to 1000",
        ),
        ((hello(task_groups=["a", ""]),), "task_group is required"),
        ((hello(held=[silo_pb2.Task(id="t", shard="x")]),), "invalid shard ID: x"),
        ((hello(held=[silo_pb2.Task(id="t")]),), "invalid shard ID: "),
        (
            (hello(held=[silo_pb2.Task()] * 10_001),),
            "too many held tasks, at most 10000",
        ),
        (
            (hello(), pb.WorkRequest(reports=[pb.Report()] * 10_001)),
            "too many reports in one message, at most 10000",
        ),
        ((b"\xff\xff",), "the request does not decode"),
        ((hello(), b"\xff\xff"), "the request does not decode"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_a_stream_that_says_what_it_must_not_is_refused(
    messages: tuple[pb.WorkRequest | bytes, ...], text: str
) -> None:
    async with rpc_server() as server:
        assert await refused(server, *messages) == (INVALID, text)
        await until(lambda: len(server.node.sessions) == 0)


async def test_the_longest_hello_is_taken() -> None:
    async with rpc_server() as server:
        names = [f"{number:064}" for number in range(1_000)]
        held = [silo_pb2.Task(id=str(number), shard=server.shard) for number in range(10_000)]
        async with a_stream(server, session="s" * 64, task_groups=names, held=held) as stream:
            await stream.until(lambda stream: len(stream.lost) == 10_000)
            await server.enqueue("j", task_group=names[-1])
            await stream.hear_tasks(1)


async def test_a_refused_stream_takes_nothing_with_it() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        await refused(server, hello(), hello())
        await refused(server, hello(task_groups=[GROUP, ""]))
        assert (await server.lease_one()).attempt_number == 1


# The window


async def test_without_a_window_nothing_comes() -> None:
    async with rpc_server() as server, a_stream(server, window=None) as stream:
        await server.enqueue("j")
        await welcomed(stream)
        assert await status(server) == SCHEDULED
        await stream.say(window=1)
        await stream.hear_tasks(1)


async def test_the_server_never_goes_beyond_the_window_and_an_acknowledgement_gives_a_place_back() -> None:
    async with rpc_server() as server:
        for number in range(20):
            await server.enqueue(f"j{number:02}")
        async with a_stream(server, window=4, slots=2) as stream:
            for number in range(16):
                tasks = await stream.hear_tasks(4 + number)
                assert len(tasks) - len(stream.answers) <= 4
                assert server.node.sessions.held <= 4
                await stream.report(tasks[number])
            await stream.hear_tasks(20)
            assert [task.job_id for task in stream.tasks] == [f"j{number:02}" for number in range(20)]


async def test_a_report_that_is_refused_gives_its_place_back_too() -> None:
    async with rpc_server() as server:
        for id in ("a", "b"):
            await server.enqueue(id)
        async with a_stream(server, window=1, slots=1) as stream:
            [first] = await stream.hear_tasks(1)
            await stream.say(reports=[pb.Report(task_id=first.id, shard=first.shard)])
            await stream.hear_tasks(2)
            assert stream.answers[0].error.message == "missing outcome"


async def test_a_window_can_shrink_and_grow() -> None:
    async with rpc_server() as server:
        for number in range(9):
            await server.enqueue(f"j{number}")
        async with a_stream(server, window=3) as stream:
            tasks = list(await stream.hear_tasks(3))
            await stream.say(window=0, reports=[a_report(task) for task in tasks])
            await stream.hear_answers(3)
            assert len(stream.tasks) == 3
            await stream.say(window=2)
            await stream.hear_tasks(5)
            await stream.say(window=4)
            await stream.hear_tasks(7)


async def test_a_larger_window_than_the_largest_counts_as_that() -> None:
    async with rpc_server() as server:
        many = [
            silo_pb2.EnqueueRequest(shard=server.shard, id=f"j{n}", task_group=GROUP, payload=packed(b"\x01"))
            for n in range(WINDOW_MAX + 50)
        ]
        await ext(server).EnqueueMany(pb.EnqueueManyRequest(jobs=many))
        async with a_stream(server, window=2**32 - 1, slots=2**32 - 1) as stream:
            await stream.hear_tasks(WINDOW_MAX)
            assert server.node.sessions.held == len(stream.tasks) == WINDOW_MAX


async def test_a_refresh_takes_a_place_like_any_task() -> None:
    limit = silo_pb2.FloatingConcurrencyLimit(key="f", default_max_concurrency=0, metadata={"k": "v"})
    async with rpc_server() as server:
        await server.enqueue("waits", limits=[silo_pb2.Limit(floating_concurrency=limit)])
        await server.enqueue("j")
        async with a_stream(server, window=1, slots=1) as stream:
            await stream.until(lambda stream: len(stream.tasks) + len(stream.refreshes) >= 1)
            [refresh] = stream.refreshes
            assert (refresh.queue_key, refresh.lease_ms, dict(refresh.metadata)) == (
                "f",
                LEASE_MS,
                {"k": "v"},
            )
            assert (stream.tasks, server.node.sessions.held) == ([], 1)
            await stream.report(refresh, refresh_success=silo_pb2.RefreshSuccess(new_max_concurrency=1))
            [task] = await stream.hear_tasks(1)
            await stream.report(task, handed_back=pb.HandedBack())
            await stream.hear_answers(2)


# Reports


@pytest.mark.parametrize(
    ("outcome", "expected", "attempts"),
    [
        ({"success": packed(b"\xa4done")}, SUCCEEDED, ["SUCCEEDED"]),
        ({"failure": pb.Failure(code="NO", data=packed(b"\xc0"))}, SCHEDULED, ["FAILED"]),
        ({"failure": pb.Failure(code="NO", data=packed(b"\xc0"), is_final=True)}, FAILED, ["FAILED"]),
        ({"cancelled": silo_pb2.Cancelled()}, CANCELLED, ["CANCELLED"]),
        ({"postponed": pb.Postponed(delay_ms=1_000)}, SCHEDULED, []),
        ({"postponed": pb.Postponed(delay_ms=2**64 - 1)}, SCHEDULED, []),
        ({"handed_back": pb.HandedBack()}, SCHEDULED, []),
    ],
    ids=[
        "success",
        "failure",
        "final failure",
        "cancelled",
        "postponed",
        "postponed for ever",
        "handed back",
    ],
)
async def test_each_kind_of_report_does_what_it_says(
    outcome: dict[str, Any], expected: int, attempts: list[str]
) -> None:
    async with rpc_server() as server:
        policy = silo_pb2.RetryPolicy(retry_count=3, initial_interval_ms=60_000, max_interval_ms=60_000)
        await server.enqueue("j", retry_policy=policy)
        async with a_stream(server, window=1) as stream:
            [task] = await stream.hear_tasks(1)
            await stream.say(window=0, reports=[a_report(task, **outcome)])
            assert await stream.hear_answers(1) == [(task.id, 0, "")]
            assert not stream.answers[0].HasField("error")
        job = await server.job("j", include_attempts=True)
        assert job.status == expected
        names = [silo_pb2.AttemptStatus.Name(attempt.status) for attempt in job.attempts]
        assert names == [f"ATTEMPT_STATUS_{name}" for name in attempts]
        check_snapshot(server.rows()[server.shard])


async def test_a_failure_and_its_data_are_kept_whether_it_is_final_or_not() -> None:
    async with rpc_server() as server:
        await server.enqueue("j", retry_policy=silo_pb2.RetryPolicy(retry_count=1))
        async with a_stream(server, window=1) as stream:
            for number, is_final in enumerate([False, True]):
                task = (await stream.hear_tasks(number + 1))[-1]
                failure = pb.Failure(code=f"C{number}", data=packed(bytes([number])), is_final=is_final)
                await stream.report(task, failure=failure)
            await stream.hear_answers(2)
        job = await server.job("j", include_attempts=True)
        found = [(attempt.error_code, attempt.error_data.msgpack) for attempt in job.attempts]
        assert found == [("C0", b"\x00"), ("C1", b"\x01")]
        result = await server.result("j")
        assert (result.failure.error_code, result.failure.error_data.msgpack) == ("C1", b"\x01")


async def test_many_reports_in_one_message_are_answered_in_order_each_by_itself() -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        tenants = {server.shards[0]: "test-tenant", server.shards[1]: "test-tenant-1"}
        for shard, tenant in tenants.items():
            for number in range(100):
                await server.enqueue(f"j{number}", shard=shard, tenant=tenant)
        async with a_stream(server, window=200, slots=200) as stream:
            tasks = await stream.hear_tasks(200)
            reports = [a_report(task) for task in tasks]
            unknown = pb.Report(task_id="none", shard=server.shard, tenant_id="test-tenant", handed_back={})
            await stream.say(reports=[*reports[:100], unknown, *reports[100:], reports[0]])
            answers = await stream.hear_answers(202)
            counted = [task_id for task_id, code, _ in answers if code == 0]
            assert sorted(counted) == sorted(task.id for task in tasks)
            refusals = [(task_id, code, text) for task_id, code, text in answers if code]
            assert sorted(refusals) == sorted(
                [("none", NOT_FOUND, "lease not found"), (tasks[0].id, NOT_FOUND, "lease not found")]
            )
            for shard in server.shards:
                mine = [task.id for task in tasks if task.shard == shard]
                assert [task_id for task_id in counted if task_id in mine] == mine


def other_shard(report: pb.Report) -> None:
    report.shard = "00000000-0000-0000-0000-00000000beef"


def no_shard(report: pb.Report) -> None:
    report.shard = "nonsense"


def no_tenant(report: pb.Report) -> None:
    report.ClearField("tenant_id")


def foreign_tenant(report: pb.Report) -> None:
    report.tenant_id = "test-tenant-1"


def unknown_task(report: pb.Report) -> None:
    report.task_id = "none"


def no_outcome(report: pb.Report) -> None:
    report.ClearField("success")


def refresh_outcome(report: pb.Report) -> None:
    report.refresh_success.new_max_concurrency = 1


@pytest.mark.parametrize(
    ("spoil", "code", "text"),
    [
        (no_shard, INVALID_CODE, "invalid shard ID: nonsense"),
        (other_shard, NOT_FOUND, "shard not found"),
        (
            no_tenant,
            INVALID_CODE,
            "tenant_id is required for worker operations when tenancy is enabled",
        ),
        (foreign_tenant, WRONG_STATE, "tenant 'test-tenant-1' is not within shard"),
        (unknown_task, NOT_FOUND, "lease not found"),
        (no_outcome, INVALID_CODE, "missing outcome"),
        (refresh_outcome, INTERNAL, "codec error: task is not a RefreshFloatingLimit"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
async def test_a_report_that_is_wrong_is_answered_as_a_call_of_its_own_would_be(
    spoil: Callable[[pb.Report], None], code: int, text: str
) -> None:
    async with rpc_server(shards=2, tenancy=True) as server:
        for id in ("j", "good"):
            await server.enqueue(id, tenant="test-tenant")
        before = server.rows()
        async with a_stream(server, window=2) as stream:
            tasks = {task.job_id: task for task in await stream.hear_tasks(2)}
            report = a_report(tasks["j"])
            spoil(report)
            await stream.say(reports=[report, a_report(tasks["good"])])
            answers = {task_id: (code, text) for task_id, code, text in await stream.hear_answers(2)}
            assert answers[tasks["good"].id] == (0, "")
            assert answers[report.task_id][0] == code
            assert answers[report.task_id][1].startswith(text)
        assert await status(server, "j", tenant="test-tenant") == RUNNING
        assert before.keys() == server.rows().keys()


@pytest.mark.parametrize(
    "outcome",
    [
        {"success": packed(b"\x01")},
        {"failure": pb.Failure(code="X")},
        {"failure": pb.Failure(code="X", is_final=True)},
        {"cancelled": silo_pb2.Cancelled()},
        {"postponed": pb.Postponed()},
    ],
    ids=lambda outcome: str(outcome)[:30],
)
async def test_what_only_a_job_can_do_is_refused_of_a_refresh(outcome: dict[str, Any]) -> None:
    limit = silo_pb2.FloatingConcurrencyLimit(key="f", default_max_concurrency=0)
    async with rpc_server() as server:
        await server.enqueue("waits", limits=[silo_pb2.Limit(floating_concurrency=limit)])
        async with a_stream(server, window=1) as stream:
            await stream.until(lambda stream: len(stream.refreshes) == 1)
            await stream.report(stream.refreshes[0], **outcome)
            text = "task is the refresh of a floating limit"
            assert await stream.hear_answers(1) == [(stream.refreshes[0].id, WRONG_STATE, text)]


async def test_a_refresh_that_fails_or_is_handed_back_is_acknowledged() -> None:
    limit = silo_pb2.FloatingConcurrencyLimit(key="f", default_max_concurrency=0)
    async with rpc_server() as server:
        await server.enqueue("waits", limits=[silo_pb2.Limit(floating_concurrency=limit)])
        async with a_stream(server, window=1) as stream:
            await stream.until(lambda stream: len(stream.refreshes) == 1)
            await stream.say(window=0, reports=[a_report(stream.refreshes[0], handed_back=pb.HandedBack())])
            await stream.hear_answers(1)
            floating = server.node.shard(server.shard)._state.limits.floating("-", "f")
            assert floating is not None
            assert isinstance(floating.refresh, RefreshDue)
            await stream.say(window=1)
            await stream.until(lambda stream: len(stream.refreshes) == 2)
            await stream.report(
                stream.refreshes[1], refresh_failure=silo_pb2.RefreshFailure(code="X", message="no")
            )
            assert [code for _, code, _ in await stream.hear_answers(2)] == [0, 0]


async def test_a_report_is_acknowledged_when_it_is_durable_and_not_before() -> None:
    async with rpc_server(options=ShardOptions(store_timeout_s=0.3)) as server:
        await server.enqueue("j")
        async with a_stream(server, window=1) as stream:
            [task] = await stream.hear_tasks(1)
            server.storage.faults.plan("write", Fault.HANG)
            await stream.report(task)
            [(_, code, _)] = await stream.hear_answers(1)
            assert code == UNAVAILABLE, "the store gave up before it answered"


@pytest.mark.parametrize("fault", [Fault.FAIL_BEFORE, Fault.FAIL_AFTER])
async def test_a_report_whose_write_failed_is_not_acknowledged_and_can_be_repeated(fault: Fault) -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        async with a_stream(server, window=1) as stream:
            [task] = await stream.hear_tasks(1)
            server.storage.faults.plan("write", fault)
            await stream.report(task)
            [(_, code, text)] = await stream.hear_answers(1)
            assert (code, text) == (UNAVAILABLE, "shard closed: the store failed")
            while stream.answers[-1].error.code == UNAVAILABLE:  # It is being opened again.
                await stream.report(task)
                await stream.hear_answers(len(stream.answers) + 1)
            again = (stream.answers[-1].error.code, stream.answers[-1].error.message)
            assert again == ((0, "") if fault is Fault.FAIL_BEFORE else (NOT_FOUND, "lease not found"))
        assert await status(server) == SUCCEEDED


async def test_a_task_of_the_largest_size_comes_whatever_else_there_is_to_say() -> None:
    """126 MiB, which leaves little of a message of 128 MiB."""
    async with rpc_server() as server:
        large = b"x" * validate.PAYLOAD_BYTES_MAX
        await server.enqueue("small")
        async with a_stream(server, window=5) as stream:
            [small] = await stream.hear_tasks(1)
            await server.enqueue("large", payload=packed(large))
            await stream.say(reports=[a_report(small), *[pb.Report(task_id="n" * 1_000)] * 3_000])
            await stream.hear_answers(3_001)
            [_, task] = await stream.hear_tasks(2)
            assert task.payload.msgpack == large
            await stream.report(task, success=packed(large))
            assert (await stream.hear_answers(3_002))[-1] == (task.id, 0, "")
        assert (await server.result("large")).success_data.msgpack == large


# Tokens


@pytest.mark.parametrize(
    ("token", "groups", "text"),
    [
        (WORKER_TOKEN, [GROUP, "second"], None),
        (ADMIN, ["any", GROUP], None),
        (WORKER_TOKEN, [GROUP, "third"], "this task needs a token with scope 'worker:third'"),
        (ADA, [GROUP], f"this task needs a token with scope 'worker:{GROUP}'"),
    ],
)
async def test_a_stream_needs_the_scope_of_each_of_its_task_groups(
    token: str, groups: list[str], text: str | None
) -> None:
    async with rpc_server(security=SECURITY, tenancy=True) as server:
        if text is not None:
            assert await refused(server, hello(task_groups=groups), token=token) == (DENIED, text)
            assert len(server.node.sessions) == 0
            return
        async with a_stream(server, task_groups=groups, token=token) as stream:
            await welcomed(stream)


async def test_a_stream_needs_a_token() -> None:
    async with rpc_server(security=SECURITY) as server:
        unauthenticated = grpc.StatusCode.UNAUTHENTICATED
        assert await refused(server, hello()) == (unauthenticated, "missing authorization header")
        assert await refused(server, b"\xff", token="wrong") == (unauthenticated, "invalid auth token")


async def test_reports_on_other_task_groups_are_refused_one_by_one() -> None:
    async with rpc_server(security=SECURITY, tenancy=True) as server:
        admin = (("authorization", f"Bearer {ADMIN}"),)
        for id, group in (("mine", GROUP), ("other", "other")):
            job = silo_pb2.EnqueueRequest(
                shard=server.shard, id=id, tenant="ada", task_group=group, payload=packed(b"\x01")
            )
            await server.stub.Enqueue(job, metadata=admin)
        async with (
            a_stream(server, session="other", task_groups=["other"], token=ADMIN) as theirs,
            a_stream(server, token=WORKER_TOKEN) as stream,
        ):
            [other] = await theirs.hear_tasks(1)
            [mine] = await stream.hear_tasks(1)
            await stream.report(other, mine)
            denied = "this task needs a token with scope 'worker:other'"
            answers = await stream.hear_answers(2)
            assert sorted(answers) == sorted([(other.id, DENIED_CODE, denied), (mine.id, 0, "")])
            await theirs.report(other)
            assert await theirs.hear_answers(1) == [(other.id, 0, "")]


# Cancellations and losses


async def test_a_cancellation_is_pushed() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        async with a_stream(server) as stream:
            [task] = await stream.hear_tasks(1)
            at_ms = server.clock.now_ms()
            await server.cancel("j")
            await stream.until(lambda stream: len(stream.cancelled) == 1)
            assert stream.cancelled == [pb.Cancellation(task_id=task.id, cancelled_at_ms=at_ms)]
            await stream.report(task, cancelled=silo_pb2.Cancelled())
            await stream.hear_answers(1)
            assert await status(server) == CANCELLED


async def test_a_lease_that_ran_out_is_told_and_its_report_does_not_count() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        async with a_stream(server, window=1) as stream:
            [task] = await stream.hear_tasks(1)
            server.clock.advance_ms(LEASE_MS)
            await stream.until(lambda stream: len(stream.lost) == 1)
            assert stream.lost == [task.id]
            await stream.report(task)
            assert await stream.hear_answers(1) == [(task.id, NOT_FOUND, "lease not found")]


async def test_leases_live_as_long_as_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "RENEW_S", 0.01)
    async with rpc_server() as server:
        await server.enqueue("j")
        async with a_stream(server, window=1) as stream:
            [task] = await stream.hear_tasks(1)
            leases = server.node.shard(server.shard)._state.leases  # Nothing public tells.
            for _ in range(5):
                server.clock.advance_ms(LEASE_MS - 1)
                await until(lambda: leases.expiry_ms(task.id) == server.clock.now_ms() + LEASE_MS)
            await stream.report(task)
            assert await stream.hear_answers(1) == [(task.id, 0, "")]


@pytest.mark.parametrize("how", ["cancelled", "said no more"])
async def test_a_stream_that_ends_without_a_report_keeps_its_leases_for_a_lease_time_and_no_longer(
    how: str,
) -> None:
    async with rpc_server() as server:
        await server.enqueue("j", retry_policy=silo_pb2.RetryPolicy(retry_count=1))
        async with a_stream(server, window=1) as stream:
            [task] = await stream.hear_tasks(1)
            server.clock.advance_ms(LEASE_MS - 1)
            server.node.sessions.renew()
            if how == "said no more":
                await stream.end()
        await until(lambda: len(server.node.sessions) == 0)
        server.node.sessions.renew()
        server.clock.advance_ms(LEASE_MS - 1)
        await server.node.shard(server.shard).tick()
        assert await status(server) == RUNNING
        server.clock.advance_ms(1)
        await server.node.shard(server.shard).tick()
        assert await status(server) == SCHEDULED
        job = await server.job("j", include_attempts=True)
        assert [attempt.error_code for attempt in job.attempts] == ["WORKER_CRASHED"]
        assert task.attempt_number == 1


# Coming back


async def test_a_session_that_comes_back_goes_on_with_what_it_names() -> None:
    async with rpc_server() as server:
        for id in ("named", "unnamed"):
            await server.enqueue(id)
        async with a_stream(server) as stream:
            tasks = {task.job_id: task for task in await stream.hear_tasks(2)}
        await until(lambda: len(server.node.sessions) == 0)
        async with a_stream(server, window=0, held=[tasks["named"]]) as again:
            await welcomed(again)
            await server.cancel("named")
            await again.until(lambda stream: len(stream.cancelled) == 1)
            assert (await status(server, "named"), await status(server, "unnamed")) == (RUNNING, SCHEDULED)
            await again.say(window=5)
            [unnamed] = await again.hear_tasks(1)
            assert (unnamed.job_id, unnamed.attempt_number) == ("unnamed", 1)
            assert unnamed.id != tasks["unnamed"].id
            await again.report(tasks["named"], unnamed)
            assert {code for _, code, _ in await again.hear_answers(2)} == {0}


async def test_what_a_session_names_and_does_not_have_is_lost_and_stays_with_who_has_it() -> None:
    async with rpc_server() as server:
        await server.enqueue("theirs")
        await server.enqueue("polled", task_group="polls")
        [polled] = await server.lease(task_group="polls")
        async with a_stream(server, session="other") as other:
            [theirs] = await other.hear_tasks(1)
            nonsense = silo_pb2.Task(id="none", shard="00000000-0000-0000-0000-00000000beef")
            async with a_stream(server, held=[theirs, polled, nonsense]) as stream:
                await stream.until(lambda stream: len(stream.lost) == 3)
                assert set(stream.lost) == {theirs.id, polled.id, "none"}
            await other.report(theirs)
            assert await other.hear_answers(1) == [(theirs.id, 0, "")]
        await server.report(polled)


async def test_a_report_that_was_not_acknowledged_is_sent_again_with_the_hello() -> None:
    for counted in (False, True):
        async with rpc_server() as server:
            await server.enqueue("j")
            async with a_stream(server) as stream:
                [task] = await stream.hear_tasks(1)
                if counted:
                    await stream.report(task)
                    await until(lambda: server.node.sessions.held == 0)
            call = ext(server).Work()
            again = Stream(call)
            await again.say(hello=a_hello(held=[task]), window=0, reports=[a_report(task)])
            expected = (NOT_FOUND, "lease not found") if counted else (0, "")
            assert await again.hear_answers(1) == [(task.id, *expected)]
            await again.end()
            assert await status(server) == SUCCEEDED


async def test_a_second_stream_of_a_session_ends_the_first() -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        async with a_stream(server) as first:
            [task] = await first.hear_tasks(1)
            async with a_stream(server, held=[task]) as second:
                await welcomed(second)
                assert not await first.hear()
                assert await first.call.code() is grpc.StatusCode.OK
                await server.enqueue("k")
                await second.hear_tasks(1)
                await second.report(task)
                await second.hear_answers(1)
        assert await status(server) == SUCCEEDED


async def test_a_worker_that_comes_back_after_the_server_was_killed_goes_on() -> None:
    """The same as a restart: shards are opened from what is stored, with new sessions."""
    async with rpc_server() as server:
        for id in ("named", "unnamed"):
            await server.enqueue(id)
        async with a_stream(server) as stream:
            tasks = {task.job_id: task for task in await stream.hear_tasks(2)}
            shard = server.node.shard(server.shard)
            server.storage.faults.plan("write", Fault.FAIL_BEFORE)
            await refusal(server.stub.Enqueue(silo_pb2.EnqueueRequest(shard=server.shard, task_group="x")))
            await until(lambda: any(open is not shard for open in server.node.open_shards()))
            await stream.report(tasks["named"])
            assert await stream.hear_answers(1) == [(tasks["named"].id, 0, "")]
        await until(lambda: len(server.node.sessions) == 0)
        async with a_stream(server) as again:
            [unnamed] = await again.hear_tasks(1)
            assert (unnamed.job_id, unnamed.attempt_number) == ("unnamed", 1)


# The end


async def test_who_says_no_more_hears_everything_to_its_end() -> None:
    async with rpc_server() as server:
        for number in range(50):
            await server.enqueue(f"j{number}")
        async with a_stream(server, window=50, slots=50) as stream:
            tasks = await stream.hear_tasks(50)
            for task in tasks:
                await stream.report(task)
            await stream.end()
            assert {answer.task_id for answer in stream.answers} == {task.id for task in tasks}
            assert not any(answer.HasField("error") for answer in stream.answers)
            assert await stream.call.code() is grpc.StatusCode.OK
        await until(lambda: len(server.node.sessions) == 0)


async def test_nothing_is_sent_to_who_said_no_more() -> None:
    async with rpc_server() as server, a_stream(server, window=5) as stream:
        await welcomed(stream)
        await stream.end()
        await server.enqueue("j")
        assert stream.tasks == []
        assert (await server.lease_one()).attempt_number == 1


async def test_a_server_that_stops_ends_its_streams_at_once_with_all_reports_acknowledged() -> None:
    async with rpc_server() as server:
        for number in range(20):
            await server.enqueue(f"j{number}")
        async with (
            a_stream(server, window=20, slots=20) as stream,
            a_stream(server, session="idle", task_groups=["idle"]) as idle,
        ):
            tasks = list(await stream.hear_tasks(20))
            await welcomed(idle)
            for task in tasks[:10]:
                await stream.report(task)
            await until(lambda: server.node.sessions.held == 10)
            started = asyncio.get_running_loop().time()
            server.node.end_waits()
            for each in (stream, idle):
                while await each.hear():
                    pass
                assert await each.call.code() is grpc.StatusCode.OK
            assert asyncio.get_running_loop().time() - started < 1.0
            assert [answer.task_id for answer in stream.answers] == [task.id for task in tasks[:10]]
        async with a_stream(server, held=tasks[10:]) as late:
            while await late.hear():
                pass
            assert (late.welcome is not None, late.tasks, late.lost) == (True, [], [])
        for task in tasks[10:]:
            assert await status(server, task.job_id) == RUNNING


async def test_a_failure_that_nobody_foresaw_ends_the_stream_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with rpc_server() as server:
        await server.enqueue("j")
        async with a_stream(server) as stream:
            [task] = await stream.hear_tasks(1)

            async def broken(self: Shard, reports: object) -> object:
                raise ZeroDivisionError

            with monkeypatch.context() as patch:
                patch.setattr(Shard, "report_many", broken)
                await stream.report(task)
                assert await refusal(stream.hear()) == (grpc.StatusCode.INTERNAL, "internal error")
        assert "ZeroDivisionError" in caplog.text
        async with a_stream(server, held=[task], window=0) as again:
            await again.report(task)
            assert await again.hear_answers(1) == [(task.id, 0, "")]


# Back-pressure


async def test_a_worker_that_does_not_read_gets_its_window_and_no_more() -> None:
    async with rpc_server() as server:
        payload = packed(b"x" * (1 << 20))
        for number in range(40):
            await server.enqueue(f"j{number}", payload=payload)
        async with a_stream(server, window=8, slots=8) as stream:
            await until(lambda: server.node.sessions.held == 8)
            [session] = server.node.sessions._sessions.values()  # Nothing public tells.
            await until(lambda: 0 < len(session.outbox.tasks) < 8)  # What does not fit on the wire stays.
            assert server.node.sessions.held == 8
            running = [await status(server, f"j{number}") for number in range(40)]
            assert running.count(RUNNING) == 8
            for number in range(32):
                tasks = await stream.hear_tasks(8 + number)
                await stream.report(tasks[number])
            await stream.hear_tasks(40)


async def test_a_worker_that_does_not_read_its_acknowledgements_is_not_read_either() -> None:
    async with rpc_server() as server, a_stream(server) as stream:
        await until(lambda: len(server.node.sessions) == 1)
        [session] = server.node.sessions._sessions.values()  # Nothing public tells.
        nobody = pb.Report(task_id="t" * 1_000, shard=server.shard, handed_back=pb.HandedBack())
        flooding = asyncio.Event()
        flooding.set()
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while flooding.is_set():
                await stream.say(reports=[nobody] * 500)
                sent += 500

        writing = asyncio.ensure_future(flood())
        await until(lambda: not session.drained.is_set())
        before = -1
        while sent > before:  # Until nothing goes into the stream any more.
            before = sent
            await asyncio.wait({writing}, timeout=0.2)
        assert len(session.outbox.acknowledged) <= UNREAD_MAX + work._REPORTS_AT_ONCE * 500
        flooding.clear()
        while not writing.done() or len(stream.answers) < sent:
            await stream.hear()


async def test_other_workers_are_served_while_one_does_not_read() -> None:
    async with rpc_server() as server:
        payload = packed(b"x" * (3 << 20))
        for number in range(20):
            await server.enqueue(f"j{number:02}", payload=payload)
        async with (
            a_stream(server, session="stuck", window=4, slots=4),
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            await until(lambda: server.node.sessions.held == 4)
            server.channel, own = channel, server.channel
            try:
                async with a_stream(server, window=4, slots=4) as stream:
                    for number in range(16):
                        tasks = await stream.hear_tasks(number + 1)
                        await stream.report(tasks[number])
                    assert not stream.lost
            finally:
                server.channel = own


async def test_a_worker_that_goes_while_it_is_written_to_leaves_its_tasks_to_others() -> None:
    async with rpc_server() as server:
        for number in range(12):
            await server.enqueue(f"j{number:02}", payload=packed(b"x" * (4 << 20)))
        async with a_stream(server, window=12, slots=12):
            await until(lambda: server.node.sessions.held == 12)
            [session] = server.node.sessions._sessions.values()  # Nothing public tells.
            await until(lambda: 0 < len(session.outbox.tasks) < 12)
        await until(lambda: len(server.node.sessions) == 0)
        server.clock.advance_ms(LEASE_MS)
        await server.node.shard(server.shard).tick()
        attempts = [(await server.job(f"j{n:02}", include_attempts=True)).attempts for n in range(12)]
        unwritten = [number for number, ended in enumerate(attempts) if not ended]
        assert unwritten, "what was not written went back at once, and was no attempt"
        assert unwritten == list(range(unwritten[0], 12))


# Many


async def test_tasks_go_to_idle_workers_in_turn_over_many_streams() -> None:
    async with rpc_server() as server:
        streams = []
        for number in range(20):
            stream = Stream(ext(server).Work())
            await stream.say(hello=a_hello(session=f"s{number}", slots=1), window=1)
            await welcomed(stream)
            streams.append(stream)
        for number in range(20):
            await server.enqueue(f"j{number}")
        for stream in streams:
            await stream.hear_tasks(1)
        assert {stream.tasks[0].job_id for stream in streams} == {f"j{number}" for number in range(20)}
        for stream in streams:
            stream.call.cancel()


async def test_polls_and_streams_share_the_work_and_their_leases_are_alike() -> None:
    async with rpc_server() as server:
        for number in range(4):
            await server.enqueue(f"j{number}")
        polled = await server.lease(2)
        async with a_stream(server) as stream:
            tasks = await stream.hear_tasks(2)
            assert {task.job_id for task in (*polled, *tasks)} == {f"j{number}" for number in range(4)}
            await stream.report(*polled)  # Whoever has a task may report on it, on whichever way.
            await server.report(tasks[0])
            assert not (await server.beat(tasks[1])).cancelled
            assert sorted(code for _, code, _ in await stream.hear_answers(2)) == [0, 0]
            await stream.until(lambda stream: stream.lost == [tasks[0].id])
            await stream.report(tasks[1])
            await stream.hear_answers(3)
        check_snapshot(server.rows()[server.shard])
