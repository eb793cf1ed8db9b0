"""The workers that are connected to a node: they join, come back, and leave."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

from silo.errors import ShardClosed, StoreError
from silo.model.attempt import HandedBack
from silo.node.delivery import Delivery
from silo.node.session import Session
from silo.shard.shard import Shard

RENEW_S = 2.5  # A quarter of a lease, so that one that was late has two more.
_SESSIONS_AT_ONCE = 50  # Renewed before others have their turn.


class Sessions:
    """All sessions of a node, and the delivery of tasks to them."""

    def __init__(self, *, shard: Callable[[str], Shard], open_shards: Callable[[], Sequence[Shard]]) -> None:
        self._shard = shard
        self._open_shards = open_shards
        self._delivery = Delivery(open_shards)
        self._sessions: dict[str, Session] = {}
        self._handing_back: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        return f"Sessions({len(self._sessions)}, {self._delivery!r})"

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def held(self) -> int:
        """Tasks that workers on streams have."""
        return sum(len(session.held) for session in self._sessions.values())

    def join(
        self,
        *,
        session_id: str,
        worker_id: str,
        task_groups: Iterable[str],
        slots: int,
        held: Mapping[str, str],
    ) -> Session:
        """Begin a session, or go on with one; an earlier stream of it ends.

        `held`: what the worker has, task ids with the ids of their shards.
        """
        earlier = self._sessions.get(session_id)
        if earlier is not None:
            self.leave(earlier)
        session = Session(
            id=session_id,
            worker_id=worker_id,
            task_groups=task_groups,
            slots=slots,
            shard=self._shard,
            has_room=self._delivery.has_room,
            hand_back=self._hand_back,
        )
        self._sessions[session_id] = session
        session.adopt(held)
        for shard in self._open_shards():
            self._take_back(session, shard)
        if self._is_closed:
            session.close()
        if self._renewing is None:
            loop = asyncio.get_running_loop()
            self._renewing = loop.create_task(self._renew_forever(), name="renew leases")
        return session

    def leave(self, session: Session) -> None:
        """The stream of a session has ended. Its leases run out unless it comes back first."""
        if self._sessions.get(session.id) is session:
            del self._sessions[session.id]
        self._delivery.leave(session)
        session.let_go()

    def shard_opened(self, shard: Shard) -> None:
        for session in list(self._sessions.values()):
            session.renew()
            self._take_back(session, shard)
        self._delivery.shards_changed()

    def shard_closed(self) -> None:
        self._delivery.shards_changed()

    def renew(self) -> None:
        """Renew the leases of all sessions now."""
        for session in list(self._sessions.values()):
            session.renew()

    def close(self) -> None:
        """Let all streams come to their ends, and begin none."""
        self._is_closed = True
        self._delivery.stop()
        for session in self._sessions.values():
            session.close()

    async def wait_closed(self) -> None:
        """Wait until nothing is under way any more."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait({self._renewing})
        if self._handing_back:
            await asyncio.wait(self._handing_back)

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            for number, session in enumerate(list(self._sessions.values()), 1):
                session.renew()
                if number % _SESSIONS_AT_ONCE == 0:
                    await asyncio.sleep(0)

    def _take_back(self, session: Session, shard: Shard) -> None:
        """Take back what was leased for a session and never reached its worker.

        Only before anything is taken for it from this shard.
        """
        if others := [task_id for task_id in shard.leased_for(session.id) if task_id not in session.held]:
            self._hand_back(shard, others)

    def _hand_back(self, shard: Shard, task_ids: list[str]) -> None:
        """Give tasks back that no worker has. If that fails, their leases run out."""

        async def report() -> None:
            with suppress(ShardClosed, StoreError):
                await shard.report_many([(task_id, HandedBack()) for task_id in task_ids])

        task = asyncio.get_running_loop().create_task(report(), name="hand back")
        self._handing_back.add(task)
        task.add_done_callback(self._handing_back.discard)
