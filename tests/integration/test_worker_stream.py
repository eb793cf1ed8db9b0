"""The worker's side of a stream: what it asks for, what it does with what it is told, and how it comes back.

The server is scripted, so that it does what a real one does only at bad moments.
"""

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from silo import (
    ClientClosed,
    DuplicateTaskDeliveryError,
    Failure,
    Retry,
    SiloClientError,
    SiloUnauthenticatedError,
    SiloWorker,
    Success,
    TaskLeaseLostError,
    TaskNotFoundError,
)
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2 as v1
from silo.worker import reports, slots
from silo.worker.slots import Slots
from tests.builders import until
from tests.integration.fake_ext import FakeExt, FakeWorkStream, fake_ext
from tests.integration.fake_silo import (
    SHARD,
    Status,
    a_client,
    a_refresh_task,
    a_task,
    nobody,
    value,
)
from tests.integration.workers import Context, Errors, Handler, a_worker

OTHER_SHARD = "22222222-2222-4222-8222-222222222222"
GONE = pb.Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="lease not found")
AWAY = pb.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="shard closed")
ELSEWHERE = pb.Status(code=grpc.StatusCode.NOT_FOUND.value[0], message="shard not found")
BROKEN = pb.Status(code=grpc.StatusCode.INTERNAL.value[0], message="broken")
UNAUTHENTICATED = Status(grpc.StatusCode.UNAUTHENTICATED, "unauthenticated")


async def reported(stream: FakeWorkStream, *task_ids: str) -> dict[str, str]:
    """How these tasks ended, once the server knows."""
    await until(lambda: stream.reports().keys() >= set(task_ids))
    return {task_id: outcome for task_id, outcome in stream.reports().items() if task_id in task_ids}


async def acknowledged(stream: FakeWorkStream, *task_ids: str) -> None:
    """Wait for reports of these tasks, and acknowledge them."""
    await reported(stream, *task_ids)
    await stream.acknowledge(*task_ids)


def report_of(stream: FakeWorkStream, task_id: str) -> pb.Report:
    [report] = [r for request in stream.requests for r in request.reports if r.task_id == task_id]
    return report


def times_reported(ext: FakeExt, task_id: str) -> int:
    every = [r for stream in ext.work for request in stream.requests for r in request.reports]
    return sum(report.task_id == task_id for report in every)


# Saying hello


async def test_a_worker_says_who_it_is_and_what_it_takes() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        async with a_worker(
            client, Handler(), worker_id="me", task_group=["a", "b", "a"], max_concurrent_tasks=3
        ):
            hello = (await ext.worker_stream()).hello
        assert (hello.worker_id, list(hello.task_groups), hello.slots) == ("me", ["a", "b"], 3)
        assert not hello.held
        assert not ext.silo.calls("LeaseTasks")


async def test_a_session_is_of_one_start() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        worker = a_worker(client, Handler())
        for number in (1, 2):
            worker.start()
            await ext.worker_stream(number)
            await worker.stop()
        first, second = ext.work
        assert first.hello.session != second.hello.session


async def test_a_worker_has_a_stream_to_every_server_and_reports_where_a_task_came_from() -> None:
    async with fake_ext() as here, fake_ext() as there, a_client(here.address) as client:
        here.silo.shards = [(SHARD, "", "8", None), (OTHER_SHARD, "8", "", there.address)]
        async with a_worker(client, Handler(), max_concurrent_tasks=4):
            first, second = await here.worker_stream(), await there.worker_stream()
            assert (first.window, second.window) == (2, 2)
            await second.deliver(a_task("far", shard=OTHER_SHARD))
            await first.deliver(a_task("near"))
            await acknowledged(first, "near")
            await acknowledged(second, "far")
        assert first.reports().keys() == {"near"}
        assert second.reports().keys() == {"far"}


async def test_a_worker_that_comes_back_names_only_what_a_server_has_the_shard_of() -> None:
    async with fake_ext() as here, fake_ext() as there, a_client(here.address) as client:
        here.silo.shards = there.silo.shards = [
            (SHARD, "", "8", here.address),
            (OTHER_SHARD, "8", "", there.address),
        ]
        handler = Handler(holds=True)
        async with a_worker(client, handler):
            first, second = await here.worker_stream(), await there.worker_stream()
            await first.deliver(a_task("near"))
            await second.deliver(a_task("far", shard=OTHER_SHARD))
            await until(lambda: handler.running == 2)
            first.end()
            again = await here.worker_stream(2)
            assert again.held == {"near"}
            handler.release.set()
            await acknowledged(again, "near")
            await acknowledged(second, "far")


