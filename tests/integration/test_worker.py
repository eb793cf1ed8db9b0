"""The worker runs what it leases, never too much of it, keeps its leases, and reports every outcome."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import msgpack
import pytest

from silo import (
    Cancelled,
    DuplicateTaskDeliveryError,
    ErrorContext,
    Failure,
    RetryPolicy,
    ShardRouting,
    SiloClientError,
    SiloGRPCClient,
    SiloWorker,
    Success,
    TaskLeaseLostError,
)
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.builders import until
from tests.integration.fake_silo import (
    GROUP,
    SHARD,
    FakeSilo,
    Status,
    a_client,
    a_refresh_task,
    a_task,
    fake_silo,
    not_found,
    unavailable,
    wrong_shard,
)
from tests.integration.real_silo import real_silo
from tests.integration.workers import Context, Errors, Handler, a_worker

LEASE_LOST = [
    not_found("lease not found"),
    Status(grpc.StatusCode.FAILED_PRECONDITION, "lease owner mismatch"),
]
HARMLESS = [
    wrong_shard(),
    Status(grpc.StatusCode.FAILED_PRECONDITION, "hash is not within shard s range"),
    Status(grpc.StatusCode.INTERNAL, "lease not found"),
    not_found("job not found"),
]


def result_of(report: pb.ReportOutcomeRequest) -> Any:
    assert report.WhichOneof("outcome") == "success"
    return msgpack.unpackb(report.success.msgpack)


def error_of(report: pb.ReportOutcomeRequest) -> Any:
    assert report.WhichOneof("outcome") == "failure"
    return msgpack.unpackb(report.failure.data.msgpack)


async def run_one(
    handler: Callable[[Context], Any], task: pb.Task | None = None, **options: Any
) -> pb.ReportOutcomeRequest:
    """The outcome that a worker reports for one task."""
    async with fake_silo() as server, a_client(server) as client, a_worker(client, handler, **options):
        task = task or a_task("t")
        server.deliver(task)
        await until(lambda: task.id in server.outcomes)
        return server.outcomes[task.id]


# Options


async def test_the_defaults_are_those_of_the_guide() -> None:
    worker = SiloWorker(client=SiloGRPCClient("a:1"), worker_id="w", task_group="g", handler=Handler())
    assert (worker.max_concurrent_tasks, worker.concurrent_pollers, worker.tasks_per_poll) == (10, 1, 5)
    assert (worker.poll_interval_ms, worker.heartbeat_interval_ms) == (1000, 5000)
    assert (worker.is_running, worker.active_tasks, worker.available_task_slots) == (False, 0, 10)
    assert repr(worker) == "SiloWorker('w', 'g', 0 active)"


@pytest.mark.parametrize(("slots", "per_poll"), [(1, 1), (2, 1), (3, 2), (10, 5)])
async def test_a_poll_asks_for_half_of_the_slots_by_default(slots: int, per_poll: int) -> None:
    worker = a_worker(SiloGRPCClient("a:1"), Handler(), max_concurrent_tasks=slots)
    assert worker.tasks_per_poll == per_poll


@pytest.mark.parametrize(
    "option",
    [
        "max_concurrent_tasks",
        "concurrent_pollers",
        "tasks_per_poll",
        "poll_interval_ms",
        "heartbeat_interval_ms",
    ],
)
async def test_an_option_of_zero_is_refused_by_name(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 1, not 0"):
        a_worker(SiloGRPCClient("a:1"), Handler(), **{option: 0})


async def test_a_poll_names_worker_group_and_how_many_tasks_are_wanted() -> None:
    async with fake_silo() as server, a_client(server) as client:
        async with a_worker(client, Handler(), worker_id="me", tasks_per_poll=3):
            await until(lambda: bool(server.calls("LeaseTasks")))
        poll = server.calls("LeaseTasks")[0]
        assert (poll.worker_id, poll.task_group, poll.max_tasks) == ("me", GROUP, 3)
        assert not poll.HasField("shard")


async def test_every_poller_polls_at_once() -> None:
    async with fake_silo() as server, a_client(server) as client:
        async with a_worker(client, Handler(), concurrent_pollers=3, tasks_per_poll=1):
            await until(lambda: server.in_flight == 3)
        assert {poll.max_tasks for poll in server.calls("LeaseTasks")} == {1}


async def test_polls_visit_the_servers_in_turn() -> None:
    async with fake_silo() as first, fake_silo() as second, a_client(first) as client:
        first.shards = [(SHARD, "", "8", first.address), ("other", "8", "", second.address)]
        handler = Handler()
        async with a_worker(client, handler):
            first.deliver(a_task("on-first"))
            second.deliver(a_task("on-second"))
            await until(lambda: {"on-first", "on-second"} <= set(handler.ids))


# How much runs


async def test_no_more_handlers_run_than_there_are_slots() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler(holds=True)
        async with a_worker(client, handler, max_concurrent_tasks=3, concurrent_pollers=2) as worker:
            server.deliver(*(a_task(f"t{n}") for n in range(20)))
            await until(lambda: handler.running == 3)
            assert (worker.active_tasks, worker.available_task_slots) == (3, 0)
            handler.release.set()
            await until(lambda: len(server.outcomes) == 20)
        assert handler.most_running == 3
        assert (worker.active_tasks, worker.available_task_slots) == (0, 3)


async def test_no_more_tasks_are_asked_for_than_can_run() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler(holds=True)
        async with a_worker(client, handler, max_concurrent_tasks=4, tasks_per_poll=4):
            server.deliver(*(a_task(f"t{n}") for n in range(3)))
            await until(lambda: handler.running == 3)
            await until(lambda: server.calls("LeaseTasks")[-1].max_tasks == 1)
            handler.release.set()


async def test_tasks_that_were_not_asked_for_wait_for_a_slot() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler(holds=True)
        server.answer("LeaseTasks", pb.LeaseTasksResponse(tasks=[a_task(f"t{n}") for n in range(5)]))
        async with a_worker(client, handler, max_concurrent_tasks=2) as worker:
            await until(lambda: handler.running == 2)
            assert (worker.active_tasks, worker.queued_tasks, worker.available_task_slots) == (2, 3, -3)
            handler.release.set()
            await until(lambda: len(server.outcomes) == 5)
        assert handler.most_running == 2


# Outcomes


@pytest.mark.parametrize(
    ("returned", "result"),
    [
        (Success({"n": 1}), {"n": 1}),
        (Success(None), None),
        ("plain", "plain"),
        (None, None),
        (0, 0),
        (b"raw", b"raw"),
    ],
    ids=repr,
)
async def test_a_value_is_a_success(returned: Any, result: Any) -> None:
    assert result_of(await run_one(Handler(returned))) == result


async def test_a_failure_keeps_its_code_and_data() -> None:
    report = await run_one(Handler(Failure("VALIDATION", {"field": "to"})))
    assert (report.failure.code, error_of(report)) == ("VALIDATION", {"field": "to"})


async def test_a_handler_may_end_its_job_as_cancelled() -> None:
    assert (await run_one(Handler(Cancelled()))).WhichOneof("outcome") == "cancelled"


async def test_the_report_names_task_shard_and_tenant() -> None:
    report = await run_one(Handler(), a_task("t", tenant_id="acme"))
    assert (report.task_id, report.shard, report.tenant_id) == ("t", SHARD, "acme")
    report = await run_one(Handler())
    assert not report.HasField("tenant_id")


async def test_an_exception_is_a_failure_that_tells_what_happened() -> None:
    class Oops(Exception):
        code = "E42"

    async def handler(ctx: Context) -> None:
        raise Oops("it broke")

    report = await run_one(handler)
    data = error_of(report)
    assert report.failure.code == "HANDLER_ERROR"
    assert (data["name"], data["message"], data["code"]) == ("Oops", "it broke", "E42")
    assert "test_worker.py" in data["stack"]


async def test_a_cancellation_raised_by_the_handler_is_an_exception_like_any_other() -> None:
    async def handler(ctx: Context) -> None:
        raise asyncio.CancelledError("mine")

    assert error_of(await run_one(handler))["name"] == "CancelledError"


class _Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class _Codeless(Exception):
    @property
    def code(self) -> str:
        raise ValueError("no code")


@pytest.mark.parametrize(
    "error",
    [_Unspeakable(), ValueError("\ud800 half a sign"), _Codeless()],
    ids=["text", "sign", "code"],
)
async def test_an_exception_that_cannot_be_read_properly_is_still_reported(error: Exception) -> None:
    async def handler(ctx: Context) -> None:
        raise error

    assert error_of(await run_one(handler))["name"] == type(error).__name__


@pytest.mark.parametrize(
    "returned",
    [object(), Success({1, 2}), Failure("X", object()), Failure(5), 2**64],  # type: ignore[arg-type]
    ids=["value", "result", "data", "code", "number"],
)
async def test_an_outcome_that_cannot_be_sent_is_a_failure(returned: Any) -> None:
    assert (await run_one(Handler(returned))).failure.code == "HANDLER_ERROR"


async def test_a_payload_that_cannot_be_read_fails_alone() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler()
        broken = a_task("broken", payload=pb.SerializedBytes(msgpack=b"\xc1"))
        server.deliver(broken, a_task("good"))
        async with a_worker(client, handler):
            await until(lambda: len(server.outcomes) == 2)
        assert server.outcomes["broken"].failure.code == "HANDLER_ERROR"
        assert result_of(server.outcomes["good"]) == "done"
        assert handler.ids == ["good"]


@dataclass
class Email:
    to: str
    retries: int = 0


async def test_a_payload_type_makes_payloads_into_objects() -> None:
    handler = Handler()
    await run_one(handler, a_task("t", payload={"to": "a@b"}), payload_type=Email)
    assert handler.contexts[0].task.payload == Email("a@b")


async def test_a_payload_that_does_not_fit_its_type_is_a_failure() -> None:
    handler = Handler()
    report = await run_one(handler, a_task("t", payload={"to": 5}), payload_type=Email)
    assert error_of(report)["name"] == "ValidationError"
    assert handler.contexts == []


async def test_the_context_has_everything_about_the_task() -> None:
    handler = Handler()
    task = a_task(
        "t",
        payload={"a": 1},
        metadata={"k": "v"},
        attempt_number=3,
        relative_attempt_number=2,
        is_last_attempt=True,
        priority=9,
        tenant_id="acme",
    )
    await run_one(handler, task)
    got = handler.contexts[0].task
    assert (got.id, got.job_id, got.payload, got.metadata) == ("t", "job-t", {"a": 1}, {"k": "v"})
    assert (got.attempt_number, got.relative_attempt_number, got.is_last_attempt) == (3, 2, True)
    assert (got.priority, got.task_group, got.tenant_id) == (9, GROUP, "acme")
    assert (got.shard, got.lease_ms) == (SHARD, 10_000)
    assert not handler.contexts[0].cancelled


# Reports that fail


async def test_a_report_that_is_refused_goes_to_on_error_and_frees_the_slot() -> None:
    async with fake_silo() as server, a_client(server) as client:
        errors = Errors()
        server.answer("ReportOutcome", Status(grpc.StatusCode.INTERNAL, "broken"))
        async with a_worker(client, Handler(), on_error=errors, max_concurrent_tasks=1):
            server.deliver(a_task("t1"), a_task("t2"))
            await until(lambda: "t2" in server.outcomes)
        assert errors.of(SiloClientError) == ["t1"]


@pytest.mark.parametrize(
    ("attempt", "is_lost"),
    [
        (pb.JobAttempt(task_id="t", status="ATTEMPT_STATUS_SUCCEEDED"), False),
        (pb.JobAttempt(task_id="t", status="ATTEMPT_STATUS_RUNNING"), True),
        (pb.JobAttempt(task_id="t", status="ATTEMPT_STATUS_FAILED", error_code="WORKER_CRASHED"), True),
        (pb.JobAttempt(task_id="other", status="ATTEMPT_STATUS_SUCCEEDED"), True),
    ],
)
async def test_a_report_whose_answer_was_lost_is_an_error_only_if_it_was_not_stored(
    attempt: pb.JobAttempt, is_lost: bool
) -> None:
    async with fake_silo() as server, a_client(server) as client:
        errors = Errors()
        server.answer("ReportOutcome", unavailable(), not_found("lease not found"))
        server.always("GetJob", pb.GetJobResponse(id="job-t", attempts=[attempt]))
        async with a_worker(client, Handler(), on_error=errors):
            server.deliver(a_task("t"))
            await until(lambda: bool(server.calls("GetJob")))
        assert errors.of(SiloClientError) == (["t"] if is_lost else [])


# Heartbeats and cancellation


async def test_heartbeats_are_sent_while_a_handler_runs_and_not_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler(holds=True)
        heartbeat = client.heartbeat
        beats: list[str] = []  # As they begin: on their way another call may overtake one.

        def beginning(worker_id: str, task_id: str, *given: Any) -> Any:
            beats.append(task_id)
            return heartbeat(worker_id, task_id, *given)

        monkeypatch.setattr(client, "heartbeat", beginning)
        async with a_worker(client, handler, heartbeat_interval_ms=10):
            server.deliver(a_task("t", tenant_id="acme"))
            await until(lambda: len(server.calls("Heartbeat")) >= 3)
            beat = server.calls("Heartbeat")[0]
            assert (beat.worker_id, beat.task_id, beat.shard, beat.tenant_id) == ("w", "t", SHARD, "acme")
            handler.release.set()
            await until(lambda: "t" in server.outcomes)
            begun = len(beats)
            await asyncio.sleep(0.1)  # Ten intervals, in which none begins.
            assert len(beats) == begun


async def test_a_task_that_ends_soon_sends_no_heartbeat() -> None:
    async with fake_silo() as server, a_client(server) as client:
        async with a_worker(client, Handler(), heartbeat_interval_ms=60_000):
            server.deliver(*(a_task(f"t{n}") for n in range(20)))
            await until(lambda: len(server.outcomes) == 20)
        assert server.calls("Heartbeat") == []


async def test_a_slow_heartbeat_does_not_delay_the_next() -> None:
    async def hang(request: Any) -> Any:
        await asyncio.Event().wait()

    async with fake_silo() as server, a_client(server) as client:
        handler = Handler(holds=True)
        server.answer("Heartbeat", hang)
        async with a_worker(client, handler, heartbeat_interval_ms=10):
            server.deliver(a_task("t"))
            await until(lambda: len(server.calls("Heartbeat")) >= 3)
            handler.release.set()


async def test_a_cancelled_job_reaches_its_handler_alone_and_ends_as_cancelled() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler(holds=True)
        async with a_worker(client, handler, heartbeat_interval_ms=10):
            server.deliver(a_task("t1"), a_task("t2"))
            await until(lambda: handler.running == 2)
            first, second = sorted(handler.contexts, key=lambda ctx: ctx.task.id)
            server.cancelled.add("t1")
            async with asyncio.timeout(10):
                await first.wait_cancelled()
            assert first.cancelled
            assert not second.cancelled
            handler.release.set()
            await until(lambda: len(server.outcomes) == 2)
        assert server.outcomes["t1"].WhichOneof("outcome") == "cancelled"
        assert server.outcomes["t2"].WhichOneof("outcome") == "success"


async def test_heartbeats_go_on_after_a_cancellation_until_the_handler_ends() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler(holds=True)
        async with a_worker(client, handler, heartbeat_interval_ms=10):
            server.cancelled.add("t")
            server.deliver(a_task("t"))
            await until(lambda: bool(handler.contexts) and handler.contexts[0].cancelled)
            before = len(server.calls("Heartbeat"))
            await until(lambda: len(server.calls("Heartbeat")) >= before + 3)
            handler.release.set()


async def test_a_handler_may_cancel_its_job() -> None:
    async def handler(ctx: Context) -> str:
        await ctx.cancel()
        assert ctx.cancelled
        await ctx.cancel()
        return "ignored"

    async with fake_silo() as server, a_client(server) as client, a_worker(client, handler):
        server.deliver(a_task("t", tenant_id="acme"))
        await until(lambda: "t" in server.outcomes)
        assert server.outcomes["t"].WhichOneof("outcome") == "cancelled"
        [cancel] = server.calls("CancelJob")
        assert (cancel.id, cancel.tenant) == ("job-t", "acme")


@pytest.mark.parametrize("raises", [False, True])
async def test_a_refused_cancel_ends_the_task_as_cancelled_all_the_same(raises: bool) -> None:
    async def handler(ctx: Context) -> None:
        await ctx.cancel()
        if raises:
            raise ValueError

    async with fake_silo() as server, a_client(server) as client, a_worker(client, handler):
        server.always("CancelJob", Status(grpc.StatusCode.FAILED_PRECONDITION, "terminal state"))
        server.deliver(a_task("t"))
        await until(lambda: "t" in server.outcomes)
        assert server.outcomes["t"].WhichOneof("outcome") == "cancelled"


# Leases


@pytest.mark.spec("W-ERR-4", "W-ERR-5")
@pytest.mark.parametrize("status", LEASE_LOST, ids=lambda status: status.text)
async def test_a_lost_lease_stops_everything_about_the_task(status: Status) -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler, errors = Handler(holds=True), Errors()
        server.always("Heartbeat", status)
        async with a_worker(client, handler, heartbeat_interval_ms=10, on_error=errors) as worker:
            server.deliver(a_task("t"))
            await until(lambda: bool(errors.seen))
            assert handler.contexts[0].cancelled
            assert worker.active_tasks == 1, "the handler keeps its slot"
            beats = len(server.calls("Heartbeat"))
            polls = len(server.calls("LeaseTasks"))
            await until(lambda: len(server.calls("LeaseTasks")) > polls + 1)
            assert len(server.calls("Heartbeat")) == beats
            handler.release.set()
            await until(lambda: worker.active_tasks == 0)
        assert server.outcomes == {}
        [(error, task_id)] = errors.seen
        assert isinstance(error, TaskLeaseLostError)
        assert (error.task_id, error.job_id, task_id) == ("t", "job-t", "t")
        assert isinstance(error.__cause__, SiloClientError)


@pytest.mark.spec("W-ERR-16")
@pytest.mark.parametrize("status", HARMLESS, ids=lambda status: status.text)
async def test_other_refusals_of_a_heartbeat_are_told_and_the_task_goes_on(status: Status) -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler, errors = Handler(holds=True), Errors()
        server.always("Heartbeat", status)
        async with a_worker(client, handler, heartbeat_interval_ms=10, on_error=errors):
            server.deliver(a_task("t"))
            await until(lambda: len(errors.seen) >= 2)
            handler.release.set()
            await until(lambda: "t" in server.outcomes)
        assert not errors.of(TaskLeaseLostError)
        assert result_of(server.outcomes["t"]) == "done"
        assert not handler.contexts[0].cancelled


async def test_a_task_whose_lease_is_lost_while_it_waits_is_never_run() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler, errors = Handler(holds=True), Errors()

        async def beat(request: Any) -> Any:
            return LEASE_LOST[0] if request.task_id == "waits" else pb.HeartbeatResponse()

        server.always("Heartbeat", beat)
        server.answer("LeaseTasks", pb.LeaseTasksResponse(tasks=[a_task("runs"), a_task("waits")]))
        options = {"max_concurrent_tasks": 1, "heartbeat_interval_ms": 10, "on_error": errors}
        async with a_worker(client, handler, **options) as worker:
            await until(lambda: errors.of(TaskLeaseLostError) == ["waits"])
            handler.release.set()
            await until(lambda: worker.available_task_slots == 1)
        assert handler.ids == ["runs"]
        assert list(server.outcomes) == ["runs"]


async def test_a_task_that_comes_again_after_its_lease_was_lost_is_run_again() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler, errors = Handler(holds=True), Errors()
        server.answer("Heartbeat", LEASE_LOST[0])
        async with a_worker(client, handler, heartbeat_interval_ms=10, on_error=errors):
            server.deliver(a_task("t"))
            await until(lambda: bool(errors.seen))
            server.deliver(a_task("t"))
            await until(lambda: handler.running == 2)
            handler.release.set()
            await until(lambda: "t" in server.outcomes)
        assert len(server.calls("ReportOutcome")) == 1, "only the second one counts"
        assert not errors.of(DuplicateTaskDeliveryError)


async def test_a_task_delivered_twice_runs_once() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler, errors = Handler(holds=True), Errors()
        async with a_worker(client, handler, on_error=errors) as worker:
            server.deliver(a_task("t"), a_task("t"))
            await until(lambda: bool(errors.seen))
            server.deliver(a_task("t"))
            await until(lambda: len(errors.seen) == 2)
            handler.release.set()
            await until(lambda: "t" in server.outcomes)
        assert errors.of(DuplicateTaskDeliveryError) == ["t", "t"]
        assert worker.metrics.duplicate_task_deliveries == 2
        assert handler.ids == ["t"]
        assert len(server.calls("ReportOutcome")) == 1


async def test_a_task_that_comes_again_after_its_end_is_run_again() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler()
        async with a_worker(client, handler) as worker:
            for count in (1, 2):
                server.deliver(a_task("t"))
                await until(lambda count=count: len(server.calls("ReportOutcome")) == count)
                await until(lambda: worker.active_tasks == 0)
        assert handler.ids == ["t", "t"]


# Polling


@pytest.mark.parametrize(
    "status",
    [Status(grpc.StatusCode.INTERNAL, "broken"), Status(grpc.StatusCode.UNAUTHENTICATED, "who")],
    ids=lambda status: status.text,
)
async def test_a_poll_that_fails_is_told_and_polling_goes_on(status: Status) -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler, errors = Handler(), Errors()
        server.answer("LeaseTasks", status, status)
        async with a_worker(client, handler, on_error=errors):
            server.deliver(a_task("t"))
            await until(lambda: "t" in server.outcomes)
        assert errors.of(SiloClientError) == [None, None]


async def test_a_poller_outlives_whatever_the_token_function_raises() -> None:
    raised = iter([OSError("no vault"), asyncio.CancelledError("stray"), ValueError("bad")])

    async def token() -> str:
        for error in raised:
            raise error
        return "token"

    async with fake_silo() as server, a_client(server, token=token) as client:
        handler, errors = Handler(), Errors()
        server.deliver(a_task("t"))
        async with a_worker(client, handler, on_error=errors):
            await until(lambda: "t" in server.outcomes)
        assert errors.seen


async def test_a_poller_outlives_a_closed_client() -> None:
    async with fake_silo() as server, a_client(server) as client:
        errors = Errors()
        async with a_worker(client, Handler(), on_error=errors) as worker:
            await until(lambda: server.in_flight == 1)
            await client.close()
            await until(lambda: len(errors.seen) >= 2)
            assert worker.is_running


async def test_an_on_error_that_raises_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def on_error(error: BaseException, context: ErrorContext) -> None:
        raise RuntimeError("mine")

    async with fake_silo() as server, a_client(server) as client:
        server.answer("LeaseTasks", Status(grpc.StatusCode.INTERNAL, "broken"))
        async with a_worker(client, Handler(), on_error=on_error):
            server.deliver(a_task("t"))
            await until(lambda: "t" in server.outcomes)
    assert "on_error raised" in caplog.text


async def test_errors_are_logged_by_default(caplog: pytest.LogCaptureFixture) -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("LeaseTasks", Status(grpc.StatusCode.INTERNAL, "broken"))
        server.answer("ReportOutcome", Status(grpc.StatusCode.INTERNAL, "broken too"))
        async with a_worker(client, Handler()):
            server.deliver(a_task("t"))
            await until(lambda: "[SiloWorker] Error (task t): broken too" in caplog.text)
    assert "[SiloWorker] Error: broken" in caplog.text


async def test_polls_are_counted() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer(
            "LeaseTasks",
            Status(grpc.StatusCode.INTERNAL, "not counted"),
            pb.LeaseTasksResponse(),
            pb.LeaseTasksResponse(tasks=[a_task("t1"), a_task("t2")], refresh_tasks=[a_refresh_task()]),
        )
        async with a_worker(client, Handler(), on_error=Errors()) as worker:
            await until(lambda: worker.metrics.tasks_returned == 3)
            assert (worker.metrics.polls, worker.metrics.empty_polls) == (2, 1)


# Stopping


async def test_stop_waits_for_handlers_and_their_reports() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler(holds=True)
        worker = a_worker(client, handler, heartbeat_interval_ms=10)
        worker.start()
        server.deliver(a_task("t"))
        await until(lambda: handler.running == 1)
        stopping = asyncio.create_task(worker.stop())
        beats = len(server.calls("Heartbeat"))
        await until(lambda: len(server.calls("Heartbeat")) > beats + 1)
        assert not handler.contexts[0].cancelled
        assert not stopping.done()
        handler.release.set()
        await stopping
        assert result_of(server.outcomes["t"]) == "done"
        assert not worker.is_running


async def test_tasks_that_come_while_it_stops_are_run_and_reported() -> None:
    async with fake_silo() as server, a_client(server) as client:
        release = asyncio.Event()

        async def answer(request: Any) -> Any:
            await release.wait()
            return pb.LeaseTasksResponse(tasks=[a_task("late")])

        server.answer("LeaseTasks", answer)
        worker = a_worker(client, Handler())
        worker.start()
        await until(lambda: len(server.calls("LeaseTasks")) == 1)
        stopping = asyncio.create_task(worker.stop())
        await until(lambda: not worker.is_running)
        release.set()
        await stopping
        assert result_of(server.outcomes["late"]) == "done"
        assert len(server.calls("LeaseTasks")) == 1


async def test_stop_gives_up_after_its_timeout_and_the_handler_still_reports() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler(holds=True)
        worker = a_worker(client, handler, heartbeat_interval_ms=10)
        worker.start()
        server.deliver(a_task("t"))
        await until(lambda: handler.running == 1)
        await worker.stop(timeout=0.1)
        assert handler.running == 1
        beats = len(server.calls("Heartbeat"))
        handler.release.set()
        await until(lambda: "t" in server.outcomes)
        assert len(server.calls("Heartbeat")) == beats
        assert result_of(server.outcomes["t"]) == "done"


async def test_stop_drops_what_still_waits_for_a_slot_after_its_timeout() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler(holds=True)
        server.answer("LeaseTasks", pb.LeaseTasksResponse(tasks=[a_task("runs"), a_task("waits")]))
        worker = a_worker(client, handler, max_concurrent_tasks=1)
        worker.start()
        await until(lambda: worker.queued_tasks == 1)
        await worker.stop(timeout=0.05)
        handler.release.set()
        await until(lambda: worker.active_tasks == 0)
        assert handler.ids == ["runs"]
        assert list(server.outcomes) == ["runs"]


async def test_stop_does_not_wait_for_a_server_that_hangs_beyond_its_timeout() -> None:
    async def hang(request: Any) -> Any:
        await asyncio.Event().wait()

    async with fake_silo() as server, a_client(server) as client:
        server.always("LeaseTasks", hang)
        worker = a_worker(client, Handler())
        worker.start()
        await until(lambda: server.in_flight == 1)
        async with asyncio.timeout(10):
            await worker.stop(timeout=0.05)
        await until(lambda: server.in_flight == 0)


async def test_stop_does_not_wait_for_a_cluster_that_is_gone() -> None:
    async with fake_silo() as server, a_client(server, shard_routing=ShardRouting()) as client:
        worker = a_worker(client, Handler(), on_error=Errors())
        worker.start()
        await until(lambda: bool(server.calls("LeaseTasks")))
        await server.stop()
        async with asyncio.timeout(10):
            await worker.stop()


async def test_a_worker_can_be_stopped_twice_and_started_again() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler()
        worker = a_worker(client, handler)
        await worker.stop()
        for name in ("t1", "t2"):
            worker.start()
            worker.start()
            server.deliver(a_task(name))
            await until(lambda name=name: name in server.outcomes)
            await asyncio.gather(worker.stop(), worker.stop())
        assert handler.ids == ["t1", "t2"]


async def test_a_worker_that_still_stops_cannot_be_started() -> None:
    async with fake_silo() as server, a_client(server) as client:
        worker = a_worker(client, Handler())
        worker.start()
        await until(lambda: server.in_flight == 1)
        stopping = asyncio.create_task(worker.stop())
        await until(lambda: not worker.is_running)
        with pytest.raises(RuntimeError, match="still stopping"):
            worker.start()
        await stopping


async def test_a_handler_may_stop_its_own_worker() -> None:
    async with fake_silo() as server, a_client(server) as client:
        worker: SiloWorker[Any, Any, Any]

        async def handler(ctx: Context) -> str:
            await worker.stop()
            return "stopped"

        worker = a_worker(client, handler)
        worker.start()
        server.deliver(a_task("t"))
        await until(lambda: "t" in server.outcomes)
        assert not worker.is_running


async def test_a_stop_that_is_cancelled_leaves_no_polling_behind() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler(holds=True)
        worker = a_worker(client, handler)
        worker.start()
        server.deliver(a_task("t"))
        await until(lambda: handler.running == 1)
        stopping = asyncio.create_task(worker.stop())
        await until(lambda: not worker.is_running)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert not {"poll w", "heartbeats w"} & names
        handler.release.set()
        await until(lambda: "t" in server.outcomes)


async def test_a_run_that_is_cancelled_cancels_its_handlers() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler(holds=True)
        worker = a_worker(client, handler)
        running = asyncio.create_task(worker.run())
        server.deliver(a_task("t"))
        await until(lambda: handler.running == 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert (handler.running, worker.is_running, server.outcomes) == (0, False, {})


# A process of its own

_PROGRAM = """
import asyncio, sys
from silo import SiloGRPCClient, SiloWorker

