"""One shard: the life of a job, what is refused and how, and what is durable when."""

import asyncio
from random import Random

import msgspec
import pytest

from silo.clock import VirtualClock
from silo.errors import (
    JobExists,
    JobNotFound,
    LeaseNotFound,
    Overloaded,
    ShardClosed,
    SiloError,
    StateForbids,
    StoreFenced,
)
from silo.model.attempt import AttemptStatus, Cancelled, Failure, Success
from silo.model.counts import ShardTotals
from silo.model.job import LEASE_MS, JobStatus, LeasedTask
from silo.model.view import JobView
from silo.shard import shard as shard_module
from silo.shard.shard import Shard
from silo.storage import codec, keys
from silo.storage.memory import Fault, MemoryStorage
from tests.builders import DONE, GROUP, SHARD, a_job, a_policy, open_shard, reopened
from tests.invariants import check_snapshot

T = "-"
BROKEN = Failure("BROKEN", msgspec.msgpack.encode("it broke"))


async def look(shard: Shard, job_id: str = "j1") -> JobView:
    return await shard.get_job(tenant=T, job_id=job_id, with_attempts=True)


async def lease_one_of(shard: Shard, worker_id: str = "w") -> str:
    """The task id of the next task."""
    [task] = await shard.lease_tasks(worker_id=worker_id, task_group=GROUP, max_tasks=1)
    return task_id(task)


def task_id(task: LeasedTask) -> str:
    assert task.state.lease is not None
    return task.state.lease.task_id


async def test_a_success_ends_the_job_with_its_result() -> None:
    async with open_shard() as shard:
        await shard.enqueue(a_job("j1"))
        await shard.report(await lease_one_of(shard), Success(b"\x2a"))
        view = await look(shard)
        assert view.state.status is JobStatus.SUCCEEDED
        assert view.last_outcome == Success(b"\x2a")
        assert [attempt.status for attempt in view.attempts] == [AttemptStatus.SUCCEEDED]


async def test_a_failure_is_retried_after_its_delay_and_then_final() -> None:
    clock = VirtualClock()
    async with open_shard(clock=clock) as shard:
        await shard.enqueue(a_job("j1", retry_policy=a_policy(1, initial_interval_ms=1_000)))
        await shard.report(await lease_one_of(shard), BROKEN)
        view = await look(shard)
        assert view.state.status is JobStatus.SCHEDULED
        assert view.state.next_start_ms == clock.now_ms() + 1_000
        clock.advance_ms(999)
        await shard.tick()
        assert not await shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=1)
        clock.advance_ms(1)
        await shard.tick()
        await shard.report(await lease_one_of(shard), BROKEN)
        view = await look(shard)
        assert view.state.status is JobStatus.FAILED
        assert view.last_outcome == BROKEN
        assert [attempt.attempt_number for attempt in view.attempts] == [1, 2]


@pytest.mark.spec("LEA-10")
async def test_an_expired_lease_gives_the_task_to_the_next_worker() -> None:
    clock = VirtualClock()
    async with open_shard(clock=clock) as shard:
        await shard.enqueue(a_job("j1", retry_policy=a_policy(1, initial_interval_ms=0)))
        lost = await lease_one_of(shard, "w1")
        clock.advance_ms(LEASE_MS)
        await shard.tick()
        [second] = await shard.lease_tasks(worker_id="w2", task_group=GROUP, max_tasks=1)
        assert second.state.next_attempt_number == 2
        with pytest.raises(LeaseNotFound):
            await shard.report(lost, DONE)
        first = (await look(shard)).attempts[0].outcome
        assert isinstance(first, Failure)
        assert first.code == "WORKER_CRASHED"
        now_ms = clock.now_ms()
        text = f"lease expired at {now_ms} (now {now_ms}), worker=w1"
        assert msgspec.msgpack.decode(first.data) == text


