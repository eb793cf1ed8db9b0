"""Attempts and how they end."""

import enum
from typing import TypeAlias

import msgspec


class AttemptStatus(enum.IntEnum):
    """Numbers are those of the wire and of stored records."""

    RUNNING = 0
    SUCCEEDED = 1
    FAILED = 2
    CANCELLED = 3


class Success(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    result: bytes


class Failure(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    code: str
    data: bytes


class Cancelled(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    pass


Outcome: TypeAlias = Success | Failure | Cancelled


class FinalFailure(msgspec.Struct, frozen=True, gc=False):
    """The attempt failed, and no other may follow."""

    failure: Failure


class Postponed(msgspec.Struct, frozen=True, gc=False):
    """Not now: the job runs again after the delay, and this was no attempt."""

    delay_ms: int


class HandedBack(msgspec.Struct, frozen=True, gc=False):
    """The task was never begun: the job goes back to where it stood."""


Report: TypeAlias = Outcome | FinalFailure | Postponed | HandedBack
"""What a worker may say of a task. All but outcomes are only known to the extension protocol."""


class PastAttempt(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A run that ended somewhere else, as an import tells of it."""

    started_at_ms: int
    finished_at_ms: int
    outcome: Outcome


class Attempt(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """One run of a job. Stored once it has ended, and never changed after that.

    A running attempt (`outcome` and `finished_at_ms` are None) is made from the
    job's lease when someone looks.
    """

    attempt_number: int
    relative_attempt_number: int
    task_id: str
    worker_id: str
    started_at_ms: int
    finished_at_ms: int | None
    outcome: Outcome | None

    @property
    def status(self) -> AttemptStatus:
        match self.outcome:
            case None:
                return AttemptStatus.RUNNING
            case Success():
                return AttemptStatus.SUCCEEDED
            case Failure():
                return AttemptStatus.FAILED
            case Cancelled():
                return AttemptStatus.CANCELLED
