"""The child processes of the benches: `python -m silo.cli.bench.roles ROLE ARGUMENT…`."""

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from silo.cli.bench import engine, network
from silo.node.allocator import bound_allocator

_ROLES: dict[str, Callable[[str, int], Awaitable[None]]] = {
    "fill": lambda folder, count: engine.fill(Path(folder), count),
    "produce": network.produce,
    "work": network.work,
    "wait": network.wait_for_work,
}


async def _play(role: str, argument: str, count: str) -> None:
    await _ROLES[role](argument, int(count))


if __name__ == "__main__":
    bound_allocator()
    uvloop.run(_play(*sys.argv[1:]))
