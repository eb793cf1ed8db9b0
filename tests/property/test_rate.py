"""Buckets of rate limits against slow oracles: a log of hits for each window, and exact fractions."""

import calendar
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import pairwise
from typing import Protocol

import msgspec
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from silo.engine import rate
from silo.model.limit import (
    NEVER_MS,
    Bucket,
    BucketRecord,
    CalendarWindow,
    RateAlgorithm,
    RateBehavior,
    RateLimit,
)
from silo.storage import codec
from tests.builders import a_rate

TOKENS, LEAKY = RateAlgorithm.TOKEN_BUCKET, RateAlgorithm.LEAKY_BUCKET
GREGORIAN, RESET, DRAIN = RateBehavior
MOST = (1 << 63) - 1
START_MS = 1_700_000_000_000
EQUAL_WINDOWS = (CalendarWindow.MINUTE, CalendarWindow.HOUR, CalendarWindow.DAY, CalendarWindow.WEEK)

Request = tuple[int, RateLimit]
"""When, and what."""


# Oracles


class Oracle(Protocol):
    """Says of each request whether it passes, and how many hits are in use then."""

    def ask(self, limit: RateLimit, now_ms: int) -> tuple[bool, Fraction]: ...


class WindowLog:
    """A token bucket as the log of the hits in its window."""

    def __init__(self) -> None:
        self._start_ms: int | None = None
        self._log: list[int] = []

    def ask(self, limit: RateLimit, now_ms: int) -> tuple[bool, Fraction]:
        if self._start_ms is None or now_ms >= self._start_ms + max(1, limit.duration_ms):
            self._start_ms, self._log = now_ms, []
        if limit.behavior & RESET:
            self._log = []
        used = sum(self._log)
        if limit.hits < 0:
            passes, spent = True, -min(used, -limit.hits)
        elif limit.hits == 0:
            passes, spent = used < limit.limit, 0
        else:
            passes = used + limit.hits <= limit.limit
            left = max(0, limit.limit - used) if limit.behavior & DRAIN else 0
            spent = limit.hits if passes else left
        self._log.append(spent)
        return passes, Fraction(sum(self._log))


class LeakingLevel:
    """A leaky bucket as its exact level in hits."""

    def __init__(self) -> None:
        self._level = Fraction(0)
        self._at_ms = 0
        self._duration_ms = 1

    def ask(self, limit: RateLimit, now_ms: int) -> tuple[bool, Fraction]:
        duration_ms = max(1, limit.duration_ms)
        if duration_ms != self._duration_ms:  # What a hit is counted in: less than that is let go.
            self._level = Fraction(int(self._level * duration_ms), duration_ms)
        passed_ms = max(0, now_ms - self._at_ms)
        drained = Fraction(max(0, limit.limit) * passed_ms, duration_ms)
        level = max(Fraction(0), self._level - drained)
        if limit.behavior & RESET:
            level = Fraction(0)
        if limit.hits < 0:
            passes, level = True, max(Fraction(0), level + limit.hits)
        elif limit.hits == 0:
            passes = level < limit.limit
        else:
            passes = level + limit.hits <= limit.limit
            if passes:
                level += limit.hits
            elif limit.behavior & DRAIN:
                level = max(level, Fraction(limit.limit))
        self._level, self._duration_ms = level, duration_ms
        self._at_ms = max(now_ms, self._at_ms)
        return passes, level


ORACLES: dict[RateAlgorithm, type[Oracle]] = {TOKENS: WindowLog, LEAKY: LeakingLevel}
both = pytest.mark.parametrize("algorithm", RateAlgorithm, ids=lambda algorithm: algorithm.name)


# Requests


def limits(*, changing: bool = True) -> st.SearchStrategy[RateLimit]:
    """Limits of all settings that matter, small enough to meet often; of one bucket."""
    return st.builds(
        a_rate,
        st.integers(-2, 7) if changing else st.just(5),
        st.integers(-1, 30) if changing else st.just(12),
        hits=st.sampled_from([-3, -1, 0, 1, 1, 1, 2, 3, 5, 8]),
        behavior=st.sampled_from([0, 0, 0, 1, 2, RESET, DRAIN, RESET | DRAIN]) if changing else st.just(0),
    )


