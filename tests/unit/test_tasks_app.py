"""What can be declared as a task, and what is refused when it is declared or when a worker starts."""

import pickle
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from silo import App


async def an_async_function() -> None: ...


def a_function() -> None: ...


async def an_async_generator() -> AsyncIterator[int]:
    yield 1


def a_generator() -> Iterator[int]:
    yield 1


app = App()


@app.task
def declared() -> int:
    return 1


def test_functions_run_where_they_can() -> None:
    app = App()
    assert app.task(an_async_function).declared.execution == "async"
    assert app.task(name="b")(a_function).declared.execution == "thread"
    assert app.task(name="c", execution="process")(a_function).declared.execution == "process"


@pytest.mark.parametrize(
    ("function", "execution", "text"),
    [
        (an_async_function, "thread", "cannot run with execution='thread': leave execution out"),
        (an_async_function, "process", "cannot run with execution='process': leave execution out"),
        (a_function, "async", 'cannot run with execution=\'async\': use "thread" or "process"'),
        (a_generator, None, "a_generator is a generator"),
        (an_async_generator, None, "an_async_generator is a generator"),
        (print, None, "a task is made of a function, not of a builtin_function_or_method"),
        (5, None, "a task is made of a function, not of a int"),
    ],
)
def test_what_cannot_run_is_refused(function: Any, execution: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        App().task(execution=execution)(function)


@pytest.mark.parametrize("timeout", [0, -1.5])
def test_a_timeout_is_positive(timeout: float) -> None:
    with pytest.raises(ValueError, match=f"timeout must be positive, not {timeout}"):
        App().task(timeout=timeout)


def test_two_functions_cannot_have_one_name() -> None:
    app = App()
    app.task(name="t")(a_function)
    with pytest.raises(ValueError, match="there is another task 't'; give one of them a name of its own"):
        app.task(name="t")(an_async_function)
    assert list(app.tasks) == ["t"]


def test_a_module_may_be_executed_twice() -> None:
    app = App()
    first, second = app.task(name="t")(a_function), app.task(name="t")(a_function)
    assert app.tasks["t"] is second is not first


def test_names_and_groups_are_those_of_the_function_and_the_app_unless_given() -> None:
    app = App(task_group="mine")
    first = app.task(an_async_function)
    second = app.task(name="x", task_group="other")(a_function)
    assert first.name == "tests.unit.test_tasks_app.an_async_function"
    assert repr(first) == f"<task {first.name!r} of group 'mine'>"
    assert (second.name, app.task_groups) == ("x", ("mine", "other"))
    with pytest.raises(TypeError):
        app.tasks["y"] = second  # type: ignore[index]


def test_a_task_goes_to_other_processes_by_reference() -> None:
    assert pickle.loads(pickle.dumps(declared)) is declared


def test_an_app_without_tasks_has_no_worker() -> None:
    with pytest.raises(ValueError, match="the app has no tasks: import the modules that declare them"):
        App().worker()


def test_a_lifespan_is_a_context_manager() -> None:
    with pytest.raises(TypeError, match=r"is no context manager: add @contextlib\.asynccontextmanager"):
        App().lifespan(an_async_generator)  # type: ignore[arg-type]


async def test_a_task_with_a_type_that_has_no_form_is_refused_when_it_is_used() -> None:
    app = App()

    @app.task(name="t")
    async def wrong(path: Path) -> None: ...

    with pytest.raises(TypeError, match=r"task 't': 'path': pathlib\.Path has no form"):
        await wrong.enqueue(Path("x"))
    with pytest.raises(TypeError, match=r"task 't': 'path': pathlib\.Path has no form"):
        app.worker()


def test_a_task_that_no_process_can_import_is_refused_when_the_worker_is_made() -> None:
    app = App()

    @app.task(execution="process")
    def local() -> None: ...

    with pytest.raises(ValueError, match="cannot be imported by other processes"):
        app.worker()


@pytest.mark.parametrize("option", ["max_concurrent_tasks", "processes", "recycle_after_jobs"])
def test_an_option_of_zero_is_refused_by_name(option: str) -> None:
    options: dict[str, Any] = {option: 0}
    with pytest.raises(ValueError, match=f"{option} must be at least 1, not 0"):
        app.worker(**options)


def test_a_worker_says_what_it_serves() -> None:
    app = App()
    app.task(name="a", task_group="g")(a_function)
    app.task(name="b", task_group="h")(an_async_function)
    worker = app.worker(groups=["h"], worker_id="w", max_concurrent_tasks=3)
    assert (worker.tasks, worker.task_groups, worker.max_concurrent_tasks) == (("b",), ("h",), 3)
    assert repr(worker) == "AppWorker('w', h, 1 tasks)"
    assert repr(app) == "App(2 tasks in 2 groups, Connection(127.0.0.1:7450))"
