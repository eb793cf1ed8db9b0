"""Asks SlateDB to merge sorted runs, and never for what it does already or is about to do.

Two compactions into one run end the database's compaction worker, which closes the database; and they
stay on its list, so that opening it again does not help. Nothing takes a compaction back. So one
is asked for only when no other touches its runs and SlateDB's own scheduler will not begin one: either there
are too few runs for it, or it had its turn at these very runs and let them be.
"""

import asyncio
import re
from collections.abc import Mapping
from typing import Any  # The binding is untyped: its objects are Any throughout this module.

from slatedb import uniffi as slatedb

from silo.errors import StoreUnavailable
from silo.model.storage import SortedRun, StorageInfo

_LOOKS_MAX = 3
_TURNS_S = 1.5  # In poll intervals: the scheduler has surely had its turn.
_POLL_S = 5.0
_MERGED_MIN = 4  # So many runs the scheduler wants before it merges any.
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class Compactions:
    """What a database is made of, and how to have it merged. `settings` are those it runs with."""

    def __init__(self, admin: Any, settings: Mapping[str, object]) -> None:
        self._admin = admin
        self._poll_s, self._merged_min = _POLL_S, _MERGED_MIN
        match settings.get("compactor_options"):
            case {"poll_interval": str(text)}:
                self._poll_s = _seconds(text)
        match settings.get("compactor_options"):
            case {"scheduler_options": {"min_compaction_sources": str(text)}} if text.isdigit():
                self._merged_min = int(text)
        self._turn = asyncio.Lock()

    async def info(self) -> StorageInfo:
        manifest = await self._manifest()
        return StorageInfo(
            level0_tables=len(manifest.l0),
            level0_bytes=sum(table.estimated_size_bytes for table in manifest.l0),
            sorted_runs=tuple(
                SortedRun(id=run.id, tables=len(run.sst_views), bytes=run.estimated_size_bytes)
                for run in manifest.compacted
            ),
        )

    async def merge(self) -> None:
        """Ask for all runs but the newest to be merged into the oldest; a single one is written anew.

        Raises:
            StoreUnavailable: the scheduler finds no rest; try again later.
        """
        async with self._turn:  # Two at a time would see the same list.
            runs_before = None
            for look in range(_LOOKS_MAX):
                if look:
                    await asyncio.sleep(_TURNS_S * self._poll_s)
                runs = [run.id for run in (await self._manifest()).compacted]  # Newest first.
                sources = runs[1:] or runs
                active = await self._active()
                if not sources or any(_touches(compaction, sources) for compaction in active):
                    return
                will_be = len(runs) + len(active) + 1  # Each may add one, and one may begin right now.
                if will_be < self._merged_min or (not active and runs == runs_before):
                    await self._submit(sources)
                    return
                runs_before = None if active else runs
        raise StoreUnavailable("the store is busy merging; try again later")

    async def _submit(self, runs: list[int]) -> None:
        spec = slatedb.CompactionSpec.TIERED(
            segment=b"", sources=[slatedb.SourceId.SORTED_RUN(run) for run in runs], destination=runs[-1]
        )
        await self._admin.submit_compaction(spec)

    async def _manifest(self) -> Any:
        manifest = await self._admin.read_manifest(None)
        if manifest is None:
            raise StoreUnavailable("the store has no manifest")
        return manifest

    async def _active(self) -> list[Any]:
        found = await self._admin.read_compactions(None)
        return [] if found is None else [each for each in found.recent_compactions if each.active]


def _touches(compaction: Any, runs: list[int]) -> bool:
    spec = compaction.spec
    if not spec.is_tiered():
        return True
    taken = {source[0] for source in spec.sources if source.is_sorted_run()} | {spec.destination}
    return not taken.isdisjoint(runs)


def _seconds(duration: str) -> float:
    """A duration as SlateDB writes it: `200ms`, `1m 30s`."""
    return sum(float(number) * _UNIT_S[unit] for number, unit in re.findall(r"(\d+)\s*(ms|s|m|h)", duration))
