"""Handlers of a script's main module run in child processes, as long as the script guards its beginning."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

HANDLERS = """
import asyncio, os, sys
from dataclasses import dataclass
from silo.worker.execution.processes import ProcessExecution
from tests.contexts import a_context

imported_as = __name__

@dataclass
class Result:
    name: str
    pid: int
    arguments: list

class ScriptError(Exception): ...

def handler(ctx):
    if ctx.task.payload == "raise":
        raise ScriptError("scripted")
    return Result(imported_as, os.getpid(), sys.argv[1:])

async def main():
    execution = ProcessExecution(1)
    try:
        execution.check(handler)
        result = await execution.run(handler, a_context(), timeout_s=None)
        assert type(result) is Result and result.pid != os.getpid(), result
        print(result.name, *result.arguments)
        await execution.run(handler, a_context("raise"), timeout_s=None)
    except ScriptError as error:
        print(error)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    finally:
        await execution.close()
"""
GUARDED = f"{HANDLERS}\nif __name__ == '__main__':\n    asyncio.run(main())\n"
UNGUARDED = f"{HANDLERS}\nasyncio.run(main())\n"


async def output_of(folder: Path, *arguments: str, stdin: str = "") -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        cwd=folder, env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    async with asyncio.timeout(30):
        out, _ = await process.communicate(stdin.encode())
    return out.decode()


@pytest.mark.parametrize("arguments", [("script.py",), ("-m", "script"), ("-m", "package.script")])
async def test_handlers_of_a_script_run(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "script.py").write_text(GUARDED)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "script.py").write_text(GUARDED)
    assert await output_of(tmp_path, *arguments, "an argument") == "__mp_main__ an argument\nscripted\n"


async def test_a_script_that_does_not_guard_its_beginning_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(UNGUARDED)
    out = await output_of(tmp_path, "script.py")
    assert "RuntimeError: a worker was started while its main module is imported" in out
    assert 'start it below `if __name__ == "__main__":`' in out


@pytest.mark.parametrize("arguments", [("-",), ("-m", "package")])
async def test_a_handler_that_no_other_process_can_import_is_refused(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(GUARDED)
    out = await output_of(tmp_path, *arguments, stdin=GUARDED)
    assert "ValueError: __main__.handler cannot be imported by other processes" in out
    assert "put it into a module of its own" in out
