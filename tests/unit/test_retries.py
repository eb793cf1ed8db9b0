"""Reports and retries: how an attempt ends, who gets its tickets, and when the next one comes."""

from random import Random

import pytest

from silo.engine.schedule import backoff_ms, retry_delay_ms
from silo.errors import ShardClosed
from silo.model.attempt import AttemptStatus, Cancelled, Failure, Outcome, Success
from silo.model.job import LEASE_MS, Delayed, JobStatus, Ready, RetryPolicy, Waiting
from silo.storage import keys
from silo.storage.memory import Fault
from tests.builders import DONE, SHARD, a_job, a_policy, a_rate, at_most
from tests.one_shard import BROKEN, OneShard, one_shard

A, B = at_most(1, "a"), at_most(1, "b")
LATER = a_policy(3, initial_interval_ms=1_000)
AT_ONCE = a_policy(3, initial_interval_ms=0)
INT64_MAX = (1 << 63) - 1


# Reports


@pytest.mark.spec("RPT-1", "RPT-2", "ENT-17")
@pytest.mark.parametrize(
    ("outcome", "status", "attempt_status"),
    [
        (Success(b"\x2a"), JobStatus.SUCCEEDED, AttemptStatus.SUCCEEDED),
        (Failure("E", b"\xc3"), JobStatus.FAILED, AttemptStatus.FAILED),
        (Cancelled(), JobStatus.CANCELLED, AttemptStatus.CANCELLED),
    ],
)
async def test_a_report_ends_attempt_and_job_at_its_own_time(
    outcome: Outcome, status: JobStatus, attempt_status: AttemptStatus
) -> None:
    async with one_shard() as here:
        await here.run(a_job("j", limits=[A]))
        started_at_ms = here.now_ms
        await here.wait(700)
        writes = here.storage.faults.calls["write"]
        await here.report("j", outcome)
        assert here.storage.faults.calls["write"] == writes + 1
        state = here.state("j")
        assert (state.status, state.changed_at_ms, state.next_start_ms) == (status, here.now_ms, None)
        [attempt] = here.attempts("j")
        assert (attempt.status, attempt.outcome) == (attempt_status, outcome)
        assert (attempt.started_at_ms, attempt.finished_at_ms) == (started_at_ms, here.now_ms)
        assert here.family(keys.LEASES, b"h", b"n") == []
        assert here.shard.counts.completed_jobs == 1


@pytest.mark.spec("RPT-1")
async def test_a_failure_with_retries_left_schedules_the_next_attempt_in_the_same_write() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", limits=[A], retry_policy=LATER))
        writes = here.storage.faults.calls["write"]
        await here.report("j", Failure("E", b"\xc3"))
        assert here.storage.faults.calls["write"] == writes + 1
        state = here.state("j")
        assert (state.status, state.changed_at_ms) == (JobStatus.SCHEDULED, here.now_ms)
        assert [attempt.outcome for attempt in here.attempts("j")] == [Failure("E", b"\xc3")]
        assert here.family(keys.LEASES, b"h", b"n") == []
        assert here.shard.counts.completed_jobs == 0


