"""The servers under the queues, started for one measurement on a free port and an empty folder."""

import os
import pwd
import shutil
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path

from benchmarks.processes import accepts, free_port, run, running

_POSTGRES_FOLDERS = "/usr/lib/postgresql"  # Where Debian puts programs that are on nobody's path.


class Broker(ABC):
    """A server, as its users would run it."""

    label: str
    settings: str
    acknowledged: str  # What a job that it has acknowledged can outlive.

    @abstractmethod
    def missing(self) -> str | None:
        """What must be installed to run it; None if nothing."""

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def serve(self, folder: Path) -> AbstractContextManager[str]:
        """An empty server while the block runs; its address, as its clients want it."""


class Redis(Broker):
    label = "Redis"
    settings = "`appendonly yes`, `appendfsync everysec`"
    acknowledged = "not yet on disk: a crash of the machine loses those of the last second"

    def missing(self) -> str | None:
        return None if shutil.which("redis-server") else "redis-server"

    def version(self) -> str:
        words = run("redis-server", "--version").split()
        return next(word.removeprefix("v=") for word in words if word.startswith("v="))

    @contextmanager
    def serve(self, folder: Path) -> Iterator[str]:
        port = free_port()
        options = ("--dir", folder, "--appendonly", "yes", "--appendfsync", "everysec", "--save", "")
        with running(
            "redis-server", "--bind", "127.0.0.1", "--port", str(port), *options, log=folder / "redis.log"
        ) as server:
            server.wait_until(lambda: accepts(port))
            yield f"redis://127.0.0.1:{port}/0"


class Postgres(Broker):
    label = "PostgreSQL"
    settings = "defaults of `initdb` (`fsync on`, `synchronous_commit on`)"
    acknowledged = "on disk"

    def missing(self) -> str | None:
        return None if _postgres("initdb") and _postgres("postgres") else "postgres and initdb"

    def version(self) -> str:
        return run(_postgres("postgres"), "--version").split()[2]

    @contextmanager
    def serve(self, folder: Path) -> Iterator[str]:
        data, port, user = folder / "postgres", free_port(), None
        data.mkdir()
        if os.geteuid() == 0:  # It refuses to run as root.
            user = _unprivileged_user()
            for place in (folder, data):
                os.chown(place, user.pw_uid, user.pw_gid)
        initdb = (_postgres("initdb"), "-D", data, "-U", "bench", "-A", "trust", "-E", "UTF8", "--no-locale")
        run(*initdb, "--no-sync", user=user)
        options = ("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=")
        with running(
            _postgres("postgres"), "-D", data, "-p", str(port), *options,
            log=folder / "postgres.log", user=user, end_with=signal.SIGINT,  # Although clients are connected.
        ) as server:  # fmt: skip
            server.wait_until(lambda: _says_ready(data / "postmaster.pid"))
            yield f"postgresql://bench@127.0.0.1:{port}/postgres"


class Silo(Broker):
    label = "Silo"
    settings = "`silo server` on local files, default durability `flushed`"
    acknowledged = "on disk"

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return version("silo-queue")

    @contextmanager
    def serve(self, folder: Path) -> Iterator[str]:
        port = free_port()
        addresses = ("--grpc-addr", f"127.0.0.1:{port}", "--metrics-addr", "127.0.0.1:0")
        with running(
            Path(sys.executable).with_name("silo"), "server", *addresses, "--data", folder / "silo",
            log=folder / "silo.log",
        ) as server:  # fmt: skip
            server.wait_until(lambda: accepts(port))
            yield f"127.0.0.1:{port}"


BROKERS: Mapping[str, Broker] = {"silo": Silo(), "redis": Redis(), "postgres": Postgres()}


def _postgres(program: str) -> str:
    """Where this program of PostgreSQL is; empty if nowhere."""
    if found := shutil.which(program):
        return found
    installed = Path(_POSTGRES_FOLDERS).glob(f"*/bin/{program}")
    return str(max(installed, key=lambda path: float(path.parts[-3]), default=""))


def _says_ready(pid_file: Path) -> bool:
    """Whether PostgreSQL has written that it takes connections, where `pg_ctl start` looks too."""
    return pid_file.exists() and "ready" in pid_file.read_text().split()


def _unprivileged_user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")
