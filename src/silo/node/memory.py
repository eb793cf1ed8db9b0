"""Sheds load before memory runs out: above a bound, calls that add work are refused.

What ends work goes on: reports, heartbeats, leases, cancellations. It frees memory, and refusing it
would make work run again. The bound is compared with the resident memory of the process, once a second
and whenever something large came in or goes out, which can be much in less than a second.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from silo.errors import ErrorKind, SiloError
from silo.node.allocator import release_free_memory
from silo.telemetry.logging import Log

LOOK_S = 1.0
RELEASE_LOOKS = 10  # Between two tries to give back what is free, while there is too little.
LARGE_BYTES = 1 << 20  # From here on it is worth a look.
DEFAULT_PERCENT = 80  # Of the memory that there is, for the default bound.
ENOUGH_PERCENT = 95  # Of the bound; at less the episode is over.
_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

log = Log("silo.node.memory")


class ShortOfMemory(SiloError):
    """Back off and try again. The text is for callers of every kind."""

    kind = ErrorKind.EXHAUSTED

    def __init__(self) -> None:
        super().__init__("server is short of memory; try again later")


class Memory:
    """How much memory this process has, and whether that is too much."""

    def __init__(
        self,
        bound_bytes: int | None,
        *,
        resident_bytes: Callable[[], int | None] | None = None,
        release: Callable[[], object] = release_free_memory,
    ) -> None:
        """Without a bound there is always enough."""
        self.bound_bytes = bound_bytes
        self._resident_bytes = resident_bytes or read_resident_bytes
        self._release = release
        self._looks_until_release = 0
        self.is_short = False

    def __repr__(self) -> str:
        return f"Memory(bound={self.bound_bytes}, {'short' if self.is_short else 'enough'})"

    def look(self) -> bool:
        """Compare memory with the bound now; whether it is short. Takes microseconds."""
        resident = self._resident_bytes() if self.bound_bytes is not None else None
        if self.bound_bytes is None or resident is None:
            return self.is_short
        if not self.is_short and resident > self.bound_bytes:
            self.is_short = True
            log.warning("short of memory: refusing new jobs", **self._facts(resident))
        elif self.is_short and resident * 100 < self.bound_bytes * ENOUGH_PERCENT:
            self.is_short = False
            log.info("memory is enough again: taking new jobs", **self._facts(resident))
        return self.is_short

    def check(self, size_bytes: int) -> None:
        """Whether something of this size may be taken in or given out.

        Raises:
            ShortOfMemory: it is large, and memory is short.
        """
        if size_bytes >= LARGE_BYTES and self.look():
            raise ShortOfMemory

    async def tick(self) -> bool:
        """Look, and if it is too much, give back what is free and look again; whether memory is short."""
        self._looks_until_release -= 1
        if self._is_tight() and self._looks_until_release < 0:
            self._looks_until_release = RELEASE_LOOKS
            await asyncio.to_thread(self._release)  # The loop goes on meanwhile.
        return self.look()

    async def run(self) -> None:
        """Tick again and again."""
        while True:
            await self.tick()
            await asyncio.sleep(LOOK_S)

    def _is_tight(self) -> bool:
        if self.bound_bytes is None or self.is_short:
            return self.is_short
        return (self._resident_bytes() or 0) > self.bound_bytes

    def _facts(self, resident: int) -> dict[str, object]:
        assert self.bound_bytes is not None
        return {"resident_mb": resident >> 20, "max_memory_mb": self.bound_bytes >> 20}


@asynccontextmanager
async def watched(memory: Memory) -> AsyncIterator[None]:
    """Have `memory` look while the block runs; it has looked once when the block begins."""
    memory.look()
    task = asyncio.create_task(memory.run(), name="watch memory")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def bound_from(max_memory_mb: int | None) -> int | None:
    """The bound in bytes that a setting stands for; None for no bound."""
    if max_memory_mb is not None:
        return max_memory_mb << 20 or None
    there_is = memory_bytes()
    return None if there_is is None else there_is * DEFAULT_PERCENT // 100


def read_resident_bytes() -> int | None:
    """The resident memory of this process; None where the system does not tell."""
    try:
        return int(_STATM.read_bytes().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None


def memory_bytes(root: Path = Path("/")) -> int | None:
    """The memory that this process can have: that of its machine, or less if a control group says so."""
    known = list(_cgroup_limits(root))
    with suppress(OSError, ValueError):
        known.append(os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES)
    return min((limit for limit in known if limit > 0), default=None)


def _cgroup_limits(root: Path) -> Iterator[int]:
    """The limits of our control group and of those above it, version 1 and 2.

    In a container the group may be named as the host sees it: then the top folder holds our limit.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        folder = top / group.strip("/")
        for place in (folder, *folder.parents):
            yield from _number(place / name)
            if place == top:
                break


def _number(path: Path) -> Iterator[int]:
    try:
        yield int(path.read_text())
    except (OSError, ValueError):  # There is none, or it says "max".
        return
