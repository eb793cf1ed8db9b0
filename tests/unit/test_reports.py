"""What a worker may say of a task beyond its outcome: handed back, postponed, failed for good."""

import asyncio
from collections.abc import Sequence

import msgspec
import pytest

from silo.errors import LeaseNotFound, ShardClosed, SiloError, StateForbids, WrongTask
from silo.model.attempt import Cancelled, FinalFailure, HandedBack, Postponed
from silo.model.floating import FloatingState, RefreshDue, RefreshFailed, RefreshSucceeded
from silo.model.job import DEFAULT_TENANT, LEASE_MS, JobState, JobStatus, Lease, Place, Ready, Waiting
from silo.model.limit import ConcurrencyLimit, Holder, Limit
from silo.shard.shard import AnyReport, ShardOptions
from silo.storage import codec, keys
from silo.storage.memory import Fault
from tests.builders import DONE, GROUP, SHARD, a_job, a_policy, a_rate, at_most, floating
from tests.one_shard import BROKEN, OneShard, one_shard

AT_ONCE = a_policy(5, initial_interval_ms=0)
HASTY = ShardOptions(store_timeout_s=0.2)  # A hung write fails soon, so that the test can end.
BACK = HandedBack()
LATER = Postponed(3_000)
FINAL = FinalFailure(BROKEN)
SCHEDULED, RUNNING, SUCCEEDED, FAILED, CANCELLED = JobStatus


async def answered(here: OneShard, *reports: tuple[str, AnyReport]) -> list[SiloError | None]:
    """What the shard answers to reports of tasks."""
    return await here.shard.report_many(reports)


async def report(here: OneShard, job_id: str, what: AnyReport) -> None:
    """A report on a running job that counts."""
    assert await answered(here, (here.task_id(job_id), what)) == [None]


def lasting(here: OneShard) -> dict[bytes, object]:
    """All that is stored but the times of the last change, and the copy of the job in a queue row."""
    found: dict[bytes, object] = {}
    for key, value in here.facts().items():
        if key[:1] in (b"q", b"j", b"t", b"l") and (state := _state_in(key, value)) is not None:
            found[key] = msgspec.structs.replace(state, changed_at_ms=0)
        else:
            found[key] = value
    return found


def _state_in(key: bytes, value: bytes) -> JobState | None:
    if key.startswith(b"q"):
        task, _ = codec.decode_queued(value)
        return task if isinstance(task, JobState) else None
    try:
        return codec.decode(JobState, value)
    except SiloError:
        return None  # The description of a job, or an attempt.


# Handed back


CHAINS: list[Sequence[Limit]] = [
    [],
    [at_most(1)],
    [at_most(2, "a"), at_most(1, "b")],
    [floating(1)],
    [a_rate(1)],
    [at_most(1, "a"), a_rate(2), floating(3, "f"), at_most(1, "b")],
]


@pytest.mark.parametrize("limits", CHAINS, ids=len)
@pytest.mark.parametrize("start", [None, -5_000, 700])
@pytest.mark.parametrize("crashes", [False, True])
async def test_a_task_that_is_handed_back_leaves_all_as_it_was_before_its_lease(
    limits: Sequence[Limit], start: int | None, crashes: bool
) -> None:
    async with one_shard() as here:
        start_at_ms = 0 if start is None else here.now_ms + start
        job = a_job("j", limits=limits, start_at_ms=start_at_ms, priority=7, metadata={"k": "v"})
        await here.enqueue(job)
        await here.wait(900)
        before = lasting(here)
        assert await here.lease() == ["j"]
        await here.wait(10)
        if crashes:
            await here.crash()
        await report(here, "j", BACK)
        assert lasting(here) == before
        assert here.state("j").changed_at_ms == here.now_ms