# The window


async def test_nothing_is_asked_for_ahead_before_a_first_job_has_ended() -> None:
    async with (
        fake_ext() as ext,
        a_client(ext.address) as client,
        a_worker(client, Handler(holds=True), max_concurrent_tasks=3) as worker,
    ):
        stream = await ext.worker_stream()
        await stream.deliver(a_task("t1"), a_task("t2"))
        await until(lambda: worker.active_tasks == 2)
        assert {request.window for request in stream.requests} == {3}
        await worker.stop(timeout=0)


async def test_quick_handlers_have_tasks_ahead() -> None:
    async with (
        fake_ext() as ext,
        a_client(ext.address) as client,
        a_worker(client, Handler(), max_concurrent_tasks=2),
    ):
        stream = await ext.worker_stream()
        await stream.deliver(a_task("t"))
        await acknowledged(stream, "t")
        await until(lambda: stream.window > 2)


async def test_tasks_ahead_begin_as_slots_come_free() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler = Handler()
        async with a_worker(client, handler, max_concurrent_tasks=2):
            stream = await ext.worker_stream()
            names = [f"t{number}" for number in range(100)]
            await stream.deliver(*map(a_task, names))
            await acknowledged(stream, *names)
        assert handler.ids == names
        assert handler.most_running <= 2


async def test_a_worker_that_stops_asks_for_nothing() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler = Handler(holds=True)
        worker = a_worker(client, handler)
        worker.start()
        stream = await ext.worker_stream()
        await stream.deliver(a_task("t"))
        await until(lambda: handler.running == 1)
        stopping = asyncio.create_task(worker.stop())
        await until(lambda: stream.window == 0)
        handler.release.set()
        await acknowledged(stream, "t")
        await stopping


class Clock(SimpleNamespace):
    """Stands for the module `time`."""

    def __init__(self) -> None:
        super().__init__(now=100.0)
        self.monotonic = self.perf_counter = lambda: self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(slots, "time", clock)
    return clock


async def ran(clock: Clock, own: Slots, held: Any, *, took_s: float) -> None:
    """Run a task that takes so long."""
    own.add(held)
    await asyncio.sleep(0)
    clock.now += took_s
    held.end.set()
    await until(lambda: own.running == 0)


def a_held() -> Any:
    return SimpleNamespace(id="t", is_lost=False, is_started=False, waits_since=0.0, end=asyncio.Event())


def a_slots(limit: int) -> Slots:
    async def run(held: Any) -> None:
        await held.end.wait()

    return Slots(limit, run=run, skipped=lambda held: None, changed=lambda: None)


async def test_there_is_more_ahead_the_quicker_tasks_are_and_nothing_for_those_that_take_seconds(
    clock: Clock,
) -> None:
    ahead = {}
    for took_s in (0.0001, 0.001, 0.01, 1.0):
        own = a_slots(4)
        await ran(clock, own, a_held(), took_s=took_s)
        ahead[took_s] = own.ahead
    assert ahead[0.0001] > ahead[0.001] > ahead[0.01] > ahead[1.0] == 0


async def test_tasks_that_get_slower_bring_less_ahead(clock: Clock) -> None:
    own = a_slots(2)
    await ran(clock, own, a_held(), took_s=0.0001)
    before = own.ahead
    for _ in range(3):
        await ran(clock, own, a_held(), took_s=2.0)
    assert own.ahead == 0 < before


async def test_many_slots_that_all_take_long_soon_have_nothing_ahead_although_no_task_ends(
    clock: Clock,
) -> None:
    own = a_slots(100)
    await ran(clock, own, a_held(), took_s=0.001)
    for _ in range(100):
        own.add(a_held())
    for _ in range(4):
        own.add(a_held())
        clock.now += 1.0
        assert len(own.take_waiting(longer_than_s=1.0)) == 1
    assert own.ahead == 0


# Reports


