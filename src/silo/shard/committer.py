"""Group commit: many commands, one atomic durable write.

Commands add their rows to the open group without waiting. While one group is
being written the next one fills; its commands are answered when it is durable.

Guarantees:
    ORDER      groups are written one after another, in the order they were filled.
    WHOLE      a group is durable as a whole or not at all.
    VISIBLE    `read` sees every row that was added, durable or not.
    STOPPED    after one failed write nothing more is written or answered as done.
"""

import asyncio
from collections.abc import Callable, Iterable

from silo.errors import ShardClosed, SiloError, StoreError, describe
from silo.storage.store import Group, Rows, Store

_ABSENT: Rows = {}


class _Reads:
    """Keys being read from the store, and what was written to them meanwhile."""

    def __init__(self, keys: list[bytes]) -> None:
        self.keys = keys
        self.written: Rows = {}


class Committer:
    """Writes one shard's groups to its store. `run` is its only loop."""

    def __init__(
        self,
        store: Store,
        *,
        seal: Callable[[Rows], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._store = store
        self._seal = seal
        self._failed = failed
        self.rows = Group()  # The open group. Added to between two awaits, never across one.
        self._writing = Group()
        self._waiters: list[asyncio.Future[None]] = []
        self._writing_waiters: list[asyncio.Future[None]] = []
        self._reads: set[_Reads] = set()
        self._wake = asyncio.Event()
        self._is_closing = False
        self._failure: ShardClosed | None = None
        self.groups_written = 0

    def __repr__(self) -> str:
        return f"Committer(open={len(self.rows)} rows, writing={len(self._writing)} rows)"

    def durable(self) -> asyncio.Future[None]:
        """Wait until all rows added so far are durable.

        Raises:
            ShardClosed: the write failed; it may or may not have been kept.
        """
        waiter = asyncio.get_running_loop().create_future()
        if self._failure is not None:
            waiter.set_exception(self._failure)
        elif self.rows:
            self._waiters.append(waiter)
            self._wake.set()
        elif self._writing:
            self._writing_waiters.append(waiter)
        else:
            waiter.set_result(None)
        return waiter

    def is_durable(self, key: bytes) -> bool:
        """Whether no write of `key` is outstanding."""
        return key not in self.rows and key not in self._writing

    def outstanding(self, start: bytes, end: bytes) -> Rows:
        """Rows of this range that are not in the store yet, the newest of each key."""
        found: Rows = {}
        for rows in (self._writing, self.rows):
            for key, value in rows.items():
                if start <= key < end:
                    found[key] = value
        return found

    async def read(self, keys: list[bytes]) -> list[bytes | None]:
        """The current values of `keys`, the open group included.

        They are current when this returns: no await stands between the last look and the return.

        Raises:
            ShardClosed: the store failed.
            StoreCorrupt: what is stored under one of the keys is damaged.
        """
        values: Rows = {}
        missing = [key for key in keys if not self._look(key, values)]
        if missing:
            reads = _Reads(missing)
            self._reads.add(reads)
            try:
                loaded = await self._store.get_many(missing)
            except StoreError:
                if self._failure is not None:
                    raise self._failure  # noqa: B904  # It has the store's error as its cause.
                raise
            finally:
                self._reads.discard(reads)
            values.update(zip(missing, loaded, strict=True))
            values.update(reads.written)
            for key in keys:
                self._look(key, values)
        return [values[key] for key in keys]

    def _look(self, key: bytes, values: Rows) -> bool:
        for rows in (self.rows, self._writing):
            value = rows.get(key, _ABSENT)
            if value is not _ABSENT:
                values[key] = value  # type: ignore[assignment]  # The sentinel was ruled out above.
                return True
        return False

    async def run(self) -> None:
        """Write groups until `finish` is called or a write fails."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(0)  # Whoever is ready to add a command joins this group.
            if not self.rows:
                self._wake.clear()
                if self._is_closing:
                    return
                continue
            if not await self._write_group():
                return

    async def _write_group(self) -> bool:
        rows, self.rows = self.rows, Group()
        waiters, self._waiters = self._waiters, []
        self._writing, self._writing_waiters = rows, waiters
        try:
            self._seal(rows)
            await self._store.write(rows)
        except SiloError as error:
            self.fail(error)
            return False
        self._writing = Group()
        self.groups_written += 1
        self._note_reads(rows)
        _resolve(waiters, None)
        return True

    def _note_reads(self, rows: Rows) -> None:
        for reads in self._reads:
            for key in reads.keys:
                if key in rows:
                    reads.written[key] = rows[key]

    def fail(self, cause: BaseException) -> None:
        """Stop: whoever waits, and whoever comes, is told that the shard has closed."""
        if self._failure is not None:
            return
        self._failure = ShardClosed("shard closed: the store failed", reason=describe(cause))
        self._failure.__cause__ = cause
        _resolve([*self._writing_waiters, *self._waiters], self._failure)
        self._failed(cause)

    def finish(self) -> None:
        """Let `run` return once everything added so far is durable."""
        self._is_closing = True
        self._wake.set()


def _resolve(waiters: Iterable[asyncio.Future[None]], error: BaseException | None) -> None:
    for waiter in waiters:
        if waiter.done():
            continue
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)
