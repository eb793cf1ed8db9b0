"""SlateDB's own settings: our defaults, what the configuration says, and a check that it exists."""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any  # The binding is untyped, and so is what it reads.

from slatedb import uniffi as slatedb

from silo.errors import ConfigError
from silo.storage.durability import Durability

_LOCAL_RETRIES_MAX = 3  # A local disk that failed some times in a row is not about to answer.

_DEFAULTS: Mapping[str, object] = {
    "flush_interval": None,
    "max_unflushed_bytes": 256 << 20,
    "garbage_collector_options": {
        "wal_options": {"interval": "10s", "min_age": "30s"},
        "manifest_options": {"interval": "60s", "min_age": "300s"},
        "compacted_options": {"interval": "60s", "min_age": "300s"},
        "compactions_options": {"interval": "60s", "min_age": "300s"},
    },
}


# The sweep, not the age, says which files of a local store may go: see `LocalFiles`.
_SWEPT: Mapping[str, object] = {
    "garbage_collector_options": {
        "wal_options": {"min_age": "3650d"},
        "manifest_options": {"min_age": "3650d"},
        "compactions_options": {"min_age": "3650d"},
    }
}


def effective_settings(
    given: Mapping[str, object], *, durability: Durability, flush_interval_ms: int, is_local: bool
) -> dict[str, object]:
    """All settings that differ from SlateDB's defaults.

    Raises:
        ConfigError: `given` has a key that SlateDB, which ignores such keys, does not know.
    """
    _check(given, json.loads(slatedb.Settings.default().to_json_string()), "database.slatedb")
    settings = _merged(_DEFAULTS, given)
    if durability is Durability.BUFFERED:
        settings["flush_interval"] = f"{flush_interval_ms}ms"
    if is_local:
        settings.setdefault("object_store_max_retries", _LOCAL_RETRIES_MAX)
        if durability is Durability.FLUSHED:
            settings = _merged(settings, _SWEPT)
    return settings


def built(settings: Mapping[str, object]) -> Any:
    """The binding's object of these settings."""
    result = slatedb.Settings.default()
    for key, value in _flattened(settings):
        result.set(key, json.dumps(value))
    return result


def _check(given: Mapping[str, object], known: Mapping[str, object], table: str) -> None:
    for key, value in given.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {table}.{close[0]}?" if close else f"known are: {', '.join(known)}"
            raise ConfigError(f"unknown key {table}.{key}; {hint}")
        below = known[key]
        if isinstance(value, Mapping) and isinstance(below, Mapping) and below:
            _check(value, below, f"{table}.{key}")


def _merged(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = _merged(below, value)
        else:
            merged[key] = value
    return merged


def _flattened(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
