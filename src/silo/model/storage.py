"""What a store is made of, for operators to look at."""

import msgspec


class SortedRun(msgspec.Struct, frozen=True, kw_only=True):
    """Tables that follow one another in key order, merged from earlier ones. A higher id is newer."""

    id: int
    tables: int
    bytes: int


class StorageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a store is made of, beyond its write-ahead log. Sizes are estimates."""

    level0_tables: int
    level0_bytes: int
    sorted_runs: tuple[SortedRun, ...]
