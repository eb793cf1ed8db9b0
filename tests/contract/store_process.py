"""A program that writes numbered batches to a local store, or holds its lock, until it is killed.

    python store_process.py write ROOT FIRST BYTES [FILE_BYTES_MAX]
                                        prints each number when its write has returned
    python store_process.py lock ROOT   prints "locked" when it holds the lock

A batch `n` is the rows `0/n` to `7/n`, all with the same value; every fifth one also deletes
the rows of the batch before it. When a write fails the program prints the reason and ends.
"""

import asyncio
import resource
import sys
from collections.abc import Iterable

from silo.errors import StoreError
from silo.storage.slate import SlateStorage
from silo.storage.store import Batch

ROWS = 8


def key(row: int, number: int) -> bytes:
    return b"%d/%08d" % (row, number)


def batch(number: int, value_bytes: int) -> Batch:
    rows: dict[bytes, bytes | None] = {key(row, number): _value(number, value_bytes) for row in range(ROWS)}
    if number % 5 == 0:
        rows |= {key(row, number - 1): None for row in range(ROWS)}
    return rows


def expected(numbers: Iterable[int], value_bytes: int) -> dict[bytes, bytes]:
    """All rows of a store after these batches."""
    rows: dict[bytes, bytes] = {}
    for number in numbers:
        for row_key, value in batch(number, value_bytes).items():
            rows.pop(row_key, None)
            if value is not None:
                rows[row_key] = value
    return rows


def _value(number: int, value_bytes: int) -> bytes:
    return (b"%08d" % number) * (value_bytes // 8)


async def _write(root: str, first: int, value_bytes: int) -> None:
    number = first
    try:
        store = await SlateStorage(root).open("s")
        print("open", flush=True)
        while True:
            await store.write(batch(number, value_bytes))
            print(number, flush=True)
            number += 1
    except StoreError as error:
        print(f"failed: {type(error).__name__}: {error}", flush=True)


def _lock(root: str) -> None:
    try:
        with SlateStorage(root).lock():
            print("locked", flush=True)
            sys.stdin.read()
    except StoreError as error:
        print(f"failed: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", root, first, value_bytes, *file_bytes_max]:
            for limit in map(int, file_bytes_max):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            asyncio.run(_write(root, int(first), int(value_bytes)))
        case ["lock", root]:
            _lock(root)
        case _:
            sys.exit(__doc__)
