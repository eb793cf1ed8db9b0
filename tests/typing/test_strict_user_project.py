"""A user's project under strict type checking: what is right passes, what is wrong is found."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

_PROJECT = Path(__file__).parent / "project"


def mypy(name: str, cache: Path) -> tuple[int, str]:
    """What a strict check of one file says, with no settings but its own."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}"),
            *("--no-error-summary", "--hide-error-context", "--no-pretty", name),
        ],
        cwd=_PROJECT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mypy")


def test_a_project_that_uses_the_types_passes(cache: Path) -> None:
    assert mypy("right.py", cache) == (0, "")


def test_every_mistake_is_found_and_nothing_else(cache: Path) -> None:
    code, output = mypy("wrong.py", cache)
    marked = {
        (number, kind)
        for number, line in enumerate((_PROJECT / "wrong.py").read_text().splitlines(), 1)
        for kind in re.findall(r"# error: ([\w-]+)$", line)
    }
    found = {
        (int(number), kind)
        for number, kind in re.findall(r"^wrong\.py:(\d+): error: .*\[([\w-]+)\]$", output, re.M)
    }
    assert found == marked, output
    assert code == 1