@pytest.mark.spec("RPT-3")
@pytest.mark.parametrize("outcome", [DONE, BROKEN, Cancelled()], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("fault", [Fault.FAIL_BEFORE, Fault.FAIL_AFTER])
async def test_a_report_that_meets_a_failing_store_happened_as_a_whole_or_not_at_all(
    fault: Fault, outcome: Outcome
) -> None:
    async with one_shard() as here:
        await here.run(a_job("j", limits=[A, B], retry_policy=LATER))
        await here.enqueue(a_job("next", limits=[A]))
        before = here.facts()
        here.storage.faults.plan("write", fault)
        with pytest.raises(ShardClosed):
            await here.report("j", outcome)
        await here.crash()
        if fault is Fault.FAIL_BEFORE:
            assert here.facts() == before
        else:
            assert here.status("j") is not JobStatus.RUNNING
            assert len(here.attempts("j")) == 1
            assert here.family(keys.LEASES) == []
            assert here.holders("b") == set()
            await here.settle()
            assert here.holders("a") == {"next"}


@pytest.mark.spec("RPT-4")
async def test_a_report_of_a_job_without_description_ends_the_attempt_and_frees_its_tickets() -> None:
    """A report needs no description here, so it is no error; the reference answers NOT_FOUND."""
    async with one_shard() as here:
        await here.run(a_job("j", limits=[A]))
        await here.enqueue(a_job("next", limits=[A]))
        task_id = here.task_id("j")
        store = await here.storage.open(SHARD)
        await store.write({keys.job_key("-", "j"): None})
        await here.crash()
        await here.shard.report(task_id, BROKEN)
        await here.settle()
        assert here.family(keys.LEASES) == []
        assert here.holders("a") == {"next"}
        assert keys.attempt_key("-", "j", 1) in here.rows()


@pytest.mark.spec("RPT-5")
async def test_a_report_gives_its_tickets_to_those_who_wait_in_the_same_write() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", limits=[A, B]))
        await here.enqueue(a_job("next-a", limits=[A]), a_job("next-b", limits=[B]))
        writes = here.storage.faults.calls["write"]
        await here.report("j")
        assert here.storage.faults.calls["write"] == writes + 1
        assert (here.holders("a"), here.holders("b")) == ({"next-a"}, {"next-b"})
        assert set(await here.lease()) == {"next-a", "next-b"}  # The clock has not moved.


# When to retry


async def runs_until_it_fails(here: OneShard, job_id: str = "j") -> int:
    """Let a job that is ready fail again and again; how many attempts that took."""
    attempts = 0
    while await here.lease() == [job_id]:
        attempts += 1
        await here.report(job_id, BROKEN)
        await here.wait(60_000)
    return attempts


@pytest.mark.spec("RET-1", "ENT-15", "W-CC-70")
@pytest.mark.parametrize(
    ("policy", "attempts"), [(None, 1), (a_policy(0), 1), (a_policy(1), 2), (a_policy(4), 5)]
)
async def test_a_job_has_one_attempt_more_than_retries(policy: RetryPolicy | None, attempts: int) -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", retry_policy=policy))
        assert await runs_until_it_fails(here) == attempts
        assert here.status("j") is JobStatus.FAILED


@pytest.mark.spec("RET-2")
async def test_a_failure_and_a_lost_lease_cost_one_retry_each() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=a_policy(2, initial_interval_ms=0)))
        await here.wait(LEASE_MS)
        assert await here.lease() == ["j"]
        await here.report("j", BROKEN)
        assert await here.lease() == ["j"]
        await here.wait(LEASE_MS)
        assert here.status("j") is JobStatus.FAILED
        assert [a.relative_attempt_number for a in here.attempts("j")] == [1, 2, 3]


@pytest.mark.spec("RET-2")
@pytest.mark.parametrize("outcome", [DONE, Cancelled()], ids=["success", "cancelled"])
async def test_what_is_no_failure_is_not_retried(outcome: Outcome) -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=AT_ONCE))
        await here.report("j", outcome)
        assert here.status("j").is_terminal
        assert await here.lease() == []


@pytest.mark.spec("RET-2")
async def test_waiting_for_limits_is_no_attempt() -> None:
    async with one_shard() as here:
        await here.run(a_job("holds", limits=[A, a_rate(1, 5_000)]))
        await here.enqueue(a_job("j", limits=[A, a_rate(1, 5_000)]))
        await here.wait(100)
        await here.report("holds")
        await here.wait(5_000)
        assert await here.lease() == ["j"]
        assert (here.state("j").next_attempt_number, here.attempts("j")) == (1, [])
        assert here.state("j").is_last_attempt