async def main():
    async def handler(ctx):
        print("started", flush=True)
        while worker.is_running:
            await asyncio.sleep(0.005)
        print("draining", flush=True)
        await asyncio.sleep(float(sys.argv[2]))
        return "drained"

    async with SiloGRPCClient(sys.argv[1]) as client:
        worker = SiloWorker(client=client, worker_id="w", task_group="g", handler=handler)
        await worker.run()

asyncio.run(main())
print("ended", flush=True)
"""


@asynccontextmanager
async def draining(
    folder: Path, server: FakeSilo, *, number: signal.Signals, seconds: float
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker process that has got a signal while its handler runs, which takes `seconds` from then on."""
    path = folder / "program.py"
    path.write_text(_PROGRAM)
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(path), server.address, str(seconds), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            server.deliver(a_task("t"))
            assert await process.stdout.readline() == b"started\n"
            process.send_signal(number)
            assert await process.stdout.readline() == b"draining\n"
            yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_the_process(tmp_path: Path, number: signal.Signals) -> None:
    async with fake_silo() as server, draining(tmp_path, server, number=number, seconds=0.1) as process:
        rest, _ = await process.communicate()
        assert (rest, process.returncode) == (b"ended\n", 0)
        assert result_of(server.outcomes["t"]) == "drained"


