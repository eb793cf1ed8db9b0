"""Who may call what: the decision by token and by scope, and the configuration of tokens."""

import re
from pathlib import Path

import msgspec
import pytest

from silo.config import Config, Secret, load_config
from silo.errors import ConfigError
from silo.rpc.auth import EVERYTHING, Access, Denied, Tokens, Unauthenticated, access_from, tokens_from
from silo.wire.pb.silo.v1 import silo_pb2 as pb

TOKEN = "correct-horse-battery"
OTHER = "staple-correct-horse!"
METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["Silo"].methods]


def header(value: str) -> tuple[tuple[str, str], ...]:
    return (("user-agent", "test"), ("authorization", value))


def load(tmp_path: Path, text: str, **env: str) -> Config:
    path = tmp_path / "silo.toml"
    path.write_text(text)
    return load_config(path, {"HOME": "/home/ada"} | env)


def refusal(tmp_path: Path, text: str, **env: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **env)
    return caught.value.message


def request_of(method: str, **fields: object) -> object:
    kind = pb.DESCRIPTOR.services_by_name["Silo"].methods_by_name[method].input_type.name
    return getattr(pb, kind)(**fields)


def allows(scopes: list[str], method: str, **fields: object) -> bool:
    try:
        access_from(scopes).check_call(method, request_of(method, **fields))
    except Denied:
        return False
    return True


