"""Every example of the guides to workers and to enqueueing runs as it is printed, and says what it should.

The same for the first steps in the README.
"""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from silo import SiloGRPCClient, testing
from silo.rpc.auth import EVERYTHING, Tokens
from silo.rpc.server import Security
from silo.rpc.tls import server_credentials
from tests.integration.certificates import Authority, tls_of
from tests.integration.child import silo
from tests.integration.real_silo import real_silo

ROOT = Path(__file__).parents[2]
_ADDRESS = "localhost:7450"
_TOKEN = "admin-0123456789abcdef"

_WORKERS = {
    "A first worker": ["to ada@example.com about Engines\nSucceeded {'sent': True}"],
    "Task groups": ["email: Succeeded\nreport: Scheduled", "sent to ada@example.com\nreport 2024-05"],
    "The handler": ["job-1 from shop attempt 1\nno retry follows\n2"],
    "Outcomes": [
        "Succeeded {'charged': 5} None None\n"
        "Failed None VALIDATION_ERROR {'field': 'amount'}\n"
        "Cancelled None None None"
    ],
    "Types": ["{'message_id': 'shop/ada@example.com'}"],
    "Cancellation": ["stopped early\nCancelled", "Cancelled", "terminated\nCancelled"],
    "Options": [
        "done",
        "at most 2",
        "WorkerMetrics(polls=0, empty_polls=0, tasks_returned=1, duplicate_task_deliveries=0)",
    ],
    "Shutting down": ["finished all the same"],
    "Code that blocks": ["read 0\nread 1\nread 2", "168"],
    "Time limits": ["Failed TIMEOUT the handler did not end within 0.05 s"],
    "Interrupts": ["cleaned up\nCancelled"],
    "Not now": ["visit 3, attempt 1"],
    "Failed for good": ["Failed NO_SUCH_ADDRESS after 1 attempt"],
    "Several groups in one worker": ["emails: hello\nsms: hello"],
    "Around handlers": [
        "took less than a minute: True\nhello Ada\ntook less than a minute: True\nMISSING_FIELD"
    ],
    "Limits that change": ["provider basic was 1\nSucceeded\nSucceeded"],
    "Metrics and traces": ["send in silo.task.lifecycle True"],
}
_ENQUEUEING = {
    "A first job": ["Scheduled\n{'to': 'ada@example.com'} shop 50"],
    "Ids": ["enqueued order-17\norder-17 is there already, after a repetition: False"],
    "Many jobs": ["10000 are durable, the last one is 9999\n100 more"],
    "When a job runs": ["sooner by 60 minutes"],
    "Retries": ["1 Failed HANDLER_ERROR\n2 Failed HANDLER_ERROR\n3 Succeeded None"],
    "Limits": ["ConcurrencyLimit\nConcurrencyLimit\nRateLimit"],
    "Results": [
        "nobody works on it yet\nSucceeded 0.5 None None\nFailed None DIVISION_BY_ZERO {'a': 1}",
    ],
    "Cancel, restart, expedite and delete": [
        'it has not ended\nCancelled\nScheduled\nJob "one" not found',
    ],
    "Importing": ["gave-up True Failed\ngoes-on True Scheduled\nis-new True Scheduled"],
    "Tenants": ['Scheduled\nJob "order-1" not found in tenant "library"'],
    "TLS and tokens": ["enqueued\nTrue\nthe server's certificate is not accepted"],
    "When calls fail": ["priority must be between 0 and 99\nnobody is there"],
    "Traces": ["True"],
}
_SAYS = {"running-workers": _WORKERS, "enqueueing-jobs": _ENQUEUEING}
_RUN_BY_HAND = {"Several processes"}  # Has a test of its own.
_ALSO_WITHOUT_EXTENSION = ("A first worker", "Task groups", "Outcomes", "A first job", "Many jobs", "Results")


def examples(guide: str) -> dict[str, list[str]]:
    """The examples of each section of a guide."""
    found = {
        section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.S)
        for section in (ROOT / f"docs/guides/{guide}.md").read_text().split("\n## ")[1:]
    }
    return {title: codes for title, codes in found.items() if codes}


