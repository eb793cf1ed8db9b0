"""A job as someone sees it who looks it up."""

import msgspec

from silo.model.attempt import Attempt, Outcome
from silo.model.job import Job, JobState


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """One job at one moment."""

    job: Job
    state: JobState
    attempts: tuple[Attempt, ...] = ()  # Ascending; only when asked for.
    last_outcome: Outcome | None = None  # Of the last attempt, when the job has ended and ran.
