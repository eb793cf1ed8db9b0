"""What a handler says about its task."""

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Generic, TypeVar

R = TypeVar("R")

_AFTER_S_MAX = 100 * 366 * 86_400


@dataclass(frozen=True)
class Success(Generic[R]):
    """The job is done; `result` is stored. Returning a plain value means the same."""

    result: R


@dataclass(frozen=True)
class Failure:
    """The attempt failed; the job's retry policy decides what follows.

    With `is_final` the job fails, whatever its policy still allows; towards a server that only speaks
    `silo.v1` that is ignored. The codes `HANDLER_ERROR`,
    `HANDLER_CRASHED`, `TIMEOUT` and `WORKER_CRASHED` are Silo's own.
    """

    code: str
    data: object = None
    is_final: bool = False


@dataclass(frozen=True)
class Cancelled:
    """The job ends as cancelled, without retries."""


class Retry(Exception):
    """Raise it in a handler to run the job again later, without counting this as an attempt.

    For what is nobody's fault: a service that is away, a lock that somebody has. The job gives back its
    tickets and passes its limits again when it is due. Towards a server that only speaks `silo.v1` it is
    a failure `RETRY`, which counts and follows the job's retry policy.

    Args:
        after: seconds, or a timedelta; from none to a hundred years.

    Raises:
        ValueError: it is outside of that.
    """

    def __init__(self, *, after: float | timedelta = 0.0) -> None:
        after_s = after.total_seconds() if isinstance(after, timedelta) else after
        if not 0 <= after_s <= _AFTER_S_MAX:
            raise ValueError(f"after must be from 0 to {_AFTER_S_MAX} seconds, not {after_s}")
        super().__init__(f"run again after {after_s} s")
        self.after_s = after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (partial(Retry, after=self.after_s), ())  # For handlers in other processes.
