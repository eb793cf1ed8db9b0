"""Floating limits: what the jobs of a queue share, when it is refreshed, and what an outcome does."""

import logging

import pytest

from silo.errors import JobExists, LeaseNotFound, LeaseOwnerMismatch
from silo.model.floating import FloatingState, RefreshFailed
from silo.model.job import DEFAULT_TENANT, LEASE_MS, JobStatus
from silo.storage import keys
from tests.builders import DONE, SHARD, a_job, a_policy, a_rate, at_most, floating
from tests.one_shard import BROKEN, OneShard, one_shard
from tests.property.machine import tiny_memory

MINUTE_MS = 60_000
FAILED = RefreshFailed("SECRET_CODE", "a secret message")


def a_floating_job(
    id: str,
    maximum: int = 1,
    *,
    tenant: str = DEFAULT_TENANT,
    task_group: str = "default",
    refresh_interval_ms: int = MINUTE_MS,
    metadata: dict[str, str] | None = None,
) -> object:
    limit = floating(maximum, refresh_interval_ms=refresh_interval_ms, metadata=metadata)
    return a_job(id, tenant=tenant, task_group=task_group, limits=[limit])


async def a_waiting_job(here: OneShard, **fields: object) -> None:
    """One job holds the ticket, in a task group that nobody polls, and one waits for it."""
    await here.enqueue(a_floating_job("holder", task_group="nobody", **fields))
    await here.enqueue(a_floating_job("waiting", **fields))


async def in_use(here: OneShard) -> None:
    """A queue that was refreshed just now to a maximum of 1, which one job uses."""
    await a_waiting_job(here)
    await here.refresh(1)
    await here.cancel("waiting")


# Memory


async def test_the_lease_of_a_refresh_leaves_nothing_to_be_done_about_a_queue_that_may_leave_memory() -> None:
    with tiny_memory():
        async with one_shard() as here:
            await here.enqueue(a_floating_job("waiting", 0))
            await here.cancel("waiting")  # Its refresh stays, and nobody waits.
            await here.crash()
            await here.enqueue(a_job("fixed", limits=[at_most(1)]))  # Brings the queue alone into memory.
            await here.lease()
            assert len(here.refreshes) == 1
            limits = [at_most(1, key) for key in "abc"]
            with pytest.raises(JobExists):  # Brings these into memory, and is no step that looks at any.
                await here.enqueue(a_job("fixed", limits=limits))
            await here.enqueue(a_job("unlimited"))  # With this group the first queue leaves memory.
            await here.enqueue(a_job("limited", limits=limits))
            assert sorted(await here.lease() + await here.lease()) == ["limited", "unlimited"]


# The state


@pytest.mark.spec("FLT-1")
async def test_the_first_job_that_meets_a_limit_defines_it() -> None:
    async with one_shard() as here:
        await here.enqueue(a_floating_job("j", 5, refresh_interval_ms=7_000, metadata={"a": "1"}))
        assert here.floating() == FloatingState(
            tenant=DEFAULT_TENANT,
            key="k",
            default_max_concurrency=5,
            refresh_interval_ms=7_000,
            metadata=(("a", "1"),),
            max_concurrency=5,
            last_refreshed_at_ms=0,
            failures=0,
            next_retry_at_ms=None,
            refresh=None,
        )


@pytest.mark.spec("FLT-1")
async def test_a_limit_is_met_when_the_job_gets_there() -> None:
    async with one_shard() as here:
        await here.run(a_job("fast", limits=[a_rate(1)]))
        await here.enqueue(a_job("slow", limits=[a_rate(1), floating(5)]))
        await here.enqueue(a_job("later", start_at_ms=here.now_ms + 500, limits=[floating(7)]))
        assert here.floating() is None
        await here.wait(500)
        state = here.floating()
        assert state is not None
        assert state.default_max_concurrency == 7


@pytest.mark.spec("FLT-2")
async def test_what_later_jobs_say_of_the_limit_is_ignored_and_it_stays_when_all_are_gone() -> None:
    async with one_shard() as here:
        await here.run(a_floating_job("first", 1, metadata={"a": "1"}))
        defined = here.floating()
        await here.report("first")
        await here.delete("first")
        await here.wait(MINUTE_MS)
        await here.crash()
        await here.run(a_floating_job("second", 9, refresh_interval_ms=1, metadata={"b": "2"}))
        assert here.floating() == defined
        await here.enqueue(a_floating_job("third", 9))
        assert here.waiting() == ["third"]


