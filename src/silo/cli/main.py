"""`silo`: the command line."""

import asyncio
import errno
import os
import re
import socket
import sys
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from silo.config import Config, load_config
from silo.errors import ConfigError, SiloError
from silo.telemetry.logging import set_up_logging

if TYPE_CHECKING:
    from silo.node.serve import Ready

app = typer.Typer(
    name="silo",
    help="A durable job queue whose only store is object storage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

# The commands import what they run when they run, so that `silo --help` answers at once.
# ruff: noqa: PLC0415


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"silo {version('silo-queue')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def server(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file; defaults without.")
    ] = None,
    grpc_addr: Annotated[str | None, typer.Option(help="Address to serve, as 127.0.0.1:7450.")] = None,
    metrics_addr: Annotated[
        str | None, typer.Option(help="Address for metrics; 127.0.0.1:9090 without, if it is free.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder on this machine for the data.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log at debug level.")] = False,
) -> None:
    """Run a server until it is told to stop."""
    overrides: dict[str, object] = {}
    if grpc_addr is not None:
        overrides["server.grpc_addr"] = grpc_addr
    if metrics_addr is not None:
        overrides["metrics.addr"] = metrics_addr
    if data is not None:
        overrides |= {"database.backend": "fs", "database.path": f"{data.absolute()}/%shard%"}
    try:
        settings = load_config(config, os.environ, overrides=overrides)
        set_up_logging(settings.logging.format, levels="debug" if verbose else os.environ.get("SILO_LOG"))
    except (ConfigError, ValueError) as error:
        _fail(f"Config error: {error}")

    from silo.node.serve import serve
    from silo.rpc.gubernator import limiter
    from silo.rpc.server import listener

    def greet(ready: "Ready") -> None:
        _greet(settings, ready)

    try:
        _run(lambda: serve(settings, listener(settings), open_limiter=limiter(settings), on_ready=greet))
    except ConfigError as error:
        _fail(f"Config error: {error}")
    except (SiloError, OSError) as error:
        _fail(_start_failure(settings, error))


@app.command()
def worker(  # noqa: PLR0917  # Typer passes them by name.
    target: Annotated[
        str, typer.Argument(metavar="MODULE:OBJECT", help="An App, an async function, or a SiloWorker.")
    ],
    task_group: Annotated[str | None, typer.Option(help="The task group of an async function.")] = None,
    groups: Annotated[
        str | None, typer.Option(help="Task groups of an App to work on, as a,b; all without.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Jobs to run at the same time; 10 without.")
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(help="Address of a server, with https:// for TLS; repeatable; 127.0.0.1:7450 without."),
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant, where tenancy is enabled.")] = None,
    token: Annotated[
        str | None, typer.Option(envvar="SILO_TOKEN", help="Bearer token; better given in the environment.")
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Connect by TLS, trusting the system's authorities.")
    ] = False,
    tls_ca: Annotated[
        Path | None, typer.Option(help="PEM file with the authorities to trust instead; stands for --tls.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file with a certificate for servers that ask for one.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file with its private key.")] = None,
    reload: Annotated[
        bool, typer.Option("--reload", help="Start again when a Python file here changes; for development.")
    ] = False,
) -> None:
    """Run the tasks of an App of yours, or jobs with an async function or a SiloWorker, until Ctrl-C."""
    from silo import TlsOptions
    from silo.cli.reload import run_reloading
    from silo.cli.worker import WorkerSettings, run_worker

    if reload:
        try:
            run_reloading([argument for argument in sys.argv[1:] if argument != "--reload"])
        except ConfigError as error:
            _fail(f"Error: {error}")
        return
    set_up_logging("text", levels=os.environ.get("SILO_LOG"))
    names_files = tls_ca is not None or tls_cert is not None or tls_key is not None
    files = TlsOptions(ca_path=tls_ca, cert_path=tls_cert, key_path=tls_key)
    try:
        run_worker(
            target,
            WorkerSettings(
                task_group=task_group,
                groups=None if groups is None else [name.strip() for name in groups.split(",")],
                concurrency=concurrency,
                servers=server,
                tenant=tenant,
                token=token,
                tls=files if names_files else tls or None,
            ),
        )
    except (SiloError, OSError) as error:
        _fail(f"Error: {error}")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Which one; an unknown name lists them.")],
    jobs: Annotated[
        int | None, typer.Option(min=1, help="How many jobs; each bench has its default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure Silo on this machine."""
    from silo.cli.bench import BENCHES, run

    if name not in BENCHES:
        raise typer.BadParameter(f"there is no bench {name!r}; known are: {', '.join(BENCHES)}")
    run(name, jobs=jobs, as_json=as_json)


@app.command()
def demo() -> None:
    """Start a server on local files, enqueue work, run it and show what happens."""
    from silo.cli.demo import run

    raise typer.Exit(run())


def main() -> None:
    """Run the command line and exit."""
    app()


def _run(start: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=_event_loop) as runner:
        runner.run(start())


def _event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # Not on every platform, and nothing depends on it but speed.
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def _greet(config: Config, ready: "Ready") -> None:
    database = config.database
    promise = {
        "flushed": "flushed (acknowledged once it is on the disk or in the object store)",
        "buffered": f"buffered (a crash may lose the last {database.flush_interval_ms} ms)",
        "none": "none (memory: gone when the server stops)",
    }[database.durability_in_force]
    scheme = "" if config.tls.cert_path is None else "https://"
    metrics = ready.metrics_address
    lines = (
        f"Silo serves gRPC on {ready.address} ({ready.shards} shards)",
        f"  data        {database.root}",
        f"  durability  {promise}",
        f"  metrics     {'not served' if metrics is None else f'http://{metrics}/metrics'}",
        f"  enqueue     SiloGRPCClient(servers=[{scheme + ready.address!r}])",
        "  stop        Ctrl-C",
    )
    typer.echo("\n".join(lines))
    sys.stdout.flush()


def _start_failure(config: Config, error: SiloError | OSError) -> str:
    from silo.telemetry.metrics import MetricsNotServed

    if isinstance(error, MetricsNotServed):  # Its cause speaks of another address than ours.
        return f"Error: {error}"
    address, root = config.server.grpc_addr, config.database.root
    if isinstance(error, socket.gaierror):
        return f"Error: {address}: {error.strerror}; choose another --grpc-addr"
    cause = error.__cause__ if isinstance(error, SiloError) else error
    match cause.errno if isinstance(cause, OSError) else None:
        case errno.EADDRINUSE:
            return f"Error: {address} is in use; stop what listens there or choose another --grpc-addr"
        case errno.EADDRNOTAVAIL:
            return f"Error: {address} is no address of this machine; choose another --grpc-addr"
        case errno.EACCES | errno.EPERM if error is cause:
            return f"Error: no permission to serve {address}; choose another --grpc-addr"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"Error: no permission to write to data directory {root}; choose another --data"
        case errno.ENOTDIR | errno.EEXIST:
            return f"Error: {root} is not a folder; choose another --data"
    return f"Error: {error}"


def _fail(line: str) -> NoReturn:
    typer.echo(re.sub(r"://[^/@\s]*@", "://(hidden)@", " ".join(line.split())), err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    main()
