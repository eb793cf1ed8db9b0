"""Limits in any order of commands, faults, crashes and waiting: they hold, and nobody waits for nothing.

There is no model here: what must hold is said by `check_snapshot` of every state and by this machine of
every step. Numbers in comments are those of the list of invariants in the specification of the engine.
"""

from collections.abc import Awaitable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from silo.errors import JobNotFound, LeaseNotFound, SiloError, StateForbids
from silo.model.attempt import Cancelled, Failure, Outcome, PastAttempt, Success
from silo.model.floating import FloatingState, RefreshFailed, RefreshSucceeded
from silo.model.job import LEASE_MS, ImportedJob, JobState, RetryPolicy
from silo.model.limit import Limit, RateAlgorithm, RateBehavior, RateLimit
from silo.storage import journal, keys
from tests.builders import SHARD, a_job, a_policy, a_rate, at_most, floating
from tests.invariants import Name, Stored, check_grants, check_snapshot, check_step
from tests.journaled import JournaledMemoryStorage
from tests.property.machine import ShardMachine

tenants = st.sampled_from(["-", "a"])
groups = st.sampled_from(["g1", "g2"])
names = st.tuples(tenants, st.sampled_from([f"j{n}" for n in range(6)]))
limit_keys = st.sampled_from(["k1", "k2", "k3"])
tickets = st.builds(at_most, st.integers(1, 3), limit_keys)
floats = st.builds(
    floating,
    st.integers(0, 2),
    st.sampled_from(["f1", "k1"]),
    refresh_interval_ms=st.sampled_from([0, 5_000]),
)
rates = st.builds(
    a_rate,
    st.integers(1, 3),
    st.sampled_from([500, 3_000]),
    unique_key=st.sampled_from(["u1", "u2"]),
    hits=st.sampled_from([0, 1, 1, 1, 2, 4]),
    algorithm=st.sampled_from(RateAlgorithm),
    behavior=st.sampled_from([0, 0, 0, RateBehavior.DRAIN_OVER_LIMIT, RateBehavior.RESET_REMAINING]),
    initial_backoff_ms=st.sampled_from([0, 100, 1_000]),
    max_backoff_ms=st.sampled_from([0, 30_000]),
    max_retries=st.sampled_from([0, 0, 1, 3]),
)
limit_lists = st.lists(st.one_of(tickets, tickets, floats, rates), max_size=4)
policies = st.sampled_from([None, a_policy(2, initial_interval_ms=0), a_policy(1, initial_interval_ms=800)])
outcomes = st.sampled_from([Success(b"\x01"), Success(b"\x01"), Failure("BROKEN", b""), Cancelled()])


