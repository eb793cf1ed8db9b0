"""Hand the due tasks of a node's shards to the workers that are connected to it.

Of each task group with a session that has room there is one *line*. It listens to the shards
as a poll does, and is woken per piece of work. A round gives to sessions in turn: first to
those with idle slots, then to those that only have room ahead. So a worker that could begin
at once never waits behind one that would only store the task.

Rounds are short and follow each other through the event loop, so that one busy task group
does not hold up the others.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from random import Random

from silo.errors import Overloaded, ShardClosed, StoreError
from silo.model.task import Leased
from silo.node.session import Session
from silo.shard.dispatch import Room
from silo.shard.shard import Shard

_ROUND_TASKS = 64  # Taken in one round, before others have their turn.
_TURN_TASKS = 8  # Given to one session, before the next has its turn.
_AGAIN_S = 0.1  # When a shard was overloaded.


class Delivery:
    """All lines of a node."""

    def __init__(self, shards: Callable[[], Sequence[Shard]]) -> None:
        """`shards`: those that are open at the moment."""
        self._shards = shards
        self._lines: dict[str, _Line] = {}
        self._rng = Random(0)  # Any order will do that does not repeat itself.
        self._is_stopped = False

    def __repr__(self) -> str:
        return f"Delivery({len(self._lines)} task groups)"

    def has_room(self, session: Session) -> None:
        """A session can take more, or less, than before."""
        if self._is_stopped:
            return
        for name in session.task_groups:
            line = self._lines.get(name)
            if line is None:
                if session.room <= 0:
                    continue
                line = _Line(name, self._shards_in_turn(), went_idle=self._drop_if_idle)
                self._lines[name] = line
            line.has_room(session)
            self._drop_if_idle(line)

    def leave(self, session: Session) -> None:
        """The session is gone."""
        for name in session.task_groups:
            line = self._lines.get(name)
            if line is not None:
                line.leave(session)
                self._drop_if_idle(line)

    def shards_changed(self) -> None:
        """A shard was opened or closed."""
        for line in self._lines.values():
            line.listen(self._shards())

    def stop(self) -> None:
        """Give nothing to anyone from now on."""
        self._is_stopped = True
        for line in self._lines.values():
            line.stop()
        self._lines.clear()

    def _shards_in_turn(self) -> Sequence[Shard]:
        """In another order each time: a line that is new whenever its only session has room is fair, too."""
        shards = self._shards()
        return self._rng.sample(shards, len(shards))

    def _drop_if_idle(self, line: "_Line") -> None:
        if line.is_idle and self._lines.get(line.task_group) is line:
            del self._lines[line.task_group]
            line.stop()


class _Line:
    """The sessions with room of one task group, in the order of their turns."""

    def __init__(
        self,
        task_group: str,
        shards: Iterable[Shard],
        *,
        went_idle: Callable[["_Line"], None],
    ) -> None:
        self.task_group = task_group
        self._went_idle = went_idle
        self._idle: dict[Session, None] = {}  # With an idle slot.
        self._ahead: dict[Session, None] = {}  # With room only.
        self._stops: dict[Shard, Callable[[], None]] = {}
        self._may_have: dict[Shard, None] = {}  # Shards that may have work, the next to be asked first.
        self._reading: set[asyncio.Task[None]] = set()
        self._next_round: asyncio.Handle | None = None
        self._again: asyncio.TimerHandle | None = None
        self.listen(shards)

    @property
    def is_idle(self) -> bool:
        return not self._idle and not self._ahead

    def has_room(self, session: Session) -> None:
        """A session can take more, or less, than before. It keeps its turn where that changes nothing."""
        if self._standing(session) is not self._standing_of(session):
            self._line_up(session)
            self.wake()

    def _line_up(self, session: Session) -> None:
        """Let it stand at the end, if it can take more."""
        self.leave(session)
        line = self._standing_of(session)
        if line is not None:
            line[session] = None

    def _standing(self, session: Session) -> dict[Session, None] | None:
        return self._idle if session in self._idle else self._ahead if session in self._ahead else None

    def _standing_of(self, session: Session) -> dict[Session, None] | None:
        if session.idle_slots > 0:
            return self._idle
        return self._ahead if session.has_room_ahead else None

    def leave(self, session: Session) -> None:
        self._idle.pop(session, None)
        self._ahead.pop(session, None)

    def listen(self, shards: Iterable[Shard]) -> None:
        """Be woken by these shards, and by no others."""
        wanted = dict.fromkeys(shards)
        for shard in [shard for shard in self._stops if shard not in wanted]:
            self._stops.pop(shard)()
            self._may_have.pop(shard, None)
        for shard in wanted:
            if shard not in self._stops:
                self._stops[shard] = shard.on_work(self.task_group, partial(self._has_work, shard))
                self._has_work(shard)

    def _has_work(self, shard: Shard) -> None:
        self._may_have[shard] = None
        self.wake()

    def stop(self) -> None:
        for handle in (self._next_round, self._again):
            if handle is not None:
                handle.cancel()
        self._next_round = self._again = None
        self._idle.clear()
        self._ahead.clear()
        for stop in self._stops.values():
            stop()
        self._stops.clear()
        self._may_have.clear()

    def wake(self) -> None:
        """Look for work as soon as the loop has time."""
        if self._next_round is None and self._may_have:
            self._next_round = asyncio.get_running_loop().call_soon(self._round)

    def _round(self) -> None:
        self._next_round = None
        left = _ROUND_TASKS
        while left > 0 and (session := self._next_session()) is not None:
            turn = max(_TURN_TASKS, _ROUND_TASKS // (len(self._idle) + len(self._ahead)))
            given = self._give(session, min(left, turn))
            if not given:
                break  # Whatever comes wakes us.
            left -= given
        if self.is_idle:
            self._went_idle(self)
        elif left <= 0:
            self.wake()

    def _next_session(self) -> Session | None:
        """Whose turn it is."""
        while (session := next(iter(self._idle or self._ahead), None)) is not None:
            if self._standing(session) is self._standing_of(session):
                break
            self._line_up(session)  # Another line has given to it, or its stream has ended.
        return session

    def _give(self, session: Session, count: int) -> int:
        """Take up to so many tasks for a session, whose turn is over then; how many there were."""
        room = Room(
            min(count, session.idle_slots if session in self._idle else session.room), refreshes_on_top=False
        )
        given = 0
        for shard in list(self._may_have):
            tasks = self._take(session, shard, room)
            if tasks:
                given += len(tasks)
                session.reserve(shard, tasks)
            if room.is_full:
                break
        self._line_up(session)
        return given

    def _take(self, session: Session, shard: Shard, room: Room) -> list[Leased]:
        try:
            tasks, feeding = shard.take_loaded(
                worker_id=session.worker_id, task_group=self.task_group, room=room, session=session.id
            )
        except (ShardClosed, StoreError):
            del self._may_have[shard]
            return []
        except Overloaded:
            self._look_again()
            return []
        del self._may_have[shard]
        if room.is_full or feeding is not None:
            self._may_have[shard] = None  # At the end: the others come first.
        if feeding is not None and not room.is_full and feeding not in self._reading:
            self._reading.add(feeding)
            feeding.add_done_callback(self._has_read)
        return tasks

    def _has_read(self, feeding: asyncio.Task[None]) -> None:
        self._reading.discard(feeding)
        self.wake()

    def _look_again(self) -> None:
        loop = asyncio.get_running_loop()
        if self._again is None or self._again.when() <= loop.time():
            self._again = loop.call_later(_AGAIN_S, self.wake)
