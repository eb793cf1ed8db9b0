"""An external service that judges rate limits."""

from typing import Protocol

import msgspec

from silo.errors import ErrorKind, SiloError
from silo.model.limit import RateLimit


class LimiterFailed(SiloError):
    """The limiter did not answer, or said that something is wrong. It says nothing about the limit."""

    kind = ErrorKind.UNAVAILABLE


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What a limiter says of one request."""

    is_under: bool
    reset_at_ms: int  # When its bucket has room again; 0 if it does not say.


class RateLimiter(Protocol):
    """Judges rate limits. A bucket is known by the limit's name and unique key."""

    async def check(self, limit: RateLimit) -> Answer:
        """Spend `limit.hits` if they fit. Every call has a deadline of its own.

        A caller that is cancelled does not know whether they were spent.

        Raises:
            LimiterFailed: nobody knows whether they were spent; ask again later.
        """
