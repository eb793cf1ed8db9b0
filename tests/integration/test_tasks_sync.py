"""Tasks from code that waits: the same calls, checks and results, without an event loop of its own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from silo import App, JobTimeoutError, SiloGRPCClient, TaskArgumentError, TaskResultError
from tests.integration.real_silo import real_silo

TIMEOUT_S = 20.0


@dataclass
class Point:
    x: int
    y: int = 0


@asynccontextmanager
async def at_work(app: App) -> AsyncIterator[SiloGRPCClient]:
    """A server in this process, and a worker with a client of its own."""
    async with real_silo() as address, SiloGRPCClient(address) as client:
        app.configure(address)
        async with app.worker(client):
            yield client


async def test_a_task_can_be_enqueued_and_waited_for() -> None:
    app = App()

    @app.task
    async def move(point: Point, *, by: int = 1) -> Point:
        return Point(point.x + by, point.y)

    def view() -> Point | None:
        handle = move.sync.enqueue(Point(1), by=5)
        assert move.sync.handle(handle.id).result(TIMEOUT_S).result == Point(6)
        return handle.result(TIMEOUT_S).result

    async with at_work(app):
        assert await asyncio.gather(*(asyncio.to_thread(view) for _ in range(4))) == [Point(6)] * 4


async def test_options_arguments_and_tenants_are_treated_as_in_async_code() -> None:
    app = App()

    @app.task(name="wait")
    async def wait(n: int) -> None: ...

    untyped: Any = wait

    def view() -> str:
        with pytest.raises(TaskArgumentError, match="task 'wait', parameter 'n'"):
            untyped.sync.enqueue("x")
        with pytest.raises(TaskArgumentError, match="task 'wait', parameter 'n': cannot encode"):
            wait.sync.enqueue(2**64)
        handle = wait.options(id="mine", delay=60, priority=7).sync.enqueue(1)
        with pytest.raises(JobTimeoutError):
            handle.result(0)
        assert (handle.job().priority, handle.job().metadata) == (7, {"silo.task": "wait"})
        handle.cancel()
        assert handle.result(TIMEOUT_S).status == "Cancelled"
        return handle.id

    async with at_work(app):
        assert await asyncio.to_thread(view) == "mine"


async def test_a_stored_result_of_another_type_is_told() -> None:
    app = App()

    @app.task(name="t")
    async def first() -> int:
        return 5

    other = App()

    @other.task(name="t")
    async def second() -> str:
        raise NotImplementedError

    def view() -> None:
        handle = first.sync.enqueue()
        assert handle.result(TIMEOUT_S).result == 5
        with pytest.raises(TaskResultError, match="Expected `str`, got `int`"):
            second.sync.handle(handle.id).result(TIMEOUT_S)

    async with at_work(app):
        other.configure(app.servers)
        await asyncio.to_thread(view)


async def test_in_async_code_it_raises_instead_of_blocking() -> None:
    app = App("127.0.0.1:1")

    @app.task
    async def task() -> None: ...

    with pytest.raises(RuntimeError, match="would block the event loop"):
        task.sync.enqueue()


async def test_a_client_of_an_event_loop_is_of_no_use() -> None:
    app = App()

    @app.task
    async def task() -> None: ...

    async with SiloGRPCClient("127.0.0.1:1") as client:
        app.configure(client=client)
        with pytest.raises(RuntimeError, match="which blocking code cannot use: give it servers"):
            await asyncio.to_thread(task.sync.enqueue)


def test_other_servers_take_the_place_of_those_before() -> None:
    app = App("127.0.0.1:1")

    @app.task
    async def task() -> None: ...

    before = task.sync.handle("x")
    app.configure("127.0.0.1:2")
    assert (before.id, app.servers) == ("x", ("127.0.0.1:2",))
