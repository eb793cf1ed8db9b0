"""What a decision answers with: one job before and after."""

import msgspec

from silo.model.attempt import Attempt
from silo.model.floating import FloatingState
from silo.model.job import Job, JobState
from silo.model.limit import Bucket


class Change(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One job's step from `before` (None: it did not exist) to `after` (None: it is gone).

    Everything that follows from a state is derived from this pair: index rows,
    the row in a queue, the lease, the tickets and the counters. So they cannot disagree.
    """

    before: JobState | None
    after: JobState | None
    job: Job | None = None  # Its description, when the job is created or deleted.
    attempts: tuple[Attempt, ...] = ()  # Those that join its history with this step.
    buckets: tuple[Bucket, ...] = ()  # What it spent of its rate limits.
    floating: tuple[FloatingState, ...] = ()  # Floating limits that it is the first to meet.

    @property
    def subject(self) -> JobState:
        state = self.after or self.before
        assert state is not None, "a change is about a job"
        return state
