"""Every example of the guide to workers runs as it is printed, and says what it should."""

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from tests.integration.real_silo import real_silo

_GUIDE = Path(__file__).parents[2] / "docs/guides/running-workers.md"
_ADDRESS = "localhost:7450"
_EXAMPLES = {
    title: code
    for section in _GUIDE.read_text().split("\n## ")[1:]
    for title, code in [
        (section.partition("\n")[0], block) for block in re.findall(r"```python\n(.*?)```", section, re.S)
    ]
}
_SAYS = {
    "A first worker": ["to ada@example.com about Engines", "Succeeded {'sent': True}"],
    "Task groups": ["sent to ada@example.com", "report 2024-05"],
    "The handler": [
        "Succeeded {'charged': 5} None None",
        "Failed None INVALID_AMOUNT {'amount': -5}",
        "Cancelled None None None",
    ],
    "Types": ["{'message_id': 'shop/ada@example.com'}"],
    "Cancellation": ["Cancelled"],
    "Options": ["tasks_returned=1"],
    "Shutting down": ["finished all the same"],
    "When calls fail": ["order-17 is there already", "Scheduled"],
}


def test_the_guide_has_exactly_these_examples() -> None:
    assert list(_EXAMPLES) == list(_SAYS)
    assert _GUIDE.read_text().count("```python") == len(_SAYS)


@pytest.mark.parametrize("title", _SAYS)
async def test_the_example_runs(title: str, tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    async with real_silo() as address:
        assert _ADDRESS in _EXAMPLES[title]
        path.write_text(_EXAMPLES[title].replace(_ADDRESS, address))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-W",
            "error",
            str(path),
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
    for line in _SAYS[title]:
        assert line in output.decode()
