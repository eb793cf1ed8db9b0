"""Floating limits: when a refresh is due, and what its outcome does."""

from typing import assert_never

import msgspec

from silo.engine.schedule import saturating_add
from silo.model.attempt import HandedBack
from silo.model.floating import (
    FloatingState,
    RefreshDue,
    RefreshFailed,
    RefreshLeased,
    RefreshOutcome,
    RefreshSucceeded,
)
from silo.model.job import LEASE_MS, Lease
from silo.model.limit import FloatingLimit

_BACKOFF_MS = 1_000
_BACKOFF_MS_MAX = 60_000


def created(limit: FloatingLimit, *, tenant: str) -> FloatingState:
    """The limit as the first job that meets it defines it. Its first refresh is due with the first waiter."""
    return FloatingState(
        tenant=tenant,
        key=limit.key,
        default_max_concurrency=limit.default_max_concurrency,
        refresh_interval_ms=limit.refresh_interval_ms,
        metadata=limit.metadata,
        max_concurrency=limit.default_max_concurrency,
    )


def refresh_at_ms(state: FloatingState) -> int | None:
    """When to schedule a refresh if jobs wait by then; None while one is scheduled or in progress."""
    if state.refresh is not None:
        return None
    stale_at_ms = saturating_add(state.last_refreshed_at_ms, state.refresh_interval_ms)
    return max(stale_at_ms, state.next_retry_at_ms or 0)


def scheduled(state: FloatingState, *, task_group: str, now_ms: int) -> FloatingState:
    """A refresh task waits for a worker: after a failure in the same task group, else in that of a waiter."""
    return msgspec.structs.replace(
        state,
        task_group=state.task_group if state.failures else task_group,
        refresh=RefreshDue(now_ms),
        alarm_at_ms=None,
    )


def leased(
    state: FloatingState, *, task_id: str, worker_id: str, now_ms: int, session: str = ""
) -> FloatingState:
    assert isinstance(state.refresh, RefreshDue), "only a waiting task is leased"
    lease = Lease(
        task_id=task_id,
        worker_id=worker_id,
        started_at_ms=now_ms,
        expiry_ms=now_ms + LEASE_MS,
        session=session,
    )
    return msgspec.structs.replace(state, refresh=RefreshLeased(lease))


def reported(state: FloatingState, report: RefreshOutcome | HandedBack, *, now_ms: int) -> FloatingState:
    """What a worker said of its refresh task."""
    match report:
        case RefreshSucceeded(max_concurrency=maximum):
            return succeeded(state, max_concurrency=maximum, now_ms=now_ms)
        case RefreshFailed():
            return failed(state, now_ms=now_ms)
        case HandedBack():
            return msgspec.structs.replace(state, refresh=RefreshDue(now_ms))
        case _:
            assert_never(report)


def succeeded(state: FloatingState, *, max_concurrency: int, now_ms: int) -> FloatingState:
    """The new maximum is in force. Lowering it takes no ticket back."""
    return msgspec.structs.replace(
        state,
        max_concurrency=max_concurrency,
        last_refreshed_at_ms=now_ms,
        failures=0,
        next_retry_at_ms=None,
        refresh=None,
    )


def failed(state: FloatingState, *, now_ms: int) -> FloatingState:
    """The maximum stays; the next try waits min(1 s × 2^failures before, 60 s)."""
    wait_ms = min(_BACKOFF_MS << min(state.failures, 16), _BACKOFF_MS_MAX)
    return msgspec.structs.replace(
        state, failures=state.failures + 1, next_retry_at_ms=now_ms + wait_ms, refresh=None
    )


def expired(state: FloatingState) -> FloatingState:
    """The worker is taken for dead, which says nothing about the limit: the next try need not wait."""
    return msgspec.structs.replace(state, refresh=None)
