"""A memory storage whose stores have a journal, looked at as if they had none."""

import msgspec

from silo.storage import keys
from silo.storage.journal import JournaledStore
from silo.storage.memory import MemoryStorage
from silo.storage.store import Store


class JournaledMemoryStorage(MemoryStorage):
    async def open(self, name: str) -> Store:  # type: ignore[override]  # It is as good a store.
        return await JournaledStore.open(await super().open(name))

    def snapshot(self, name: str) -> dict[bytes, bytes]:
        """All rows that are durable now, those in the journal applied."""
        rows = super().snapshot(name)
        entries = [rows.pop(key) for key in sorted(rows) if key.startswith(keys.JOURNAL)]
        for entry in entries:
            for key, value in msgspec.msgpack.decode(entry, type=dict[bytes, bytes | None]).items():
                if value is None:
                    rows.pop(key, None)
                else:
                    rows[key] = value
        return rows
