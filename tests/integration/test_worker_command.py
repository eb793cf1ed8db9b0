"""`silo worker module:object` as a process: what it runs, what it refuses, how it stops and starts again."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from silo import JobHandle, SiloGRPCClient
from silo.cli.server_process import free_port
from tests.builders import until
from tests.integration.child import Child, failure, silo

GROUP = "g"
MODULE = '''
import asyncio
import os
from pathlib import Path

from silo import App, SiloGRPCClient, SiloWorker

HERE = Path(__file__).parent
running = most = 0


async def double(ctx):
    return 2 * ctx.task.payload


async def count(ctx):
    """How many ran at the same time so far."""
    global running, most
    running += 1
    most = max(most, running)
    while most < 2:
        await asyncio.sleep(0.005)
    running -= 1
    return most


async def slow(ctx):
    (HERE / "started").touch()
    while not (HERE / "go on").exists():
        await asyncio.sleep(0.005)
    return "finished"


async def fail(ctx):
    raise ValueError("on purpose")


def plain(ctx):
    return 1


number = 3
empty = App()
client = SiloGRPCClient(os.environ.get("ADDRESS", "127.0.0.1:1"))
worker = SiloWorker(client=client, worker_id="built at import", task_group="g", handler=double)
'''

TASKS = """
import os
from contextlib import asynccontextmanager
from pathlib import Path

from silo import App

HERE = Path(__file__).parent
app = App(task_group="numbers")


@app.lifespan
@asynccontextmanager
async def announce():
    (HERE / "begun").touch()
    yield
    (HERE / "ended").touch()


@app.task
async def double(n: int) -> int:
    return 2 * n


@app.task(task_group="slow")
def half(n: int) -> float:
    return n / 2


@app.task(task_group="slow", execution="process")
def pid() -> int:
    return os.getpid()


if __name__ == "__main__":
    import asyncio

    async def main():
        async with app:
            print((await (await double.enqueue(21)).result(20)).result)

    asyncio.run(main())
"""
WRONG = """
from pathlib import Path

from silo import App

app = App()


@app.task
async def read(path: Path) -> None: ...
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A folder with the application's modules."""
    folder = tmp_path / "app"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "__init__.py").touch()
    (folder / "package" / "jobs.py").write_text(MODULE)
    (folder / "jobs.py").write_text(MODULE)
    (folder / "package" / "tasks.py").write_text(TASKS)
    (folder / "wrong.py").write_text(WRONG)
    (folder / "raises.py").write_text("x = 1\nraise RuntimeError('boom')\n")
    (folder / "misses.py").write_text("import not_installed_here\n")
    (folder / "broken.py").write_text("def (\n")
    return folder


@asynccontextmanager
async def a_server(tmp_path: Path) -> AsyncIterator[tuple[str, SiloGRPCClient]]:
    address = f"127.0.0.1:{free_port()}"
    async with silo(tmp_path, "server", "--grpc-addr", address) as server, SiloGRPCClient(address) as client:
        await server.says("Ctrl-C")
        yield address, client


def clean(child: Child) -> None:
    assert "Traceback" not in child.out + child.err
    assert child.err == ""


async def test_a_handler_in_a_package_runs_the_jobs_of_a_server(tmp_path: Path, code: Path) -> None:
    async with a_server(tmp_path) as (address, client):
        command = ("worker", "package.jobs:double", "--task-group", GROUP, "--server", address)
        async with silo(tmp_path, *command, cwd=code) as worker:
            await worker.says("stop        Ctrl-C")
            assert "runs package.jobs:double\n" in worker.out
            assert worker.out.splitlines()[1:] == [
                "  groups      g", "  concurrency 10", f"  server      {address}", "  stop        Ctrl-C",
            ]  # fmt: skip
            jobs = [await client.enqueue(payload=n, task_group=GROUP) for n in range(5)]
            assert [(await job.result(timeout=20)).result for job in jobs] == [0, 2, 4, 6, 8]
            assert await worker.stop() == 0
            clean(worker)


