"""Keeps the shards of this node open: opens, reopens after a failure, closes.

Each shard has one task that opens it, waits until it stops and opens it again, later
each time. Nothing else opens or closes shards, so a shard is open at most once. While a
shard is away its callers are told to try again; the other shards do not notice.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import NoReturn

from silo.clock import Clock
from silo.errors import InvalidRequest, ShardClosed, SiloError, StoreFenced
from silo.model.job import LeasedTask
from silo.model.shards import ShardInfo
from silo.node.layout import Layout, Storage
from silo.node.node import ShardNotFound
from silo.shard.shard import Shard, ShardOptions
from silo.telemetry.logging import Log

REOPEN_DELAY_MIN_S = 0.05
REOPEN_DELAY_MAX_S = 5.0
CLOSE_TIMEOUT_S = 25.0  # With the drain of the listener before it: 30 s in all.
_STEADY_S = 60.0  # A shard that was open this long is reopened without delay.


class HostedNode:
    """A node that owns every shard of its data root. Implements `Node`."""
