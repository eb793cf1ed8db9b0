"""Places go to those who wait, in their order, and none is ever lost."""

import asyncio

import pytest

from silo.worker.context import CancellationSignal
from silo.worker.execution.places import Places
from tests.builders import until


async def test_those_who_wait_come_in_their_order() -> None:
    places, came = Places(1), list[int]()

    async def come(number: int) -> None:
        await places.take(CancellationSignal())
        came.append(number)

    await places.take(CancellationSignal())
    waiting = [asyncio.create_task(come(number)) for number in range(3)]
    await asyncio.sleep(0)
    for count in (1, 2, 3):
        places.give_back()
        await until(lambda count=count: len(came) == count)
    await asyncio.gather(*waiting)
    assert came == [0, 1, 2]


async def test_a_signal_that_is_set_already_gets_no_place() -> None:
    places, signal = Places(1), CancellationSignal()
    signal.abort()
    with pytest.raises(asyncio.CancelledError):
        await places.take(signal)
    await places.take(CancellationSignal())  # It is still there.


async def test_a_signal_that_is_set_meanwhile_leaves_the_line() -> None:
    places, signal = Places(1), CancellationSignal()
    await places.take(CancellationSignal())
    waiting = asyncio.create_task(places.take(signal))
    await asyncio.sleep(0)
    signal.abort()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    places.give_back()
    await places.take(CancellationSignal())


async def test_a_caller_who_is_cancelled_in_line_takes_no_place() -> None:
    places = Places(1)
    await places.take(CancellationSignal())
    waiting = asyncio.create_task(places.take(CancellationSignal()))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    places.give_back()
    await places.take(CancellationSignal())


async def test_a_place_that_comes_as_the_caller_is_cancelled_goes_to_the_next() -> None:
    places = Places(1)
    await places.take(CancellationSignal())
    first = asyncio.create_task(places.take(CancellationSignal()))
    second = asyncio.create_task(places.take(CancellationSignal()))
    await asyncio.sleep(0)
    places.give_back()
    first.cancel()
    await asyncio.wait({first, second})
    assert first.cancelled()
    assert second.exception() is None


async def test_a_place_that_comes_as_the_signal_is_set_is_not_lost() -> None:
    places, signal = Places(1), CancellationSignal()
    await places.take(CancellationSignal())
    waiting = asyncio.create_task(places.take(signal))
    await asyncio.sleep(0)
    signal.abort()
    places.give_back()
    await waiting
    places.give_back()
    await places.take(CancellationSignal())


async def test_who_is_turned_away_waits_no_longer_and_others_can_come() -> None:
    places = Places(1)
    await places.take(CancellationSignal())
    waiting = asyncio.create_task(places.take(CancellationSignal()))
    await asyncio.sleep(0)
    places.turn_away()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    places.give_back()
    await places.take(CancellationSignal())
