"""Plain handlers run in processes of their own, which end with them at worst, and never with the worker."""

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from silo import Failure, Retry
from silo.worker.execution.errors import HandlerCrashed, HandlerTimeout, RemoteError, RemoteTraceback
from silo.worker.execution.processes import ProcessExecution
from tests.builders import until
from tests.contexts import a_context
from tests.integration import execution_handlers as handlers

MB = 2**20


@asynccontextmanager
async def processes(count: int = 1, **options: Any) -> AsyncIterator[ProcessExecution]:
    execution = ProcessExecution(count, **options)
    try:
        yield execution
    finally:
        await execution.close()
        assert "0 of" in repr(execution)


async def run(execution: ProcessExecution, handler: Any, payload: Any = None, **options: Any) -> Any:
    return await execution.run(handler, a_context(payload), **{"timeout_s": None} | options)


async def error_of(execution: ProcessExecution, handler: Any, payload: Any = None) -> Exception:
    with pytest.raises(Exception) as raised:  # Which one is what the test asks.
        await run(execution, handler, payload)
    return raised.value


def is_alive(pid: int) -> bool:
    """Whether it still runs; one that only waits to be reaped does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


class Saying:
    """The file that a handler of a test writes into."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "said")

    @property
    def words(self) -> list[str]:
        path = Path(self.path)
        return path.read_text().split() if path.exists() else []

    async def pid(self) -> int:
        """Wait until the handler has begun."""
        await until(lambda: bool(self.words))
        return int(self.words[0])


@pytest.fixture
def said(tmp_path: Path) -> Saying:
    return Saying(tmp_path)


# Values


@pytest.mark.parametrize("value", [None, 7, "text", b"bytes", {"a": [1, 2.5]}, Failure("CODE")])
async def test_it_returns_what_the_handler_returns(value: Any) -> None:
    async with processes() as execution:
        assert await run(execution, handlers.payload, value) == value


async def test_the_handler_gets_its_task_in_the_main_thread_of_another_process() -> None:
    async with processes() as execution:
        context = a_context({"a": 1})
        assert await execution.run(handlers.task, context, timeout_s=None) == context.task
        assert await run(execution, handlers.is_in_main_thread)
        assert await run(execution, handlers.pid) != os.getpid()


async def test_outcomes_come_back_as_they_are() -> None:
    async with processes() as execution:
        assert await run(execution, handlers.an_outcome) == Failure("NOT_TODAY", {"why": "rain"})
        retry = await error_of(execution, handlers.a_retry)
        assert isinstance(retry, Retry)
        assert retry.after_s == 7


async def test_64_mb_pass_in_both_directions_and_the_loop_goes_on() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async with processes() as execution:
        await run(execution, handlers.nothing)
        counting = asyncio.create_task(count())
        assert await run(execution, handlers.size, bytes(64 * MB)) == 64 * MB
        assert turns > 50
        turns = 0
        assert await run(execution, handlers.many_bytes, 64 * MB) == bytes(64 * MB)
        assert turns > 50
        counting.cancel()


async def test_a_result_that_does_not_pickle_fails_its_job_only() -> None:
    async with processes() as execution:
        pid = await run(execution, handlers.pid)
        error = await error_of(execution, handlers.unpicklable)
        assert isinstance(error, TypeError)
        assert "execution_handlers.unpicklable returned cannot leave its process" in str(error)
        assert await run(execution, handlers.pid) == pid


async def test_a_result_that_cannot_be_read_fails_its_job_only() -> None:
    async with processes() as execution:
        error = await error_of(execution, handlers.unreadable)
        assert isinstance(error, TypeError)
        assert "execution_handlers.unreadable returned cannot be read" in str(error)
        assert await run(execution, handlers.payload, "next") == "next"


async def test_a_task_that_does_not_pickle_fails_without_a_process() -> None:
    async with processes() as execution:
        error = await error_of(execution, handlers.payload, (n for n in ()))
        assert isinstance(error, TypeError)
        assert "task of tests.integration.execution_handlers.payload cannot enter" in str(error)
        assert "0 of 1 processes" in repr(execution)


