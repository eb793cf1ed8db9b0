"""The server's certificate, its key and the authorities of its clients, read from files."""

import ssl
from pathlib import Path

import grpc

from silo.config import TlsConfig
from silo.errors import ConfigError


def server_credentials(config: TlsConfig) -> grpc.ServerCredentials | None:
    """What the server shows and asks for; None without a certificate: plaintext.

    Raises:
        ConfigError: a file is missing or unusable; the text names its key and the fix.
    """
    if config.cert_path is None or config.key_path is None:
        return None
    certificate, chain = _read("tls.cert_path", config.cert_path)
    key_file, key = _read("tls.key_path", config.key_path)
    # gRPC says nothing but "could not", and later; so that files are tried here first.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _check_holds("tls.cert_path", certificate, chain, "CERTIFICATE")
    _check_holds("tls.key_path", key_file, key, "PRIVATE KEY")
    asked: list[bool] = []

    def passphrase() -> str:
        asked.append(True)
        return ""

    try:
        context.load_cert_chain(certificate, key_file, password=passphrase)
    except (ssl.SSLError, ValueError, OSError) as error:
        if asked:
            raise ConfigError(
                f"tls.key_path: {key_file} has a passphrase; name a file without one, "
                "as of: openssl pkey -in KEY -out FILE"
            ) from error
        raise ConfigError(
            f"tls.cert_path: {certificate} and tls.key_path: {key_file} do not go together; "
            f"name a certificate and its own key, undamaged ({_reason(error)})"
        ) from error
    authorities: bytes | None = None
    if config.client_ca_path is not None:
        file, authorities = _read("tls.client_ca_path", config.client_ca_path)
        _check_holds("tls.client_ca_path", file, authorities, "CERTIFICATE")
        try:
            context.load_verify_locations(file)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"tls.client_ca_path: {file} is damaged; name a PEM file of certificates ({_reason(error)})"
            ) from error
    return grpc.ssl_server_credentials(
        [(key, chain)], root_certificates=authorities, require_client_auth=authorities is not None
    )


def _read(key: str, text: str) -> tuple[Path, bytes]:
    path = Path(text)
    if text.startswith("~/"):
        path = path.expanduser()
    try:
        return path, path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{key}: cannot read {path}: {reason}") from error


def _check_holds(key: str, path: Path, data: bytes, kind: str) -> None:
    if f"{kind}-----".encode() not in data:
        raise ConfigError(f"{key}: {path} holds no {kind.lower()}; name a PEM file with one")


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or type(error).__name__
