"""One step of a shard: a decision, and all that follows from it at once.

A ticket that comes free goes to whoever is next in line, and a job that becomes due passes the
limits that it can, in the same step and so in the same commit as what caused it. A step is
synchronous; it needs in memory what it looks at. Where something is missing, or where there is
more to do than one step should, it leaves an *alarm*, a row that says when to go on, and
the timekeeper does, after loading what is missing.

Between steps, therefore (SETTLED): a queue or bucket with a free ticket or hit for someone in
its line has an alarm that is due. It survives a crash like everything else.
"""

from collections.abc import Callable

import msgspec

from silo.clock import Clock
from silo.engine import floating, leasing, limit_chain, rate
from silo.engine.limit_chain import Rules
from silo.engine.retention import Retention, with_deadline
from silo.model.change import Change
from silo.model.floating import FloatingState
from silo.model.job import Delayed, JobState, Waiting
from silo.shard.limiter import Answer
from silo.shard.limits import BucketName, QueueName
from silo.shard.state import ShardState

REFRESH_PAUSE_MS = 1_000  # Between a refresh and the next one that only those who wait already ask for.
STEP_JOBS_MAX = 64  # Jobs from lines that one step looks at; an alarm goes on with the others.


class Steps:
    """Takes the steps of one shard."""

    def __init__(
        self,
        state: ShardState,
        *,
        clock: Clock,
        rules: Rules,
        retention: Retention,
        new_id: Callable[[], str],
    ) -> None:
        self._state = state
        self._limits = state.limits
        self._clock = clock
        self._rules = rules
        self._retention = retention
        self._keeps_all = retention.is_off
        self._new_id = new_id
        self._jobs_left = STEP_JOBS_MAX

    def take(self, change: Change) -> Change:
        """Make a decision true, with all that follows; the job's whole step.

        What the job's limits may look at must be in memory (`Limits.has_all`).
        """
        if not self._keeps_all:
            change = with_deadline(change, self._retention, now_ms=self._clock.now_ms())
        if not change.subject.limits:
            self._state.apply(change)
            return change
        self._jobs_left = STEP_JOBS_MAX
        before, after = change.before, change.after
        if after is None or not self._is_due(after):
            self._state.apply(change)
        elif before is None or before.status.is_terminal:
            # Nothing comes free by it, so nobody goes first.
            change = self._merged(change, self._advanced(after))
            self._state.apply(change)
        else:
            self._state.apply(change)
            self._settle()  # Those who waited already.
            self._state.apply(self._advanced(after))
        self._settle()
        return change

    def become_due(self, state: JobState) -> None:
        """A job whose time has come goes on."""
        if state.limits:
            self._jobs_left = STEP_JOBS_MAX
            self._state.apply(self._advanced(state))
            self._settle()
        else:
            self._state.apply(leasing.become_due(state, priority_step_ms=self._rules.priority_step_ms))

    def answered(self, state: JobState, answer: Answer | None) -> None:
        """An external limiter judged the limit that a job is at; None: it failed."""
        now_ms = self._clock.now_ms()
        if answer is None:
            self.take(limit_chain.not_answered(state, now_ms=now_ms))
        else:
            self.take(
                limit_chain.answered(
                    state,
                    is_under=answer.is_under,
                    reset_at_ms=answer.reset_at_ms,
                    now_ms=now_ms,
                    new_task_id=self._new_id,
                )
            )

    def take_floating(self, before: FloatingState, after: FloatingState) -> None:
        """Make a floating limit's step true, with all that follows."""
        self._jobs_left = STEP_JOBS_MAX
        name = (after.tenant, after.key)
        self._state.apply_floating(before, after)
        self._settle()
        if after.refresh is None:
            was_refreshed = after.last_refreshed_at_ms > before.last_refreshed_at_ms
            self._consider_refresh(name, after.task_group, pause_ms=REFRESH_PAUSE_MS if was_refreshed else 0)

    # Alarms

    def serve_queue(self, name: QueueName) -> None:
        """The alarm of a queue rang."""
        self._jobs_left = STEP_JOBS_MAX
        self._limits.set_queue_alarm(name, None, self._state.committer.rows)
        self._limits.freed[name] = None
        self._settle()

    def serve_bucket(self, name: BucketName) -> None:
        """The alarm of a bucket rang."""
        self._jobs_left = STEP_JOBS_MAX
        self._limits.set_bucket_alarm(name, None, self._state.committer.rows)
        self._limits.touched[name] = None
        self._settle()

    def refresh(self, name: QueueName) -> None:
        """The alarm of a floating limit rang: schedule a refresh if jobs wait."""
        state = self._limits.floating(*name)
        if state is None:
            return
        self._jobs_left = STEP_JOBS_MAX
        self._state.apply_floating(state, msgspec.structs.replace(state, alarm_at_ms=None))
        self._consider_refresh(name, self._limits.waiting_group(name) or state.task_group)

    # What follows

    def _is_due(self, state: JobState) -> bool:
        return isinstance(state.pending, Delayed) and state.pending.due_ms <= self._clock.now_ms()

    def _advanced(self, state: JobState) -> Change:
        now_ms = self._clock.now_ms()
        change = limit_chain.advance(
            state, self._limits, now_ms=now_ms, rules=self._rules, new_task_id=self._new_id
        )
        return change if self._keeps_all else with_deadline(change, self._retention, now_ms=now_ms)

    def _merged(self, first: Change, then: Change) -> Change:
        return Change(
            before=first.before,
            after=then.after,
            job=first.job,
            attempts=first.attempts + then.attempts,
            buckets=then.buckets,
            floating=then.floating,
        )

    def _settle(self) -> None:
        """Go on until nothing follows any more."""
        limits = self._limits
        while limits.freed or limits.touched or limits.stirred:
            if limits.freed:
                name = next(iter(limits.freed))
                del limits.freed[name]
                self._serve(name)
            elif limits.touched:
                bucket = next(iter(limits.touched))
                del limits.touched[bucket]
                self._serve_bucket(bucket)
            else:
                name = next(iter(limits.stirred))
                self._consider_refresh(name, limits.stirred.pop(name))

    def _serve(self, name: QueueName) -> None:
        """Give free tickets of a queue to those who wait."""
        limits = self._limits
        while True:
            waiter, is_known = limits.next_waiter(name)
            if is_known and waiter is None:
                return
            if waiter is None or self._jobs_left <= 0 or not limits.has_all(waiter):
                self._go_on_later(name)
                return
            self._jobs_left -= 1
            change = self._advanced(waiter)
            if _stays(waiter, change.after):
                return  # It stands in a line of a larger maximum than its own.
            self._state.apply(change)

    def _go_on_later(self, name: QueueName) -> None:
        if self._limits.queue(name).alarm_at_ms is None:
            now_ms = self._clock.now_ms()
            self._limits.set_queue_alarm(name, now_ms, self._state.committer.rows)
            self._state.wake_at(now_ms)

    def _serve_bucket(self, name: BucketName) -> None:
        """Give hits of a bucket to those who wait, and see to it that it is looked at in time."""
        limits = self._limits
        while True:
            found = limits.bucket_line(name)
            now_ms = self._clock.now_ms()
            if found.line.is_empty:
                if found.bucket is not None:
                    self._forget_in_time(name, rate.empty_at_ms(found.bucket), now_ms)
                return
            head = found.line.head
            if head is None or not limits.has_all(head):
                self._look_at(name, now_ms)
                return
            fits_at_ms = rate.fits_at_ms(found.bucket, head.rate_limit, tenant=name[0], now_ms=now_ms)
            if fits_at_ms > now_ms or self._jobs_left <= 0:
                self._look_at(name, max(now_ms, fits_at_ms))
                return
            self._jobs_left -= 1
            self._state.apply(self._advanced(head))

    def _forget_in_time(self, name: BucketName, empty_at_ms: int, now_ms: int) -> None:
        """A bucket that nobody waits for is deleted once it is as good as new."""
        if empty_at_ms <= now_ms:
            self._limits.set_bucket_alarm(name, None, self._state.committer.rows)
            self._limits.forget_bucket(name)
        elif self._limits.bucket_line(name).alarm_at_ms is None:  # An earlier one will look again.
            self._look_at(name, empty_at_ms)

    def _look_at(self, name: BucketName, at_ms: int) -> None:
        alarm_at_ms = self._limits.bucket_line(name).alarm_at_ms
        if alarm_at_ms is None or at_ms < alarm_at_ms:
            self._limits.set_bucket_alarm(name, at_ms, self._state.committer.rows)
            self._state.wake_at(at_ms)

    def _consider_refresh(self, name: QueueName, task_group: str, *, pause_ms: int = 0) -> None:
        """Schedule the refresh of a floating limit if it is due and jobs wait; else look when it is.

        Not before `pause_ms` from now: workers need not refresh without a pause what is stale at once.
        """
        state = self._limits.floating(*name)
        at_ms = None if state is None else floating.refresh_at_ms(state)
        if state is None or at_ms is None or not self._limits.queue(name).waiters:
            return
        now_ms = self._clock.now_ms()
        at_ms = max(at_ms, now_ms + pause_ms) if pause_ms else at_ms
        if at_ms <= now_ms:
            self._state.apply_floating(state, floating.scheduled(state, task_group=task_group, now_ms=now_ms))
        elif state.alarm_at_ms is None or at_ms < state.alarm_at_ms:
            self._state.apply_floating(state, msgspec.structs.replace(state, alarm_at_ms=at_ms))


def _stays(waiter: JobState, after: JobState | None) -> bool:
    if after is None or not isinstance(after.pending, Waiting) or not isinstance(waiter.pending, Waiting):
        return False
    return (after.pending.key, after.pending.line) == (waiter.pending.key, waiter.pending.line)
