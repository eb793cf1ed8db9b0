"""A worker tells OpenTelemetry what it does: counts, and a span for each task."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from silo import App, Failure, SiloGRPCClient, SiloWorker, TaskLeaseLostError
from silo.errors import LeaseNotFound
from silo.node.session import Session
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from silo.worker import worker as worker_module
from tests.builders import until
from tests.integration.fake_silo import (
    GROUP,
    FakeSilo,
    Status,
    a_client,
    a_refresh_task,
    a_task,
    fake_silo,
    not_found,
)
from tests.integration.real_silo import real_silo
from tests.integration.workers import Context, Errors, Handler, a_worker

ROOT = Path(__file__).parents[2]


class Meter:
    """A meter, and what was counted with it."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self._provider = MeterProvider(metric_readers=[self._reader], shutdown_on_exit=False)
        self.meter = self._provider.get_meter("silo-worker")

    def counted(self, name: str) -> dict[str, int]:
        """The values of `silo.worker.{name}`, by task group."""
        data = self._reader.get_metrics_data()
        points = [
            point
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == f"silo.worker.{name}"
            for point in metric.data.data_points
        ]
        assert all(set(point.attributes) == {"task_group"} for point in points)
        return {point.attributes["task_group"]: point.value for point in points}

    def shutdown(self) -> None:
        self._provider.shutdown()


@pytest.fixture
def meter() -> Iterator[Meter]:
    made = Meter()
    yield made
    made.shutdown()