async def test_a_task_that_was_handed_back_is_the_same_attempt_under_a_new_lease() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=a_policy(0)))
        first = here.task_id("j")
        await report(here, "j", BACK)
        assert await here.lease() == ["j"]
        assert here.task_id("j") != first
        assert (here.state("j").next_attempt_number, here.attempts("j")) == (1, [])
        assert [type(answer) for answer in await answered(here, (first, DONE))] == [LeaseNotFound]
        await report(here, "j", DONE)
        assert [attempt.attempt_number for attempt in here.attempts("j")] == [1]


async def test_a_retry_that_is_handed_back_is_the_same_retry() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=AT_ONCE))
        await here.report("j", BROKEN)
        before = lasting(here)
        assert await here.lease() == ["j"]
        await report(here, "j", BACK)
        assert lasting(here) == before
        assert here.state("j").relative_attempt_number == 2


async def test_a_task_goes_back_to_its_place_in_the_queue() -> None:
    async with one_shard(options=ShardOptions(priority_step_ms=0)) as here:
        await here.enqueue(a_job("first"))
        await here.wait(5)
        await here.enqueue(a_job("second"))
        await here.wait(5)
        assert await here.lease(1) == ["first"]
        await here.enqueue(a_job("third"))
        await report(here, "first", BACK)
        assert await here.lease() == ["first", "second", "third"]


async def test_a_task_that_is_handed_back_keeps_its_tickets_before_those_who_wait() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", limits=[at_most(1)]))
        await here.enqueue(a_job("waits", priority=0, limits=[at_most(1)]))
        held = here.state("j").held
        await report(here, "j", BACK)
        assert (here.state("j").held, here.waiting()) == (held, ["waits"])
        assert await here.lease() == ["j"]


async def test_handing_back_wakes_whoever_waits_for_work() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        waiting = asyncio.ensure_future(here.lease(wait_ms=60_000))
        await asyncio.sleep(0)
        await report(here, "j", BACK)
        assert await asyncio.wait_for(waiting, 5) == ["j"]


async def test_a_job_that_was_leased_before_its_time_is_due_at_once_when_it_is_handed_back() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", start_at_ms=here.now_ms + 60_000, limits=[at_most(1)]))
        await here.lease_one("j")
        await report(here, "j", BACK)
        assert await here.lease() == ["j"]
        assert (here.held("j"), here.attempts("j")) == (["k"], [])


@pytest.mark.parametrize("limits", [[], [at_most(1)]])
async def test_a_job_that_was_leased_by_its_id_in_its_turn_goes_back_there(limits: list[Limit]) -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", limits=limits))
        before = lasting(here)
        await here.lease_one("j")
        await report(here, "j", BACK)
        assert lasting(here) == before


async def test_handing_back_over_and_over_leaves_nothing_behind() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", limits=[at_most(1), a_rate(1)]))
        rows = len(here.facts())
        for _ in range(100):
            [task] = await here.shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=1)
            assert not isinstance(task, FloatingState)
            assert task.state.lease is not None
            assert await answered(here, (task.state.lease.task_id, BACK)) == [None]
        assert len(here.facts()) == rows


# Postponed


async def test_a_postponed_job_runs_again_after_the_delay_and_no_attempt_was_made() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=a_policy(0)))
        await report(here, "j", LATER)
        state = here.state("j")
        assert (state.status, state.next_start_ms) == (SCHEDULED, here.now_ms + 3_000)
        await here.wait(2_999)
        assert await here.lease() == []
        await here.wait(1)
        assert await here.lease() == ["j"]
        assert (here.state("j").next_attempt_number, here.attempts("j")) == (1, [])


async def test_a_job_can_be_postponed_for_ever_and_keeps_its_retries() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=a_policy(1, initial_interval_ms=0)))
        for _ in range(20):
            await report(here, "j", Postponed(1))
            await here.wait(1)
            assert await here.lease() == ["j"]
        await here.report("j", BROKEN)
        assert here.status("j") is SCHEDULED
        assert await here.lease() == ["j"]
        await report(here, "j", LATER)
        await here.wait(3_000)
        assert await here.lease() == ["j"]
        assert here.state("j").relative_attempt_number == 2
        await here.report("j", BROKEN)
        assert here.status("j") is FAILED


