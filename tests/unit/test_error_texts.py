"""Texts that clients tell errors apart by appear where they are meant to, and nowhere else."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import silo
from silo import errors
from silo.errors import JobNotFound, LeaseNotFound, LeaseOwnerMismatch

SOURCES = Path(silo.__file__).parent


def _texts() -> Iterator[tuple[str, str]]:
    """Every text in the code that is no documentation, with its file."""
    for path in sorted(SOURCES.rglob("*.py")):
        tree = ast.parse(path.read_text())
        said = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
                yield node.value, str(path.relative_to(SOURCES))


@pytest.mark.spec("W-ERR-17", "W-ERR-18")
@pytest.mark.parametrize("text", [errors.SHARD_NOT_FOUND, errors.CONNECTION_RESET])
def test_a_text_that_makes_clients_try_again_is_written_once(text: str) -> None:
    assert [(found, path) for found, path in _texts() if text in found] == [(text, "errors.py")]


@pytest.mark.spec("W-ERR-17", "W-ERR-18")
def test_an_answer_about_a_job_or_a_lease_does_not_make_clients_try_again() -> None:
    for error in (JobNotFound(), LeaseNotFound(), LeaseOwnerMismatch()):
        assert errors.SHARD_NOT_FOUND not in error.message
        assert errors.CONNECTION_RESET not in error.message


@pytest.mark.spec("W-ERR-18")
def test_the_text_of_a_broken_connection_only_serves_to_recognise_one() -> None:
    users = {
        str(path.relative_to(SOURCES))
        for path in SOURCES.rglob("*.py")
        if "CONNECTION_RESET" in path.read_text() and path.name != "errors.py"
    }
    assert all(user.startswith("client/") for user in users), users
