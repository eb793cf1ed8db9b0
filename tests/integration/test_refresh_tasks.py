"""A worker refreshes floating limits beside its jobs, and nothing about the one disturbs the other."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from silo import DuplicateTaskDeliveryError, RefreshTaskContext, SiloClientError, TaskNotFoundError
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
    not_found,
    unavailable,
    wrong_shard,
)
from tests.integration.workers import Errors, Handler, a_worker

# What the reference worker says, name for name.
NO_HANDLER = (
    "Worker received {} floating limit refresh task(s) but no refreshHandler is configured. "
    "Configure a refreshHandler in SiloWorkerOptions to handle floating concurrency limits."
)
REFUSALS = [
    (not_found("lease not found"), "TaskNotFoundError"),
    (Status(grpc.StatusCode.FAILED_PRECONDITION, "lease owner mismatch"), "SiloFailedPreconditionError"),
    (wrong_shard(), "TaskNotFoundError"),
    (Status(grpc.StatusCode.INTERNAL, "broken"), "SiloGrpcError"),
]


async def refresh_one(
    refresh: Callable[[RefreshTaskContext], Awaitable[Any]], **fields: Any
) -> pb.ReportRefreshOutcomeRequest:
    """The outcome that a worker reports for one refresh task."""
    async with fake_silo() as server, a_client(server) as client:
        async with a_worker(client, Handler(), refresh_handler=refresh):
            server.deliver(a_refresh_task("r", **fields))
            await until(lambda: "r" in server.refresh_outcomes)
        return server.refresh_outcomes["r"]


# Outcomes


@pytest.mark.parametrize("maximum", [0, 7, 2**32 - 1])
async def test_what_the_handler_returns_is_the_new_maximum(maximum: int) -> None:
    report = await refresh_one(Handler(maximum))
    assert report.WhichOneof("outcome") == "success"
    assert report.success.new_max_concurrency == maximum


async def test_the_report_names_task_shard_and_tenant() -> None:
    report = await refresh_one(Handler(1), tenant_id="acme")
    assert (report.task_id, report.shard, report.tenant_id) == ("r", SHARD, "acme")
    assert not (await refresh_one(Handler(1))).HasField("tenant_id")


async def test_the_context_has_everything_about_the_limit() -> None:
    handler = Handler(1)
    await refresh_one(handler, metadata={"k": "v"}, last_refreshed_at_ms=9, tenant_id="acme")
    [context] = handler.contexts
    task = context.task
    assert (context.shard, context.worker_id) == (SHARD, "w")
    assert (task.id, task.queue_key, task.current_max_concurrency) == ("r", "q", 5)
    assert (task.last_refreshed_at_ms, task.metadata, task.tenant) == (9, {"k": "v"}, "acme")
    assert (task.shard, task.task_group, task.lease_ms) == (SHARD, GROUP, 10_000)


class _Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no answer"), "no answer"),
        (ValueError(), ""),
        (asyncio.CancelledError("mine"), "mine"),
        (ValueError("\ud800 half a sign"), r"\ud800 half a sign"),
        (_Unspeakable(), "<the text of the exception raised an exception>"),
    ],
    ids=["text", "none", "cancelled", "sign", "unspeakable"],
)
async def test_an_exception_is_a_failure_with_its_text(error: BaseException, message: str) -> None:
    async def refresh(ctx: RefreshTaskContext) -> int:
        raise error

    report = await refresh_one(refresh)
    assert report.WhichOneof("outcome") == "failure"
    assert report.failure == pb.RefreshFailure(code="REFRESH_HANDLER_ERROR", message=message)


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (-1, "not -1"),
        (2**32, "not 4294967296"),
        (10**5000, "not a number that large"),
        (1.5, "not a float"),
        (None, "not a NoneType"),
        (True, "not a bool"),
        ("7", "not a str"),
    ],
    ids=["negative", "large", "huge", "fraction", "nothing", "bool", "text"],
)
async def test_what_cannot_be_a_maximum_is_a_failure_that_says_so(returned: Any, what: str) -> None:
    failure = (await refresh_one(Handler(returned))).failure
    assert failure.code == "REFRESH_HANDLER_ERROR"
    assert failure.message == f"the new max_concurrency must be an int from 0 to 4294967295, {what}"


# Beside job tasks


async def test_without_a_handler_it_is_told_and_jobs_go_on() -> None:
    async with fake_silo() as server, a_client(server) as client:
        errors = Errors()
        server.deliver(a_task("t1"), a_refresh_task("r1"), a_refresh_task("r2"))
        async with a_worker(client, Handler(), on_error=errors):
            await until(lambda: "t1" in server.outcomes and bool(errors.seen))
            server.deliver(a_task("t2"))
            await until(lambda: "t2" in server.outcomes)
        [(error, task_id)] = errors.seen
        assert (str(error), task_id) == (NO_HANDLER.format(2), None)
        assert isinstance(error, SiloClientError)
        assert server.calls("ReportRefreshOutcome") == server.calls("Heartbeat") == []


async def test_without_a_handler_a_poll_that_brings_only_refresh_tasks_is_followed_by_a_pause() -> None:
    async with fake_silo() as server, a_client(server) as client:
        errors = Errors()
        server.deliver(a_refresh_task("r1"))
        async with a_worker(client, Handler(), on_error=errors, poll_interval_ms=3_600_000):
            await until(lambda: bool(errors.seen))
            server.deliver(a_refresh_task("r2"))
        assert len(server.calls("LeaseTasks")) == 1
        assert len(errors.seen) == 1


async def test_refresh_tasks_that_come_while_it_stops_without_a_handler_are_not_worth_a_word() -> None:
    async with fake_silo() as server, a_client(server) as client:
        errors, release = Errors(), asyncio.Event()

        async def answer(request: Any) -> Any:
            await release.wait()
            return pb.LeaseTasksResponse(refresh_tasks=[a_refresh_task()])

        server.answer("LeaseTasks", answer)
        worker = a_worker(client, Handler(), on_error=errors)
        worker.start()
        await until(lambda: server.in_flight == 1)
        stopping = asyncio.create_task(worker.stop())
        await until(lambda: not worker.is_running)
        release.set()
        await stopping
        assert (worker.metrics.tasks_returned, errors.seen) == (1, [])


async def test_both_kinds_share_the_slots_in_the_order_of_their_delivery() -> None:
    order: list[str] = []
    release = asyncio.Event()

    async def run(ctx: Any) -> int:
        order.append(ctx.task.id)
        await release.wait()
        return 1

    async with fake_silo() as server, a_client(server) as client:
        server.answer(
            "LeaseTasks",
            pb.LeaseTasksResponse(
                tasks=[a_task("t1"), a_task("t2")], refresh_tasks=[a_refresh_task("r1"), a_refresh_task("r2")]
            ),
        )
        async with a_worker(client, run, refresh_handler=run, max_concurrent_tasks=1) as worker:
            await until(lambda: worker.active_tasks == 1)
            assert (worker.queued_tasks, worker.available_task_slots, order) == (3, -3, ["t1"])
            release.set()
            await until(lambda: len(server.refresh_outcomes) == 2)
        assert order == ["t1", "t2", "r1", "r2"]


async def test_a_running_refresh_is_subtracted_from_what_a_poll_asks_for() -> None:
    async with fake_silo() as server, a_client(server) as client:
        refresh = Handler(1, holds=True)
        async with a_worker(
            client, Handler(), refresh_handler=refresh, max_concurrent_tasks=3, tasks_per_poll=3
        ):
            server.deliver(a_refresh_task("r1"), a_refresh_task("r2"))
            await until(lambda: refresh.running == 2)
            await until(lambda: server.calls("LeaseTasks")[-1].max_tasks == 1)
            refresh.release.set()


async def test_a_refresh_that_fails_in_every_way_disturbs_no_other() -> None:
    async def refresh(ctx: RefreshTaskContext) -> Any:
        if ctx.task.id == "bad":
            raise ValueError("bad")
        return None if ctx.task.id == "none" else 3

    async with fake_silo() as server, a_client(server) as client:
        server.deliver(*(a_refresh_task(id) for id in ("bad", "none", "good")), a_task("t"))
        async with a_worker(client, Handler(), refresh_handler=refresh):
            await until(lambda: len(server.refresh_outcomes) == 3 and len(server.outcomes) == 1)
        assert server.refresh_outcomes["good"].success.new_max_concurrency == 3


# Heartbeats


async def test_heartbeats_are_sent_while_it_is_refreshed_and_not_while_it_is_reported() -> None:
    async with fake_silo() as server, a_client(server) as client:
        refresh, release = Handler(1, holds=True), asyncio.Event()

        async def slow(request: Any) -> Any:
            await release.wait()
            return pb.ReportRefreshOutcomeResponse()

        server.always("ReportRefreshOutcome", slow)
        async with a_worker(client, Handler(), refresh_handler=refresh, heartbeat_interval_ms=10):
            server.deliver(a_refresh_task("r", tenant_id="acme"))
            await until(lambda: len(server.calls("Heartbeat")) >= 3)
            beat = server.calls("Heartbeat")[0]
            assert (beat.worker_id, beat.task_id, beat.shard, beat.tenant_id) == ("w", "r", SHARD, "acme")
            refresh.release.set()
            await until(lambda: bool(server.calls("ReportRefreshOutcome")))
            beats, polls = len(server.calls("Heartbeat")), len(server.calls("LeaseTasks"))
            await until(lambda: len(server.calls("LeaseTasks")) > polls + 1)
            assert len(server.calls("Heartbeat")) == beats
            release.set()


async def test_a_refresh_that_waits_for_a_slot_has_heartbeats() -> None:
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler(holds=True)
        server.answer(
            "LeaseTasks", pb.LeaseTasksResponse(tasks=[a_task("t")], refresh_tasks=[a_refresh_task("waits")])
        )
        options = {"max_concurrent_tasks": 1, "heartbeat_interval_ms": 10}
        async with a_worker(client, handler, refresh_handler=Handler(1), **options):
            await until(lambda: any(beat.task_id == "waits" for beat in server.calls("Heartbeat")))
            assert "waits" not in server.refresh_outcomes
            handler.release.set()
            await until(lambda: "waits" in server.refresh_outcomes)


async def test_heartbeats_go_on_while_stop_waits_for_a_refresh() -> None:
    async with fake_silo() as server, a_client(server) as client:
        refresh = Handler(1, holds=True)
        worker = a_worker(client, Handler(), refresh_handler=refresh, heartbeat_interval_ms=10)
        worker.start()
        server.deliver(a_refresh_task())
        await until(lambda: refresh.running == 1)
        stopping = asyncio.create_task(worker.stop())
        beats = len(server.calls("Heartbeat"))
        await until(lambda: len(server.calls("Heartbeat")) > beats + 1)
        refresh.release.set()
        await stopping
        assert "r" in server.refresh_outcomes


@pytest.mark.parametrize(("status", "kind"), REFUSALS, ids=lambda value: getattr(value, "text", ""))
async def test_every_refusal_of_a_heartbeat_is_told_as_it_is_and_the_refresh_goes_on(
    status: Status, kind: str
) -> None:
    async with fake_silo() as server, a_client(server) as client:
        refresh, errors = Handler(4, holds=True), Errors()
        server.always("Heartbeat", status)
        options = {"heartbeat_interval_ms": 10, "on_error": errors}
        async with a_worker(client, Handler(), refresh_handler=refresh, **options):
            server.deliver(a_refresh_task("r"))
            await until(lambda: len(errors.seen) >= 2)
            assert not refresh.contexts[0].signal.aborted
            refresh.release.set()
            await until(lambda: "r" in server.refresh_outcomes)
        assert server.refresh_outcomes["r"].success.new_max_concurrency == 4
        assert {(type(error).__name__, task_id) for error, task_id in errors.seen} == {(kind, "r")}


async def test_a_refresh_whose_lease_is_lost_ends_in_a_report_that_is_refused() -> None:
    async with fake_silo() as server, a_client(server) as client:
        refresh, errors = Handler(4, holds=True), Errors()
        lost = not_found("lease not found")
        server.always("Heartbeat", lost)
        server.always("ReportRefreshOutcome", lost)
        options = {"heartbeat_interval_ms": 10, "on_error": errors}
        async with a_worker(client, Handler(), refresh_handler=refresh, **options) as worker:
            server.deliver(a_refresh_task("r"))
            await until(lambda: len(errors.seen) >= 2)
            refresh.release.set()
            await until(lambda: worker.active_tasks == 0)
        assert len(server.calls("ReportRefreshOutcome")) == 1
        assert len(errors.of(TaskNotFoundError)) == len(errors.seen) >= 3


async def test_an_error_of_a_heartbeat_after_the_end_of_the_handler_is_still_told() -> None:
    async with fake_silo() as server, a_client(server) as client:
        refresh, errors = Handler(4, holds=True), Errors()
        beat, report = asyncio.Event(), asyncio.Event()

        async def late(request: Any) -> Any:
            await beat.wait()
            return not_found("lease not found")

        async def slow(request: Any) -> Any:
            await report.wait()
            return pb.ReportRefreshOutcomeResponse()

        server.always("Heartbeat", late)
        server.always("ReportRefreshOutcome", slow)
        options = {"heartbeat_interval_ms": 10, "on_error": errors}
        async with a_worker(client, Handler(), refresh_handler=refresh, **options):
            server.deliver(a_refresh_task("r"))
            await until(lambda: bool(server.calls("Heartbeat")))
            refresh.release.set()
            await until(lambda: bool(server.calls("ReportRefreshOutcome")))
            beat.set()
            await until(lambda: bool(errors.seen))
            report.set()
        assert set(errors.of(TaskNotFoundError)) == {"r"}


async def test_a_heartbeat_that_says_cancelled_changes_nothing() -> None:
    async with fake_silo() as server, a_client(server) as client:
        refresh = Handler(4, holds=True)
        server.cancelled.add("r")
        async with a_worker(client, Handler(), refresh_handler=refresh, heartbeat_interval_ms=10):
            server.deliver(a_refresh_task("r"))
            await until(lambda: len(server.calls("Heartbeat")) >= 3)
            assert not refresh.contexts[0].signal.aborted
            refresh.release.set()
            await until(lambda: "r" in server.refresh_outcomes)
        assert server.refresh_outcomes["r"].success.new_max_concurrency == 4


# Reports that fail


async def test_a_report_that_is_refused_goes_to_on_error_and_frees_the_slot() -> None:
    async with fake_silo() as server, a_client(server) as client:
        errors = Errors()
        server.answer("ReportRefreshOutcome", Status(grpc.StatusCode.INTERNAL, "broken"))
        options = {"max_concurrent_tasks": 1, "on_error": errors}
        async with a_worker(client, Handler(), refresh_handler=Handler(1), **options):
            server.deliver(a_refresh_task("r1"), a_refresh_task("r2"))
            await until(lambda: "r2" in server.refresh_outcomes)
        assert errors.of(SiloClientError) == ["r1"]


async def test_a_report_that_was_not_answered_is_repeated() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("ReportRefreshOutcome", unavailable(), wrong_shard())
        errors = Errors()
        async with a_worker(client, Handler(), refresh_handler=Handler(1), on_error=errors):
            server.deliver(a_refresh_task("r"))
            await until(lambda: "r" in server.refresh_outcomes)
        assert errors.seen == []


# Duplicates


async def test_a_refresh_task_delivered_twice_runs_once() -> None:
    async with fake_silo() as server, a_client(server) as client:
        refresh, errors = Handler(1, holds=True), Errors()
        async with a_worker(client, Handler(), refresh_handler=refresh, on_error=errors) as worker:
            server.deliver(a_refresh_task("r"), a_refresh_task("r"))
            await until(lambda: bool(errors.seen))
            refresh.release.set()
            await until(lambda: "r" in server.refresh_outcomes)
        [(error, task_id)] = errors.seen
        assert isinstance(error, DuplicateTaskDeliveryError)
        assert (error.task_id, error.job_id, task_id) == ("r", None, "r")
        assert worker.metrics.duplicate_task_deliveries == 1
        assert refresh.ids == ["r"]


async def test_a_refresh_task_that_comes_again_while_it_is_reported_is_run_again() -> None:
    async with fake_silo() as server, a_client(server) as client:
        refresh, errors, release = Handler(1), Errors(), asyncio.Event()

        async def slow(request: Any) -> Any:
            await release.wait()
            return pb.ReportRefreshOutcomeResponse()

        server.answer("ReportRefreshOutcome", slow)
        async with a_worker(client, Handler(), refresh_handler=refresh, on_error=errors) as worker:
            server.deliver(a_refresh_task("r"))
            await until(lambda: bool(server.calls("ReportRefreshOutcome")))
            server.deliver(a_refresh_task("r"))
            await until(lambda: refresh.ids == ["r", "r"])
            release.set()
            await until(lambda: worker.active_tasks == 0)
        assert (len(server.calls("ReportRefreshOutcome")), errors.seen) == (2, [])


# Stopping


async def test_stop_sets_the_signal_of_refreshes_at_once_and_not_that_of_jobs() -> None:
    async def refresh(ctx: RefreshTaskContext) -> int:
        running.set()
        await ctx.signal.wait()
        return 8

    running = asyncio.Event()
    async with fake_silo() as server, a_client(server) as client:
        handler = Handler(holds=True)
        worker = a_worker(client, handler, refresh_handler=refresh)
        worker.start()
        server.deliver(a_task("t"), a_refresh_task("r"))
        await until(lambda: running.is_set() and handler.running == 1)
        stopping = asyncio.create_task(worker.stop())
        await until(lambda: "r" in server.refresh_outcomes)
        assert not stopping.done()
        assert not handler.contexts[0].cancelled
        handler.release.set()
        await stopping
        assert server.refresh_outcomes["r"].success.new_max_concurrency == 8
        assert server.outcomes["t"].WhichOneof("outcome") == "success"


async def test_a_refresh_task_that_comes_while_it_stops_is_run_with_its_signal_set() -> None:
    async with fake_silo() as server, a_client(server) as client:
        refresh, release = Handler(2), asyncio.Event()

        async def answer(request: Any) -> Any:
            await release.wait()
            return pb.LeaseTasksResponse(refresh_tasks=[a_refresh_task("late")])

        server.answer("LeaseTasks", answer)
        worker = a_worker(client, Handler(), refresh_handler=refresh)
        worker.start()
        await until(lambda: server.in_flight == 1)
        stopping = asyncio.create_task(worker.stop())
        await until(lambda: not worker.is_running)
        release.set()
        await stopping
        assert refresh.contexts[0].signal.aborted
        assert server.refresh_outcomes["late"].success.new_max_concurrency == 2


async def test_a_worker_started_again_has_a_fresh_signal() -> None:
    async with fake_silo() as server, a_client(server) as client:
        refresh = Handler(1)
        worker = a_worker(client, Handler(), refresh_handler=refresh)
        was_set: list[bool] = []
        for id in ("r1", "r2"):
            async with worker:
                server.deliver(a_refresh_task(id))
                await until(lambda id=id: id in server.refresh_outcomes)
                was_set.append(refresh.contexts[-1].signal.aborted)
        assert was_set == [False, False]
        assert refresh.contexts[0].signal.aborted


async def test_a_refresh_that_outlasts_stop_is_still_reported() -> None:
    async with fake_silo() as server, a_client(server) as client:
        refresh = Handler(6, holds=True)
        worker = a_worker(client, Handler(), refresh_handler=refresh, heartbeat_interval_ms=10)
        worker.start()
        server.deliver(a_refresh_task("r"))
        await until(lambda: refresh.running == 1)
        await worker.stop(timeout=0.05)
        beats = len(server.calls("Heartbeat"))
        refresh.release.set()
        await until(lambda: "r" in server.refresh_outcomes)
        assert len(server.calls("Heartbeat")) == beats


async def test_a_run_that_is_cancelled_cancels_its_refreshes() -> None:
    async with fake_silo() as server, a_client(server) as client:
        refresh = Handler(1, holds=True)
        worker = a_worker(client, Handler(), refresh_handler=refresh)
        running = asyncio.create_task(worker.run())
        server.deliver(a_refresh_task())
        await until(lambda: refresh.running == 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert (refresh.running, worker.is_running, server.refresh_outcomes) == (0, False, {})
        assert refresh.contexts[0].signal.aborted
