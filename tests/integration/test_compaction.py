"""SlateDB merges its runs when asked to, and asking twice, or while it is at work, breaks nothing."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from silo.errors import StoreUnavailable
from silo.storage.slate import SlateStorage, SlateStore

FAST = {
    "compactor_options": {
        "poll_interval": "100ms",
        "commit_compacted_interval": "50ms",
        "worker": {"compactions_poll_interval": "50ms"},
    }
}


async def fill(store: SlateStore, number: int) -> None:
    """One more table at level 0."""
    await store.write({b"%d-%03d" % (number, row): bytes(500) for row in range(20)})
    await store.flush()


async def become(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until the background has brought this about."""
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110  # It happens in threads of the store.
            await asyncio.sleep(0.02)


async def settled(store: SlateStore) -> None:
    """Wait until no compaction is under way or asked for."""

    async def is_idle() -> bool:
        return not await store._compactions._active()

    await become(is_idle)


async def with_a_run(store: SlateStore) -> None:
    """Wait until what was filled in has become a sorted run."""
    for number in range(8):
        await fill(store, number)

    async def has_a_run() -> bool:
        return bool((await store.storage_info()).sorted_runs)

    await become(has_a_run)
    await settled(store)


async def test_a_compaction_frees_what_deleted_rows_took(tmp_path: Path) -> None:
    store = await SlateStorage(str(tmp_path), settings=FAST).open("s")
    await with_a_run(store)
    for number in range(8):
        await store.write({b"%d-%03d" % (number, row): None for row in range(20)})
        await store.flush()
    number = 0

    async def is_freed() -> bool:
        # The newest run is never merged, so something has to be newer than the deletions.
        nonlocal number
        number += 1
        await store.write({b"x%d" % number: b"1"})
        await store.flush()
        await store.compact()
        runs = (await store.storage_info()).sorted_runs
        return sum(run.bytes for run in runs) < 20_000

    await become(is_freed)
    assert await store.scan(b"0", b"9", limit=1000) == []
    await store.close()


async def test_asking_twice_asks_once(tmp_path: Path) -> None:
    store = await SlateStorage(str(tmp_path), settings=FAST).open("s")
    await with_a_run(store)

    async with asyncio.timeout(30):
        await asyncio.gather(*(store.compact() for _ in range(5)))
        asked = [each for each in await store._compactions._active() if _is_merge(each)]
    await settled(store)

    assert len(asked) <= 1
    await store.write({b"after": b"1"})
    assert await store.get(b"after") == b"1"
    await store.close()


async def test_asking_all_the_time_while_the_store_is_at_work_breaks_nothing(tmp_path: Path) -> None:
    storage = SlateStorage(str(tmp_path), settings=FAST)
    store = await storage.open("s")

    async def ask(filling: "asyncio.Task[None]") -> None:
        while not filling.done():
            try:
                await store.compact()
            except StoreUnavailable as error:
                assert "busy merging" in error.message
            await asyncio.sleep(0)

    async def fill_all() -> None:
        for number in range(60):
            await fill(store, number)

    async with asyncio.timeout(60):
        filling = asyncio.create_task(fill_all())
        await asyncio.gather(filling, ask(filling), ask(filling))
    assert len(await store.scan(b"0", b":", limit=10_000)) == 60 * 20
    await store.close()

    again = await storage.open("s")
    assert len(await again.scan(b"0", b":", limit=10_000)) == 60 * 20
    await again.close()


def _is_merge(compaction: object) -> bool:
    sources = compaction.spec.sources  # type: ignore[attr-defined]
    return all(source.is_sorted_run() for source in sources)