@pytest.mark.spec("FLT-4")
async def test_between_refreshes_the_current_value_is_the_maximum() -> None:
    async with one_shard() as here:
        await here.enqueue(*(a_floating_job(f"j{number}") for number in range(5)))
        assert await here.lease() == ["j0"]
        await here.report_refresh(here.refreshes.pop(), 3)
        assert here.holders() == {"j0", "j1", "j2"}
        await here.report("j0")
        assert here.holders() == {"j1", "j2", "j3"}
        await here.wait(MINUTE_MS - 1)
        assert here.holders() == {"j1", "j2", "j3"}


# When a refresh is scheduled


@pytest.mark.spec("FLT-6")
async def test_the_first_waiter_of_a_new_queue_is_refreshed_for_whatever_the_interval() -> None:
    async with one_shard() as here:
        await here.run(a_floating_job("running", refresh_interval_ms=10**9))
        assert await here.lease_refresh() is None
        await here.enqueue(a_floating_job("waiting", refresh_interval_ms=10**9))
        assert await here.lease_refresh() is not None


@pytest.mark.spec("FLT-7")
async def test_without_waiters_nothing_is_refreshed_however_stale_it_is() -> None:
    async with one_shard() as here:
        await here.run(a_floating_job("j1", 2))
        await here.wait(10 * MINUTE_MS)
        await here.run(a_floating_job("j2", 2))
        await here.wait(10 * MINUTE_MS)
        assert await here.lease_refresh() is None
        assert not here.family(keys.ALARMS)


@pytest.mark.spec("FLT-5")
async def test_a_refresh_comes_when_the_value_is_stale_and_somebody_waits() -> None:
    """By an alarm while somebody waits (there only when another job arrives)."""
    async with one_shard() as here:
        await in_use(here)
        await here.enqueue(a_floating_job("waiting again"))
        await here.wait(MINUTE_MS - 1)
        assert await here.lease_refresh() is None
        await here.wait(1)
        assert await here.lease_refresh() is not None


@pytest.mark.spec("FLT-5")
async def test_a_waiter_that_leaves_before_the_value_is_stale_is_not_refreshed_for() -> None:
    async with one_shard() as here:
        await in_use(here)
        await here.enqueue(a_floating_job("leaves"))
        await here.cancel("leaves")
        await here.wait(MINUTE_MS)
        assert await here.lease_refresh() is None
        await here.enqueue(a_floating_job("stays"))
        assert await here.lease_refresh() is not None


@pytest.mark.spec("FLT-5")
async def test_what_is_stale_at_once_is_refreshed_with_a_pause_for_those_who_wait_already() -> None:
    """Else workers would refresh on end: here those who wait ask for it, not only those who arrive."""
    async with one_shard() as here:
        await a_waiting_job(here, refresh_interval_ms=0)
        await here.refresh(1)
        await here.wait(999)
        assert await here.lease_refresh() is None
        await here.wait(1)
        await here.refresh(1)
        await here.enqueue(a_floating_job("arrives"))
        assert await here.lease_refresh() is not None


@pytest.mark.spec("FLT-5", "FLT-9")
async def test_five_waiters_make_one_refresh_and_no_second_while_it_is_done() -> None:
    async with one_shard() as here:
        await here.run(a_floating_job("running"))
        await here.enqueue(*(a_floating_job(f"j{number}") for number in range(5)))
        task = await here.lease_refresh()
        assert task is not None
        await here.enqueue(a_floating_job("late"))
        assert await here.lease_refresh() is None
        await here.report_refresh(task, 1)
        assert await here.lease_refresh() is None


@pytest.mark.spec("FLT-10")
async def test_a_refresh_is_due_at_once_in_the_task_group_of_the_job_that_asked_for_it() -> None:
    async with one_shard() as here:
        await here.run(a_floating_job("running", 1, metadata={"a": "1"}))
        await here.enqueue(a_job("in a hurry", task_group="g2", priority=1))
        await here.enqueue(a_floating_job("waiting", 9, task_group="g2", metadata={"b": "2"}))
        [task, job] = await here.shard.lease_tasks(worker_id="w", task_group="g2", max_tasks=2)
        assert isinstance(task, FloatingState)  # Priority 0: ahead of a job of priority 1.
        assert (task.task_group, task.key, task.max_concurrency) == ("g2", "k", 1)
        assert (task.last_refreshed_at_ms, task.metadata) == (0, (("a", "1"),))
        assert job.state.job_id == "in a hurry"
        assert await here.lease_refresh() is None


@pytest.mark.spec("FLT-10")
async def test_a_later_refresh_carries_the_value_and_the_time_of_the_last_one() -> None:
    async with one_shard() as here:
        await in_use(here)
        refreshed_at_ms = here.now_ms
        await here.wait(MINUTE_MS)
        await here.enqueue(a_floating_job("waiting again"))
        task = await here.lease_refresh()
        assert task is not None
        assert (task.max_concurrency, task.last_refreshed_at_ms) == (1, refreshed_at_ms)


