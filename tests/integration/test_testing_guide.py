"""Every example of the guide to testing is a test that passes, or a program that runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

_GUIDE = Path(__file__).parents[2] / "docs/guides/testing.md"
_EXAMPLES = re.findall(r"```python\n(.*?)```", _GUIDE.read_text(), re.S)


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_guide_has_examples_of_both_kinds() -> None:
    assert len(_EXAMPLES) == 7
    assert sum("\ndef test_" in example for example in _EXAMPLES) == 1
    assert sum("\nasync def test_" in example for example in _EXAMPLES) == 5


@pytest.mark.parametrize("number", [n for n, example in enumerate(_EXAMPLES) if "def test_" in example])
def test_the_example_is_a_test_that_passes(number: int, tmp_path: Path) -> None:
    (tmp_path / "test_example.py").write_text(_EXAMPLES[number])
    options = (
        "-p",
        "pytest_silo",
        "-p",
        "no:cacheprovider",
        "-o",
        "asyncio_default_fixture_loop_scope=function",
    )
    assert "1 passed" in run(tmp_path, "-m", "pytest", *options, "test_example.py")


def test_the_program_runs(tmp_path: Path) -> None:
    [program] = [example for example in _EXAMPLES if "def test_" not in example]
    (tmp_path / "example.py").write_text(program)
    assert run(tmp_path, "example.py") == "Scheduled 2030-01-01T00:00:00+00:00\n"