class LimitsMachine(ShardMachine):
    """Every rule is one command."""

    @initialize(seed=st.integers(0, 1000))
    def start(self, seed: int) -> None:
        self.open(seed)
        self.jobs: dict[Name, Stored] = {}
        self.leased: dict[str, Name] = {}
        self.refreshes: list[str] = []
        self.were_dropped = False

    def attempt(self, command: Awaitable[object], *refusals: type[SiloError]) -> None:
        """Run a command that may be refused, and then has changed nothing (50)."""
        before = self.facts()
        if any(key.startswith(keys.ALARMS) and keys.read_time(key) <= self.clock.now_ms() for key in before):
            self.run(self.settle())  # Leftover work would go on by itself meanwhile.
            before = self.facts()

        async def call() -> bool:
            try:
                await command
            except refusals:
                return False
            return True

        if not self.run(call()):
            assert self.facts() == before

    @rule(
        name=names,
        group=groups,
        limits=limit_lists,
        when=st.tuples(st.sampled_from([0, 50]), st.sampled_from([None, None, None, -5_000, 900])),
        policy=policies,
    )
    def enqueue(
        self,
        name: Name,
        group: str,
        limits: list[Limit],
        when: tuple[int, int | None],
        policy: RetryPolicy | None,
    ) -> None:
        if name in self.jobs:
            return
        priority, offset_ms = when
        new = a_job(
            name[1],
            tenant=name[0],
            task_group=group,
            limits=limits,
            priority=priority,
            retry_policy=policy,
            start_at_ms=0 if offset_ms is None else self.clock.now_ms() + offset_ms,
        )
        self.run(self.shard.enqueue(new))

    @rule(group=groups, wanted=st.integers(1, 5))
    def lease(self, group: str, wanted: int) -> None:
        for task in self.run(self.shard.lease_tasks(worker_id="w", task_group=group, max_tasks=wanted)):
            if isinstance(task, FloatingState):
                assert task.lease is not None
                self.refreshes.append(task.lease.task_id)
                continue
            keys_of_limits = {limit.key for limit in task.state.limits if not isinstance(limit, RateLimit)}
            held = {holder.key for holder in task.state.held}
            assert self.were_dropped or held == keys_of_limits  # 44
            assert task.state.lease is not None
            self.leased[task.state.lease.task_id] = (task.job.tenant, task.job.id)

    @precondition(lambda self: self.leased)
    @rule(data=st.data(), outcome=outcomes)
    def report(self, data: st.DataObject, outcome: Outcome) -> None:
        task_id = data.draw(st.sampled_from(sorted(self.leased)))
        del self.leased[task_id]
        self.attempt(self.shard.report(task_id, outcome), LeaseNotFound)

    @precondition(lambda self: self.refreshes)
    @rule(data=st.data(), new=st.sampled_from([None, 0, 1, 2, 4]))
    def report_refresh(self, data: st.DataObject, new: int | None) -> None:
        task_id = data.draw(st.sampled_from(self.refreshes))
        self.refreshes.remove(task_id)
        outcome = RefreshFailed("X", "no") if new is None else RefreshSucceeded(new)
        self.attempt(self.shard.report_refresh(task_id, outcome), LeaseNotFound)

    @rule(name=names)
    def cancel(self, name: Name) -> None:
        self.attempt(self.shard.cancel(tenant=name[0], job_id=name[1]), JobNotFound, StateForbids)

    @rule(name=names)
    def restart(self, name: Name) -> None:
        self.attempt(self.shard.restart(tenant=name[0], job_id=name[1]), JobNotFound, StateForbids)

    @rule(name=names)
    def expedite(self, name: Name) -> None:
        self.attempt(self.shard.expedite(tenant=name[0], job_id=name[1]), JobNotFound, StateForbids)

    @rule(name=names)
    def delete(self, name: Name) -> None:
        self.attempt(self.shard.delete(tenant=name[0], job_id=name[1]), StateForbids)

    @rule(name=names)
    def lease_one(self, name: Name) -> None:
        call = self.shard.lease_one(tenant=name[0], job_id=name[1], worker_id="w")
        self.were_dropped = True  # Not really, but such a job runs without its tickets.
        self.attempt(call, JobNotFound, StateForbids)

    @rule(name=names, limits=limit_lists, policy=policies)
    def import_with_a_failure_more(self, name: Name, limits: list[Limit], policy: RetryPolicy | None) -> None:
        stored = self.jobs.get(name)
        past = [
            _past(attempt.started_at_ms, attempt.finished_at_ms or 0, attempt.outcome)
            for attempt in (stored.attempts if stored else [])
        ]
        given = ImportedJob(
            tenant=name[0],
            id=name[1],
            task_group="g1",
            priority=0,
            enqueue_time_ms=0,
            start_at_ms=0,
            payload=b"",
            retry_policy=policy,
            limits=tuple(limits),
            attempts=(*past, _past(1, 2, Failure("OLD", b""))),
        )
        self.attempt(self.shard.import_jobs(tenant=name[0], jobs=[given]), StateForbids)

    @rule(tenant=tenants)
    def drop_holders(self, tenant: str) -> None:
        held = sum(len(job.state.held) for name, job in self.jobs.items() if name[0] == tenant)
        self.were_dropped = True
        assert self.run(self.shard.drop_holders(tenant=tenant)) >= held

    @rule(duration_ms=st.sampled_from([1, 100, 500, 1_000, 3_000, LEASE_MS]))
    def wait(self, duration_ms: int) -> None:
        self.clock.advance_ms(duration_ms)
        self.run(self.shard.tick())

    @rule()
    def crash(self) -> None:
        self.reopen_now()

    @invariant()
    def all_holds(self) -> None:
        if not hasattr(self, "jobs"):
            return
        self.run(self.settle())
        now_ms = self.clock.now_ms()
        rows = self.storage.snapshot(SHARD)
        after = check_snapshot(rows, now_ms=now_ms, were_dropped=self.were_dropped)
        check_step(self.jobs, after)
        check_grants(self.jobs, after, rows, were_dropped=self.were_dropped)
        self.jobs = after

    async def settle(self) -> None:
        await self.shard.tick()
        await self.shard.durable()  # The shard's own tick may have done it all, and not written it yet.

    def teardown(self) -> None:
        try:
            if hasattr(self, "jobs"):
                self.drain()
        finally:
            super().teardown()

    def drain(self) -> None:
        """With workers that succeed, all that can run ends, and leaves nothing behind (75, 78, 20)."""
        for _ in range(60):
            for name, job in self.jobs.items():
                if _is_impossible(job.state):  # It holds what it has for ever.
                    self.cancel(name)
                    self.run(self.settle())
            for task_id in list(self.leased):
                self.report_success(task_id)
            self.all_holds()  # Before maxima change: who overtook whom is judged by those of now.
            for task_id in self.refreshes:
                self.attempt(self.shard.report_refresh(task_id, RefreshSucceeded(2)), LeaseNotFound)
                self.all_holds()
            self.refreshes.clear()
            for group in ("g1", "g2"):
                self.lease(group, 9)
            self.wait(1_000 if self.leased or self.refreshes else LEASE_MS)
            self.all_holds()
            if all(job.state.status.is_terminal for job in self.jobs.values()):
                break
        left = [job.state for job in self.jobs.values() if not job.state.status.is_terminal]
        assert not left, left
        rows = self.storage.snapshot(SHARD)
        assert not [key for key in rows if key[:1] in (b"h", b"r", b"n", b"v", b"t")]

    def report_success(self, task_id: str) -> None:
        del self.leased[task_id]
        self.attempt(self.shard.report(task_id, Success(b"\x01")), LeaseNotFound)


