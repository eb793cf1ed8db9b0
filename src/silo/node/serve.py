"""Start-up and shutdown of one server, read top down."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from random import Random

import msgspec

from silo.clock import SystemClock
from silo.config import Config, parse_address
from silo.node.hosting import HostedNode, host_shards
from silo.node.layout import load_layout
from silo.shard.shard import ShardOptions
from silo.storage.slate import SlateStorage
from silo.telemetry.logging import Log

Listen = Callable[[str, HostedNode], AbstractAsyncContextManager[str]]
"""Serves a node at an address while the block runs, and yields the address that was bound.

Leaving the block lets calls under way finish, for a few seconds at most.
"""

_ANY_HOSTS = ("0.0.0.0", "::", "*")

log = Log("silo.node.serve")


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """What a server that has started can say about itself."""

    address: str
    node_id: str
    shards: int


async def serve(config: Config, listen: Listen, *, on_ready: Callable[[Ready], None] | None = None) -> None:
    """Run one node until SIGINT or SIGTERM. Shutdown is this ladder from the last line up.

    Raises:
        SiloError, OSError: it could not start: the data root is in use or not
            accessible, or the address cannot be bound.
    """
    rng = Random()
    database = config.database
    storage = SlateStorage(
        database.root,
        durability=database.durability,
        flush_interval_ms=database.flush_interval_ms,
        settings=database.slatedb,
    )
    with storage.lock():
        layout = await load_layout(storage, config.coordination, rng=rng)
        async with (
            host_shards(
                layout,
                advertised_addr=config.coordination.advertised_grpc_addr or config.server.grpc_addr,
                tenancy_enabled=config.tenancy.enabled,
                dev_mode=config.server.dev_mode,
                storage=storage,
                clock=SystemClock(),
                rng=rng,
                options=ShardOptions(priority_step_ms=config.dispatch.priority_step_ms),
            ) as node,
            stop_signals() as stopped,
            listen(config.server.grpc_addr, node) as address,
        ):
            if config.coordination.advertised_grpc_addr is None:
                node.advertised_addr = address
                if parse_address("server.grpc_addr", config.server.grpc_addr).host in _ANY_HOSTS:
                    log.warning("no address for others: set advertised_grpc_addr", grpc_addr=address)
            log.info("server started", grpc_addr=address, node_id=node.node_id, shards=len(layout.shards))
            if on_ready is not None:
                on_ready(Ready(address=address, node_id=node.node_id, shards=len(layout.shards)))
            await stopped.wait()
            log.info("server stopping")
    log.info("server stopped")


@asynccontextmanager
async def stop_signals() -> AsyncIterator[asyncio.Event]:
    """An event that SIGINT or SIGTERM sets. A second signal acts as if nobody caught it."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def release() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    def stop() -> None:
        stopped.set()
        release()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield stopped
    finally:
        release()
