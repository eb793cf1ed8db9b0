"""When work runs: due times, the order among due work, and the wait before a retry."""

import math
from random import Random

from silo.model.job import Delayed, Pending, Ready, RetryPolicy
from silo.model.limit import Limit

PRIORITY_STEP_MS = 10_000  # One priority point counts as much as ten seconds of waiting.
_INT64_MAX = (1 << 63) - 1


def virtual_deadline_ms(start_at_ms: int, priority: int, priority_step_ms: int) -> int:
    """Sort key of due work, fixed when it becomes due.

    Smaller goes first: priority 0 at its start time, each further point as if it
    had started `priority_step_ms` later. So priority counts, and so does waiting.
    """
    return min(start_at_ms + priority * priority_step_ms, _INT64_MAX)


def pending_at(
    start_at_ms: int, priority: int, limits: tuple[Limit, ...], *, now_ms: int, priority_step_ms: int
) -> Pending:
    """Where work with this start waits at `now_ms`. Limits come first, once it is due."""
    if start_at_ms > now_ms or limits:
        return Delayed(start_at_ms)
    return Ready(virtual_deadline_ms(start_at_ms, priority, priority_step_ms))


def retry_delay_ms(policy: RetryPolicy, failed_attempt: int, rng: Random) -> int:
    """Wait before the attempt after `failed_attempt`, which counts from 1 within the run.

    min(jitter(round(initial × factor^failed_attempt)), max), rounding half away
    from zero; the jitter multiplies by a random number in [1, 2). The first
    retry therefore waits initial × factor.
    """
    delay = backoff_ms(policy.initial_interval_ms, policy.backoff_factor, failed_attempt)
    if policy.randomize_interval:
        delay = _round(delay * (1.0 + rng.random()))
    return min(delay, policy.max_interval_ms)


def backoff_ms(initial_ms: int, factor: float, exponent: int) -> int:
    """round(initial × factor^exponent), half away from zero, within 64 bits."""
    return _round(initial_ms * _power(factor, exponent))


def _power(factor: float, exponent: int) -> float:
    try:
        return float(math.pow(factor, exponent))
    except (OverflowError, ValueError):
        return math.inf


def _round(value: float) -> int:
    if math.isnan(value):
        return 0
    if abs(value) >= _INT64_MAX:
        return _INT64_MAX if value > 0 else -_INT64_MAX
    return math.floor(value + 0.5) if value >= 0 else math.ceil(value - 0.5)


def saturating_add(at_ms: int, delay_ms: int) -> int:
    return max(-_INT64_MAX, min(_INT64_MAX, at_ms + delay_ms))
