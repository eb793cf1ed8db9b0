"""The life of a job: its statuses, its cancellation flag, its attempts and their numbers."""

from collections.abc import Awaitable, Callable

import pytest

from silo.errors import JobNotFound, LeaseNotFound, SiloError, StateForbids
from silo.model.attempt import AttemptStatus, Cancelled, Failure, Outcome, Success
from silo.model.job import LEASE_MS, MOVES, JobStatus
from silo.storage import keys
from tests.builders import DONE, a_job, a_policy, at_most
from tests.one_shard import BROKEN, OneShard, one_shard

AT_ONCE = a_policy(9, initial_interval_ms=0)
SCHEDULED, RUNNING, SUCCEEDED, FAILED, CANCELLED = JobStatus


async def a_job_that(here: OneShard, ended: Outcome | None, *, is_flagged: bool = False) -> None:
    """The job `j`, run once; `ended` None leaves it running."""
    await here.run(a_job("j"))
    if is_flagged:
        await here.cancel("j")
    if ended is not None:
        await here.report("j", ended)


# Statuses


@pytest.mark.spec("SM-1")
async def test_a_job_that_succeeded_is_left_by_nothing_but_its_deletion() -> None:
    async with one_shard() as here:
        await a_job_that(here, DONE)
        task_id = here.attempts("j")[0].task_id
        before = here.facts()
        commands: list[Awaitable[object]] = [
            here.cancel("j"),
            here.restart("j"),
            here.expedite("j"),
            here.lease_one("j"),
            here.import_job("j", BROKEN),
            here.enqueue(a_job("j")),
            here.shard.report(task_id, BROKEN),
        ]
        for command in commands:
            with pytest.raises(SiloError):
                await command
        await here.wait(3 * LEASE_MS)
        assert await here.lease() == []
        assert here.facts() == before
        await here.delete("j")
        assert here.jobs() == {}


@pytest.mark.spec("SM-1")
async def test_the_moves_of_a_job_are_those_of_the_table() -> None:
    """What imports do is in the table too: they take a job wherever its history leads."""
    moves: set[tuple[JobStatus, JobStatus]] = set()
    async with one_shard() as here:
        await here.enqueue(a_job("j", retry_policy=a_policy(1, initial_interval_ms=0)))
        status = here.status("j")

        async def move(command: Awaitable[object]) -> None:
            nonlocal status
            await command
            after = here.status("j")
            moves.add((status, after))
            status = after

        await move(here.cancel("j"))
        await move(here.restart("j"))
        await move(here.lease())
        await move(here.report("j", BROKEN))
        await move(here.lease())
        await move(here.report("j", BROKEN))
        await move(here.restart("j"))
        await move(here.lease())
        await move(here.report("j", Cancelled()))
        await move(here.import_job("j", BROKEN, retry_policy=AT_ONCE))
        await move(here.lease())
        await move(here.report("j"))
        assert moves == {
            (SCHEDULED, CANCELLED), (CANCELLED, SCHEDULED), (SCHEDULED, RUNNING), (RUNNING, SCHEDULED),
            (RUNNING, FAILED), (FAILED, SCHEDULED), (RUNNING, CANCELLED), (RUNNING, SUCCEEDED),
        }  # fmt: skip
        assert all(after in MOVES[before] for before, after in moves)


@pytest.mark.spec("SM-3", "ENT-20")
@pytest.mark.parametrize(
    ("outcome", "status"), [(DONE, SUCCEEDED), (BROKEN, CANCELLED), (Cancelled(), CANCELLED)]
)
async def test_a_report_decides_how_a_cancelled_job_ends_and_the_flag_stays(
    outcome: Outcome, status: JobStatus
) -> None:
    """Success wins. A failure ends it as Cancelled, where the reference retries it."""
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=AT_ONCE))
        await here.cancel("j")
        flagged_at_ms = here.now_ms
        assert (here.status("j"), here.state("j").cancelled_at_ms) == (RUNNING, flagged_at_ms)
        await here.wait(5)
        await here.report("j", outcome)
        assert (here.status("j"), here.state("j").cancelled_at_ms) == (status, flagged_at_ms)
        assert [attempt.outcome for attempt in here.attempts("j")] == [outcome]


