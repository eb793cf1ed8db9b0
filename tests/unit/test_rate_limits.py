"""Rate limits: what a check spends, who waits for how long, and what an external limiter is asked."""

import asyncio

import msgspec
import pytest

from silo.engine import rate
from silo.model.attempt import Failure
from silo.model.counts import ShardTotals
from silo.model.job import Asking, Checking, JobStatus, Pending, Ready, Throttled
from silo.model.limit import NEVER_MS, RateAlgorithm, RateBehavior, RateLimit
from silo.shard.limiter import Answer, LimiterFailed
from tests.builders import a_job, a_policy, a_rate, at_most, until
from tests.one_shard import BROKEN, OneShard, one_shard

TOKENS, LEAKY = RateAlgorithm.TOKEN_BUCKET, RateAlgorithm.LEAKY_BUCKET
UNDER = Answer(is_under=True, reset_at_ms=0)
DOWN = LimiterFailed("no answer")
ATTEMPTS = a_policy(9, initial_interval_ms=0)
DAY_MS = 86_400_000


class FakeLimiter:
    """Answers as it is told, one answer for each check, and then that all is well."""

    def __init__(self, *answers: Answer | LimiterFailed) -> None:
        self.answers = list(answers)
        self.asked: list[RateLimit] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def check(self, limit: RateLimit) -> Answer:
        self.asked.append(limit)
        await self.go_on.wait()
        answer = self.answers.pop(0) if self.answers else UNDER
        if isinstance(answer, LimiterFailed):
            raise answer
        return answer


def over(reset_at_ms: int = 0) -> Answer:
    return Answer(is_under=False, reset_at_ms=reset_at_ms)


def pending(here: OneShard, job_id: str = "j") -> Pending:
    found = here.state(job_id).pending
    assert found is not None
    return found


def used(here: OneShard, name: str = "rate", *, tenant: str = "-") -> int:
    bucket = here.bucket(name, tenant=tenant)
    return 0 if bucket is None else bucket.used


# Our own buckets


@pytest.mark.spec("RAT-14")
async def test_five_jobs_of_a_limit_of_five_run_by_one_poll_and_the_sixth_waits() -> None:
    async with one_shard() as here:
        await here.enqueue(*(a_job(f"j{number}", limits=[a_rate(5)]) for number in range(6)))
        assert await here.lease(5) == [f"j{number}" for number in range(5)]
        assert await here.lease() == []
        assert isinstance(pending(here, "j5"), Throttled)


@pytest.mark.spec("RAT-8")
async def test_without_a_limiter_the_shard_judges_by_buckets_of_its_own() -> None:
    """There nobody passes until a limiter is configured."""
    async with one_shard() as here:
        await here.run(a_job("j", limits=[a_rate(1)]), a_job("without"))


@pytest.mark.spec("RAT-3")
async def test_a_job_under_its_limit_goes_on_with_its_start_and_its_tickets() -> None:
    async with one_shard() as here:
        await here.run(a_job("first", limits=[a_rate(1)]))
        await here.enqueue(a_job("j", limits=[at_most(1, "a"), a_rate(1), at_most(1, "b")]))
        before = here.state("j")
        await here.wait(1_000)
        after = here.state("j")
        assert isinstance(after.pending, Ready)
        assert after.held[:1] == before.held
        assert [holder.key for holder in after.held] == ["a", "b"]
        assert (after.next_start_ms, after.changed_at_ms) == (before.next_start_ms, before.changed_at_ms)
        assert after.next_attempt_number == before.next_attempt_number
        assert await here.lease() == ["j"]


@pytest.mark.spec("RAT-2")
@pytest.mark.parametrize("how", ["cancelled", "deleted", "leased by its id"])
async def test_a_job_that_is_not_due_any_more_is_not_checked(how: str) -> None:
    """Here it leaves with the step that ends its wait (there when it is due)."""
    async with one_shard() as here:
        await here.enqueue(a_job("j", start_at_ms=here.now_ms + 500, limits=[at_most(1), a_rate(5)]))
        if how == "leased by its id":
            await here.lease_one("j")
        else:
            await here.cancel("j")
        if how == "deleted":
            await here.delete("j")
        await here.wait(500)
        assert here.bucket() is None
        assert here.holders() == set()


