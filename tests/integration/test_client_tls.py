"""TLS of the client: what it trusts and shows, and what it says of a server with which it does not work."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from silo import ClusterUnreachable, ConfigError, ShardRouting, SiloGRPCClient, TlsError, TlsOptions
from silo.cli.server_process import free_port
from silo.client.tls import is_loopback
from silo.rpc.auth import EVERYTHING, Tokens
from silo.rpc.server import Security
from silo.rpc.tls import server_credentials
from tests.integration.certificates import PAST, Authority, tls_of
from tests.integration.child import failure, silo
from tests.integration.real_silo import real_silo

GROUP = "g"
TOKEN = "admin-0123456789abcdef"
# One pause would take a minute: whoever repeats a call misses the deadline of the test.
PATIENT = ShardRouting(retry_delay_ms=60_000, topology_refresh_interval_ms=0)
AT_ONCE_S = 10.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "stranger")


def secured(authority: Authority, **options: Any) -> Security:
    return Security(credentials=server_credentials(tls_of(authority, **options)))


async def works(servers: str | list[str], **options: Any) -> None:
    async with SiloGRPCClient(servers, shard_routing=PATIENT, **options) as client:
        async with asyncio.timeout(AT_ONCE_S):
            job = await client.enqueue(payload="secret", task_group=GROUP)
            assert (await job.job()).payload == "secret"


async def objection(servers: str | list[str], **options: Any) -> TlsError:
    """What the first call says, and that it says it at once."""
    async with SiloGRPCClient(servers, shard_routing=PATIENT, **options) as client:
        with pytest.raises(TlsError) as caught:
            async with asyncio.timeout(AT_ONCE_S):
                await client.enqueue(payload=1, task_group=GROUP)
    return caught.value


def port_of(address: str) -> str:
    return address.rpartition(":")[2]


# It works


async def test_a_client_trusts_the_authority_that_it_is_given(authority: Authority) -> None:
    async with real_silo(security=secured(authority)) as address:
        await works(address, tls=TlsOptions(ca_path=authority.path))
        await works(f"https://{address}", tls=TlsOptions(ca_path=str(authority.path)))


@pytest.mark.parametrize("options", [{"tls": True}, {"use_tls": True}])
async def test_without_one_it_trusts_the_authorities_of_the_system(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.path))
    async with real_silo(security=secured(authority)) as address:
        await works(address, **options)


@pytest.mark.parametrize("form", ["https://{}", "HTTPS://{}/"])
async def test_https_before_an_address_stands_for_tls(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.path))
    async with real_silo(security=secured(authority)) as address:
        await works(form.format(address))


async def test_authorities_of_the_system_may_lie_in_a_folder(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "certs"
    folder.mkdir()
    (folder / "0a1b2c3d.0").write_bytes(authority.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_DIR", str(folder))
    async with real_silo(security=secured(authority)) as address:
        await works(address, tls=True)


async def test_a_system_without_authorities_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"name a PEM file in tls\.ca_path"):
        SiloGRPCClient("h:1", tls=True)


async def test_http_before_an_address_stands_for_plaintext() -> None:
    async with real_silo() as address:
        await works(f"http://{address}")


async def test_a_client_shows_its_certificate_to_servers_that_ask_for_one(
    authority: Authority, stranger: Authority
) -> None:
    certificate, key = stranger.issue("client")
    options = TlsOptions(ca_path=authority.path, cert_path=certificate, key_path=key)
    async with real_silo(security=secured(authority, client_ca=stranger.path)) as address:
        await works(address, tls=options)


async def test_a_server_may_be_known_by_another_name_than_its_address(authority: Authority) -> None:
    options = TlsOptions(ca_path=authority.path, server_name="silo.internal")
    async with real_silo(security=secured(authority, hosts=("silo.internal",))) as address:
        await works(address, tls=options)


async def test_servers_that_are_found_through_others_are_reached_by_the_same_tls(
    authority: Authority,
) -> None:
    options = TlsOptions(ca_path=authority.path)
    async with (
        real_silo(security=secured(authority)) as owner,
        real_silo(security=secured(authority), advertised=owner) as first,
        SiloGRPCClient(first, tls=options, shard_routing=PATIENT) as client,
    ):
        await client.enqueue(id="j", payload=1, task_group=GROUP)
        assert [shard.server_addr for shard in client.get_topology()] == [owner]
        assert (await client.get_job("j")).payload == 1


async def test_a_token_goes_through_tls_without_a_warning(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    security = Security(
        tokens=Tokens([(TOKEN, EVERYTHING)]), credentials=server_credentials(tls_of(authority))
    )
    async with real_silo(security=security) as address:
        await works(address, tls=TlsOptions(ca_path=authority.path), token=TOKEN)
    assert caplog.records == []


async def test_a_server_whose_certificate_does_not_fit_does_not_hide_the_next_one(
    authority: Authority, stranger: Authority
) -> None:
    async with (
        real_silo(security=secured(stranger)) as wrong,
        real_silo(security=secured(authority)) as right,
    ):
        await works([wrong, right], tls=TlsOptions(ca_path=authority.path))


# It does not, and why


async def test_a_certificate_of_another_authority(authority: Authority, stranger: Authority) -> None:
    async with real_silo(security=secured(stranger)) as address:
        error = await objection(address, tls=TlsOptions(ca_path=authority.path))
    assert str(error) == (
        f"Failed to refresh cluster topology from any server: {address}: the server's certificate is not "
        "accepted: unable to get local issuer certificate; tls.ca_path must name the authority that signed it"
    )
    assert error.address == address
    assert not error.may_recover


async def test_a_certificate_for_another_name(authority: Authority) -> None:
    async with real_silo(security=secured(authority)) as address:
        error = await objection(f"localhost:{port_of(address)}", tls=TlsOptions(ca_path=authority.path))
    assert error.address.startswith("localhost:")
    assert "not accepted: Hostname mismatch, certificate is not valid for 'localhost'; " in error.reason
    assert "tls.server_name" in error.reason


async def test_a_certificate_that_has_expired(authority: Authority) -> None:
    async with real_silo(security=secured(authority, until=PAST)) as address:
        error = await objection(address, tls=TlsOptions(ca_path=authority.path))
    assert error.reason == "the server's certificate is not accepted: certificate has expired"


async def test_a_server_that_asks_for_a_certificate(authority: Authority, stranger: Authority) -> None:
    async with real_silo(security=secured(authority, client_ca=stranger.path)) as address:
        error = await objection(address, tls=TlsOptions(ca_path=authority.path))
        assert error.reason == "the server asks for a certificate; give tls.cert_path and tls.key_path"
        certificate, key = authority.issue("client")
        options = TlsOptions(ca_path=authority.path, cert_path=certificate, key_path=key)
        error = await objection(address, tls=options)
        assert error.reason == "the server does not accept the certificate of tls.cert_path"


async def test_a_server_that_speaks_no_tls(authority: Authority) -> None:
    async with real_silo() as address:
        error = await objection(address, tls=TlsOptions(ca_path=authority.path))
    assert error.reason == "the server does not speak TLS"


@pytest.mark.parametrize("asks_for_certificates", [False, True])
async def test_a_server_that_speaks_nothing_but_tls(
    authority: Authority, asks_for_certificates: bool
) -> None:
    client_ca = authority.path if asks_for_certificates else None
    async with real_silo(security=secured(authority, client_ca=client_ca)) as address:
        error = await objection(address)
    assert error.reason == "the server speaks TLS; write https:// before its address, or give tls"


async def test_an_owner_whose_certificate_does_not_fit_is_named_by_the_call(
    authority: Authority, stranger: Authority
) -> None:
    quick = ShardRouting(retry_delay_ms=1, topology_refresh_interval_ms=0)
    async with (
        real_silo(security=secured(stranger)) as owner,
        real_silo(security=secured(authority), advertised=owner) as first,
        SiloGRPCClient(first, tls=TlsOptions(ca_path=authority.path), shard_routing=quick) as client,
    ):
        with pytest.raises(TlsError) as caught:
            async with asyncio.timeout(AT_ONCE_S):
                await client.enqueue(payload=1, task_group=GROUP)
    assert caught.value.address == owner
    assert "not accepted" in str(caught.value)


async def test_with_a_server_down_the_other_ones_certificate_is_what_is_told(
    authority: Authority, stranger: Authority
) -> None:
    """It may be the one that is down that fits: the call is repeated before it fails."""
    routing = ShardRouting(max_retries=2, retry_delay_ms=1, topology_refresh_interval_ms=0)
    options = TlsOptions(ca_path=authority.path)
    async with real_silo(security=secured(stranger)) as wrong:
        servers = [wrong, f"127.0.0.1:{free_port()}"]
        async with SiloGRPCClient(servers, tls=options, shard_routing=routing) as client:
            with pytest.raises(
                ClusterUnreachable, match=f"{wrong}: the server's certificate is not accepted"
            ):
                await client.enqueue(payload=1, task_group=GROUP)


async def test_a_server_that_is_down_is_no_question_of_tls(authority: Authority) -> None:
    routing = ShardRouting(max_retries=0, topology_refresh_interval_ms=0)
    address = f"127.0.0.1:{free_port()}"
    async with SiloGRPCClient(
        address, tls=TlsOptions(ca_path=authority.path), shard_routing=routing
    ) as client:
        with pytest.raises(ClusterUnreachable) as caught:
            await client.enqueue(payload=1, task_group=GROUP)
    assert not isinstance(caught.value, TlsError)


@asynccontextmanager
async def rude_server(speak: Callable[[asyncio.StreamWriter], None]) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        speak(writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("secure", [False, True])
async def test_a_server_that_hangs_up_is_no_question_of_tls(authority: Authority, secure: bool) -> None:
    """So does one that restarts, behind a balancer, say: the call is repeated."""
    routing = ShardRouting(max_retries=1, retry_delay_ms=1, topology_refresh_interval_ms=0)
    options = TlsOptions(ca_path=authority.path) if secure else None
    async with (
        rude_server(lambda writer: None) as address,
        SiloGRPCClient(address, tls=options, shard_routing=routing) as client,
    ):
        began = time.monotonic()
        with pytest.raises(ClusterUnreachable) as caught:
            await client.enqueue(payload=1, task_group=GROUP)
    assert not isinstance(caught.value, TlsError)
    assert time.monotonic() - began < AT_ONCE_S


# Files


def missing(folder: Path) -> TlsOptions:
    return TlsOptions(ca_path=folder / "none.pem")


def of_text(folder: Path) -> TlsOptions:
    (folder / "text.pem").write_text("hello")
    return TlsOptions(ca_path=folder / "text.pem")


def without_its_key(folder: Path) -> TlsOptions:
    certificate, key = Authority(folder, "a").issue("client")
    key.unlink()
    return TlsOptions(cert_path=certificate, key_path=key)


def with_another_key(folder: Path) -> TlsOptions:
    authority = Authority(folder, "a")
    return TlsOptions(cert_path=authority.issue("one")[0], key_path=authority.issue("two")[1])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (missing, "tls.ca_path: cannot read {}/none.pem: No such file or directory"),
        (of_text, "tls.ca_path: {}/text.pem holds no certificate; name a PEM file with one"),
        (without_its_key, "tls.key_path: cannot read {}/client.key: No such file or directory"),
        (
            with_another_key,
            "tls.cert_path: {0}/one.crt and tls.key_path: {0}/two.key do not go together; name a certificate "
            "and its own key, undamaged (KEY_VALUES_MISMATCH)",
        ),
        (lambda folder: TlsOptions(cert_path="a"), "tls.key_path is missing; tls.cert_path needs it"),
        (lambda folder: TlsOptions(key_path="a"), "tls.cert_path is missing; tls.key_path needs it"),
        (lambda folder: TlsOptions(ca_path=""), "tls.ca_path is empty; leave it out or give one"),
        (lambda folder: TlsOptions(server_name=" "), "tls.server_name is empty; leave it out or give one"),
    ],
)
def test_an_unusable_file_is_named_before_anything_is_sent(
    tmp_path: Path, options: Callable[[Path], TlsOptions], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        SiloGRPCClient("127.0.0.1:1", tls=options(tmp_path))
    assert str(caught.value) == text.format(tmp_path)


@pytest.mark.parametrize(
    ("servers", "options", "text"),
    [
        (["https://a:1", "http://b:1"], {}, "https://a:1 asks for TLS and http://b:1 for none"),
        ("https://a:1", {"tls": False}, "https://a:1 asks for TLS, but tls is off"),
        ("http://a:1", {"tls": True}, "http://a:1 asks for plaintext, but tls is given"),
        ("http://a:1", {"tls": TlsOptions()}, "http://a:1 asks for plaintext, but tls is given"),
        ("http://a:1", {"use_tls": True}, "http://a:1 asks for plaintext, but tls is given"),
        ("http://a:1", {"address_map": {"b:1": "https://c:1"}}, "https://c:1 asks for TLS and http://a:1"),
    ],
)
def test_contradictions_are_errors(servers: str | list[str], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SiloGRPCClient(servers, **options)
    assert str(caught.value).startswith(text)


# Tokens


@pytest.mark.parametrize(
    ("address", "stays"),
    [
        ("127.0.0.1:7450", True),
        ("127.1.2.3:7450", True),
        ("localhost:7450", True),
        ("[::1]:7450", True),
        ("unix:/run/silo", True),
        ("silo.example:7450", False),
        ("10.0.0.1:7450", False),
        ("[2001:db8::1]:7450", False),
        ("localhost.example:7450", False),
        ("0.0.0.0:7450", False),
    ],
)
def test_loopback_is_told_by_the_address(address: str, stays: bool) -> None:
    assert is_loopback(address) is stays


async def test_a_token_over_a_network_without_tls_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    routing = ShardRouting(max_retries=1, retry_delay_ms=1, topology_refresh_interval_ms=0)
    async with SiloGRPCClient("silo.invalid:7450", token=TOKEN, shard_routing=routing) as client:
        for _ in range(2):
            with pytest.raises(ClusterUnreachable):
                await client.enqueue(payload=1, task_group=GROUP)
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "sent to silo.invalid:7450 without TLS" in record.getMessage()
    assert TOKEN not in caplog.text


async def test_a_token_that_stays_on_this_machine_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    async with real_silo(security=Security(tokens=Tokens([(TOKEN, EVERYTHING)]))) as address:
        await works(address, token=TOKEN)
    assert caplog.records == []


# `silo worker`


async def test_the_worker_command_connects_by_tls(tmp_path: Path, authority: Authority) -> None:
    (tmp_path / "jobs.py").write_text("async def double(ctx):\n    return 2 * ctx.task.payload\n")
    certificate, key = authority.issue("client")
    options = TlsOptions(ca_path=authority.path, cert_path=certificate, key_path=key)
    files = ("--tls-ca", str(authority.path), "--tls-cert", str(certificate), "--tls-key", str(key))
    security = secured(authority, client_ca=authority.path)
    async with real_silo(security=security) as address, SiloGRPCClient(address, tls=options) as client:
        command = ("worker", "jobs:double", "--task-group", GROUP, "--server", f"https://{address}", *files)
        async with silo(tmp_path, *command) as worker:
            job = await client.enqueue(payload=21, task_group=GROUP)
            assert (await job.result(timeout=20)).result == 42
            assert await worker.stop() == 0
            assert worker.err == ""


async def test_the_worker_command_trusts_the_authorities_of_the_system(
    tmp_path: Path, authority: Authority
) -> None:
    (tmp_path / "jobs.py").write_text("async def double(ctx):\n    return 2 * ctx.task.payload\n")
    env = {"SSL_CERT_FILE": str(authority.path)}
    options = TlsOptions(ca_path=authority.path)
    async with (
        real_silo(security=secured(authority)) as address,
        SiloGRPCClient(address, tls=options) as client,
    ):
        command = ("worker", "jobs:double", "--task-group", GROUP, "--server", address, "--tls")
        async with silo(tmp_path, *command, env=env):
            job = await client.enqueue(payload=21, task_group=GROUP)
            assert (await job.result(timeout=20)).result == 42


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--tls-ca", "none.pem"), "Error: tls.ca_path: cannot read none.pem: No such file or directory"),
        (("--tls-cert", "a.crt"), "Error: tls.key_path is missing; tls.cert_path needs it"),
        (("--tls", "--server", "http://h:1"), "Error: http://h:1 asks for plaintext, but tls is given; "),
        (("--server", "https://nowhere"), "Error: --server = 'nowhere' is no address; write host:port"),
    ],
)
async def test_a_wrong_option_of_the_worker_command_is_one_line(
    tmp_path: Path, options: tuple[str, ...], line: str
) -> None:
    (tmp_path / "jobs.py").write_text("async def double(ctx):\n    return 2 * ctx.task.payload\n")
    said = await failure(tmp_path, "worker", "jobs:double", "--task-group", GROUP, *options)
    assert said.startswith(line)
