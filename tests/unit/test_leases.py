"""Leases: how long they last, who extends them, how they end, and what comes too late."""

import msgspec
import pytest

from silo.errors import LeaseNotFound, LeaseOwnerMismatch, StateForbids, WrongTask
from silo.model.attempt import AttemptStatus, Cancelled, Failure, Outcome
from silo.model.floating import FloatingState, RefreshSucceeded
from silo.model.job import LEASE_MS, JobStatus, Ready
from silo.storage import codec, keys
from tests.builders import DONE, GROUP, a_job, a_policy, at_most, floating, open_shard
from tests.one_shard import BROKEN, OneShard, one_shard

AT_ONCE = a_policy(5, initial_interval_ms=0)


async def beat(here: OneShard, job_id: str = "j", *, worker_id: str = "w") -> int | None:
    return await here.shard.heartbeat(task_id=here.task_id(job_id), worker_id=worker_id)


def runs(here: OneShard, job_id: str = "j") -> bool:
    return here.status(job_id) is JobStatus.RUNNING


# Length and heartbeats


@pytest.mark.spec("LEA-1", "LEA-9")
async def test_a_lease_lasts_ten_seconds_and_is_collected_at_its_end() -> None:
    """The alarm rings at the expiry itself; the reference looks at leases once a second."""
    async with one_shard() as here:
        await here.run(a_job("j"))
        await here.wait(9_999)
        assert runs(here)
        await here.wait(1)
        assert here.status("j") is JobStatus.FAILED


@pytest.mark.spec("LEA-1", "LEA-2")
async def test_a_heartbeat_extends_a_lease_to_ten_seconds_from_now() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        await here.wait(7_000)
        await beat(here)
        await here.wait(9_999)
        assert runs(here)
        await here.wait(1)
        assert here.status("j") is JobStatus.FAILED


@pytest.mark.spec("LEA-2")
async def test_a_heartbeat_says_whether_the_job_was_cancelled_and_when() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        assert await beat(here) is None
        await here.wait(5)
        await here.cancel("j")
        cancelled_at_ms = here.now_ms
        await here.wait(5)
        assert await beat(here) == cancelled_at_ms


@pytest.mark.spec("LEA-2")
async def test_a_heartbeat_of_another_worker_is_refused_and_extends_nothing() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        await here.wait(9_000)
        with pytest.raises(LeaseOwnerMismatch, match=r"^lease owner mismatch"):
            await beat(here, worker_id="other")
        await here.wait(1_000)
        assert not runs(here)


@pytest.mark.spec("LEA-2")
async def test_a_heartbeat_without_a_lease_is_told_so() -> None:
    async with one_shard() as here:
        with pytest.raises(LeaseNotFound, match=r"^lease not found"):
            await here.shard.heartbeat(task_id="none", worker_id="w")


@pytest.mark.spec("LEA-3")
async def test_a_worker_may_wind_down_a_cancelled_job_for_as_long_as_it_sends_heartbeats() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        await here.cancel("j")
        for _ in range(100):
            await here.wait(LEASE_MS - 1)
            assert await beat(here) is not None
        await here.report("j")
        assert here.status("j") is JobStatus.SUCCEEDED


@pytest.mark.spec("LEA-4")
async def test_a_heartbeat_before_a_lease_was_collected_revives_it() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        task_id = here.task_id("j")
        here.clock.advance_ms(LEASE_MS + 500)
        await here.shard.heartbeat(task_id=task_id, worker_id="w")  # Nobody had a turn to look at the clock.
        await here.wait(LEASE_MS - 1)
        assert here.task_id("j") == task_id


@pytest.mark.spec("LEA-5")
async def test_a_heartbeat_changes_nothing_but_the_expiry() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", limits=[at_most(1)], retry_policy=AT_ONCE))
        before = here.rows()
        await here.wait(3_000)
        await beat(here)
        await here.shard.durable()
        assert here.rows() == before


@pytest.mark.spec("LEA-6")
async def test_heartbeats_keep_the_lease_of_a_refresh_and_never_say_cancelled() -> None:
    async with one_shard() as here:
        task = await a_leased_refresh(here)
        assert task.lease is not None
        for _ in range(3):
            await here.wait(LEASE_MS - 1)
            assert await here.shard.heartbeat(task_id=task.lease.task_id, worker_id="w") is None
        await here.report_refresh(task, 1)
        assert here.holders() == {"waiting"}


@pytest.mark.spec("LEA-15")
async def test_a_lease_that_still_has_time_is_left_alone_when_others_end() -> None:
    async with one_shard() as here:
        await here.run(a_job("old"))
        await here.wait(1)
        await here.run(a_job("young"))
        young = here.state("young")
        await here.wait(LEASE_MS - 1)
        assert here.status("old") is JobStatus.FAILED
        assert here.state("young") == young


# The end of a lease