@pytest.mark.spec("RAT-2")
async def test_a_job_that_is_cancelled_in_the_line_of_a_bucket_spends_nothing_and_holds_nothing() -> None:
    async with one_shard() as here:
        await here.run(a_job("first", limits=[a_rate(1)]))
        await here.enqueue(a_job("gone", limits=[at_most(1), a_rate(1)]), a_job("next", limits=[a_rate(1)]))
        await here.cancel("gone")
        assert here.holders() == set()
        await here.wait(1_000)
        assert await here.lease() == ["next"]
        assert used(here) == 1


@pytest.mark.spec("RAT-4")
async def test_a_job_without_a_bound_on_its_checks_waits_until_the_very_refill() -> None:
    """In the line of its bucket, in order (there it asks again and again, at least each `max_backoff`)."""
    async with one_shard() as here:
        limit = a_rate(2, 10_000, initial_backoff_ms=1, max_backoff_ms=5)
        await here.run(*(a_job(f"first{number}", limits=[limit]) for number in range(2)))
        await here.wait(100)
        await here.enqueue(a_job("later", limits=[limit]), a_job("a", priority=0, limits=[limit]))
        await here.enqueue(a_job("last", priority=99, limits=[limit]))
        await here.wait(9_899)
        assert await here.lease() == []
        await here.wait(1)
        assert sorted(await here.lease()) == ["a", "later"]
        await here.wait(10_000)
        assert await here.lease() == ["last"]


@pytest.mark.spec("RAT-4")
async def test_a_check_that_is_counted_is_repeated_when_the_bucket_resets_if_that_is_soon_enough() -> None:
    async with one_shard() as here:
        limit = a_rate(1, 10_000, max_retries=9, max_backoff_ms=10_001)
        await here.run(a_job("first", limits=[limit]))
        await here.enqueue(a_job("j", limits=[at_most(1), limit]))
        assert pending(here) == Throttled(1, here.now_ms + 10_000)
        assert here.held("j") == ["k"]


@pytest.mark.spec("RAT-4")
async def test_else_a_counted_check_is_repeated_after_a_wait_that_grows() -> None:
    async with one_shard() as here:
        limit = a_rate(
            1, 60_000, max_retries=9, initial_backoff_ms=100, backoff_multiplier=2.5, max_backoff_ms=1_000
        )
        await here.run(a_job("first", limits=[limit]))
        await here.enqueue(a_job("j", limits=[at_most(1), limit]))
        for checks, wait_ms in enumerate((100, 250, 625, 1_000, 1_000), start=1):
            assert pending(here) == Throttled(checks, here.now_ms + wait_ms)
            await here.wait(wait_ms)
        assert here.held("j") == ["k"]
        assert used(here) == 1


@pytest.mark.spec("RAT-4")
async def test_who_counts_its_checks_has_its_turn_at_the_refill_too() -> None:
    async with one_shard() as here:
        limit = a_rate(1, 1_000, max_retries=9, initial_backoff_ms=700, max_backoff_ms=900)
        await here.run(a_job("first", limits=[limit]))
        await here.enqueue(a_job("j", limits=[limit]))
        await here.wait(700)
        assert pending(here) == Throttled(2, here.now_ms + 300)  # The refill is near now.
        await here.wait(300)
        assert await here.lease() == ["j"]


@pytest.mark.spec("RAT-5")
async def test_a_job_fails_when_its_last_check_is_over_the_limit_too() -> None:
    """With an attempt that says why (there it hangs for ever)."""
    async with one_shard() as here:
        limit = a_rate(
            1, 60_000, max_retries=2, initial_backoff_ms=100, backoff_multiplier=1.0, max_backoff_ms=100
        )
        await here.run(a_job("first", limits=[limit]))
        await here.enqueue(a_job("j", limits=[at_most(1), limit], retry_policy=ATTEMPTS))
        await here.enqueue(a_job("next", limits=[at_most(1)]))
        await here.wait(100)
        assert pending(here) == Throttled(2, here.now_ms + 100)  # Checked twice; the third is the last.
        await here.wait(100)
        assert here.status("j") is JobStatus.FAILED
        assert here.holders() == {"next"}
        assert here.shard.counts == ShardTotals(3, 1)
        [attempt] = here.attempts("j")
        text = "over rate limit 'rate' in each of 3 checks"
        assert attempt.outcome == Failure("RATE_LIMIT_EXCEEDED", msgspec.msgpack.encode(text))


