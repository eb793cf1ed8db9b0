"""The configuration: expansion, defaults, and errors that say what to do."""

import re
from pathlib import Path

import msgspec
import pytest

from silo.config import Address, Config, expand, load_config, parse_address, parse_url
from silo.errors import ConfigError
from silo.storage.durability import Durability

ENV = {"HOME": "/home/ada"}


def load(tmp_path: Path, text: str, env: dict[str, str] | None = None) -> Config:
    path = tmp_path / "silo.toml"
    path.write_text(text)
    return load_config(path, ENV | (env or {}))


def refusal(tmp_path: Path, text: str, env: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, env)
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("${SET}", "value"),
        ("a ${SET} b ${SET}", "a value b value"),
        ("${UNSET}", ""),
        ("${UNSET:-text}", "text"),
        ("${UNSET:-}", ""),
        ("${UNSET:-a:-b$c}", "a:-b$c"),
        ("${SET:-text}", "value"),
        ("${EMPTY:-text}", ""),
        ("${BROKEN:-text}", "text"),
        ("${BROKEN}", ""),
        ("$SET", "$SET"),
        ("5 $ and $", "5 $ and $"),
        ("${SET and no more", "${SET and no more"),
        ("${UNSET:-${SET}}", "${SET}"),
    ],
)
def test_expansion(text: str, result: str) -> None:
    env = {"SET": "value", "EMPTY": "", "BROKEN": "\udcff"}
    assert expand(text, env) == result


def test_expansion_reaches_comments_and_can_bring_toml(tmp_path: Path) -> None:
    config = load(tmp_path, "# ${MORE}\n", {"MORE": "\n[tenancy]\nenabled = true"})
    assert config.tenancy.enabled


def test_without_a_file_everything_has_a_default() -> None:
    config = load_config(None, ENV)
    assert config.server.grpc_addr == "127.0.0.1:7450"
    assert config.coordination.initial_shard_count == 8
    assert config.database.backend == "fs"
    assert config.database.root == "/home/ada/.local/share/silo"
    assert config.database.durability is Durability.FLUSHED


def test_the_data_directory_follows_xdg() -> None:
    assert load_config(None, ENV | {"XDG_DATA_HOME": "/data"}).database.path == "/data/silo/%shard%"


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == load_config(None, ENV)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.toml", ENV)