# Errors


async def test_an_exception_comes_as_itself_with_where_it_was_raised() -> None:
    async with processes() as execution:
        error = await error_of(execution, handlers.raise_pickled)
    assert isinstance(error, handlers.PickledError)
    assert error.number == 7
    cause = error.__cause__
    assert isinstance(cause, RemoteTraceback)
    assert cause.data["name"] == "PickledError"
    assert cause.data["message"] == "pickled 7"
    assert cause.data["code"] == "PICKLED"
    assert "in raise_pickled" in cause.data["stack"]
    assert cause.data["stack"] in str(cause)


async def test_an_exception_with_a_constructor_of_its_own_comes_as_itself() -> None:
    async with processes() as execution:
        strange = await error_of(execution, handlers.raise_strange)
        longer = await error_of(execution, handlers.raise_longer)
    assert isinstance(strange, handlers.StrangeError)
    assert (str(strange), strange.number) == ("strange 7", 7)
    assert isinstance(longer, handlers.LongerError)
    assert str(longer) == "longer text"


async def test_an_exception_that_does_not_pickle_comes_as_its_texts() -> None:
    async with processes() as execution:
        pid = await run(execution, handlers.pid)
        error = await error_of(execution, handlers.raise_unpickled)
        assert await run(execution, handlers.pid) == pid
    assert isinstance(error, RemoteError)
    assert (error.name, error.message, error.code) == ("UnpickledError", "unpickled 7", "UNPICKLED")
    assert str(error) == "UnpickledError: unpickled 7"
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "in raise_unpickled" in error.__cause__.data["stack"]


async def test_the_class_of_an_exception_is_not_imported_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign_errors.py").write_text("class ForeignError(Exception): ...")
    monkeypatch.syspath_prepend(tmp_path)
    async with processes() as execution:
        error = await error_of(execution, handlers.raise_foreign)
    assert isinstance(error, RemoteError)
    assert (error.name, error.message, error.code) == ("ForeignError", "far away", None)
    assert "foreign_errors" not in sys.modules


async def test_a_cancelled_error_of_a_handler_does_not_look_like_an_interruption() -> None:
    async with processes() as execution:
        error = await error_of(execution, handlers.raise_cancelled)
    assert isinstance(error, RemoteError)
    assert error.name == "CancelledError"


async def test_a_handler_may_raise_what_coroutines_cannot() -> None:
    async with processes() as execution:
        assert "StopIteration" in str(await error_of(execution, handlers.raise_stop_iteration))


async def test_a_module_that_does_not_import_fails_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fickle.py").write_text(
        "import sys\nif len(sys.argv) > 1 and sys.argv[1] == 'child': raise ImportError('not twice')\n"
        "def handler(ctx): ..."
    )
    monkeypatch.syspath_prepend(tmp_path)
    import fickle  # noqa: PLC0415

    monkeypatch.setattr(sys, "argv", ["worker", "child"])
    async with processes() as execution:
        for _ in range(2):
            error = await error_of(execution, fickle.handler)
            assert isinstance(error, ImportError)
            assert "not twice" in str(error)
        assert await run(execution, handlers.payload, 7) == 7


# Crashes


@pytest.mark.parametrize(
    ("handler", "payload", "exit_code", "text"),
    [
        (handlers.exit_at_once, 3, 3, "ended with exit code 3"),
        (handlers.exit_at_once, 0, 0, "ended with exit code 0"),
        (handlers.exit_politely, 4, 4, "ended with exit code 4"),
        (handlers.exit_politely, "a reason", 1, "ended with exit code 1"),
        (handlers.die_of, signal.SIGKILL, -9, "died of SIGKILL, as when the system runs out of memory"),
        (handlers.die_of, signal.SIGABRT, -6, "died of SIGABRT"),
        (handlers.die_of, signal.SIGRTMIN + 3, -signal.SIGRTMIN - 3, "died of signal 37"),
        (handlers.fault, None, -11, "died of SIGSEGV"),
    ],
)
async def test_a_crash_names_what_it_was_and_costs_one_job(
    handler: Any, payload: Any, exit_code: int, text: str
) -> None:
    async with processes() as execution:
        error = await error_of(execution, handler, payload)
        assert isinstance(error, HandlerCrashed)
        assert error.exit_code == exit_code
        assert f"execution_handlers.{handler.__name__} {text}" in str(error)
        assert await run(execution, handlers.payload, "next") == "next"


