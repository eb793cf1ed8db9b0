"""A task has the same name in every process that imports it, however that was started."""

import subprocess
import sys
from pathlib import Path

import pytest

from silo.tasks.names import task_name

MODULE = """
from silo.tasks.names import task_name

def send():
    pass

class Mailer:
    @staticmethod
    def send():
        pass

print(task_name(send), task_name(Mailer.send))
"""


def run(folder: Path, *arguments: str, text: str | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (("-c", "import package.jobs"), "package.jobs"),
        (("-m", "package.jobs"), "package.jobs"),
        (("package/jobs.py",), "jobs"),
        (("-c", MODULE), "__main__"),
    ],
)
def test_the_name_is_that_of_an_import(tmp_path: Path, arguments: tuple[str, ...], module: str) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "jobs.py").write_text(MODULE)
    assert run(tmp_path, *arguments) == f"{module}.send {module}.Mailer.send"


def test_a_module_that_a_spawned_process_runs_again_keeps_its_names(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(
        MODULE
        + """
if __name__ == "__main__":
    import multiprocessing
    child = multiprocessing.get_context("spawn").Process(target=send)
    child.start()
    child.join()
"""
    )
    assert run(tmp_path, "jobs.py").splitlines() == ["jobs.send jobs.Mailer.send"] * 2


def test_an_imported_function_is_named_after_its_module() -> None:
    assert task_name(task_name) == "silo.tasks.names.task_name"
