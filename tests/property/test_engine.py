"""The engine against a simple model: commands, faults, crashes and waiting in any order keep the promises."""

import math
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from silo.engine.outcomes import WORKER_CRASHED
from silo.errors import (
    InvalidRequest,
    JobExists,
    JobNotFound,
    LeaseNotFound,
    LeaseOwnerMismatch,
    ShardClosed,
    SiloError,
    StateForbids,
)
from silo.model.attempt import AttemptStatus, Cancelled, Failure, Outcome, PastAttempt, Success
from silo.model.job import LEASE_MS, ImportedJob, JobStatus, RetryPolicy
from silo.storage.memory import Fault
from tests.builders import SHARD, a_job, a_policy
from tests.invariants import Name, Stored, check_snapshot, check_step
from tests.property.machine import ShardMachine

STEP_MS = 10_000
T = TypeVar("T")

tenants = st.sampled_from(["-", "a", "b"])
groups = st.sampled_from(["g1", "g2"])
names = st.tuples(tenants, st.sampled_from([f"j{n}" for n in range(3)]))
workers = st.sampled_from(["w1", "w2"])
priorities = st.sampled_from([0, 1, 50, 99])
policies = st.one_of(
    st.none(),
    st.builds(
        a_policy,
        st.integers(0, 3),
        initial_interval_ms=st.sampled_from([0, 1, 700, 20_000]),
        max_interval_ms=st.sampled_from([0, 1_000, 60_000]),
        randomize_interval=st.booleans(),
        backoff_factor=st.sampled_from([0.5, 1.0, 2.0]),
    ),
)
outcomes = st.sampled_from([Success(b"\x01"), Failure("BROKEN", b"\xc0"), Cancelled()])
histories = st.one_of(
    st.lists(outcomes, max_size=3),
    st.integers(0, 3).map(lambda count: [Failure("BROKEN", b"\xc0")] * count),
)


@dataclass
class Claim:
    """A lease as the worker knows it."""

    task_id: str
    worker_id: str
    started_at_ms: int
    expiry_ms: int


@dataclass
class Expected:
    """One job as the model has it."""

    task_group: str
    priority: int
    policy: RetryPolicy | None
    enqueue_time_ms: int
    status: JobStatus
    start_ms: int  # Of the pending attempt: not before this.
    rank: int | None  # Place in its queue once it is due; None while it is not.
    attempts: list[tuple[str, int, AttemptStatus]] = field(default_factory=list)
    relative: int = 1
    claim: Claim | None = None
    flagged: bool = False
    payload: bytes = b""

    @property
    def budget(self) -> int:
        return 1 + (self.policy.retry_count if self.policy else 0)


