"""A window holds exactly the head of its range, whatever is written while it is read."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from silo.model.job import JobState, JobStatus
from silo.shard.window import Window

_LIMIT = 4
_keys = st.integers(0, 30).map(lambda number: b"k%02d" % number)


def _state(key: bytes, version: int) -> JobState:
    return JobState(
        tenant="t",
        job_id=key.decode(),
        task_group="g",
        priority=0,
        retry_policy=None,
        status=JobStatus.SCHEDULED,
        changed_at_ms=version,
        attempts_ended=0,
        relative_attempt_number=1,
    )


class WindowMachine(RuleBasedStateMachine):
    """Inserts, removes, group commits and refills in any order.

    `rows` is the truth. `store` shows it late: the writes in `outstanding` are not there yet,
    as with the group being filled or written.
    """

    @initialize(keys=st.sets(_keys), is_empty=st.booleans())
    def start(self, keys: set[bytes], is_empty: bool) -> None:
        self.version = 0
        self.rows = {} if is_empty else {key: _state(key, 0) for key in keys}
        self.store = dict(self.rows)
        self.outstanding: dict[bytes, JobState | None] = {}
        self.read_at: bytes | None = None
        self.found: list[tuple[bytes, JobState]] | None = None
        self.window = Window(None if is_empty else b"k")

    @rule(key=_keys)
    def insert(self, key: bytes) -> None:
        if key in self.rows:
            return
        self.version += 1
        state = _state(key, self.version)
        self.rows[key] = state
        self.outstanding[key] = state
        is_in = self.window.insert(key, state, limit=_LIMIT)
        assert is_in == (key in self.window) or len(self.window) == _LIMIT

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.rows:
            key = data.draw(st.sampled_from(sorted(self.rows)))
            del self.rows[key]
            self.outstanding[key] = None
            self.window.remove(key)

    @rule()
    def commit(self) -> None:
        for key, state in self.outstanding.items():
            self.store.pop(key, None)
            if state is not None:
                self.store[key] = state
        self.outstanding = {}

    @precondition(lambda self: not self.window.is_complete and not self.window.is_refilling)
    @rule()
    def begin_refill(self) -> None:
        bound = self.window.bound
        assert bound is not None
        self.read_at = self.window.begin_refill({k: s for k, s in self.outstanding.items() if k >= bound})
        self.found = None
        assert self.read_at == bound

    @precondition(lambda self: self.read_at is not None and self.found is None)
    @rule(count=st.integers(1, 6))
    def read(self, count: int) -> None:
        """The store reads at some time between the begin and the end of the refill."""
        assert self.read_at is not None
        rows = sorted(row for row in self.store.items() if row[0] >= self.read_at)
        self.found, self.is_exhausted = rows[:count], len(rows) < count

    @precondition(lambda self: self.found is not None)
    @rule()
    def finish_refill(self) -> None:
        assert self.found is not None
        read_to = None if self.is_exhausted else self.found[-1][0]
        self.window.finish_refill(self.found, read_to=read_to)
        self.read_at = self.found = None
        assert not self.window.is_refilling

    @precondition(lambda self: self.read_at is not None)
    @rule()
    def abandon_refill(self) -> None:
        self.window.abandon_refill()
        self.read_at = self.found = None

    @invariant()
    def head_and_complete_hold(self) -> None:
        bound = self.window.bound
        head = sorted(key for key in self.rows if bound is None or key < bound)
        assert [self.window.get(key) for key in head] == [self.rows[key] for key in head]
        assert len(self.window) == len(head)
        assert all((key in self.window) == (key in head) for key in self.rows)
        assert self.window.is_complete == (bound is None)

    @invariant()
    def looks_agree(self) -> None:
        bound = self.window.bound
        head = [self.rows[key] for key in sorted(self.rows) if bound is None or key < bound]
        assert self.window.first_key == (head[0].job_id.encode() if head else None)
        assert [self.window.state_at(index) for index in range(len(head) + 1)] == [*head, None]
        if head:
            assert self.window.first() == head[0]

    @invariant()
    def memory_is_bounded(self) -> None:
        assert len(self.window) <= 2 * _LIMIT + 6 + 31  # A refill takes in what was written meanwhile.


TestWindow = WindowMachine.TestCase
TestWindow.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_refill_that_a_trim_has_overtaken_is_void() -> None:
    window = Window(b"k")
    window.begin_refill({})
    window.finish_refill([(b"k20", _state(b"k20", 0))], read_to=b"k20")
    window.begin_refill({})
    for number in range(2 * _LIMIT):
        key = b"k%02d" % number
        window.insert(key, _state(key, 1), limit=_LIMIT)
    bound = window.bound

    window.finish_refill([(b"k25", _state(b"k25", 0))], read_to=None)

    assert window.bound == bound == b"k04"
    assert b"k25" not in window


def test_a_complete_window_refuses_a_refill() -> None:
    with pytest.raises(AssertionError, match="complete"):
        Window(None).begin_refill({})
