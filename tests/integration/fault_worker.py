"""A worker in a process of its own that writes down each run before it begins.

    python -m tests.integration.fault_worker ARGUMENTS

ARGUMENTS is the JSON of `Arguments`. It says "ready" when it works, and its errors on stderr.
"""

import asyncio
import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from silo import SiloGRPCClient, SiloWorker, TaskContext

GROUP = "faults"
QUICK_PINGS = {"grpc.keepalive_time_ms": 500, "grpc.http2.ping_timeout_ms": 500}


class Arguments(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told."""

    server: str
    dial: str  # Where to connect for that server.
    ledger: str
    worker_id: str
    slots: int
    pings_quickly: bool


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What a job asks for; its number is its result."""

    number: int
    takes_s: float = 0.0
    how: str = "awaits"  # Or "blocks" the event loop, or "holds" the interpreter lock, too.


def write_down(ledger: Path, context: TaskContext[Any, Any]) -> None:
    """One line, in one write: several processes have the file open."""
    line = f"{context.task.job_id} {context.task.attempt_number} {os.getpid()}\n"
    file = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


async def do(work: Work) -> int:
    match work.how:
        case "awaits":
            await asyncio.sleep(work.takes_s)
        case "blocks":
            time.sleep(work.takes_s)  # noqa: ASYNC251  # That is what is tested.
        case "holds":
            ctypes.PyDLL(None).sleep(int(work.takes_s))
        case _:
            raise ValueError(work.how)
    return work.number


async def main(arguments: Arguments) -> None:
    ledger = Path(arguments.ledger)

    async def handler(context: TaskContext[Work, dict[str, str]]) -> int:
        write_down(ledger, context)
        return await do(context.task.payload)

    async with SiloGRPCClient(
        arguments.dial,
        address_map={arguments.server: arguments.dial},
        grpc_client_options=QUICK_PINGS if arguments.pings_quickly else None,
    ) as client:
        worker = SiloWorker(
            client=client,
            worker_id=arguments.worker_id,
            task_group=GROUP,
            handler=handler,
            payload_type=Work,
            max_concurrent_tasks=arguments.slots,
            on_error=lambda error, context: print(context.task_id, repr(error), file=sys.stderr, flush=True),
        )
        await worker.run(on_ready=lambda: print("ready", flush=True))


if __name__ == "__main__":
    asyncio.run(main(msgspec.json.decode(sys.argv[1], type=Arguments)))
