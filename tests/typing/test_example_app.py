"""An application with typed tasks: two strict type checkers pass it, find its mistakes, and it runs."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.real_silo import real_silo

_PROJECT = Path(__file__).parent / "project"
_APP = _PROJECT / "app"
_MISTAKES = "mistakes.py"

Findings = set[tuple[str, int, str]]  # File, line, rule.


def run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True, timeout=110, check=False
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def mypy(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """What mypy finds in all of the application, with no settings but its own."""
    modules = [f"app.{path.stem}" for path in sorted(_APP.glob("*.py")) if path.stem != "__init__"]
    output = run(
        *("mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path_factory.mktemp('mypy')}"),
        *("--no-error-summary", "--hide-error-context", "--no-pretty"),
        *(part for module in modules for part in ("-m", module)),
        cwd=_PROJECT,
    )
    found = re.findall(r"^app/(\w+\.py):(\d+): error: .*\[([\w-]+)\]$", output, re.M)
    assert len(found) == output.count("error:"), output
    return {(file, int(number), rule) for file, number, rule in found}


@pytest.fixture(scope="module")
def pyright() -> Findings:
    """What pyright finds in all of the application, as strict as `pyrightconfig.json` says."""
    output = run("basedpyright", "-p", ".", "--pythonpath", sys.executable, "--outputjson", cwd=_APP)
    report = json.loads(output)
    assert report["summary"]["filesAnalyzed"] == len(list(_APP.glob("*.py")))
    return {
        (Path(finding["file"]).name, finding["range"]["start"]["line"] + 1, finding["rule"])
        for finding in report["generalDiagnostics"]
    }


def marked(checker: str) -> Iterator[tuple[str, int, str]]:
    for number, line in enumerate((_APP / _MISTAKES).read_text().splitlines(), 1):
        for rules in re.findall(rf"# .*\b{checker}: ([\w -]+)", line):
            yield from ((_MISTAKES, number, rule) for rule in rules.split())


def test_mypy_finds_every_mistake_and_nothing_else(mypy: Findings) -> None:
    assert mypy == set(marked("mypy"))


def test_pyright_finds_every_mistake_and_nothing_else(pyright: Findings) -> None:
    assert pyright == set(marked("pyright"))


def test_both_find_a_mistake_in_the_same_lines() -> None:
    assert [line for _, line, _ in marked("pyright")] == sorted({line for _, line, _ in marked("mypy")})


async def test_the_application_runs() -> None:
    async with real_silo() as address:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", "-m", "app.use"),
            cwd=_PROJECT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "SILO_SERVERS": address},
        )
        try:
            async with asyncio.timeout(60):
                output, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
    assert (process.returncode, errors.decode()) == (0, "")
    receipt, charged, totals, prime = re.findall(r"Receipt\([^)]*\)|\{[^}]*\}|\d+\]", output.decode())
    assert receipt.endswith("attempts=1)")  # A `Retry` went before, and did not count.
    assert (charged, totals, prime) == (
        "Receipt(message_id='charged', attempts=1)",
        "{'month': '2024-05', 'cents': 3}",
        "7]",
    )
