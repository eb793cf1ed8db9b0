"""What a worker and its child processes say to each other.

Two channels lead to each child. Over a socket the worker sends one job at a time and the child
answers. Through a pipe, where a thread of the child listens, come the few things that a child must hear
while its handler runs. So the handler's thread takes its jobs from the socket itself, without
another thread in between. Both channels close when the worker dies, however it dies.

Everything is a frame: a kind, a length, a pickle. A job is known by its number: both sides count
those sent over the socket, from 1.
"""

import enum
import io
import pickle
import struct
from dataclasses import dataclass

from silo.worker.execution.main_module import MainModule

_HEAD = struct.Struct("!BQ")
HEAD_BYTES = _HEAD.size


class Kind(enum.IntEnum):
    """What a frame is, and what its pickle holds."""

    # To the child, over the socket.
    SETUP = 1  # A Setup. Comes first; the answer is READY or RAISED.
    JOB = 2  # (handler, Task). The answer is RETURNED or RAISED.
    # From the child, over the socket.
    READY = 3  # Nothing: the handler is imported.
    RETURNED = 4  # (whether the child wants to be replaced, what the handler returned).
    RAISED = 5  # (the same, `error_data`, the exception or None).
    CANCEL = 6  # The number of the job that is to be cancelled. The answer is ANSWERED.
    # To the child, through the pipe.
    CANCELLED = 7  # The number of the job that is cancelled.
    ANSWERED = 8  # Why a CANCEL failed, or None.
    STOP = 9  # Nothing: end now. Handlers may clean up.


@dataclass(frozen=True)
class Setup:
    """What a child is told before its first job."""

    import_path: list[str]  # `sys.path` and `sys.argv` of the worker.
    arguments: list[str]
    main: MainModule
    handler: bytes  # Pickled: what the first job will need.
    recycle_after_jobs: int | None
    recycle_above_mb: int | None


def frame(kind: Kind, content: object = None) -> memoryview:
    """The bytes to send.

    Raises:
        Exception: the content does not pickle, for any of many reasons.
    """
    data = io.BytesIO()  # Pickled in place behind the head: payloads may be large.
    data.seek(HEAD_BYTES)
    pickle.dump(content, data, pickle.HIGHEST_PROTOCOL)
    length = data.tell() - HEAD_BYTES
    data.seek(0)
    data.write(_HEAD.pack(kind, length))
    return data.getbuffer()


def read_head(data: bytes | bytearray) -> tuple[Kind, int]:
    """The kind, and the length of what follows."""
    kind, length = _HEAD.unpack_from(data)
    return Kind(kind), length