def test_flags_stand_above_the_file(tmp_path: Path) -> None:
    path = tmp_path / "silo.toml"
    path.write_text('[server]\ngrpc_addr = "127.0.0.1:1"')
    config = load_config(path, ENV, overrides={"server.grpc_addr": "127.0.0.1:2"})
    assert config.server.grpc_addr == "127.0.0.1:2"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[servr]", ["[servr]", "did you mean server?"]),
        ("[server]\ngrpc_adr = 'x:1'", ["server.grpc_adr", "did you mean server.grpc_addr?"]),
        ("[coordination]\nnum_shards = 4", ["did you mean coordination.initial_shard_count?"]),
        ("[tenancy]\nzzzz = 1", ["tenancy.zzzz", "known are: enabled"]),
        ("server = 1", ["server", "[server]"]),
        ("[server]\ndev_mode = 'yes'", ["server.dev_mode = 'yes'", "true or false"]),
        ("[server]\ngrpc_addr = 7450", ["server.grpc_addr = 7450", "text in quotes"]),
        ("[logging]\nformat = 'JSON'", ["logging.format = 'JSON'", "did you mean 'json'"]),
        ("[database]\nbackend = 'disk'", ["database.backend = 'disk'", "'fs', 'memory'"]),
        ("[database]\ndurability = 'none'", ["'flushed', 'buffered'"]),
        ("[coordination]\ninitial_shard_count = 0", ["= 0", "from 1 to 4096"]),
        ("[coordination]\ninitial_shard_count = -1", ["= -1", "from 1 to 4096"]),
        ("[coordination]\ninitial_shard_count = true", ["= true", "whole number"]),
        ("[coordination]\nnode_id = ' '", ["coordination.node_id"]),
        ("[database]\nflush_interval_ms = 0", ["= 0", "from 1 to"]),
        ("[gubernator]\naddress = ''", ["gubernator.address is empty", "http://127.0.0.1:1051"]),
        ("[gubernator]\naddress = 'limiter'", ["gubernator.address = 'limiter'", "http://host:port"]),
        ("[gubernator]\naddress = 'http://limiter'", ["'http://limiter'", "http://host:port"]),
        ("[gubernator]\naddress = 'limiter:0'", ["'limiter:0'", "http://host:port"]),
        ("[gubernator]\naddress = 'dns:///limiter:1'", ["'dns:///limiter:1'", "https://host:port for TLS"]),
        ("[gubernator]\naddress = 'http://a:1/b'", ["'http://a:1/b'", "http://host:port"]),
        ("[gubernator]\naddress = 'http://a:hunter2@b:1'", ["must not have a user or a password"]),
        ("[gubernator]\naddr = 'a:1'", ["did you mean gubernator.address?"]),
        ("[gubernator]\ncoalesce_interval_ms = -1", ["= -1", "from 0 to 1000"]),
        ("[gubernator]\nmax_batch_size = 0", ["= 0", "from 1 to 1000"]),
        ("[gubernator]\nmax_batch_size = 1001", ["= 1001", "from 1 to 1000"]),
        ("[gubernator]\nconnect_timeout_ms = 0", ["= 0", "from 1 to 60000"]),
        ("[gubernator]\nrequest_timeout_ms = 60001", ["= 60001", "from 1 to 60000"]),
        ("[database]\ncompleted_job_expire_s = 0", ["completed_job_expire_s = 0", "from 1 to 3153600000"]),
        ("[database]\nterminal_job_expire_s = -1", ["terminal_job_expire_s = -1", "from 1 to"]),
        ("[database]\nterminal_job_expire_s = 3153600001", ["from 1 to 3153600000"]),
        ("[database]\ncompleted_job_expire_s = '7d'", ["= '7d'", "whole number"]),
        ("[server]\nmax_memory_mb = -1", ["server.max_memory_mb = -1", "from 0 to 16777216"]),
        ("[server]\nmax_memory_mb = '80%'", ["server.max_memory_mb = '80%'", "whole number"]),
        ("[metrics]\naddr = '9090'", ["metrics.addr = '9090'", "host:port"]),
        ("[metrics]\naddr = ''", ["metrics.addr", "host:port"]),
        ("[metrics]\nenabled = 'no'", ["metrics.enabled", "true or false"]),
        ("[metrics]\nport = 9090", ["unknown key metrics.port", "known are: enabled, addr"]),
        ("[dispatch]\npriority_step_ms = -5", ["= -5", "from 0 to"]),
        ("[database]\nslatedb = 3", ["database.slatedb = 3", "table"]),
        ("[database]\nbackend = 's3'", ["database.path is missing"]),
        ("[database]\npath = '/tmp/silo-%shard%'", ["must end in /%shard%"]),
        ("[database]\npath = '/tmp/silo'", ["must end in /%shard%"]),
        ("[database]\npath = '/tmp/%shard%/more'", ["must end in /%shard%"]),
        ("[server]\ngrpc_addr = 'nowhere'", ["server.grpc_addr", "host:port"]),
        ("[server]\ngrpc_addr = '127.0.0.1:65536'", ["from 0 to 65535"]),
        ("[server]\ngrpc_addr = '::1:7450'", ["host:port"]),
        ("[server]\ngrpc_addr = '*:7450'", ["write 0.0.0.0"]),
        ("[server]\ngrpc_addr = 'a\\u0000b:1'".replace("'", '"'), ["host:port"]),
        (f"[server]\ngrpc_addr = '127.0.0.1:{'9' * 5000}'", ["from 0 to 65535"]),
        ("[database]\ndurability = 'flush'", ["did you mean 'flushed'?"]),
        ("[database.slatedb]\na = 1979-05-27", ["database.slatedb", "as text in quotes"]),
        ("= 3", ["not valid TOML"]),
        (f"a = {'9' * 5000}", ["is not a configuration"]),
        (f"a = {'[' * 5000}", ["is not a configuration"]),
    ],
)
def test_a_wrong_configuration_names_the_key_and_the_fix(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refusal(tmp_path, text)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("placeholder", ["%shard%", "{shard}"])
def test_both_placeholders_are_known(tmp_path: Path, placeholder: str) -> None:
    config = load(tmp_path, f"[database]\nbackend = 's3'\npath = 's3://bucket/a/{placeholder}'")
    assert config.database.root == "s3://bucket/a"


def test_jobs_are_kept_for_ever_unless_a_time_is_set(tmp_path: Path) -> None:
    database = load(tmp_path, "").database
    assert (database.completed_job_expire_s, database.terminal_job_expire_s) == (None, None)
    database = load(tmp_path, "[database]\ncompleted_job_expire_s = 3600").database
    assert (database.completed_job_expire_s, database.terminal_job_expire_s) == (3600, None)


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("", "flushed"),
        ("durability = 'buffered'", "buffered"),
        ("backend = 'memory'", "none"),
        ("backend = 'memory'\ndurability = 'flushed'", "none"),
    ],
)
def test_the_durability_in_force_depends_on_where_the_data_is(tmp_path: Path, text: str, level: str) -> None:
    assert load(tmp_path, f"[database]\n{text}").database.durability_in_force == level


