"""The fixtures, under each of the plugins that run tests that are coroutines."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
_WORKER = """
from silo import SiloWorker

async def handler(ctx):
    return 2 * ctx.task.payload

def worker(client):
    return SiloWorker(client=client, worker_id="w", task_group="g", handler=handler)
"""
_ASYNC = """
    job = await silo_client.enqueue(payload=21, task_group="g", delay=60)
    assert (await silo_server.run_until_idle(worker(silo_client))).waiting == 1
    await silo_server.advance(minutes=1)
    assert (await silo_server.run_until_idle(worker(silo_client))).ended == 1
    assert (await job.result(timeout=10)).result == 42
"""
_TEST = f"async def test_it(silo_server, silo_client):{_ASYNC}\n"
_TESTS = {
    "asyncio, auto": _TEST,
    "asyncio, strict": f"import pytest\n\n@pytest.mark.asyncio\n{_TEST}",
    "anyio": f"""
import pytest

@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.mark.anyio
{_TEST}""",
    "none": f"""
import asyncio

def test_it(silo_server, silo_client):
    async def run():{_ASYNC.replace("    ", "        ")}
    asyncio.run(run())

def test_blocking(silo_sync):
    job = silo_sync.client.enqueue(payload=21, task_group="g", delay=60)
    assert silo_sync.run_until_idle(worker).waiting == 1
    silo_sync.advance(minutes=1)
    assert silo_sync.run_until_idle(worker).ended == 1
    assert job.result(timeout=10).result == 42

def test_nothing_is_left_of_other_tests(silo_sync):
    assert silo_sync.run_until_idle(worker).waiting == 0
""",
}
_OPTIONS = {
    "asyncio, auto": ("-p", "no:anyio", "-o", "asyncio_mode=auto"),
    "asyncio, strict": ("-o", "asyncio_mode=strict"),
    "anyio": ("-p", "no:asyncio"),
    "none": ("-p", "no:asyncio", "-p", "no:anyio"),
}


@pytest.mark.parametrize("runner", _TESTS)
def test_the_fixtures_work_with(runner: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(_WORKER + _TESTS[runner])
    # The plugin is named here because this may be a checkout that was installed before it had one.
    command = [sys.executable, "-m", "pytest", "-p", "pytest_silo", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [*command, "-W", "error", *_OPTIONS[runner], *_scope(runner), "test_it.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "Exception" not in done.stdout + done.stderr


def _scope(runner: str) -> tuple[str, ...]:
    option = ("-o", "asyncio_default_fixture_loop_scope=function")
    return option if runner.startswith("asyncio") else ()


def test_the_plugin_is_declared() -> None:
    project = tomllib.loads(_PYPROJECT.read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"pytest_silo": "pytest_silo"}
    assert "src/pytest_silo" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert not any(name.startswith("pytest") for name in project["project"]["dependencies"])


def test_who_does_not_use_the_fixtures_does_not_import_silo() -> None:
    script = "import sys, pytest_silo; sys.exit('silo' in sys.modules or 'grpc' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
