"""`silo worker module:object`: run a worker or a handler from the command line."""

import asyncio
import importlib
import inspect
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any  # What a worker's jobs carry is the application's.

from silo import SiloGRPCClient, SiloWorker, TlsOptions
from silo.client.topology import bare_address
from silo.config import parse_address
from silo.errors import ErrorKind, SiloError

DEFAULT_SERVER = "127.0.0.1:7450"
DEFAULT_CONCURRENCY = 10


class BadTarget(SiloError):
    """The text says what `module:object` is wrong about, and what would do."""

    kind = ErrorKind.INVALID


def load_target(target: str) -> object:
    """The object that `module:object` names; the current directory is searched first.

    Raises:
        BadTarget: there is no such module or object, or the module does not import.
    """
    module_name, separator, name = target.partition(":")
    if not (separator and name and all(part.isidentifier() for part in module_name.split("."))):
        raise BadTarget(f"{target!r} is not of the form module:object, such as myapp.jobs:handler")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _import_failure(module_name, error) from error
        raise BadTarget(f"no module {module_name!r}; searched {here} and the installed packages") from error
    except Exception as error:  # The edge around user code: whatever it raises is one line to its author.
        raise _import_failure(module_name, error) from error
    if not hasattr(module, name):
        close = get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise BadTarget(f"module {module_name!r} has no {name!r}{hint}")
    return getattr(module, name)


def _import_failure(module_name: str, error: Exception) -> BadTarget:
    frames = traceback.extract_tb(error.__traceback__)
    where = "" if isinstance(error, SyntaxError) else f" ({frames[-1].filename}, line {frames[-1].lineno})"
    return BadTarget(f"module {module_name!r} does not import: {type(error).__name__}: {error}{where}")


def run_worker(
    target: str,
    *,
    task_group: str | None = None,
    concurrency: int | None = None,
    servers: Sequence[str] | None = None,
    tenant: str | None = None,
    token: str | None = None,
    tls: bool | TlsOptions | None = None,
    worker_id: str | None = None,
) -> None:
    """Run until SIGINT or SIGTERM, then let running jobs end.

    Raises:
        BadTarget: the target is neither a SiloWorker nor an async function, or an option does not fit it.
        ConfigError: a server's address is none, or a file of `tls` is unusable.
    """
    for server in servers or ():
        parse_address("--server", bare_address(server))
    if token is not None and not token.strip():
        raise BadTarget("the token is empty; leave it out or give one")
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
            tls=tls,
            worker_id=worker_id,
        )
    )


async def _run(
    found: object,
    *,
    target: str,
    task_group: str | None,
    concurrency: int | None,
    servers: Sequence[str] | None,
    tenant: str | None,
    token: str | None,
    tls: bool | TlsOptions | None,
    worker_id: str | None,
) -> None:
    if isinstance(found, SiloWorker):
        given = {
            "--task-group": task_group,
            "--concurrency": concurrency,
            "--server": servers,
            "--tls": tls is True,
            "--tls-ca, --tls-cert and --tls-key": isinstance(tls, TlsOptions),
        }
        for option in (name for name, value in given.items() if value):
            raise BadTarget(f"{target} is a SiloWorker, which brings its own settings; leave out {option}")
        await found.run(on_ready=lambda: _announce(found, target))
        return
    if not inspect.iscoroutinefunction(found):
        kind = type(found).__name__
        raise BadTarget(f"{target} is of type {kind}; give an async function or a SiloWorker")
    if not task_group:
        raise BadTarget("a handler needs --task-group")
    async with SiloGRPCClient(servers=list(servers or (DEFAULT_SERVER,)), token=token, tls=tls) as client:
        worker = SiloWorker(
            client=client,
            worker_id=worker_id or f"{socket.gethostname()}-{os.getpid()}",
            task_group=task_group,
            handler=found,
            tenant=tenant,
            max_concurrent_tasks=concurrency or DEFAULT_CONCURRENCY,
        )
        await worker.run(on_ready=lambda: _announce(worker, target))


def _announce(worker: SiloWorker[Any, Any, Any], target: str) -> None:
    line = f"worker {worker.worker_id} runs {target} on task group {worker.task_group!r}; Ctrl-C stops it"
    print(line, flush=True)
