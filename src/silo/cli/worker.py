"""`silo worker module:object`: run an app, a worker or a handler from the command line."""

import asyncio
import importlib
import inspect
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any  # What a worker's jobs carry is the application's.

from silo import App, AppWorker, SiloGRPCClient, SiloWorker, TlsOptions
from silo.client.topology import bare_address
from silo.config import parse_address
from silo.errors import ErrorKind, SiloError
from silo.tasks.connection import DEFAULT_SERVER

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


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What the command line says beside the target; None where it says nothing."""

    task_group: str | None = None
    groups: Sequence[str] | None = None
    concurrency: int | None = None
    servers: Sequence[str] | None = None
    tenant: str | None = None
    token: str | None = None
    tls: bool | TlsOptions | None = None


def run_worker(target: str, settings: WorkerSettings) -> None:
    """Run until SIGINT or SIGTERM, then let running jobs end.

    Raises:
        BadTarget: the target is nothing that can run, or an option does not fit it.
        ConfigError: a server's address is none, or a file of `tls` is unusable.
    """
    for server in settings.servers or ():
        parse_address("--server", bare_address(server))
    if settings.token is not None and not settings.token.strip():
        raise BadTarget("the token is empty; leave it out or give one")
    asyncio.run(_run(load_target(target), target, settings))


async def _run(found: object, target: str, settings: WorkerSettings) -> None:
    match found:
        case App():
            await _run_app(found, target, settings)
        case SiloWorker():
            await _run_ready_worker(found, target, settings)
        case _ if inspect.iscoroutinefunction(found):
            await _run_handler(found, target, settings)
        case _:
            kind = type(found).__name__
            raise BadTarget(f"{target} is of type {kind}; give an App, an async function or a SiloWorker")


async def _run_app(app: App, target: str, settings: WorkerSettings) -> None:
    if settings.task_group:
        raise BadTarget(f"{target} is an App, whose tasks name their groups; choose some with --groups")
    app.configure(settings.servers, token=settings.token, tls=settings.tls, tenant=settings.tenant)
    try:
        worker = app.worker(
            groups=settings.groups, max_concurrent_tasks=settings.concurrency or DEFAULT_CONCURRENCY
        )
    except (TypeError, ValueError) as error:
        raise BadTarget(f"{target}: {error}") from error
    for group in settings.groups or ():
        if group not in app.task_groups:
            close = get_close_matches(group, app.task_groups, n=1) or app.task_groups
            raise BadTarget(f"no task of {target} is in group {group!r}; did you mean {close[0]!r}?")
    await worker.run(on_ready=lambda: _announce_app(app, worker, target))


async def _run_ready_worker(worker: SiloWorker[Any, Any, Any], target: str, settings: WorkerSettings) -> None:
    given = {
        "--task-group": settings.task_group,
        "--groups": settings.groups,
        "--concurrency": settings.concurrency,
        "--server": settings.servers,
        "--tls": settings.tls is True,
        "--tls-ca, --tls-cert and --tls-key": isinstance(settings.tls, TlsOptions),
    }
    for option in (name for name, value in given.items() if value):
        raise BadTarget(f"{target} is a SiloWorker, which brings its own settings; leave out {option}")
    await worker.run(on_ready=lambda: _announce(worker, target))


async def _run_handler(handler: Any, target: str, settings: WorkerSettings) -> None:
    if settings.groups:
        raise BadTarget(f"{target} is a handler; give its group with --task-group instead of --groups")
    if not settings.task_group:
        raise BadTarget("a handler needs --task-group")
    servers = list(settings.servers or (DEFAULT_SERVER,))
    async with SiloGRPCClient(servers, token=settings.token, tls=settings.tls) as client:
        worker = SiloWorker(
            client=client,
            worker_id=f"{socket.gethostname()}-{os.getpid()}",
            task_group=settings.task_group,
            handler=handler,
            tenant=settings.tenant,
            max_concurrent_tasks=settings.concurrency or DEFAULT_CONCURRENCY,
        )
        await worker.run(on_ready=lambda: _announce(worker, target, servers))


def _announce_app(app: App, worker: AppWorker, target: str) -> None:
    tasks = [f"{name}  ({app.tasks[name].declared.task_group})" for name in worker.tasks]
    _say(
        f"Silo worker {worker.worker_id} runs {target}",
        tasks=tasks,
        groups=[", ".join(worker.task_groups)],
        concurrency=[str(worker.max_concurrent_tasks)],
        server=[", ".join(app.servers)],
    )


def _announce(worker: SiloWorker[Any, Any, Any], target: str, servers: Sequence[str] = ()) -> None:
    _say(
        f"Silo worker {worker.worker_id} runs {target}",
        groups=[", ".join(worker.task_groups)],
        concurrency=[str(worker.max_concurrent_tasks)],
        server=[", ".join(servers)],
    )


def _say(first: str, **facts: Sequence[str]) -> None:
    """What is served, with a line for each fact that is known."""
    lines = [first]
    for name, values in facts.items():
        labels = [name, *[""] * len(values)]
        lines += [f"  {label:<11} {value}" for label, value in zip(labels, values, strict=False) if value]
    print("\n".join([*lines, "  stop        Ctrl-C"]), flush=True)
