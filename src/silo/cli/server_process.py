"""A Silo server as a child process: for the demo, the benches, and whoever must kill one."""

import asyncio
import signal
import socket
import sys
from pathlib import Path

_READY_TIMEOUT_S = 30.0


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """`silo server` on local files under `data`, on a fixed loopback port, so that it can come back."""

    def __init__(self, data: Path, *, port: int | None = None, extra: tuple[str, ...] = ()) -> None:
        self.data = data
        self.port = port or free_port()
        self._extra = extra
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """How it ended, with a minus for a signal; None while it runs."""
        return None if self._process is None else self._process.returncode

    async def start(self) -> None:
        """Start it and wait until it accepts connections.

        Raises:
            RuntimeError: it ended instead; the text holds what it printed.
        """
        self.data.mkdir(parents=True, exist_ok=True)
        log = (self.data / "server.log").open("ab")
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "silo.cli.main", "server",
                "--grpc-addr", self.address, "--metrics-addr", "127.0.0.1:0", "--data", str(self.data),
                *self._extra,
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        finally:
            log.close()
        async with asyncio.timeout(_READY_TIMEOUT_S):
            while not await self._accepts():
                if self._process.returncode is not None:
                    text = (self.data / "server.log").read_text()[-2000:]
                    raise RuntimeError(f"the server ended with {self._process.returncode}:\n{text}")
                await asyncio.sleep(0.02)

    async def _accepts(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True

    async def kill(self) -> None:
        """End it without warning, as `kill -9` does."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """Ask it to shut down, and wait until it has."""
        await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(number)
        try:
            async with asyncio.timeout(60):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
