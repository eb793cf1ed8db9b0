"""Typed tasks on a real server: what is enqueued, how it runs, and what comes back."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pydantic
import pytest

import silo
from silo import (
    App,
    Cancelled,
    ConcurrencyLimit,
    ConfigError,
    Failure,
    JobTimeoutError,
    Limit,
    RefreshTaskContext,
    RetryPolicy,
    SiloGRPCClient,
    TaskArgumentError,
    TaskContext,
    TaskHandle,
    TaskResultError,
    testing,
)
from tests.builders import until
from tests.integration.fake_silo import GROUP, a_client, a_refresh_task, fake_silo
from tests.integration.real_silo import real_silo

FAST = RetryPolicy(retry_count=3, initial_interval_ms=1, max_interval_ms=1, randomize_interval=False)
TIMEOUT_S = 20.0


@dataclass
class Attachment:
    name: str
    size: int = 0


class Customer(pydantic.BaseModel):
    email: str


class Receipt(msgspec.Struct):
    to: Customer
    names: tuple[str, ...]


@asynccontextmanager
async def connected(app: App) -> AsyncIterator[SiloGRPCClient]:
    """A server that the app uses."""
    async with real_silo() as address, SiloGRPCClient(address) as client:
        app.configure(client=client)
        yield client


@asynccontextmanager
async def at_work(app: App, **options: Any) -> AsyncIterator[SiloGRPCClient]:
    """The same, with a worker."""
    async with connected(app) as client, app.worker(**options):
        yield client


async def end_of(handle: TaskHandle[Any]) -> tuple[str, Any, str | None]:
    end = await handle.result(TIMEOUT_S)
    return end.status, end.result, end.error_code


# Values


async def test_a_task_gets_what_was_enqueued_and_its_result_comes_back_with_its_type() -> None:
    app = App()

    @app.task
    async def send(to: Customer, *attachments: Attachment, note: str = "none") -> Receipt:
        assert isinstance(to, Customer)
        return Receipt(to, (note, *(attachment.name for attachment in attachments)))

    async with at_work(app):
        handle = await send.enqueue(Customer(email="ada@example.com"), Attachment("a"), Attachment("b", 2))
        end = await handle.result(TIMEOUT_S)
        assert end.result == Receipt(Customer(email="ada@example.com"), ("none", "a", "b"))
        assert end.status == "Succeeded"


async def test_a_job_is_a_map_of_arguments_and_the_name_of_its_task() -> None:
    app = App(task_group="mail")

    @app.task(name="send")
    async def send(to: str, *, subject: str = "hi", files: list[Attachment] | None = None) -> None: ...

    async with connected(app):
        job = await (await send.enqueue("ada", files=[Attachment("a")])).job()
    assert job.payload == {"to": "ada", "files": [{"name": "a", "size": 0}]}
    assert job.metadata == {"silo.task": "send"}
    assert (job.task_group, job.priority, job.retry_policy) == ("mail", 50, None)


async def test_arguments_that_do_not_fit_are_refused_before_anything_is_sent() -> None:
    app = App()

    @app.task(name="send")
    async def send(to: str, n: int = 0) -> None: ...

    untyped: Any = send
    async with fake_silo() as server, a_client(server) as client:
        app.configure(client=client)
        for args, parameter in [((5,), "to"), ((), "to"), (("a", 2**64), "n"), (("a", 1, 2), None)]:
            with pytest.raises(TaskArgumentError, match="task 'send'") as caught:
                await untyped.enqueue(*args)
            assert caught.value.parameter == parameter
        assert server.calls("Enqueue") == []


async def test_arguments_that_do_not_fit_the_worker_fail_the_job_for_good() -> None:
    app = App()
    calls = 0

    @app.task(name="send", retry=FAST)
    async def send(to: str) -> None:
        nonlocal calls
        calls += 1

    async with at_work(app) as client:
        job = await client.enqueue(
            payload={"to": 5}, task_group="default", metadata={"silo.task": "send"}, retry_policy=FAST
        )
        end = await job.result(TIMEOUT_S)
        assert (end.status, end.error_code) == ("Failed", "INVALID_ARGUMENTS")
        assert end.error_data == {
            "task": "send",
            "parameter": "to",
            "message": "Expected `str`, got `int` - at `$.to`",
        }
    assert calls == 0


async def test_a_job_of_an_unknown_task_names_the_known_ones() -> None:
    app = App()

    @app.task(name="known")
    async def known() -> None: ...

    async with at_work(app) as client:
        for metadata, name in [({"silo.task": "other"}, "other"), ({}, None)]:
            job = await client.enqueue(payload={}, task_group="default", metadata=metadata)
            end = await job.result(TIMEOUT_S)
            assert (end.error_code, end.error_data) == ("UNKNOWN_TASK", {"task": name, "known": ["known"]})


async def test_a_stored_result_of_another_type_is_told_without_it() -> None:
    app = App()

    @app.task(name="count")
    async def count() -> int:
        return 5

    other = App()

    @other.task(name="count")
    async def count_again() -> Attachment:
        raise NotImplementedError

    async with at_work(app) as client:
        other.configure(client=client)
        handle = await count.enqueue()
        assert await end_of(handle) == ("Succeeded", 5, None)
        with pytest.raises(
            TaskResultError, match="the result does not fit: Expected `object`, got `int`"
        ) as caught:
            await count_again.handle(handle.id).result(TIMEOUT_S)
        assert (caught.value.task, caught.value.job_id) == ("count", handle.id)


async def test_a_handle_can_be_had_again_by_the_id_of_the_job() -> None:
    app = App()

    @app.task
    async def make(name: str) -> Attachment:
        return Attachment(name)

    async with at_work(app):
        enqueued = await make.enqueue("a")
        again = make.handle(enqueued.id)
        assert (await again.result(TIMEOUT_S)).result == Attachment("a")
        assert await again.status() == "Succeeded"


async def test_a_task_can_be_called_as_if_it_were_none() -> None:
    app = App()

    @app.task
    async def double(n: int) -> int:
        """Twice as much."""
        return 2 * n

    @app.task
    def half(n: int) -> float:
        return n / 2

    assert (await double(4), half(5), double.__doc__, double.__name__) == (8, 2.5, "Twice as much.", "double")


# Options


async def test_options_hold_for_one_call() -> None:
    app = App()
    declared = RetryPolicy(retry_count=1)

    @app.task(name="t", task_group="g", priority=20, retry=declared)
    async def task(n: int) -> None: ...

    async with connected(app):
        now_ms = time.time_ns() // 1_000_000
        special = task.options(
            id="mine", priority=5, delay=60, retry=FAST, metadata={"by": "me", "silo.task": "not this"}
        )
        handle = await special.enqueue(1)
        job, usual = await handle.job(), await (await task.enqueue(2)).job()
        assert (handle.id, job.priority, job.retry_policy) == ("mine", 5, FAST)
        assert job.metadata == {"by": "me", "silo.task": "t"}
        assert job.next_attempt_starts_after_ms is not None
        assert job.next_attempt_starts_after_ms >= now_ms + 60_000
        assert (usual.priority, usual.retry_policy) == (20, declared)
        later = await task.options(start_at_ms=now_ms + 5_000_000).enqueue(3)
        assert (await later.job()).next_attempt_starts_after_ms == now_ms + 5_000_000


async def test_jobs_carry_the_tenant_of_the_app_or_of_the_call() -> None:
    app = App(tenant="acme")

    @app.task
    async def task() -> None: ...

    async with fake_silo() as server, a_client(server) as client:
        app.configure(client=client)
        first, second = await task.enqueue(), await task.options(tenant="other").enqueue()
        assert (first.tenant, second.tenant) == ("acme", "other")
        assert [call.tenant for call in server.calls("Enqueue")] == ["acme", "other"]
        app.configure(tenant="late")
        assert task.handle("x").tenant == "late"


async def test_limits_are_declared_once_or_made_of_the_arguments() -> None:
    app = App()
    of_all = ConcurrencyLimit(key="all", max_concurrency=9)

    @app.task(limits=[of_all])
    async def send(to: str, *, subject: str = "") -> None: ...

    @app.task
    async def free(to: str) -> None: ...

    @send.limits
    def one_for_each_user(to: str, **rest: object) -> list[Limit]:
        return [ConcurrencyLimit(key=f"to {to}", max_concurrency=1)]

    async with connected(app):
        job = await (await send.enqueue("ada", subject="x")).job()
        assert job.limits == (of_all, ConcurrencyLimit(key="to ada", max_concurrency=1))
        assert (await (await free.enqueue("ada")).job()).limits == ()


async def test_floating_limits_are_refreshed_by_the_handler_of_the_app() -> None:
    app = App(task_group=GROUP)

    @app.refresh_handler
    async def refresh(context: RefreshTaskContext) -> int:
        return context.task.current_max_concurrency + 1

    @app.task
    async def task() -> None: ...

    async with fake_silo() as server, a_client(server) as client, app.worker(client):
        server.deliver(a_refresh_task("r"))
        await until(lambda: "r" in server.refresh_outcomes)
    assert server.refresh_outcomes["r"].success.new_max_concurrency == 6


# Outcomes


class Flaky(ConnectionError):
    pass


@pytest.mark.parametrize(
    ("options", "error", "attempts"),
    [
        ({}, ValueError("x"), 4),
        ({"retry_on": (ConnectionError,)}, Flaky("x"), 4),
        ({"retry_on": (ConnectionError,)}, ValueError("x"), 1),
        ({"give_up_on": (ValueError, KeyError)}, KeyError("x"), 1),
        ({"give_up_on": (ValueError,)}, Flaky("x"), 4),
        ({"retry_on": (ConnectionError,), "give_up_on": (Flaky,)}, Flaky("x"), 1),
        ({"retry_on": ()}, Flaky("x"), 1),
    ],
)
async def test_exceptions_decide_whether_it_is_tried_again(
    options: dict[str, Any], error: Exception, attempts: int
) -> None:
    app = App()

    @app.task(retry=FAST, **options)
    async def fail() -> None:
        raise error

    async with at_work(app):
        handle = await fail.enqueue()
        assert (await end_of(handle))[0::2] == ("Failed", "HANDLER_ERROR")
        job = await handle.job(include_attempts=True)
        assert len(job.attempts or ()) == attempts
        end = await handle.result()
        assert end.error_data["name"] == type(error).__name__


async def test_a_task_may_return_a_failure_or_cancelled() -> None:
    app = App()

    @app.task
    async def charge(amount: int) -> Attachment | Failure | Cancelled:
        if amount < 0:
            return Failure("NEGATIVE", {"amount": amount})
        return Cancelled() if amount == 0 else Attachment("receipt", amount)

    async with at_work(app):
        assert await end_of(await charge.enqueue(5)) == ("Succeeded", Attachment("receipt", 5), None)
        assert await end_of(await charge.enqueue(-5)) == ("Failed", None, "NEGATIVE")
        assert await end_of(await charge.enqueue(0)) == ("Cancelled", None, None)


async def test_a_result_that_cannot_be_stored_is_a_failure() -> None:
    app = App()

    @app.task(name="t")
    async def task() -> Any:
        return object()

    async with at_work(app):
        end = await (await task.enqueue()).result(TIMEOUT_S)
        assert end.error_data["message"] == (
            "task 't': the result cannot be stored: a builtins.object has no form in MessagePack"
        )


async def test_a_task_that_takes_too_long_fails_as_timed_out_and_follows_its_rules() -> None:
    app = App()

    @app.task(timeout=0.02, retry=FAST)
    async def slow() -> None:
        await asyncio.sleep(60)

    @app.task(timeout=0.02, retry=FAST, give_up_on=(TimeoutError,))
    async def slow_once() -> None:
        await asyncio.sleep(60)

    async with at_work(app):
        for task, attempts in [(slow, 4), (slow_once, 1)]:
            handle = await task.enqueue()
            assert await end_of(handle) == ("Failed", None, "TIMEOUT")
            assert len((await handle.job(include_attempts=True)).attempts or ()) == attempts


# Around tasks


async def test_a_task_can_ask_for_its_context() -> None:
    app = App()

    @app.task
    async def task() -> list[Any]:
        await asyncio.sleep(0)
        context = silo.current_task()
        with pytest.raises(RuntimeError, match="ask current_task"):
            silo.current_blocking_task()
        return [context.task.job_id, context.task.attempt_number, context.cancelled, context.task.payload]

    async with at_work(app):
        handles = await asyncio.gather(*(task.enqueue() for _ in range(5)))
        for handle in handles:
            assert (await handle.result(TIMEOUT_S)).result == [handle.id, 1, False, {}]
    with pytest.raises(RuntimeError, match="no task runs here"):
        silo.current_task()
    with pytest.raises(RuntimeError, match="no task runs here"):
        silo.current_blocking_task()


async def test_a_task_can_cancel_its_job_through_its_context() -> None:
    app = App()

    @app.task
    async def task() -> str:
        await silo.current_task().cancel()
        return "too late"

    async with at_work(app):
        assert await end_of(await task.enqueue()) == ("Cancelled", None, None)


async def test_a_task_may_enqueue_another_one() -> None:
    app = App()

    @app.task
    async def child(n: int) -> int:
        return 2 * n

    @app.task
    async def parent(n: int) -> str:
        return (await child.enqueue(n)).id

    async with at_work(app):
        handle = child.handle((await (await parent.enqueue(4)).result(TIMEOUT_S)).result or "")
        assert (await handle.result(TIMEOUT_S)).result == 8


async def test_middleware_sees_every_task_its_result_and_its_exceptions() -> None:
    app = App()
    seen: list[Any] = []

    @app.middleware
    async def watch(context: TaskContext[Any, dict[str, str]], call_next: Any) -> object:
        name = context.task.metadata["silo.task"]
        assert silo.current_task() is context
        try:
            result = await call_next(context)
        except ValueError as error:
            seen.append((name, context.task.payload, str(error)))
            raise
        seen.append((name, context.task.payload, result))
        return result

    @app.middleware
    async def polite(context: TaskContext[Any, dict[str, str]], call_next: Any) -> object:
        result = await call_next(context)
        return {**result, "name": f"dear {result['name']}"}

    @app.task(name="make")
    async def make(name: str) -> Attachment:
        return Attachment(name)

    @app.task(name="fail", retry=FAST, give_up_on=(ValueError,))
    def fail() -> None:
        raise ValueError("on purpose")

    async with at_work(app):
        assert (await (await make.enqueue("a")).result(TIMEOUT_S)).result == Attachment("dear a")
        assert await end_of(await fail.enqueue()) == ("Failed", None, "HANDLER_ERROR")
    assert seen == [("make", {"name": "a"}, {"name": "dear a", "size": 0}), ("fail", {}, "on purpose")]


async def test_lifespans_surround_all_tasks_and_end_in_reverse() -> None:
    app = App()
    events: list[str] = []

    def noting(name: str) -> Any:
        @asynccontextmanager
        async def lifespan() -> AsyncIterator[None]:
            events.append(f"{name} begins")
            yield
            events.append(f"{name} ends")

        return lifespan

    for name in ("outer", "inner"):
        app.lifespan(noting(name))

    started = asyncio.Event()

    @app.task
    async def task() -> None:
        events.append("task begins")
        started.set()
        await asyncio.sleep(0.01)
        events.append("task ends")

    async with connected(app):
        worker = app.worker()
        for _ in range(2):
            events.clear()
            started.clear()
            await worker.start()
            await worker.start()
            await task.enqueue()
            await started.wait()
            await worker.stop()
            await worker.stop()
            assert events == [
                "outer begins", "inner begins", "task begins", "task ends", "inner ends", "outer ends",
            ]  # fmt: skip


async def test_a_lifespan_that_fails_leaves_those_before_it_and_stops_the_start() -> None:
    app = App()
    events: list[str] = []

    @app.lifespan
    @asynccontextmanager
    async def good() -> AsyncIterator[None]:
        try:
            yield
        finally:
            events.append("left")

    @app.lifespan
    @asynccontextmanager
    async def bad() -> AsyncIterator[None]:
        raise OSError("no database")
        yield

    @app.task
    async def task() -> None: ...

    async with fake_silo() as server, a_client(server) as client:
        worker = app.worker(client)
        with pytest.raises(OSError, match="no database"):
            await worker.start()
        assert events == ["left"]
        await worker.stop()
        assert server.calls("LeaseTasks") == []


# Groups


async def test_a_worker_serves_all_groups_of_its_app_or_those_it_is_told() -> None:
    app = App()

    @app.task(task_group="a")
    async def first() -> str:
        return "first"

    @app.task(task_group="b")
    async def second() -> str:
        return "second"

    assert app.task_groups == ("a", "b")
    async with at_work(app):
        assert [await end_of(await task.enqueue()) for task in (first, second)] == [
            ("Succeeded", "first", None), ("Succeeded", "second", None),
        ]  # fmt: skip
    async with at_work(app, groups=["b"]):
        waiting = await first.enqueue()
        assert await end_of(await second.enqueue()) == ("Succeeded", "second", None)
        with pytest.raises(JobTimeoutError):
            await waiting.result(0)


async def test_a_job_that_waits_in_the_former_group_of_its_task_is_run() -> None:
    app = App()

    @app.task(name="moved", task_group="new")
    async def moved() -> str:
        return "found"

    async with at_work(app, groups=["old"]) as client:
        job = await client.enqueue(payload={}, task_group="old", metadata={"silo.task": "moved"})
        assert (await job.result(TIMEOUT_S)).result == "found"


async def test_no_more_tasks_run_than_it_is_told() -> None:
    app = App()
    running = most = 0

    async def run() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1

    @app.task(task_group="a")
    async def first() -> None:
        await run()

    @app.task(task_group="b")
    async def second() -> None:
        await run()

    async with at_work(app, max_concurrent_tasks=3):
        handles = await asyncio.gather(*(task.enqueue() for _ in range(10) for task in (first, second)))
        for handle in handles:
            await handle.result(TIMEOUT_S)
    assert most == 3


# Connection


async def test_an_app_finds_its_servers_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App()

    @app.task
    async def double(n: int) -> int:
        return 2 * n

    async with real_silo() as address:
        monkeypatch.setenv("SILO_SERVERS", f" {address} , 127.0.0.1:1,")
        async with app, app.worker():
            assert (await (await double.enqueue(4)).result(TIMEOUT_S)).result == 8
            assert address in repr(app)


async def test_what_is_configured_is_stronger_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILO_SERVERS", "127.0.0.1:1")
    app = App("127.0.0.1:2")
    async with real_silo() as address:
        app.configure(address)
        async with app:
            await app.client.refresh_topology()
            with pytest.raises(RuntimeError, match="the app is connected already"):
                app.configure("127.0.0.1:3")
        app.configure("127.0.0.1:3")
        assert "127.0.0.1:3" in repr(app)


def test_each_event_loop_gets_a_client_of_its_own() -> None:
    app = App("127.0.0.1:1")

    async def client() -> SiloGRPCClient:
        assert app.client is app.client
        return app.client

    assert asyncio.run(client()) is not asyncio.run(client())
    with pytest.raises(RuntimeError, match="no running event loop"):
        _ = app.client


async def test_a_closed_app_opens_a_client_again() -> None:
    app = App("127.0.0.1:1")
    first = app.client
    await app.close()
    await app.close()
    assert app.client is not first
    await app.close()


async def test_a_client_that_was_given_is_not_closed() -> None:
    app = App()
    async with connected(app) as client:
        async with app:
            assert app.client is client
        await client.refresh_topology()


async def test_settings_that_contradict_each_other_are_an_error() -> None:
    with pytest.raises(ConfigError):
        _ = App("http://127.0.0.1:1", tls=True).client


# In tests of an application


async def test_a_test_server_runs_the_tasks_of_an_app_until_none_is_due() -> None:
    app = App()
    order: list[int] = []

    @app.task
    async def first(n: int) -> None:
        order.append(n)
        await second.options(delay=60).enqueue(n + 1)

    @app.task(task_group="other")
    async def second(n: int) -> None:
        order.append(n)

    async with testing.server() as server:
        app.configure(client=server.client)
        await first.enqueue(1)
        assert (await server.run_until_idle(app.worker())).waiting == 1
        assert order == [1]
        await server.advance(minutes=1)
        assert (await server.run_until_idle(app.worker())).ended == 1
        assert order == [1, 2]