class Spans:
    """All spans of a test."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    @property
    def ended(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def of(self, task_id: str) -> ReadableSpan | None:
        """The span of a task, once it has ended."""
        found = [span for span in self.ended if (span.attributes or {}).get("silo.task_id") == task_id]
        assert len(found) < 2, "a task has one span"
        return found[0] if found else None

    async def when_ended(self, task_id: str) -> ReadableSpan:
        await until(lambda: self.of(task_id) is not None)
        span = self.of(task_id)
        assert span is not None
        return span


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    made = Spans()
    # A global provider can be set only once in a process.
    monkeypatch.setattr(trace, "get_tracer", made.provider.get_tracer)
    yield made
    made.provider.shutdown()


@asynccontextmanager
async def a_fake(handler: Any, **options: Any) -> AsyncIterator[tuple[FakeSilo, SiloWorker[Any, Any, Any]]]:
    """A worker that polls a fake server."""
    async with fake_silo() as server, a_client(server) as client, a_worker(client, handler, **options) as w:
        yield server, w


def parent_of(headers: Any) -> tuple[str, str]:
    """Trace and span that a call names as its origin."""
    _, trace_id, span_id, _ = headers["traceparent"].split("-")
    return trace_id, span_id


def ids_of(span: ReadableSpan) -> tuple[str, str]:
    assert span.context is not None
    return trace.format_trace_id(span.context.trace_id), trace.format_span_id(span.context.span_id)


# Counts


async def test_a_poll_counts_once_and_each_of_its_tasks(meter: Meter) -> None:
    async def refresh(ctx: Any) -> int:
        return 1

    handler = Handler()
    async with fake_silo() as server, a_client(server) as client:
        everything = pb.LeaseTasksResponse(tasks=[a_task("a"), a_task("b")], refresh_tasks=[a_refresh_task()])
        held_open = asyncio.Event()

        async def wait(request: Any) -> pb.LeaseTasksResponse:
            await held_open.wait()
            return pb.LeaseTasksResponse()

        server.answer("LeaseTasks", everything)
        server.always("LeaseTasks", wait)
        async with a_worker(client, handler, refresh_handler=refresh, meter=meter.meter):
            await until(lambda: len(server.outcomes) == 2 and len(server.refresh_outcomes) == 1)
            assert meter.counted("polls") == {GROUP: 1}
            assert meter.counted("polls.tasks_returned") == {GROUP: 3}
            assert meter.counted("polls.empty") == {}
            held_open.set()


async def test_an_empty_poll_is_counted_as_such_and_returns_nothing(meter: Meter) -> None:
    async with a_fake(Handler(), meter=meter.meter) as (_, worker):
        await until(lambda: worker.metrics.empty_polls >= 3)
        assert meter.counted("polls")[GROUP] >= 3
        assert meter.counted("polls.empty")[GROUP] >= 3
        assert meter.counted("polls.tasks_returned") == {}


async def test_a_poll_that_failed_is_not_counted(meter: Meter) -> None:
    errors = Errors()
    async with fake_silo() as server, a_client(server) as client:
        server.always("LeaseTasks", Status(grpc.StatusCode.INTERNAL, "broken"))
        async with a_worker(client, Handler(), meter=meter.meter, on_error=errors):
            await until(lambda: len(errors.seen) >= 3)
            assert meter.counted("polls") == {}


async def test_a_duplicate_delivery_is_counted(meter: Meter) -> None:
    errors = Errors()
    async with fake_silo() as server, a_client(server) as client:
        server.answer("LeaseTasks", pb.LeaseTasksResponse(tasks=[a_task("t"), a_task("t")]))
        async with a_worker(client, Handler(), meter=meter.meter, on_error=errors):
            await until(lambda: "t" in server.outcomes)
        assert meter.counted("duplicate_task_deliveries") == {GROUP: 1}


async def test_pushed_tasks_count_without_any_poll(meter: Meter) -> None:
    async with real_silo() as address, SiloGRPCClient(address) as client:
        async with a_worker(client, Handler(), meter=meter.meter):
            for _ in range(3):
                await (await client.enqueue(payload=1, task_group=GROUP)).result(timeout=30)
        assert meter.counted("polls.tasks_returned") == {GROUP: 3}
        assert meter.counted("polls") == {}


async def test_a_worker_of_an_app_counts_with_the_meter_that_it_is_given(meter: Meter) -> None:
    app = App()

    @app.task(task_group=GROUP)
    async def work() -> None:
        pass

    async with real_silo() as address, SiloGRPCClient(address) as client:
        app.configure(client=client)
        async with app.worker(meter=meter.meter):
            await (await work.enqueue()).result(20)
            assert meter.counted("polls.tasks_returned") == {GROUP: 1}


async def test_the_free_slots_are_those_of_the_moment(meter: Meter) -> None:
    handler = Handler(holds=True)
    async with a_fake(handler, meter=meter.meter) as (server, _):
        assert meter.counted("available_task_slots") == {GROUP: 10}
        server.deliver(a_task("a"), a_task("b"))
        await until(lambda: handler.running == 2)
        assert meter.counted("available_task_slots") == {GROUP: 8}
        handler.release.set()
        await until(lambda: meter.counted("available_task_slots") == {GROUP: 10})
    assert meter.counted("available_task_slots") == {}


async def test_workers_on_one_task_group_add_up_their_free_slots(meter: Meter) -> None:
    async with fake_silo() as server, a_client(server) as client:
        shared: dict[str, Any] = {"meter": meter.meter, "max_concurrent_tasks": 3}
        one = a_worker(client, Handler(), worker_id="1", **shared)
        other = a_worker(client, Handler(), worker_id="2", **shared)
        another = a_worker(client, Handler(), worker_id="3", task_group="h", **shared)
        async with one, other, another:
            assert meter.counted("available_task_slots") == {GROUP: 6, "h": 3}
            await other.stop()
            assert meter.counted("available_task_slots") == {GROUP: 3, "h": 3}
            other.start()
            assert meter.counted("available_task_slots") == {GROUP: 6, "h": 3}


# Spans


@pytest.mark.parametrize("extension", [True, False], ids=["pushed", "polled"])
async def test_every_task_has_one_span_that_says_what_it_was(spans: Spans, extension: bool) -> None:
    handler = Handler()
    async with (
        real_silo(extension=extension) as address,
        SiloGRPCClient(address) as client,
        a_worker(client, handler, worker_id="me"),
    ):
        for number in range(2):
            await (await client.enqueue(payload=1, task_group=GROUP, id=f"j{number}")).result(timeout=30)
        await until(lambda: len(spans.ended) == 2)
        [shard] = client.get_topology()
    for number, context in enumerate(handler.contexts):
        span = spans.of(context.task.id)
        assert span is not None
        assert span.attributes == {
            "silo.task_id": context.task.id,
            "silo.shard": shard.shard_id,
            "silo.tenant": "",
            "silo.worker_id": "me",
            "silo.job_id": f"j{number}",
            "silo.task_group": GROUP,
            "silo.attempt_number": 1,
        }
        assert (span.name, span.parent, span.status.status_code) == (
            "silo.task.lifecycle",
            None,
            StatusCode.UNSET,
        )
        assert span.instrumentation_scope is not None
        assert span.instrumentation_scope.name == "silo-worker"


async def test_a_span_names_the_tenant_if_there_is_one(spans: Spans) -> None:
    async with a_fake(Handler()) as (server, _):
        server.deliver(a_task("t", tenant_id="shop"))
        span = await spans.when_ended("t")
    assert span.attributes is not None
    assert span.attributes["silo.tenant"] == "shop"


async def test_what_belongs_to_a_task_carries_its_span_and_polls_do_not(spans: Spans) -> None:
    async with fake_silo() as server, a_client(server) as client:

        async def handler(ctx: Context) -> None:
            await client.get_job("another")
            await until(lambda: bool(server.metadata("Heartbeat")))

        async with a_worker(client, handler, heartbeat_interval_ms=10):
            server.deliver(a_task("t"))
            span = await spans.when_ended("t")
        for method in ("GetJob", "Heartbeat", "ReportOutcome"):
            assert parent_of(server.metadata(method)[0]) == ids_of(span)
        assert not [headers for headers in server.metadata("LeaseTasks") if "traceparent" in headers]


@pytest.mark.parametrize("execution", ["async", "thread"])
async def test_spans_of_the_handler_are_children_of_its_task(spans: Spans, execution: str) -> None:
    tracer = spans.provider.get_tracer("application")

    def work(ctx: Any) -> None:
        with tracer.start_as_current_span("work"):
            pass

    async def work_async(ctx: Context) -> None:
        work(ctx)

    handler = work if execution == "thread" else work_async
    async with a_fake(handler, execution=execution) as (server, _):
        server.deliver(a_task("t"), a_task("u"))
        parents = {ids_of(await spans.when_ended(id)) for id in ("t", "u")}
    work_spans = [span for span in spans.ended if span.name == "work"]
    assert {
        (trace.format_trace_id(span.parent.trace_id), trace.format_span_id(span.parent.span_id))
        for span in work_spans
        if span.parent is not None
    } == parents
    assert len(work_spans) == 2


async def test_what_runs_after_a_task_is_not_in_its_span(spans: Spans) -> None:
    seen = []

    async def handler(ctx: Context) -> None:
        seen.append(trace.get_current_span().get_span_context())

    async with a_fake(handler, max_concurrent_tasks=1) as (server, _):
        server.deliver(*(a_task(f"t{n}") for n in range(5)))
        await until(lambda: len(spans.ended) == 5)
    assert len({context.trace_id for context in seen}) == 5
    assert not trace.get_current_span().get_span_context().is_valid


async def fail(ctx: Context) -> Failure:
    return Failure("NO", {"reason": "secret"})


async def raise_error(ctx: Context) -> None:
    raise ValueError("secret")


@pytest.mark.parametrize("handler", [fail, raise_error])
async def test_a_handler_that_fails_is_no_error_of_the_span(spans: Spans, handler: Any) -> None:
    async with a_fake(handler) as (server, _):
        server.deliver(a_task("t"))
        span = await spans.when_ended("t")
    assert (span.status.status_code, span.events) == (StatusCode.UNSET, ())


@pytest.mark.parametrize(
    "refusal", [Status(grpc.StatusCode.INTERNAL, "broken"), not_found("lease not found")]
)
async def test_a_report_that_fails_is_an_error_of_the_span(spans: Spans, refusal: Status) -> None:
    errors = Errors()
    async with fake_silo() as server, a_client(server) as client:
        server.always("ReportOutcome", refusal)
        async with a_worker(client, Handler(), on_error=errors):
            server.deliver(a_task("t"))
            span = await spans.when_ended("t")
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is not None
    assert refusal.text in span.status.description
    assert [event.name for event in span.events] == ["exception"]
    assert [task_id for _, task_id in errors.seen] == ["t"]


async def test_a_report_that_the_stream_refuses_is_an_error_of_the_span(
    spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(self: Session, shard: Any, reports: list[tuple[str, Any]]) -> None:
        self.acknowledge((task_id, LeaseNotFound()) for task_id, _ in reports)

    monkeypatch.setattr(Session, "report", refuse)
    errors, handler = Errors(), Handler()
    async with (
        real_silo() as address,
        SiloGRPCClient(address) as client,
        a_worker(client, handler, on_error=errors),
    ):
        await client.enqueue(payload=1, task_group=GROUP)
        await until(lambda: bool(spans.ended))
    span = spans.of(handler.ids[0])
    assert span is not None
    assert (span.status.status_code, [event.name for event in span.events]) == (
        StatusCode.ERROR,
        ["exception"],
    )
    assert [task_id for _, task_id in errors.seen] == handler.ids


async def test_a_lost_task_has_its_span_as_long_as_its_handler_runs(spans: Spans) -> None:
    errors, handler = Errors(), Handler(holds=True)
    async with a_fake(handler, heartbeat_interval_ms=20, on_error=errors) as (server, _):
        server.always("Heartbeat", not_found("lease not found"))
        server.deliver(a_task("t"))
        await until(lambda: bool(errors.of(TaskLeaseLostError)))
        server.deliver(a_task("t"))  # Again, which is no duplicate now.
        await until(lambda: handler.running == 2)
        assert not spans.ended
        handler.release.set()
        await until(lambda: len(spans.ended) == 2)
    assert {span.status.status_code for span in spans.ended} == {StatusCode.UNSET}


async def test_neither_duplicates_nor_refresh_tasks_have_spans(spans: Spans) -> None:
    async def refresh(ctx: Any) -> int:
        return 1

    async with fake_silo() as server, a_client(server) as client:
        both = pb.LeaseTasksResponse(tasks=[a_task("t"), a_task("t")], refresh_tasks=[a_refresh_task()])
        server.answer("LeaseTasks", both)
        async with a_worker(client, Handler(), refresh_handler=refresh, on_error=Errors()):
            await until(lambda: bool(server.outcomes) and bool(server.refresh_outcomes))
    assert [(span.attributes or {}).get("silo.task_id") for span in spans.ended] == ["t"]


async def test_tasks_that_are_abandoned_end_their_spans(spans: Spans) -> None:
    handler = Handler(holds=True)
    async with fake_silo() as server, a_client(server) as client:
        server.answer("LeaseTasks", pb.LeaseTasksResponse(tasks=[a_task("runs"), a_task("waits")]))
        worker = a_worker(client, handler, max_concurrent_tasks=1)
        worker.start()
        await until(lambda: handler.running == 1)
        await worker.stop(timeout=0.01)
        assert [spans.of("runs"), spans.of("waits") is not None] == [None, True]
        handler.release.set()
        await spans.when_ended("runs")
    assert handler.ids == ["runs"]


async def test_a_task_that_is_lost_while_it_waits_ends_its_span(spans: Spans) -> None:
    errors, handler = Errors(), Handler(holds=True)
    async with fake_silo() as server, a_client(server) as client:
        server.answer("LeaseTasks", pb.LeaseTasksResponse(tasks=[a_task("runs"), a_task("waits")]))
        server.always("Heartbeat", not_found("lease not found"))
        async with a_worker(
            client, handler, max_concurrent_tasks=1, heartbeat_interval_ms=20, on_error=errors
        ):
            await until(lambda: len(errors.of(TaskLeaseLostError)) == 2)
            handler.release.set()
        assert len(spans.ended) == 2
    assert handler.ids == ["runs"]


async def test_a_task_that_is_handed_back_ends_its_span(
    spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_WAIT_AHEAD_S", 0.02)
    monkeypatch.setattr(worker_module, "_LOOK_S", 0.02)
    handler = Handler()
    async with real_silo() as address, SiloGRPCClient(address) as client:
        async with a_worker(client, handler, max_concurrent_tasks=1) as worker:
            for _ in range(5):  # Fast ones, so that more are asked for than there are slots.
                await (await client.enqueue(payload=1, task_group=GROUP)).result(timeout=30)
            await until(lambda: len(spans.ended) == 5)
            handler.release.clear()
            for _ in range(5):
                await client.enqueue(payload=1, task_group=GROUP)
            await until(lambda: worker.active_tasks == 1 and len(spans.ended) > 5)
            handler.release.set()
            await until(lambda: len(set(handler.ids)) == 10)
        await until(
            lambda: {*handler.ids} <= {(span.attributes or {})["silo.task_id"] for span in spans.ended}
        )


async def test_a_report_that_is_never_answered_ends_its_span_with_its_worker(
    spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ignore(self: Session, shard: Any, reports: list[tuple[str, Any]]) -> None: ...

    monkeypatch.setattr(Session, "report", ignore)
    monkeypatch.setattr(worker_module, "_LATE_S", 0.1)
    handler = Handler()
    async with real_silo() as address, SiloGRPCClient(address) as client:
        async with a_worker(client, handler) as worker:
            await client.enqueue(payload=1, task_group=GROUP)
            await until(lambda: bool(handler.ids) and worker.active_tasks == 0)
            assert not spans.ended
        assert spans.of(handler.ids[0]) is not None


async def test_a_worker_that_is_torn_down_ends_all_spans(spans: Spans) -> None:
    handler = Handler(holds=True)
    async with a_fake(handler) as (server, worker):
        running = asyncio.create_task(worker.run())
        server.deliver(a_task("t"))
        await until(lambda: handler.running == 1)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        assert spans.of("t") is not None


# Providers that come late, or never


async def run_script(script: str) -> None:
    """Run `script` by a Python of its own, which must end in time and well."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", script), cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(60):
            _, err = await process.communicate()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0, err.decode()


