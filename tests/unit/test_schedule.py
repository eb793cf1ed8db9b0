"""When work runs: deadlines with ageing, and the wait before a retry."""

from random import Random

import pytest

from silo.engine.schedule import pending_at, retry_delay_ms, virtual_deadline_ms
from silo.model.job import Delayed, Ready
from tests.builders import a_policy


def delays(count: int, **policy: object) -> list[int]:
    chosen = a_policy(count, **policy)  # type: ignore[arg-type]  # Named parameters of the builder.
    return [retry_delay_ms(chosen, failed, Random(1)) for failed in range(1, count + 1)]


@pytest.mark.spec("RET-4")
def test_the_first_retry_waits_initial_times_factor() -> None:
    assert delays(4, initial_interval_ms=1_000, backoff_factor=2.0) == [2_000, 4_000, 8_000, 16_000]


@pytest.mark.spec("RET-4", "RET-6")
def test_the_cap_counts_after_the_jitter() -> None:
    policy = a_policy(9, initial_interval_ms=900, max_interval_ms=1_000, randomize_interval=True)
    assert {retry_delay_ms(policy, 1, Random(seed)) for seed in range(50)} <= set(range(900, 1_001))


@pytest.mark.spec("RET-6")
def test_jitter_multiplies_by_one_to_two() -> None:
    policy = a_policy(1, initial_interval_ms=1_000, max_interval_ms=10_000, randomize_interval=True)
    drawn = [retry_delay_ms(policy, 1, Random(seed)) for seed in range(500)]
    assert 1_000 <= min(drawn) < 1_050
    assert 1_950 < max(drawn) <= 2_000


@pytest.mark.spec("RET-4")
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (a_policy(1, initial_interval_ms=1_000, max_interval_ms=0), 0),
        (a_policy(1, initial_interval_ms=0, max_interval_ms=9), 0),
        (a_policy(1, initial_interval_ms=1, max_interval_ms=9, backoff_factor=1e308), 9),
        (a_policy(1, initial_interval_ms=1, max_interval_ms=9, backoff_factor=float("inf")), 9),
        (a_policy(1, initial_interval_ms=5, max_interval_ms=9, backoff_factor=float("nan")), 0),
        (a_policy(1, initial_interval_ms=5, max_interval_ms=9, backoff_factor=0.5), 3),  # Half rounds up.
    ],
)
def test_strange_policies_give_a_delay_within_the_cap(policy: object, expected: int) -> None:
    assert retry_delay_ms(policy, 1, Random(1)) == expected  # type: ignore[arg-type]


def test_one_priority_point_counts_as_much_as_its_step_of_waiting() -> None:
    step_ms = 10_000
    urgent_later = virtual_deadline_ms(20_000, 0, step_ms)
    assert virtual_deadline_ms(0, 1, step_ms) < urgent_later  # It has waited long enough.
    assert virtual_deadline_ms(0, 3, step_ms) > urgent_later


def test_without_a_step_work_goes_first_in_first_out() -> None:
    assert virtual_deadline_ms(5, 99, 0) < virtual_deadline_ms(6, 0, 0)


def test_a_deadline_never_leaves_the_range_of_a_key() -> None:
    assert virtual_deadline_ms((1 << 63) - 1, 99, 10_000) == (1 << 63) - 1


def test_work_is_due_at_its_start_and_not_before() -> None:
    assert pending_at(100, 0, (), now_ms=100, priority_step_ms=10) == Ready(100)
    assert pending_at(101, 0, (), now_ms=100, priority_step_ms=10) == Delayed(101)