@pytest.mark.spec("LEA-2", "LEA-3")
async def test_heartbeats_keep_a_lease_and_tell_of_a_cancellation() -> None:
    clock = VirtualClock()
    async with open_shard(clock=clock) as shard:
        await shard.enqueue(a_job("j1"))
        running = await lease_one_of(shard)
        for _ in range(5):
            clock.advance_ms(LEASE_MS - 1)
            await shard.tick()
            assert await shard.heartbeat(task_id=running, worker_id="w") is None
        await shard.cancel(tenant=T, job_id="j1")
        cancelled_at_ms = clock.now_ms()
        clock.advance_ms(10)
        assert await shard.heartbeat(task_id=running, worker_id="w") == cancelled_at_ms


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (DONE, JobStatus.SUCCEEDED),
        (BROKEN, JobStatus.CANCELLED),
        (Cancelled(), JobStatus.CANCELLED),
        (None, JobStatus.CANCELLED),
    ],
    ids=["success wins", "failure", "cancelled", "lease ran out"],
)
async def test_a_job_cancelled_while_it_runs_never_runs_again(
    outcome: Success | Failure | Cancelled | None, status: JobStatus
) -> None:
    clock = VirtualClock()
    async with open_shard(clock=clock) as shard:
        await shard.enqueue(a_job("j1", retry_policy=a_policy(5, initial_interval_ms=0)))
        running = await lease_one_of(shard)
        await shard.cancel(tenant=T, job_id="j1")
        if outcome is None:
            clock.advance_ms(LEASE_MS)
            await shard.tick()
        else:
            await shard.report(running, outcome)
        assert (await look(shard)).state.status is status


async def test_a_restart_keeps_the_history_and_gives_a_full_budget() -> None:
    async with open_shard() as shard:
        await shard.enqueue(a_job("j1"))
        await shard.report(await lease_one_of(shard), BROKEN)
        await shard.restart(tenant=T, job_id="j1")
        await shard.report(await lease_one_of(shard), DONE)
        view = await look(shard)
        assert [(a.attempt_number, a.relative_attempt_number) for a in view.attempts] == [(1, 1), (2, 1)]


async def test_a_job_cancelled_before_its_time_keeps_its_time_over_a_restart() -> None:
    clock = VirtualClock()
    async with open_shard(clock=clock) as shard:
        start_at_ms = clock.now_ms() + 60_000
        await shard.enqueue(a_job("j1", start_at_ms=start_at_ms))
        await shard.cancel(tenant=T, job_id="j1")
        await shard.restart(tenant=T, job_id="j1")
        assert (await look(shard)).state.next_start_ms == start_at_ms


async def test_leasing_one_job_takes_it_before_its_time() -> None:
    clock = VirtualClock()
    async with open_shard(clock=clock) as shard:
        await shard.enqueue(a_job("j1", start_at_ms=clock.now_ms() + 60_000))
        task = await shard.lease_one(tenant=T, job_id="j1", worker_id="w")
        await shard.report(task_id(task), DONE)
        assert (await look(shard)).state.status is JobStatus.SUCCEEDED


async def _in_each_state(shard: Shard) -> None:
    for job_id in ("succeeded", "failed", "running"):
        await shard.enqueue(a_job(job_id))
        task = await shard.lease_one(tenant=T, job_id=job_id, worker_id="w")
        if job_id != "running":
            await shard.report(task_id(task), DONE if job_id == "succeeded" else BROKEN)
    for job_id in ("cancelled", "scheduled"):
        await shard.enqueue(a_job(job_id))
    await shard.cancel(tenant=T, job_id="cancelled")


_REFUSALS = {
    ("cancel", "cancelled"): "job is already cancelled",
    ("cancel", "succeeded"): "job is already in terminal state",
    ("cancel", "failed"): "job is already in terminal state",
    ("restart", "succeeded"): "cannot restart job succeeded: job already succeeded (status: Succeeded)",
    ("restart", "running"): "cannot restart job running: job is still in progress (status: Running)",
    ("restart", "scheduled"): "cannot restart job scheduled: job is still in progress (status: Scheduled)",
    ("expedite", "succeeded"): "cannot expedite job succeeded: job is already in terminal state"
    " (status: Succeeded)",
    ("expedite", "failed"): "cannot expedite job failed: job is already in terminal state (status: Failed)",
    ("expedite", "cancelled"): "cannot expedite job cancelled: job is cancelled (status: Cancelled)",
    ("expedite", "running"): "cannot expedite job running: job is currently running (status: Running)",
    ("expedite", "scheduled"): "cannot expedite job scheduled: task is already ready to run"
    " (not future-scheduled) (status: Scheduled)",
    ("delete", "running"): "cannot delete job running: job is currently running or has pending requests",
    ("delete", "scheduled"): "cannot delete job scheduled: job is currently running or has pending requests",
    ("lease_one", "succeeded"): "cannot lease job succeeded: job is already in terminal state"
    " (status: Succeeded)",
    ("lease_one", "failed"): "cannot lease job failed: job is already in terminal state (status: Failed)",
    ("lease_one", "cancelled"): "cannot lease job cancelled: job is cancelled (status: Cancelled)",
    ("lease_one", "running"): "cannot lease job running: job is currently running (status: Running)",
}