@pytest.mark.spec("LEA-10", "RET-2")
async def test_a_lease_that_ran_out_is_a_failed_attempt_that_names_the_worker() -> None:
    async with one_shard() as here:
        policy = a_policy(1, initial_interval_ms=2_000)
        await here.enqueue(a_job("j", retry_policy=policy))
        await here.lease(worker_id="lost")
        expiry_ms = here.now_ms + LEASE_MS
        await here.wait(LEASE_MS + 700)

        [attempt] = here.attempts("j")
        text = f"lease expired at {expiry_ms} (now {here.now_ms}), worker=lost"
        assert attempt.outcome == Failure("WORKER_CRASHED", msgspec.msgpack.encode(text))
        assert attempt.finished_at_ms == here.now_ms
        state = here.state("j")
        assert (state.status, state.changed_at_ms) == (JobStatus.SCHEDULED, here.now_ms)
        assert state.next_start_ms == here.now_ms + 2_000  # From now on, not from the expiry.

        await here.wait(2_000)
        assert await here.lease() == ["j"]
        await here.wait(LEASE_MS)
        assert here.status("j") is JobStatus.FAILED


@pytest.mark.spec("LEA-11")
@pytest.mark.parametrize("tenant", ["-", "acme"])
async def test_a_cancelled_job_whose_lease_ran_out_ends_as_cancelled_for_every_tenant(tenant: str) -> None:
    """The reference looks for the cancellation under the tenant `-` only."""
    async with one_shard() as here:
        await here.run(a_job("j", tenant=tenant, retry_policy=AT_ONCE))
        await here.shard.cancel(tenant=tenant, job_id="j")
        await here.wait(LEASE_MS)
        stored = here.jobs()[tenant, "j"]
        assert stored.state.status is JobStatus.CANCELLED
        assert stored.state.cancelled_at_ms is not None
        assert [attempt.outcome for attempt in stored.attempts] == [Cancelled()]
        assert await here.lease() == []


@pytest.mark.spec("LEA-13")
async def test_a_lease_that_runs_out_gives_its_tickets_to_those_who_wait() -> None:
    async with one_shard() as here:
        await here.run(a_job("lost", limits=[at_most(1, "a"), at_most(1, "b")]))
        await here.enqueue(a_job("next-a", limits=[at_most(1, "a")]))
        await here.enqueue(a_job("next-b", limits=[at_most(1, "b")]))
        await here.wait(LEASE_MS)
        assert (here.holders("a"), here.holders("b")) == ({"next-a"}, {"next-b"})
        assert set(await here.lease()) == {"next-a", "next-b"}


async def a_leased_refresh(here: OneShard) -> FloatingState:
    """The refresh of a floating limit of 0, for which the job `waiting` waits."""
    await here.enqueue(a_job("waiting", limits=[floating(0)]))
    task = await here.lease_refresh()
    assert task is not None
    return task


@pytest.mark.spec("LEA-14")
async def test_a_refresh_whose_lease_ran_out_is_offered_again_and_counts_as_no_failure() -> None:
    """At once, since a job waits; the reference waits until another job arrives."""
    async with one_shard() as here:
        lost = await a_leased_refresh(here)
        await here.wait(LEASE_MS)
        state = here.floating()
        assert state is not None
        assert (state.failures, state.next_retry_at_ms, state.max_concurrency) == (0, None, 0)
        again = await here.lease_refresh()
        assert again is not None
        assert again.lease is not None
        assert lost.lease is not None
        assert again.lease.task_id != lost.lease.task_id
        with pytest.raises(LeaseNotFound):
            await here.report_refresh(lost, 5)


@pytest.mark.spec("LEA-14")
async def test_a_refresh_that_was_offered_before_a_restart_can_be_done_after_it() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("waiting", limits=[floating(0)]))
        await here.crash()
        task = await here.lease_refresh()
        assert task is not None
        await here.run(a_job("other", limits=[at_most(1, "other")]))  # Nobody has looked at the queue yet.
        await here.report_refresh(task, 1)
        assert await here.lease() == ["waiting"]


@pytest.mark.spec("LEA-17")
@pytest.mark.parametrize("away_ms", [0, 6_000, 3_600_000])
async def test_a_lease_survives_a_restart_and_gets_a_full_lease_time(away_ms: int) -> None:
    """Time while the server was away does not count; in the reference it does."""
    async with one_shard() as here:
        await here.run(a_job("j"))
        task_id = here.task_id("j")
        here.clock.advance_ms(away_ms)
        await here.crash()
        await here.wait(LEASE_MS - 1)
        assert here.task_id("j") == task_id
        await beat(here)
        await here.wait(LEASE_MS - 1)
        assert here.task_id("j") == task_id
        await here.wait(1)
        assert here.status("j") is JobStatus.FAILED


# One lease, one report


@pytest.mark.spec("LEA-18", "LSE-12")
async def test_a_job_has_one_lease_at_a_time_and_a_new_task_id_with_each() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=AT_ONCE))
        seen = set()
        for _ in range(4):
            assert len(here.family(keys.LEASES)) == 1
            seen.add(here.task_id("j"))
            assert await here.lease() == []
            with pytest.raises(StateForbids, match="job is currently running"):
                await here.lease_one("j")
            await here.report("j", BROKEN)
            assert here.family(keys.LEASES) == []
            assert await here.lease() == ["j"]
        assert len(seen) == 4


