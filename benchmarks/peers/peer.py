"""What a queue must be able to do to be compared."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

CONCURRENCY = 10  # Handlers that a worker may run at a time.
_BATCH = 200  # Jobs of one call that takes several.


class Peer(ABC):
    """A queue set up for speed as its documentation says, in the process of a producer or of a worker.

    The handler is `benchmarks.tally.handle`; results are kept where the queue can keep them, and a job is
    done only after its handler where the queue leaves the choice.
    """

    label: str
    broker: str  # A key of `BROKERS`.
    packages: tuple[str, ...]  # Whose versions tell what was measured.
    settings: str
    worker_killed: str  # What becomes of a job whose worker is killed.
    calls_at_a_time: int  # Enqueue calls that a producer makes at a time; more make it no faster.

    def __init__(self, address: str) -> None:
        self.address = address

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Be able to enqueue while the block runs; workers start afterwards."""
        yield

    @abstractmethod
    async def enqueue(self, payload: str) -> None:
        """Return once the job is acknowledged."""

    @abstractmethod
    def work(self) -> None:
        """Handle jobs in this process until it is killed."""

    async def enqueue_each(self, payloads: Sequence[str]) -> None:
        """Enqueue all, each with a call of its own, as a web application would."""
        left = iter(payloads)

        async def produce() -> None:
            for payload in left:
                await self.enqueue(payload)

        await asyncio.gather(*(produce() for _ in range(self.calls_at_a_time)))

    async def settle(self) -> None:  # noqa: B027  # Most servers have nothing to do.
        """Let the server do with a backlog what it does by itself within a minute."""


class BulkPeer(Peer):
    """A queue that can take several jobs in one call, too."""

    @abstractmethod
    async def enqueue_bulk(self, payloads: Sequence[str]) -> None:
        """Enqueue all, many in a call; return once they are acknowledged."""


def batches(payloads: Sequence[str]) -> list[Sequence[str]]:
    """For calls that take a list, of any length: what an import of rows would send at once."""
    return [payloads[start : start + _BATCH] for start in range(0, len(payloads), _BATCH)]
