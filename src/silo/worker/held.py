"""What slots, sources and heartbeats know of a task, whatever its kind."""

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from silo.client.errors import SiloClientError
from silo.client.types import Heartbeat, LeasedTask, RefreshTask
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb


class HeldTask(ABC):
    """One task from delivery until its report is done with."""

    def __init__(self, leased: LeasedTask | RefreshTask, *, job_id: str | None, tenant: str | None) -> None:
        self.id = leased.id
        self.job_id = job_id
        self.shard = leased.shard
        self.tenant = tenant
        self.lease_ms = leased.lease_ms
        self.beat_at = math.inf  # When its next heartbeat is due, where there are heartbeats.
        self.waits_since = 0.0  # When it was delivered, on the monotonic clock.
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
        """Run the handler and report the outcome.

        Raises:
            Exception: the report failed; whatever the handler does is an outcome.
            CancelledError: the worker is torn down, or the report was cancelled by a stray one.
        """

    @abstractmethod
    def was_cancelled(self) -> None:
        """The server says that its job was cancelled."""

    @abstractmethod
    def was_lost(self, cause: SiloClientError) -> None:
        """The server says that its lease is gone."""

    @abstractmethod
    async def report_refused(self, error: SiloClientError) -> None:
        """The report did not count, or an earlier try of it did."""

    @abstractmethod
    def heartbeat_answered(self, answer: Heartbeat) -> None: ...

    @abstractmethod
    def heartbeat_failed(self, error: BaseException) -> None: ...


Report: TypeAlias = Callable[[HeldTask, pb.Report], Awaitable[None]]
"""Has a report sent; returns when the task's slot may be given to the next one."""