@st.composite
def histories(
    draw: st.DrawFn, algorithm: RateAlgorithm, *, changing: bool = True, back_ms: int = 5
) -> list[Request]:
    """Requests in the order in which they come; the clock may go back a little between two of them."""
    now_ms = START_MS
    requests = []
    for limit in draw(st.lists(limits(changing=changing), max_size=20)):
        now_ms += draw(st.integers(-back_ms, 15))
        requests.append((now_ms, msgspec.structs.replace(limit, algorithm=algorithm)))
    return requests


def bucket_after(requests: list[Request]) -> Bucket | None:
    bucket = None
    for now_ms, limit in requests:
        bucket = rate.check(bucket, limit, tenant="-", now_ms=now_ms).bucket
    return bucket


def passes(bucket: Bucket | None, limit: RateLimit, now_ms: int) -> bool:
    return rate.check(bucket, limit, tenant="-", now_ms=now_ms).is_under


# What passes


@both
@given(st.data())
def test_every_verdict_is_that_of_the_oracle(algorithm: RateAlgorithm, data: st.DataObject) -> None:
    oracle, bucket = ORACLES[algorithm](), None
    for now_ms, limit in data.draw(histories(algorithm)):
        verdict = rate.check(bucket, limit, tenant="-", now_ms=now_ms)
        bucket = verdict.bucket
        level = bucket.used + Fraction(bucket.part, bucket.duration_ms)
        assert (verdict.is_under, level) == oracle.ask(limit, now_ms)


@given(histories(TOKENS, changing=False))
def test_a_window_of_tokens_never_lets_more_through_than_its_limit(requests: list[Request]) -> None:
    bucket, windows = None, {}
    for now_ms, limit in requests:
        assume(limit.hits >= 0)
        verdict = rate.check(bucket, limit, tenant="-", now_ms=now_ms)
        bucket = verdict.bucket
        if verdict.is_under:
            windows[bucket.at_ms] = windows.get(bucket.at_ms, 0) + limit.hits
    starts = sorted(windows)
    assert all(hits <= 5 for hits in windows.values())
    assert all(later - start >= 12 for start, later in pairwise(starts))


@given(histories(LEAKY, changing=False, back_ms=0))
def test_a_leaky_bucket_lets_through_what_it_holds_and_what_drains_meanwhile(requests: list[Request]) -> None:
    bucket, passed = None, []
    for now_ms, limit in requests:
        assume(limit.hits >= 0)
        verdict = rate.check(bucket, limit, tenant="-", now_ms=now_ms)
        bucket = verdict.bucket
        if verdict.is_under:
            passed.append((now_ms, limit.hits))
    for first, (start_ms, _) in enumerate(passed):
        hits = 0
        for now_ms, more in passed[first:]:
            hits += more
            assert hits <= 5 + Fraction(5 * (now_ms - start_ms), 12)


@given(histories(TOKENS), histories(LEAKY))
def test_another_algorithm_begins_with_an_empty_bucket(tokens: list[Request], leaky: list[Request]) -> None:
    now_ms = START_MS + 1_000
    for requests, limit in ((tokens, a_rate(3, algorithm=LEAKY)), (leaky, a_rate(3, algorithm=TOKENS))):
        found = rate.check(bucket_after(requests), limit, tenant="-", now_ms=now_ms)
        assert found == rate.check(None, limit, tenant="-", now_ms=now_ms)


# When hits fit


@both
@given(st.data())
def test_hits_fit_at_the_first_millisecond_at_which_a_check_passes(
    algorithm: RateAlgorithm, data: st.DataObject
) -> None:
    requests = data.draw(histories(algorithm))
    limit = msgspec.structs.replace(data.draw(limits()), algorithm=algorithm)
    now_ms = (requests[-1][0] if requests else START_MS) + data.draw(st.integers(-5, 15))
    bucket = bucket_after(requests)
    fits_at_ms = rate.fits_at_ms(bucket, limit, tenant="-", now_ms=now_ms)
    _check_first(bucket, limit, now_ms, fits_at_ms, within_ms=400)


