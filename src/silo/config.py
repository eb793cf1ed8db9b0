"""The configuration of a server: one frozen value, read once and checked once.

It comes from a TOML file, the environment (by `${VAR}` in that file) and flags. Every key
that exists has an effect; a key that does not exist is an error, so that a slip of
the pen never passes for a setting. Errors name the key, what is wrong, and the fix.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

import msgspec
from msgspec import Meta

from silo.errors import ConfigError
from silo.storage.durability import Durability

SHARD_PLACEHOLDERS = ("%shard%", "{shard}")
PORT_MAX = 65535

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_SECRET_NAME = re.compile(r"token|secret|password|credential|key$", re.IGNORECASE)
_SHOWN_MAX = 80  # Characters of a wrong value that an error repeats.

Section = TypeVar("Section", bound=msgspec.Struct)


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    grpc_addr: str = "127.0.0.1:7450"
    dev_mode: bool = False  # Allows ResetShards, which deletes everything.


class CoordinationConfig(msgspec.Struct, frozen=True, kw_only=True):
    initial_shard_count: Annotated[int, Meta(ge=1, le=4096)] = 8  # Only when the data root is new.
    advertised_grpc_addr: str | None = None  # What others connect to; the bound address when unset.
    node_id: str | None = None  # A random one is kept with the data when unset.


class TenancyConfig(msgspec.Struct, frozen=True, kw_only=True):
    enabled: bool = False


class LoggingConfig(msgspec.Struct, frozen=True, kw_only=True):
    format: Literal["text", "json"] = "text"


class DatabaseConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where the data is. `path` ends in `/` and a placeholder for the name of each store."""

    backend: Literal["fs", "memory", "s3", "gcs", "url"] = "fs"
    path: str = ""
    durability: Durability = Durability.FLUSHED
    flush_interval_ms: Annotated[int, Meta(ge=1, le=60_000)] = 100  # Of `buffered`.
    slatedb: dict[str, Any] = {}  # SlateDB's own settings, which it checks itself.

    @property
    def root(self) -> str:
        """The folder, prefix or URL that holds all stores: a plain path for `fs`, else a URL."""
        root, _, _ = self.path.rpartition("/")
        if self.backend == "fs":
            return root or "/"
        scheme = {"memory": "memory", "s3": "s3", "gcs": "gs"}.get(self.backend)
        if scheme is None or root.startswith(f"{scheme}:"):
            return root
        return f"{scheme}://{root}" if scheme != "memory" else f"memory:///{root.strip('/')}"


class DispatchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """0 makes every task group first in, first out."""

    priority_step_ms: Annotated[int, Meta(ge=0, le=86_400_000)] = 10_000


class Config(msgspec.Struct, frozen=True, kw_only=True):
    server: ServerConfig = ServerConfig()
    coordination: CoordinationConfig = CoordinationConfig()
    tenancy: TenancyConfig = TenancyConfig()
    logging: LoggingConfig = LoggingConfig()
    database: DatabaseConfig = DatabaseConfig()
    dispatch: DispatchConfig = DispatchConfig()


class Address(NamedTuple):
    """A host and a port. IPv6 hosts stand without brackets here."""

    host: str
    port: int


def load_config(
    path: Path | None, env: Mapping[str, str], *, overrides: Mapping[str, object] | None = None
) -> Config:
    """The configuration of `path`, or the defaults, with `overrides` by dotted key on top.

    Raises:
        ConfigError: the file cannot be read, or a key or a value in it is wrong.
    """
    tables = _read_tables(path, env) if path is not None else {}
    for dotted, value in (overrides or {}).items():
        section, _, key = dotted.partition(".")
        table = tables.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"[{section}] is not a table; write it as a section of its own")
        table[key] = value
    sections = {field.name: field.type for field in msgspec.structs.fields(Config)}
    for name in tables:
        if name not in sections:
            raise ConfigError(f"unknown section [{name}]{_suggest(name, sections)}")
    config = Config(
        **{name: _read_section(name, type_, tables.get(name, {})) for name, type_ in sections.items()}
    )
    parse_address("server.grpc_addr", config.server.grpc_addr)
    coordination = config.coordination
    if coordination.advertised_grpc_addr is not None:
        parse_address("coordination.advertised_grpc_addr", coordination.advertised_grpc_addr)
    if coordination.node_id is not None and not coordination.node_id.strip():
        raise ConfigError("coordination.node_id is empty; leave it out or give the node a name")
    try:
        json.dumps(config.database.slatedb)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"database.slatedb: {error}; write dates and times as text in quotes") from error
    return msgspec.structs.replace(config, database=_with_path(config.database, env))


def expand(text: str, env: Mapping[str, str]) -> str:
    """Replace `${VAR}` and `${VAR:-default}`. The default counts for unset variables only."""

    def value(found: re.Match[str]) -> str:
        name, _, default = found[1].partition(":-")
        known = env.get(name)
        if known is None or not _is_unicode(known):
            return default
        return known

    return _VARIABLE.sub(value, text)