@pytest.mark.spec("SM-5", "ENT-22")
async def test_a_worker_may_cancel_a_job_that_nobody_cancelled_and_no_flag_is_made() -> None:
    async with one_shard() as here:
        await a_job_that(here, Cancelled())
        assert (here.status("j"), here.state("j").cancelled_at_ms) == (CANCELLED, None)
        await here.cancel("j")  # Which can be asked for once.
        assert (here.status("j"), here.state("j").cancelled_at_ms) == (CANCELLED, here.now_ms)


@pytest.mark.spec("ENT-22")
async def test_a_job_that_was_imported_as_cancelled_has_no_flag() -> None:
    async with one_shard() as here:
        assert await here.import_job("j", Cancelled()) is CANCELLED
        assert here.state("j").cancelled_at_ms is None


Command = Callable[[OneShard], Awaitable[object]]
COMMANDS: dict[str, Command] = {
    "cancel": lambda here: here.cancel("j"),
    "restart": lambda here: here.restart("j"),
    "expedite": lambda here: here.expedite("j"),
    "lease": lambda here: here.lease_one("j"),
}
TERMINAL = "job is already in terminal state"


@pytest.mark.spec("SM-6", "SM-7")
@pytest.mark.parametrize(
    ("verb", "ended", "is_flagged", "reason"),
    [
        # Cancel asks for the flag before the status.
        ("cancel", DONE, True, "job is already cancelled"),
        ("cancel", BROKEN, True, "job is already cancelled"),
        ("cancel", None, True, "job is already cancelled"),
        ("cancel", DONE, False, TERMINAL),
        ("cancel", BROKEN, False, TERMINAL),
        # Expedite: final, flag, running, pending work.
        ("expedite", DONE, True, TERMINAL),
        ("expedite", BROKEN, True, "job is cancelled"),
        ("expedite", None, True, "job is cancelled"),
        ("expedite", None, False, "job is currently running"),
        ("expedite", Cancelled(), False, "job has no pending task to expedite"),
        # Lease by id: running, final, flag, pending work.
        ("lease", None, True, "job is currently running"),
        ("lease", DONE, True, TERMINAL),
        ("lease", BROKEN, True, "job is cancelled"),
        ("lease", Cancelled(), False, "job has no pending task"),
        # Restart: the status only.
        ("restart", DONE, True, "job already succeeded"),
        ("restart", None, True, "job is still in progress"),
        ("restart", None, False, "job is still in progress"),
    ],
)
async def test_a_refusal_names_what_is_looked_at_first_and_changes_nothing(
    verb: str, ended: Outcome | None, is_flagged: bool, reason: str
) -> None:
    """A cancelled job that fails is Cancelled here, so no Failed and no Scheduled job has the flag."""
    async with one_shard() as here:
        await a_job_that(here, ended, is_flagged=is_flagged)
        before, status = here.facts(), here.status("j").label
        with pytest.raises(StateForbids) as refusal:
            await COMMANDS[verb](here)
        expected = reason if verb == "cancel" else f"cannot {verb} job j: {reason} (status: {status})"
        assert refusal.value.message == expected
        assert here.facts() == before


@pytest.mark.spec("SM-6")
@pytest.mark.parametrize("verb", COMMANDS)
async def test_a_job_that_does_not_exist_is_not_found_before_all_else(verb: str) -> None:
    async with one_shard() as here:
        with pytest.raises(JobNotFound, match=r"^job not found"):
            await COMMANDS[verb](here)


@pytest.mark.spec("SM-6")
async def test_what_is_due_is_no_more_expedited_than_what_waits_in_a_line() -> None:
    async with one_shard() as here:
        await here.run(a_job("holds", limits=[at_most(1)]))
        await here.enqueue(a_job("ready"), a_job("waits", limits=[at_most(1)]))
        for job_id, reason in (
            ("ready", r"task is already ready to run \(not future-scheduled\)"),
            ("waits", "job has no pending task to expedite"),
        ):
            with pytest.raises(StateForbids, match=f"^cannot expedite job {job_id}: {reason}"):
                await here.expedite(job_id)