@pytest.mark.spec("FLT-9")
async def test_limits_of_two_tenants_with_one_name_are_refreshed_each_for_itself() -> None:
    async with one_shard() as here:
        for tenant in ("a", "b"):
            await here.enqueue(*(a_floating_job(f"j{number}", tenant=tenant) for number in range(2)))
        await here.lease()
        assert sorted(task.tenant for task in here.refreshes) == ["a", "b"]


# Lease and report


@pytest.mark.spec("FLT-13")
async def test_a_refresh_has_a_lease_that_heartbeats_extend_and_is_no_job() -> None:
    async with one_shard() as here:
        await a_waiting_job(here)
        jobs = here.jobs()
        task = await here.lease_refresh()
        assert task is not None
        assert task.lease is not None
        assert task.lease.expiry_ms == here.now_ms + LEASE_MS == here.now_ms + 10_000
        for _ in range(3):
            await here.wait(LEASE_MS - 1)
            beat = here.shard.heartbeat(task_id=task.lease.task_id, worker_id="w")
            assert await beat is None  # Never cancelled.
        with pytest.raises(LeaseOwnerMismatch):
            await here.shard.heartbeat(task_id=task.lease.task_id, worker_id="other")
        await here.report_refresh(task, 1)
        assert here.jobs() == jobs


@pytest.mark.spec("FLT-14")
@pytest.mark.parametrize("maximum", [0, 3, 2**32 - 1])
async def test_a_success_sets_the_maximum_and_serves_who_waits_in_the_same_commit(maximum: int) -> None:
    async with one_shard() as here:
        await here.run(a_floating_job("running"))
        await here.enqueue(*(a_floating_job(f"j{number}") for number in range(4)))
        await here.refresh(FAILED)
        await here.wait(1_000)
        task = await here.lease_refresh()
        assert task is not None
        before = here.shard.groups_written
        await here.report_refresh(task, maximum)
        assert here.shard.groups_written == before + 1
        state = here.floating()
        assert state is not None
        assert (state.max_concurrency, state.last_refreshed_at_ms) == (maximum, here.now_ms)
        assert (state.refresh, state.failures, state.next_retry_at_ms) == (None, 0, None)
        assert len(here.family(keys.LEASES)) == 1  # That of the job.
        assert len(here.holders()) == {0: 1, 3: 3}.get(maximum, 5)


@pytest.mark.spec("FLT-15")
async def test_a_failure_leaves_the_maximum_and_is_repeated_after_a_pause_while_somebody_waits() -> None:
    async with one_shard() as here:
        await a_waiting_job(here)
        first = await here.lease_refresh()
        assert first is not None
        await here.report_refresh(first, FAILED)
        state = here.floating()
        assert state is not None
        assert (state.max_concurrency, state.failures) == (1, 1)
        assert (state.next_retry_at_ms, state.lease) == (here.now_ms + 1_000, None)
        await here.enqueue(a_floating_job("in another group", task_group="g2"))
        await here.wait(999)
        assert await here.lease_refresh() is None
        await here.wait(1)
        assert await here.lease_refresh("g2") is None
        second = await here.lease_refresh()
        assert second is not None
        assert first.lease is not None
        assert second.lease is not None
        assert second.lease.task_id != first.lease.task_id
        assert (second.max_concurrency, second.last_refreshed_at_ms) == (1, 0)


@pytest.mark.spec("FLT-15", "FLT-5")
async def test_after_a_failure_nobody_waited_for_the_next_waiter_after_the_pause_is_refreshed_for() -> None:
    async with one_shard() as here:
        await a_waiting_job(here)
        task = await here.lease_refresh()
        assert task is not None
        await here.cancel("waiting")
        await here.report_refresh(task, FAILED)
        await here.enqueue(a_floating_job("early"))
        await here.cancel("early")
        assert await here.lease_refresh() is None
        await here.wait(1_000)
        assert await here.lease_refresh() is None
        await here.enqueue(a_floating_job("late"))
        assert await here.lease_refresh() is not None


@pytest.mark.spec("FLT-16")
async def test_the_pause_doubles_with_each_failure_up_to_a_minute_and_a_success_ends_the_series() -> None:
    async with one_shard() as here:
        await a_waiting_job(here, refresh_interval_ms=0)
        for pause_ms in (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000):
            await here.refresh(FAILED)
            await here.wait(pause_ms - 1)
            assert await here.lease_refresh() is None
            await here.wait(1)
        await here.refresh(1)
        await here.wait(1_000)
        await here.refresh(FAILED)
        state = here.floating()
        assert state is not None
        assert state.next_retry_at_ms == here.now_ms + 1_000


