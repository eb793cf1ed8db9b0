"""The limit chain: the one rule by which an attempt passes its limits.

Limits are passed in the order that the caller gave, from the first one for each new attempt.
Adjacent limits on tickets are one *run*: a job takes all tickets of a run at once or none, so
it never sits on a ticket that others could use, and no two jobs can hold what the other waits
for. It waits in one queue only, the last of its run that is full.

Such a job could be passed over for ever: whenever it is its turn in one queue the other is
full. So after `MOVES_MAX` turns of that kind it takes tickets one by one and keeps them, in
the order of their keys: whoever waits while holding waits for a larger key, so there is no
circle among these either.

Nobody overtakes: a ticket or a hit goes to a job only if no job ahead of it (see `Rank`) waits
for it and could have it.
"""

from collections.abc import Callable
from typing import Protocol

import msgspec

from silo.engine import floating, rate
from silo.engine.schedule import backoff_ms, saturating_add, virtual_deadline_ms
from silo.model.attempt import Attempt, Failure
from silo.model.change import Change
from silo.model.floating import FloatingState
from silo.model.job import (
    Asking,
    Checking,
    Delayed,
    JobState,
    JobStatus,
    Pending,
    Rank,
    Ready,
    Throttled,
    Waiting,
)
from silo.model.limit import (
    NEVER_MS,
    Bucket,
    FloatingLimit,
    Holder,
    RateBehavior,
    RateLimit,
    TicketLimit,
)

RATE_LIMIT_EXCEEDED = "RATE_LIMIT_EXCEEDED"
MOVES_MAX = 8
RECHECK_MS_MIN = 10  # Whatever a policy says: a job must not ask again and again without a pause.


class LimitsView(Protocol):
    """The shard's limits as they stand, for a decision to look at."""

    def has_ticket(self, tenant: str, key: str, *, capacity: int, rank: Rank) -> bool:
        """Whether fewer than `capacity` tickets are held, and nobody ahead of `rank` could take one."""

    def line_for(self, tenant: str, key: str, wanted: int) -> int:
        """The line to wait in for the maximum `wanted`; another one if the queue has too many."""

    def floating(self, tenant: str, key: str) -> FloatingState | None: ...

    def bucket(self, tenant: str, name: str, unique_key: str) -> Bucket | None: ...

    def is_next(self, tenant: str, name: str, unique_key: str, *, rank: Rank) -> bool:
        """Whether nobody ahead of `rank` waits in the bucket's line."""

    def asking_turn(self, tenant: str, *, now_ms: int) -> int:
        """When it is the turn of another job of the tenant to ask an external limiter."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the chain."""

    priority_step_ms: int
    asks_outside: bool = False  # Rate limits are judged by an external limiter.


def advance(
    state: JobState,
    view: LimitsView,
    *,
    now_ms: int,
    rules: Rules,
    new_task_id: Callable[[], str],
) -> Change:
    """Take a due job as far through its limits as it gets: to its queue, a place to wait, or failure."""
    assert state.status is JobStatus.SCHEDULED, "only pending work passes limits"
    step = _Step(state, view, now_ms=now_ms, asks_outside=rules.asks_outside)
    pending = step.walk()
    if pending is None:
        return _exhausted(state, step, now_ms=now_ms, task_id=new_task_id())
    if isinstance(pending, Ready):
        assert state.next_start_ms is not None, "pending work has a start"
        pending = Ready(virtual_deadline_ms(state.next_start_ms, state.priority, rules.priority_step_ms))
    after = msgspec.structs.replace(
        state, pending=pending, passed=step.passed, held=(*state.held, *step.obtained)
    )
    return Change(
        before=state,
        after=after,
        buckets=tuple(step.buckets.values()),
        floating=tuple(step.new_floating.values()),
    )