# The start of the pending attempt, and the flag


@pytest.mark.spec("ENT-17")
async def test_only_a_job_with_an_attempt_to_come_has_a_start() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", retry_policy=a_policy(1, initial_interval_ms=0)))
        assert here.state("j").next_start_ms == here.now_ms
        for outcome in (BROKEN, DONE):
            assert await here.lease() == ["j"]
            assert here.state("j").next_start_ms is None
            await here.report("j", outcome)
        assert here.state("j").next_start_ms is None
        for job_id, last in (("s", DONE), ("f", BROKEN), ("c", Cancelled())):
            await here.import_job(job_id, last)
            assert here.state(job_id).next_start_ms is None


@pytest.mark.spec("ENT-18")
async def test_a_job_cancelled_before_its_start_keeps_start_and_number() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=a_policy(1, initial_interval_ms=9_000)))
        await here.report("j", BROKEN)
        start_at_ms = here.now_ms + 9_000
        await here.wait(10)
        await here.cancel("j")
        state = here.state("j")
        assert (state.status, state.changed_at_ms) == (CANCELLED, here.now_ms)
        assert (state.next_start_ms, state.next_attempt_number) == (start_at_ms, 2)


@pytest.mark.spec("ENT-21")
async def test_the_flag_is_set_by_cancel_and_taken_away_by_restart_import_and_delete_only() -> None:
    async with one_shard() as here:

        def is_flagged() -> bool:
            return here.state("j").cancelled_at_ms is not None

        await here.run(a_job("j", retry_policy=AT_ONCE))
        assert not is_flagged()
        await here.cancel("j")
        await here.shard.heartbeat(task_id=here.task_id("j"), worker_id="w")
        await here.crash()
        assert is_flagged()
        await here.wait(LEASE_MS)
        assert is_flagged()
        await here.restart("j")
        assert not is_flagged()
        await here.cancel("j")
        assert is_flagged()
        await here.import_job("j", BROKEN)
        assert not is_flagged()
        await here.restart("j")
        await here.cancel("j")
        await here.delete("j")
        await here.enqueue(a_job("j"))
        assert not is_flagged()


# The description


@pytest.mark.spec("ENT-9", "ENT-10")
async def test_the_description_of_a_job_stays_as_it_was_given_whatever_happens_to_it() -> None:
    async with one_shard() as here:
        job = a_job(
            "j",
            priority=7,
            start_at_ms=here.now_ms - 5,
            payload=bytes(range(256)),
            metadata={"k": "v"},
            retry_policy=a_policy(1, initial_interval_ms=0),
            limits=[at_most(2, "b"), at_most(1, "a")],
        )
        await here.run(job)

        def described() -> tuple[object, ...]:
            stored = here.jobs()["-", "j"]
            state = stored.state
            return stored.job, state.priority, state.task_group, state.limits

        before = described()
        assert here.jobs()["-", "j"].job.payload == job.payload
        await here.report("j", BROKEN)
        await here.cancel("j")
        await here.restart("j")
        assert await here.lease() == ["j"]
        await here.report("j", Failure("OTHER", b""))
        assert described() == before
        assert here.state("j").retry_policy == job.retry_policy
        new = a_policy(8, initial_interval_ms=0)
        await here.import_job("j", BROKEN, retry_policy=new)
        assert described() == before
        assert here.state("j").retry_policy == new
        await here.import_job("j", BROKEN, retry_policy=None)
        assert described() == before
        assert here.state("j").retry_policy is None


@pytest.mark.spec("ENT-4")
async def test_one_id_under_two_tenants_names_two_jobs() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", tenant="a", payload=1), a_job("j", tenant="b", payload=2))
        await here.shard.cancel(tenant="a", job_id="j")
        b = here.jobs()["b", "j"]
        assert (here.state("j", tenant="a").status, b.state.status) == (CANCELLED, SCHEDULED)
        await here.shard.delete(tenant="a", job_id="j")
        assert here.jobs() == {("b", "j"): b}
        [task] = await here.shard.lease_tasks(worker_id="w", task_group="default", max_tasks=9)
        assert (task.job.tenant, task.job.payload) == ("b", b"\x02")


