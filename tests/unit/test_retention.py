"""Retention: jobs that have ended are deleted when their time is over, by the shard itself."""

import pytest

from silo.engine.retention import Retention
from silo.model.attempt import Cancelled, Outcome
from silo.model.counts import ShardTotals
from silo.model.job import DEFAULT_TENANT, LEASE_MS, JobStatus
from silo.model.limit import NEVER_MS
from silo.shard.shard import ShardOptions
from silo.storage import keys
from tests.builders import DONE, a_job, a_policy, a_rate, at_most
from tests.one_shard import BROKEN, OneShard, one_shard

KEPT = ShardOptions(retention=Retention(succeeded_s=60, unsuccessful_s=600))
OF_SUCCESS_MS, OF_OTHERS_MS = 60_000, 600_000
RETRIES = a_policy(9, initial_interval_ms=0)


def expires_at_ms(here: OneShard, job_id: str = "j") -> int | None:
    return here.state(job_id).expires_at_ms


def is_here(here: OneShard, job_id: str = "j") -> bool:
    return (DEFAULT_TENANT, job_id) in here.jobs()


@pytest.mark.spec("RTN-1", "RTN-4")
@pytest.mark.parametrize(
    ("outcome", "kept_ms"), [(DONE, OF_SUCCESS_MS), (BROKEN, OF_OTHERS_MS), (Cancelled(), OF_OTHERS_MS)]
)
async def test_a_job_that_has_ended_disappears_with_all_its_records_at_its_time(
    outcome: Outcome, kept_ms: int
) -> None:
    """The shard deletes it, counts included (there another process drops rows, and counts read high)."""
    async with one_shard(options=KEPT) as here:
        empty = here.facts()
        job = a_job("j", metadata={"k": "v"}, retry_policy=a_policy(1, initial_interval_ms=0))
        await here.run(job)
        await here.report("j", BROKEN)
        await here.lease()
        await here.report("j", outcome)
        assert expires_at_ms(here) == here.now_ms + kept_ms
        await here.wait(kept_ms - 1)
        assert len(here.attempts("j")) == 2
        await here.wait(1)
        assert not is_here(here)
        assert here.shard.counts == ShardTotals(0, 0)
        left = {key for key in here.facts() if key != keys.TOTALS}
        assert left == empty.keys()


@pytest.mark.spec("RTN-1")
@pytest.mark.parametrize("retention", [Retention(), Retention(unsuccessful_s=1)])
async def test_what_has_no_time_set_is_kept(retention: Retention) -> None:
    async with one_shard(options=ShardOptions(retention=retention)) as here:
        await here.run(a_job("j"))
        await here.report("j")
        assert expires_at_ms(here) is None
        await here.wait(10 * 365 * 86_400_000)
        assert is_here(here)


@pytest.mark.spec("RTN-1")
async def test_both_times_are_apart() -> None:
    options = ShardOptions(retention=Retention(succeeded_s=1))
    async with one_shard(options=options) as here:
        await here.run(a_job("done"), a_job("broken"))
        await here.report("done")
        await here.report("broken", BROKEN)
        await here.wait(OF_OTHERS_MS)
        assert (is_here(here, "done"), is_here(here, "broken")) == (False, True)