async def test_a_second_signal_ends_the_process_without_waiting_for_handlers(tmp_path: Path) -> None:
    number = signal.SIGTERM
    async with fake_silo() as server, draining(tmp_path, server, number=number, seconds=3600) as process:
        process.send_signal(number)
        rest, _ = await process.communicate()
        assert (rest, process.returncode) == (b"ended\n", 0)
        assert server.outcomes == {}


# With a real server


async def test_jobs_of_all_tenants_and_shards_are_run_to_their_results() -> None:
    async def handler(ctx: Context) -> int:
        return int(ctx.task.payload) * 2

    async with real_silo(shards=4) as address, a_client(address) as client:
        async with a_worker(client, handler):
            handles = [await client.enqueue(payload=n, task_group=GROUP) for n in range(30)]
            results = [await handle.result(timeout=20) for handle in handles]
        assert [result.result for result in results] == [2 * n for n in range(30)]


async def test_a_failed_attempt_is_repeated_by_its_policy() -> None:
    async def handler(ctx: Context) -> Any:
        if ctx.task.is_last_attempt:
            return ctx.task.attempt_number
        return Failure("AGAIN", {"attempt": ctx.task.attempt_number})

    policy = RetryPolicy(retry_count=2, initial_interval_ms=1, max_interval_ms=1)
    async with real_silo() as address, a_client(address) as client, a_worker(client, handler):
        handle = await client.enqueue(payload=0, task_group=GROUP, retry_policy=policy)
        assert (await handle.result(timeout=20)).result == 3
        attempts = (await handle.job(include_attempts=True)).attempts or ()
        assert [(attempt.error_code, attempt.error_data) for attempt in attempts] == [
            ("AGAIN", {"attempt": 1}),
            ("AGAIN", {"attempt": 2}),
            (None, None),
        ]


