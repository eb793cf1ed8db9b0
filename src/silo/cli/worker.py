"""`silo worker module:object`: run a worker or a handler from the command line."""

import asyncio
import importlib
import inspect
import os
import socket
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from silo import SiloGRPCClient, SiloWorker
from silo.errors import ErrorKind, SiloError


class BadTarget(SiloError):
    """The text says what `module:object` is wrong about, and what would do."""

    kind = ErrorKind.INVALID


def load_target(target: str) -> object:
    """The object that `module:object` names; the current directory is searched first.

    Raises:
        BadTarget: there is no such module or object.
    """
    module_name, separator, name = target.partition(":")
    if not (module_name and separator and name):
        raise BadTarget(f"{target!r} is not of the form module:object, such as myapp.jobs:handler")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise
        raise BadTarget(f"no module {module_name!r}; searched {here} and the installed packages") from error
    if not hasattr(module, name):
        close = get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise BadTarget(f"module {module_name!r} has no {name!r}{hint}")
    return getattr(module, name)


def run_worker(
    target: str,
    *,
    task_group: str | None,
    concurrency: int,
    servers: Sequence[str],
    tenant: str | None = None,
    token: str | None = None,
    worker_id: str | None = None,
) -> None:
    """Run until SIGINT or SIGTERM.

    Raises:
        BadTarget: the target is neither a SiloWorker nor an async function.
    """
    found = load_target(target)
    asyncio.run(
        _run(
            found,
            target=target,
            task_group=task_group,
            concurrency=concurrency,
            servers=servers,
            tenant=tenant,
            token=token,
            worker_id=worker_id,
        )
    )


async def _run(
    found: object,
    *,
    target: str,
    task_group: str | None,
    concurrency: int,
    servers: Sequence[str],
    tenant: str | None,
    token: str | None,
    worker_id: str | None,
) -> None:
    if isinstance(found, SiloWorker):
        await found.run()
        return
    if not inspect.iscoroutinefunction(found):
        raise BadTarget(f"{target} is a {type(found).__name__}; give an async function or a SiloWorker")
    if not task_group:
        raise BadTarget("a handler needs --task-group")
    async with SiloGRPCClient(servers=list(servers), token=token) as client:
        worker = SiloWorker(
            client=client,
            worker_id=worker_id or f"{socket.gethostname()}-{os.getpid()}",
            task_group=task_group,
            handler=found,
            tenant=tenant,
            max_concurrent_tasks=concurrency,
        )
        print(f"worker {worker.worker_id} runs {target} on task group {task_group!r}; Ctrl-C stops it")
        await worker.run()