@both
@given(st.data())
def test_a_refusal_says_when_the_same_request_would_fit(
    algorithm: RateAlgorithm, data: st.DataObject
) -> None:
    requests = data.draw(histories(algorithm))
    assume(requests)
    now_ms, limit = requests[-1]
    verdict = rate.check(bucket_after(requests[:-1]), limit, tenant="-", now_ms=now_ms)
    if verdict.is_under:
        assert verdict.fits_at_ms == now_ms
    else:
        _check_first(verdict.bucket, limit, now_ms, verdict.fits_at_ms, within_ms=400)


def _check_first(
    bucket: Bucket | None, limit: RateLimit, now_ms: int, fits_at_ms: int, *, within_ms: int
) -> None:
    """`fits_at_ms` is the first time from now on at which the request passes."""
    assert fits_at_ms >= now_ms
    found = (at_ms for at_ms in range(now_ms, now_ms + within_ms) if passes(bucket, limit, at_ms))
    if fits_at_ms == NEVER_MS:
        assert not rate.can_ever_pass(limit)
        assert next(found, None) is None
        assert not passes(bucket, limit, now_ms + 10**9)
    else:
        assert fits_at_ms < now_ms + within_ms, "the bound of the search is too small"
        assert next(found) == fits_at_ms


large = st.integers(1, MOST)


@both
@given(large, large, large, st.integers(0, (1 << 31) - 1))
def test_hits_fit_to_the_millisecond_at_any_size(
    algorithm: RateAlgorithm, limit: int, duration_ms: int, spent: int, hits: int
) -> None:
    full = a_rate(spent, duration_ms, hits=spent, algorithm=algorithm)
    bucket = rate.check(None, full, tenant="-", now_ms=START_MS).bucket
    assert bucket.used == spent
    wanted = a_rate(limit, duration_ms, hits=hits, algorithm=algorithm)
    now_ms = START_MS + 17
    fits_at_ms = rate.fits_at_ms(bucket, wanted, tenant="-", now_ms=now_ms)
    assert now_ms <= fits_at_ms <= NEVER_MS
    if fits_at_ms < NEVER_MS:
        assert passes(bucket, wanted, fits_at_ms)
    if fits_at_ms > now_ms:
        assert not passes(bucket, wanted, now_ms)
        assert not passes(bucket, wanted, fits_at_ms - 1)
        assert not passes(bucket, wanted, (now_ms + fits_at_ms - 1) // 2)


# When a bucket is as good as new


@both
@given(st.data())
def test_an_empty_bucket_is_as_good_as_none_and_was_not_a_millisecond_before(
    algorithm: RateAlgorithm, data: st.DataObject
) -> None:
    requests = data.draw(histories(algorithm))
    bucket = bucket_after(requests)
    assume(bucket is not None)
    assert bucket is not None
    assume(bucket.limit > 0)
    empty_at_ms = rate.empty_at_ms(bucket)
    same = {"duration_ms": bucket.duration_ms, "algorithm": algorithm}
    for now_ms in (empty_at_ms, empty_at_ms + 7):
        for hits in (0, 1, bucket.limit):
            limit = a_rate(bucket.limit, hits=hits, **same)
            now = rate.check(bucket, limit, tenant="-", now_ms=now_ms)
            assert now == rate.check(None, limit, tenant="-", now_ms=now_ms)
    if bucket.used or bucket.part:
        assert not passes(bucket, a_rate(bucket.limit, hits=bucket.limit, **same), empty_at_ms - 1)


# Calendar windows


@given(st.sampled_from(CalendarWindow), st.integers(0, 4_102_444_800_000))
@example(CalendarWindow.MONTH, 951_782_400_000)  # 29 February 2000
@example(CalendarWindow.YEAR, 951_782_400_000)
def test_a_calendar_window_holds_its_moment_and_is_the_same_for_all_of_its_moments(
    window: CalendarWindow, at_ms: int
) -> None:
    start_ms, end_ms = rate.calendar_window(window, at_ms)
    assert start_ms <= at_ms < end_ms
    for other_ms in (start_ms, (start_ms + end_ms) // 2, end_ms - 1):
        assert rate.calendar_window(window, other_ms) == (start_ms, end_ms)


@pytest.mark.parametrize("window", CalendarWindow, ids=lambda window: window.name)
def test_calendar_windows_follow_one_another_without_a_gap(window: CalendarWindow) -> None:
    is_short = window in (CalendarWindow.MINUTE, CalendarWindow.HOUR)
    first = datetime(2024, 2, 28, tzinfo=UTC) if is_short else datetime(1999, 1, 1, tzinfo=UTC)
    last = datetime(2024, 3, 2, tzinfo=UTC) if is_short else datetime(2101, 1, 1, tzinfo=UTC)
    start_ms, end_ms = rate.calendar_window(window, round(first.timestamp()) * 1000)
    while start_ms < last.timestamp() * 1000:
        assert end_ms - start_ms == _length_ms(window, start_ms)
        next_start_ms, next_end_ms = rate.calendar_window(window, end_ms)
        assert next_start_ms == end_ms
        start_ms, end_ms = next_start_ms, next_end_ms


def _length_ms(window: CalendarWindow, start_ms: int) -> int:
    """How long the window is that begins then, after a look at whether one may."""
    start = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=start_ms)
    midnight = (start.hour, start.minute, start.second, start.microsecond) == (0, 0, 0, 0)
    match window:
        case CalendarWindow.MINUTE:
            assert (start.second, start.microsecond) == (0, 0)
            return 60_000
        case CalendarWindow.HOUR:
            assert (start.minute, start.second, start.microsecond) == (0, 0, 0)
            return 3_600_000
        case CalendarWindow.DAY:
            days = 1
        case CalendarWindow.WEEK:
            assert start.strftime("%A") == "Monday"
            days = 7
        case CalendarWindow.MONTH:
            assert start.day == 1
            days = calendar.monthrange(start.year, start.month)[1]
        case CalendarWindow.YEAR:
            assert (start.month, start.day) == (1, 1)
            days = 366 if calendar.isleap(start.year) else 365
    assert midnight
    return days * 86_400_000


def _window_name(window: CalendarWindow, at_ms: int) -> tuple[int, ...]:
    """What tells one window from another."""
    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=at_ms)
    match window:
        case CalendarWindow.WEEK:
            return at.isocalendar()[:2]
        case _:
            parts = (at.year, at.month, at.day, at.hour, at.minute)
            kept = {"MINUTE": 5, "HOUR": 4, "DAY": 3, "MONTH": 2, "YEAR": 1}[window.name]
            return parts[:kept]