async def test_every_outcome_is_reported_as_what_it_is() -> None:
    outcomes = {"s": 7, "f": Failure("BAD", [1]), "l": Failure("WORSE", None, is_final=True)}

    async def handler(ctx: Context) -> Any:
        if ctx.task.id == "r":
            raise Retry(after=1.5)
        return outcomes[ctx.task.id]

    async with fake_ext() as ext, a_client(ext.address) as client:
        async with a_worker(client, handler):
            stream = await ext.worker_stream()
            await stream.deliver(*(a_task(name, tenant_id="ada") for name in "sflr"))
            await acknowledged(stream, *"sflr")
        success, failure, last, later = (report_of(stream, name) for name in "sflr")
        assert (success.shard, success.tenant_id) == (SHARD, "ada")
        assert success.success == value(7)
        assert (failure.failure.code, failure.failure.data, failure.failure.is_final) == (
            "BAD",
            value([1]),
            False,
        )
        assert (last.failure.code, last.failure.is_final) == ("WORSE", True)
        assert later.postponed.delay_ms == 1500


async def test_reports_that_are_there_together_travel_together() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler = Handler(holds=True)
        async with a_worker(client, handler, max_concurrent_tasks=50):
            stream = await ext.worker_stream()
            names = [f"t{number}" for number in range(50)]
            await stream.deliver(*map(a_task, names))
            await until(lambda: handler.running == 50)
            handler.release.set()
            await acknowledged(stream, *names)
            assert sum(bool(request.reports) for request in stream.requests) <= 3


async def test_a_slot_is_free_before_its_report_is_acknowledged() -> None:
    async with (
        fake_ext() as ext,
        a_client(ext.address) as client,
        a_worker(client, Handler(), max_concurrent_tasks=1),
    ):
        stream = await ext.worker_stream()
        await stream.deliver(a_task("t1"))
        await reported(stream, "t1")
        await stream.deliver(a_task("t2"))
        await reported(stream, "t2")
        await stream.acknowledge("t1", "t2")


async def test_a_report_that_does_not_count_is_told() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        errors = Errors()
        async with a_worker(client, Handler(), on_error=errors):
            stream = await ext.worker_stream()
            await stream.deliver(a_task("t1"), a_task("t2"))
            await reported(stream, "t1", "t2")
            await stream.acknowledge("t1", error=GONE)
            await stream.acknowledge("t2", error=BROKEN)
            await until(lambda: len(errors.seen) == 2)
        assert errors.of(TaskNotFoundError) == ["t1"]
        assert errors.of(SiloClientError) == ["t1", "t2"]
        assert not ext.silo.calls("GetJob")


@pytest.mark.parametrize("error", [AWAY, ELSEWHERE], ids=["closed", "elsewhere"])
async def test_a_report_that_a_shard_could_not_take_is_sent_again_until_it_can(error: pb.Status) -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        errors = Errors()
        async with a_worker(client, Handler(), on_error=errors):
            stream = await ext.worker_stream()
            await stream.deliver(a_task("t"))
            for times in (1, 2, 3):
                await until(lambda times=times: times_reported(ext, "t") == times)
                await stream.acknowledge("t", error=error if times < 3 else None)
        assert errors.seen == []


async def test_a_report_for_a_shard_that_is_nowhere_is_given_up_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("silo.worker.streaming._ELSEWHERE_TIMES", 2)
    async with fake_ext() as ext, a_client(ext.address) as client:
        errors = Errors()
        async with a_worker(client, Handler(), on_error=errors):
            stream = await ext.worker_stream()
            await stream.deliver(a_task("t"))
            for times in (1, 2):
                await until(lambda times=times: times_reported(ext, "t") == times)
                await stream.acknowledge("t", error=ELSEWHERE)
            await until(lambda: bool(errors.seen))
        assert errors.of(TaskNotFoundError) == ["t"]


async def test_a_result_larger_than_a_message_is_a_failure_and_the_stream_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reports, "PAYLOAD_BYTES_MAX", 1000)
    results = {"large": "x" * 2000, "also": Failure("BAD", b"x" * 2000), "small": "x"}

    async def handler(ctx: Context) -> Any:
        return results[ctx.task.id]

    async with fake_ext() as ext, a_client(ext.address) as client:
        async with a_worker(client, handler):
            stream = await ext.worker_stream()
            await stream.deliver(*map(a_task, results))
            await acknowledged(stream, *results)
        assert stream.reports() == {"large": "failure", "also": "failure", "small": "success"}
        assert report_of(stream, "large").failure.code == "HANDLER_ERROR"
        assert len(ext.work) == 1


