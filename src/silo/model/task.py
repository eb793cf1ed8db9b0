"""What a worker can be given."""

from typing import TypeAlias

from silo.model.floating import FloatingState
from silo.model.job import JobState, LeasedTask

Task: TypeAlias = JobState | FloatingState
"""What waits in a task group's queue or is leased: a job's attempt, or the refresh of a floating limit."""

Leased: TypeAlias = LeasedTask | FloatingState
"""What a worker got: an attempt with its job, or a floating limit whose refresh it has."""