async def test_a_crash_leaves_other_processes_alone(said: Saying) -> None:
    async with processes(2) as execution:
        context = a_context(said.path)
        other = asyncio.create_task(execution.run(handlers.wait_cancelled, context, timeout_s=None))
        await said.pid()
        assert isinstance(await error_of(execution, handlers.exit_at_once, 1), HandlerCrashed)
        context.cancellation_signal.abort()
        assert await other == (False, True, True)


async def test_a_process_whose_threads_do_not_end_is_ended() -> None:
    async with processes() as execution:
        assert isinstance(await error_of(execution, handlers.exit_with_a_thread_left), HandlerCrashed)


async def test_a_crash_shows_although_a_forked_process_holds_the_socket(said: Saying) -> None:
    async with processes() as execution:
        error = await error_of(execution, handlers.fork_and_die, said.path)
        assert isinstance(error, HandlerCrashed)
        assert error.exit_code == 3
    os.kill(await said.pid(), signal.SIGKILL)


async def test_an_idle_process_that_died_costs_no_job() -> None:
    async with processes() as execution:
        pid = await run(execution, handlers.pid)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not Path(f"/proc/{pid}").exists())
        assert await run(execution, handlers.pid) != pid


async def test_the_end_of_a_process_shows_without_the_help_of_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    async with processes() as execution:
        pid = await run(execution, handlers.pid)
        error = await error_of(execution, handlers.exit_at_once, 3)
        assert isinstance(error, HandlerCrashed)
        assert error.exit_code == 3
        assert await run(execution, handlers.pid) != pid
    await until(lambda: not any(thread.name.startswith("silo-child") for thread in threading.enumerate()))


async def test_a_process_that_does_not_start_fails_its_job_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async with processes() as execution:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/nowhere/python")
            assert isinstance(await error_of(execution, handlers.nothing), FileNotFoundError)
        assert await run(execution, handlers.payload, 7) == 7


# Time


async def test_a_handler_out_of_time_is_ended(said: Saying) -> None:
    async with processes() as execution:
        with pytest.raises(HandlerTimeout, match=r"did not end within 0\.5 s"):
            await run(execution, handlers.sleep_and_clean_up, said.path, timeout_s=0.5)
        pid = await said.pid()
        await until(lambda: not is_alive(pid))
        assert said.words == [str(pid), "clean"]
        assert await run(execution, handlers.payload, "next", timeout_s=10) == "next"


async def test_a_handler_that_does_not_let_itself_be_ended_is_killed(said: Saying) -> None:
    async with processes() as execution:
        started = time.monotonic()
        with pytest.raises(HandlerTimeout):
            await run(execution, handlers.never_end, said.path, timeout_s=0.5)
        assert time.monotonic() - started < 3  # The caller does not wait for that.
        pid = await said.pid()
        assert await run(execution, handlers.payload, "next") == "next"  # It waits for the place.
        assert not is_alive(pid)
        assert said.words == [str(pid), "stubborn"]


async def test_programs_that_a_handler_has_started_end_with_it(said: Saying) -> None:
    async with processes() as execution:
        with pytest.raises(HandlerTimeout):
            await run(execution, handlers.run_another_program, said.path, timeout_s=1)
        _, program = map(int, said.words)
        await until(lambda: not is_alive(program))


async def test_time_does_not_run_while_a_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_import.py").write_text("import time; time.sleep(1.2)\ndef handler(ctx): return 7")
    monkeypatch.syspath_prepend(tmp_path)
    import slow_import  # noqa: PLC0415

    async with processes() as execution:
        assert await run(execution, slow_import.handler, timeout_s=1) == 7


