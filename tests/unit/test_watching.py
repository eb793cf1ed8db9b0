"""Waiting for the end of a job: told once it is durable, whatever else happens."""

import asyncio

import pytest

from silo.errors import JobNotFound, ShardClosed, SiloError
from silo.model.attempt import Cancelled, FinalFailure, HandedBack, Outcome
from silo.model.job import DEFAULT_TENANT, JobStatus
from silo.model.view import JobView
from silo.shard import shard as shard_module
from silo.shard.shard import ShardOptions
from silo.storage.memory import Fault
from tests.builders import DONE, a_job, a_policy
from tests.one_shard import BROKEN, OneShard, one_shard

AT_ONCE = a_policy(9, initial_interval_ms=0)
HASTY = ShardOptions(store_timeout_s=0.2)  # A hung write fails soon, so that the test can end.


def watch(here: OneShard, job_id: str = "j", *, tenant: str = DEFAULT_TENANT) -> asyncio.Task[None]:
    return asyncio.ensure_future(here.shard.wait_ended(tenant=tenant, job_id=job_id))


async def watched(here: OneShard, job_id: str = "j") -> asyncio.Task[None]:
    """A watch that has looked and found that the job has not ended."""
    watching = watch(here, job_id)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not watching.done()
    return watching


async def end_of(here: OneShard, job_id: str = "j") -> JobView:
    """The job once it has ended and was not restarted before anyone could look, as a caller sees it."""
    while True:
        await watch(here, job_id)
        view = await here.shard.get_job(tenant=DEFAULT_TENANT, job_id=job_id)
        if view.state.status.is_terminal:
            return view


def left(here: OneShard) -> int:
    """How many watches the shard still knows of."""
    return sum(map(len, here.shard._state.watchers.values()))  # Nothing public tells.


@pytest.mark.parametrize("ended", [DONE, BROKEN, Cancelled()], ids=str)
async def test_a_watch_of_a_job_that_has_ended_is_answered_at_once(ended: Outcome) -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        await here.report("j", ended)
        await asyncio.wait_for(watch(here), 5)
        assert left(here) == 0


@pytest.mark.parametrize("ended", [DONE, BROKEN, Cancelled()], ids=str)
async def test_a_watch_is_answered_when_the_job_ends(ended: Outcome) -> None:
    async with one_shard() as here:
        await here.run(a_job("j"), a_job("other"))
        watching = await watched(here)
        await here.report("other")
        assert not watching.done()
        await here.report("j", ended)
        await asyncio.wait_for(watching, 5)
        assert left(here) == 0


@pytest.mark.parametrize("tenant", [DEFAULT_TENANT, "other"])
async def test_a_watch_is_of_one_tenants_job(tenant: str) -> None:
    async with one_shard() as here:
        for name in (DEFAULT_TENANT, "other"):
            await here.enqueue(a_job("j", tenant=name))
        watching = watch(here, tenant=tenant)
        await here.shard.cancel(tenant="other", job_id="j")
        for _ in range(10):
            await asyncio.sleep(0)
        assert watching.done() is (tenant == "other")
        watching.cancel()


async def test_any_number_of_watches_of_one_job_are_all_answered() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        watching = [watch(here) for _ in range(200)]
        await here.report("j")
        await asyncio.wait_for(asyncio.gather(*watching), 5)
        assert left(here) == 0


async def test_a_watch_is_answered_at_every_moment_at_which_the_job_may_end() -> None:
    for steps in range(12):
        async with one_shard() as here:
            await here.run(a_job("j"))
            watching = watch(here)
            for _ in range(steps):
                await asyncio.sleep(0)
            await here.report("j")
            await asyncio.wait_for(watching, 5)


async def test_what_only_goes_on_is_no_end() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", retry_policy=AT_ONCE))
        watching = await watched(here)
        await here.lease()
        await here.shard.report_many([(here.task_id("j"), HandedBack())])
        await here.lease()
        await here.report("j", BROKEN)
        await here.lease()
        await here.cancel("j")
        for _ in range(10):
            await asyncio.sleep(0)
        assert not watching.done()
        await here.shard.report_many([(here.task_id("j"), FinalFailure(BROKEN))])
        await asyncio.wait_for(watching, 5)
        assert here.status("j") is JobStatus.CANCELLED


