"""One worker on a stream: what it has, what it may still get, and what is to be told to it.

A task takes a place in the window when it is taken from its queue, and gives it back when
its report is acknowledged. In between it is *reserved* until its lease is durable, then *held*.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial

from silo.errors import ShardClosed, ShardNotFound, SiloError
from silo.model.floating import FloatingState
from silo.model.task import Leased
from silo.shard.shard import AnyReport, Shard

WINDOW_MAX = 2048
AHEAD_BYTES_MAX = 64 << 20  # Of large tasks that a worker has, before it gets more than it can begin.
LARGE_BYTES = 16 << 10
_PART_OF_WINDOW = 8
MESSAGE_BYTES = 4 << 20  # Of what goes with one message; the rest goes with the next.
UNREAD_MAX = 4096  # Acknowledgements that wait to be written, before no more reports are read.


class Outbox:
    """What waits to be written to a stream."""

    def __init__(self) -> None:
        self.acknowledged: deque[tuple[str, SiloError | None]] = deque()
        self.lost: deque[str] = deque()
        self.tasks: dict[str, tuple[str, Leased]] = {}  # By their ids, each with the id of its shard.
        self.cancelled: dict[str, int] = {}  # Task ids, each with the time.

    def __bool__(self) -> bool:
        return bool(self.acknowledged or self.lost or self.tasks or self.cancelled)

    def take(self) -> "Outbox":
        """What goes with the next message: `MESSAGE_BYTES` at most, or one task that is larger."""
        taken = Outbox()
        size = 0
        while self.acknowledged and size < MESSAGE_BYTES:
            task_id, refusal = answer = self.acknowledged.popleft()
            taken.acknowledged.append(answer)
            size += len(task_id) + (0 if refusal is None else len(refusal.message))
        while self.lost and size < MESSAGE_BYTES:
            taken.lost.append(self.lost.popleft())
            size += len(taken.lost[-1])
        for task_id, (shard_id, task) in self.tasks.items():
            size += _bytes_of(task)
            if taken and size > MESSAGE_BYTES:
                break
            taken.tasks[task_id] = (shard_id, task)
        for task_id in taken.tasks:
            del self.tasks[task_id]
        for task_id in [task_id for task_id in self.cancelled if task_id not in self.tasks]:
            # Never before its task: nobody could make anything of it.
            taken.cancelled[task_id] = self.cancelled.pop(task_id)
        return taken


class Session:
    """A worker's stream, from its first message to its end. A `LeaseHolder`."""

    def __init__(
        self,
        *,
        id: str,
        worker_id: str,
        task_groups: Iterable[str],
        slots: int,
        shard: Callable[[str], Shard],
        has_room: Callable[["Session"], None],
        hand_back: Callable[[Shard, list[str]], None],
    ) -> None:
        """`shard` finds the open shard of an id; `has_room` is called when more can be taken.

        `hand_back` gives tasks back that were taken and never written to the stream.
        """
        self.id = id
        self.worker_id = worker_id
        self.task_groups = tuple(dict.fromkeys(task_groups))
        self.slots = max(1, slots)
        self.held: dict[str, str] = {}  # Task ids, each with the id of its shard.
        self.outbox = Outbox()
        self.filled = asyncio.Event()  # Set when there is something to write, or the stream should end.
        self.drained = asyncio.Event()  # Set unless `UNREAD_MAX` acknowledgements wait.
        self.drained.set()
        self.is_closed = False
        self._shard = shard
        self._has_room = has_room
        self._hand_back = hand_back
        self._window = 0
        self._reserved = 0
        self._large: dict[str, int] = {}  # Of those reserved or held: how large they are, in bytes.
        self._large_bytes = 0
        # Of those held: their handlers have ended, and nobody need hear what becomes of their leases.
        self._reported: set[str] = set()

    def __repr__(self) -> str:
        return f"Session({self.worker_id!r}, {len(self.held)} of {self._window} tasks)"

    @property
    def room(self) -> int:
        """How many tasks may be taken for it now."""
        return 0 if self.is_closed else self._window - len(self.held) - self._reserved

    @property
    def idle_slots(self) -> int:
        """How many tasks it could begin at once."""
        return min(self.room, self.slots - len(self.held) - self._reserved + len(self._reported))

    @property
    def has_room_ahead(self) -> bool:
        """Whether it pays to send tasks that will wait: several at a time cost little more than one."""
        is_low = self.room > max(0, self._window - self.slots) // _PART_OF_WINDOW
        return is_low and self._large_bytes < AHEAD_BYTES_MAX

    def set_window(self, tasks: int) -> None:
        self._window = min(tasks, WINDOW_MAX)
        self._has_room(self)

    def close(self) -> None:
        """End the stream when what waits for it is written.

        Nothing more is taken for it, and tasks that were not written go back.
        """
        self.is_closed = True
        unsent: dict[str, list[str]] = {}
        for task_id, (shard_id, _) in self.outbox.tasks.items():
            unsent.setdefault(shard_id, []).append(task_id)
            self._forget(task_id)
            self.outbox.cancelled.pop(task_id, None)
        self.outbox.tasks.clear()
        for shard_id, task_ids in unsent.items():
            with suppress(ShardClosed, ShardNotFound):
                shard = self._shard(shard_id)
                shard.let_go(self, task_ids)
                self._hand_back(shard, task_ids)
        self.filled.set()

    def let_go(self) -> None:
        """The stream is gone: close, and renew nothing."""
        self.close()
        for shard_id, task_ids in self._held_by_shard().items():
            with suppress(ShardClosed, ShardNotFound):
                self._shard(shard_id).let_go(self, task_ids)
        self.held.clear()

    def take_outbox(self) -> Outbox:
        """What to write now; call again until there is nothing left."""
        taken = self.outbox.take()
        if len(self.outbox.acknowledged) < UNREAD_MAX:
            self.drained.set()
        return taken

    # Tasks

    def reserve(self, shard: Shard, tasks: list[Leased]) -> None:
        """Send tasks that were taken for it once their leases are durable."""
        self._reserved += len(tasks)
        for task in tasks:
            self._note_size(task_id_of(task), _bytes_of(task))

        def settle(is_durable: bool) -> None:
            self._reserved -= len(tasks)
            sent = self._send(shard, tasks) if is_durable else 0
            if not is_durable:
                for task in tasks:
                    self._forget(task_id_of(task))
            if sent < len(tasks):
                self._has_room(self)

        _once_settled(shard, settle)

    def _send(self, shard: Shard, tasks: list[Leased]) -> int:
        """Send tasks whose leases still stand; how many."""
        by_id = {task_id_of(task): task for task in tasks}
        if self.is_closed:
            self._hand_back(shard, list(by_id))
            return 0
        # Shards that have closed are asked again when they are open.
        with suppress(ShardClosed):
            for task_id in shard.hold(self, by_id, session=self.id):
                del by_id[task_id]  # Its lease ran out before it was durable.
                self._forget(task_id)
        self.held.update(dict.fromkeys(by_id, shard.shard_id))
        self.outbox.tasks.update((task_id, (shard.shard_id, task)) for task_id, task in by_id.items())
        self.filled.set()
        return len(by_id)

    def _note_size(self, task_id: str, size: int) -> None:
        if size > LARGE_BYTES:
            self._large[task_id] = size
            self._large_bytes += size

    def _forget(self, task_id: str) -> None:
        self.held.pop(task_id, None)
        self._large_bytes -= self._large.pop(task_id, 0)

    def adopt(self, held: Mapping[str, str]) -> None:
        """Go on with what the worker says it has, each task with the id of its shard."""
        self.held.update(held)
        for shard_id, task_ids in self._held_by_shard().items():
            with suppress(ShardClosed, ShardNotFound):
                shard = self._shard(shard_id)
                for task_id in task_ids:
                    if (task := shard.leased(task_id)) is not None:
                        self._note_size(task_id, task.payload_bytes)
        self.renew()

    def renew(self) -> None:
        """Renew the leases of all that it holds, and tell it of those that are gone."""
        for shard_id, task_ids in self._held_by_shard().items():
            try:
                shard = self._shard(shard_id)
                lost = shard.hold(self, task_ids, session=self.id)
            except ShardNotFound:
                self._lose(task_ids, True)
            except ShardClosed:
                pass  # It is asked again when it is open.
            else:
                if lost:
                    _once_settled(shard, partial(self._lose, lost))

    def _lose(self, task_ids: Iterable[str], is_durable: bool) -> None:
        if is_durable:
            for task_id in task_ids:
                self.was_lost(task_id)

    def _held_by_shard(self) -> dict[str, list[str]]:
        by_shard: dict[str, list[str]] = {}
        for task_id, shard_id in self.held.items():
            by_shard.setdefault(shard_id, []).append(task_id)
        return by_shard

    # Reports

    async def report(self, shard: Shard, reports: list[tuple[str, AnyReport]]) -> None:
        """Take reports on tasks of one shard, and acknowledge them once they are durable.

        A shard that closes meanwhile leaves them without an answer: the worker reports again.
        """
        task_ids = [task_id for task_id, _ in reports]
        shard.let_go(self, task_ids)
        known = self.held.keys() & task_ids
        self._reported |= known
        if known:
            self._has_room(self)
        try:
            answers = await shard.report_many(reports)
        except ShardClosed as error:
            answers = [error] * len(reports)
        self.acknowledge(zip(task_ids, answers, strict=True))

    def acknowledge(self, answers: Iterable[tuple[str, SiloError | None]]) -> None:
        """Answer reports. Each gives its place in the window back."""
        for task_id, answer in answers:
            self._reported.discard(task_id)
            if not isinstance(answer, ShardClosed):  # Then the worker reports again.
                self._forget(task_id)
            self.outbox.acknowledged.append((task_id, answer))
        if len(self.outbox.acknowledged) >= UNREAD_MAX:
            self.drained.clear()
        self.filled.set()
        self._has_room(self)

    # What others do to its leases

    def was_cancelled(self, task_id: str, cancelled_at_ms: int) -> None:
        if task_id in self.held and task_id not in self._reported:
            self.outbox.cancelled[task_id] = cancelled_at_ms
            self.filled.set()

    def was_lost(self, task_id: str) -> None:
        if task_id not in self.held or task_id in self._reported:
            return
        self._forget(task_id)
        self.outbox.cancelled.pop(task_id, None)
        if self.outbox.tasks.pop(task_id, None) is None:  # Otherwise it never heard of it.
            self.outbox.lost.append(task_id)
            self.filled.set()
        self._has_room(self)


def _once_settled(shard: Shard, then: Callable[[bool], None]) -> None:
    """Call it when all so far is durable, or never will be: with which of the two."""

    def settled(durable: asyncio.Future[None]) -> None:
        then(not durable.cancelled() and durable.exception() is None)

    shard.durable().add_done_callback(settled)


def _bytes_of(task: Leased) -> int:
    return task.payload_bytes if isinstance(task, FloatingState) else task.state.payload_bytes


def task_id_of(task: Leased) -> str:
    lease = task.lease if isinstance(task, FloatingState) else task.state.lease
    assert lease is not None, "what was taken is leased"
    return lease.task_id