@pytest.mark.spec("FLT-17")
async def test_why_a_refresh_failed_is_not_stored(caplog: pytest.LogCaptureFixture) -> None:
    """Nor logged: it is a tenant's data; the log says that it failed and how often (there it is logged)."""
    async with one_shard() as here:
        await a_waiting_job(here)
        with caplog.at_level(logging.INFO):
            await here.refresh(FAILED)
        stored = b"".join(here.rows().values())
        assert b"SECRET_CODE" not in stored
        assert b"a secret message" not in stored
        assert "refresh of a floating limit failed" in caplog.text
        assert "secret" not in caplog.text.lower()


@pytest.mark.spec("FLT-18")
async def test_a_refresh_that_nobody_has_cannot_be_reported_and_a_second_report_changes_nothing() -> None:
    async with one_shard() as here:
        await a_waiting_job(here)
        task = await here.lease_refresh()
        assert task is not None
        await here.report_refresh(task, 1)
        before = here.facts()
        for outcome in (5, FAILED):
            with pytest.raises(LeaseNotFound):
                await here.report_refresh(task, outcome)
        assert here.facts() == before


@pytest.mark.spec("FLT-18")
async def test_a_refresh_counts_even_if_the_record_of_its_limit_was_lost() -> None:
    """The lease has all that it needs, so there is nothing to refuse (there it is an error)."""
    async with one_shard() as here:
        await a_waiting_job(here)
        task = await here.lease_refresh()
        assert task is not None
        await (await here.storage.open(SHARD)).write({keys.floating_key(DEFAULT_TENANT, "k"): None})
        await here.crash()
        await here.report_refresh(task, 2)
        await here.settle()
        assert here.holders() == {"holder", "waiting"}


@pytest.mark.spec("FLT-19")
async def test_a_refresh_done_in_one_task_group_counts_for_all() -> None:
    async with one_shard() as here:
        await here.run(a_floating_job("running"), a_floating_job("running too", tenant="t"))
        await here.enqueue(a_floating_job("waits", tenant="t", task_group="g3"))
        await here.enqueue(a_floating_job("here"), a_floating_job("there", task_group="g2"))
        await here.refresh(3)
        assert here.holders() == {"running", "here", "there"}
        assert await here.lease(task_group="g2") == ["there"]
        assert here.waiting(tenant="t") == ["waits"]


@pytest.mark.spec("FLT-20")
@pytest.mark.parametrize("is_awaited", [True, False])
async def test_a_refresh_whose_lease_ran_out_changes_nothing_and_can_be_tried_at_once(
    is_awaited: bool,
) -> None:
    async with one_shard() as here:
        await a_waiting_job(here)
        await here.refresh(FAILED)
        await here.wait(1_000)
        lost = await here.lease_refresh()
        assert lost is not None
        if not is_awaited:
            await here.cancel("waiting")
        before = here.floating()
        assert before is not None
        await here.wait(LEASE_MS)
        after = here.floating()
        assert after is not None
        assert (after.failures, after.next_retry_at_ms) == (before.failures, before.next_retry_at_ms)
        assert (after.max_concurrency, after.last_refreshed_at_ms) == (1, 0)
        with pytest.raises(LeaseNotFound):
            await here.report_refresh(lost, 5)
        if not is_awaited:
            assert after.refresh is None
            await here.enqueue(a_floating_job("next"))
        assert await here.lease_refresh() is not None


async def test_a_refresh_outlives_a_crash() -> None:
    async with one_shard() as here:
        await a_waiting_job(here)
        await here.crash()
        task = await here.lease_refresh()  # With nothing of its queue in memory.
        assert task is not None
        await here.enqueue(a_job("other", task_group="nobody", limits=[at_most(1, "m")]))
        await here.crash()
        assert await here.lease_refresh() is None
        await here.report_refresh(task, 2)
        await here.settle()
        assert here.holders() == {"holder", "waiting"}


async def test_a_retry_and_a_restart_walk_through_a_floating_limit_again() -> None:
    async with one_shard() as here:
        limits = [floating(1), at_most(1, "m")]
        await here.run(a_job("j", limits=limits, retry_policy=a_policy(1, initial_interval_ms=0)))
        await here.report("j", BROKEN)
        assert await here.lease() == ["j"]
        await here.report("j", BROKEN)
        assert here.status("j") is JobStatus.FAILED
        await here.run(a_job("other", limits=[floating(1)]))
        await here.restart("j")
        assert (here.waiting(), here.held("j")) == (["j"], [])
        await here.report("other", DONE)
        assert here.held("j") == ["k", "m"]