@pytest.mark.spec("RAT-4", "RAT-5")
async def test_a_request_that_never_fits_holds_up_nobody() -> None:
    async with one_shard() as here:
        await here.enqueue(a_job("never", limits=[a_rate(1, hits=2)]))
        await here.enqueue(a_job("counted", limits=[a_rate(1, hits=2, max_retries=1, initial_backoff_ms=50)]))
        assert pending(here, "never") == Checking(NEVER_MS, 1)
        await here.run(a_job("j", limits=[a_rate(1)]))
        await here.wait(50)
        assert here.status("counted") is JobStatus.FAILED
        await here.cancel("never")


@pytest.mark.spec("RAT-10")
async def test_each_attempt_spends_its_hits_anew() -> None:
    async with one_shard() as here:
        await here.run(a_job("j", limits=[a_rate(9)], retry_policy=a_policy(1, initial_interval_ms=0)))
        assert used(here) == 1
        await here.report("j", BROKEN)
        assert used(here) == 2
        await here.lease()
        await here.report("j", BROKEN)
        await here.restart("j")
        assert used(here) == 3
        assert await here.lease() == ["j"]


@pytest.mark.spec("RAT-11")
async def test_a_later_limit_is_asked_when_the_earlier_passed_and_no_limit_is_asked_twice() -> None:
    async with one_shard() as here:
        a, b, c = (a_rate(1, duration, name=name) for name, duration in (("a", 100), ("b", 200), ("c", 300)))
        await here.run(*(a_job(limit.name, limits=[limit]) for limit in (a, b, c)))
        await here.enqueue(a_job("j", limits=[a, b, c]))
        assert [used(here, name) for name in "abc"] == [1, 1, 1]
        spent = []
        for _ in range(3):
            await here.wait(100)
            spent.append("".join(name for name in "abc" if used(here, name)))
            assert (await here.lease() == ["j"]) is (len(spent) == 3)
        # Each passes when its window is over and begins the next. That of `a` ends at 200; no other begins.
        assert spent == ["abc", "bc", "bc"]


@pytest.mark.spec("RAT-15")
async def test_a_bucket_is_the_tenants_and_known_by_both_names() -> None:
    async with one_shard() as here:
        await here.run(
            a_job("a", limits=[a_rate(1)]),
            a_job("b", limits=[a_rate(1, name="other")]),
            a_job("c", limits=[a_rate(1, unique_key="other")]),
            a_job("d", tenant="t", limits=[a_rate(1)]),
        )
        await here.enqueue(a_job("e", limits=[a_rate(1)]), a_job("f", tenant="t", limits=[a_rate(1)]))
        assert await here.lease() == []


@pytest.mark.spec("RAT-15")
async def test_no_hits_ask_whether_anything_is_left_and_spend_nothing() -> None:
    async with one_shard() as here:
        await here.run(*(a_job(f"asks{number}", limits=[a_rate(1, hits=0)]) for number in range(3)))
        assert used(here) == 0
        await here.run(a_job("spends", limits=[a_rate(1)]))
        await here.enqueue(a_job("asks", limits=[a_rate(1, hits=0)]))
        assert await here.lease() == []
        await here.wait(1_000)
        assert await here.lease() == ["asks"]


@pytest.mark.spec("RAT-15")
def test_a_verdict_says_whether_the_hits_fit_what_was_spent_and_when_they_fit() -> None:
    limit = a_rate(5, 1_000, hits=3)
    first = rate.check(None, limit, tenant="-", now_ms=7)
    assert (first.is_under, first.bucket.used, first.bucket.limit) == (True, 3, 5)
    second = rate.check(first.bucket, limit, tenant="-", now_ms=8)
    assert (second.is_under, second.bucket.used, second.fits_at_ms) == (False, 3, 1_007)