@pytest.mark.spec("RET-3", "ATT-3")
async def test_a_restart_gives_a_fresh_budget_and_a_fresh_backoff() -> None:
    async with one_shard() as here:
        policy = a_policy(1, initial_interval_ms=1_000, backoff_factor=2.0)
        await here.enqueue(a_job("j", retry_policy=policy))
        assert await runs_until_it_fails(here) == 2
        await here.restart("j")
        assert await here.lease() == ["j"]
        await here.report("j", BROKEN)
        assert here.state("j").next_start_ms == here.now_ms + 2_000
        await here.wait(2_000)
        assert await runs_until_it_fails(here) == 1


@pytest.mark.spec("RET-3")
async def test_failures_that_an_import_brings_count_against_the_budget() -> None:
    async with one_shard() as here:
        policy = a_policy(3, initial_interval_ms=1_000)
        assert await here.import_job("j", BROKEN, BROKEN, retry_policy=policy) is JobStatus.SCHEDULED
        assert await runs_until_it_fails(here) == 2


# How long to wait


@pytest.mark.spec("RET-4", "RET-7", "W-CC-69")
@pytest.mark.parametrize(
    ("policy", "delays_ms"),
    [
        (a_policy(3, initial_interval_ms=1_000, backoff_factor=2.0), [2_000, 4_000, 8_000]),
        (a_policy(1, initial_interval_ms=1_000, backoff_factor=10.0, max_interval_ms=2_000), [2_000]),
        (a_policy(2, initial_interval_ms=5, backoff_factor=0.5), [3, 1]),  # 2.5 and 1.25.
        (a_policy(1, initial_interval_ms=1_000, max_interval_ms=0), [0]),
    ],
)
async def test_the_wait_before_a_retry_grows_with_each_failure_up_to_the_cap(
    policy: RetryPolicy, delays_ms: list[int]
) -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=policy))
        for delay_ms in delays_ms:
            await here.report("j", BROKEN)
            assert here.state("j").next_start_ms == here.now_ms + delay_ms
            await here.wait(delay_ms)
            assert await here.lease() == ["j"]


@pytest.mark.spec("RET-4")
def test_a_wait_is_rounded_half_away_from_zero_and_stays_within_64_bits() -> None:
    assert (backoff_ms(5, 0.5, 1), backoff_ms(-5, 0.5, 1), backoff_ms(9, 0.25, 1)) == (3, -3, 2)
    assert backoff_ms(INT64_MAX, 10.0, 300) == INT64_MAX


@pytest.mark.spec("RET-4")
async def test_a_retry_beyond_all_time_is_scheduled_for_its_last_moment() -> None:
    async with one_shard() as here:
        policy = a_policy(1, initial_interval_ms=INT64_MAX, max_interval_ms=INT64_MAX, backoff_factor=9.0)
        await here.run(a_job("j", retry_policy=policy))
        await here.report("j", BROKEN)
        assert here.state("j").pending == Delayed(INT64_MAX)


@pytest.mark.spec("RET-4", "RET-6", "W-CC-69")
def test_jitter_lengthens_a_wait_up_to_twofold_and_the_cap_comes_after_it() -> None:
    """By random numbers that are given; in the reference it follows from the time."""
    policy = a_policy(1, initial_interval_ms=1_000, max_interval_ms=1_800, randomize_interval=True)
    drawn = [retry_delay_ms(policy, 1, Random(seed)) for seed in range(300)]
    assert 1_000 <= min(drawn) < 1_050
    assert max(drawn) == 1_800
    assert len(set(drawn)) > 100
    assert retry_delay_ms(policy, 1, Random(5)) == retry_delay_ms(policy, 1, Random(5))


# What a retry is


