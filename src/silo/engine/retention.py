"""When a job that has ended is deleted."""

import msgspec

from silo.engine.schedule import saturating_add
from silo.model.change import Change
from silo.model.job import JobStatus


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """How long jobs are kept after their end, in seconds; None keeps them for ever."""

    succeeded_s: int | None = None
    unsuccessful_s: int | None = None  # Failed and Cancelled.

    @property
    def is_off(self) -> bool:
        return self.succeeded_s is None and self.unsuccessful_s is None


def with_deadline(change: Change, retention: Retention, *, now_ms: int) -> Change:
    """The change, with the time at which the job is deleted if it ends by it."""
    before, after = change.before, change.after
    if after is None or not after.status.is_terminal:
        return change
    if before is not None and before.status.is_terminal and before.attempts_ended == after.attempts_ended:
        return change  # It had ended before.
    is_success = after.status is JobStatus.SUCCEEDED
    kept_s = retention.succeeded_s if is_success else retention.unsuccessful_s
    if kept_s is None:
        return change
    expires_at_ms = saturating_add(now_ms, kept_s * 1000)
    return msgspec.structs.replace(change, after=msgspec.structs.replace(after, expires_at_ms=expires_at_ms))