@pytest.mark.spec("RAT-16")
async def test_a_token_bucket_is_full_again_when_its_window_is_over() -> None:
    async with one_shard() as here:
        await here.enqueue(*(a_job(f"j{number}", limits=[a_rate(2, 1_000)]) for number in range(5)))
        started = {0: await here.lease()}
        for at_ms in (500, 999, 1_000, 2_000):
            await here.wait(at_ms - max(started))
            started[at_ms] = await here.lease()
        assert started == {0: ["j0", "j1"], 500: [], 999: [], 1_000: ["j2", "j3"], 2_000: ["j4"]}


@pytest.mark.spec("RAT-16")
async def test_a_leaky_bucket_drains_evenly() -> None:
    async with one_shard() as here:
        limit = a_rate(2, 1_000, algorithm=LEAKY)
        await here.enqueue(*(a_job(f"j{number}", limits=[limit]) for number in range(5)))
        started = {0: await here.lease()}
        for at_ms in (499, 500, 999, 1_000, 1_500):
            await here.wait(at_ms - max(started))
            started[at_ms] = await here.lease()
        expected = {0: ["j0", "j1"], 499: [], 500: ["j2"], 999: [], 1_000: ["j3"], 1_500: ["j4"]}
        assert started == expected


@pytest.mark.spec("RAT-16")
async def test_nobody_overtakes_who_waits_for_more_hits() -> None:
    async with one_shard() as here:
        await here.run(a_job("first", limits=[a_rate(3, hits=2)]))
        await here.enqueue(a_job("large", limits=[a_rate(3, hits=3)]))
        await here.enqueue(a_job("small", limits=[a_rate(3, hits=1)]))  # One hit is left.
        assert await here.lease() == []
        await here.wait(1_000)
        assert await here.lease() == ["large"]
        await here.wait(1_000)
        assert await here.lease() == ["small"]


@pytest.mark.spec("RAT-17")
@pytest.mark.parametrize("bit", [0, 1, 2, 3, 32])
def test_behavior_that_says_how_servers_share_buckets_means_nothing_here(bit: int) -> None:
    plain = rate.check(None, a_rate(1), tenant="-", now_ms=5)
    assert rate.check(None, a_rate(1, behavior=bit), tenant="-", now_ms=5) == plain


@pytest.mark.spec("RAT-17")
@pytest.mark.parametrize("algorithm", [TOKENS, LEAKY])
def test_resetting_forgets_what_was_spent(algorithm: RateAlgorithm) -> None:
    spent = rate.check(None, a_rate(3, hits=3, algorithm=algorithm), tenant="-", now_ms=0).bucket
    reset = a_rate(3, algorithm=algorithm, behavior=RateBehavior.RESET_REMAINING)
    verdict = rate.check(spent, reset, tenant="-", now_ms=0)
    assert (verdict.is_under, verdict.bucket.used) == (True, 1)


@pytest.mark.spec("RAT-17")
@pytest.mark.parametrize("algorithm", [TOKENS, LEAKY])
def test_draining_takes_what_is_left_from_a_request_that_does_not_fit(algorithm: RateAlgorithm) -> None:
    spent = rate.check(None, a_rate(3, algorithm=algorithm), tenant="-", now_ms=0).bucket
    drain = a_rate(3, hits=3, algorithm=algorithm, behavior=RateBehavior.DRAIN_OVER_LIMIT)
    verdict = rate.check(spent, drain, tenant="-", now_ms=0)
    assert (verdict.is_under, verdict.bucket.used) == (False, 3)
    assert not rate.check(verdict.bucket, a_rate(3, algorithm=algorithm), tenant="-", now_ms=0).is_under