_CASES = [
    pytest.param(code, title, said, id=f"{guide}: {title} {number}")
    for guide, says in _SAYS.items()
    for title, codes in examples(guide).items()
    if title in says
    for number, (code, said) in enumerate(zip(codes, says[title], strict=True), start=1)
]


async def run_code(
    path: Path, code: str, address: str, *, env: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """What the example prints, and what it complains of."""
    assert _ADDRESS in code
    await asyncio.to_thread(path.write_text, code.replace(_ADDRESS, address))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", path.name),
        cwd=path.parent,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], **(env or {})},
    )
    try:
        async with asyncio.timeout(60):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, errors.decode()
    return output.decode().strip(), errors.decode()


@asynccontextmanager
async def with_tenants() -> AsyncIterator[str]:
    async with testing.server(tenancy=True) as server:
        yield server.address


@asynccontextmanager
async def secured(folder: Path) -> AsyncIterator[str]:
    authority = Authority(folder, "ca")
    security = Security(
        credentials=server_credentials(tls_of(authority)), tokens=Tokens([(_TOKEN, EVERYTHING)])
    )
    async with real_silo(security=security) as address:
        yield address


def server_for(title: str, folder: Path) -> AbstractAsyncContextManager[str]:
    match title:
        case "Tenants":
            return with_tenants()
        case "TLS and tokens":
            return secured(folder)
        case _:
            return real_silo()


@pytest.mark.parametrize("guide", _SAYS)
def test_the_guide_has_exactly_these_examples(guide: str) -> None:
    found = {title: len(codes) for title, codes in examples(guide).items() if title not in _RUN_BY_HAND}
    assert found == {title: len(said) for title, said in _SAYS[guide].items()}


@pytest.mark.parametrize(("code", "title", "said"), _CASES)
async def test_the_example_says_what_it_should(code: str, title: str, said: str, tmp_path: Path) -> None:
    async with server_for(title, tmp_path) as address:
        printed, errors = await run_code(tmp_path / "example.py", code, address, env={"SILO_TOKEN": _TOKEN})
    assert errors == ""
    assert printed == said


@pytest.mark.parametrize(
    ("code", "title", "said"), [case for case in _CASES if case.values[1] in _ALSO_WITHOUT_EXTENSION]
)
async def test_the_example_says_the_same_at_a_server_without_push(
    code: str, title: str, said: str, tmp_path: Path
) -> None:
    async with real_silo(extension=False) as address:
        printed, _ = await run_code(tmp_path / "example.py", code, address)
    assert printed == said


async def test_workers_of_several_processes_share_the_jobs_and_end_when_told(tmp_path: Path) -> None:
    [code] = examples("running-workers")["Several processes"]
    path = tmp_path / "worker.py"
    path.write_text(code)
    async with real_silo() as address, SiloGRPCClient(address) as client:
        env = {"PATH": os.environ["PATH"], "SILO_SERVERS": address, "TASK_GROUP": "g", "MAX_CONCURRENT": "1"}
        processes = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-W", "error", str(path)), env=env, stdout=asyncio.subprocess.PIPE
            )
            for _ in range(2)
        ]
        try:
            async with asyncio.timeout(60):
                for process in processes:
                    assert process.stdout is not None
                    line = (await process.stdout.readline()).decode()
                    assert re.fullmatch(rf"Worker .+-{process.pid} starts, task group g\n", line)
                jobs = [await client.enqueue(payload=number, task_group="g") for number in range(10)]
                for number, job in enumerate(jobs):
                    assert (await job.result()).result == f"{number} done"
                for process in processes:
                    process.send_signal(signal.SIGTERM)
                assert [await process.wait() for process in processes] == [0, 0]
        finally:
            for process in processes:
                if process.returncode is None:
                    process.kill()


async def test_the_first_steps_of_the_readme_work(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", readme, re.S)
    (tmp_path / "tasks.py").write_text(code)
    commands = re.findall(r"bin/silo (worker (tasks:\w+)) *#", readme)
    async with real_silo() as address:
        [(command, target)] = commands
        async with silo(tmp_path, *command.split(), "--server", address, cwd=tmp_path) as worker:
            await worker.says(f"runs {target}")
            assert await run_code(tmp_path / "tasks.py", code, address) == ("hello world", "")
            assert await worker.stop() == 0
