"""What the handlers of all queues do: note when each job starts, and say when the last one did.

Jobs tell themselves apart by their payloads, so a job that is delivered twice counts once.
"""

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

PAYLOAD_CHARS = 100

_tally: "Tally | None" = None


@dataclass(frozen=True)
class Finish:
    """What a worker saw, in seconds of the clock that all processes of a machine share."""

    at_s: float
    waits_s: list[float]  # From each payload's making to the start of its handler.


def payload(number: int) -> str:
    """A payload of its own for each number, which says when it was made."""
    return f"{number} {time.monotonic():.6f} ".ljust(PAYLOAD_CHARS, "x")


def handle(payload: str) -> str:
    """The handler of every job: count it, and return at once."""
    assert _tally is not None, "only workers handle jobs"
    _tally.note(payload)
    return "ok"


async def handle_async(payload: str) -> str:
    """`handle` for queues whose handlers are async."""
    return handle(payload)


def install(tally: "Tally") -> None:
    """Make `handle` count here. The process has one tally, since some queues look handlers up by name."""
    global _tally
    _tally = tally


class Tally:
    """Counts jobs in a worker; two files in `folder` tell the producer how far it is.

    `ready` is there once the first `warm_up` jobs have started, `done` once `jobs` more have.
    """

    def __init__(self, folder: Path, *, warm_up: int, jobs: int) -> None:
        self._folder = folder
        self._warm_up = warm_up
        self._target = warm_up + jobs
        self._started_s: dict[str, float] = {}  # By payload, in the order of their starts.
        self._lock = threading.Lock()  # Some queues run handlers in threads.

    def note(self, payload: str) -> None:
        now_s = time.monotonic()
        with self._lock:
            if payload in self._started_s:
                return
            self._started_s[payload] = now_s
            started = len(self._started_s)
            if started == self._warm_up:
                self._write("ready", now_s)
            if started == self._target:
                self._write("done", now_s)

    def _write(self, name: str, now_s: float) -> None:
        starts = list(self._started_s.items())[self._warm_up :]
        waits_s = [at_s - float(payload.split()[1]) for payload, at_s in starts]
        part = self._folder / f"{name}.part"
        part.write_text(json.dumps({"at_s": now_s, "waits_s": waits_s}))
        part.rename(self._folder / name)  # Nobody reads half a file.


def finish_in(file: Path) -> Finish | None:
    """What a tally has written there; None if it has not yet."""
    try:
        return Finish(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
