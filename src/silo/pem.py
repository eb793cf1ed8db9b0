"""PEM files of certificates and keys, tried out before a connection needs them.

gRPC says of a bad file nothing but "could not", and late.
"""

import os
import ssl
from pathlib import Path

from silo.errors import ConfigError

Name = str | os.PathLike[str]


def read_pair(context: ssl.SSLContext, *, certificate: Name, key: Name) -> tuple[bytes, bytes]:
    """The bytes of a certificate and of its private key, which `context` shows from now on.

    Raises:
        ConfigError: a file is missing or unusable, or the two do not go together; the text says which.
    """
    certificate_file, chain = _read("tls.cert_path", certificate)
    key_file, secret = _read("tls.key_path", key)
    _check_holds("tls.cert_path", certificate_file, chain, "CERTIFICATE")
    _check_holds("tls.key_path", key_file, secret, "PRIVATE KEY")
    asked: list[bool] = []

    def passphrase() -> str:
        asked.append(True)
        return ""

    try:
        context.load_cert_chain(certificate_file, key_file, password=passphrase)
    except (ssl.SSLError, ValueError, OSError) as error:
        if asked:
            raise ConfigError(
                f"tls.key_path: {key_file} has a passphrase; name a file without one, "
                "as of: openssl pkey -in KEY -out FILE"
            ) from error
        raise ConfigError(
            f"tls.cert_path: {certificate_file} and tls.key_path: {key_file} do not go together; "
            f"name a certificate and its own key, undamaged ({_reason(error)})"
        ) from error
    return chain, secret


def read_authorities(context: ssl.SSLContext, setting: str, path: Name) -> bytes:
    """The certificates of authorities in the file that `setting` names, which `context` trusts from now on.

    Raises:
        ConfigError: the file is missing or unusable.
    """
    file, data = _read(setting, path)
    _check_holds(setting, file, data, "CERTIFICATE")
    try:
        context.load_verify_locations(file)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{setting}: {file} is damaged; name a PEM file of certificates ({_reason(error)})"
        ) from error
    return data


def _read(setting: str, name: Name) -> tuple[Path, bytes]:
    text = os.fspath(name)
    path = Path(text)
    if text.startswith("~/"):
        path = path.expanduser()
    try:
        return path, path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{setting}: cannot read {path}: {reason}") from error


def _check_holds(setting: str, path: Path, data: bytes, kind: str) -> None:
    if f"{kind}-----".encode() not in data:
        raise ConfigError(f"{setting}: {path} holds no {kind.lower()}; name a PEM file with one")


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or type(error).__name__
