"""Rate limits by buckets: whether hits fit, and when they will. All arithmetic is in whole numbers, so exact.

Token bucket: the first hit begins a window of `duration_ms`, in which `limit` hits fit.
Leaky bucket: `limit` hits fit, and they drain evenly, `limit` of them in `duration_ms`. The
level S is counted in 1 / duration_ms of a hit: it falls by `limit` a millisecond, a hit
adds duration_ms, and limit × duration_ms is full.
"""

from datetime import UTC, datetime, timedelta

import msgspec

from silo.model.limit import NEVER_MS, Bucket, CalendarWindow, RateAlgorithm, RateBehavior, RateLimit


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """What a bucket says to a request."""

    is_under: bool
    bucket: Bucket  # As it is afterwards.
    fits_at_ms: int  # When as many hits would fit, if nobody else took any.


def check(bucket: Bucket | None, limit: RateLimit, *, tenant: str, now_ms: int) -> Verdict:
    """Judge `limit.hits` at `now_ms`, and spend them if they fit.

    No hits ask whether anything is left; negative ones give back.
    """
    current = _current(bucket, limit, tenant, now_ms)
    duration_ms = current.duration_ms
    level = 0 if limit.behavior & RateBehavior.RESET_REMAINING else _level(current)
    full = limit.limit * duration_ms
    wanted = limit.hits * duration_ms
    is_under = level + max(wanted, 1) <= full
    if is_under or wanted < 0:
        level, is_under = max(0, level + wanted), True
    elif limit.behavior & RateBehavior.DRAIN_OVER_LIMIT:
        level = max(level, full)
    used, part = divmod(level, duration_ms)
    after = msgspec.structs.replace(current, used=used, part=part)
    return Verdict(is_under, after, now_ms if is_under else _fits_at_ms(after, limit, now_ms))


def fits_at_ms(bucket: Bucket | None, limit: RateLimit, *, tenant: str, now_ms: int) -> int:
    """When `check` lets the hits through, if nobody else takes any; `now_ms` if it does now."""
    if limit.hits < 0 or limit.behavior & RateBehavior.RESET_REMAINING:
        return now_ms if can_ever_pass(limit) else NEVER_MS
    current = _current(bucket, limit, tenant, now_ms)
    return max(now_ms, _fits_at_ms(current, limit, now_ms))


def can_ever_pass(limit: RateLimit) -> bool:
    """Whether an untouched bucket would let it through."""
    return limit.hits < 0 or max(limit.hits, 1) <= limit.limit


def empty_at_ms(bucket: Bucket) -> int:
    """When the bucket is as if it had never been used, if nothing more is spent."""
    if bucket.algorithm is RateAlgorithm.TOKEN_BUCKET:
        return _saturated(bucket.at_ms + bucket.duration_ms)
    return _saturated(bucket.at_ms + -(-_level(bucket) // max(1, bucket.limit)))


def duration_of(limit: RateLimit, at_ms: int) -> int:
    """Length of the window that `at_ms` lies in, in milliseconds and at least 1."""
    if not limit.behavior & RateBehavior.DURATION_IS_GREGORIAN:
        return max(1, limit.duration_ms)
    start_ms, end_ms = calendar_window(CalendarWindow(limit.duration_ms), at_ms)
    return end_ms - start_ms


def calendar_window(window: CalendarWindow, at_ms: int) -> tuple[int, int]:
    """Begin and end, in epoch milliseconds, of the calendar window in UTC that `at_ms` lies in."""
    day = datetime.fromtimestamp(at_ms // 1000, UTC).replace(hour=0, minute=0, second=0)
    match window:
        case CalendarWindow.MINUTE:
            return at_ms - at_ms % 60_000, at_ms - at_ms % 60_000 + 60_000
        case CalendarWindow.HOUR:
            return at_ms - at_ms % 3_600_000, at_ms - at_ms % 3_600_000 + 3_600_000
        case CalendarWindow.DAY:
            start, end = day, day + timedelta(days=1)
        case CalendarWindow.WEEK:
            start = day - timedelta(days=day.weekday())
            end = start + timedelta(days=7)
        case CalendarWindow.MONTH:
            start = day.replace(day=1)
            end = (start + timedelta(days=32)).replace(day=1)
        case CalendarWindow.YEAR:
            start = day.replace(month=1, day=1)
            end = start.replace(year=start.year + 1)
    return round(start.timestamp()) * 1000, round(end.timestamp()) * 1000


def _current(bucket: Bucket | None, limit: RateLimit, tenant: str, now_ms: int) -> Bucket:
    """The bucket as it stands at `now_ms` for a request with these settings."""
    if bucket is None or bucket.algorithm is not limit.algorithm:
        bucket = Bucket(
            tenant=tenant,
            name=limit.name,
            unique_key=limit.unique_key,
            algorithm=limit.algorithm,
            limit=limit.limit,
            duration_ms=1,
            used=0,
            part=0,
            at_ms=now_ms,
        )
    if limit.algorithm is RateAlgorithm.TOKEN_BUCKET:
        start_ms, end_ms = _token_window(limit, bucket.at_ms, now_ms)
        used = bucket.used if bucket.at_ms >= start_ms else 0
        part, at_ms, duration_ms = 0, start_ms, end_ms - start_ms
    else:
        # A changed duration changes what a part of a hit is; a clock that went back drains nothing.
        duration_ms = duration_of(limit, now_ms)
        part = bucket.part * duration_ms // bucket.duration_ms
        drained = max(0, now_ms - bucket.at_ms) * max(0, limit.limit)
        used, part = divmod(max(0, bucket.used * duration_ms + part - drained), duration_ms)
        at_ms = max(now_ms, bucket.at_ms)
    return msgspec.structs.replace(
        bucket, limit=limit.limit, duration_ms=duration_ms, used=used, part=part, at_ms=at_ms
    )


def _token_window(limit: RateLimit, start_ms: int, now_ms: int) -> tuple[int, int]:
    """Begin and end of the window that counts at `now_ms`, if the last one began at `start_ms`."""
    if limit.behavior & RateBehavior.DURATION_IS_GREGORIAN:
        # The next window may be longer than the last one, so its begin decides and no duration.
        return calendar_window(CalendarWindow(limit.duration_ms), max(now_ms, start_ms))
    duration_ms = max(1, limit.duration_ms)
    if now_ms >= start_ms + duration_ms:
        start_ms = now_ms
    return start_ms, start_ms + duration_ms


def _level(bucket: Bucket) -> int:
    return bucket.used * bucket.duration_ms + bucket.part


def _fits_at_ms(bucket: Bucket, limit: RateLimit, now_ms: int) -> int:
    if not can_ever_pass(limit):
        return NEVER_MS
    missing = _level(bucket) + max(1, limit.hits * bucket.duration_ms) - limit.limit * bucket.duration_ms
    if missing <= 0:
        return now_ms
    if bucket.algorithm is RateAlgorithm.TOKEN_BUCKET:
        return _saturated(bucket.at_ms + bucket.duration_ms)
    # From the bucket's time on: if the clock went back, nothing drains before it is there again.
    return _saturated(bucket.at_ms + -(-missing // limit.limit))


def _saturated(at_ms: int) -> int:
    return min(at_ms, NEVER_MS)