@pytest.mark.spec("SM-7")
@pytest.mark.parametrize(("verb", "job_id"), _REFUSALS)
async def test_a_refusal_names_the_reason_and_changes_nothing(verb: str, job_id: str) -> None:
    storage = MemoryStorage()
    async with open_shard(storage) as shard:
        await _in_each_state(shard)
        before = storage.snapshot(SHARD)
        more = {"worker_id": "w"} if verb == "lease_one" else {}
        with pytest.raises(StateForbids) as refusal:
            await getattr(shard, verb)(tenant=T, job_id=job_id, **more)
        assert refusal.value.message == _REFUSALS[verb, job_id]
        assert storage.snapshot(SHARD) == before


@pytest.mark.spec("ENT-4")
@pytest.mark.parametrize("verb", ["cancel", "restart", "expedite", "lease_one", "get_job"])
async def test_a_job_of_another_tenant_is_not_found(verb: str) -> None:
    async with open_shard() as shard:
        await shard.enqueue(a_job("j1", tenant="a"))
        more = {"worker_id": "w"} if verb == "lease_one" else {}
        with pytest.raises(JobNotFound, match="job not found"):
            await getattr(shard, verb)(tenant="b", job_id="j1", **more)


async def test_deleting_removes_every_trace_and_twice_is_harmless() -> None:
    storage = MemoryStorage()
    async with open_shard(storage) as shard:
        empty = storage.snapshot(SHARD)
        await shard.enqueue(a_job("j1", metadata={"color": "red"}, retry_policy=a_policy(2)))
        await shard.report(await lease_one_of(shard), BROKEN)
        await shard.cancel(tenant=T, job_id="j1")
        await shard.delete(tenant=T, job_id="j1")
        await shard.delete(tenant=T, job_id="j1")
        left = storage.snapshot(SHARD)
        totals = left.pop(keys.TOTALS)
        assert codec.decode(ShardTotals, totals) == ShardTotals(0, 0)
        assert left == empty


async def test_ids_are_drawn_when_none_is_given() -> None:
    async with open_shard() as shard:
        assert len({await shard.enqueue(a_job(None)) for _ in range(20)}) == 20


async def test_a_new_job_under_an_old_id_runs_with_its_own_payload() -> None:
    async with open_shard() as shard:
        assert not await shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=1)
        await shard.enqueue(a_job("daily", payload="monday"))  # The group was asked for: it is cached.
        monday = await shard.lease_one(tenant=T, job_id="daily", worker_id="w")
        await shard.report(task_id(monday), DONE)
        await shard.delete(tenant=T, job_id="daily")
        await shard.enqueue(tuesday := a_job("daily", payload="tuesday"))
        [task] = await shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=1)
        assert task.job.payload == tuesday.payload


@pytest.mark.spec("ENQ-8")
async def test_of_many_enqueues_with_one_id_one_wins() -> None:
    async with open_shard() as shard:
        answers = await asyncio.gather(
            *(shard.enqueue(a_job("j1", payload=n)) for n in range(20)), return_exceptions=True
        )
        assert sorted(map(type, answers), key=str) == [JobExists] * 19 + [str]


@pytest.mark.spec("LEA-19")
async def test_of_many_reports_of_one_task_one_counts() -> None:
    storage = MemoryStorage()
    async with open_shard(storage) as shard:
        await shard.enqueue(a_job("j1", retry_policy=a_policy(9, initial_interval_ms=0)))
        running = await lease_one_of(shard)
        answers = await asyncio.gather(
            *(shard.report(running, outcome) for outcome in (DONE, BROKEN, Cancelled()) * 5),
            return_exceptions=True,
        )
        assert sum(answer is None for answer in answers) == 1
        assert all(answer is None or isinstance(answer, LeaseNotFound) for answer in answers)
        check_snapshot(storage.snapshot(SHARD))