@given(
    st.sampled_from(CalendarWindow),
    st.integers(0, 4_000_000_000_000),
    st.lists(st.tuples(st.integers(0, 1 << 34), st.integers(-2, 3), st.integers(0, 4)), max_size=15),
    st.sampled_from([1, 10, 100, 10_000, 1_000_000]),
)
def test_calendar_windows_of_tokens_let_through_what_their_limit_says(
    window: CalendarWindow, now_ms: int, steps: list[tuple[int, int, int]], scale: int
) -> None:
    log: dict[tuple[int, ...], list[int]] = {}
    bucket = None
    for step_ms, hits, most in steps:
        now_ms += step_ms // scale
        limit = a_rate(most, window.value, hits=hits, behavior=GREGORIAN)
        spent = log.setdefault(_window_name(window, now_ms), [])
        used = sum(spent)
        expected = hits < 0 or (used < most if hits == 0 else used + hits <= most)
        verdict = rate.check(bucket, limit, tenant="-", now_ms=now_ms)
        assert verdict.is_under is expected
        if expected:
            spent.append(max(hits, -used))
        bucket = verdict.bucket
        assert bucket.used == sum(spent)


@given(
    st.sampled_from(CalendarWindow),
    st.integers(0, 4_000_000_000_000),
    st.integers(0, 10**10),
)
@example(CalendarWindow.MONTH, 1_677_628_800_000 - 1, 0)  # 28 February 2023: March is longer.
@example(CalendarWindow.YEAR, 1_704_067_200_000 - 1, 0)  # 2023: the next year is longer.
@example(CalendarWindow.MONTH, 1_675_209_600_000 - 1, 0)  # 31 January 2023: February is shorter.
def test_a_full_calendar_window_of_tokens_has_room_again_when_the_next_one_begins(
    window: CalendarWindow, spent_at_ms: int, later_ms: int
) -> None:
    limit = a_rate(1, window.value, behavior=GREGORIAN)
    bucket = rate.check(None, limit, tenant="-", now_ms=spent_at_ms).bucket
    now_ms = spent_at_ms + later_ms
    _, end_ms = rate.calendar_window(window, spent_at_ms)
    assert rate.empty_at_ms(bucket) == end_ms
    assert rate.fits_at_ms(bucket, limit, tenant="-", now_ms=now_ms) == max(now_ms, end_ms)
    assert passes(bucket, limit, max(now_ms, end_ms))
    if now_ms < end_ms:
        assert not passes(bucket, limit, now_ms)
        assert not passes(bucket, limit, end_ms - 1)