@pytest.mark.spec("RTN-1")
@pytest.mark.parametrize("kept_s", [(1 << 63) // 1000, (1 << 63) - 1, 1 << 63])
async def test_a_time_beyond_all_times_is_the_last_one(kept_s: int) -> None:
    options = ShardOptions(retention=Retention(succeeded_s=kept_s))
    async with one_shard(options=options) as here:
        await here.run(a_job("j"))
        await here.report("j")
        assert expires_at_ms(here) == NEVER_MS
        await here.crash()
        await here.wait(1_000)
        assert is_here(here)


@pytest.mark.spec("RTN-1")
async def test_no_time_at_all_means_at_once() -> None:
    options = ShardOptions(retention=Retention(succeeded_s=0))
    async with one_shard(options=options) as here:
        await here.run(a_job("j"))
        await here.report("j")
        await here.settle()
        assert not here.jobs()


@pytest.mark.spec("RTN-2")
async def test_a_job_that_goes_on_has_no_time_and_neither_have_its_failed_attempts() -> None:
    async with one_shard(options=KEPT) as here:
        await here.run(a_job("j", retry_policy=RETRIES))
        await here.report("j", BROKEN)
        await here.enqueue(a_job("later", start_at_ms=here.now_ms + 10 * OF_OTHERS_MS))
        assert not here.family(keys.EXPIRIES)
        await here.wait(2 * OF_OTHERS_MS)
        assert len(here.attempts("j")) == 1
        assert is_here(here, "later")


@pytest.mark.spec("RTN-2")
async def test_cancelling_a_running_job_sets_its_time_only_when_it_ends() -> None:
    async with one_shard(options=KEPT) as here:
        await here.run(a_job("j"))
        await here.cancel("j")
        assert expires_at_ms(here) is None
        await here.wait(5)
        await here.report("j", Cancelled())
        assert expires_at_ms(here) == here.now_ms + OF_OTHERS_MS


@pytest.mark.spec("RTN-1")
async def test_a_cancellation_that_is_recorded_after_the_end_does_not_move_the_time() -> None:
    async with one_shard(options=KEPT) as here:
        await here.run(a_job("j"))
        await here.report("j", Cancelled())
        expected = expires_at_ms(here)
        await here.wait(5)
        await here.cancel("j")
        assert expires_at_ms(here) == expected


@pytest.mark.spec("RTN-3")
@pytest.mark.parametrize(
    "how",
    [
        "report",
        "cancel while it waits",
        "cancel a waiter",
        "expiry",
        "expiry of a cancelled job",
        "import",
        "import again",
        "import of a scheduled job",
        "rate limit exceeded",
    ],
)
async def test_the_time_runs_from_the_end_however_the_job_ended(how: str) -> None:
    async with one_shard(options=KEPT) as here:
        match how:
            case "report":
                await here.run(a_job("j", limits=[at_most(1)]))
                await here.report("j", BROKEN)
            case "cancel while it waits":
                await here.enqueue(a_job("j"))
                await here.cancel("j")
            case "cancel a waiter":
                await here.enqueue(a_job("j", limits=[at_most(0)]))
                await here.cancel("j")
            case "expiry":
                await here.run(a_job("j"))
                await here.wait(LEASE_MS)
            case "expiry of a cancelled job":
                await here.run(a_job("j", retry_policy=RETRIES))
                await here.cancel("j")
                await here.wait(LEASE_MS)
            case "import":
                await here.import_job("j", BROKEN)
            case "import again":
                await here.import_job("j", BROKEN)
                await here.wait(OF_OTHERS_MS - 1)
                await here.import_job("j", Cancelled())
            case "import of a scheduled job":
                await here.enqueue(a_job("j", limits=[at_most(0)]))
                await here.import_job("j", Cancelled())
            case "rate limit exceeded":
                await here.enqueue(a_job("j", limits=[a_rate(0, max_retries=1, initial_backoff_ms=500)]))
                await here.wait(500)
        assert here.status("j").is_terminal
        assert expires_at_ms(here) == here.now_ms + OF_OTHERS_MS
        await here.wait(OF_OTHERS_MS - 1)
        assert is_here(here)
        await here.wait(1)
        assert not is_here(here)


async def test_a_job_that_ends_in_the_call_that_brings_it_has_its_time_too() -> None:
    async with one_shard(options=KEPT) as here:
        await here.import_job("j", DONE)
        assert expires_at_ms(here) == here.now_ms + OF_SUCCESS_MS


async def test_a_restart_takes_the_time_away_and_the_next_end_sets_it_anew() -> None:
    """For all that belongs to the job (there only its status is spared)."""
    async with one_shard(options=KEPT) as here:
        await here.run(a_job("j", metadata={"k": "v"}))
        await here.report("j", BROKEN)
        await here.wait(OF_OTHERS_MS - 1)
        await here.restart("j")
        assert not here.family(keys.EXPIRIES)
        await here.wait(OF_OTHERS_MS)
        assert len(here.attempts("j")) == 1
        await here.lease()
        await here.report("j")
        assert expires_at_ms(here) == here.now_ms + OF_SUCCESS_MS
        assert here.status("j") is JobStatus.SUCCEEDED


async def test_a_crash_does_not_move_the_time() -> None:
    async with one_shard(options=KEPT) as here:
        await here.run(a_job("j"))
        await here.report("j")
        await here.crash()
        await here.wait(OF_SUCCESS_MS - 1)
        assert is_here(here)
        await here.wait(1)
        assert not is_here(here)


async def test_a_job_that_was_deleted_and_enqueued_again_is_another_one() -> None:
    async with one_shard(options=KEPT) as here:
        await here.run(a_job("j"))
        await here.report("j")
        await here.delete("j")
        await here.enqueue(a_job("j"))
        await here.wait(OF_SUCCESS_MS)
        assert is_here(here)


async def test_many_jobs_that_end_together_disappear_together() -> None:
    async with one_shard(options=KEPT) as here:
        await here.enqueue(*(a_job(f"j{number}") for number in range(150)))
        for job_id in await here.lease(150):
            await here.report(job_id)
        await here.wait(OF_SUCCESS_MS)
        assert not here.jobs()
        assert here.shard.counts == ShardTotals(0, 0)