async def test_a_postponed_job_gives_its_tickets_to_those_who_wait_and_gets_in_line_behind_them() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", limits=[at_most(1, "a"), at_most(1, "b")]))
        await here.enqueue(a_job("next", priority=99, limits=[at_most(1, "a")]))
        await report(here, "j", LATER)
        assert (here.holders("a"), here.holders("b"), here.state("j").passed) == ({"next"}, set(), 0)
        await here.wait(3_000)
        assert isinstance(here.state("j").pending, Waiting)
        assert await here.lease() == ["next"]
        await here.report("next")
        assert here.holders("a") == here.holders("b") == {"j"}


async def test_postponed_by_nothing_a_job_still_lets_those_go_ahead_who_wait() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", priority=0, limits=[at_most(1)]))
        await here.enqueue(a_job("waits", priority=99, limits=[at_most(1)]))
        await report(here, "j", Postponed(0))
        assert (here.holders(), here.waiting()) == ({"waits"}, ["j"])


async def test_a_postponed_job_passes_its_rate_limits_again() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", limits=[a_rate(1, 10_000)]))
        await report(here, "j", Postponed(0))
        assert await here.lease() == []
        await here.wait(10_000)
        assert await here.lease() == ["j"]


async def test_the_longest_delay_is_the_end_of_time() -> None:
    async with one_shard() as here:
        await here.run(a_job("j"))
        await report(here, "j", Postponed(2**63 - 1))
        assert here.state("j").next_start_ms == 2**63 - 1
        await here.expedite("j")
        assert await here.lease() == ["j"]


# Failed for good


async def test_a_final_failure_fails_the_job_whatever_its_policy_allows() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=AT_ONCE, limits=[at_most(1)]))
        await here.enqueue(a_job("waits", limits=[at_most(1)]))
        await report(here, "j", FINAL)
        assert here.status("j") is FAILED
        [attempt] = here.attempts("j")
        assert (attempt.outcome, attempt.attempt_number) == (BROKEN, 1)
        assert here.holders() == {"waits"}


async def test_a_job_that_failed_for_good_can_be_restarted_with_all_its_retries() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=AT_ONCE))
        await report(here, "j", FINAL)
        await here.restart("j")
        assert await here.lease() == ["j"]
        await here.report("j", BROKEN)
        assert here.status("j") is SCHEDULED


@pytest.mark.parametrize("policy", [None, AT_ONCE])
async def test_a_final_failure_is_stored_as_any_other_is(policy: object) -> None:
    """So there is nothing new to read for whoever looks at attempts."""
    rows = []
    for what in (BROKEN, FINAL):
        async with one_shard() as here:
            await here.run(a_job("j", retry_policy=policy if what is FINAL else None))
            await report(here, "j", what)
            rows.append(here.attempts("j"))
    assert rows[0] == rows[1]


# Of jobs that were cancelled


@pytest.mark.parametrize(
    ("what", "outcome"),
    [(BACK, Cancelled()), (LATER, Cancelled()), (Postponed(0), Cancelled()), (FINAL, BROKEN)],
)
@pytest.mark.parametrize("limits", [[], [at_most(1)]])
async def test_nothing_of_a_cancelled_job_runs_again(
    what: AnyReport, outcome: object, limits: list[Limit]
) -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=AT_ONCE, limits=limits))
        await here.cancel("j")
        await report(here, "j", what)
        assert here.status("j") is CANCELLED
        assert [attempt.outcome for attempt in here.attempts("j")] == [outcome]
        await here.wait(10 * LEASE_MS)
        assert await here.lease() == []
        assert here.holders() == set()


