"""Tenant hashing and the ranges that shards cover."""

from itertools import pairwise

import msgspec
import xxhash


def hash_tenant(tenant: str) -> str:
    """XXH64 with seed 0 over the UTF-8 bytes, as 16 lower-case hexadecimal digits."""
    return xxhash.xxh64_hexdigest(tenant.encode())


class HashRange(msgspec.Struct, frozen=True):
    """Half-open range of hash strings, compared as text; an empty bound is unbounded."""

    start: str = ""
    end: str = ""

    def contains(self, hashed: str) -> bool:
        return self.start <= hashed and (not self.end or hashed < self.end)

    def __str__(self) -> str:
        return f"[{self.start or '-∞'}, {self.end or '+∞'})"


class ShardInfo(msgspec.Struct, frozen=True):
    """One entry of the shard map."""

    shard_id: str
    range: HashRange


def initial_ranges(count: int) -> list[HashRange]:
    """`count` contiguous ranges of equal width that cover the hash space.

    Raises:
        ValueError: `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"a cluster has at least one shard, not {count}")
    inner = [f"{(i << 64) // count:016x}" for i in range(1, count)]
    bounds = ["", *inner, ""]
    return [HashRange(start, end) for start, end in pairwise(bounds)]
