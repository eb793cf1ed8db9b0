"""What operators ask of a shard has a deadline, and its failure stops nothing."""

from collections.abc import Awaitable, Callable

import pytest

from silo.errors import ShardClosed, StoreError, StoreUnavailable
from silo.shard.shard import Shard, ShardOptions
from silo.storage.memory import Fault, MemoryStorage
from tests.builders import SHARD, a_job, open_shard

_CALLS: dict[str, Callable[[Shard], Awaitable[object]]] = {
    "flush": lambda shard: shard.flush(),
    "compact": lambda shard: shard.compact(),
    "info": lambda shard: shard.storage_info(),
}


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("operation", _CALLS)
async def test_a_failure_or_a_hung_store_is_answered_and_the_shard_goes_on(
    operation: str, fault: Fault
) -> None:
    storage = MemoryStorage()
    async with open_shard(storage, options=ShardOptions(store_timeout_s=0.02)) as shard:
        storage.faults.plan(operation, fault)
        text = "in time" if fault is Fault.HANG else "injected"
        with pytest.raises(StoreUnavailable, match=text):
            await _CALLS[operation](shard)

        await _CALLS[operation](shard)
        assert await shard.enqueue(a_job("j")) == "j"


@pytest.mark.parametrize("operation", _CALLS)
async def test_a_closed_shard_refuses(operation: str) -> None:
    async with open_shard() as shard:
        pass
    with pytest.raises(ShardClosed):
        await _CALLS[operation](shard)


async def test_a_flush_covers_what_was_not_durable_when_it_began() -> None:
    storage = MemoryStorage()
    async with open_shard(storage) as shard:
        before = storage.faults.calls["write"]
        storage.faults.plan("write", Fault.FAIL_BEFORE)
        shard._committer.rows[b"x"] = b"1"  # An open group, as a command under way leaves it.
        with pytest.raises((ShardClosed, StoreError)):
            await shard.flush()

        assert storage.faults.calls["write"] > before
        assert storage.faults.calls["flush"] == 0
    assert b"x" not in storage.snapshot(SHARD)
