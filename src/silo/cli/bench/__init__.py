"""`silo bench`: figures of this machine, one JSON object a run."""

import json
from collections.abc import Awaitable, Callable, Mapping

import uvloop

from silo.cli.bench import engine, limits, network
from silo.cli.bench.measure import machine_facts
from silo.node.allocator import bound_allocator

Bench = Callable[[int | None], Awaitable[dict[str, object]]]

BENCHES: Mapping[str, tuple[Bench, str]] = {
    "engine": (engine.lifecycles, "enqueue, lease and report on one shard, empty and with a backlog"),
    "limits": (limits.limits, "the same with limits on jobs; a million queues, and a million jobs in one"),
    "backlog": (engine.backlog, "memory with a large backlog, and reopening after kill -9"),
    "fairness": (engine.fairness, "one job of a new tenant against 100 000 of another"),
    "latency": (network.latency, "enqueue to start, end to result, cancel to seen; idle worker, real server"),
    "idle": (network.idle, "memory and processor of a server with 1 000 idle workers and 10 000 task groups"),
    "e2e": (network.end_to_end, "server, producer and worker as three processes"),
}


def run(name: str, *, jobs: int | None = None, as_json: bool = False) -> None:
    """Run one bench and print its figures.

    Raises:
        KeyError: there is no bench of this name.
    """
    bound_allocator()
    bench, _ = BENCHES[name]
    figures = uvloop.run(_measured(name, bench, jobs))
    if as_json:
        print(json.dumps(figures))
    else:
        for key, value in figures.items():
            print(f"{key:28} {value}")


async def _measured(name: str, bench: Bench, jobs: int | None) -> dict[str, object]:
    return {"bench": name, **await bench(jobs), **machine_facts()}
