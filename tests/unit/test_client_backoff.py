"""A call that is repeated waits longer each time, never exactly as long as others, and not for ever."""

from random import Random
from typing import Any

import pytest

from silo import ShardRouting
from silo.client.backoff import Backoff

DOUBLING_S = [0.25, 0.5, 1, 2, 4, 5, 5, 5]


class FakeTime:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def a_backoff(*, seed: int = 7, time: FakeTime | None = None, **routing: Any) -> Backoff:
    return Backoff(ShardRouting(**routing), Random(seed), now_s=time or FakeTime())


def waits(backoff: Backoff, time: FakeTime | None = None) -> list[float]:
    """All waits, which pass in `time`."""
    every: list[float] = []
    while (wait_s := backoff.next_wait_s()) is not None:
        every.append(wait_s)
        if time is not None:
            time.now_s += wait_s
    return every


@pytest.mark.parametrize("seed", range(20))
def test_each_wait_is_between_one_half_of_the_doubling_one_and_all_of_it(seed: int) -> None:
    every = waits(a_backoff(seed=seed))
    assert len(every) == len(DOUBLING_S)
    assert all(whole / 2 <= wait <= whole for wait, whole in zip(every, DOUBLING_S, strict=True))


def test_clients_that_lost_the_same_server_do_not_wait_equally_long() -> None:
    firsts = {a_backoff(seed=seed).next_wait_s() for seed in range(20)}
    assert len(firsts) == 20


def test_the_same_source_of_randomness_gives_the_same_waits() -> None:
    assert waits(a_backoff(seed=3)) == waits(a_backoff(seed=3))


def test_without_retries_there_is_no_wait() -> None:
    backoff = a_backoff(max_retries=0)
    assert backoff.is_used_up
    assert backoff.next_wait_s() is None


def test_it_is_used_up_after_the_last_wait() -> None:
    backoff = a_backoff(max_retries=2)
    assert not backoff.is_used_up
    assert len(waits(backoff)) == 2
    assert backoff.is_used_up


def test_a_budget_ends_the_retries_that_are_left() -> None:
    time = FakeTime()
    backoff = a_backoff(retry_budget_ms=1000, time=time)
    time.now_s += 0.999
    assert not backoff.is_used_up
    time.now_s += 0.001
    assert backoff.is_used_up
    assert backoff.next_wait_s() is None


def test_the_last_try_begins_when_the_budget_ends() -> None:
    time = FakeTime()
    every = waits(a_backoff(retry_budget_ms=10_000, time=time), time)
    assert sum(every) == pytest.approx(10)
    assert len(every) < len(DOUBLING_S)


def test_a_budget_leaves_the_number_of_retries_as_it_is() -> None:
    time = FakeTime()
    assert len(waits(a_backoff(max_retries=3, retry_budget_ms=3_600_000, time=time), time)) == 3