# Coming back


async def test_a_worker_comes_back_with_its_session_and_names_what_it_has() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler = Handler(holds=True)
        async with a_worker(client, handler, max_concurrent_tasks=1):
            stream = await ext.worker_stream()
            await stream.deliver(a_task("runs"), a_task("waits"))
            await until(lambda: handler.running == 1)
            stream.end()
            again = await ext.worker_stream(2)
            assert again.hello.session == stream.hello.session
            assert again.held == {"runs", "waits"}
            handler.release.set()
            await acknowledged(again, "runs", "waits")
        assert not any(ctx.cancelled for ctx in handler.contexts)


async def test_what_was_acknowledged_is_not_named_any_more() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client, a_worker(client, Handler()):
        stream = await ext.worker_stream()
        await stream.deliver(a_task("t1"))
        await acknowledged(stream, "t1")
        await stream.deliver(a_task("t2"))
        await reported(stream, "t2")
        stream.end()
        again = await ext.worker_stream(2)
        assert again.held == {"t2"}
        await acknowledged(again, "t2")


async def test_a_report_without_an_answer_goes_over_the_next_stream() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler, errors = Handler(), Errors()
        async with a_worker(client, handler, on_error=errors):
            stream = await ext.worker_stream()
            await stream.deliver(a_task("t"))
            await reported(stream, "t")
            stream.end()
            await acknowledged(await ext.worker_stream(2), "t")
        assert handler.ids == ["t"]
        assert errors.seen == []


async def test_a_handler_that_ends_while_there_is_no_stream_reports_over_the_next() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler = Handler(holds=True)
        async with a_worker(client, handler, on_error=Errors()) as worker:
            stream = await ext.worker_stream()
            await stream.deliver(a_task("t"))
            await until(lambda: handler.running == 1)
            ext.welcomes = False
            stream.end()
            again = await ext.worker_stream(2)
            handler.release.set()
            await until(lambda: worker.active_tasks == 0)
            assert not again.reports()
            await again.welcome()
            await acknowledged(again, "t")