@pytest.mark.parametrize("seed", range(30))
async def test_commands_that_run_into_each_other_leave_the_job_whole(seed: int) -> None:
    storage, rng = MemoryStorage(), Random(seed)
    async with open_shard(storage) as shard:
        await shard.enqueue(a_job("j1", retry_policy=a_policy(9, initial_interval_ms=0)))

        async def any_command() -> None:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            verb = rng.choice(["cancel", "restart", "expedite", "delete", "run", "enqueue"])
            if verb == "enqueue":
                await shard.enqueue(a_job("j1"))
            elif verb == "run":
                for task in await shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=2):
                    await shard.report(task_id(task), rng.choice([DONE, BROKEN, Cancelled()]))
            else:
                await getattr(shard, verb)(tenant=T, job_id="j1")

        answers = await asyncio.gather(*(any_command() for _ in range(60)), return_exceptions=True)
        assert all(answer is None or isinstance(answer, SiloError) for answer in answers), answers
        check_snapshot(storage.snapshot(SHARD))


@pytest.mark.spec("LSE-16", "ENQ-13")
async def test_what_is_answered_is_durable() -> None:
    storage = MemoryStorage()
    shard = await reopened(storage, clock=VirtualClock())
    await shard.enqueue(a_job("j1"))
    assert keys.state_key(T, "j1") in storage.snapshot(SHARD)  # Without closing the shard.
    running = await lease_one_of(shard)
    assert keys.lease_key(running) in storage.snapshot(SHARD)
    await shard.report(running, DONE)
    assert keys.attempt_key(T, "j1", 1) in storage.snapshot(SHARD)
    await shard.close()


async def test_nobody_sees_what_is_not_durable() -> None:
    storage = MemoryStorage()
    async with open_shard(storage) as shard:
        await shard.enqueue(a_job("j1"))
        storage.faults.plan("write", Fault.FAIL_BEFORE)
        cancelling = asyncio.ensure_future(shard.cancel(tenant=T, job_id="j1"))
        looking = asyncio.ensure_future(look(shard))
        answers = await asyncio.gather(cancelling, looking, return_exceptions=True)
        assert isinstance(answers[0], ShardClosed)
        looked = answers[1]
        assert isinstance(looked, ShardClosed) or (
            isinstance(looked, JobView) and looked.state.status is JobStatus.SCHEDULED
        )


async def test_a_second_owner_stops_the_first() -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    first = await reopened(storage, clock=clock)
    await first.enqueue(a_job("j1"))
    second = await reopened(storage, clock=clock)
    with pytest.raises(ShardClosed):
        await first.enqueue(a_job("j2"))
    assert isinstance(await first.wait_closed(), StoreFenced)
    await first.close()
    assert (await look(second)).state.status is JobStatus.SCHEDULED
    with pytest.raises(JobNotFound):
        await look(second, "j2")
    await second.close()


async def test_a_closed_shard_refuses_and_closing_twice_is_harmless() -> None:
    shard = await reopened(MemoryStorage(), clock=VirtualClock())
    await shard.close()
    await shard.close()
    for call in (shard.enqueue(a_job("j1")), look(shard), shard.report("t", DONE)):
        with pytest.raises(ShardClosed, match="shard closed"):
            await call


async def test_too_much_at_once_is_refused_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "GROUP_ROWS_MAX", 100)
    storage = MemoryStorage()
    async with open_shard(storage) as shard:
        answers = await asyncio.gather(
            *(shard.enqueue(a_job(f"j{n}")) for n in range(200)), return_exceptions=True
        )
        refused = [answer for answer in answers if isinstance(answer, BaseException)]
        assert refused
        assert all(isinstance(answer, Overloaded) for answer in refused)
        assert len(check_snapshot(storage.snapshot(SHARD))) == 200 - len(refused)
        await shard.enqueue(a_job("after"))


async def test_counts_are_those_of_the_jobs_that_exist() -> None:
    storage, clock = MemoryStorage(), VirtualClock()
    async with open_shard(storage, clock=clock) as shard:
        await _in_each_state(shard)
        assert shard.counts == ShardTotals(total_jobs=5, completed_jobs=3)
    async with open_shard(storage, clock=clock) as shard:
        assert shard.counts == ShardTotals(total_jobs=5, completed_jobs=3)


async def test_the_same_seed_and_commands_write_the_same_bytes() -> None:
    snapshots = []
    for _ in range(2):
        storage = MemoryStorage()
        async with open_shard(storage, rng=Random(5)) as shard:
            await _in_each_state(shard)
        snapshots.append(storage.snapshot(SHARD))
    assert snapshots[0] == snapshots[1]
