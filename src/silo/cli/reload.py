"""`silo worker --reload`: the worker in a child process, started again whenever the code changes."""

import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from silo.errors import ConfigError


def run_reloading(arguments: Sequence[str]) -> None:
    """Run `silo ARGUMENTS` until SIGINT, SIGTERM or SIGHUP, and anew after each change of a Python file here.

    The child drains before the next one starts, and when this ends. The second signal ends it at once.

    Raises:
        ConfigError: watchfiles is not installed.
    """
    try:
        import watchfiles  # noqa: F401, PLC0415  # An extra: whoever does not reload does not need it.
    except ImportError as error:
        raise ConfigError("--reload needs watchfiles: pip install 'silo-queue[reload]'") from error
    asyncio.run(_Reloader(arguments).run())


class _Reloader:
    def __init__(self, arguments: Sequence[str]) -> None:
        self._command = (sys.executable, "-m", "silo.cli.main", *arguments)
        self._child: asyncio.subprocess.Process | None = None
        self._is_told = False  # The child was told to end.
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        from watchfiles import PythonFilter, awatch  # noqa: PLC0415  # As above.

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        here = Path.cwd()
        print(f"Silo restarts the worker when a Python file in {here} changes", flush=True)
        try:
            await self._start()
            async for changes in awatch(here, watch_filter=PythonFilter(), stop_event=self._stopping):
                names = sorted(str(Path(path).relative_to(here)) for _, path in changes)
                print(f"{', '.join(names)} changed: the worker starts again", flush=True)
                await self._end()
                if not self._stopping.is_set():
                    await self._start()
            await self._end()
        finally:
            if self._child is not None and self._child.returncode is None:
                self._child.kill()

    async def _start(self) -> None:
        # In a process group of its own: otherwise Ctrl-C would reach it as well, and count as the second
        # signal when we pass it on.
        self._child = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.DEVNULL, process_group=0
        )
        self._is_told = False

    async def _end(self) -> None:
        assert self._child is not None
        if not self._is_told:
            self._tell()
        await self._child.wait()

    def _on_signal(self) -> None:
        is_second = self._stopping.is_set()
        self._stopping.set()
        if is_second or not self._is_told:  # It may be on its way to the end because of a change.
            self._tell()

    def _tell(self) -> None:
        if self._child is not None and self._child.returncode is None:
            self._is_told = True
            self._child.send_signal(signal.SIGTERM)