async def test_cancelling_a_running_job_ends_it_as_cancelled_without_retries() -> None:
    started = asyncio.Event()

    async def handler(ctx: Context) -> None:
        started.set()
        await ctx.wait_cancelled()
        raise RuntimeError("stopped half-way")

    policy = RetryPolicy(retry_count=5, initial_interval_ms=1)
    async with (
        real_silo() as address,
        a_client(address) as client,
        a_worker(client, handler, heartbeat_interval_ms=20),
    ):
        handle = await client.enqueue(payload=0, task_group=GROUP, retry_policy=policy)
        await started.wait()
        await handle.cancel()
        assert (await handle.result(timeout=20)).status == "Cancelled"
        assert len((await handle.job(include_attempts=True)).attempts or ()) == 1


async def test_task_groups_do_not_see_each_other() -> None:
    mine, theirs = Handler("mine"), Handler("theirs")
    async with (
        real_silo() as address,
        a_client(address) as client,
        a_worker(client, mine, worker_id="w1", task_group="g1"),
        a_worker(client, theirs, worker_id="w2", task_group="g2"),
    ):
        first = await client.enqueue(payload=1, task_group="g1")
        second = await client.enqueue(payload=2, task_group="g2")
        assert (await first.result(timeout=20)).result == "mine"
        assert (await second.result(timeout=20)).result == "theirs"
    assert (len(mine.ids), len(theirs.ids)) == (1, 1)


async def test_an_idle_worker_is_woken_by_work_not_by_its_poll_interval() -> None:
    async with (
        real_silo(extension=False) as address,
        a_client(address) as client,
        a_worker(client, Handler(), poll_interval_ms=3_600_000) as worker,
    ):
        await until(lambda: worker.metrics.empty_polls >= 1)
        handle = await client.enqueue(payload=1, task_group=GROUP)
        assert (await handle.result(timeout=20)).status == "Succeeded"


async def test_a_worker_rides_through_a_restart_of_its_only_server() -> None:
    handler = Handler()
    async with real_silo() as address:
        client = a_client(address)
        worker = a_worker(client, handler, on_error=Errors())
        worker.start()
        await client.enqueue(payload=1, task_group=GROUP)
        await until(lambda: len(handler.ids) == 1)
    async with real_silo(address), client:
        handle = await client.enqueue(payload=2, task_group=GROUP)
        assert (await handle.result(timeout=20)).status == "Succeeded"
        await worker.stop()