def test_zero_memory_is_no_bound_and_allowed(tmp_path: Path) -> None:
    assert load(tmp_path, "").server.max_memory_mb is None
    assert load(tmp_path, "[server]\nmax_memory_mb = 0").server.max_memory_mb == 0


def test_zero_priority_step_is_allowed(tmp_path: Path) -> None:
    assert load(tmp_path, "[dispatch]\npriority_step_ms = 0").dispatch.priority_step_ms == 0


def test_an_error_hides_secrets(tmp_path: Path) -> None:
    text = "[database]\nbackend = 'url'\npath = 's3://key:${SECRET}@host/a'"
    assert "hunter2" not in refusal(tmp_path, text, {"SECRET": "hunter2"})


def test_no_limiter_is_configured_by_default(tmp_path: Path) -> None:
    assert load(tmp_path, "[gubernator]\nmax_batch_size = 7").gubernator.address is None


@pytest.mark.parametrize(
    ("url", "address", "is_tls"),
    [
        ("limiter:1051", "limiter:1051", False),
        ("http://limiter:1051", "limiter:1051", False),
        ("HTTP://limiter:1051/", "limiter:1051", False),
        ("https://[::1]:1051", "[::1]:1051", True),
    ],
)
def test_a_limiter_is_named_by_a_url_or_an_address(
    tmp_path: Path, url: str, address: str, is_tls: bool
) -> None:
    assert load(tmp_path, f"[gubernator]\naddress = '{url}'").gubernator.address == url
    assert parse_url("gubernator.address", url) == (address, is_tls)


def test_ipv6_addresses_stand_in_brackets() -> None:
    assert parse_address("server.grpc_addr", "[::1]:7450") == Address("::1", 7450)


def test_a_relative_xdg_directory_does_not_count() -> None:
    assert load_config(None, ENV | {"XDG_DATA_HOME": "data"}).database.root == "/home/ada/.local/share/silo"


@pytest.mark.parametrize(
    ("path", "root"),
    [("~/jobs/%shard%", "/home/ada/jobs"), ("/a b/{shard}", "/a b"), ("/%shard%", "/")],
)
def test_a_local_path_becomes_an_absolute_folder(tmp_path: Path, path: str, root: str) -> None:
    assert load(tmp_path, f"[database]\npath = '{path}'").database.root == root


def test_a_relative_path_starts_where_the_server_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(tmp_path, "[database]\npath = 'data/%shard%'").database.root == f"{tmp_path}/data"


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff[tenancy]\nenabled = true").tenancy.enabled


def test_the_guide_lists_every_key_with_its_default() -> None:
    guide = Path(__file__).parents[2] / "docs" / "guides" / "running-a-server.md"
    table, _, _ = guide.read_text().partition("\nEnvironment: ")
    listed = re.findall(r"^\| `(\w+\.\w+)` \| `?([^|`]*?)`? \|", table, re.MULTILINE)
    known = [
        (f"{section.name}.{field.name}", _shown(field.default))
        for section in msgspec.structs.fields(Config)
        for field in msgspec.structs.fields(section.type)
    ]
    assert listed == known


def _shown(default: object) -> str:
    match default:
        case bool():
            return str(default).lower()
        case Durability():
            return default.value
        case None | "":
            return "unset"
    return "{}" if default is msgspec.NODEFAULT else str(default)
