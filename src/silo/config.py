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
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from silo.errors import ConfigError
from silo.model.job import DEFAULT_TENANT
from silo.storage.durability import Durability

SHARD_PLACEHOLDERS = ("%shard%", "{shard}")
PORT_MAX = 65535
DEFAULT_METRICS_ADDR = "127.0.0.1:9090"
_KEPT_S_MAX = 100 * 365 * 86_400  # A hundred years.
TOKEN_CHARS_MIN = 16
TOKEN_CHARS_MAX = 4096  # More does not fit into the headers of a call.

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_SECRET_NAME = re.compile(r"token|secret|password|credential|key$", re.IGNORECASE)
_SHOWN_MAX = 80  # Characters of a wrong value that an error repeats.

Section = TypeVar("Section", bound=msgspec.Struct)


class Secret:
    """A text that shows up nowhere by accident: not in logs, not in errors, not in a `repr`."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "(hidden)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    grpc_addr: str = "127.0.0.1:7450"
    dev_mode: bool = False  # Allows ResetShards, which deletes everything.
    auth_token: Secret | None = None  # A token with scope `admin`.
    max_connections: Annotated[int, Meta(ge=1, le=1_000_000)] = 10_000
    max_streams_per_connection: Annotated[int, Meta(ge=1, le=1_000_000)] = 10_000
    max_memory_mb: Annotated[int, Meta(ge=0, le=1 << 24)] | None = (
        None  # 0: none. Unset: most of what there is.
    )


class AuthToken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    token: Secret
    scopes: tuple[str, ...]


class AuthConfig(msgspec.Struct, frozen=True, kw_only=True):
    tokens: tuple[AuthToken, ...] | None = None


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of PEM files. Without a certificate the server speaks plaintext."""

    cert_path: str | None = None
    key_path: str | None = None
    client_ca_path: str | None = None  # Clients must show a certificate of this authority.


class CoordinationConfig(msgspec.Struct, frozen=True, kw_only=True):
    initial_shard_count: Annotated[int, Meta(ge=1, le=4096)] = 8  # Only when the data root is new.
    advertised_grpc_addr: str | None = None  # What others connect to; the bound address when unset.
    node_id: str | None = None  # A random one is kept with the data when unset.


class TenancyConfig(msgspec.Struct, frozen=True, kw_only=True):
    enabled: bool = False
    max_pending_jobs: Annotated[int, Meta(ge=1, le=1_000_000_000_000)] | None = None  # Of each tenant.


class GubernatorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """An external service that judges rate limits. Without an address the shards judge them."""

    address: str | None = None  # Such as http://127.0.0.1:1051; https stands for TLS.
    coalesce_interval_ms: Annotated[int, Meta(ge=0, le=1_000)] = 5  # How long a check waits for others.
    max_batch_size: Annotated[int, Meta(ge=1, le=1_000)] = 100  # More than 1 000 the service refuses.
    connect_timeout_ms: Annotated[int, Meta(ge=1, le=60_000)] = 5_000
    request_timeout_ms: Annotated[int, Meta(ge=1, le=60_000)] = 10_000


class LoggingConfig(msgspec.Struct, frozen=True, kw_only=True):
    format: Literal["text", "json"] = "text"


class MetricsConfig(msgspec.Struct, frozen=True, kw_only=True):
    enabled: bool = True
    addr: str | None = None  # Unset: DEFAULT_METRICS_ADDR, if nobody has it.


class DatabaseConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where the data is. `path` ends in `/` and a placeholder for the name of each store."""

    backend: Literal["fs", "memory", "s3", "gcs", "url"] = "fs"
    path: str = ""
    durability: Durability = Durability.FLUSHED
    flush_interval_ms: Annotated[int, Meta(ge=1, le=60_000)] = 100  # Of `buffered`.
    completed_job_expire_s: Annotated[int, Meta(ge=1, le=_KEPT_S_MAX)] | None = None  # Of Succeeded jobs.
    terminal_job_expire_s: Annotated[int, Meta(ge=1, le=_KEPT_S_MAX)] | None = None  # Of the others.
    slatedb: dict[str, Any] = {}  # SlateDB's own settings, which it checks itself.

    @property
    def durability_in_force(self) -> Literal["flushed", "buffered", "none"]:
        """What an acknowledgement means: nothing outlives a server whose data is in memory."""
        if self.backend == "memory":
            return "none"
        return "flushed" if self.durability is Durability.FLUSHED else "buffered"

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
    auth: AuthConfig = AuthConfig()
    tls: TlsConfig = TlsConfig()
    coordination: CoordinationConfig = CoordinationConfig()
    tenancy: TenancyConfig = TenancyConfig()
    gubernator: GubernatorConfig = GubernatorConfig()
    logging: LoggingConfig = LoggingConfig()
    metrics: MetricsConfig = MetricsConfig()
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
    if config.metrics.addr is not None:
        parse_address("metrics.addr", config.metrics.addr)
    coordination = config.coordination
    if coordination.advertised_grpc_addr is not None:
        parse_address("coordination.advertised_grpc_addr", coordination.advertised_grpc_addr)
    if coordination.node_id is not None and not coordination.node_id.strip():
        raise ConfigError("coordination.node_id is empty; leave it out or give the node a name")
    _check_auth(config)
    _check_tls(config.tls)
    if config.gubernator.address is not None:
        parse_url("gubernator.address", config.gubernator.address)
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


def parse_url(key: str, text: str) -> tuple[str, bool]:
    """`host:port` of `http://host:port` or the bare form, and whether it is `https`, which stands for TLS.

    Raises:
        ConfigError: it is none of these; `key` is named.
    """
    if not text.strip():
        raise ConfigError(f"{key} is empty; leave it out or write one, as http://127.0.0.1:1051")
    scheme, _, rest = text.rpartition("://")
    address = rest.removesuffix("/")
    if "@" in address:
        raise ConfigError(f"{key} must not have a user or a password in it; write http://host:port")
    try:
        port = parse_address(key, address).port
    except ConfigError:
        port = 0
    if not port or scheme.lower() not in ("", "http", "https"):
        raise ConfigError(
            f"{key} = {_shown(key, text)} is no address of a server; "
            "write http://host:port, or https://host:port for TLS"
        )
    return address, scheme.lower() == "https"


def split_scope(scope: str) -> tuple[Literal["admin", "tenant", "worker"], str]:
    """The kind of a scope, and the tenant or task group it names; `admin` names none.

    Raises:
        ValueError: it is no scope.
    """
    kind, colon, name = scope.partition(":")
    if scope == "admin":
        return "admin", ""
    if colon and name.strip():
        if kind == "tenant":
            return "tenant", name
        if kind == "worker":
            return "worker", name
    raise ValueError("write 'admin', 'tenant:<id>' or 'worker:<task group>'")


def _check_auth(config: Config) -> None:
    """A token that is not there by mistake must not read as "no authentication"."""
    seen: dict[Secret, str] = {}

    def check(key: str, token: Secret) -> None:
        text = token.reveal()
        if not text.strip():
            raise ConfigError(
                f"{key} is empty, which is not the same as no authentication; is its variable set? "
                "Leave the key out to run without"
            )
        if not (text.isascii() and text.isprintable()) or " " in text:
            raise ConfigError(f"{key} has spaces or signs beyond ASCII in it, which do not fit into a header")
        if not TOKEN_CHARS_MIN <= len(text) <= TOKEN_CHARS_MAX:
            raise ConfigError(
                f"{key} is too {'short' if len(text) < TOKEN_CHARS_MIN else 'long'}; "
                f"take {TOKEN_CHARS_MIN} to {TOKEN_CHARS_MAX} random characters, as of: openssl rand -hex 32"
            )
        if token in seen:
            raise ConfigError(f"{key} is the same token as {seen[token]}; give each token once")
        seen[token] = key

    if config.server.auth_token is not None:
        check("server.auth_token", config.server.auth_token)
    if config.auth.tokens == ():
        raise ConfigError("auth.tokens is empty; leave it out, or list a token with its scopes")
    for number, entry in enumerate(config.auth.tokens or ()):
        key = f"auth.tokens[{number}]"
        check(f"{key}.token", entry.token)
        if not entry.scopes:
            raise ConfigError(f"{key}.scopes is empty, so the token could do nothing; name a scope")
        for place, scope in enumerate(entry.scopes):
            _check_scope(f"{key}.scopes[{place}]", scope, tenancy=config.tenancy.enabled)


def _check_scope(key: str, scope: str, *, tenancy: bool) -> None:
    try:
        kind, name = split_scope(scope)
    except ValueError as error:
        raise ConfigError(f"{key} is no scope; {error}") from error
    if kind == "tenant" and not tenancy and name != DEFAULT_TENANT:
        raise ConfigError(
            f"{key} names a tenant, but tenancy is off; "
            f"set tenancy.enabled, or write 'tenant:{DEFAULT_TENANT}', which then is every job's"
        )


def _check_tls(tls: TlsConfig) -> None:
    for field in msgspec.structs.fields(TlsConfig):
        path = getattr(tls, field.name)
        if path is not None and not path.strip():
            raise ConfigError(f"tls.{field.name} is empty; leave it out or name a file")
    if (tls.cert_path is None) != (tls.key_path is None):
        missing, given = ("key_path", "cert_path") if tls.key_path is None else ("cert_path", "key_path")
        raise ConfigError(f"tls.{missing} is missing; tls.{given} needs it")
    if tls.client_ca_path is not None and tls.cert_path is None:
        raise ConfigError("tls.cert_path is missing; tls.client_ca_path needs it, and tls.key_path")


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
            values[key] = msgspec.convert(value, fields[key], dec_hook=_decode)
        except msgspec.ValidationError as error:
            full = f"{name}.{key}"
            raise ConfigError(
                f"{full} = {_shown(full, value)} is wrong; {_fix(fields[key], value)}"
            ) from error
    return type_(**values)


def _decode(type_: type, value: object) -> object:
    if type_ is Secret and isinstance(value, str):
        return Secret(value)
    raise TypeError(f"no {type_.__name__}")  # Says nothing of the value, which may be the secret.


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
    if type(None) in arguments:
        return _fix(arguments[0], value)
    if get_origin(type_) is tuple:
        return "write each as a table of its own: [[auth.tokens]] with a token in quotes and a list of scopes"
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
    if type_ in (str, Secret):
        return "write text in quotes"
    return "write it as a table"
