"""One piece of work wakes one waiter, and is never forgotten."""

import asyncio

import pytest

from silo.clock import VirtualClock
from silo.model.job import LEASE_MS
from silo.shard.listeners import Listeners
from tests.builders import GROUP, a_job, a_policy, open_shard


class Bell:
    def __init__(self) -> None:
        self.rings = 0

    def __call__(self) -> None:
        self.rings += 1


def test_a_piece_of_work_wakes_the_one_who_waits_longest() -> None:
    listeners, bells = Listeners(lambda group: True), [Bell() for _ in range(3)]
    for bell in bells:
        listeners.add("g", bell)
    listeners.wake_one("g")
    assert [bell.rings for bell in bells] == [1, 0, 0]
    listeners.wake_one("g")
    assert [bell.rings for bell in bells] == [1, 1, 0]


@pytest.mark.parametrize(("is_left", "rings"), [(True, 1), (False, 0)])
def test_whoever_was_woken_and_leaves_wakes_the_next_while_work_is_left(is_left: bool, rings: int) -> None:
    listeners, first, second = Listeners(lambda group: is_left), Bell(), Bell()
    stop = listeners.add("g", first)
    listeners.add("g", second)
    listeners.wake_one("g")
    stop()
    stop()
    assert second.rings == rings


def test_whoever_was_not_woken_leaves_in_silence() -> None:
    listeners, first, second = Listeners(lambda group: True), Bell(), Bell()
    stop = listeners.add("g", first)
    listeners.add("g", second)
    stop()
    assert second.rings == 0


def test_a_group_without_listeners_is_forgotten() -> None:
    listeners = Listeners(lambda group: True)
    listeners.add("g", Bell())()
    assert "g" not in listeners
    listeners.wake_one("g")


async def test_a_thousand_waiting_polls_share_the_work_and_none_is_woken_in_vain() -> None:
    async with open_shard() as shard:

        async def poll() -> int:
            tasks = await shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=1, wait_ms=60_000)
            return len(tasks)

        polls = [asyncio.ensure_future(poll()) for _ in range(1000)]
        await asyncio.sleep(0)
        for number in range(400):
            await shard.enqueue(a_job(f"j{number}"))
        done, _ = await asyncio.wait(polls, timeout=0.5)
        assert len(done) == 400
        shard.end_waits()
        assert sum(await asyncio.gather(*polls)) == 400


async def test_work_for_a_poll_that_hangs_up_goes_to_another() -> None:
    for steps in range(30):
        clock = VirtualClock()
        async with open_shard(clock=clock) as shard:
            polls = [
                asyncio.ensure_future(
                    shard.lease_tasks(worker_id=name, task_group=GROUP, max_tasks=1, wait_ms=60_000)
                )
                for name in ("gone", "there")
            ]
            await asyncio.sleep(0)
            job = a_job("j1", retry_policy=a_policy(1, initial_interval_ms=0))
            enqueuing = asyncio.ensure_future(shard.enqueue(job))
            for _ in range(steps):
                await asyncio.sleep(0)
            polls[0].cancel()
            await enqueuing
            clock.advance_ms(LEASE_MS)  # It may have had the lease already.
            await shard.tick()
            [task] = await asyncio.wait_for(polls[1] if polls[0].cancelled() else polls[0], 5)
            assert task.job.id == "j1"
            polls[1].cancel()