def answered(
    state: JobState,
    *,
    is_under: bool,
    reset_at_ms: int,
    now_ms: int,
    new_task_id: Callable[[], str],
) -> Change:
    """What an external limiter said of the limit that the job is at. If it passes, the rest comes next."""
    assert isinstance(state.pending, Asking), "only asked for these"
    if is_under:
        after = msgspec.structs.replace(state, pending=Delayed(now_ms), passed=state.passed + 1)
        return Change(before=state, after=after)
    checks = state.pending.checks
    if _is_exhausted(state.rate_limit, checks):
        return _exhausted(state, None, now_ms=now_ms, task_id=new_task_id())
    due_ms = _recheck_at_ms(state.rate_limit, checks, reset_at_ms=reset_at_ms, now_ms=now_ms)
    return Change(before=state, after=msgspec.structs.replace(state, pending=Checking(due_ms, checks + 1)))


def not_answered(state: JobState, *, now_ms: int) -> Change:
    """The external limiter failed: ask it again later, however often that happens."""
    assert isinstance(state.pending, Asking), "only asked for these"
    wait_ms = max(RECHECK_MS_MIN, state.rate_limit.retry_policy.initial_backoff_ms)
    pending = Checking(saturating_add(now_ms, wait_ms), state.pending.checks + 1)
    return Change(before=state, after=msgspec.structs.replace(state, pending=pending))


class _Step:
    """One walk along the chain, with what it obtained and spent on the way."""

    def __init__(self, state: JobState, view: LimitsView, *, now_ms: int, asks_outside: bool) -> None:
        self._state = state
        self._view = view
        self._now_ms = now_ms
        self._asks_outside = asks_outside
        self.passed = state.passed
        self.obtained: list[Holder] = []
        self.buckets: dict[tuple[str, str], Bucket] = {}
        self.new_floating: dict[str, FloatingState] = {}

    def walk(self) -> Pending | None:
        """Where the job waits from now on; Ready when it has passed all, None if it is out of tries."""
        limits = self._state.limits
        while self.passed < len(limits):
            limit = limits[self.passed]
            if isinstance(limit, RateLimit):
                is_stopped, pending = self._check(limit)
            else:
                pending = self._take_tickets()
                is_stopped = pending is not None
            if is_stopped:
                return pending
        return Ready(0)

    def _take_tickets(self) -> Waiting | None:
        """All tickets of the run that begins here, or else where to wait for them."""
        held = {holder.key for holder in (*self._state.held, *self.obtained)}
        run: dict[str, TicketLimit] = {}
        end = self.passed
        for limit in self._state.limits[self.passed :]:
            if isinstance(limit, RateLimit):
                break
            end += 1
            if limit.key not in held:
                run.setdefault(limit.key, limit)  # A key that is repeated is satisfied once.
        moves = self._moves()
        if moves >= MOVES_MAX:
            return self._take_in_key_order(run, end, moves)
        blocker: TicketLimit | None = None
        for limit in run.values():
            if not self._has_ticket(limit):
                blocker = limit
        if blocker is not None:
            return self._waiting(blocker, moves + self._is_turn)
        for key in run:
            self._take(key)
        self.passed = end
        return None

    def _take_in_key_order(self, run: dict[str, TicketLimit], end: int, moves: int) -> Waiting | None:
        for key in sorted(run):
            if not self._has_ticket(run[key]):
                return self._waiting(run[key], moves)
            self._take(key)
        self.passed = end
        return None

    def _waiting(self, limit: TicketLimit, moves: int) -> Waiting:
        return Waiting(limit.key, self._view.line_for(self._state.tenant, limit.key, limit.line), moves)

    @property
    def _is_turn(self) -> bool:
        return isinstance(self._state.pending, Waiting) and self.passed == self._state.passed

    def _moves(self) -> int:
        return self._state.pending.moves if self._is_turn and isinstance(self._state.pending, Waiting) else 0

    def _take(self, key: str) -> None:
        self.obtained.append(Holder(key, self._now_ms))

    def _has_ticket(self, limit: TicketLimit) -> bool:
        tenant = self._state.tenant
        if isinstance(limit, FloatingLimit):
            known = self._view.floating(tenant, limit.key) or self.new_floating.get(limit.key)
            if known is None:
                known = self.new_floating[limit.key] = floating.created(limit, tenant=tenant)
            capacity = known.max_concurrency
        else:
            capacity = limit.max_concurrency
        return self._view.has_ticket(tenant, limit.key, capacity=capacity, rank=self._state.rank)

    def _check(self, limit: RateLimit) -> tuple[bool, Pending | None]:
        """Whether the walk ends at this limit, and where the job waits then; None if it is out of tries."""
        checks = self._checks()
        if self._asks_outside:
            return True, Asking(self._view.asking_turn(self._state.tenant, now_ms=self._now_ms), checks)
        tenant, name = self._state.tenant, (limit.name, limit.unique_key)
        bucket = self.buckets.get(name) or self._view.bucket(tenant, *name)
        can_pass = rate.can_ever_pass(limit)
        is_next = not can_pass or self._view.is_next(tenant, *name, rank=self._state.rank)
        verdict = rate.check(bucket, limit if is_next else _asked(limit), tenant=tenant, now_ms=self._now_ms)
        self.buckets[name] = verdict.bucket
        if is_next and verdict.is_under:
            self.passed += 1
            return False, None
        if _is_exhausted(limit, checks):
            return True, None
        if not can_pass and not limit.retry_policy.max_retries:
            return True, Checking(NEVER_MS, checks + 1)
        due_ms = _recheck_at_ms(limit, checks, reset_at_ms=verdict.fits_at_ms, now_ms=self._now_ms)
        if not can_pass:  # In the line it would keep all others from their hits.
            return True, Checking(due_ms, checks + 1)
        return True, Throttled(checks + 1, due_ms if limit.retry_policy.max_retries else None)

    def _checks(self) -> int:
        """How often the limit that the walk is at was asked before, in vain."""
        match self._state.pending:
            case Throttled(checks=checks) | Checking(checks=checks) | Asking(checks=checks):
                return checks if self.passed == self._state.passed else 0
        return 0


