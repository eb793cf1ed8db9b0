"""Child processes that end with the block that started them."""

import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 20.0
_LOOK_S = 0.02
_SHOWN_CHARS = 2_000


class Child:
    """A process whose output goes to a file."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._process = process
        self._log = log

    def check(self) -> None:
        """Nothing, as long as it runs.

        Raises:
            RuntimeError: it ended; the text holds the end of what it printed.
        """
        code = self._process.poll()
        if code is not None:
            said = self._log.read_text(errors="replace")[-_SHOWN_CHARS:]
            raise RuntimeError(f"{self._log.stem} ended with {code}:\n{said}")

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """Wait for a state that this process brings about.

        Raises:
            RuntimeError: it ended instead.
            TimeoutError: it takes too long.
        """
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not is_ready():
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._log.stem} did not start within {_START_TIMEOUT_S:.0f} s")
            time.sleep(_LOOK_S)


@contextmanager
def running(
    *command: str | Path,
    log: Path,
    end_with: signal.Signals = signal.SIGTERM,
    user: pwd.struct_passwd | None = None,
) -> Iterator[Child]:
    """The process while the block runs; afterwards it gets `end_with`, and is killed if that does not help.

    Modules of this repository can be imported by it. Only root may give a `user`.
    """
    with log.open("ab") as out:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            **_as_user(user),
        )
    try:
        yield Child(process, log)
    finally:
        process.send_signal(end_with)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run(*command: str | Path, user: pwd.struct_passwd | None = None) -> str:
    """Run a command to its end; what it printed.

    Raises:
        RuntimeError: it failed; the text holds what it printed.
    """
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **_as_user(user),
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-_SHOWN_CHARS:]}")
    return done.stdout


def _as_user(user: pwd.struct_passwd | None) -> dict[str, Any]:  # Arguments of Popen, of several types.
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": ()}


def exit_on_sigterm() -> None:
    """Leave all blocks on SIGTERM, so that the children of this process end too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    """Whether a server listens on this port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
