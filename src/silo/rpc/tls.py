"""The server's certificate, its key and the authorities of its clients, read from files."""

import ssl

import grpc

from silo import pem
from silo.config import TlsConfig


def server_credentials(config: TlsConfig) -> grpc.ServerCredentials | None:
    """What the server shows and asks for; None without a certificate: plaintext.

    Raises:
        ConfigError: a file is missing or unusable; the text names its key and the fix.
    """
    if config.cert_path is None or config.key_path is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    chain, key = pem.read_pair(context, certificate=config.cert_path, key=config.key_path)
    authorities: bytes | None = None
    if config.client_ca_path is not None:
        authorities = pem.read_authorities(context, "tls.client_ca_path", config.client_ca_path)
    return grpc.ssl_server_credentials(
        [(key, chain)], root_certificates=authorities, require_client_auth=authorities is not None
    )
