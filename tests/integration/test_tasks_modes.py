"""Tasks run on the event loop, in threads or in processes, and each way keeps the same promises."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import silo
from silo import App, Failure, Retry, RetryPolicy, SiloGRPCClient, TaskFunction
from tests.builders import until
from tests.integration.real_silo import real_silo

TIMEOUT_S = 30.0
FAST = RetryPolicy(retry_count=2, initial_interval_ms=1, max_interval_ms=1, randomize_interval=False)

# At the top of a module, since processes import them by name.
app = App()
notes: list[str] = []


@dataclass
class Point:
    x: int
    y: int = 0


class Odd(Exception):
    """It does not pickle: its constructor wants something else than its text."""

    def __init__(self, x: int, y: int) -> None:
        super().__init__(f"{x} and {y}")


def where(point: Point) -> list[Any]:
    context = silo.current_blocking_task()
    assert isinstance(point, Point)
    return [point.x, context.task.attempt_number, context.cancelled, os.getpid(), threading.get_ident()]


@app.task(execution="process")
def in_process(point: Point) -> list[Any]:
    return where(point)


@app.task
def in_thread(point: Point) -> list[Any]:
    return where(point)


@app.task
async def on_loop(point: Point) -> list[Any]:
    context = silo.current_task()
    return [point.x, context.task.attempt_number, context.cancelled, os.getpid(), threading.get_ident()]


def fail(kind: str) -> Point | Failure:
    match kind:
        case "key":
            raise KeyError("x")
        case "lookup":
            raise LookupError("x")
        case "odd":
            raise Odd(1, 2)
        case "own":
            return Failure("OWN", {"why": kind})
        case _:
            return Point(1)


@app.task(retry=FAST, retry_on=(LookupError, Odd), give_up_on=(KeyError,), execution="process")
def fail_in_process(kind: str) -> Point | Failure:
    return fail(kind)


@app.task(retry=FAST, retry_on=(LookupError, Odd), give_up_on=(KeyError,))
def fail_in_thread(kind: str) -> Point | Failure:
    return fail(kind)


@app.task(retry=FAST, retry_on=(LookupError, Odd), give_up_on=(KeyError,))
async def fail_on_loop(kind: str) -> Point | Failure:
    return fail(kind)


def wait_until_cancelled(started: str) -> None:
    Path(started).touch()
    assert silo.current_blocking_task().wait_cancelled(TIMEOUT_S)


@app.task(execution="process")
def wait_in_process(started: str) -> None:
    wait_until_cancelled(started)


@app.task
def wait_in_thread(started: str) -> None:
    wait_until_cancelled(started)


@app.task
async def sleep_on_loop() -> None:
    notes.append("started")
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        notes.append("interrupted")
        raise


@app.task(execution="process", timeout=0.3)
def sleep_in_process() -> None:
    time.sleep(60)


@app.task(timeout=0.05)
def sleep_in_thread(seconds: float) -> None:
    silo.current_blocking_task().wait_cancelled(seconds)


@app.task
def again(path: str) -> str:
    if not Path(path).exists():
        Path(path).touch()
        raise Retry(after=0.01)
    return f"attempt {silo.current_blocking_task().task.attempt_number}"


@app.task(execution="process", retry=FAST, retry_on=())
def die(path: str) -> str:
    if not Path(path).exists():
        Path(path).touch()
        os._exit(3)
    return "alive"


@asynccontextmanager
async def at_work(**options: Any) -> AsyncIterator[SiloGRPCClient]:
    async with real_silo() as address, SiloGRPCClient(address) as client:
        app.configure(client=client)
        async with app.worker(processes=1, **options):
            yield client


async def test_each_way_gives_the_function_its_arguments_and_its_context() -> None:
    async with at_work():
        ends = [
            (await (await task.enqueue(Point(7))).result(TIMEOUT_S)).result or []
            for task in (on_loop, in_thread, in_process)
        ]
    assert [end[:3] for end in ends] == [[7, 1, False]] * 3
    loop, thread, process = (tuple(end[3:]) for end in ends)
    here = (os.getpid(), threading.get_ident())
    assert loop == here
    assert thread[0] == here[0]
    assert thread[1] != here[1]
    assert process[0] != here[0]


@pytest.mark.parametrize("task", [fail_on_loop, fail_in_thread, fail_in_process], ids=lambda task: task.name)
@pytest.mark.parametrize(
    ("kind", "code", "name", "attempts"),
    [
        ("key", "HANDLER_ERROR", "KeyError", 1),
        ("lookup", "HANDLER_ERROR", "LookupError", 3),
        ("odd", "HANDLER_ERROR", "Odd", 3),
        ("own", "OWN", None, 3),
    ],
)
async def test_each_way_follows_the_same_rules_about_exceptions(
    task: TaskFunction[[str], Point | Failure], kind: str, code: str, name: str | None, attempts: int
) -> None:
    async with at_work():
        handle = await task.enqueue(kind)
        end = await handle.result(TIMEOUT_S)
        assert (end.status, end.error_code, end.error_data.get("name")) == ("Failed", code, name)
        assert len((await handle.job(include_attempts=True)).attempts or ()) == attempts
        assert (await (await task.enqueue("none")).result(TIMEOUT_S)).result == Point(1)


@pytest.mark.parametrize("task", [wait_in_thread, wait_in_process], ids=lambda task: task.name)
async def test_a_task_that_waits_hears_that_its_job_is_cancelled(
    task: TaskFunction[[str], None], tmp_path: Path
) -> None:
    async with at_work():
        handle = await task.enqueue(str(tmp_path / "started"))
        await until((tmp_path / "started").exists)
        await handle.cancel()
        assert (await handle.result(TIMEOUT_S)).status == "Cancelled"


async def test_an_async_task_is_interrupted_if_that_is_asked_for() -> None:
    async with at_work(interrupts=True):
        handle = await sleep_on_loop.enqueue()
        await until(lambda: notes == ["started"])
        await handle.cancel()
        assert (await handle.result(TIMEOUT_S)).status == "Cancelled"
    assert notes == ["started", "interrupted"]


async def test_a_timeout_ends_a_process_and_goes_on_without_a_thread() -> None:
    async with at_work():
        in_process, in_thread = await sleep_in_process.enqueue(), await sleep_in_thread.enqueue(60.0)
        assert [(await handle.result(TIMEOUT_S)).error_code for handle in (in_process, in_thread)] == [
            "TIMEOUT",
            "TIMEOUT",
        ]


async def test_a_retry_does_not_count_as_an_attempt(tmp_path: Path) -> None:
    async with at_work():
        end = await (await again.enqueue(str(tmp_path / "x"))).result(TIMEOUT_S)
        assert end.result == "attempt 1"


async def test_a_crash_of_a_process_is_repeated_whatever_exceptions_are_not(tmp_path: Path) -> None:
    async with at_work():
        handle = await die.enqueue(str(tmp_path / "x"))
        assert (await handle.result(TIMEOUT_S)).result == "alive"
        assert len((await handle.job(include_attempts=True)).attempts or ()) == 2


async def test_blocking_tasks_run_side_by_side() -> None:
    async with at_work(max_concurrent_tasks=8):
        began = time.monotonic()
        handles = await asyncio.gather(*(nap.enqueue() for _ in range(8)))
        for handle in handles:
            await handle.result(TIMEOUT_S)
        assert time.monotonic() - began < 8 * 0.2


@app.task
def nap() -> None:
    time.sleep(0.2)
