"""Keys sort as what they encode, never collide, and stay within their prefixes."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from silo.storage import keys

_texts = st.text(alphabet=st.sampled_from("\x00\x01aAb\x7fé\U0001f600"), max_size=6) | st.text(max_size=12)
_times = st.integers(0, 5) | st.integers(0, (1 << 63) - 1)
_bytes = st.integers(0, 255)
_numbers = st.integers(0, 3) | st.integers(0, (1 << 32) - 1)

Parts = tuple[str | int, ...]


def _newest_first(tenant: str, status: int, at_ms: int, job_id: str) -> tuple[str | int, ...]:
    return (tenant, status, -at_ms, job_id)


_FAMILIES: dict[
    str, tuple[Callable[..., bytes], list[st.SearchStrategy[str | int]], Callable[..., Parts]]
] = {
    "state": (keys.state_key, [_texts, _texts], lambda *parts: parts),
    "job": (keys.job_key, [_texts, _texts], lambda *parts: parts),
    "attempt": (keys.attempt_key, [_texts, _texts, _numbers], lambda *parts: parts),
    "status index": (keys.status_index_key, [_texts, _bytes, _times, _texts], _newest_first),
    "metadata index": (keys.metadata_index_key, [_texts, _texts, _texts, _texts], lambda *parts: parts),
    "queue": (keys.queue_key, [_texts, _texts, _times, _bytes, _texts], lambda *parts: parts),
    "timer": (keys.timer_key, [_times, _texts, _texts], lambda *parts: parts),
    "lease": (keys.lease_key, [_texts], lambda *parts: parts),
    "counts": (keys.counts_key, [_texts], lambda *parts: parts),
}


def _sortable(parts: Sequence[str | int]) -> list[bytes | int]:
    """Text sorts by its UTF-8 bytes, which is also the order of its code points."""
    return [part.encode() if isinstance(part, str) else part for part in parts]


@pytest.mark.parametrize("family", _FAMILIES)
@given(st.data())
def test_keys_sort_as_the_tuples_they_encode(family: str, data: st.DataObject) -> None:
    make, parts, order = _FAMILIES[family]
    tuples = data.draw(st.lists(st.tuples(*parts), min_size=2, max_size=6))
    by_key = sorted(tuples, key=lambda values: make(*values))
    by_order = sorted(tuples, key=lambda values: _sortable(order(*values)))
    assert by_key == by_order


@given(st.data())
def test_no_two_different_things_share_a_key(data: st.DataObject) -> None:
    named = st.sampled_from(sorted(_FAMILIES)).flatmap(
        lambda family: st.tuples(st.just(family), st.tuples(*_FAMILIES[family][1]))
    )
    things = data.draw(st.lists(named, unique=True, max_size=12))
    made = [_FAMILIES[family][0](*values) for family, values in things]
    assert len(set(made)) == len(made)
    assert keys.CREATED_AT not in made
    assert keys.TOTALS not in made


@given(st.lists(_texts, min_size=1, max_size=4))
@example(["\x00", "", "a\x00\x00"])
def test_texts_read_back_one_after_the_other(texts: list[str]) -> None:
    key = keys.queue_key(texts[0], texts[-1], 7, 50, "id")
    first, at = keys.read_text(key, 1)
    second, at = keys.read_text(key, at)
    assert (first, second) == (texts[0], texts[-1])
    assert keys.read_text(key, at + 9) == ("id", len(key))

    key = b"m" + b"".join(keys.counts_key(text)[1:] for text in texts)
    at = 1
    for text in texts:
        read, at = keys.read_text(key, at)
        assert read == text
    assert at == len(key)


@given(st.binary(max_size=12), st.integers(0, 12))
def test_reading_text_from_any_bytes_gives_text_or_a_value_error(key: bytes, at: int) -> None:
    try:
        text, end = keys.read_text(key, at)
    except ValueError:
        return
    assert at + 2 <= end <= len(key)
    assert keys.counts_key(text)[1:] == key[at:end]


_queues = st.tuples(_texts, _texts)


@given(_queues, _queues, st.tuples(_times, _bytes, _texts))
def test_a_queue_prefix_holds_exactly_its_own_rows(
    queue: tuple[str, str], other: tuple[str, str], row: tuple[int, int, str]
) -> None:
    prefix = keys.queue_prefix(*queue)
    assert _holds(prefix, keys.queue_key(*queue, *row))
    assert _holds(prefix, keys.queue_key(*other, *row)) == (queue == other)

    prefix = keys.queue_group_prefix(queue[0])
    assert _holds(prefix, keys.queue_key(queue[0], other[1], *row))
    assert _holds(prefix, keys.queue_key(*other, *row)) == (queue[0] == other[0])


@given(_times, _texts, _texts)
def test_the_timer_and_lease_prefixes_hold_their_families_alone(at_ms: int, tenant: str, job_id: str) -> None:
    timer, lease = keys.timer_key(at_ms, tenant, job_id), keys.lease_key(job_id)
    assert _holds(keys.TIMERS, timer)
    assert not _holds(keys.TIMERS, lease)
    assert _holds(keys.LEASES, lease)
    assert not _holds(keys.LEASES, timer)
    assert _holds(keys.FLOORS, keys.floor_key(timer))


def _holds(prefix: bytes, key: bytes) -> bool:
    assert (prefix <= key < keys.range_end(prefix)) == key.startswith(prefix)
    return key.startswith(prefix)


_prefixes = st.lists(st.sampled_from([b"\x00", b"\x01", b"a", b"\xfe", b"\xff"]), max_size=5).map(b"".join)


@given(_prefixes, _prefixes)
def test_range_end_is_the_first_key_behind_all_that_start_with_the_prefix(prefix: bytes, key: bytes) -> None:
    if not prefix.strip(b"\xff"):
        with pytest.raises(ValueError, match="no key lies after"):
            keys.range_end(prefix)
        return
    end = keys.range_end(prefix)
    assert prefix < end
    assert (prefix <= key < end) == key.startswith(prefix)
    assert prefix + key < end


@given(_prefixes, _prefixes)
def test_nothing_lies_between_a_key_and_the_one_after(key: bytes, other: bytes) -> None:
    assert key < keys.after(key)
    assert not key < other < keys.after(key)


@given(st.integers(-(1 << 70), -1), st.integers(1 << 63, 1 << 70))
def test_times_out_of_range_are_kept_as_the_nearest_one(too_early: int, too_late: int) -> None:
    assert keys.timer_key(too_early, "t", "j") == keys.timer_key(0, "t", "j")
    assert keys.timer_key(too_late, "t", "j") == keys.timer_key((1 << 63) - 1, "t", "j")
    assert keys.status_index_key("t", 0, too_early, "j") == keys.status_index_key("t", 0, 0, "j")
    assert keys.status_index_key("t", 0, too_late, "j") == keys.status_index_key("t", 0, (1 << 63) - 1, "j")
