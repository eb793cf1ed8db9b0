"""What the RPC layer needs from a node."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from silo.model.shards import ShardInfo
from silo.model.task import Leased
from silo.node.memory import Memory
from silo.node.sessions import Sessions
from silo.shard.shard import Shard


class Node(Protocol):
    """One server process and the shards it owns."""

    node_id: str
    advertised_addr: str
    tenancy_enabled: bool
    dev_mode: bool
    memory: Memory
    sessions: Sessions
    stopping: asyncio.Event  # Set when everyone who waits should go home.

    def shard_map(self) -> Sequence[ShardInfo]:
        """Every shard of the cluster, ascending by range."""

    def shard(self, shard_id: str) -> Shard:
        """The open shard of this id.

        Raises:
            ShardNotFound: it is not ours.
            ShardClosed: it is ours and not open at the moment; try again.
        """

    def open_shards(self) -> Sequence[Shard]:
        """The shards that can be used now."""

    async def lease_anywhere(
        self, *, worker_id: str, task_group: str, max_tasks: int, wait_ms: int
    ) -> list[tuple[str, Leased]]:
        """Tasks from any shard with the id of theirs; with none ready, waits up to `wait_ms` for one."""

    async def reset_shards(self) -> int:
        """Delete all data of every shard and open them empty; how many. For development only."""
