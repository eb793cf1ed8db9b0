"""Where a worker's tasks come from, and where its reports go."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from silo.client.errors import SiloClientError
from silo.client.types import LeasedTask, RefreshTask
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb
from silo.worker.held import HeldTask


class Desk(Protocol):
    """What a source knows of its worker."""

    @property
    def slots(self) -> int:
        """How many tasks it runs at a time."""

    @property
    def free(self) -> int:
        """How many more could begin now."""

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""

    @property
    def window(self) -> int:
        """How many tasks it wants to have, those that run included."""

    def held(self) -> Sequence[HeldTask]:
        """All tasks that were delivered, until their reports are done with."""

    def deliver(
        self, tasks: Sequence[LeasedTask], refresh_tasks: Sequence[RefreshTask]
    ) -> Sequence[HeldTask]:
        """Take tasks over, and say which; those that it has already are dropped."""

    def within(self, held: HeldTask) -> AbstractContextManager[None]:
        """A block that belongs to the task's span, if it has one."""

    def find(self, task_id: str) -> HeldTask | None:
        """The task of this id that it holds."""

    def forget(self, held: HeldTask) -> None:
        """The task is done with: reported, or lost."""

    def refused(self, held: HeldTask, error: SiloClientError) -> None:
        """A report did not count."""

    def error(self, error: BaseException, task_id: str | None = None) -> None:
        """Tell the application."""


class Source(Protocol):
    """Brings tasks to a desk and carries reports away."""

    async def run(self) -> None:
        """Bring tasks until cancelled or told to stop."""

    can_hand_back: bool  # Whether tasks that were not begun can be given to others.

    def changed(self) -> None:
        """The desk has more room, or less."""

    async def report(self, held: HeldTask, report: pb.Report) -> None:
        """Have a report sent. Returns when the task's slot may be given to the next one.

        Raises:
            SiloClientError: it does not count.
        """

    async def stop(self) -> None:
        """Bring nothing more, from when this returns; reports still go out."""

    async def close(self, timeout_s: float) -> None:
        """Wait until all reports are answered, so long at most, and end."""
