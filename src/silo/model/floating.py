"""Floating limits: the maximum that the jobs of one queue share, and the task that refreshes it."""

from typing import TypeAlias

import msgspec

from silo.model.job import Lease


class RefreshDue(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """A refresh task waits in the queue of its task group."""

    scheduled_at_ms: int


class RefreshLeased(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """A worker works on it."""

    lease: Lease


Refresh: TypeAlias = RefreshDue | RefreshLeased


class FloatingState(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """One floating limit of one tenant. It is made by the first job that meets it, whose settings stay."""

    tenant: str
    key: str
    default_max_concurrency: int
    refresh_interval_ms: int
    metadata: tuple[tuple[str, str], ...]
    max_concurrency: int  # In force now.
    last_refreshed_at_ms: int = 0  # 0: never.
    failures: int = 0  # In a row.
    next_retry_at_ms: int | None = None  # After a failure: no refresh before.
    task_group: str = ""  # Of the last refresh task.
    refresh: Refresh | None = None
    alarm_at_ms: int | None = None  # When it is looked at next: is a refresh due?

    @property
    def lease(self) -> Lease | None:
        return self.refresh.lease if isinstance(self.refresh, RefreshLeased) else None

    @property
    def is_refresh_due(self) -> bool:
        return isinstance(self.refresh, RefreshDue)

    @property
    def cancelled_at_ms(self) -> None:
        """A refresh cannot be cancelled."""
        return

    @property
    def payload_bytes(self) -> int:
        """How much of an answer its task takes, in bytes, about."""
        size = sum(len(name.encode()) + len(value.encode()) for name, value in self.metadata)
        return size + len(self.key.encode())


class RefreshSucceeded(msgspec.Struct, frozen=True, gc=False):
    max_concurrency: int


class RefreshFailed(msgspec.Struct, frozen=True, gc=False):
    """Why it failed. Only logged."""

    code: str
    message: str


RefreshOutcome: TypeAlias = RefreshSucceeded | RefreshFailed
"""What a worker reports of a refresh."""