@pytest.mark.spec("LEA-19")
@pytest.mark.parametrize("end", [DONE, BROKEN, Cancelled(), None], ids=lambda end: type(end).__name__)
@pytest.mark.parametrize("late", [DONE, BROKEN, Cancelled()], ids=lambda late: type(late).__name__)
async def test_what_comes_after_the_end_of_an_attempt_changes_nothing(
    end: Outcome | None, late: Outcome
) -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=AT_ONCE))
        task_id = here.task_id("j")
        if end is None:
            await here.wait(LEASE_MS)
        else:
            await here.report("j", end)
        before = here.facts()
        with pytest.raises(LeaseNotFound, match=r"^lease not found"):
            await here.shard.report(task_id, late)
        with pytest.raises(LeaseNotFound, match=r"^lease not found"):
            await here.shard.heartbeat(task_id=task_id, worker_id="w")
        assert here.facts() == before


@pytest.mark.spec("LEA-20")
async def test_a_report_counts_before_the_lease_was_collected_whoever_sends_it() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        task_id = here.task_id("j")
        here.clock.advance_ms(LEASE_MS + 500)
        await here.shard.report(task_id, DONE)  # It names no worker.
        await here.settle()
        assert here.status("j") is JobStatus.SUCCEEDED
        assert len(here.attempts("j")) == 1


@pytest.mark.spec("LEA-21")
async def test_after_the_end_of_an_attempt_nothing_is_left_for_a_late_report_to_release() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", limits=[at_most(1)], retry_policy=a_policy(1)))
        await here.enqueue(a_job("next", limits=[at_most(1)]))
        late = here.task_id("j")
        await here.wait(LEASE_MS)
        assert here.holders() == {"next"}
        with pytest.raises(LeaseNotFound):
            await here.shard.report(late, DONE)
        assert here.holders() == {"next"}


@pytest.mark.spec("LEA-24")
async def test_a_report_of_the_wrong_kind_is_refused_and_ends_nothing() -> None:
    """The reference takes a job's outcome for a refresh too."""
    async with one_shard() as here:
        refresh = await a_leased_refresh(here)
        await here.run(a_job("j"))
        before = here.facts()
        assert refresh.lease is not None
        with pytest.raises(StateForbids, match="task is the refresh of a floating limit"):
            await here.shard.report(refresh.lease.task_id, DONE)
        with pytest.raises(WrongTask, match=r"^codec error: task is not a RefreshFloatingLimit"):
            await here.shard.report_refresh(here.task_id("j"), RefreshSucceeded(1))
        assert here.facts() == before
        await here.report("j")
        await here.report_refresh(refresh, 1)


# What leasing does


@pytest.mark.spec("LSE-14", "ENT-23")
async def test_leasing_moves_a_job_from_its_queue_to_a_lease_in_one_write() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", limits=[at_most(1)]))
        assert isinstance(here.state("j").pending, Ready)
        held = here.state("j").held
        assert here.attempts("j") == []
        writes = here.storage.faults.calls["write"]
        await here.wait(3)
        assert await here.lease(worker_id="me") == ["j"]
        assert here.storage.faults.calls["write"] == writes + 1

        state = here.state("j")
        assert (state.status, state.changed_at_ms, state.pending) == (JobStatus.RUNNING, here.now_ms, None)
        assert state.lease is not None
        assert (state.lease.worker_id, state.lease.started_at_ms) == ("me", here.now_ms)
        assert state.lease.expiry_ms == here.now_ms + LEASE_MS
        assert state.held == held
        assert here.family(b"q") == []
        view = await here.shard.get_job(tenant="-", job_id="j", with_attempts=True)
        [attempt] = view.attempts
        assert (attempt.status, attempt.started_at_ms) == (AttemptStatus.RUNNING, here.now_ms)
        assert attempt.task_id == state.lease.task_id


@pytest.mark.spec("ENT-7")
async def test_task_ids_are_random_uuids_by_which_leases_of_all_tenants_are_known() -> None:
    async with open_shard() as shard:
        for tenant in "ab":
            await shard.enqueue(a_job("j", tenant=tenant))
        tasks = await shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=2)
        ids = {task.state.lease.task_id for task in tasks if task.state.lease is not None}
        assert len(ids) == 2
        for task_id in ids:
            assert task_id[14] == "4"
            assert task_id[19] in "89ab"
            assert [len(part) for part in task_id.split("-")] == [8, 4, 4, 4, 12]
            await shard.report(task_id, DONE)  # No tenant, no job: the id is enough.
        assert shard.counts.completed_jobs == 2


@pytest.mark.spec("ENT-30")
async def test_a_running_job_has_one_lease_and_a_job_that_has_ended_none() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        places = (b"q", b"t", b"r", b"v", b"x")
        assert (here.family(*places), len(here.family(keys.LEASES))) == ([], 1)
        [row] = here.family(keys.LEASES)
        assert codec.decode_task(here.rows()[row]) == here.state("j")
        await here.report("j")
        assert here.family(*places, keys.LEASES) == []
