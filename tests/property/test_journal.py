"""A store with a journal is its plain store, whatever is applied when, and wherever it crashes."""

import asyncio
import contextlib
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from silo.errors import StoreError
from silo.storage import journal
from silo.storage.journal import JournaledStore
from silo.storage.memory import Fault, MemoryStorage
from silo.storage.store import Group
from tests.journaled import JournaledMemoryStorage

keys = st.sampled_from([b"a1", b"a2", b"b", b"q\x00", b"q\x01", b"q\xff", b"z"])
values = st.one_of(st.none(), st.binary(max_size=3))
batches = st.dictionaries(keys, values, max_size=5)
large = st.builds(bytes, st.just(journal.BATCH_BYTES_MAX + 1))


class JournalMachine(RuleBasedStateMachine):
    """Rows are told to be fresh where they are, as the engine does."""

    @initialize()
    def start(self) -> None:
        self.bounds = mock.patch.multiple(journal, ROWS_MANY=4, ROWS_MAX=8)
        self.bounds.start()
        self.loop = asyncio.new_event_loop()
        self.storage = JournaledMemoryStorage()
        self.model: dict[bytes, bytes] = {}
        self.store = self.loop.run_until_complete(self.reopened())

    async def reopened(self) -> JournaledStore:
        store = await self.storage.open("s")
        assert isinstance(store, JournaledStore)
        return store

    async def written(self, batch: dict[bytes, bytes | None]) -> None:
        group = Group()
        for key, value in batch.items():
            if key not in self.model and value is not None:
                group.fresh.add(key)
            group[key] = value
        await self.store.write(group)
        for key, value in batch.items():
            if value is None:
                self.model.pop(key, None)
            else:
                self.model[key] = value

    @rule(batch=batches)
    def write(self, batch: dict[bytes, bytes | None]) -> None:
        self.loop.run_until_complete(self.written(batch))

    @rule(key=keys, value=large)
    def write_much(self, key: bytes, value: bytes) -> None:
        self.loop.run_until_complete(self.written({key: value}))

    @rule()
    def apply(self) -> None:
        self.loop.run_until_complete(self.store.flush())

    @rule(batch=batches)
    def apply_while_writing(self, batch: dict[bytes, bytes | None]) -> None:
        async def both() -> None:
            applying = asyncio.ensure_future(self.store.flush())
            await asyncio.sleep(0)
            await self.written(batch)
            await self.all_is_there()
            await applying

        self.loop.run_until_complete(both())

    @rule(batch=batches)
    def give_up_applying(self, batch: dict[bytes, bytes | None]) -> None:
        """As a flush does whose caller hangs up. What comes later must not be overtaken by what was left."""

        async def give_up() -> None:
            self.storage.faults.plan("write", Fault.HANG)
            applying = asyncio.ensure_future(self.store.flush())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            applying.cancel()
            await asyncio.wait({applying})
            self.storage.faults.clear()
            await self.written(batch)

        self.loop.run_until_complete(give_up())

    @rule(is_applied=st.booleans())
    def crash_while_applying(self, is_applied: bool) -> None:
        fault = Fault.FAIL_AFTER if is_applied else Fault.FAIL_BEFORE

        async def crash() -> None:
            self.storage.faults.plan("write", fault)
            with contextlib.suppress(StoreError):
                await self.store.flush()
            self.storage.faults.clear()
            self.store = await self.reopened()

        self.loop.run_until_complete(crash())

    @rule(key=keys, value=large, is_applied=st.booleans())
    def write_much_behind_what_could_not_be_applied(self, key: bytes, value: bytes, is_applied: bool) -> None:
        """It may not overtake what the journal still has."""

        async def both() -> None:
            await self.written({key: b"before"})
            self.storage.faults.plan("write", Fault.FAIL_AFTER if is_applied else Fault.FAIL_BEFORE)
            applying = asyncio.ensure_future(self.store.flush())
            await asyncio.sleep(0)
            with pytest.raises(StoreError):
                await self.store.write({key: value})
            with contextlib.suppress(StoreError):
                await applying
            self.storage.faults.clear()
            self.store = await self.reopened()

        self.loop.run_until_complete(both())

    @rule()
    def crash(self) -> None:
        self.store = self.loop.run_until_complete(self.reopened())

    @rule()
    def close(self) -> None:
        async def again() -> None:
            await self.store.close()
            self.store = await self.reopened()

        self.loop.run_until_complete(again())

    @invariant()
    def nothing_differs(self) -> None:
        if hasattr(self, "store"):
            self.loop.run_until_complete(self.all_is_there())

    async def all_is_there(self) -> None:
        rows = sorted(self.model.items())
        assert await self.store.scan(b"\x00", b"\xff\xff", limit=100) == rows
        for limit in (1, 2, 3):
            assert (
                await self.store.scan(b"a", b"z", limit=limit)
                == [row for row in rows if b"a" <= row[0] < b"z"][:limit]
            )
        names = [b"a1", b"a2", b"b", b"q\x00", b"q\x01", b"q\xff", b"z", b"never"]
        assert await self.store.get_many(names) == [self.model.get(name) for name in names]
        assert self.storage.snapshot("s") == self.model

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.loop.run_until_complete(self.store.close())
            self.loop.run_until_complete(_cancel_others())  # Of stores that came before.
            self.loop.close()
            self.bounds.stop()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


JournalMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestJournal = JournalMachine.TestCase


async def test_an_applying_that_was_given_up_overtakes_nothing() -> None:
    storage = MemoryStorage()
    store = await JournaledStore.open(await storage.open("s"))
    await store.write({b"job": b"running"})
    storage.faults.plan("write", Fault.HANG)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await store.flush()
    storage.faults.clear()
    await store.write({b"job": b"succeeded"})
    await store.close()
    store = await JournaledStore.open(await storage.open("s"))
    assert await store.get(b"job") == b"succeeded"
    await store.close()


async def test_a_store_that_closes_while_it_applies_loses_the_order_of_nothing() -> None:
    storage = MemoryStorage()
    store = await JournaledStore.open(await storage.open("s"))
    await store.write({b"job": b"running"})
    storage.faults.plan("write", Fault.HANG)
    store._has_many.set()  # The applier begins now.
    await asyncio.sleep(0.01)
    storage.faults.clear()
    await store.write({b"job": b"succeeded"})
    await store.close()
    store = await JournaledStore.open(await storage.open("s"))
    assert await store.get(b"job") == b"succeeded"
    await store.close()


async def test_a_row_that_comes_and_goes_never_reaches_the_store() -> None:
    storage = MemoryStorage()
    store = await JournaledStore.open(await storage.open("s"))
    for value in (b"1", None):
        group = Group()
        group.fresh.add(b"q")
        group[b"q"] = value
        group[b"kept"] = b"1"
        await store.write(group)
    assert b"q" not in storage.snapshot("s")
    await store.flush()
    assert storage.snapshot("s") == {b"kept": b"1"}
    await store.close()