class EngineMachine(ShardMachine):
    """Every rule is one command, on the shard and on the model."""

    all_tenants_fit = True  # In memory, so that each has its turn in every poll.

    @initialize(seed=st.integers(0, 1000))
    def start(self, seed: int) -> None:
        self.open(seed)
        self.jobs: dict[Name, Expected] = {}
        self.spent: list[str] = []  # Task ids whose attempt has ended.
        self.seen: dict[Name, Stored] = {}

    def refused(self, error: type[SiloError], command: Awaitable[object]) -> None:
        """The command is refused, and nothing has changed (50)."""
        before = self.facts()

        async def call() -> None:
            with pytest.raises(error):
                await command

        self.run(call())
        assert self.facts() == before

    # The model's own arithmetic

    def place(self, job: Expected, start_ms: int) -> None:
        job.start_ms = start_ms
        job.rank = start_ms + job.priority * STEP_MS if start_ms <= self.clock.now_ms() else None

    def end(self, name: Name, status: AttemptStatus) -> None:
        """The running attempt of a job ends."""
        job, now_ms = self.jobs[name], self.clock.now_ms()
        assert job.claim is not None
        job.attempts.append((job.claim.task_id, job.relative, status))
        self.spent.append(job.claim.task_id)
        job.claim = None
        if status is AttemptStatus.SUCCEEDED:
            job.status = JobStatus.SUCCEEDED
        elif status is AttemptStatus.CANCELLED or job.flagged:
            job.status = JobStatus.CANCELLED
        elif job.relative >= job.budget:
            job.status = JobStatus.FAILED
        else:
            job.status = JobStatus.SCHEDULED
            delay_ms = self.observed_delay(name, job)
            job.relative += 1
            self.place(job, now_ms + delay_ms)

    def observed_delay(self, name: Name, job: Expected) -> int:
        """The delay that the shard drew, which must be within its bounds (38)."""
        policy = job.policy
        assert policy is not None
        stored = check_snapshot(self.storage.snapshot(SHARD))[name].state
        assert stored.next_start_ms is not None
        delay_ms = stored.next_start_ms - self.clock.now_ms()
        least = math.floor(policy.initial_interval_ms * policy.backoff_factor**job.relative + 0.5)
        most = 2 * least if policy.randomize_interval else least
        assert min(least, policy.max_interval_ms) <= delay_ms <= min(most, policy.max_interval_ms)
        return delay_ms

    def due_of(self, task_group: str) -> list[tuple[int, int, str, str]]:
        return sorted(
            (job.rank, job.priority, name[1], name[0])
            for name, job in self.jobs.items()
            if job.task_group == task_group and job.status is JobStatus.SCHEDULED and job.rank is not None
        )

    def claims(self) -> dict[str, Name]:
        return {job.claim.task_id: name for name, job in self.jobs.items() if job.claim is not None}

    # Commands

    @rule(
        name=names,
        group=groups,
        priority=priorities,
        policy=policies,
        offset_ms=st.sampled_from([None, -5_000, 0, 800, 30_000]),
    )
    def enqueue(
        self, name: Name, group: str, priority: int, policy: RetryPolicy | None, offset_ms: int | None
    ) -> None:
        start_at_ms = 0 if offset_ms is None else self.clock.now_ms() + offset_ms
        new = a_job(
            name[1],
            tenant=name[0],
            task_group=group,
            priority=priority,
            start_at_ms=start_at_ms,
            retry_policy=policy,
            metadata={"color": "red"},
            payload=f"payload {self.rng.random()}",
        )
        if name in self.jobs:
            self.refused(JobExists, self.shard.enqueue(new))
            return
        self.run(self.shard.enqueue(new))
        job = Expected(
            group, priority, policy, start_at_ms, JobStatus.SCHEDULED, 0, None, payload=new.payload
        )
        self.place(job, start_at_ms or self.clock.now_ms())
        self.jobs[name] = job

    @rule(group=groups, worker=workers, wanted=st.integers(0, 8))
    def lease(self, group: str, worker: str, wanted: int) -> None:
        due = self.due_of(group)
        tasks = self.run(self.shard.lease_tasks(worker_id=worker, task_group=group, max_tasks=wanted))
        assert len(tasks) == min(wanted, len(due))  # Nothing due is held back (65).
        taken = [(task.job.tenant, task.job.id) for task in tasks]
        left = {tenant: [entry for entry in due if entry[3] == tenant] for tenant in {e[3] for e in due}}
        turns = dict.fromkeys(left, 0)
        for tenant, job_id in taken:
            assert left[tenant].pop(0)[2] == job_id  # In order within a tenant (41).
            turns[tenant] += 1
        waiting = [turns[tenant] for tenant, rest in left.items() if rest]
        if waiting and self.all_tenants_fit:
            assert max(turns.values()) - min(waiting) <= 1  # Tenants take turns.
        now_ms = self.clock.now_ms()
        for task in tasks:
            lease = task.state.lease
            assert lease is not None
            assert lease.task_id not in self.spent
            job = self.jobs[task.job.tenant, task.job.id]
            assert task.job.payload == job.payload
            assert job.start_ms <= now_ms  # Never early (39).
            job.status, job.rank = JobStatus.RUNNING, None
            job.claim = Claim(lease.task_id, worker, now_ms, now_ms + LEASE_MS)

    @rule(name=names, worker=workers)
    def lease_one(self, name: Name, worker: str) -> None:
        job = self.jobs.get(name)
        call = self.shard.lease_one(tenant=name[0], job_id=name[1], worker_id=worker)
        if job is None:
            self.refused(JobNotFound, call)
        elif job.status is not JobStatus.SCHEDULED:
            self.refused(StateForbids, call)
        else:
            task = self.run(call)
            lease = task.state.lease
            assert lease is not None
            assert task.job.payload == job.payload
            now_ms = self.clock.now_ms()
            job.status, job.rank = JobStatus.RUNNING, None
            job.claim = Claim(lease.task_id, worker, now_ms, now_ms + LEASE_MS)

    @rule(name=names, worker=workers)
    def run_alone_and_forget(self, name: Name, worker: str) -> None:
        """A job passes through quickly, and leaves its id to the next one."""
        job = self.jobs.get(name)
        if job is not None and job.status is JobStatus.SCHEDULED:
            self.lease_one(name, worker)
            assert job.claim is not None
            self.run(self.shard.report(job.claim.task_id, Success(b"\x01")))
            self.end(name, AttemptStatus.SUCCEEDED)
            self.delete(name)

    @precondition(lambda self: self.claims())
    @rule(data=st.data(), outcome=outcomes)
    def report(self, data: st.DataObject, outcome: Outcome) -> None:
        task_id, name = data.draw(st.sampled_from(sorted(self.claims().items())))
        self.run(self.shard.report(task_id, outcome))
        match outcome:
            case Success():
                self.end(name, AttemptStatus.SUCCEEDED)
            case Failure():
                self.end(name, AttemptStatus.FAILED)
            case Cancelled():
                self.end(name, AttemptStatus.CANCELLED)

    @precondition(lambda self: self.spent)
    @rule(data=st.data(), outcome=outcomes, worker=workers)
    def report_late(self, data: st.DataObject, outcome: Outcome, worker: str) -> None:
        task_id = data.draw(st.sampled_from(self.spent))
        self.refused(LeaseNotFound, self.shard.report(task_id, outcome))  # 25, 48
        self.refused(LeaseNotFound, self.shard.heartbeat(task_id=task_id, worker_id=worker))

    @precondition(lambda self: self.claims())
    @rule(data=st.data(), worker=workers)
    def heartbeat(self, data: st.DataObject, worker: str) -> None:
        task_id, name = data.draw(st.sampled_from(sorted(self.claims().items())))
        job = self.jobs[name]
        assert job.claim is not None
        call = self.shard.heartbeat(task_id=task_id, worker_id=worker)
        if job.claim.worker_id != worker:
            self.refused(LeaseOwnerMismatch, call)  # 49
            return
        assert (self.run(call) is not None) == job.flagged
        job.claim.expiry_ms = self.clock.now_ms() + LEASE_MS

    @rule(name=names)
    def cancel(self, name: Name) -> None:
        job = self.jobs.get(name)
        call = self.shard.cancel(tenant=name[0], job_id=name[1])
        if job is None:
            self.refused(JobNotFound, call)
        elif job.flagged or job.status.is_terminal:
            if job.status is JobStatus.CANCELLED and not job.flagged:
                self.run(call)  # The worker ended it as cancelled; nobody had asked for it before.
                job.flagged = True
            else:
                self.refused(StateForbids, call)
        else:
            self.run(call)
            job.flagged = True
            if job.status is JobStatus.SCHEDULED:
                job.status, job.rank = JobStatus.CANCELLED, None

    @rule(name=names)
    def restart(self, name: Name) -> None:
        job = self.jobs.get(name)
        call = self.shard.restart(tenant=name[0], job_id=name[1])
        if job is None:
            self.refused(JobNotFound, call)
        elif job.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
            self.refused(StateForbids, call)
        else:
            self.run(call)
            job.status, job.relative, job.flagged = JobStatus.SCHEDULED, 1, False
            self.place(job, max(job.enqueue_time_ms, self.clock.now_ms()))

    @rule(name=names)
    def expedite(self, name: Name) -> None:
        job = self.jobs.get(name)
        call = self.shard.expedite(tenant=name[0], job_id=name[1])
        if job is None:
            self.refused(JobNotFound, call)
        elif job.status is not JobStatus.SCHEDULED or job.rank is not None:
            self.refused(StateForbids, call)  # 17
        else:
            self.run(call)
            self.place(job, self.clock.now_ms())  # 16: nothing else changes.

    @rule(name=names)
    def delete(self, name: Name) -> None:
        job = self.jobs.get(name)
        call = self.shard.delete(tenant=name[0], job_id=name[1])
        if job is not None and not job.status.is_terminal:
            self.refused(StateForbids, call)
            return
        self.run(call)
        self.jobs.pop(name, None)
        self.seen.pop(name, None)

    @rule(
        name=names,
        place=st.tuples(groups, priorities),
        policy=policies,
        added=histories,
        offset_ms=st.sampled_from([-5_000, 0, 800]),
    )
    def reimport(
        self,
        name: Name,
        place: tuple[str, int],
        policy: RetryPolicy | None,
        added: list[Outcome],
        offset_ms: int,
    ) -> None:
        """A job comes with its history; if it is here already, with what is stored and `added` after it."""
        job, now_ms = self.jobs.get(name), self.clock.now_ms()
        stored = self.seen[name].attempts if job is not None else []
        given = ImportedJob(
            tenant=name[0],
            id=name[1],
            task_group=place[0],
            priority=place[1],
            enqueue_time_ms=0,
            start_at_ms=now_ms + offset_ms,
            payload=f"payload {self.rng.random()}".encode(),
            retry_policy=policy,
            attempts=(
                *(
                    PastAttempt(
                        started_at_ms=attempt.started_at_ms,
                        finished_at_ms=attempt.finished_at_ms or 0,
                        outcome=attempt.outcome or Cancelled(),
                    )
                    for attempt in stored
                ),
                *(PastAttempt(started_at_ms=1, finished_at_ms=2, outcome=outcome) for outcome in added),
            ),
        )
        call = self.shard.import_jobs(tenant=name[0], jobs=[given])
        if job is not None and job.status is JobStatus.RUNNING:
            self.refused(StateForbids, call)
            return
        before = self.facts()
        [answer] = self.run(call)
        if job is not None and (job.status is JobStatus.SUCCEEDED or not added):
            assert isinstance(answer, StateForbids)
            assert self.facts() == before
        elif not all(isinstance(outcome, Failure) for outcome in added[:-1]):
            assert isinstance(answer, InvalidRequest)
            assert self.facts() == before
        else:
            if job is None:
                job = self.jobs[name] = Expected(
                    *place, policy, now_ms, JobStatus.SCHEDULED, 0, None, payload=given.payload
                )
            self.take_over(name, policy, added, start_ms=now_ms + offset_ms)
            assert answer is job.status

    def take_over(
        self, name: Name, policy: RetryPolicy | None, added: list[Outcome], *, start_ms: int
    ) -> None:
        """A job has gone through more attempts elsewhere."""
        job = self.jobs[name]
        new = check_snapshot(self.storage.snapshot(SHARD))[name].attempts[len(job.attempts) :]
        assert [attempt.outcome for attempt in new] == added
        job.attempts += [(attempt.task_id, attempt.attempt_number, attempt.status) for attempt in new]
        self.spent += [attempt.task_id for attempt in new]
        job.policy, job.flagged, job.rank = policy, False, None
        job.relative = max(1, len(job.attempts))
        last = job.attempts[-1][2] if job.attempts else None
        failures = sum(status is AttemptStatus.FAILED for _, _, status in job.attempts)
        if last is AttemptStatus.SUCCEEDED:
            job.status = JobStatus.SUCCEEDED
        elif last is AttemptStatus.CANCELLED:
            job.status = JobStatus.CANCELLED
        elif last is AttemptStatus.FAILED and failures >= job.budget:
            job.status = JobStatus.FAILED
        else:
            job.status = JobStatus.SCHEDULED
            job.relative = len(job.attempts) + 1
            self.place(job, start_ms)

    @rule(name=names)
    def look(self, name: Name) -> None:
        job = self.jobs.get(name)
        call = self.shard.get_job(tenant=name[0], job_id=name[1], with_attempts=True)
        if job is None:
            self.refused(JobNotFound, call)
            return
        view = self.run(call)
        running = [attempt for attempt in view.attempts if attempt.outcome is None]
        assert len(running) == (job.status is JobStatus.RUNNING)  # 30
        assert [attempt.task_id for attempt in view.attempts if attempt.outcome is not None] == [
            task_id for task_id, _, _ in job.attempts
        ]

    # Time, crashes and faults

    @rule(duration_ms=st.sampled_from([1, 700, 1_000, 9_999, 10_000, 60_000]))
    def wait(self, duration_ms: int) -> None:
        self.clock.advance_ms(duration_ms)
        self.run(self.shard.tick())
        now_ms = self.clock.now_ms()
        for name, job in self.jobs.items():
            if job.status is JobStatus.SCHEDULED and job.rank is None and job.start_ms <= now_ms:
                job.rank = job.start_ms + job.priority * STEP_MS
            if job.claim is not None and job.claim.expiry_ms <= now_ms:  # 31
                self.end(name, AttemptStatus.CANCELLED if job.flagged else AttemptStatus.FAILED)

    @rule()
    def crash(self) -> None:
        """The process dies and comes back: all that was answered is there (53)."""
        self.reopen_now()
        now_ms = self.clock.now_ms()
        for job in self.jobs.values():
            if job.claim is not None:  # A lease has at least a full time to go.
                stored_ms = job.claim.started_at_ms + LEASE_MS
                job.claim.expiry_ms = max(stored_ms, now_ms + LEASE_MS)

    @rule(name=names, fault=st.sampled_from([Fault.FAIL_BEFORE, Fault.FAIL_AFTER]))
    def cancel_fails(self, name: Name, fault: Fault) -> None:
        """A write that fails closes the shard; the outcome is whole, one way or the other."""
        job = self.jobs.get(name)
        if job is None or job.flagged or job.status.is_terminal:
            return
        self.storage.faults.plan("write", fault)

        async def call() -> None:
            with pytest.raises(ShardClosed):
                await self.shard.cancel(tenant=name[0], job_id=name[1])

        self.run(call())
        self.storage.faults.clear()
        if fault is Fault.FAIL_AFTER:
            job.flagged = True
            if job.status is JobStatus.SCHEDULED:
                job.status, job.rank = JobStatus.CANCELLED, None
        self.crash()

    @invariant()
    def the_store_agrees(self) -> None:
        if not hasattr(self, "jobs"):
            return
        stored = check_snapshot(self.storage.snapshot(SHARD))
        check_step(self.seen, stored)
        self.seen = stored
        assert stored.keys() == self.jobs.keys()  # 51
        for name, job in self.jobs.items():
            state, attempts = stored[name].state, stored[name].attempts
            assert state.status is job.status, name
            assert (state.cancelled_at_ms is not None) == job.flagged, name  # 14, 47
            assert state.relative_attempt_number == job.relative, name
            assert [(a.task_id, a.relative_attempt_number, a.status) for a in attempts] == job.attempts
            for attempt in attempts:
                if isinstance(attempt.outcome, Failure):
                    assert attempt.outcome.code in ("BROKEN", WORKER_CRASHED)
            assert (state.lease.task_id if state.lease else None) == (
                job.claim.task_id if job.claim else None
            )
            if job.status is JobStatus.SCHEDULED:
                assert state.next_start_ms == job.start_ms  # 15, 35
                assert getattr(state.pending, "deadline_ms", None) == job.rank


class TinyMemoryMachine(EngineMachine):
    """The same with room for almost nothing in memory: nearly all is read again and again."""

    all_tenants_fit = False
    is_tiny = True


_SETTINGS = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
EngineMachine.TestCase.settings = _SETTINGS
TinyMemoryMachine.TestCase.settings = _SETTINGS
_SHOWN = pytest.mark.spec("SM-1", "SM-7", "ATT-1", "ENT-24", "ENT-29", "ENT-30", "LSE-2", "LEA-18")
TestEngine = _SHOWN(EngineMachine.TestCase)
TestEngineInTinyMemory = TinyMemoryMachine.TestCase