def _past(started_at_ms: int, finished_at_ms: int, outcome: Outcome | None) -> PastAttempt:
    return PastAttempt(
        started_at_ms=started_at_ms, finished_at_ms=finished_at_ms, outcome=outcome or Cancelled()
    )


def _is_impossible(state: JobState) -> bool:
    return any(isinstance(limit, RateLimit) and limit.hits > limit.limit for limit in state.limits)


class TinyMemoryLimitsMachine(LimitsMachine):
    """The same with room for almost nothing in memory."""

    is_tiny = True


class JournaledLimitsMachine(LimitsMachine):
    """The same on a store with a journal, which applies it whenever it finds the time."""

    storage_type = JournaledMemoryStorage

    def open(self, seed: int) -> None:
        super().open(seed)
        self.bounds.enter_context(applied_at_once())


@contextmanager
def applied_at_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(journal, "APPLY_S", 0)
        yield


_SETTINGS = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
LimitsMachine.TestCase.settings = _SETTINGS
TinyMemoryLimitsMachine.TestCase.settings = _SETTINGS
JournaledLimitsMachine.TestCase.settings = _SETTINGS
TestLimits = LimitsMachine.TestCase
TestLimitsOnAJournal = JournaledLimitsMachine.TestCase
TestLimitsInTinyMemory = TinyMemoryLimitsMachine.TestCase