@pytest.mark.spec("RAT-17")
async def test_a_calendar_window_ends_with_the_day_and_not_a_day_later() -> None:
    async with one_shard() as here:
        calendar_day = a_rate(1, 2, behavior=RateBehavior.DURATION_IS_GREGORIAN)
        await here.run(a_job("today", limits=[calendar_day]))
        await here.enqueue(a_job("tomorrow", limits=[calendar_day]))
        await here.wait(DAY_MS - here.now_ms % DAY_MS - 1)
        assert await here.lease() == []
        await here.wait(1)
        assert await here.lease() == ["tomorrow"]


# An external limiter


@pytest.mark.spec("RAT-1")
async def test_the_limiter_is_asked_once_with_all_that_the_limit_says_when_the_job_is_due() -> None:
    limiter = FakeLimiter()
    async with one_shard(limiter=limiter) as here:
        limit = a_rate(7, 8, name="n", unique_key="u", hits=3, algorithm=LEAKY, behavior=17)
        await here.enqueue(a_job("j", start_at_ms=here.now_ms + 50, limits=[limit]))
        await here.settle()
        assert limiter.asked == []
        await here.wait(50)
        assert limiter.asked == [limit]
        assert await here.lease() == ["j"]
        await here.wait(60_000)
        assert limiter.asked == [limit]


@pytest.mark.spec("RAT-2")
@pytest.mark.parametrize("how", ["cancel", "delete", "import"])
async def test_an_answer_for_a_job_that_has_ended_meanwhile_counts_for_nothing(how: str) -> None:
    limiter = FakeLimiter()
    limiter.go_on.clear()
    async with one_shard(limiter=limiter) as here:
        await here.enqueue(a_job("j", limits=[at_most(1), a_rate(1)]))
        await until(lambda: bool(limiter.asked))
        assert isinstance(pending(here), Asking)
        if how == "import":
            await here.import_job("j", BROKEN)
        else:
            await here.cancel("j")
        if how == "delete":
            await here.delete("j")
        assert here.holders() == set()
        limiter.go_on.set()
        await here.settle()
        assert await here.lease() == []
        assert not here.family(b"q", b"x", b"h")


@pytest.mark.spec("RAT-3")
async def test_a_job_that_passes_outside_goes_on_to_its_next_limits() -> None:
    async with one_shard(limiter=FakeLimiter()) as here:
        start_at_ms = here.now_ms - 5_000
        limits = [at_most(1, "a"), a_rate(1), at_most(1, "b"), a_rate(1)]
        await here.enqueue(a_job("j", start_at_ms=start_at_ms, limits=limits))
        await here.settle()
        assert here.held("j") == ["a", "b"]
        assert here.state("j").next_start_ms == start_at_ms
        assert await here.lease() == ["j"]


@pytest.mark.spec("RAT-4")
@pytest.mark.parametrize(
    ("reset_ms", "waits_ms"),
    [
        (0, (100, 300, 500)),  # It does not say.
        (-1, (100, 300, 500)),
        (1, (1, 1, 1)),
        (499, (499, 499, 499)),
        (500, (100, 300, 500)),  # As far as the longest wait: too far.
    ],
)
async def test_over_the_limit_it_is_asked_again_at_the_reset_or_after_a_wait_that_grows(
    reset_ms: int, waits_ms: tuple[int, ...]
) -> None:
    limiter = FakeLimiter()
    async with one_shard(limiter=limiter) as here:
        policy = {"initial_backoff_ms": 100, "backoff_multiplier": 3.0, "max_backoff_ms": 500}
        await here.enqueue(a_job("j", start_at_ms=here.now_ms + 1, limits=[at_most(1), a_rate(1, **policy)]))
        limiter.answers.append(over(here.now_ms + 1 + reset_ms if reset_ms else 0))
        await here.wait(1)
        for checks, wait_ms in enumerate(waits_ms, start=1):
            assert pending(here) == Checking(here.now_ms + wait_ms, checks)
            assert here.held("j") == ["k"]
            limiter.answers.append(over(here.now_ms + wait_ms + reset_ms if reset_ms else 0))
            await here.wait(wait_ms)
        assert len(limiter.asked) == 4