async def test_a_job_that_was_cancelled_before_its_time_and_handed_back_ends_as_cancelled() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", start_at_ms=here.now_ms + 60_000))
        await here.lease_one("j")
        await here.cancel("j")
        await report(here, "j", BACK)
        assert here.status("j") is CANCELLED


# Refreshes of floating limits


async def a_refresh(here: OneShard) -> str:
    """The task id of a refresh for which the job `waits` waits."""
    await here.enqueue(a_job("waits", limits=[floating(0)]))
    task = await here.lease_refresh()
    assert task is not None
    assert task.lease is not None
    return task.lease.task_id


async def test_a_refresh_that_is_handed_back_is_offered_again_at_once_and_has_not_failed() -> None:
    async with one_shard() as here:
        task_id = await a_refresh(here)
        assert await answered(here, (task_id, BACK)) == [None]
        state = here.floating()
        assert state is not None
        assert (state.refresh, state.failures, state.next_retry_at_ms) == (RefreshDue(here.now_ms), 0, None)
        assert [type(answer) for answer in await answered(here, (task_id, RefreshSucceeded(1)))] == [
            LeaseNotFound
        ]
        await here.refresh(1)
        assert here.holders() == {"waits"}


async def test_a_refresh_that_is_handed_back_wakes_whoever_waits_for_work() -> None:
    async with one_shard() as here:
        task_id = await a_refresh(here)
        waiting = asyncio.ensure_future(here.lease(wait_ms=60_000))
        await asyncio.sleep(0)
        await answered(here, (task_id, BACK))
        assert await asyncio.wait_for(waiting, 5) == []
        assert len(here.refreshes) == 1


# Many at once


def kinds(answers: list[SiloError | None]) -> list[object]:
    return [answer if answer is None else type(answer) for answer in answers]


async def test_many_reports_are_taken_each_by_itself_in_one_write() -> None:
    async with one_shard() as here:
        refresh = await a_refresh(here)
        jobs = [f"j{number}" for number in range(8)]
        await here.run(*(a_job(job_id, retry_policy=AT_ONCE) for job_id in jobs))
        ids = {job_id: here.task_id(job_id) for job_id in jobs}
        groups = here.shard.groups_written
        answers = await answered(
            here,
            (ids["j0"], DONE),
            (ids["j1"], BROKEN),
            ("none", DONE),
            (ids["j2"], FINAL),
            (ids["j3"], LATER),
            (refresh, DONE),
            (ids["j4"], RefreshSucceeded(1)),
            (ids["j4"], BACK),
            (ids["j5"], Cancelled()),
            (ids["j0"], BROKEN),
            (refresh, RefreshFailed("X", "y")),
            (refresh, RefreshSucceeded(1)),
        )
        assert kinds(answers) == [
            None, None, LeaseNotFound, None, None, StateForbids, WrongTask, None, None, LeaseNotFound, None,
            LeaseNotFound,
        ]  # fmt: skip
        assert here.shard.groups_written == groups + 1
        statuses = [SUCCEEDED, SCHEDULED, FAILED, SCHEDULED, SCHEDULED, CANCELLED, RUNNING, RUNNING]
        assert [here.status(job_id) for job_id in jobs] == statuses


@pytest.mark.parametrize("what", [Postponed(0), FINAL], ids=str)
async def test_a_refresh_takes_no_other_report_of_a_job(what: AnyReport) -> None:
    async with one_shard() as here:
        task_id = await a_refresh(here)
        before = here.facts()
        assert kinds(await answered(here, (task_id, what))) == [StateForbids]
        assert here.facts() == before


async def test_reports_are_answered_when_they_are_durable() -> None:
    async with one_shard(options=HASTY) as here:
        await here.run(a_job("a"), a_job("b"))
        reports = [(here.task_id("a"), DONE), (here.task_id("b"), DONE)]
        here.storage.faults.plan("write", Fault.HANG)
        waiting = asyncio.ensure_future(answered(here, *reports))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        assert here.status("a") is RUNNING
        waiting.cancel()
        await here.crash()
        assert kinds(await answered(here, *reports)) == [None, None]


