"""TLS and mutual TLS: who gets through, and what is said about files that do not work."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any  # Stubs and messages of grpc are untyped.

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from silo.cli.server_process import free_port
from silo.config import TlsConfig, load_config
from silo.errors import ConfigError
from silo.rpc.auth import EVERYTHING, Tokens
from silo.rpc.server import Security
from silo.rpc.tls import server_credentials
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2_grpc
from tests.integration.certificates import Authority, pem, tls_of
from tests.integration.child import failure, silo
from tests.integration.rpc_server import refusal, rpc_server

INFO = pb.GetClusterInfoRequest()
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@asynccontextmanager
async def calling(
    address: str, authority: Authority, client: tuple[Path, Path] | None = None
) -> AsyncIterator[Any]:
    """The calls of a TLS server, trusting `authority` and showing the certificate of `client`."""
    certificate, key = (file.read_bytes() for file in client) if client else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.pem, key, certificate)
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        yield silo_pb2_grpc.SiloStub(channel)


async def test_calls_go_through_tls(authority: Authority) -> None:
    security = Security(credentials=server_credentials(tls_of(authority)))
    async with rpc_server(security=security) as server, calling(server.address, authority) as stub:
        assert (await stub.GetClusterInfo(INFO)).num_shards == 1


async def test_a_tls_port_does_not_speak_plaintext(authority: Authority) -> None:
    security = Security(credentials=server_credentials(tls_of(authority)))
    async with rpc_server(security=security) as server:
        code, _ = await refusal(server.stub.GetClusterInfo(INFO, timeout=10))
        assert code is UNAVAILABLE


async def test_a_client_does_not_trust_a_server_of_another_authority(
    tmp_path: Path, authority: Authority
) -> None:
    security = Security(credentials=server_credentials(tls_of(authority)))
    stranger = Authority(tmp_path, "stranger")
    async with rpc_server(security=security) as server, calling(server.address, stranger) as stub:
        code, _ = await refusal(stub.GetClusterInfo(INFO, timeout=10))
        assert code is UNAVAILABLE


async def test_tokens_count_inside_tls(authority: Authority) -> None:
    token = "admin-0123456789abcdef"
    security = Security(
        tokens=Tokens([(token, EVERYTHING)]), credentials=server_credentials(tls_of(authority))
    )
    async with rpc_server(security=security) as server, calling(server.address, authority) as stub:
        code, _ = await refusal(stub.GetClusterInfo(INFO))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        answer = await stub.GetClusterInfo(INFO, metadata=(("authorization", f"Bearer {token}"),))
        assert answer.num_shards == 1


async def test_mutual_tls_lets_only_clients_of_its_authority_in(tmp_path: Path, authority: Authority) -> None:
    clients, strangers = Authority(tmp_path, "clients"), Authority(tmp_path, "strangers")
    security = Security(credentials=server_credentials(tls_of(authority, client_ca=clients.path)))
    async with rpc_server(security=security) as server:
        async with calling(server.address, authority, clients.issue("known")) as stub:
            assert (await stub.GetClusterInfo(INFO)).num_shards == 1
        for client in (None, strangers.issue("unknown"), authority.issue("of-the-wrong-authority")):
            async with calling(server.address, authority, client) as stub:
                code, _ = await refusal(stub.GetClusterInfo(INFO, timeout=10))
                assert code is UNAVAILABLE


async def test_the_command_serves_tls_as_its_file_says(tmp_path: Path, authority: Authority) -> None:
    certificate, key = authority.issue("server")
    file = tmp_path / "silo.toml"
    file.write_text(
        f"[tls]\ncert_path = '{certificate}'\nkey_path = '{key}'\nclient_ca_path = '{authority.path}'\n"
    )
    address = f"127.0.0.1:{free_port()}"
    async with silo(tmp_path, "server", "-c", str(file), "--grpc-addr", address) as server:
        await server.says("Ctrl-C")
        async with calling(address, authority, authority.issue("client")) as stub:
            assert (await stub.GetClusterInfo(INFO)).num_shards == 8
        assert await server.stop() == 0


async def test_the_command_says_in_one_line_which_file_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "silo.toml"
    file.write_text(f"[tls]\ncert_path = '{tmp_path}/none.crt'\nkey_path = '{tmp_path}/none.key'\n")
    line = await failure(tmp_path, "server", "-c", str(file), "--grpc-addr", "127.0.0.1:0")
    assert line == f"Config error: tls.cert_path: cannot read {tmp_path}/none.crt: No such file or directory"


# Files that do not work


def without_key(tls: TlsConfig, folder: Path) -> None:
    Path(tls.key_path or "").unlink()


def key_is_a_folder(tls: TlsConfig, folder: Path) -> None:
    without_key(tls, folder)
    Path(tls.key_path or "").mkdir()


def certificate_is_text(tls: TlsConfig, folder: Path) -> None:
    Path(tls.cert_path or "").write_text("hello")


def files_are_swapped(tls: TlsConfig, folder: Path) -> None:
    certificate, key = Path(tls.cert_path or ""), Path(tls.key_path or "")
    kept = certificate.read_bytes()
    certificate.write_bytes(key.read_bytes())
    key.write_bytes(kept)


def key_is_another(tls: TlsConfig, folder: Path) -> None:
    Path(tls.key_path or "").write_bytes(
        pem(ec.generate_private_key(ec.SECP256R1()), serialization.NoEncryption())
    )


def key_is_damaged(tls: TlsConfig, folder: Path) -> None:
    Path(tls.key_path or "").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")


def key_has_a_passphrase(tls: TlsConfig, folder: Path) -> None:
    locked = serialization.BestAvailableEncryption(b"hunter2")
    Path(tls.key_path or "").write_bytes(pem(ec.generate_private_key(ec.SECP256R1()), locked))


def authority_is_missing(tls: TlsConfig, folder: Path) -> None:
    Path(tls.client_ca_path or "").unlink()


def authority_is_text(tls: TlsConfig, folder: Path) -> None:
    Path(tls.client_ca_path or "").write_text("hello")


def authority_is_damaged(tls: TlsConfig, folder: Path) -> None:
    Path(tls.client_ca_path or "").write_text(
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    )


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (without_key, ["tls.key_path: cannot read", "No such file"]),
        (key_is_a_folder, ["tls.key_path: cannot read", "Is a directory"]),
        (certificate_is_text, ["tls.cert_path:", "holds no certificate"]),
        (files_are_swapped, ["tls.cert_path:", "holds no certificate"]),
        (key_is_another, ["tls.cert_path:", "tls.key_path:", "do not go together"]),
        (key_is_damaged, ["tls.key_path:", "do not go together"]),
        (key_has_a_passphrase, ["tls.key_path:", "passphrase", "openssl pkey"]),
        (authority_is_missing, ["tls.client_ca_path: cannot read"]),
        (authority_is_text, ["tls.client_ca_path:", "holds no certificate"]),
        (authority_is_damaged, ["tls.client_ca_path:", "is damaged"]),
    ],
)
def test_an_unusable_file_is_named_with_its_key_in_one_line(
    tmp_path: Path, spoil: Callable[[TlsConfig, Path], None], parts: list[str]
) -> None:
    authority = Authority(tmp_path, "authority")
    tls = tls_of(authority, client_ca=Authority(tmp_path, "clients").path)
    spoil(tls, tmp_path)
    with pytest.raises(ConfigError) as caught:
        server_credentials(tls)
    for part in parts:
        assert part in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("cert_path = 'a.crt'", "tls.key_path is missing"),
        ("key_path = 'a.key'", "tls.cert_path is missing"),
        ("client_ca_path = 'ca.pem'", "tls.cert_path is missing"),
        ("cert_path = ''\nkey_path = 'a.key'", "tls.cert_path is empty"),
        ("cert_path = 'a.crt'\nkey_path = ' '", "tls.key_path is empty"),
        ("cert_path = 3", "tls.cert_path = 3 is wrong; write text in quotes"),
        ("cert = 'a.crt'", "unknown key tls.cert; did you mean tls.cert_path?"),
    ],
)
def test_half_a_configuration_is_an_error(tmp_path: Path, text: str, part: str) -> None:
    file = tmp_path / "silo.toml"
    file.write_text(f"[tls]\n{text}")
    with pytest.raises(ConfigError) as caught:
        load_config(file, {"HOME": "/home/ada"})
    assert part in caught.value.message


def test_without_a_certificate_the_server_speaks_plaintext() -> None:
    assert server_credentials(TlsConfig()) is None