@pytest.mark.spec("RAT-5")
async def test_the_limiter_is_asked_once_more_than_there_are_retries_and_then_the_job_fails() -> None:
    limiter = FakeLimiter(over(), over(), over())
    async with one_shard(limiter=limiter) as here:
        await here.enqueue(
            a_job("j", limits=[at_most(1), a_rate(1, max_retries=2)]), a_job("next", limits=[at_most(1)])
        )
        await here.settle()
        await here.wait(100)
        assert here.holders() == {"j"}
        await here.wait(200)
        assert here.status("j") is JobStatus.FAILED
        assert here.holders() == {"next"}
        assert len(limiter.asked) == 3
        [attempt] = here.attempts("j")
        assert isinstance(attempt.outcome, Failure)
        assert attempt.outcome.code == "RATE_LIMIT_EXCEEDED"


@pytest.mark.spec("RAT-7")
async def test_a_limiter_that_fails_is_asked_again_however_often_and_lets_nobody_pass() -> None:
    limiter = FakeLimiter(*[DOWN] * 7)
    async with one_shard(limiter=limiter) as here:
        await here.enqueue(a_job("j", limits=[at_most(1), a_rate(1, max_retries=2, initial_backoff_ms=70)]))
        await here.settle()
        for failures in range(1, 8):
            assert pending(here) == Checking(here.now_ms + 70, failures)
            assert await here.lease() == []
            await here.wait(70)
        assert await here.lease() == ["j"]
        assert here.held("j") == ["k"]


@pytest.mark.spec("RAT-7")
async def test_a_failure_of_the_limiter_counts_when_it_is_over_the_limit_later() -> None:
    limiter = FakeLimiter(DOWN, DOWN, over())
    async with one_shard(limiter=limiter) as here:
        await here.enqueue(a_job("j", limits=[a_rate(1, max_retries=2)]))
        await here.settle()
        await here.wait(100)
        assert here.status("j") is JobStatus.SCHEDULED
        await here.wait(100)
        assert here.status("j") is JobStatus.FAILED


@pytest.mark.spec("RAT-8")
async def test_jobs_without_rate_limits_do_not_notice_a_limiter_that_fails_or_hangs() -> None:
    limiter = FakeLimiter(DOWN)
    limiter.go_on.clear()
    async with one_shard(limiter=limiter) as here:
        await here.enqueue(a_job("asks", limits=[a_rate(1)]))
        await until(lambda: bool(limiter.asked))
        await here.run(a_job("j"), a_job("limited", limits=[at_most(1)]))
        limiter.go_on.set()
        await here.settle()
        await here.run(a_job("k"))


@pytest.mark.spec("RAT-10")
async def test_each_attempt_asks_the_limiter_again() -> None:
    limiter = FakeLimiter()
    async with one_shard(limiter=limiter) as here:
        await here.enqueue(a_job("j", limits=[a_rate(1)], retry_policy=ATTEMPTS))
        for attempts in range(1, 4):
            await here.settle()
            assert await here.lease() == ["j"]
            assert len(limiter.asked) == attempts
            await here.report("j", BROKEN)


@pytest.mark.spec("RAT-11")
async def test_limits_are_asked_in_their_order_and_not_again_once_they_passed() -> None:
    limiter = FakeLimiter(UNDER, over(), DOWN, UNDER)
    async with one_shard(limiter=limiter) as here:
        await here.enqueue(a_job("j", limits=[a_rate(1, name=name) for name in "abc"]))
        await here.settle()
        assert [limit.name for limit in limiter.asked] == ["a", "b"]
        await here.wait(100)
        await here.wait(100)
        assert [limit.name for limit in limiter.asked] == ["a", "b", "b", "b", "c"]
        assert await here.lease() == ["j"]


async def test_a_question_that_a_crash_interrupted_is_asked_again() -> None:
    limiter = FakeLimiter()
    limiter.go_on.clear()
    async with one_shard(limiter=limiter) as here:
        await here.enqueue(a_job("j", limits=[a_rate(1)]))
        await until(lambda: bool(limiter.asked))
        await here.crash()
        limiter.go_on.set()
        await here.settle()
        assert await here.lease() == ["j"]