async def test_concurrency_is_how_many_run_at_a_time(tmp_path: Path, code: Path) -> None:
    async with a_server(tmp_path) as (address, client):
        command = ("worker", "jobs:count", "--task-group", GROUP, "--server", address, "--concurrency", "2")
        async with silo(tmp_path, *command, cwd=code) as worker:
            jobs = [await client.enqueue(payload=n, task_group=GROUP) for n in range(6)]
            assert [(await job.result(timeout=20)).result for job in jobs] == [2] * 6
            assert await worker.stop() == 0


async def test_a_worker_built_at_import_brings_its_own_client(tmp_path: Path, code: Path) -> None:
    async with a_server(tmp_path) as (address, client):
        env = {"ADDRESS": address}
        async with silo(tmp_path, "worker", "jobs:worker", cwd=code, env=env) as worker:
            await worker.says("stop        Ctrl-C")
            assert worker.out.splitlines() == [
                "Silo worker built at import runs jobs:worker",
                "  groups      g", "  concurrency 10", "  stop        Ctrl-C",
            ]  # fmt: skip
            job = await client.enqueue(payload=21, task_group=GROUP)
            assert (await job.result(timeout=20)).result == 42
            assert await worker.stop() == 0
            clean(worker)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_the_running_job_end_first(
    tmp_path: Path, code: Path, number: signal.Signals
) -> None:
    async with a_server(tmp_path) as (address, client):
        command = ("worker", "jobs:slow", "--task-group", GROUP, "--server", address)
        async with silo(tmp_path, *command, cwd=code) as worker:
            job = await client.enqueue(payload=None, task_group=GROUP)
            await until((code / "started").exists)
            worker.process.send_signal(number)
            assert (await job.job()).status == "Running"
            (code / "go on").touch()
            assert await worker.ended() == 0
            assert (await job.result(timeout=5)).result == "finished"
            clean(worker)


async def test_a_second_signal_ends_it_at_once(tmp_path: Path, code: Path) -> None:
    async with a_server(tmp_path) as (address, client):
        command = ("worker", "jobs:slow", "--task-group", GROUP, "--server", address)
        async with silo(tmp_path, *command, cwd=code) as worker:
            await client.enqueue(payload=None, task_group=GROUP)
            await until((code / "started").exists)
            worker.process.send_signal(signal.SIGINT)
            worker.process.send_signal(signal.SIGTERM)
            assert await worker.ended() == 0
            clean(worker)


async def test_a_failing_handler_fails_its_job_and_prints_no_traceback(tmp_path: Path, code: Path) -> None:
    async with a_server(tmp_path) as (address, client):
        command = ("worker", "jobs:fail", "--task-group", GROUP, "--server", address)
        async with silo(tmp_path, *command, cwd=code) as worker:
            job = await client.enqueue(payload=None, task_group=GROUP)
            assert (await job.result(timeout=20)).status == "Failed"
            assert await worker.stop() == 0
            clean(worker)


async def test_without_a_server_it_waits_and_stops_when_told(tmp_path: Path, code: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    command = ("worker", "jobs:double", "--task-group", GROUP, "--server", address)
    async with silo(tmp_path, *command, cwd=code) as worker:
        await worker.says("stop        Ctrl-C")
        assert await worker.stop() == 0
        assert "Traceback" not in worker.err


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("jobs", "Error: 'jobs' is not of the form module:object, such as myapp.jobs:handler"),
        (".jobs:double", "Error: '.jobs:double' is not of the form module:object"),
        ("nowhere:double", "Error: no module 'nowhere'; searched "),
        ("package.nowhere:double", "Error: no module 'package.nowhere'; searched "),
        ("jobs:doubel", "Error: module 'jobs' has no 'doubel'; did you mean 'double'?"),
        (
            "jobs:plain",
            "Error: jobs:plain is of type function; give an App, an async function or a SiloWorker",
        ),
        ("jobs:number", "Error: jobs:number is of type int; give an App, an async function or a SiloWorker"),
        ("jobs:double", "Error: a handler needs --task-group"),
        ("raises:x", "Error: module 'raises' does not import: RuntimeError: boom ("),
        ("misses:x", "Error: module 'misses' does not import: ModuleNotFoundError: "),
        (
            "broken:x",
            "Error: module 'broken' does not import: SyntaxError: invalid syntax (",
        ),
    ],
)
async def test_a_wrong_target_is_one_line(tmp_path: Path, code: Path, target: str, line: str) -> None:
    assert (await failure(tmp_path, "worker", target, cwd=code)).startswith(line)


