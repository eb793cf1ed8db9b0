"""What polling, slots and heartbeats know of a task, whatever its kind."""

import math
from abc import ABC, abstractmethod

from silo.client.types import Heartbeat, LeasedTask, RefreshTask


class HeldTask(ABC):
    """One task from delivery until its outcome is reported."""

    def __init__(self, leased: LeasedTask | RefreshTask, *, job_id: str | None, tenant: str | None) -> None:
        self.id = leased.id
        self.job_id = job_id
        self.shard = leased.shard
        self.tenant = tenant
        self.lease_ms = leased.lease_ms
        self.beat_at = math.inf  # When its next heartbeat is due.
        self.is_started = False
        self.is_settled = False  # Its handler has ended; at most the report is left.

    @property
    @abstractmethod
    def is_lost(self) -> bool:
        """Whether it is known to run elsewhere by now: it is not started any more."""

    @property
    @abstractmethod
    def needs_heartbeats(self) -> bool: ...

    @property
    @abstractmethod
    def bars_redelivery(self) -> bool:
        """Whether another delivery of the same id is dropped as a duplicate."""

    @abstractmethod
    async def run(self) -> None:
        """Run the handler and report the outcome, once there is a slot.

        Raises:
            Exception: the report failed; whatever the handler does is an outcome.
            CancelledError: the worker is torn down, or the report was cancelled by a stray one.
        """

    @abstractmethod
    def heartbeat_answered(self, answer: Heartbeat) -> None: ...

    @abstractmethod
    def heartbeat_failed(self, error: BaseException) -> None: ...