@pytest.mark.spec("RET-8", "ATT-2", "LSE-7")
async def test_a_retry_is_the_same_job_under_the_next_number_and_another_task_id() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", priority=7, payload="p", retry_policy=LATER))
        first, before = here.task_id("j"), here.jobs()["-", "j"]
        await here.report("j", BROKEN)
        state = here.state("j")
        start_at_ms = here.now_ms + 1_000
        assert (state.status, state.changed_at_ms) == (JobStatus.SCHEDULED, here.now_ms)
        assert (state.pending, state.next_start_ms) == (Delayed(start_at_ms), start_at_ms)
        assert (state.next_attempt_number, state.relative_attempt_number) == (2, 2)
        await here.wait(999)
        assert await here.lease() == []
        await here.wait(1)
        assert await here.lease() == ["j"]
        after = here.jobs()["-", "j"]
        assert after.job == before.job
        assert (after.state.priority, after.state.task_group) == (7, before.state.task_group)
        assert here.task_id("j") != first


@pytest.mark.spec("RET-9")
async def test_a_retry_without_wait_is_there_for_the_next_poll() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=AT_ONCE))
        await here.report("j", BROKEN)
        assert isinstance(here.state("j").pending, Ready)
        assert await here.lease() == ["j"]


# Retries and limits


@pytest.mark.spec("RET-10", "RET-14")
async def test_a_job_holds_nothing_while_it_waits_for_its_retry_and_others_run() -> None:
    async with one_shard() as here:
        await here.run(a_job("a", limits=[A], retry_policy=LATER))
        await here.enqueue(a_job("b", limits=[A]))
        await here.report("a", BROKEN)
        assert (here.held("a"), here.holders("a")) == ([], {"b"})
        assert await here.lease() == ["b"]

        await here.wait(1_000)  # The retry is due, and finds the queue full.
        assert (here.waiting("a"), await here.lease()) == (["a"], [])
        await here.report("b")
        assert await here.lease() == ["a"]


@pytest.mark.spec("RET-11")
async def test_a_retry_passes_all_limits_again_from_the_first() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", limits=[a_rate(1, 5_000), A], retry_policy=AT_ONCE))
        await here.report("j", BROKEN)
        assert (here.state("j").passed, here.held("j")) == (0, [])  # It has spent the only hit itself.
        assert await here.lease() == []
        await here.wait(5_000)
        assert await here.lease() == ["j"]
        assert here.held("j") == ["a"]


@pytest.mark.spec("RET-12")
async def test_a_retry_does_not_keep_its_ticket_when_others_wait() -> None:
    """With nobody in line it may take one in the write of the report; in the reference it never does."""
    async with one_shard() as here:
        await here.run(a_job("later", limits=[A], retry_policy=LATER))
        await here.report("later", BROKEN)
        assert (here.state("later").pending, here.holders("a")) == (Delayed(here.now_ms + 1_000), set())

        await here.run(a_job("at-once", limits=[B], retry_policy=AT_ONCE))
        await here.wait(1)
        await here.enqueue(a_job("waits", limits=[B]))
        await here.wait(1)
        await here.report("at-once", BROKEN)
        assert (here.holders("b"), here.waiting("b")) == ({"waits"}, ["at-once"])
        assert here.state("at-once").rank > here.state("waits").rank


@pytest.mark.spec("RET-13")
async def test_old_and_new_attempt_never_hold_tickets_together() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", limits=[A, B], retry_policy=LATER))
        for other in ("o1", "o2"):
            await here.enqueue(a_job(other, limits=[B]))
            await here.report("j", BROKEN)
            assert (here.held("j"), here.holders("a"), here.holders("b")) == ([], set(), {other})
            await here.wait(1_000)
            assert isinstance(here.state("j").pending, Waiting)
            assert (here.holders("a"), here.holders("b")) == (set(), {other})
            assert await here.lease() == [other]
            await here.report(other)
            assert (here.holders("a"), here.holders("b")) == ({"j"}, {"j"})
            assert await here.lease() == ["j"]
        await here.report("j")
        assert here.family(b"h", b"n") == []