async def test_the_line_of_an_import_that_fails_is_named(tmp_path: Path, code: Path) -> None:
    line = await failure(tmp_path, "worker", "raises:x", cwd=code)
    assert line.endswith(f"({code}/raises.py, line 2)")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ("jobs:double", "--server", "nowhere"),
            "Error: --server = 'nowhere' is no address; write host:port",
        ),
        (("jobs:double", "--token", " "), "Error: the token is empty; leave it out or give one"),
        (("jobs:worker", "--concurrency", "3"), "Error: jobs:worker is a SiloWorker, which brings its own"),
        (
            ("jobs:double", "--groups", "a"),
            "Error: jobs:double is a handler; give its group with --task-group instead of --groups",
        ),
        (
            ("package.tasks:app", "--task-group", "slow"),
            "Error: package.tasks:app is an App, whose tasks name their groups; choose some with --groups",
        ),
        (
            ("package.tasks:app", "--groups", "slow,numbres"),
            "Error: no task of package.tasks:app is in group 'numbres'; did you mean 'numbers'?",
        ),
        (
            ("jobs:empty", "--groups", "a"),
            "Error: jobs:empty: the app has no tasks: import the modules that declare them",
        ),
        (
            ("wrong:app",),
            "Error: wrong:app: task 'wrong.read': 'path': pathlib.Path has no form in MessagePack",
        ),
    ],
)
async def test_a_wrong_option_is_one_line(
    tmp_path: Path, code: Path, options: tuple[str, ...], line: str
) -> None:
    assert (await failure(tmp_path, "worker", *options, cwd=code)).startswith(line)


async def test_a_concurrency_of_zero_is_a_usage_error(tmp_path: Path, code: Path) -> None:
    async with silo(tmp_path, "worker", "jobs:double", "--concurrency", "0", cwd=code) as worker:
        assert await worker.ended() == 2
        assert "--concurrency" in worker.err
        assert "Traceback" not in worker.err


# Apps


async def test_an_app_is_served_with_all_its_tasks(tmp_path: Path, code: Path) -> None:
    async with a_server(tmp_path) as (address, client):
        command = ("worker", "package.tasks:app", "--server", address, "--concurrency", "4")
        async with silo(tmp_path, *command, cwd=code) as worker:
            await worker.says("stop        Ctrl-C")
            assert worker.out.splitlines()[1:] == [
                "  tasks       package.tasks.double  (numbers)",
                "              package.tasks.half  (slow)",
                "              package.tasks.pid  (slow)",
                "  groups      numbers, slow",
                "  concurrency 4",
                f"  server      {address}",
                "  stop        Ctrl-C",
            ]
            ends = [
                await (await enqueued(client, name, group, payload)).result(timeout=20)
                for name, group, payload in (
                    ("double", "numbers", {"n": 4}),
                    ("half", "slow", {"n": 5}),
                    ("pid", "slow", {}),
                )
            ]
            assert [end.result for end in ends[:2]] == [8, 2.5]
            assert ends[2].result not in (None, worker.pid)
            assert not (code / "package" / "ended").exists()
            assert await worker.stop() == 0
            assert (code / "package" / "ended").exists()
            clean(worker)


async def enqueued(client: SiloGRPCClient, name: str, group: str, payload: object) -> JobHandle:
    """A job, as the app would make it."""
    return await client.enqueue(
        payload=payload, task_group=group, metadata={"silo.task": f"package.tasks.{name}"}
    )