@pytest.mark.parametrize("what", [BACK, LATER, FINAL, DONE], ids=str)
@pytest.mark.parametrize("fault", [Fault.FAIL_BEFORE, Fault.FAIL_AFTER])
async def test_a_report_whose_write_failed_can_be_repeated(what: AnyReport, fault: Fault) -> None:
    async with one_shard() as here:
        await here.run(a_job("j", limits=[at_most(1)], retry_policy=AT_ONCE))
        task_id = here.task_id("j")
        here.storage.faults.plan("write", fault)
        with pytest.raises(ShardClosed):
            await answered(here, (task_id, what))
        await here.crash()
        expected = LeaseNotFound if fault is Fault.FAIL_AFTER else None
        assert kinds(await answered(here, (task_id, what))) == [expected]
        here.jobs()


# Leases that were stored before there were sessions


OLD_RUNNING = bytes.fromhex(
    "01dc0012a461636d65a26a31a764656661756c7432c001cf0000018bcfe56801010209c0c0c094a27431a177"
    "cf0000018bcfe56801cf0000018bcfe58f11919301a16b01019192a16bcf0000018bcfe56800c0"
)
OLD_REFRESH = bytes.fromhex(
    "03019ca461636d65a16603cdea609192a161a131030000c0a764656661756c74920294a27432a17701cd2711c0"
)


def test_a_running_job_of_a_server_without_sessions_still_decodes() -> None:
    state = codec.decode(JobState, OLD_RUNNING)
    assert state.lease == Lease(
        task_id="t1", worker_id="w", started_at_ms=1_700_000_000_001, expiry_ms=1_700_000_010_001
    )
    assert (state.lease.session, state.lease.place) == ("", None)
    assert (state.status, state.job_id, state.passed) == (RUNNING, "j1", 1)
    assert state.limits == (ConcurrencyLimit(key="k", max_concurrency=1),)
    assert state.held == (Holder("k", 1_700_000_000_000),)


def test_a_refresh_of_a_server_without_sessions_still_decodes() -> None:
    state = codec.decode_task(OLD_REFRESH)
    assert isinstance(state, FloatingState)
    assert state.lease == Lease(task_id="t2", worker_id="w", started_at_ms=1, expiry_ms=10_001)


@pytest.mark.parametrize("lasts", [False, True])
async def test_a_lease_of_a_server_without_sessions_can_be_handed_back_after_the_update(lasts: bool) -> None:
    """Its place is not known: it runs through its limits once more, and this is no attempt."""
    async with one_shard() as here:
        await here.run(a_job("j", limits=[at_most(1)], retry_policy=AT_ONCE))
        await _forget_the_place(here)
        await here.crash()
        if lasts:
            await here.wait(LEASE_MS - 1)
        await report(here, "j", BACK)
        assert await here.lease() == ["j"]
        assert (here.held("j"), here.attempts("j")) == (["k"], [])


async def _forget_the_place(here: OneShard) -> None:
    """Store the lease of `j` as a server without sessions did."""
    state = here.state("j")
    assert state.lease is not None
    lease = msgspec.structs.replace(state.lease, place=None)
    value = codec.encode(msgspec.structs.replace(state, lease=lease))
    store = await here.storage.open(SHARD)
    rows = [keys.state_key(DEFAULT_TENANT, "j"), keys.lease_key(state.lease.task_id)]
    await store.write(dict.fromkeys(rows, value))


async def test_where_a_job_stood_is_kept_with_its_lease() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", priority=3, start_at_ms=here.now_ms - 5))
        pending = here.state("j").pending
        assert isinstance(pending, Ready)
        await here.lease()
        lease = here.state("j").lease
        assert lease is not None
        assert lease.place == Place(here.now_ms - 5, pending.deadline_ms)
