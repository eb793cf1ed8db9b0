"""The promises of `Clock`, held against the wall clock and the hand-driven one."""

import asyncio
from collections.abc import Callable

import pytest

from silo.clock import Clock, SystemClock, VirtualClock
from tests.builders import until


class _System:
    """The wall clock, waited for."""

    def __init__(self) -> None:
        self.clock = SystemClock()

    async def pass_until(self, at_ms: int, condition: Callable[[], bool]) -> None:
        await until(lambda: self.clock.now_ms() > at_ms and condition())


class _Virtual:
    """The hand-driven clock, moved in small steps."""

    def __init__(self) -> None:
        self.clock = VirtualClock()

    async def pass_until(self, at_ms: int, condition: Callable[[], bool]) -> None:
        while self.clock.now_ms() <= at_ms:
            self.clock.advance_ms(3)
        assert condition()


Time = _System | _Virtual


@pytest.fixture(params=[_System, _Virtual])
def time(request: pytest.FixtureRequest) -> Time:
    made: Time = request.param()
    return made


async def test_time_never_goes_back(time: Time) -> None:
    clock: Clock = time.clock
    first = clock.now_ms()
    await time.pass_until(first + 5, lambda: True)
    assert clock.now_ms() > first + 5


async def test_an_alarm_rings_once_at_its_time_or_later(time: Time) -> None:
    rung: list[int] = []
    at_ms = time.clock.now_ms() + 25
    time.clock.call_at(at_ms, lambda: rung.append(time.clock.now_ms()))
    assert rung == []

    await time.pass_until(at_ms + 30, lambda: bool(rung))

    [rung_at_ms] = rung
    assert rung_at_ms >= at_ms


async def test_alarms_ring_in_the_order_of_their_times(time: Time) -> None:
    rung: list[int] = []
    now_ms = time.clock.now_ms()
    for delay_ms in (60, 20, 40):
        time.clock.call_at(now_ms + delay_ms, lambda delay_ms=delay_ms: rung.append(delay_ms))  # type: ignore[misc]

    await time.pass_until(now_ms + 60, lambda: len(rung) == 3)

    assert rung == [20, 40, 60]


async def test_an_alarm_in_the_past_rings_soon_but_not_within_the_call(time: Time) -> None:
    rung: list[str] = []
    now_ms = time.clock.now_ms()
    time.clock.call_at(now_ms - 1_000, lambda: rung.append("past"))
    assert rung == []

    await time.pass_until(now_ms + 5, lambda: rung == ["past"])


async def test_a_cancelled_alarm_never_rings(time: Time) -> None:
    rung: list[str] = []
    now_ms = time.clock.now_ms()
    cancelled = time.clock.call_at(now_ms + 10, lambda: rung.append("cancelled"))
    time.clock.call_at(now_ms + 20, lambda: rung.append("kept"))
    cancelled.cancel()
    cancelled.cancel()

    await time.pass_until(now_ms + 30, lambda: bool(rung))

    assert rung == ["kept"]


async def test_cancelling_an_alarm_that_has_rung_does_nothing(time: Time) -> None:
    rung: list[str] = []
    now_ms = time.clock.now_ms()
    alarm = time.clock.call_at(now_ms + 5, lambda: rung.append("rung"))
    await time.pass_until(now_ms + 10, lambda: bool(rung))

    alarm.cancel()

    assert rung == ["rung"]


async def test_an_alarm_may_set_the_next_one(time: Time) -> None:
    rung: list[str] = []
    now_ms = time.clock.now_ms()

    def ring() -> None:
        rung.append("rung")
        if len(rung) < 3:
            time.clock.call_at(now_ms + 10 * len(rung), ring)

    time.clock.call_at(now_ms, ring)
    await time.pass_until(now_ms + 30, lambda: len(rung) == 3)

    assert rung == ["rung"] * 3


async def test_an_alarm_may_cancel_a_later_one(time: Time) -> None:
    rung: list[str] = []
    now_ms = time.clock.now_ms()
    later = time.clock.call_at(now_ms + 40, lambda: rung.append("later"))
    time.clock.call_at(now_ms + 5, later.cancel)
    time.clock.call_at(now_ms + 60, lambda: rung.append("last"))

    await time.pass_until(now_ms + 60, lambda: bool(rung))

    assert rung == ["last"]


def test_virtual_alarms_ring_at_their_own_time_during_a_long_step() -> None:
    clock = VirtualClock(1_000)
    rung: list[tuple[str, int]] = []
    for name, delay_ms in (("b", 20), ("a", 10), ("c", 20)):
        clock.call_at(1_000 + delay_ms, lambda name=name: rung.append((name, clock.now_ms())))  # type: ignore[misc]

    clock.advance_ms(100)

    assert rung == [("a", 1_010), ("b", 1_020), ("c", 1_020)]
    assert clock.now_ms() == 1_100


async def test_a_wall_clock_set_back_delays_an_alarm_instead_of_ringing_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SystemClock()
    real_ms, offset_ms = clock.now_ms, 0
    monkeypatch.setattr(clock, "now_ms", lambda: real_ms() + offset_ms)
    rung: list[int] = []
    at_ms = clock.now_ms() + 20
    clock.call_at(at_ms, lambda: rung.append(clock.now_ms()))
    offset_ms = -60

    async with asyncio.timeout(10):
        while not rung:  # noqa: ASYNC110  # The alarm is the event.
            await asyncio.sleep(0.005)

    assert rung[0] >= at_ms


async def test_a_far_alarm_is_looked_at_again_so_that_a_clock_set_forward_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SystemClock()
    monkeypatch.setattr(clock, "_RECHECK_S", 0.01)
    real_ms, offset_ms = clock.now_ms, 0
    monkeypatch.setattr(clock, "now_ms", lambda: real_ms() + offset_ms)
    rung: list[str] = []
    clock.call_at(clock.now_ms() + 3_600_000, lambda: rung.append("rung"))
    await asyncio.sleep(0)
    assert rung == []

    offset_ms = 3_600_000

    await until(lambda: rung == ["rung"])