def _asked(limit: RateLimit) -> RateLimit:
    """The same limit without hits, to learn when its bucket has room."""
    return msgspec.structs.replace(limit, hits=0, behavior=limit.behavior & ~RateBehavior.RESET_REMAINING)


def _is_exhausted(limit: RateLimit, checks: int) -> bool:
    most = limit.retry_policy.max_retries
    return most > 0 and checks >= most


def _recheck_at_ms(limit: RateLimit, checks: int, *, reset_at_ms: int, now_ms: int) -> int:
    """When the bucket resets if that is soon enough; else min(round(initial × multiplier^checks), max)."""
    policy = limit.retry_policy
    if now_ms < reset_at_ms < now_ms + policy.max_backoff_ms:
        return reset_at_ms
    wait_ms = min(
        backoff_ms(policy.initial_backoff_ms, policy.backoff_multiplier, checks), policy.max_backoff_ms
    )
    return saturating_add(now_ms, max(RECHECK_MS_MIN, wait_ms))


def _exhausted(state: JobState, step: _Step | None, *, now_ms: int, task_id: str) -> Change:
    """The job ends as Failed. An attempt that never ran says why."""
    limit = state.limits[state.passed if step is None else step.passed]
    assert isinstance(limit, RateLimit), "only rate limits run out of tries"
    tries = limit.retry_policy.max_retries + 1
    text = f"over rate limit '{limit.name}' in each of {tries} checks"
    attempt = Attempt(
        attempt_number=state.next_attempt_number,
        relative_attempt_number=state.relative_attempt_number,
        task_id=task_id,
        worker_id="",
        started_at_ms=now_ms,
        finished_at_ms=now_ms,
        outcome=Failure(RATE_LIMIT_EXCEEDED, msgspec.msgpack.encode(text)),
    )
    after = msgspec.structs.replace(
        state,
        status=JobStatus.FAILED,
        changed_at_ms=now_ms,
        attempts_ended=state.attempts_ended + 1,
        next_start_ms=None,
        pending=None,
        passed=0,
        held=(),
    )
    return Change(
        before=state,
        after=after,
        attempts=(attempt,),
        buckets=() if step is None else tuple(step.buckets.values()),
        floating=() if step is None else tuple(step.new_floating.values()),
    )