async def test_an_end_is_told_once_it_is_durable() -> None:
    async with one_shard(options=HASTY) as here:
        await here.run(a_job("j"))
        early = await watched(here)
        here.storage.faults.plan("write", Fault.HANG)
        reporting = asyncio.ensure_future(here.report("j"))
        await asyncio.sleep(0.02)
        late = watch(here)
        await asyncio.sleep(0.02)
        assert not early.done()
        assert not late.done()
        for task in (reporting, early, late):
            task.cancel()


@pytest.mark.parametrize("fault", [Fault.FAIL_BEFORE, Fault.FAIL_AFTER])
async def test_a_watch_of_a_job_whose_end_was_not_written_hears_that_the_shard_has_closed(
    fault: Fault,
) -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        watching = await watched(here)
        here.storage.faults.plan("write", fault)
        with pytest.raises(ShardClosed):
            await here.report("j")
        with pytest.raises(ShardClosed):
            await asyncio.wait_for(watching, 5)


async def test_a_watch_of_no_job_and_of_one_that_was_deleted_finds_none() -> None:
    async with one_shard() as here:
        with pytest.raises(JobNotFound):
            await watch(here)
        await here.enqueue(a_job("j"))
        watching = await watched(here)
        await here.cancel("j")
        await here.delete("j")  # Nobody had a turn to look in between.
        for each in (watching, watch(here)):
            with pytest.raises(JobNotFound):
                await asyncio.wait_for(each, 5)
        assert left(here) == 0


async def test_a_job_that_is_restarted_before_anyone_looks_is_waited_for_until_it_has_ended_again() -> None:
    for steps in range(10):
        async with one_shard() as here:
            await here.run(a_job("j"))
            waiting = asyncio.ensure_future(end_of(here))
            for _ in range(steps):
                await asyncio.sleep(0)
            reporting = asyncio.ensure_future(here.report("j", BROKEN))
            await asyncio.sleep(0)
            restarting = asyncio.ensure_future(here.restart("j"))
            await asyncio.gather(reporting, restarting)
            assert await here.lease() == ["j"]
            await here.report("j", DONE)
            view = await asyncio.wait_for(waiting, 5)
            assert view.state.status in (JobStatus.FAILED, JobStatus.SUCCEEDED)
            assert view.last_outcome in (BROKEN, DONE)


async def test_a_watch_hears_that_its_shard_has_closed() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j"))
        watching = await watched(here)
        await here.shard.close()
        with pytest.raises(ShardClosed):
            await asyncio.wait_for(watching, 5)
        with pytest.raises(ShardClosed):
            await watch(here)


async def test_a_watch_hears_that_the_node_stops_and_so_do_those_that_come_later() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        watching = await watched(here)
        here.shard.end_waits()
        for each in (watching, watch(here)):
            with pytest.raises(ShardClosed, match="the node stops"):
                await asyncio.wait_for(each, 5)
        await here.report("j")
        await asyncio.wait_for(watch(here), 5)  # What is there is told all the same.


async def test_whoever_goes_away_leaves_nothing_behind() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        first, second = await watched(here), await watched(here)
        first.cancel()
        await asyncio.wait({first})
        assert left(here) == 1
        await here.report("j")
        await asyncio.wait_for(second, 5)
        assert left(here) == 0


async def test_a_watch_is_answered_while_too_much_waits_to_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        monkeypatch.setattr(shard_module, "GROUP_ROWS_MAX", -1)
        watching = await watched(here)
        with pytest.raises(SiloError):
            await here.enqueue(a_job("k"))
        await here.report("j")
        await asyncio.wait_for(watching, 5)


async def test_ten_thousand_watches_cost_nothing_while_nothing_ends() -> None:
    async with one_shard() as here:
        await here.run(*(a_job(f"j{number}") for number in range(100)))
        watching = [watch(here, f"j{number % 99}") for number in range(10_000)]
        await asyncio.sleep(0.05)
        calls = here.storage.faults.calls.total()
        await here.report("j99")
        assert here.storage.faults.calls.total() - calls < 10
        for each in watching:
            each.cancel()
