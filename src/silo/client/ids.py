"""Ids that clients draw."""

import os
from uuid import UUID


def new_job_id() -> str:
    """A random version-4 UUID."""
    return str(UUID(bytes=os.urandom(16), version=4))


def new_session_id() -> str:
    """The id of a worker's session: drawn when it starts, never used twice."""
    return new_job_id()
