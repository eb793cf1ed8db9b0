"""Asking an external limiter: in what order, how many at a time, and what happens when something fails."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from silo.clock import VirtualClock
from silo.errors import ShardClosed
from silo.model.job import Asking, Checking, JobState, JobStatus, Throttled
from silo.model.limit import RateLimit
from silo.shard.agenda import WINDOW_ROWS, Agenda
from silo.shard.asker import FAILURE_LOG_MS, IN_FLIGHT_MAX
from silo.shard.floors import Floors
from silo.shard.limiter import Answer, LimiterFailed
from silo.shard.shard import ShardOptions
from silo.shard.turns import TENANTS_MAX, Turns
from silo.shard.window import RowTally
from silo.storage import codec, keys
from silo.storage.memory import Fault
from tests.builders import SHARD, a_job, a_policy, a_rate, at_most, until
from tests.one_shard import OneShard, one_shard

UNDER = Answer(is_under=True, reset_at_ms=0)
OVER = Answer(is_under=False, reset_at_ms=0)
SECRET = "a-key-of-a-tenant"


class Limiter:
    """Answers as `say` says, at once, or when it is told to while it is `held`."""

    def __init__(self, say: Callable[[RateLimit], Answer] = lambda _: UNDER) -> None:
        self.say = say
        self.asked: list[str] = []  # The unique keys, in order.
        self.in_flight = 0
        self.most_in_flight = 0
        self.cancelled = 0
        self.is_held = False
        self._held: list[asyncio.Future[None]] = []

    async def check(self, limit: RateLimit) -> Answer:
        self.asked.append(limit.unique_key)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.is_held:
                waiting = asyncio.get_running_loop().create_future()
                self._held.append(waiting)
                await waiting
            else:
                await asyncio.sleep(0)
            return self.say(limit)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1

    def hold(self) -> None:
        self.is_held = True

    def release(self, count: int | None = None) -> None:
        """Answer those who wait, the first ones first; all of them, and all to come, without a count."""
        self.is_held = count is not None
        held = [waiting for waiting in self._held if not waiting.done()]
        for waiting in held[:count]:
            waiting.set_result(None)
        self._held = held


def raising(error: BaseException) -> Callable[[RateLimit], Answer]:
    def say(_: RateLimit) -> Answer:
        raise error

    return say


async def turn_loop() -> None:
    """Give everything that is ready, and what follows from it, its chance to run."""
    for _ in range(200):
        await asyncio.sleep(0)


async def enqueue_many(here: OneShard, prefix: str, count: int, *, tenant: str = "-") -> None:
    """Enqueue jobs with a rate limit each, whose key is that of the job."""
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            name = f"{prefix}{number}"
            job = a_job(name, tenant=tenant, limits=[a_rate(1, unique_key=name)])
            group.create_task(here.shard.enqueue(job))


async def lease_all(here: OneShard) -> set[str]:
    """Lease until there is no more."""
    leased: set[str] = set()
    while found := await here.lease(1_000):
        assert not leased & set(found)
        leased |= set(found)
    return leased


async def put_rows(here: OneShard, rows: dict[bytes, bytes | None]) -> None:
    """Write rows behind the back of the shard, which is closed."""
    store = await here.storage.open(SHARD)
    await store.write(rows)
    await store.close()


@contextmanager
def started(name: str) -> Iterator[list[str]]:
    """The coroutines of this name that are started as tasks while the block runs."""
    names: list[str] = []
    loop = asyncio.get_running_loop()

    def make(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> Any:
        if work.__qualname__ == name:
            names.append(name)
        return asyncio.Task(work, loop=loop, **options)

    loop.set_task_factory(make)
    try:
        yield names
    finally:
        loop.set_task_factory(None)


def asking_rows(here: OneShard) -> list[bytes]:
    return here.family(keys.ASKING)


def asking_tasks() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "ask limiter"]


# Many at once


async def test_ten_thousand_jobs_are_asked_about_once_each_and_within_the_bounds() -> None:
    limiter = Limiter()
    limiter.hold()
    async with one_shard(limiter=limiter) as here:
        await enqueue_many(here, "j", 10_000)
        await until(lambda: limiter.in_flight == IN_FLIGHT_MAX)
        await turn_loop()
        assert len(limiter.asked) == IN_FLIGHT_MAX
        assert len(here.shard._state.asking.window) <= 2 * WINDOW_ROWS
        limiter.release()
        await until(lambda: not asking_rows(here), timeout_s=60)
        assert limiter.most_in_flight == IN_FLIGHT_MAX
        assert len(limiter.asked) == len(set(limiter.asked)) == 10_000
        assert len(await lease_all(here)) == 10_000


async def test_a_backlog_from_before_is_read_as_it_is_asked_about() -> None:
    limiter = Limiter()
    limiter.hold()
    async with one_shard(limiter=limiter) as here:
        await enqueue_many(here, "j", 2_000)
        await here.crash()
        limiter.asked.clear()
        await until(lambda: limiter.in_flight == IN_FLIGHT_MAX)
        assert len(here.shard._state.asking.window) <= 2 * WINDOW_ROWS
        limiter.release(IN_FLIGHT_MAX)
        await until(lambda: len(limiter.asked) == 2 * IN_FLIGHT_MAX)
        limiter.release(50)
        await until(lambda: len(limiter.asked) == 2 * IN_FLIGHT_MAX + 50)
        assert limiter.in_flight == IN_FLIGHT_MAX, "as many as may be, whatever is in memory"
        limiter.release()
        await until(lambda: not asking_rows(here), timeout_s=30)
        assert len(await here.lease(2_001)) == 2_000


async def test_a_place_comes_free_when_what_follows_from_an_answer_is_durable() -> None:
    """So a crash spends hits twice for no more jobs than are in flight."""
    limiter = Limiter()
    async with one_shard(limiter=limiter, options=ShardOptions(store_timeout_s=0.5)) as here:
        limiter.hold()
        await enqueue_many(here, "j", IN_FLIGHT_MAX + 50)
        await until(lambda: limiter.in_flight == IN_FLIGHT_MAX)
        here.storage.faults.plan("write", Fault.HANG)
        limiter.release()
        await turn_loop()
        assert len(limiter.asked) == IN_FLIGHT_MAX
        await here.crash()
        await until(lambda: not asking_rows(here))
        assert all(limiter.asked.count(name) <= 2 for name in limiter.asked)
        assert len(await here.lease(1_000)) == IN_FLIGHT_MAX + 50


# Turns


async def test_a_tenant_with_very_many_questions_does_not_keep_another_one_waiting() -> None:
    limiter = Limiter()
    limiter.hold()
    async with one_shard(limiter=limiter) as here:
        await enqueue_many(here, "a", 3_000, tenant="a")
        await until(lambda: limiter.in_flight == IN_FLIGHT_MAX)
        here.clock.advance_ms(5)
        await enqueue_many(here, "b", 20, tenant="b")
        for _ in range(60):
            limiter.release(1)
            await turn_loop()
        order = [name[0] for name in limiter.asked[IN_FLIGHT_MAX:]]
        assert order[0] == "b"
        assert "".join(order[:38]).count("b") >= 19, "they take turns"
        limiter.release()
        await until(lambda: not asking_rows(here), timeout_s=30)


async def test_turns_are_kept_after_a_crash() -> None:
    limiter = Limiter()
    limiter.hold()
    async with one_shard(limiter=limiter) as here:
        await enqueue_many(here, "a", 3_000, tenant="a")
        await here.crash()
        await until(lambda: limiter.in_flight == IN_FLIGHT_MAX)
        before = len(limiter.asked)
        await enqueue_many(here, "b", 1, tenant="b")
        limiter.release(1)
        await until(lambda: len(limiter.asked) > before)
        assert limiter.asked[before] == "b0"
        limiter.release()
        await until(lambda: not asking_rows(here), timeout_s=30)


def a_line() -> tuple[Turns, Callable[[str], bytes], Callable[[bytes], None]]:
    """Turns, how a tenant joins the line, and how a row leaves it."""
    floors = Floors()
    asking: Agenda[JobState] = Agenda(keys.ASKING, floors, RowTally())
    asking.window.begin_refill({})
    asking.window.finish_refill([], read_to=None)
    turns = Turns(asking)
    names = iter(range(1_000_000))

    def join(tenant: str) -> bytes:
        turn = turns.next(tenant, now_ms=1_000)
        turns.take(tenant, turn)
        key = keys.asking_key(turn, tenant, f"{next(names):07}")
        asking.put(key, a_state(tenant, turn), {})
        return key

    return turns, join, asking.drop


def test_tenants_take_turns_and_each_is_served_in_its_order() -> None:
    _, join, _ = a_line()
    joined = [(join(tenant), tenant) for tenant in "aaaabbc"]
    assert "".join(tenant for _, tenant in sorted(joined)) == "abcabaa"
    for name in "abc":
        own = [key for key, tenant in joined if tenant == name]
        assert own == sorted(own)


def test_who_comes_later_begins_with_what_is_asked_now() -> None:
    _, join, leave = a_line()
    waiting = [join("a") for _ in range(10)]
    for key in waiting[:5]:
        leave(key)
    late = join("b")
    assert sorted([*waiting[5:], late]).index(late) == 1


def test_what_a_tenant_had_does_not_count_once_nobody_waits() -> None:
    _, join, leave = a_line()
    for key in [join("a") for _ in range(100)]:
        leave(key)
    joined = [(join(tenant), tenant) for tenant in "bbaa"]
    assert "".join(tenant for _, tenant in sorted(joined)) == "abab"


def test_only_so_many_tenants_are_remembered() -> None:
    turns, join, _ = a_line()
    for number in range(TENANTS_MAX):
        join(f"t{number}")
    join("t0")
    join("late")
    assert repr(turns) == f"Turns({TENANTS_MAX} tenants)"
    one, other = turns.next("t0", now_ms=0), turns.next("t1", now_ms=0)
    assert one == other + 2, "the one that has not asked for longest was forgotten"


# What happens to the job meanwhile


@pytest.mark.parametrize(
    ("how", "is_same_turn"), [("restart", False), ("enqueue anew", False), ("enqueue anew", True)]
)
async def test_an_answer_does_not_count_for_the_next_life_of_a_job(
    how: str, is_same_turn: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_same_turn:  # It does not happen, but nothing would be wrong.
        monkeypatch.setattr(Turns, "next", lambda *args, **kwargs: 1)
    limiter = Limiter()
    limiter.hold()
    async with one_shard(limiter=limiter) as here:
        await here.enqueue(a_job("j", limits=[a_rate(1, unique_key="first")]))
        await until(lambda: limiter.asked == ["first"])
        await here.cancel("j")
        if how == "restart":
            await here.restart("j")
            again = "first"
        else:
            await here.delete("j")
            again = "second"
            await here.enqueue(a_job("j", limits=[a_rate(1, unique_key=again)]))
        limiter.release(1)
        await until(lambda: limiter.asked == ["first", again])
        await turn_loop()
        assert isinstance(here.state("j").pending, Asking)
        limiter.release(1)
        await until(lambda: not asking_rows(here))
        assert await here.lease() == ["j"]
        assert len(limiter.asked) == 2
        assert not caplog.records


async def test_an_answer_counts_when_only_the_tickets_of_the_job_changed_meanwhile() -> None:
    limiter = Limiter()
    limiter.hold()
    async with one_shard(limiter=limiter) as here:
        await here.enqueue(a_job("j", limits=[at_most(1), a_rate(1)]))
        await until(lambda: bool(limiter.asked))
        assert await here.drop_holders() == 1
        limiter.release()
        await until(lambda: not asking_rows(here))
        assert await here.lease() == ["j"]
        assert len(limiter.asked) == 1


async def test_a_job_that_is_leased_by_its_id_meanwhile_runs_once() -> None:
    limiter = Limiter()
    limiter.hold()
    async with one_shard(limiter=limiter) as here:
        await here.enqueue(a_job("j", limits=[a_rate(1)]))
        await until(lambda: bool(limiter.asked))
        await here.lease_one("j")
        limiter.release()
        await turn_loop()
        assert here.status("j") is JobStatus.RUNNING
        assert await here.lease() == []


async def test_an_expedited_check_is_asked_at_once() -> None:
    limiter = Limiter(lambda _: OVER)
    async with one_shard(limiter=limiter) as here:
        await here.enqueue(a_job("j", limits=[a_rate(1, initial_backoff_ms=60_000, max_backoff_ms=60_000)]))
        await until(lambda: isinstance(here.state("j").pending, Checking))
        limiter.say = lambda _: UNDER
        await here.expedite("j")
        await here.settle()
        await until(lambda: len(limiter.asked) == 2)
        await until(lambda: not asking_rows(here))
        assert await here.lease() == ["j"]


async def test_a_crash_between_answer_and_commit_spends_twice_at_most() -> None:
    limiter = Limiter()
    async with one_shard(limiter=limiter) as here:
        limiter.hold()
        await here.enqueue(a_job("j", limits=[a_rate(1)], retry_policy=a_policy(3)))
        await until(lambda: bool(limiter.asked))
        here.storage.faults.plan("write", Fault.FAIL_BEFORE)
        limiter.release()
        await here.shard.wait_closed()
        assert len(limiter.asked) == 1
        await here.crash()
        await until(lambda: not asking_rows(here))
        assert len(limiter.asked) == 2
        assert await here.lease() == ["j"]


async def test_a_crash_after_the_commit_spends_once() -> None:
    limiter = Limiter()
    async with one_shard(limiter=limiter) as here:
        limiter.hold()
        await here.enqueue(a_job("j", limits=[a_rate(1)]))
        await until(lambda: bool(limiter.asked))
        here.storage.faults.plan("write", Fault.FAIL_AFTER)
        limiter.release()
        await here.shard.wait_closed()
        await here.crash()
        assert await here.lease() == ["j"]
        assert len(limiter.asked) == 1


# A limiter that misbehaves


@pytest.mark.parametrize("kind", [ValueError, asyncio.CancelledError, AssertionError])
async def test_whatever_a_limiter_raises_the_job_asks_again_and_the_shard_goes_on(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    limiter = Limiter(raising(kind(SECRET)))
    async with one_shard(limiter=limiter) as here:
        await here.enqueue(a_job("j", limits=[a_rate(1, unique_key=SECRET)]))
        await until(lambda: here.state("j").pending == Checking(here.now_ms + 100, 1))
        await turn_loop()
        assert len(limiter.asked) == 1, "not before its time"
        await here.run(a_job("other"))
        limiter.say = lambda _: UNDER
        await here.wait(100)
        await until(lambda: not asking_rows(here))
        assert await here.lease() == ["j"]
    assert caplog.records
    for record in caplog.records:
        assert SECRET not in f"{record.getMessage()} {vars(record)} {record.exc_text}"


async def test_a_limiter_that_is_down_is_told_of_now_and_then_and_not_for_each_job(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limiter = Limiter(raising(LimiterFailed("down")))
    async with one_shard(limiter=limiter) as here:
        await enqueue_many(here, "j", 300)
        await until(lambda: not asking_rows(here))
        while here.now_ms < VirtualClock().now_ms() + FAILURE_LOG_MS:
            await here.wait(1_000)
            await until(lambda: not asking_rows(here))
    told = [vars(record)["fields"] for record in caplog.records if record.levelno == logging.WARNING]
    assert [fields["reason"] for fields in told] == ["down", "down"]
    assert told[0]["failures"] == 1
    assert told[1]["failures"] > 300


async def test_a_limiter_that_hangs_for_cancelled_jobs_is_asked_about_others_when_it_answers() -> None:
    limiter = Limiter()
    limiter.hold()
    async with one_shard(limiter=limiter) as here:
        await enqueue_many(here, "j", IN_FLIGHT_MAX)
        await until(lambda: limiter.in_flight == IN_FLIGHT_MAX)
        for number in range(IN_FLIGHT_MAX):
            await here.cancel(f"j{number}")
        await here.enqueue(a_job("j", limits=[a_rate(1)]))
        limiter.release(1)
        await until(lambda: len(limiter.asked) == IN_FLIGHT_MAX + 1)
        limiter.release()
        await until(lambda: not asking_rows(here))
        assert await here.lease() == ["j"]


# Damage


def a_state(job_id: str, turn: int) -> JobState:
    return JobState(
        tenant="-",
        job_id=job_id,
        task_group="default",
        priority=50,
        retry_policy=None,
        status=JobStatus.SCHEDULED,
        changed_at_ms=1,
        attempts_ended=0,
        relative_attempt_number=1,
        next_start_ms=1,
        pending=Asking(turn, 0),
        limits=(a_rate(1, unique_key=job_id),),
    )


@pytest.mark.parametrize("job", ["none", "elsewhere"])
async def test_a_row_that_no_job_stands_behind_is_not_asked_about_and_goes_away(job: str) -> None:
    limiter = Limiter()
    async with one_shard(limiter=limiter) as here:
        await here.enqueue(a_job("j", limits=[a_rate(1, unique_key="j")]))
        await until(lambda: not asking_rows(here))
        name = "ghost" if job == "none" else "j"
        await here.shard.close()
        await put_rows(here, {keys.asking_key(1, "-", name): codec.encode(a_state(name, 1))})
        await here.open()
        await until(lambda: not asking_rows(here))
        await turn_loop()
        assert limiter.asked == ["j"]
        assert await here.lease() == ["j"]


async def test_a_job_whose_state_is_damaged_spends_nothing_and_delays_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limiter = Limiter()
    async with one_shard(limiter=limiter) as here:
        limiter.hold()
        await here.enqueue(a_job("damaged", limits=[a_rate(1, unique_key="damaged")]))
        await until(lambda: bool(limiter.asked))
        await here.shard.close()
        limiter.release()
        limiter.asked.clear()
        await put_rows(here, {keys.state_key("-", "damaged"): b"\x01damaged"})
        await here.open()
        await here.shard.enqueue(a_job("j", limits=[a_rate(1, unique_key="j")]))
        await until(lambda: len(asking_rows(here)) == 1)
        await turn_loop()
        assert limiter.asked == ["j"]
        assert [record.getMessage() for record in caplog.records] == [
            "job passed over: its state is damaged"
        ], "it is looked at once"
        [leased] = await here.shard.lease_tasks(worker_id="w", task_group="default", max_tasks=9)
        assert getattr(leased, "job").id == "j"  # noqa: B009  # A refresh has no job.


async def test_a_state_that_asks_where_there_is_no_rate_limit_does_not_stop_the_shard() -> None:
    limiter = Limiter()
    async with one_shard(limiter=limiter) as here:
        await here.shard.close()
        state = msgspec.structs.replace(a_state("odd", 1), limits=())
        await put_rows(here, {keys.state_key("-", "odd"): codec.encode(state)})
        await put_rows(here, {keys.asking_key(1, "-", "odd"): codec.encode(state)})
        await here.open()
        await turn_loop()
        assert limiter.asked == []
        assert here.shard._stop_cause is None
        assert len(asking_rows(here)) == 1, "a person may want to look"
        await here.shard.enqueue(a_job("j"))


async def test_pages_of_damaged_rows_do_not_hide_those_behind_them() -> None:
    limiter = Limiter()
    async with one_shard(limiter=limiter) as here:
        limiter.hold()
        await here.enqueue(a_job("j", limits=[a_rate(1, unique_key="j")]))
        await until(lambda: bool(limiter.asked))
        await here.shard.close()
        await put_rows(here, {keys.asking_key(number, "-", "x"): b"\x01damaged" for number in range(1_500)})
        limiter.release()
        limiter.asked.clear()
        await here.open()
        await until(lambda: limiter.asked == ["j"])


# The end


async def test_nothing_is_left_of_what_was_asked_when_the_shard_closes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limiter = Limiter()
    limiter.hold()
    async with one_shard(limiter=limiter) as here:
        await enqueue_many(here, "j", 10)
        await until(lambda: limiter.in_flight == 10)
        await here.shard.close()
        assert limiter.cancelled == 10
        assert asking_tasks() == []
    assert not caplog.records


@pytest.mark.parametrize("turns_of_loop", range(16))
async def test_nothing_is_asked_by_a_shard_that_closes_while_it_reads(turns_of_loop: int) -> None:
    limiter = Limiter()
    limiter.hold()
    async with one_shard(limiter=limiter) as here:
        await enqueue_many(here, "j", 3)
        await until(lambda: limiter.in_flight == 3)
        await here.shard.close()
        # More pages, so that there is something to read while those three are asked about.
        far = 2 * here.now_ms
        await put_rows(
            here, {keys.asking_key(far + number, "-", "x"): b"\x01damaged" for number in range(3_000)}
        )
        await here.open()
        for _ in range(turns_of_loop):
            await asyncio.sleep(0)
        with started("Asker._ask") as tries:
            await here.shard.close()
            await turn_loop()
        assert tries == []
        assert asking_tasks() == []


async def test_a_shard_whose_store_failed_asks_nothing_more() -> None:
    limiter = Limiter()
    async with one_shard(limiter=limiter) as here:
        limiter.hold()
        await enqueue_many(here, "j", 5)
        await until(lambda: limiter.in_flight == 5)
        here.storage.faults.plan("write", Fault.FAIL_BEFORE)
        with started("Asker._ask") as tries:
            with pytest.raises(ShardClosed):
                await here.enqueue(a_job("j"))
            limiter.release()
            await turn_loop()
        assert tries == []
        assert len(limiter.asked) == 5


async def test_a_store_that_fails_while_questions_are_read_stops_the_shard() -> None:
    limiter = Limiter()
    limiter.hold()
    async with one_shard(limiter=limiter) as here:
        await enqueue_many(here, "j", 5)
        await here.shard.close()
        here.storage.faults.calls.clear()
        here.storage.faults.plan("scan", Fault.FAIL_BEFORE, call=3)  # After leases and floors.
        await here.open()
        assert await here.shard.wait_closed() is not None
        scans = here.storage.faults.calls["scan"]
        await turn_loop()
        assert here.storage.faults.calls["scan"] - scans <= 3, "it does not try for ever"


# With a limiter and without


async def test_jobs_that_waited_for_our_own_buckets_ask_the_limiter_once_there_is_one() -> None:
    async with one_shard() as here:
        await here.enqueue(*(a_job(f"j{n}", limits=[a_rate(1, 1_000)]) for n in range(3)))
        assert await here.lease() == ["j0"]
        assert isinstance(here.state("j1").pending, Throttled)
        here._limiter = limiter = Limiter()
        await here.crash()
        await here.wait(1_000)
        await until(lambda: not asking_rows(here))
        assert await here.lease() == ["j1", "j2"]
        assert len(limiter.asked) == 2


async def test_jobs_that_asked_a_limiter_are_judged_by_our_own_buckets_once_there_is_none() -> None:
    limiter = Limiter()
    limiter.hold()
    async with one_shard(limiter=limiter) as here:
        limits = [a_rate(600, 1_000)]
        for number in range(700):
            await here.enqueue(a_job(f"j{number:03}", limits=limits))
        await until(lambda: limiter.in_flight == IN_FLIGHT_MAX)
        here._limiter = None
        await here.crash()
        await until(lambda: not asking_rows(here))
        assert len(await here.lease(1_000)) == 600
        await here.wait(1_000)
        assert len(await here.lease(1_000)) == 100