_RUN_ONE = """
from tests.builders import until
from tests.integration.fake_silo import a_client, a_task, fake_silo
from tests.integration.workers import Handler, a_worker

async def run_one(between=lambda: None):
    async with fake_silo() as server, a_client(server) as client, a_worker(client, Handler()) as worker:
        between()
        server.deliver(a_task("t"))
        await until(lambda: "t" in server.outcomes and worker.active_tasks == 0)
        return server
"""


async def test_a_worker_tells_the_global_providers_also_if_they_come_late() -> None:
    await run_script(f"""
import asyncio
{_RUN_ONE}
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

spans, reader = InMemorySpanExporter(), InMemoryMetricReader()

def set_providers():
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(MeterProvider(metric_readers=[reader]))

asyncio.run(run_one(set_providers))
assert [span.name for span in spans.get_finished_spans()] == ["silo.task.lifecycle"]
asyncio.run(run_one())
[resource] = reader.get_metrics_data().resource_metrics
[scope] = resource.scope_metrics
assert scope.scope.name == "silo-worker"
[returned] = [metric for metric in scope.metrics if metric.name == "silo.worker.polls.tasks_returned"]
[point] = returned.data.data_points
assert (point.value, point.attributes) == (2, {{"task_group": "g"}})
""")


async def test_without_a_provider_calls_of_a_task_carry_nothing() -> None:
    await run_script(f"""
import asyncio
{_RUN_ONE}
server = asyncio.run(run_one())
assert "traceparent" not in server.metadata("ReportOutcome")[0]
""")


async def test_without_opentelemetry_a_worker_works_the_same() -> None:
    await run_script(f"""
import sys
sys.modules["opentelemetry"] = None
import asyncio
{_RUN_ONE}
asyncio.run(run_one())
""")
