"""Local files under SlateDB: on disk when they must be, and kept until what replaces them is."""

import asyncio
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any  # The binding is untyped: its objects are Any throughout this module.

from silo.errors import StoreUnavailable

_PROBE_BYTES = 64 << 10
_UNPLAIN = re.compile(r"[^ -~]|[\\{^}%`\]\">\[~<#|*?]")  # What an object store encodes in a path.
_MANIFESTS_KEPT = 16  # Superseded ones that stay for whoever is reading them.


class LocalFiles:
    """Puts on disk what SlateDB has written to local files: it never calls fsync itself.

    A log file is synced, with its directory, before its group is answered. Tables and manifests
    follow in sweeps. The garbage collector goes by the age of a file, which says nothing about
    whatever replaces it: so logs and manifests look young to it, until a sweep has put their
    successors on disk and dates them back. Old tables are kept by the compactor's checkpoints.

    After a failed sync nothing is synced any more: the kernel may have dropped the pages and
    would say yes the next time.
    """

    def __init__(self, path: Path, admin: Any) -> None:
        self._path = path
        self._admin = admin
        self._log = path / "wal"
        self._next_log = 0
        self._synced: dict[str, set[str]] = {}
        self._released = 0
        self._failure: StoreUnavailable | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="silo-fsync")

    async def sync_log(self) -> None:
        await self._run(self._sync_log, self._thread)

    async def sweep(self) -> None:
        """Sync tables and manifests, then let the logs go that they replace."""
        manifest = await self._admin.read_manifest(None)
        await self._run(self._sync_tables)
        await self._run(lambda: self._release(manifest.replay_after_wal_id if manifest else 0))

    async def close(self, *, last_sync: bool) -> None:
        try:
            if last_sync:
                await self._run(self._sync_tables)
        finally:
            self._thread.shutdown(wait=False)

    def trouble(self) -> StoreUnavailable | None:
        """Why nothing can be written here, when the operating system says so."""
        probe = self._log / "probe"
        try:
            try:
                probe.write_bytes(bytes(_PROBE_BYTES))
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            return os_error(self._path, error)
        return None

    async def _run(self, work: Callable[[], None], thread: ThreadPoolExecutor | None = None) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            # Shielded: a caller that goes away must not leave a half-synced group behind.
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(thread, work))
        except OSError as error:
            self._failure = os_error(self._path, error)
            raise self._failure from error

    def _sync_log(self) -> None:
        is_new = False
        while self._next_log and _sync_file(self._log / f"{self._next_log:020d}.sst"):
            self._next_log += 1
            is_new = True
        if not is_new:
            # The first time; or another write was faster; or the collector was, and left a gap.
            for number in self._logs():
                if number >= self._next_log:
                    _sync_file(self._log / f"{number:020d}.sst")
                    self._next_log = number + 1
                    is_new = True
        if is_new:
            _sync_directory(self._log)

    def _sync_tables(self) -> None:
        for folder in ("compacted", "manifest", "compactions"):
            path = self._path / folder
            if not path.is_dir():
                continue
            present = {entry.name for entry in os.scandir(path) if entry.is_file()}
            known = self._synced.get(folder, set())
            for name in present - known:
                _sync_file(path / name)
            if present - known:
                _sync_directory(path)
            self._synced[folder] = present
        _sync_directory(self._path)
        _sync_directory(self._path.parent)

    def _release(self, last_log: int) -> None:
        """Let the collector have what is superseded on disk."""
        first = self._released + 1
        numbers = range(first, last_log + 1) if self._released else self._logs()
        for number in numbers:
            if number <= last_log:
                _date_back(self._log / f"{number:020d}.sst")
        self._released = max(self._released, last_log)
        for folder in ("manifest", "compactions"):
            for name in sorted(self._synced.get(folder, ()))[:-_MANIFESTS_KEPT]:
                _date_back(self._path / folder / name)

    def _logs(self) -> list[int]:
        """Numbers of the log files, ascending. Files in the making have longer names."""
        names = [entry.name for entry in os.scandir(self._log)]
        return sorted(int(name[:20]) for name in names if name[20:] == ".sst" and name[:20].isdigit())


def _sync_file(path: Path) -> bool:
    """Put a file on disk; False when it is not there."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        os.fdatasync(handle)
    finally:
        os.close(handle)
    return True


def _sync_directory(path: Path) -> None:
    """Put a directory's names on disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _date_back(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.utime(path, (0, 0))


def plain_path(directory: Path) -> str:
    """A path of this directory that an object store takes as it is: signs such as `ü` or `#` it would encode.

    On Linux every open directory has a plain name; this one stays open as long as the process.

    Raises:
        StoreUnavailable: there is no such name here.
    """
    odd = _UNPLAIN.search(str(directory))
    if odd is None:
        return str(directory)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    alias = f"/proc/self/fd/{handle}"
    if not Path(alias).is_dir():
        os.close(handle)
        raise StoreUnavailable(
            f"data directory {directory} has {odd[0]!r} in its name; choose one of plain characters"
        )
    return alias


def make_directory(path: Path) -> None:
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            _sync_directory(folder.parent)
    except OSError as error:
        raise os_error(path, error) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise StoreUnavailable(f"cannot write to data directory {path}: Permission denied")


def os_error(path: Path, error: OSError) -> StoreUnavailable:
    return StoreUnavailable(f"cannot write to data directory {path}: {error.strerror or error}")