# Cancellation


@pytest.mark.parametrize(
    ("handler", "result"),
    [(handlers.wait_cancelled, (False, True, True)), (handlers.spin_until_cancelled, "seen")],
)
async def test_a_handler_sees_that_its_job_is_cancelled(said: Saying, handler: Any, result: Any) -> None:
    async with processes() as execution:
        context = a_context(said.path)
        running = asyncio.create_task(execution.run(handler, context, timeout_s=None))
        pid = await said.pid()
        context.cancellation_signal.abort()
        assert await running == result
        assert await run(execution, handlers.pid) == pid


async def test_a_handler_that_does_not_look_is_ended_after_its_grace(said: Saying) -> None:
    async with processes(cancel_grace_s=0.1) as execution:
        context = a_context(said.path)
        running = asyncio.create_task(execution.run(handlers.sleep_and_clean_up, context, timeout_s=None))
        pid = await said.pid()
        context.cancellation_signal.abort()
        await asyncio.wait({running})
        assert running.cancelled()
        assert running.cancelling() == 0
        await until(lambda: not is_alive(pid))
        assert said.words == [str(pid), "clean"]


async def test_a_caller_that_is_cancelled_ends_its_handler(said: Saying) -> None:
    async with processes() as execution:
        running = asyncio.create_task(run(execution, handlers.sleep, said.path))
        pid = await said.pid()
        running.cancel()
        await asyncio.wait({running})
        assert running.cancelled()
        assert running.cancelling() == 1
        await until(lambda: not is_alive(pid))


async def test_a_handler_cancels_its_job() -> None:
    told = []

    async def tell_the_server() -> None:
        await asyncio.sleep(0)
        told.append("told")

    async with processes() as execution:
        context = a_context(on_cancel=tell_the_server)
        assert await execution.run(handlers.cancel, context, timeout_s=None) is True
    assert told == ["told"]


async def test_a_cancel_that_fails_is_told_to_the_handler() -> None:
    async def fail() -> None:
        raise ConnectionError("no server" + 5000 * "!")

    async with processes() as execution:
        with pytest.raises(RuntimeError, match="could not cancel the job: no server!!!"):
            await execution.run(handlers.cancel, a_context(on_cancel=fail), timeout_s=None)


async def test_a_cancel_without_an_answer_does_not_outlast_the_grace() -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    async with processes(cancel_grace_s=0.1) as execution:
        context = a_context(on_cancel=hang)
        with pytest.raises(asyncio.CancelledError):
            await execution.run(handlers.cancel, context, timeout_s=None)


async def test_a_thread_that_a_handler_left_behind_cancels_no_other_job() -> None:
    async with processes() as execution:
        pid = await run(execution, handlers.cancel_in_the_next_job)
        refusal = "the worker could not cancel the job: the handler has ended"
        assert await run(execution, handlers.be_the_next_job) == (pid, (refusal, False), False)


async def test_a_cancel_that_outlasts_its_job_does_not_hold_up_the_next_one() -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    async with processes() as execution:
        context = a_context(on_cancel=hang)
        pid = await execution.run(handlers.end_while_a_thread_cancels, context, timeout_s=None)
        assert await run(execution, handlers.cancel, timeout_s=10) is True
        assert await run(execution, handlers.pid) == pid


async def test_a_caller_that_is_cancelled_at_any_moment_leaves_nothing_behind() -> None:
    before = open_files()
    for turns in range(12):  # From the start of a process to the import of its handler.
        async with processes() as execution:
            running = asyncio.create_task(run(execution, handlers.nothing))
            for _ in range(turns):
                await asyncio.sleep(0)
            running.cancel()
            await asyncio.wait({running})
            assert running.cancelled()
    await until(lambda: open_files() == before)


