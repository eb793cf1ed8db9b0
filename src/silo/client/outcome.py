"""What a handler says about its task."""

from dataclasses import dataclass
from typing import Generic, TypeVar

R = TypeVar("R")


@dataclass(frozen=True)
class Success(Generic[R]):
    """The job is done; `result` is stored. Returning a plain value means the same."""

    result: R


@dataclass(frozen=True)
class Failure:
    """The attempt failed; the job's retry policy decides what follows.

    `HANDLER_ERROR` and `WORKER_CRASHED` are used by Silo itself.
    """

    code: str
    data: object = None


@dataclass(frozen=True)
class Cancelled:
    """The job ends as cancelled, without retries."""