async def test_groups_choose_among_the_tasks_of_an_app(tmp_path: Path, code: Path) -> None:
    async with a_server(tmp_path) as (address, client):
        env = {"SILO_SERVERS": address}
        async with silo(
            tmp_path, "worker", "package.tasks:app", "--groups", "slow", cwd=code, env=env
        ) as worker:
            await worker.says(f"server      {address}")
            assert "  groups      slow\n" in worker.out
            assert "double" not in worker.out
            waiting = await enqueued(client, "double", "numbers", {"n": 4})
            assert (await (await enqueued(client, "half", "slow", {"n": 5})).result(timeout=20)).result == 2.5
            assert await waiting.status() == "Scheduled"
            assert await worker.stop() == 0


async def test_a_script_enqueues_for_a_worker_that_imported_it(tmp_path: Path, code: Path) -> None:
    async with a_server(tmp_path) as (address, _):
        env = {"SILO_SERVERS": address, "PATH": os.environ["PATH"]}
        async with silo(tmp_path, "worker", "package.tasks:app", cwd=code, env=env) as worker:
            await worker.says("stop        Ctrl-C")
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "package.tasks", cwd=code, env=env, stdout=asyncio.subprocess.PIPE
            )
            async with asyncio.timeout(30):
                output, _ = await process.communicate()
            assert output == b"42\n"


# Reloading


async def test_a_change_of_the_code_starts_the_worker_again(tmp_path: Path, code: Path) -> None:
    async with a_server(tmp_path) as (address, client):
        command = ("worker", "package.tasks:app", "--server", address, "--reload")
        async with silo(tmp_path, *command, cwd=code) as worker:
            await worker.says("stop        Ctrl-C")
            job = await enqueued(client, "double", "numbers", {"n": 4})
            assert (await job.result(timeout=20)).result == 8

            (code / "package" / "tasks.py").write_text(TASKS.replace("2 * n", "3 * n"))
            await worker.says("package/tasks.py changed: the worker starts again")
            await until(lambda: worker.out.count("stop        Ctrl-C") == 2, timeout_s=20)
            assert (code / "package" / "ended").exists()
            job = await enqueued(client, "double", "numbers", {"n": 4})
            assert (await job.result(timeout=20)).result == 12
            assert await worker.stop(signal.SIGINT) == 0
            clean(worker)


async def test_a_running_job_ends_before_the_worker_starts_again(tmp_path: Path, code: Path) -> None:
    async with a_server(tmp_path) as (address, client):
        command = ("worker", "jobs:slow", "--task-group", GROUP, "--server", address, "--reload")
        async with silo(tmp_path, *command, cwd=code) as worker:
            job = await client.enqueue(payload=None, task_group=GROUP)
            await until((code / "started").exists)
            (code / "jobs.py").write_text(MODULE + "\n")
            await worker.says("jobs.py changed")
            assert worker.out.count("stop        Ctrl-C") == 1
            (code / "go on").touch()
            assert (await job.result(timeout=20)).result == "finished"
            await until(lambda: worker.out.count("stop        Ctrl-C") == 2, timeout_s=20)
            assert len((await job.job(include_attempts=True)).attempts or ()) == 1
            assert await worker.stop() == 0


async def test_code_that_does_not_import_is_told_and_waits_for_the_next_change(
    tmp_path: Path, code: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    command = ("worker", "package.tasks:app", "--server", address, "--reload")
    async with silo(tmp_path, *command, cwd=code) as worker:
        await worker.says("stop        Ctrl-C")
        (code / "package" / "tasks.py").write_text("def (\n")
        await worker.says("Error: module 'package.tasks' does not import: SyntaxError")
        (code / "package" / "tasks.py").write_text(TASKS)
        await until(lambda: worker.out.count("stop        Ctrl-C") == 2, timeout_s=20)
        assert await worker.stop() == 0


async def test_reloading_without_the_extra_is_one_line(tmp_path: Path, code: Path) -> None:
    (code / "watchfiles.py").write_text("raise ImportError('not here')\n")
    env = {"PYTHONPATH": str(code)}
    line = await failure(tmp_path, "worker", "package.tasks:app", "--reload", cwd=code, env=env)
    assert line == "Error: --reload needs watchfiles: pip install 'silo-queue[reload]'"
