"""Ids that clients draw."""

import os
import time

from silo.uuids import uuid_text


def new_job_id() -> str:
    """A UUID of version 7: the time in milliseconds, then 74 random bits.

    Since it begins with the time, a server can tell that it is new, and new jobs lie together in its store.
    """
    at_ms = time.time_ns() // 1_000_000 & (1 << 48) - 1
    return uuid_text(at_ms << 80 | int.from_bytes(os.urandom(10)), version=7)


def new_session_id() -> str:
    """The id of a worker's session: drawn when it starts, never used twice."""
    return uuid_text(int.from_bytes(os.urandom(16)), version=4)
