"""A real server in this process: shards in memory, a real clock, a free loopback port."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from uuid import UUID

from silo.clock import SystemClock
from silo.model.shards import ShardInfo, initial_ranges
from silo.node.hosting import host_shards
from silo.node.layout import LAYOUT_VERSION, Layout
from silo.rpc.server import OPEN, Security, listen
from silo.shard.shard import ShardOptions
from silo.storage.memory import MemoryStorage


@asynccontextmanager
async def real_silo(
    addr: str = "127.0.0.1:0",
    *,
    shards: int = 1,
    security: Security = OPEN,
    advertised: str | None = None,
    extension: bool = True,
) -> AsyncIterator[str]:
    """A server that runs while the block runs; its address, which it tells others unless told what to."""
    rng = Random(7)
    layout = Layout(
        version=LAYOUT_VERSION,
        node_id="node-1",
        shards=tuple(
            ShardInfo(str(UUID(int=rng.getrandbits(128), version=4)), range)
            for range in initial_ranges(shards)
        ),
    )
    async with (
        host_shards(
            layout,
            advertised_addr=addr,
            tenancy_enabled=False,
            dev_mode=True,
            storage=MemoryStorage(),
            clock=SystemClock(),
            rng=rng,
            options=ShardOptions(),
        ) as node,
        listen(addr, node, security=security, extension=extension) as address,
    ):
        node.advertised_addr = advertised or address
        yield address