# Tokens


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        (None, "missing authorization header"),
        ((), "missing authorization header"),
        ((("x-authorization", f"Bearer {TOKEN}"),), "missing authorization header"),
        (header("Bearer caf\u00e9"), "invalid authorization header"),
        (header("Bearer a\x01b"), "invalid authorization header"),
        (header(""), "invalid auth token"),
        (header("Bearer"), "invalid auth token"),
        (header("Bearer "), "invalid auth token"),
        (header(TOKEN), "invalid auth token"),
        (header(f"bearer {TOKEN}"), "invalid auth token"),
        (header(f"Bearer  {TOKEN}"), "invalid auth token"),
        (header(f" Bearer {TOKEN}"), "invalid auth token"),
        (header(f"Bearer {TOKEN} "), "invalid auth token"),
        (header(f"Bearer {TOKEN}x"), "invalid auth token"),
        (header(f"Bearer {TOKEN[:-1]}"), "invalid auth token"),
        (header(f"Bearer {TOKEN.upper()}"), "invalid auth token"),
        (header(f"Basic {TOKEN}"), "invalid auth token"),
    ],
)
def test_every_wrong_header_has_its_text(metadata: tuple[tuple[str, str], ...] | None, text: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        Tokens([(TOKEN, EVERYTHING)]).access(metadata)
    assert caught.value.message == text


def test_each_token_has_its_own_access() -> None:
    worker = Access(task_groups=frozenset({"g"}))
    tokens = Tokens([(TOKEN, EVERYTHING), (OTHER, worker)])
    assert tokens.access(header(f"Bearer {TOKEN}")) == EVERYTHING
    assert tokens.access(header(f"Bearer {OTHER}")) == worker


def test_the_first_header_counts() -> None:
    with pytest.raises(Unauthenticated):
        Tokens([(TOKEN, EVERYTHING)]).access((*header("Bearer wrong"), *header(f"Bearer {TOKEN}")))


def test_every_known_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def compare(known: bytes, sent: bytes) -> bool:
        compared.append((len(known), len(sent)))
        return known == sent

    monkeypatch.setattr("silo.rpc.auth.hmac.compare_digest", compare)
    tokens = Tokens([(TOKEN, EVERYTHING), (OTHER, EVERYTHING), (OTHER * 9, EVERYTHING)])
    tokens.access(header(f"Bearer {TOKEN}"))
    assert compared == [(32, 32)] * 3


# Scopes


@pytest.mark.parametrize("method", METHODS)
def test_an_admin_may_call_everything(method: str) -> None:
    assert allows(["admin"], method)


@pytest.mark.parametrize("method", METHODS)
def test_who_has_no_scope_may_only_read_the_shard_map(method: str) -> None:
    assert allows([], method) == (method == "GetClusterInfo")


def test_a_tenant_scope_reaches_the_jobs_of_that_tenant_and_nothing_else() -> None:
    reached = {method for method in METHODS if allows(["tenant:ada"], method, **_naming(method, "ada"))}
    assert reached == {
        "GetClusterInfo",
        "Enqueue",
        "GetJob",
        "GetJobResult",
        "DeleteJob",
        "CancelJob",
        "RestartJob",
        "ExpediteJob",
    }
    others = {method for method in METHODS if allows(["tenant:ada"], method, **_naming(method, "Ada"))}
    assert others == {"GetClusterInfo"}


def _naming(method: str, tenant: str) -> dict[str, str]:
    names = {field.name for field in request_of(method).DESCRIPTOR.fields}
    return {name: tenant for name in ("tenant", "tenant_id") if name in names}


def test_a_worker_scope_reaches_its_task_group_and_its_leases() -> None:
    scopes = ["worker:emails"]
    assert {method for method in METHODS if allows(scopes, method)} == {
        "GetClusterInfo",
        "ReportOutcome",
        "ReportRefreshOutcome",
        "Heartbeat",
    }
    assert allows(scopes, "LeaseTasks", task_group="emails")
    assert not allows(scopes, "LeaseTasks", task_group="email")
    access = access_from(scopes)
    access.check_task("emails")
    with pytest.raises(Denied, match="scope 'worker:other'"):
        access.check_task("other")


def test_a_job_without_a_tenant_belongs_to_the_tenant_of_all() -> None:
    assert allows(["tenant:-"], "Enqueue")
    assert not allows(["tenant:ada"], "Enqueue")


def test_scopes_add_up() -> None:
    scopes = ["tenant:ada", "tenant:bob", "worker:g"]
    assert allows(scopes, "Enqueue", tenant="ada")
    assert allows(scopes, "Enqueue", tenant="bob")
    assert allows(scopes, "LeaseTasks", task_group="g")
    assert not allows(scopes, "Enqueue", tenant="g")
    assert not allows(scopes, "LeaseTask", tenant="ada")


def test_a_name_may_hold_a_colon() -> None:
    assert allows(["tenant:eu:ada"], "Enqueue", tenant="eu:ada")


@pytest.mark.parametrize(
    ("method", "fields", "scope"),
    [
        ("Enqueue", {"tenant": "ada"}, "'tenant:ada'"),
        ("LeaseTasks", {"task_group": "emails"}, "'worker:emails'"),
        ("Heartbeat", {}, "'worker:<task group>'"),
        ("Query", {"tenant": "ada"}, "'admin'"),
    ],
)
def test_a_denial_names_the_scope_that_is_needed(method: str, fields: dict[str, str], scope: str) -> None:
    with pytest.raises(Denied, match=f"{method} needs a token with a?.*scope {re.escape(scope)}"):
        access_from([]).check_call(method, request_of(method, **fields))


# Configuration


def test_without_tokens_there_is_no_authentication(tmp_path: Path) -> None:
    assert tokens_from(load(tmp_path, "")) is None
    assert tokens_from(load(tmp_path, "[auth]")) is None


def test_the_single_token_is_an_admin(tmp_path: Path) -> None:
    tokens = tokens_from(load(tmp_path, "[server]\nauth_token = '${T}'", T=TOKEN))
    assert tokens is not None
    assert tokens.access(header(f"Bearer {TOKEN}")) == EVERYTHING


def test_tokens_bring_their_scopes(tmp_path: Path) -> None:
    text = f"""
        tenancy.enabled = true
        [[auth.tokens]]
        token = "{TOKEN}"
        scopes = ["tenant:ada", "worker:g"]
        [[auth.tokens]]
        token = "{OTHER}"
        scopes = ["admin"]
    """
    tokens = tokens_from(load(tmp_path, text))
    assert tokens is not None
    access = tokens.access(header(f"Bearer {TOKEN}"))
    assert access == Access(tenants=frozenset({"ada"}), task_groups=frozenset({"g"}))
    assert tokens.access(header(f"Bearer {OTHER}")).is_admin


def entry(token: str = f"'{TOKEN}'", scopes: str = "['admin']", more: str = "") -> str:
    return f"[[auth.tokens]]\ntoken = {token}\nscopes = {scopes}\n{more}"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[server]\nauth_token = ''", ["server.auth_token is empty", "is its variable set?"]),
        ("[server]\nauth_token = '${UNSET}'", ["server.auth_token is empty"]),
        ("[server]\nauth_token = ' \\t'".replace("'", '"'), ["server.auth_token is empty"]),
        ("[server]\nauth_token = 'fifteen-chars-x'", ["server.auth_token is too short", "openssl rand"]),
        (f"[server]\nauth_token = '{'x' * 5000}'", ["server.auth_token is too long"]),
        (f"[server]\nauth_token = '{TOKEN} '", ["server.auth_token has spaces"]),
        (f"[server]\nauth_token = '{TOKEN}é'", ["server.auth_token has", "beyond ASCII"]),
        ("[server]\nauth_token = 12345678901234567890", ["server.auth_token = (hidden)", "text in quotes"]),
        ("[auth]\ntokens = []", ["auth.tokens is empty"]),
        ("[auth]\ntokens = 3", ["auth.tokens = (hidden)", "[[auth.tokens]]"]),
        ("[[auth]]\ntoken = 'x'", ["[auth]"]),
        (f"[[auth.tokens]]\ntoken = '{TOKEN}'", ["auth.tokens", "list of scopes"]),
        (entry(more="scope = 'x'"), ["auth.tokens", "list of scopes"]),
        (entry(token="''"), ["auth.tokens[0].token is empty"]),
        (entry() + entry(token="'short'"), ["auth.tokens[1].token is too short"]),
        (entry() + entry(), ["auth.tokens[1].token", "same token as auth.tokens[0].token"]),
        (f"server.auth_token = '{TOKEN}'\n" + entry(), ["same token as server.auth_token"]),
        (entry(scopes="[]"), ["auth.tokens[0].scopes is empty"]),
        (entry(scopes="['admin', 'Admin']"), ["auth.tokens[0].scopes[1] is no scope", "'tenant:<id>'"]),
        (entry(scopes="['tenant:']"), ["is no scope"]),
        (entry(scopes="['tenant: ']"), ["is no scope"]),
        (entry(scopes="['admin:x']"), ["is no scope"]),
        (entry(scopes="['worker']"), ["is no scope"]),
        (entry(scopes="['tenant:ada']"), ["tenancy is off", "'tenant:-'"]),
    ],
)
def test_a_wrong_token_is_an_error_that_says_so_and_not_what_it_is(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    message = refusal(tmp_path, text)
    for part in parts:
        assert part in message
    assert "\n" not in message
    for secret in (TOKEN, "fifteen-chars-x", "12345678901234567890", "short'", "xxxxxxxx"):
        assert secret not in message


def test_a_configuration_does_not_show_its_tokens(tmp_path: Path) -> None:
    text = f"[server]\nauth_token = '{OTHER}'\n" + entry()
    config = load(tmp_path, text)
    tokens = tokens_from(config)
    for shown in (repr(config), str(config), repr(tokens), repr(vars(tokens)), f"{config.server.auth_token}"):
        assert TOKEN not in shown
        assert OTHER not in shown
    with pytest.raises(TypeError):  # Whoever wants it in a file or a page must say how.
        msgspec.json.encode(config)


def test_secrets_are_equal_by_what_they_hold() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a")}) == 1
