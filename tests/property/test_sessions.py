"""Sessions in any order of commands, crashes and waiting: what they hold and are told is what is stored.

Beside everything that must hold of limits (`test_limits.py`), for tasks that workers on streams have: handed
back, postponed, failed for good, cancelled, lost and taken over.
"""

import asyncio

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from silo.errors import LeaseNotFound, SiloError
from silo.model.attempt import Failure, FinalFailure, HandedBack, Postponed
from silo.model.floating import FloatingState
from silo.model.job import JobState
from silo.model.limit import Limit
from silo.model.task import Leased
from silo.node.session import task_id_of
from silo.shard.dispatch import Room
from silo.shard.shard import AnyReport
from silo.storage import codec, keys
from tests.builders import SHARD, a_job
from tests.invariants import Name
from tests.property.test_limits import LimitsMachine, groups, limit_lists, names, outcomes

sessions = st.sampled_from(["s1", "s2"])
unbegun = st.sampled_from([HandedBack(), HandedBack(), Postponed(0), Postponed(700)])
reports: st.SearchStrategy[AnyReport] = st.one_of(
    outcomes, unbegun, st.just(FinalFailure(Failure("FINAL", b"")))
)


class Holder:
    """One stream of a session: what it has, and what it was told."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.cancelled: set[str] = set()
        self.lost: set[str] = set()

    def was_cancelled(self, task_id: str, cancelled_at_ms: int) -> None:
        assert task_id not in self.cancelled, "told twice"
        self.cancelled.add(task_id)

    def was_lost(self, task_id: str) -> None:
        assert task_id not in self.lost, "told twice"
        self.lost.add(task_id)


class SessionsMachine(LimitsMachine):
    """The rules of limits, and those of sessions."""

    @initialize(seed=st.integers(0, 1000))
    def start(self, seed: int) -> None:
        self.holders: dict[str, Holder] = {}
        self.stood: dict[str, JobState] = {}  # Where jobs stood before they were leased, by task id.
        super().start(seed)

    @property
    def has_tasks(self) -> bool:
        return any(holder.held - holder.lost for holder in self.holders.values())

    def draw_task(self, data: st.DataObject) -> tuple[Holder, str]:
        tasks = [
            (session, task_id)
            for session, holder in sorted(self.holders.items())
            for task_id in sorted(holder.held - holder.lost)
        ]
        session, task_id = data.draw(st.sampled_from(tasks))
        return self.holders[session], task_id

    # Work

    @rule(session=sessions, group=groups, wanted=st.integers(1, 4))
    def take(self, session: str, group: str, wanted: int) -> None:
        """Tasks for a session, held once their leases are durable."""
        holder = self.holders.setdefault(session, Holder())

        async def take() -> list[Leased]:
            room = Room(wanted, refreshes_on_top=False)
            taken: list[Leased] = []
            while True:
                tasks, feeding = self.shard.take_loaded(
                    worker_id=session, task_group=group, room=room, session=session
                )
                taken += tasks
                if room.is_full or feeding is None:
                    break
                await asyncio.wait({feeding})
            await self.shard.durable()
            return taken

        tasks = self.run(take())
        assert len(tasks) <= wanted
        for task in tasks:
            if not isinstance(task, FloatingState):
                self.stood[task_id_of(task)] = self.jobs[task.job.tenant, task.job.id].state
        ids = {task_id_of(task) for task in tasks}
        assert self.hold(session, holder, ids) == set()
        holder.held |= ids

    @rule(session=sessions, group=groups, what=unbegun)
    def take_and_hand_back(self, session: str, group: str, what: AnyReport) -> None:
        """What no handler has begun."""
        before = set(self.holders[session].held) if session in self.holders else set()
        self.take(session, group, 2)
        holder = self.holders[session]
        for task_id in sorted(holder.held - before):
            self.tell(holder, task_id, what)

    @precondition(lambda self: self.has_tasks)
    @rule(data=st.data(), what=reports)
    def say(self, data: st.DataObject, what: AnyReport) -> None:
        """A report on the stream that has the task."""
        holder, task_id = self.draw_task(data)
        self.tell(holder, task_id, what)

    def tell(self, holder: Holder, task_id: str, what: AnyReport) -> None:
        before = self.leased_as(task_id)
        holder.held.discard(task_id)
        self.shard.let_go(holder, [task_id])
        self.attempt(self.reported(task_id, what), SiloError)
        if isinstance(what, HandedBack):
            self.check_stands(task_id, before)

    async def reported(self, task_id: str, what: AnyReport) -> None:
        [refusal] = await self.shard.report_many([(task_id, what)])
        if refusal is not None:
            raise refusal

    def leased_as(self, task_id: str) -> JobState | None:
        row = self.storage.snapshot(SHARD).get(keys.lease_key(task_id))
        state = None if row is None else codec.decode_task(row)
        return state if isinstance(state, JobState) else None

    def check_stands(self, task_id: str, before: JobState | None) -> None:
        """A job that was handed back stands where it stood, with the tickets that it has by now."""
        stood = self.stood.get(task_id)
        if before is None or stood is None or before.cancelled_at_ms is not None:
            return
        row = self.storage.snapshot(SHARD)[keys.state_key(stood.tenant, stood.job_id)]
        now = codec.decode(JobState, row)
        assert now == msgspec.structs.replace(stood, changed_at_ms=now.changed_at_ms, held=before.held)

    @precondition(lambda self: self.has_tasks)
    @rule(data=st.data(), what=reports)
    def say_much(self, data: st.DataObject, what: AnyReport) -> None:
        """All that a session has, in one message, each twice."""
        holder, _ = self.draw_task(data)
        tasks = sorted(holder.held - holder.lost)
        holder.held -= set(tasks)
        self.shard.let_go(holder, tasks)
        answers = self.run(self.shard.report_many([(task_id, what) for task_id in [*tasks, *tasks]]))
        for first, second in zip(answers[: len(tasks)], answers[len(tasks) :], strict=True):
            # Of a refresh some reports are refused, and it stays.
            assert isinstance(second, LeaseNotFound) or type(first) is type(second)
            assert first is None or not isinstance(first, LeaseNotFound)

    @rule(new=st.lists(st.tuples(names, groups, limit_lists), min_size=1, max_size=5))
    def enqueue_many(self, new: list[tuple[Name, str, list[Limit]]]) -> None:
        jobs = [
            a_job(name[1], tenant=name[0], task_group=group, limits=limits) for name, group, limits in new
        ]
        answers = self.run(self.shard.enqueue_many(jobs))
        seen = set(self.jobs)
        for (name, _, _), answer in zip(new, answers, strict=True):
            assert (answer == name[1]) == (name not in seen)
            seen.add(name)

    # Streams

    @rule(session=sessions)
    def renew(self, session: str) -> None:
        holder = self.holders.get(session)
        if holder is not None:
            assert self.hold(session, holder, holder.held) == holder.lost

    @rule(data=st.data(), session=sessions)
    def come_back(self, data: st.DataObject, session: str) -> None:
        """A new stream of a session: it names what it has, all but what never reached it."""
        old = self.holders.pop(session, Holder())
        named = {task_id for task_id in sorted(old.held) if data.draw(st.booleans())}
        self.shard.let_go(old, sorted(old.held))
        new = self.holders[session] = Holder()
        lost = self.hold(session, new, named)
        assert lost == named & old.lost
        new.held = named - lost
        before = {task_id: self.leased_as(task_id) for task_id in self.shard.leased_for(session)}
        unknown = [task_id for task_id in before if task_id not in new.held]
        if unknown:
            answers = self.run(
                self.shard.report_many([(task_id, HandedBack()) for task_id in sorted(unknown)])
            )
            assert set(answers) == {None}

    @rule(session=sessions)
    def go_away(self, session: str) -> None:
        """A stream ends: nobody renews its leases."""
        holder = self.holders.pop(session, None)
        if holder is not None:
            self.shard.let_go(holder, sorted(holder.held))

    @rule()
    def crash(self) -> None:
        """Streams live on through the restart of a shard, and are asked again."""
        super().crash()
        for session, holder in self.holders.items():
            holder.cancelled.clear()  # It is told again.
            assert self.hold(session, holder, holder.held) == holder.lost

    def hold(self, session: str, holder: Holder, task_ids: set[str]) -> set[str]:
        """Those of the leases that are gone."""

        async def hold() -> list[str]:
            return self.shard.hold(holder, sorted(task_ids), session=session)

        return set(self.run(hold()))

    # What must hold

    async def settle(self) -> None:
        await super().settle()
        for _ in range(3):
            await asyncio.sleep(0)
        if hasattr(self, "holders"):
            self.check_told()

    def check_told(self) -> None:
        rows = self.storage.snapshot(SHARD)
        for session, holder in self.holders.items():
            for task_id in holder.held:
                row = rows.get(keys.lease_key(task_id))
                assert (row is None) == (task_id in holder.lost), (session, task_id)
                if row is None:
                    continue
                state = codec.decode_task(row)
                assert state.lease is not None
                assert state.lease.session == session
                assert (state.cancelled_at_ms is not None) == (task_id in holder.cancelled), task_id

    def drain(self) -> None:
        for session in list(self.holders):
            self.go_away(session)
        super().drain()


class TinyMemorySessionsMachine(SessionsMachine):
    """The same with room for almost nothing in memory."""

    is_tiny = True


_SETTINGS = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
SessionsMachine.TestCase.settings = _SETTINGS
TinyMemorySessionsMachine.TestCase.settings = _SETTINGS
TestSessions = SessionsMachine.TestCase
TestSessionsInTinyMemory = TinyMemorySessionsMachine.TestCase
