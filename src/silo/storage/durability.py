"""What an answer from storage means."""

import enum


class Durability(enum.Enum):
    """The levels of `database.durability`."""

    FLUSHED = "flushed"  # In the object store; on local files written and fsynced.
    BUFFERED = "buffered"  # In memory, flushed within the flush interval.
