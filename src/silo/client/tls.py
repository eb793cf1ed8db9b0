"""TLS of a client: what it trusts, what it shows, and what is wrong when a server is not reached by it.

gRPC reports a certificate that does not fit like a server that is down, and some of these cases without
a word about TLS. So when a connection failed in a way that may be due to TLS, the client makes a
handshake of its own, which says what is wrong. Nothing but the handshake is sent by it.
"""

import asyncio
import ipaddress
import os
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from silo import pem
from silo.errors import ConfigError

_PROBE_S = 2.0
_CERTAIN = re.compile(r"SSL_ERROR_SSL|verification check failed|not in peer certificate", re.IGNORECASE)
_POSSIBLE = re.compile(r"handshake|verification|socket closed|connection reset", re.IGNORECASE)
_NO_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG"}
_IS_ITS_AUTHORITY_KNOWN = "; tls.ca_path must name the authority that signed it"
_IS_IT_THE_NAME = "; if it is the right server, give the name in its certificate as tls.server_name"
_HINTS = {  # By OpenSSL's numbers of verification errors.
    **dict.fromkeys((18, 19, 20, 21), _IS_ITS_AUTHORITY_KNOWN),
    **dict.fromkeys((62, 64), _IS_IT_THE_NAME),
}


@dataclass(frozen=True, kw_only=True)
class TlsOptions:
    """How a client secures its connections. The paths name PEM files, which are read when it is made."""

    ca_path: str | os.PathLike[str] | None = None  # Authorities to trust; those of the system if left out.
    cert_path: str | os.PathLike[str] | None = None  # Certificate for servers that ask for one, ...
    key_path: str | os.PathLike[str] | None = None  # ... and its private key, without a passphrase.
    server_name: str | None = None  # Name in the servers' certificates, when it is not in their addresses.


class Tls:
    """The options with their files read. The same for every server of a client."""

    def __init__(self, options: TlsOptions) -> None:
        """Read the files.

        Raises:
            ConfigError: one is missing or unusable, or half of a pair; the text says which.
        """
        for name in ("ca_path", "cert_path", "key_path", "server_name"):
            value = getattr(options, name)
            if value is not None and not os.fspath(value).strip():
                raise ConfigError(f"tls.{name} is empty; leave it out or give one")
        if (options.cert_path is None) != (options.key_path is None):
            missing, given = ("key", "cert") if options.key_path is None else ("cert", "key")
            raise ConfigError(f"tls.{missing}_path is missing; tls.{given}_path needs it")
        self._server_name = options.server_name
        self._shows_certificate = options.cert_path is not None
        self._context, roots, chain, key = _loaded(options)
        self._older_context, *_ = _loaded(options)
        self._older_context.maximum_version = ssl.TLSVersion.TLSv1_2
        self.credentials = grpc.ssl_channel_credentials(roots, key, chain)

    @property
    def channel_options(self) -> dict[str, object]:
        return {"grpc.ssl_target_name_override": self._server_name} if self._server_name is not None else {}

    async def objection(self, address: str, details: str) -> str | None:
        """What is wrong with the TLS of this server, whose connection failed with `details`; None if nothing.

        Takes `_PROBE_S` seconds twice at most.
        """
        if not (_POSSIBLE.search(details) or _CERTAIN.search(details)):
            return None
        found = await self._try(address)
        if found is None and _CERTAIN.search(details):
            return details
        return found

    async def _try(self, address: str) -> str | None:
        try:
            if await _greeting(address, self._context, self._server_name):
                return None
            # The server hung up on a handshake that was fine with us. One that dislikes our certificate
            # does that with TLS 1.3; with TLS 1.2 it breaks the handshake off, which others do not.
            if await self._is_broken_off(address):
                return self._about_our_certificate()
        except ssl.SSLCertVerificationError as error:
            said = error.verify_message.rstrip(".")
            hint = _HINTS.get(error.verify_code, "")
            return f"the server's certificate is not accepted: {said}{hint}"
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return None
        except ssl.SSLError as error:
            reason = error.reason or "unknown"
            if reason in _NO_TLS:
                return "the server does not speak TLS"
            if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason:
                return f"{self._about_our_certificate()} ({reason})"
            return f"the TLS handshake failed ({reason})"
        except (OSError, ValueError, EOFError):  # Nobody there, or no address that we could dial.
            return None
        return None

    async def _is_broken_off(self, address: str) -> bool:
        try:
            await _greeting(address, self._older_context, self._server_name)
        except TimeoutError:
            return False
        except ConnectionError:
            return True
        except ssl.SSLError as error:
            return "VERSION" not in (error.reason or "") and error.reason != "UNSUPPORTED_PROTOCOL"
        return False

    def _about_our_certificate(self) -> str:
        if self._shows_certificate:
            return "the server does not accept the certificate of tls.cert_path"
        return "the server asks for a certificate; give tls.cert_path and tls.key_path"


async def plaintext_objection(address: str, details: str) -> str | None:
    """Whether this server, whose plaintext connection failed with `details`, speaks TLS instead."""
    if not _POSSIBLE.search(details):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # Nothing is sent, so it does not matter to whom.
    try:
        await _greeting(address, context, None)
    except (OSError, ValueError, EOFError):
        return None
    return "the server speaks TLS; write https:// before its address, or give tls"


async def _greeting(address: str, context: ssl.SSLContext, server_name: str | None) -> bytes:
    """The first byte that a server sends after the handshake; none when it hangs up instead."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context.set_alpn_protocols(["h2"])
    async with asyncio.timeout(_PROBE_S):
        reader, writer = await asyncio.open_connection(
            host, int(port), ssl=context, server_hostname=server_name or host
        )
        try:
            return await reader.read(1)
        except ConnectionError:
            return b""
        finally:
            writer.transport.abort()


def is_loopback(address: str) -> bool:
    """Whether what is sent to this address stays on this machine, as far as its text tells."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]") or address
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _loaded(options: TlsOptions) -> tuple[ssl.SSLContext, bytes, bytes | None, bytes | None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if options.ca_path is not None:
        roots = pem.read_authorities(context, "tls.ca_path", options.ca_path)
    else:
        context.load_default_certs()
        roots = b"".join(_system_roots(context))
        if not roots:
            raise ConfigError(
                "this system has no certificates of authorities; install them, as the package "
                "ca-certificates does, or name a PEM file in tls.ca_path"
            )
    chain: bytes | None = None
    key: bytes | None = None
    if options.cert_path is not None and options.key_path is not None:
        chain, key = pem.read_pair(context, certificate=options.cert_path, key=options.key_path)
    return context, roots, chain, key


def _system_roots(context: ssl.SSLContext) -> Iterator[bytes]:
    """The authorities of the system in PEM. gRPC would take a list of its own instead."""
    loaded = context.get_ca_certs(binary_form=True)
    for certificate in loaded:
        yield ssl.DER_cert_to_PEM_cert(certificate).encode()
    folder = ssl.get_default_verify_paths().capath
    if not loaded and folder is not None:  # OpenSSL reads files of a folder only when it needs them.
        for path in sorted(Path(folder).glob("*.[0-9]")):
            yield path.read_bytes() + b"\n"