async def test_a_job_that_is_cancelled_in_line_is_not_begun(said: Saying) -> None:
    async with processes() as execution:
        first = asyncio.create_task(run(execution, handlers.sleep, said.path))
        await said.pid()
        context = a_context(said.path)
        second = asyncio.create_task(execution.run(handlers.sleep, context, timeout_s=None))
        await asyncio.sleep(0)
        context.cancellation_signal.abort()
        await asyncio.wait({second})
        assert second.cancelled()
        first.cancel()
        await asyncio.wait({first})
        assert len(said.words) == 1


# Processes


async def test_processes_start_when_they_are_needed_and_are_used_again() -> None:
    async with processes(3) as execution:
        assert "0 of 3 processes, 0 idle" in repr(execution)
        assert len({await run(execution, handlers.pid) for _ in range(5)}) == 1
        assert "1 of 3 processes, 1 idle" in repr(execution)
        await asyncio.gather(*(run(execution, handlers.nothing) for _ in range(9)))
        assert "3 of 3 processes, 3 idle" in repr(execution)


async def test_a_process_is_replaced_after_so_many_jobs() -> None:
    async with processes(recycle_after_jobs=3) as execution:
        pids = [await run(execution, handlers.pid) for _ in range(7)]
    assert len(set(pids)) == 3
    assert pids[0] == pids[2] != pids[3] == pids[5] != pids[6]


async def test_jobs_that_fail_count_as_well() -> None:
    async with processes(recycle_after_jobs=2) as execution:
        pid = await run(execution, handlers.pid)
        await error_of(execution, handlers.raise_value_error)
        assert await run(execution, handlers.pid) != pid


async def test_a_process_that_has_grown_is_replaced() -> None:
    async with processes(recycle_above_mb=150) as execution:
        pids = [await run(execution, handlers.grow, 10 * MB), await run(execution, handlers.grow, 200 * MB)]
        assert pids[0] == pids[1]
        assert await run(execution, handlers.pid) != pids[0]
        assert not is_alive(pids[0])


async def test_a_thousand_jobs_through_two_processes_are_all_done_once_and_in_their_order() -> None:
    async with processes(2, recycle_after_jobs=150) as execution:
        turns = await asyncio.gather(*(run(execution, handlers.turn, number) for number in range(1000)))
    assert [number for _, _, number in turns] == list(range(1000))
    assert len({(pid, turn) for pid, turn, _ in turns}) == 1000
    assert sorted(turns, key=lambda each: (each[0], each[1])) == sorted(
        turns, key=lambda each: (each[0], each[2])
    )


async def test_a_handler_has_neither_our_input_nor_our_sockets_and_ctrl_c_is_not_for_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.set_inheritable(True)
        async with processes() as execution:
            assert await run(execution, handlers.listening_ports) == []
            assert await run(execution, handlers.stdin_and_interrupt) == ("", True)


async def test_signals_for_all_processes_of_a_service_leave_handlers_to_the_worker(said: Saying) -> None:
    async with processes() as execution:
        context = a_context(said.path)
        running = asyncio.create_task(execution.run(handlers.wait_cancelled, context, timeout_s=None))
        pid = await said.pid()
        assert os.getsid(pid) == pid != os.getsid(0)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
        assert await run_beside(running)
        context.cancellation_signal.abort()
        assert await running == (False, True, True)
        assert await run(execution, handlers.pid) == pid


async def run_beside(running: asyncio.Task[Any]) -> bool:
    """Whether it still runs after a while in which it might have died."""
    await asyncio.wait({running}, timeout=0.2)
    return not running.done()


async def test_processes_that_a_handler_forks_can_be_terminated() -> None:
    async with processes() as execution:
        assert await run(execution, handlers.terminate_a_forked_process) == -signal.SIGTERM


async def test_a_process_imports_nothing_that_its_handlers_do_not() -> None:
    async with processes() as execution:
        imported = set(await run(execution, handlers.modules))
        assert not imported & {"grpc", "slatedb", "silo.client.client", "uvloop", "pytest"}


async def test_a_handler_may_import_all_of_silo() -> None:
    async with processes() as execution:
        assert await run(execution, handlers.names_of_silo) == [True, True, "no such name", True]


