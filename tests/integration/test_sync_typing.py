"""Type checkers know what methods of the blocking client take and return."""

import re
import subprocess
import sys
from pathlib import Path

_USE = """
from collections.abc import Iterator, Sequence

from silo import Job, JobResult, NewJob
from silo.sync import JobHandle, SiloClient


def right(client: SiloClient) -> None:
    handle: JobHandle = client.enqueue(payload=1, task_group="g", delay=1.5, tenant="t")
    handles: Iterator[JobHandle] = client.enqueue_many(NewJob(payload=n, task_group="g") for n in range(3))
    job: Job = client.get_job(handle.id, "t", include_attempts=True)
    end: JobResult[object] = handle.result(timeout=30)
    again: Job = handle.job(include_attempts=True)
    shard: str = client.get_shard_for_tenant("t")
    number: int = client.run(lambda silo: count(silo.get_topology()))
    print(handles, job, end, again, shard, number)


async def count(things: Sequence[object]) -> int:
    return len(things)


def wrong(client: SiloClient, handle: JobHandle) -> None:
    client.enqueue(payload=1)  # wrong
    client.enqueue(payload=1, task_group=2)  # wrong
    client.get_job(1)  # wrong
    client.get_job("a", attempts=True)  # wrong
    handle.job(True)  # wrong
    client.query("SELECT 1", tenant=2)  # wrong
    status: int = handle.status()  # wrong
    print(status)
"""
_WRONG = {number for number, line in enumerate(_USE.splitlines(), 1) if line.endswith("# wrong")}


def check(folder: Path, *command: str) -> set[int]:
    """The lines in which a type checker finds something."""
    (folder / "use.py").write_text(_USE)
    done = subprocess.run(
        [sys.executable, "-m", *command, "use.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    found = {int(number) for number in re.findall(r"use\.py:(\d+)(?::\d+)?:? (?:- )?error", done.stdout)}
    assert found, done.stdout + done.stderr
    return found


def test_mypy_finds_the_mistakes_and_nothing_else(tmp_path: Path) -> None:
    options = ("--strict", "--config-file=", f"--cache-dir={tmp_path / 'cache'}")
    assert check(tmp_path, "mypy", *options) == _WRONG


def test_pyright_finds_the_mistakes_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    assert check(tmp_path, "basedpyright", "--pythonpath", sys.executable) == _WRONG
