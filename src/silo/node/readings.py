"""What a node shows as metrics, read when somebody asks.

Names and labels are those that dashboards of Silo know. A shard's id is a label; a tenant's or a job's is
not, since there can be millions of them. Pending and running jobs are told from counts and leases.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

from silo.config import DEFAULT_METRICS_ADDR, MetricsConfig, parse_address
from silo.node.node import Node
from silo.shard.shard import Shard
from silo.telemetry.logging import Log
from silo.telemetry.metrics import MetricsNotServed, Reading, metrics_served

log = Log("silo.node.readings")


@asynccontextmanager
async def readings_served(config: MetricsConfig, node: Node, *, durability: str) -> AsyncIterator[str | None]:
    """Serve the node's metrics while the block runs; their address, None when they are not served.

    They are not when the configuration says so, or when it names no address and the default is taken:
    a second server on one machine starts all the same.

    Raises:
        MetricsNotServed: the configured address cannot be bound.
    """
    async with AsyncExitStack() as served:
        address: str | None = None
        if config.enabled:
            host, port = parse_address("metrics.addr", config.addr or DEFAULT_METRICS_ADDR)
            read = NodeReadings(node, durability=durability).read
            try:
                address = await served.enter_async_context(metrics_served(host, port, read))
            except OSError as error:
                if config.addr is not None:
                    raise not_served(config.addr, error) from error
                log.warning(
                    "metrics are not served: set metrics.addr, or metrics.enabled = false",
                    addr=DEFAULT_METRICS_ADDR,
                    reason=error.strerror or str(error),
                )
        yield address


def not_served(address: str, error: OSError) -> MetricsNotServed:
    """The error for a configured address that cannot be bound."""
    return MetricsNotServed(
        f"cannot serve metrics on {address}: {error.strerror or error}; "
        "choose another with metrics.addr, or set metrics.enabled = false"
    )


class NodeReadings:
    """Reads a node. Keeps what makes counters go on when a shard was opened again."""

    def __init__(self, node: Node, *, durability: str) -> None:
        self._node = node
        self._durability = durability
        self._groups = _Totals()

    def read(self) -> Iterator[Reading]:
        """All metrics of the node as it is now; takes microseconds for a shard and for ten leases."""
        shards = self._node.open_shards()
        yield _gauge("silo_shards_owned", "Shards that this node owns and has open.", {(): len(shards)})
        yield _gauge("silo_coordination_shards_open", "Shards open in this process.", {(): len(shards)})
        yield Reading(
            name="silo_durability_info",
            kind="gauge",
            help="1 for what an acknowledgement means here: flushed, buffered, or none.",
            labels=("level",),
            values={(self._durability,): 1},
        )
        sessions = self._node.sessions
        yield _gauge("silo_workers_connected", "Workers to which tasks are pushed.", {(): len(sessions)})
        yield _gauge("silo_tasks_pushed", "Tasks that these workers have.", {(): sessions.held})
        memory = self._node.memory
        yield _gauge(
            "silo_short_of_memory", "1 while new jobs are refused for lack of memory.", {(): memory.is_short}
        )
        if memory.bound_bytes is not None:
            yield _gauge(
                "silo_memory_bound_bytes",
                "Resident memory above which new jobs are refused.",
                {(): memory.bound_bytes},
            )
        yield from self._of_shards({shard.shard_id: shard for shard in shards})

    def _of_shards(self, shards: dict[str, Shard]) -> Iterator[Reading]:
        total: dict[tuple[str, ...], float] = {}
        terminal: dict[tuple[str, ...], float] = {}
        pending: dict[tuple[str, ...], float] = {}
        active: dict[tuple[str, ...], float] = {}
        rows: dict[tuple[str, ...], float] = {}
        queues: dict[tuple[str, ...], float] = {}
        groups: dict[tuple[str, ...], float] = {}
        for shard_id, shard in shards.items():
            counts, facts = shard.counts, shard.facts()
            total[shard_id,] = counts.total_jobs
            terminal[shard_id,] = counts.completed_jobs
            pending[shard_id,] = max(0, counts.total_jobs - counts.completed_jobs - facts.running_jobs)
            for task_group, number in facts.leases.items():
                active[shard_id, task_group] = number
            rows[shard_id,] = facts.rows_in_memory
            queues[shard_id,] = facts.queues_in_memory
            groups[shard_id,] = self._groups.total(shard_id, shard.groups_written)
        yield _of_shards("silo_shard_jobs", "Jobs that exist, ended ones included.", total)
        yield _of_shards("silo_shard_terminal_jobs", "Jobs that have ended and are kept.", terminal)
        yield _of_shards("silo_shard_pending_jobs", "Jobs that wait to run, now or later.", pending)
        yield Reading(
            name="silo_task_leases_active",
            kind="gauge",
            help="Tasks that workers hold.",
            labels=("shard", "task_group"),
            values=active,
        )
        yield _of_shards("silo_shard_rows_in_memory", "Queue and timer rows in memory.", rows)
        yield _of_shards("silo_shard_queues_in_memory", "Task groups with a queue in memory.", queues)
        yield Reading(
            name="silo_store_groups_written_total",
            kind="counter",
            help="Groups of changes written durably.",
            labels=("shard",),
            values=groups,
        )


class _Totals:
    """Counters that start again with their shard, as ones that do not."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}  # What earlier openings came to, and the last value.

    def total(self, shard_id: str, value: int) -> int:
        before, last = self._known.get(shard_id, (0, 0))
        if value < last:
            before += last
        self._known[shard_id] = (before, value)
        return before + value


def _gauge(name: str, help: str, values: dict[tuple[str, ...], float]) -> Reading:
    return Reading(name=name, kind="gauge", help=help, values=values)


def _of_shards(name: str, help: str, values: dict[tuple[str, ...], float]) -> Reading:
    return Reading(name=name, kind="gauge", help=help, labels=("shard",), values=values)