calendars = st.builds(
    lambda window, most: a_rate(most, window.value, behavior=GREGORIAN),
    st.sampled_from(CalendarWindow),
    st.integers(1, 3),
)
plain = st.builds(a_rate, st.integers(1, 3), st.integers(1, 1 << 36))
steps_ms = st.one_of(st.integers(-(1 << 33), 1 << 36), st.integers(-5_000, 100_000))


@given(st.lists(st.tuples(steps_ms, st.one_of(calendars, plain)), min_size=1, max_size=8), steps_ms)
def test_tokens_come_back_at_the_millisecond_that_was_said_whatever_windows_came_before(
    steps: list[Request], last_step_ms: int
) -> None:
    now_ms, requests = START_MS, []
    for step_ms, limit in steps:
        now_ms += step_ms
        requests.append((now_ms, limit))
    now_ms, wanted, bucket = now_ms + last_step_ms, requests[-1][1], bucket_after(requests)
    fits_at_ms = rate.fits_at_ms(bucket, wanted, tenant="-", now_ms=now_ms)
    assert fits_at_ms >= now_ms
    assert passes(bucket, wanted, fits_at_ms)
    if fits_at_ms > now_ms:
        for at_ms in (now_ms, (now_ms + fits_at_ms - 1) // 2, fits_at_ms - 1):
            assert not passes(bucket, wanted, at_ms)


@given(st.sampled_from(EQUAL_WINDOWS), st.integers(0, 4_000_000_000_000), st.integers(1, 9))
def test_a_leaky_bucket_drains_in_the_length_of_its_calendar_window(
    window: CalendarWindow, now_ms: int, most: int
) -> None:
    """Months and years differ in length: there it goes by that of the moment."""
    limit = a_rate(most, window.value, hits=most, algorithm=LEAKY, behavior=GREGORIAN)
    start_ms, end_ms = rate.calendar_window(window, now_ms)
    bucket = rate.check(None, limit, tenant="-", now_ms=now_ms).bucket
    assert rate.empty_at_ms(bucket) == now_ms + end_ms - start_ms
    one = msgspec.structs.replace(limit, hits=1)
    fits_at_ms = rate.fits_at_ms(bucket, one, tenant="-", now_ms=now_ms)
    assert fits_at_ms == now_ms + -((start_ms - end_ms) // most)
    assert passes(bucket, one, fits_at_ms)
    assert not passes(bucket, one, fits_at_ms - 1)


# What is stored


sizes = st.one_of(st.integers(-(1 << 63), MOST), st.sampled_from([MOST, MOST - 1, 1, 0, -(1 << 63)]))


@both
@given(
    requests=st.lists(
        st.tuples(
            st.integers(0, 1 << 42),
            st.builds(
                a_rate,
                sizes,
                sizes,
                hits=st.one_of(st.integers(-(1 << 31), (1 << 31) - 1), st.sampled_from([0, 1])),
                behavior=st.sampled_from([0, 1, RESET, DRAIN, DRAIN | RESET]),
            ),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_all_that_is_stored_fits_into_64_bits(algorithm: RateAlgorithm, requests: list[Request]) -> None:
    bucket = None
    for now_ms, limit in requests:
        request = msgspec.structs.replace(limit, algorithm=algorithm)
        verdict = rate.check(bucket, request, tenant="-", now_ms=now_ms)
        bucket = verdict.bucket
        assert 0 <= bucket.used <= MOST
        assert 0 <= bucket.part < bucket.duration_ms
        for alarm_at_ms in (
            verdict.fits_at_ms,
            rate.empty_at_ms(bucket),
            rate.fits_at_ms(bucket, request, tenant="-", now_ms=now_ms),
        ):
            assert 0 <= alarm_at_ms <= NEVER_MS
            record = BucketRecord(bucket, 1, alarm_at_ms)
            assert codec.decode(BucketRecord, codec.encode(record)) == record
