"""Start-up and shutdown of one server, read top down."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from random import Random

import msgspec

from silo.clock import SystemClock
from silo.config import Address, Config, MetricsConfig, parse_address
from silo.engine.retention import Retention
from silo.errors import StoreUnavailable
from silo.node.allocator import bound_allocator
from silo.node.hosting import HostedNode, host_shards
from silo.node.layout import Layout, load_layout
from silo.node.memory import Memory, bound_from, watched
from silo.node.readings import not_served, readings_served
from silo.shard.limiter import RateLimiter
from silo.shard.shard import ShardOptions
from silo.storage.journal import JournaledStorage
from silo.storage.slate import SlateStorage
from silo.telemetry.logging import Log

Listen = Callable[[str, HostedNode], AbstractAsyncContextManager[str]]
"""Serves a node at an address while the block runs, and yields the address that was bound.

Leaving the block lets calls under way finish, for a few seconds at most.
"""

OpenLimiter = Callable[[], AbstractAsyncContextManager[RateLimiter]]
"""Connects to the service that judges rate limits, for the length of the block."""

_LAYOUT_TIMEOUT_S = 30.0
_ANY_HOSTS = ("0.0.0.0", "::")

log = Log("silo.node.serve")


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """What a server that has started can say about itself."""

    address: str
    node_id: str
    shards: int
    metrics_address: str | None


async def serve(
    config: Config,
    listen: Listen,
    *,
    open_limiter: OpenLimiter | None = None,
    on_ready: Callable[[Ready], None] | None = None,
) -> None:
    """Run one node until SIGINT or SIGTERM. Shutdown is this ladder from the last line up.

    Raises:
        SiloError, OSError: it could not start: the data root is in use or not
            accessible, the address cannot be bound, or the rate limiter does not answer.
    """
    bound_allocator()
    await asyncio.to_thread(_check_address, parse_address("server.grpc_addr", config.server.grpc_addr))
    await asyncio.to_thread(_check_metrics_address, config.metrics)
    memory = Memory(bound_from(config.server.max_memory_mb))
    rng = Random()
    database = config.database
    storage = SlateStorage(
        database.root,
        durability=database.durability,
        flush_interval_ms=database.flush_interval_ms,
        settings=database.slatedb,
    )
    async with AsyncExitStack() as opened:
        # Before anything is written: without its limiter a server leaves no trace.
        limiter = await opened.enter_async_context(open_limiter()) if open_limiter is not None else None
        opened.enter_context(storage.lock())
        layout = await _load_layout(storage, config, rng)
        async with (
            stop_signals() as stopped,  # Outermost: a second signal counts while shards open and close, too.
            host_shards(
                layout,
                advertised_addr=config.coordination.advertised_grpc_addr or config.server.grpc_addr,
                tenancy_enabled=config.tenancy.enabled,
                dev_mode=config.server.dev_mode,
                storage=JournaledStorage(storage),
                clock=SystemClock(),
                rng=rng,
                options=ShardOptions(
                    priority_step_ms=config.dispatch.priority_step_ms,
                    max_pending_jobs=config.tenancy.max_pending_jobs,
                    retention=Retention(
                        succeeded_s=database.completed_job_expire_s,
                        unsuccessful_s=database.terminal_job_expire_s,
                    ),
                ),
                limiter=limiter,
                memory=memory,
            ) as node,
            watched(memory),
            listen(config.server.grpc_addr, node) as address,
            readings_served(config.metrics, node, durability=database.durability_in_force) as metrics_address,
        ):
            if config.coordination.advertised_grpc_addr is None:
                node.advertised_addr = address
                if parse_address("server.grpc_addr", config.server.grpc_addr).host in _ANY_HOSTS:
                    log.warning("no address for others: set advertised_grpc_addr", grpc_addr=address)
            ready = Ready(
                address=address,
                node_id=node.node_id,
                shards=len(layout.shards),
                metrics_address=metrics_address,
            )
            log.info(
                "server started",
                grpc_addr=address,
                metrics_addr=metrics_address or "none",
                node_id=node.node_id,
                shards=ready.shards,
                max_memory_mb=(memory.bound_bytes or 0) >> 20,
            )
            if on_ready is not None:
                on_ready(ready)
            await stopped.wait()
            log.info("server stopping")
            node.end_waits()  # Long polls answer now; the drain is for calls that do something.
    log.info("server stopped")


async def _load_layout(storage: SlateStorage, config: Config, rng: Random) -> Layout:
    try:
        async with asyncio.timeout(_LAYOUT_TIMEOUT_S):
            return await load_layout(storage, config.coordination, rng=rng)
    except TimeoutError as error:
        raise StoreUnavailable(
            f"{config.database.root} does not answer; check that it exists, the network and the credentials"
        ) from error


@asynccontextmanager
async def stop_signals() -> AsyncIterator[asyncio.Event]:
    """An event that SIGINT or SIGTERM sets. A second signal ends the process at once."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def stop() -> None:
        stopped.set()
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)  # Not Python's KeyboardInterrupt, which would wait for us.

    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield stopped
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number] or signal.SIG_DFL)


def _check_metrics_address(config: MetricsConfig) -> None:
    """The same for a configured address of metrics."""
    if config.enabled and config.addr is not None:
        try:
            _check_address(parse_address("metrics.addr", config.addr))
        except OSError as error:
            raise not_served(config.addr, error) from error


def _check_address(address: Address) -> None:
    """Bind and let go, before anything is opened: the system says best what is wrong with an address."""
    failure: OSError | None = None
    for family, kind, _, _, target in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        try:
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(target)
                return  # One is enough for gRPC.
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure
