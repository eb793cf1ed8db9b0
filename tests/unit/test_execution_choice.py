"""A handler that cannot run as it is asked for is refused beforehand, with the way out."""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import pytest

from silo import TaskContext
from silo.worker.execution.blocking import BlockingTaskContext
from silo.worker.execution.choice import ExecutionKind, execution_for
from silo.worker.execution.fitting import name_of
from silo.worker.execution.inline import AsyncExecution
from silo.worker.execution.processes import ProcessExecution
from silo.worker.execution.threads import ThreadExecution

HERE = __name__


async def an_async_function(ctx: TaskContext[Any, Any]) -> None: ...


def a_function(ctx: BlockingTaskContext[Any, Any]) -> None: ...


def a_function_with_an_awaitable(ctx: TaskContext[Any, Any]) -> Awaitable[None]:
    return an_async_function(ctx)


def a_function_without_annotations(ctx):
    return None


def a_generator(ctx: BlockingTaskContext[Any, Any]) -> Generator[int]:
    yield 1


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


@logged
async def a_wrapped_async_function(ctx: TaskContext[Any, Any]) -> None: ...


@logged
def a_wrapped_function(ctx: BlockingTaskContext[Any, Any]) -> None: ...


hidden = logged(a_function)  # Looks like it, and is found under another name.
a_lambda = lambda ctx: an_async_function(ctx)  # noqa: E731, PLW0108  # It is what the test is about.


class AnAsyncObject:
    async def __call__(self, ctx: TaskContext[Any, Any]) -> None: ...

    async def method(self, ctx: TaskContext[Any, Any]) -> None: ...


class AnObject:
    def __call__(self, ctx: BlockingTaskContext[Any, Any]) -> None: ...

    def method(self, ctx: BlockingTaskContext[Any, Any]) -> None: ...


ASYNC = [
    an_async_function,
    a_function_with_an_awaitable,
    a_wrapped_async_function,
    functools.partial(an_async_function),
    AnAsyncObject(),
    AnAsyncObject().method,
    a_lambda,
]
PLAIN = [
    a_function,
    a_function_without_annotations,
    a_wrapped_function,
    functools.partial(a_function),
    AnObject(),
    AnObject().method,
]
KINDS: list[ExecutionKind] = ["async", "thread", "process"]


@pytest.mark.parametrize("handler", ASYNC)
def test_what_gives_an_awaitable_can_be_async(handler: Any) -> None:
    assert isinstance(execution_for("async", handler, concurrency=1), AsyncExecution)


@pytest.mark.parametrize("handler", PLAIN)
def test_what_is_plain_can_run_in_a_thread_or_a_process(handler: Any) -> None:
    assert isinstance(execution_for("thread", handler, concurrency=1), ThreadExecution)
    assert isinstance(execution_for("process", handler, concurrency=1), ProcessExecution)


@pytest.mark.parametrize(
    "handler", [a_function, a_function_without_annotations, hidden, functools.partial(a_function)]
)
def test_a_plain_function_is_no_async_handler(handler: Any) -> None:
    with pytest.raises(TypeError, match=f"{HERE}.a_function.*async def.*'thread'.*'process'"):
        execution_for("async", handler, concurrency=1)


@pytest.mark.parametrize("kind", ["thread", "process"])
@pytest.mark.parametrize(
    "handler", [an_async_function, logged(an_async_function), functools.partial(an_async_function)]
)
def test_an_async_function_runs_in_no_thread_and_no_process(kind: ExecutionKind, handler: Any) -> None:
    with pytest.raises(TypeError, match=f"{HERE}.an_async_function is an async function.*'{kind}'.*'async'"):
        execution_for(kind, handler, concurrency=1)


@pytest.mark.parametrize("kind", ["thread", "process"])
@pytest.mark.parametrize("handler", [AnAsyncObject(), AnAsyncObject().method])
def test_an_object_that_is_called_async_is_no_better(kind: ExecutionKind, handler: Any) -> None:
    with pytest.raises(TypeError, match="AnAsyncObject"):
        execution_for(kind, handler, concurrency=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_is_no_handler(kind: ExecutionKind) -> None:
    with pytest.raises(TypeError, match="a_generator is a generator"):
        execution_for(kind, a_generator, concurrency=1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_called_is_no_handler(kind: ExecutionKind) -> None:
    not_a_handler: Any = "resize"
    with pytest.raises(TypeError, match="not a str"):
        execution_for(kind, not_a_handler, concurrency=1)


def test_processes_cannot_import_a_lambda() -> None:
    with pytest.raises(ValueError, match=r"<lambda> cannot be imported.*so no lambda"):
        execution_for("process", lambda ctx: None, concurrency=1)


def test_processes_cannot_import_a_function_within_a_function() -> None:
    def inner(ctx: BlockingTaskContext[Any, Any]) -> None: ...

    with pytest.raises(ValueError, match=r"inner cannot be imported.*in another function"):
        execution_for("process", inner, concurrency=1)


def test_processes_cannot_import_what_a_decorator_hides() -> None:
    with pytest.raises(ValueError, match=r"a_function cannot be imported.*under its name"):
        execution_for("process", hidden, concurrency=1)


def test_an_option_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="leave interrupts out"):
        execution_for("thread", a_function, concurrency=1, interrupts=True)
    with pytest.raises(TypeError, match="recycles processes"):
        execution_for("thread", a_function, concurrency=1, recycle_above_mb=100)
    with pytest.raises(TypeError, match="recycles processes"):
        execution_for("async", an_async_function, concurrency=1, recycle_after_jobs=100)


def test_an_unknown_kind_is_refused() -> None:
    unknown: Any = "threads"
    with pytest.raises(ValueError, match="'async', 'thread' or 'process', not 'threads'"):
        execution_for(unknown, a_function, concurrency=1)


@pytest.mark.parametrize(
    ("kind", "options", "problem"),
    [
        ("thread", {"concurrency": 0}, "threads must be at least 1, not 0"),
        ("process", {"concurrency": 0}, "processes must be at least 1, not 0"),
        ("process", {"concurrency": 1, "recycle_after_jobs": 0}, "recycle_after_jobs must be at least 1"),
        ("process", {"concurrency": 1, "recycle_above_mb": -1}, "recycle_above_mb must be at least 1"),
        ("process", {"concurrency": 1, "cancel_grace_s": -1.0}, "cancel_grace_s must not be negative"),
        ("process", {"concurrency": 1, "cancel_grace_s": float("nan")}, "cancel_grace_s must not be"),
    ],
)
def test_a_number_out_of_range_is_refused(kind: ExecutionKind, options: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        execution_for(kind, a_function, **options)


def test_a_partial_may_bring_a_name_of_its_own() -> None:
    handler = functools.partial(a_function)
    assert name_of(handler) == f"{HERE}.a_function"
    handler.__module__, handler.__qualname__ = "myapp", "resize"
    assert name_of(handler) == "myapp.resize"


async def test_closing_what_never_ran_is_harmless() -> None:
    for kind, handler in (("async", an_async_function), ("thread", a_function), ("process", a_function)):
        execution = execution_for(kind, handler, concurrency=1)
        await asyncio.gather(execution.close(), execution.close())