ATTEMPTS = {
    "a success": (v1.JobAttempt(task_id="t", status="ATTEMPT_STATUS_SUCCEEDED"), False),
    "a lease that ran out": (
        v1.JobAttempt(task_id="t", status="ATTEMPT_STATUS_FAILED", error_code="WORKER_CRASHED"),
        True,
    ),
    "another's": (v1.JobAttempt(task_id="other", status="ATTEMPT_STATUS_SUCCEEDED"), True),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
async def test_a_report_that_is_refused_the_second_time_is_an_error_only_if_the_first_did_not_count(
    attempt: str,
) -> None:
    stored, is_lost = ATTEMPTS[attempt]
    async with fake_ext() as ext, a_client(ext.address) as client:
        errors = Errors()
        ext.silo.always("GetJob", v1.GetJobResponse(id="job-t", attempts=[stored]))
        async with a_worker(client, Handler(), on_error=errors):
            stream = await ext.worker_stream()
            await stream.deliver(a_task("t"))
            await reported(stream, "t")
            stream.end()
            again = await ext.worker_stream(2)
            await reported(again, "t")
            await again.acknowledge("t", error=GONE)
            await until(lambda: bool(ext.silo.calls("GetJob")))
        assert errors.of(TaskNotFoundError) == (["t"] if is_lost else [])


@pytest.mark.parametrize(
    ("attempts", "is_lost"),
    [([], False), ([ATTEMPTS["a lease that ran out"][0]], True)],
    ids=["none", "ran out"],
)
async def test_a_postponement_that_counted_left_no_attempt(
    attempts: list[v1.JobAttempt], is_lost: bool
) -> None:
    async def handler(ctx: Context) -> None:
        raise Retry

    async with fake_ext() as ext, a_client(ext.address) as client:
        errors = Errors()
        ext.silo.always("GetJob", v1.GetJobResponse(id="job-t", attempts=attempts))
        async with a_worker(client, handler, on_error=errors):
            stream = await ext.worker_stream()
            await stream.deliver(a_task("t"))
            await reported(stream, "t")
            stream.end()
            again = await ext.worker_stream(2)
            await reported(again, "t")
            await again.acknowledge("t", error=GONE)
            await until(lambda: bool(ext.silo.calls("GetJob")))
        assert errors.of(TaskNotFoundError) == (["t"] if is_lost else [])


async def test_a_refresh_that_is_refused_the_second_time_is_no_error() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        errors = Errors()
        async with a_worker(client, Handler(), refresh_handler=Handler(5), on_error=errors):
            stream = await ext.worker_stream()
            await stream.deliver(a_refresh_task("r"))
            await reported(stream, "r")
            stream.end()
            again = await ext.worker_stream(2)
            await reported(again, "r")
            await again.acknowledge("r", error=GONE)
            await again.deliver(a_refresh_task("r2"))
            await acknowledged(again, "r2")
        assert errors.seen == []


async def test_a_job_that_was_deleted_since_its_report_is_no_error() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        errors = Errors()
        ext.silo.always("GetJob", Status(grpc.StatusCode.NOT_FOUND, "job not found"))
        async with a_worker(client, Handler(), on_error=errors):
            stream = await ext.worker_stream()
            await stream.deliver(a_task("t"))
            await reported(stream, "t")
            stream.end()
            again = await ext.worker_stream(2)
            await reported(again, "t")
            await again.acknowledge("t", error=GONE)
            await until(lambda: bool(ext.silo.calls("GetJob")))
        assert errors.seen == []


async def test_the_token_of_each_stream_is_asked_for_when_it_is_opened() -> None:
    tokens = [f"token-{number}" for number in range(100)]

    async def token() -> str:
        return tokens.pop(0)

    async with fake_ext() as ext, a_client(ext.address, token=token) as client, a_worker(client, Handler()):
        (await ext.worker_stream()).end()
        await ext.worker_stream(2)
        first, second = (stream.metadata["authorization"] for stream in ext.work)
        assert first.startswith("Bearer token-")
        assert first != second


async def test_a_token_that_is_refused_is_told_once_until_it_works_again() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        errors = Errors()
        ext.refuses = UNAUTHENTICATED
        async with a_worker(client, Handler(), on_error=errors):
            await until(lambda: len(ext.work) == 5)
            assert len(errors.of(SiloUnauthenticatedError)) == 1
            ext.refuses = None
            await until(lambda: bool(ext.work[-1].requests))
        assert len(errors.seen) == 1


async def test_a_token_function_that_fails_is_told_once_and_asked_again() -> None:
    calls = 0

    async def token() -> str:
        nonlocal calls
        calls += 1
        if calls <= 8:
            raise RuntimeError("no token today")
        return "token"

    async with fake_ext() as ext, a_client(ext.address, token=token) as client:
        errors = Errors()
        async with a_worker(client, Handler(), on_error=errors):
            await ext.worker_stream()
        assert len(errors.seen) == 1
        assert calls > 8


async def test_different_things_that_go_wrong_are_each_told() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        errors = Errors()
        ext.refuses = UNAUTHENTICATED
        async with a_worker(client, Handler(), on_error=errors):
            await until(lambda: len(ext.work) == 3)
            ext.refuses = Status(grpc.StatusCode.INTERNAL, "broken")
            await until(lambda: len(errors.seen) == 2)
        assert len(errors.of(SiloUnauthenticatedError)) == 1


async def test_without_a_server_that_is_told_once() -> None:
    errors = Errors()
    async with a_client(nobody()) as client, a_worker(client, Handler(), on_error=errors):
        await until(lambda: bool(errors.seen))
    assert len(errors.seen) == 1


# What a server tells


async def test_a_cancellation_reaches_the_handler_and_ends_its_job() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler = Handler(holds=True)
        async with a_worker(client, handler):
            stream = await ext.worker_stream()
            await stream.deliver(a_task("t1"), a_task("t2"))
            await until(lambda: handler.running == 2)
            await stream.cancel("t1", "unknown")
            await handler.contexts[0].wait_cancelled()
            assert not handler.contexts[1].cancelled
            handler.release.set()
            await acknowledged(stream, "t1", "t2")
        assert stream.reports() == {"t1": "cancelled", "t2": "success"}


async def test_a_cancellation_that_comes_with_its_task_counts() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler = Handler()
        async with a_worker(client, handler):
            stream = await ext.worker_stream()
            await stream.deliver(a_task("t"), cancellations=[pb.Cancellation(task_id="t")])
            await acknowledged(stream, "t")
        assert stream.reports() == {"t": "cancelled"}


async def test_a_lost_lease_stops_its_handler_and_is_not_reported() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler, errors = Handler(holds=True), Errors()
        async with a_worker(client, handler, on_error=errors):
            stream = await ext.worker_stream()
            await stream.deliver(a_task("lost"), a_task("kept"))
            await until(lambda: handler.running == 2)
            await stream.lose("lost", "unknown")
            await handler.contexts[0].wait_cancelled()
            handler.release.set()
            await acknowledged(stream, "kept")
        assert stream.reports().keys() == {"kept"}
        assert errors.of(TaskLeaseLostError) == ["lost"]


async def test_a_lease_that_is_lost_while_its_task_waits_is_never_begun() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler, errors = Handler(holds=True), Errors()
        async with a_worker(client, handler, max_concurrent_tasks=1, on_error=errors):
            stream = await ext.worker_stream()
            await stream.deliver(a_task("runs"), a_task("lost"), a_task("last"))
            await until(lambda: handler.running == 1)
            await stream.lose("lost")
            await until(lambda: errors.of(TaskLeaseLostError) == ["lost"])
            handler.release.set()
            await acknowledged(stream, "runs", "last")
        assert handler.ids == ["runs", "last"]


async def test_a_lost_lease_is_not_handed_back() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler, errors = Handler(holds=True), Errors()
        worker = a_worker(client, handler, max_concurrent_tasks=1, on_error=errors)
        worker.start()
        stream = await ext.worker_stream()
        await stream.deliver(a_task("runs"), a_task("lost"), a_task("waits"))
        await until(lambda: handler.running == 1)
        await stream.lose("lost")
        await until(lambda: bool(errors.seen))
        stopping = asyncio.create_task(worker.stop())
        handler.release.set()
        await acknowledged(stream, "runs", "waits")
        await stopping
        assert stream.reports() == {"runs": "success", "waits": "handed_back"}


async def test_a_lease_that_is_lost_while_its_report_is_on_the_way_is_left_to_the_answer() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        errors = Errors()
        async with a_worker(client, Handler(), on_error=errors):
            stream = await ext.worker_stream()
            await stream.deliver(a_task("t"))
            await reported(stream, "t")
            await stream.lose("t")
            await stream.acknowledge("t")
        assert errors.seen == []


async def test_a_task_that_comes_twice_runs_once() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler, errors = Handler(holds=True), Errors()
        async with a_worker(client, handler, on_error=errors, max_concurrent_tasks=1) as worker:
            stream = await ext.worker_stream()
            await stream.deliver(a_task("runs"), a_task("waits"), a_task("waits"))
            await stream.deliver(a_task("runs"))
            await until(lambda: worker.metrics.duplicate_task_deliveries == 2)
            handler.release.set()
            await acknowledged(stream, "runs", "waits")
        assert handler.ids == ["runs", "waits"]
        assert errors.of(DuplicateTaskDeliveryError) == ["waits", "runs"]


async def test_a_task_that_comes_again_after_its_lease_was_lost_runs_again() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler = Handler(holds=True)
        async with a_worker(client, handler, on_error=Errors()):
            stream = await ext.worker_stream()
            await stream.deliver(a_task("t"))
            await until(lambda: handler.running == 1)
            await stream.lose("t")
            await stream.deliver(a_task("t"))
            await until(lambda: handler.running == 2)
            handler.release.set()
            await acknowledged(stream, "t")
        assert times_reported(ext, "t") == 1


async def test_an_answer_to_what_nobody_asked_is_ignored() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        errors = Errors()
        async with a_worker(client, Handler(), on_error=errors):
            stream = await ext.worker_stream()
            await stream.acknowledge("unknown", error=GONE)
            await stream.deliver(a_task("t"))
            await acknowledged(stream, "t")
        assert errors.seen == []


# Refresh tasks


async def test_a_refresh_is_reported_over_the_stream() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        async with a_worker(client, Handler(), refresh_handler=Handler(9)):
            stream = await ext.worker_stream()
            await stream.deliver(a_refresh_task("r", tenant_id="ada"))
            await acknowledged(stream, "r")
        report = report_of(stream, "r")
        assert (report.refresh_success.new_max_concurrency, report.tenant_id) == (9, "ada")


async def test_a_worker_without_a_handler_for_refreshes_says_so_to_the_server_and_goes_on() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        errors = Errors()
        async with a_worker(client, Handler(), on_error=errors):
            stream = await ext.worker_stream()
            await stream.deliver(a_refresh_task("r"), a_task("t"))
            await acknowledged(stream, "r", "t")
        assert report_of(stream, "r").refresh_failure.code == "NO_REFRESH_HANDLER"
        assert len(errors.seen) == 1


# Stopping


async def test_stop_hands_back_what_was_not_begun_and_lets_the_rest_end() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler = Handler(holds=True)
        worker = a_worker(client, handler, max_concurrent_tasks=1)
        worker.start()
        stream = await ext.worker_stream()
        await stream.deliver(a_task("runs"), a_task("waits"))
        await until(lambda: handler.running == 1)
        stopping = asyncio.create_task(worker.stop())
        assert await reported(stream, "waits") == {"waits": "handed_back"}
        assert not stopping.done()
        handler.release.set()
        await acknowledged(stream, "runs", "waits")
        await stopping
        assert handler.ids == ["runs"]
        assert stream.has_said_all


async def test_what_comes_while_it_stops_is_handed_back() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler = Handler(holds=True)
        worker = a_worker(client, handler)
        worker.start()
        stream = await ext.worker_stream()
        await stream.deliver(a_task("runs"))
        await until(lambda: handler.running == 1)
        stopping = asyncio.create_task(worker.stop())
        await until(lambda: stream.window == 0)
        await stream.deliver(a_task("late"))
        assert await reported(stream, "late") == {"late": "handed_back"}
        handler.release.set()
        await acknowledged(stream, "runs", "late")
        await stopping
        assert handler.ids == ["runs"]


async def test_what_comes_with_the_last_answer_is_handed_back() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        worker = a_worker(client, Handler())
        worker.start()
        stream = await ext.worker_stream()
        await stream.deliver(a_task("t"))
        await reported(stream, "t")
        stopping = asyncio.create_task(worker.stop())
        await until(lambda: stream.window == 0)
        await stream.deliver(a_task("late"), acknowledgements=[pb.Acknowledgement(task_id="t")])
        await acknowledged(stream, "late")
        await stopping
        assert stream.reports() == {"t": "success", "late": "handed_back"}


async def test_what_comes_after_the_end_was_said_is_left_to_a_last_hello_that_does_not_name_it() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler = Handler(holds=True)
        worker = a_worker(client, handler)
        worker.start()
        stream = await ext.worker_stream()
        stream.outlasts = True
        await stream.deliver(a_task("runs"))
        await until(lambda: handler.running == 1)
        stopping = asyncio.create_task(worker.stop(timeout=0))
        await until(lambda: stream.has_said_all)
        await stream.deliver(a_task("late"))
        stream.end()
        last = await ext.worker_stream(2)
        await until(lambda: last.has_said_all)
        await stopping
        assert (last.hello.session, last.held, last.window) == (stream.hello.session, {"runs"}, 0)
        assert handler.ids == ["runs"]
        handler.release.set()
        await until(lambda: "runs" in ext.silo.outcomes)


async def test_a_worker_whose_stream_ends_in_order_says_hello_no_more() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        async with a_worker(client, Handler()):
            await ext.worker_stream()
        assert len(ext.work) == 1


async def test_a_hand_back_whose_answer_was_lost_is_no_error() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler, errors = Handler(holds=True), Errors()
        worker = a_worker(client, handler, max_concurrent_tasks=1, on_error=errors)
        worker.start()
        stream = await ext.worker_stream()
        await stream.deliver(a_task("runs"), a_task("waits"))
        await until(lambda: handler.running == 1)
        stopping = asyncio.create_task(worker.stop())
        await reported(stream, "waits")
        stream.end()
        again = await ext.worker_stream(2)
        await reported(again, "waits")
        await again.acknowledge("waits", error=GONE)
        handler.release.set()
        await acknowledged(again, "runs")
        await stopping
        assert errors.seen == []
        assert not ext.silo.calls("GetJob")


async def test_an_outcome_that_comes_after_the_end_is_reported_by_itself() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler = Handler(holds=True)
        worker = a_worker(client, handler)
        worker.start()
        stream = await ext.worker_stream()
        await stream.deliver(a_task("t"))
        await until(lambda: handler.running == 1)
        await worker.stop(timeout=0)
        handler.release.set()
        await until(lambda: "t" in ext.silo.outcomes)
        assert ext.silo.outcomes["t"].success == value("done")
        assert not stream.reports()


async def test_a_worker_that_starts_again_does_not_name_what_ran_on_from_before() -> None:
    """Its lease is of another session: naming it would only make it lost, and drop its outcome."""
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler = Handler(holds=True)
        worker = a_worker(client, handler)
        worker.start()
        await (await ext.worker_stream()).deliver(a_task("t"))
        await until(lambda: handler.running == 1)
        await worker.stop(timeout=0)
        worker.start()
        stream = await ext.worker_stream(2)
        assert not stream.held
        handler.release.set()
        await acknowledged(stream, "t")
        await worker.stop()
        assert stream.reports() == {"t": "success"}


async def test_an_outcome_that_is_refused_after_the_end_leaves_nothing_behind() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler, errors = Handler(holds=True), Errors()
        worker = a_worker(client, handler, on_error=errors)
        worker.start()
        await (await ext.worker_stream()).deliver(a_task("t"))
        await until(lambda: handler.running == 1)
        await worker.stop(timeout=0)
        ext.silo.answer("ReportOutcome", Status(grpc.StatusCode.INTERNAL, "broken"))
        handler.release.set()
        await until(lambda: bool(errors.seen))
        worker.start()
        stream = await ext.worker_stream(2)
        stream.end()
        assert not (await ext.worker_stream(3)).held
        await worker.stop()


async def test_stop_gives_up_on_a_server_that_does_not_answer_its_reports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("silo.worker.worker._LATE_S", 0.05)
    async with fake_ext() as ext, a_client(ext.address) as client:
        worker = a_worker(client, Handler())
        worker.start()
        stream = await ext.worker_stream()
        await stream.deliver(a_task("t"))
        await reported(stream, "t")
        async with asyncio.timeout(10):
            await worker.stop()
        assert not worker.is_running


async def test_a_handler_may_stop_its_own_worker() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        worker: SiloWorker[Any, Any, Any]

        async def handler(ctx: Context) -> str:
            await worker.stop()
            return "stopped"

        worker = a_worker(client, handler)
        worker.start()
        await (await ext.worker_stream()).deliver(a_task("t"))
        await until(lambda: "t" in ext.silo.outcomes)
        assert not worker.is_running


async def test_a_client_that_is_closed_is_told_once_and_the_worker_can_be_stopped() -> None:
    async with fake_ext() as ext:
        client, errors = a_client(ext.address), Errors()
        async with a_worker(client, Handler(), on_error=errors):
            await ext.worker_stream()
            await client.close()
            await until(lambda: bool(errors.seen))
        assert len(errors.of(ClientClosed)) == len(errors.seen) == 1


# Servers that only speak silo.v1


async def test_a_server_without_the_extension_is_polled() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        ext.refuses = Status(grpc.StatusCode.UNIMPLEMENTED)
        handler, errors = Handler(), Errors()
        async with a_worker(client, handler, on_error=errors):
            ext.silo.deliver(a_task("t"))
            await until(lambda: "t" in ext.silo.outcomes)
        assert len(ext.work) == 1
        assert errors.seen == []


async def test_a_server_that_loses_the_extension_is_polled_from_then_on_and_gets_what_is_left() -> None:
    async with fake_ext() as ext, a_client(ext.address) as client:
        handler = Handler(holds=True)
        async with a_worker(client, handler, on_error=Errors(), heartbeat_interval_ms=10):
            stream = await ext.worker_stream()
            handler.release.set()
            await stream.deliver(a_task("ended"))
            await reported(stream, "ended")
            handler.release.clear()
            await stream.deliver(a_task("runs"))
            await until(lambda: handler.running == 1)
            ext.refuses = Status(grpc.StatusCode.UNIMPLEMENTED)
            stream.end()
            await until(lambda: bool(ext.silo.calls("Heartbeat")))
            ext.silo.deliver(a_task("new"))
            await until(lambda: handler.running == 2)
            handler.release.set()
            await until(lambda: ext.silo.outcomes.keys() == {"ended", "runs", "new"})


def test_a_success_may_be_given_as_such() -> None:
    """What the guide says: a plain value means the same."""
    held: Any = SimpleNamespace(id="t", shard=SHARD, tenant=None)
    assert reports.report_of(held, Success(1)) == reports.report_of(held, Success(result=1))