def parse_address(key: str, text: str) -> Address:
    """Host and port of `127.0.0.1:7450`, `name:7450` or `[::1]:7450`.

    Raises:
        ConfigError: it is none of these; `key` is named.
    """
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_bracketed = bare != host
    if bare == "*":
        raise ConfigError(f"{key} = {_shown(key, text)} is no address; write 0.0.0.0 for every interface")
    is_odd = (":" in bare and not is_bracketed) or re.search(r"[\s/\[\]]", bare) or not bare.isprintable()
    if not colon or not bare or is_odd:
        raise ConfigError(f"{key} = {_shown(key, text)} is no address; write host:port, as 127.0.0.1:7450")
    if not (re.fullmatch("[0-9]{1,5}", port) and int(port) <= PORT_MAX):
        raise ConfigError(f"{key} = {_shown(key, text)}: the port must be a number from 0 to {PORT_MAX}")
    return Address(bare, int(port))


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


def _read_tables(path: Path, env: Mapping[str, str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; save it as such") from error
    try:
        return tomllib.loads(expand(text, env))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except (ValueError, RecursionError) as error:  # A number of thousands of digits, endless nesting.
        raise ConfigError(f"{path} is not a configuration: {error}") from error


def _read_section(name: str, type_: type[Section], table: object) -> Section:
    if not isinstance(table, dict):
        raise ConfigError(f"{name} is not a table; write it as a section: [{name}]")
    fields = {field.name: field.type for field in msgspec.structs.fields(type_)}
    values = {}
    for key, value in table.items():
        if key not in fields:
            raise ConfigError(f"unknown key {name}.{key}{_suggest(key, fields, prefix=name + '.')}")
        try:
            values[key] = msgspec.convert(value, fields[key])
        except msgspec.ValidationError as error:
            full = f"{name}.{key}"
            raise ConfigError(
                f"{full} = {_shown(full, value)} is wrong; {_fix(fields[key], value)}"
            ) from error
    return type_(**values)


def _with_path(database: DatabaseConfig, env: Mapping[str, str]) -> DatabaseConfig:
    path = database.path
    if not path:
        if database.backend == "fs":
            path = f"{_data_home(env)}/silo/%shard%"
        elif database.backend == "memory":
            path = "/%shard%"
        else:
            raise ConfigError(
                f"database.path is missing; backend {database.backend!r} needs one, as my-bucket/silo/%shard%"
            )
    for placeholder in SHARD_PLACEHOLDERS:
        head, found, tail = path.partition(placeholder)
        if found and head.endswith("/") and not tail:
            if any(other in head for other in SHARD_PLACEHOLDERS):
                break
            if database.backend == "fs":
                path = f"{_local_root(head, env)}/{placeholder}"
            return msgspec.structs.replace(database, path=path)
    raise ConfigError(
        f"database.path = {_shown('database.path', path)} must end in /%shard%, "
        "so that each shard gets a folder of its own"
    )


def _data_home(env: Mapping[str, str]) -> Path:
    """The per-user data directory. A relative `XDG_DATA_HOME` does not count, as its standard says."""
    base = Path(env.get("XDG_DATA_HOME") or "")
    return base if base.is_absolute() else _home(env) / ".local" / "share"


def _home(env: Mapping[str, str]) -> Path:
    return Path(env["HOME"]) if env.get("HOME") else Path.home()


def _local_root(text: str, env: Mapping[str, str]) -> Path:
    """The absolute folder of `text`, where `~/` is the home directory."""
    path = _home(env) / text[2:] if text.startswith("~/") else Path(text)
    return path.absolute()


def _suggest(name: str, known: Mapping[str, object], *, prefix: str = "") -> str:
    renamed = {"num_shards": "initial_shard_count"}.get(name)
    close = [renamed] if renamed in known else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; known are: {', '.join(known)}"


def _shown(key: str, value: object) -> str:
    if _SECRET_NAME.search(key):
        return "(hidden)"
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    text = re.sub(r"://[^/@\s]*@", "://(hidden)@", text)
    text = re.sub(r"\?.*", "?(hidden)", text)
    return text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "…"


def _fix(type_: Any, value: object) -> str:  # A type as an annotation has it: there is no narrower word.
    arguments = get_args(type_)
    if type_ is bool:
        return "write true or false, without quotes"
    if type_ is Durability:
        arguments = tuple(level.value for level in Durability)
    if arguments and all(isinstance(choice, str) for choice in arguments):
        close = difflib.get_close_matches(str(value).lower(), arguments, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{hint}write one of {', '.join(repr(choice) for choice in arguments)}"
    bounds = next((m for m in getattr(type_, "__metadata__", ()) if isinstance(m, Meta)), None)
    if bounds is not None:
        return f"write a whole number from {bounds.ge} to {bounds.le}, without quotes"
    if type_ is str or type(None) in arguments:
        return "write text in quotes"
    return "write it as a table"
