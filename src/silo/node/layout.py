"""The layout of a data root: which shards there are, and the name of the node.

It is made once, when a server first starts on an empty root, and kept as one record in a
small store of its own beside the shards. The settings that shaped it have no effect later.
"""

from random import Random
from typing import Protocol

import msgspec

from silo.config import CoordinationConfig
from silo.errors import StoreCorrupt
from silo.model.shards import ShardInfo, initial_ranges
from silo.storage.store import Store
from silo.telemetry.logging import Log
from silo.uuids import uuid_text

LAYOUT_STORE = "_layout"
LAYOUT_VERSION = 1
_KEY = b"layout"

log = Log("silo.node.layout")


class Storage(Protocol):
    """Where stores are, by name."""

    async def open(self, name: str) -> Store:
        """Open the store `name`, made when it is missing; whoever had it open is fenced.

        Raises:
            StoreError: the storage does not answer, or what is there does not decode.
        """

    async def destroy(self, name: str) -> None:
        """Delete everything in the store `name`, which nobody has open. Harmless when there is none."""


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    node_id: str
    shards: tuple[ShardInfo, ...]  # In the order of their ranges.


class _Version(msgspec.Struct, frozen=True):
    version: int


async def load_layout(storage: Storage, coordination: CoordinationConfig, *, rng: Random) -> Layout:
    """The layout of this data root, made and stored first when the root is new.

    Raises:
        StoreCorrupt: the record does not decode, or a newer Silo wrote it.
        StoreError: the storage failed.
    """
    store = await storage.open(LAYOUT_STORE)
    try:
        value = await store.get(_KEY)
        if value is None:
            layout = _new_layout(coordination, rng)
            await store.write({_KEY: msgspec.json.encode(layout)})
            log.info("data root created", shards=len(layout.shards))
        else:
            layout = _decode(value)
    finally:
        await store.close()
    wanted = coordination.initial_shard_count
    if len(layout.shards) != wanted:
        log.info("initial_shard_count ignored: the shards exist", shards=len(layout.shards), wanted=wanted)
    if coordination.node_id is not None:
        layout = msgspec.structs.replace(layout, node_id=coordination.node_id)
    return layout


def _new_layout(coordination: CoordinationConfig, rng: Random) -> Layout:
    ranges = initial_ranges(coordination.initial_shard_count)
    return Layout(
        version=LAYOUT_VERSION,
        node_id=_random_id(rng),
        shards=tuple(ShardInfo(_random_id(rng), range) for range in ranges),
    )


def _random_id(rng: Random) -> str:
    return uuid_text(rng.getrandbits(128), version=4)


def _decode(value: bytes) -> Layout:
    try:
        version = msgspec.json.decode(value, type=_Version).version
        if version > LAYOUT_VERSION:
            raise StoreCorrupt("a newer silo wrote this data root; start that version", version=version)
        return msgspec.json.decode(value, type=Layout)
    except msgspec.MsgspecError as error:
        raise StoreCorrupt("the layout of the data root does not decode", store=LAYOUT_STORE) from error
