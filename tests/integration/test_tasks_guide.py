"""Every example of the guide to tasks runs as it is printed, and says what it should."""

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from tests.integration.real_silo import real_silo

_GUIDE = Path(__file__).parents[2] / "docs/guides/tasks.md"
_ADDRESS = "localhost:7450"
_EXAMPLES = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.S)
    for section in _GUIDE.read_text().split("\n## ")[1:]
}
_SAYS = {
    "A first task": ["Succeeded Good morning, Ada!", "Hello, Grace!"],
    "Arguments and results": [
        "Receipt(to=Customer(id=1, email='ada@example.com'), cents=500)",
        "task 'shop.charge', parameter 'cents': Expected `int`, got `str` - at `$.cents`",
    ],
    "Options": [
        "report-2024-05 Scheduled",
        "(ConcurrencyLimit(key='customer 17', max_concurrency=1),)",
    ],
    "When it fails": [
        "Failed NOTHING_TO_PAY after 1 attempts",
        "Failed HANDLER_ERROR after 2 attempts",
    ],
    "The running task": ["Cancelled", "['me', 'attempt 1']"],
    "Threads and processes": ["read", "168"],
    "Around tasks": ["fail raised ValueError", "disconnected from ['connected']"],
    "Workers": [],
    "In web applications": ["Scheduled", "Cancelled"],
    "Tests": ["[]", "['ada@example.com']"],
}


def test_the_guide_has_exactly_these_examples() -> None:
    assert list(_EXAMPLES) == list(_SAYS)
    assert {title: len(found) for title, found in _EXAMPLES.items()} == {
        title: min(1, len(lines)) for title, lines in _SAYS.items()
    }


@pytest.mark.parametrize("title", [title for title, lines in _SAYS.items() if lines])
async def test_the_example_runs(title: str, tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    [code] = _EXAMPLES[title]
    async with real_silo() as address:
        path.write_text(code.replace(_ADDRESS, address))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", str(path)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": os.environ["PATH"]},
        )
        try:
            async with asyncio.timeout(60):
                output, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
    assert (process.returncode, errors.decode()) == (0, "")
    assert output.decode().splitlines() == _SAYS[title]
