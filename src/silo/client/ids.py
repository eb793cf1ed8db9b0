"""Ids that clients draw."""

import os
import time
from uuid import UUID

_VERSION = 7 << 76
_VARIANT = 2 << 62
_RANDOM = (0xFFF << 64) | ((1 << 62) - 1)


def new_job_id() -> str:
    """A UUID of version 7: the time in milliseconds, then 74 random bits.

    Since it begins with the time, a server can tell that it is new, and new jobs lie together in its store.
    """
    at_ms = time.time_ns() // 1_000_000
    drawn = int.from_bytes(os.urandom(10)) & _RANDOM
    return str(UUID(int=(at_ms & (1 << 48) - 1) << 80 | _VERSION | _VARIANT | drawn))


def new_session_id() -> str:
    """The id of a worker's session: drawn when it starts, never used twice."""
    return str(UUID(bytes=os.urandom(16), version=4))