async def test_threads_of_a_handler_may_import_silo_at_the_same_time() -> None:
    async with processes() as execution:
        assert await run(execution, handlers.silo_in_two_threads) == ["SiloWorker", "SiloWorker"]


# The end


async def test_closing_interrupts_what_runs_and_what_waits_and_ends_all_processes(said: Saying) -> None:
    execution = ProcessExecution(2)
    idle = await run(execution, handlers.pid)
    running = asyncio.create_task(run(execution, handlers.never_end, said.path))
    pid = await said.pid()
    others = [asyncio.create_task(run(execution, handlers.sleep, said.path)) for _ in range(3)]
    await until(lambda: len(said.words) == 2)
    started = time.monotonic()
    await asyncio.gather(execution.close(), execution.close())
    await execution.close()
    assert time.monotonic() - started < 10
    await asyncio.wait([running, *others])
    assert [task.cancelled() for task in (running, *others)] == [True] * 4
    assert not any(map(is_alive, (idle, pid, int(said.words[1]))))
    assert "0 of 2 processes, 0 idle" in repr(execution)


async def test_closing_interrupts_processes_that_start() -> None:
    execution = ProcessExecution(1)
    starting = asyncio.create_task(run(execution, handlers.nothing))
    await until(lambda: "1 of 1" in repr(execution))
    await execution.close()
    await asyncio.wait({starting})
    assert starting.cancelled()
    assert "0 of 1" in repr(execution)


async def test_a_closed_execution_begins_anew() -> None:
    async with processes(2) as execution:
        pid = await run(execution, handlers.pid)
        await execution.close()
        assert not is_alive(pid)
        assert await run(execution, handlers.pid) != pid


async def test_nothing_is_left_open() -> None:
    before = open_files()
    for _ in range(3):
        async with processes(2) as execution:
            await asyncio.gather(*(run(execution, handlers.nothing) for _ in range(4)))
            await error_of(execution, handlers.exit_at_once, 1)
    await until(lambda: open_files() == before)
    assert asyncio.all_tasks() == {asyncio.current_task()}


WORKER = """
import asyncio, sys
from silo.worker.execution.processes import ProcessExecution
from tests.contexts import a_context
from tests.integration import execution_handlers as handlers

async def main():
    execution = ProcessExecution(2)
    idle = await execution.run(handlers.pid, a_context(), timeout_s=None)
    print(idle, flush=True)
    await asyncio.gather(*(
        execution.run(getattr(handlers, sys.argv[1]), a_context(sys.argv[2]), timeout_s=None)
        for _ in range(int(sys.argv[3]))
    ))
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize(("handler", "count"), [("nothing", 2), ("sleep", 1), ("sleep", 2), ("never_end", 2)])
async def test_all_processes_end_when_the_worker_is_killed(said: Saying, handler: str, count: int) -> None:
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WORKER, handler, said.path, str(count)),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert worker.stdout is not None
        pids = {int(await worker.stdout.readline())}
        if handler != "nothing":
            await until(lambda: len(said.words) == count)
        pids |= set(map(int, said.words))
        assert all(map(is_alive, pids))
    finally:
        worker.kill()
        await worker.wait()
    await until(lambda: not any(map(is_alive, pids)))


def test_it_runs_on_uvloop(said: Saying) -> None:
    async def work() -> None:
        async with processes(2, recycle_after_jobs=3) as execution:
            assert await asyncio.gather(
                *(run(execution, handlers.payload, number) for number in range(20))
            ) == list(range(20))
            assert await run(execution, handlers.size, bytes(64 * MB)) == 64 * MB
            assert isinstance(await error_of(execution, handlers.die_of, signal.SIGKILL), HandlerCrashed)
            with pytest.raises(HandlerTimeout):
                await run(execution, handlers.sleep, said.path, timeout_s=0.5)
            context = a_context(said.path)
            running = asyncio.create_task(execution.run(handlers.wait_cancelled, context, timeout_s=None))
            await until(lambda: len(said.words) == 2)
            context.cancellation_signal.abort()
            assert await running == (False, True, True)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work())