# Attempts


@pytest.mark.spec("ATT-1", "ATT-2", "ATT-3", "ENT-8")
async def test_attempts_are_numbered_over_the_whole_life_and_within_each_run() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("j", retry_policy=a_policy(1, initial_interval_ms=0)))
        for _ in range(2):
            for _ in range(2):
                assert await here.lease() == ["j"]
                await here.report("j", BROKEN)
            await here.restart("j")
        await here.cancel("j")  # Before it was leased: its number is used again.
        await here.restart("j")
        assert await here.lease() == ["j"]
        await here.report("j")
        attempts = here.attempts("j")
        numbers = [(attempt.attempt_number, attempt.relative_attempt_number) for attempt in attempts]
        assert numbers == [(1, 1), (2, 2), (3, 1), (4, 2), (5, 1)]
        assert len({attempt.task_id for attempt in attempts}) == 5


@pytest.mark.spec("ATT-6")
async def test_the_last_attempt_of_a_run_is_told_that_it_is() -> None:
    async def told(here: OneShard, job_id: str) -> list[bool]:
        seen: list[bool] = []
        while await here.lease() == [job_id]:
            seen.append(here.state(job_id).is_last_attempt)
            await here.report(job_id, BROKEN)
        return seen

    async with one_shard() as here:
        await here.enqueue(a_job("once"))
        assert await told(here, "once") == [True]
        await here.enqueue(a_job("thrice", retry_policy=a_policy(2, initial_interval_ms=0)))
        assert await told(here, "thrice") == [False, False, True]
        await here.restart("thrice")
        assert await told(here, "thrice") == [False, False, True]


@pytest.mark.spec("ENT-23")
async def test_an_attempt_has_a_record_from_its_lease_on_and_not_before() -> None:
    """That of a running attempt is its lease. A job that its rate limit fails has one that never ran."""
    async with one_shard() as here:

        async def statuses() -> list[AttemptStatus]:
            view = await here.shard.get_job(tenant="-", job_id="j", with_attempts=True)
            return [attempt.status for attempt in view.attempts]

        await here.enqueue(a_job("j", retry_policy=a_policy(1)))
        assert await statuses() == []
        await here.lease()
        assert await statuses() == [AttemptStatus.RUNNING]
        await here.report("j", BROKEN)
        assert await statuses() == [AttemptStatus.FAILED]


@pytest.mark.spec("ENT-24")
async def test_an_attempt_that_has_ended_never_changes() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", retry_policy=a_policy(1, initial_interval_ms=0)))
        await here.report("j", BROKEN)
        first = keys.attempt_key("-", "j", 1)
        written = here.rows()[first]
        assert await here.lease() == ["j"]
        with pytest.raises(LeaseNotFound):
            await here.shard.report(here.attempts("j")[0].task_id, DONE)
        await here.wait(LEASE_MS)
        await here.restart("j")
        await here.cancel("j")
        await here.import_job("j", DONE)
        assert here.status("j") is SUCCEEDED
        assert here.rows()[first] == written


@pytest.mark.spec("ENT-25")
async def test_attempts_are_listed_by_number_with_results_and_errors_of_any_size() -> None:
    large = bytes(range(256)) * (3 << 12)
    async with one_shard() as here:
        await here.enqueue(a_job("j", retry_policy=a_policy(20, initial_interval_ms=0)))
        outcomes: list[Outcome] = [Failure("E", b"") for _ in range(11)]
        outcomes += [Failure("LARGE", large), Success(large)]
        for outcome in outcomes:
            assert await here.lease() == ["j"]
            await here.report("j", outcome)
        view = await here.shard.get_job(tenant="-", job_id="j", with_attempts=True)
        assert [attempt.attempt_number for attempt in view.attempts] == list(range(1, 14))
        assert [attempt.outcome for attempt in view.attempts] == outcomes
