"""Commands of Silo as child processes, with the home directory of a test and their output in files."""

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any  # The stubs of grpc are untyped.

import grpc

from silo.wire.pb.silo.v1 import silo_pb2_grpc
from tests.builders import until

_numbers = itertools.count(1)


class Child:
    """One running or ended command."""

    def __init__(self, process: asyncio.subprocess.Process, out: Path, err: Path) -> None:
        self.process = process
        self._out = out
        self._err = err

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    async def says(self, text: str, *, timeout_s: float = 15.0) -> None:
        """Wait until the text was printed, on either stream."""

        def is_there() -> bool:
            if text in self.out or text in self.err:
                return True
            assert self.process.returncode is None, f"ended with {self.process.returncode}: {self.err}"
            return False

        await until(is_there, timeout_s=timeout_s)

    async def ended(self, *, timeout_s: float = 20.0) -> int:
        """Wait for the end; the exit code, or minus the number of the signal."""
        async with asyncio.timeout(timeout_s):
            return await self.process.wait()

    async def stop(self, number: signal.Signals = signal.SIGTERM, *, timeout_s: float = 20.0) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        return await self.ended(timeout_s=timeout_s)


@asynccontextmanager
async def silo(
    folder: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    before: Callable[[], None] | None = None,
    metrics_addr: str | None = "127.0.0.1:0",
) -> AsyncIterator[Child]:
    """`silo ARGUMENTS` while the block runs; home and data directories lie in `folder`.

    Servers get a port of their own for metrics, or `metrics_addr`; with None they choose.
    """
    if arguments[0] == "server" and "--help" not in arguments and metrics_addr is not None:
        arguments = (*arguments, "--metrics-addr", metrics_addr)
    known = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "SILO_"))}
    home = {"HOME": str(folder / "home"), "COLUMNS": "200", "NO_COLOR": "1"}
    name = f"{next(_numbers)}"
    out, err = folder / f"{name}.out", folder / f"{name}.err"
    with out.open("wb") as out_file, err.open("wb") as err_file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "silo.cli.main", *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=out_file, stderr=err_file,
            env={**known, **home, **(env or {})}, cwd=cwd or folder, preexec_fn=before,
        )  # fmt: skip
    try:
        yield Child(process, out, err)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def failure(
    folder: Path,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    metrics_addr: str | None = "127.0.0.1:0",
) -> str:
    """The one line that a command prints when it refuses to start. It prints nothing else."""
    async with silo(folder, *arguments, env=env, cwd=cwd, metrics_addr=metrics_addr) as child:
        code = await child.ended()
        assert (code, child.out) == (1, "")
        [line] = child.err.splitlines()
        return line


@asynccontextmanager
async def stub_of(address: str) -> AsyncIterator[Any]:
    """The bare calls of a server."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield silo_pb2_grpc.SiloStub(channel)
