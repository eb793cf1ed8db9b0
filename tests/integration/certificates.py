"""Certificates for tests: an authority that signs what a test asks for, in PEM files."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from silo.config import TlsConfig

LOOPBACK = ("127.0.0.1",)
_AT = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_UNTIL = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)
PAST = datetime.datetime(2021, 1, 1, tzinfo=datetime.UTC)


class Authority:
    """Signs certificates and writes them as PEM files."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._basic = x509.BasicConstraints(ca=True, path_length=None)
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(self._sign(self._name, self._key, self._basic, LOOPBACK, _UNTIL))

    @property
    def pem(self) -> bytes:
        return self.path.read_bytes()

    def issue(
        self, name: str, *, hosts: tuple[str, ...] = LOOPBACK, until: datetime.datetime = _UNTIL
    ) -> tuple[Path, Path]:
        """Files with a certificate for `hosts`, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        leaf = x509.BasicConstraints(ca=False, path_length=None)
        certificate, key_file = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        certificate.write_bytes(self._sign(subject, key, leaf, hosts, until))
        key_file.write_bytes(pem(key, serialization.NoEncryption()))
        return certificate, key_file

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        basic: x509.BasicConstraints,
        hosts: tuple[str, ...],
        until: datetime.datetime,
    ) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_AT)
            .not_valid_after(until)
            .add_extension(basic, critical=True)
            .add_extension(
                x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False
            )
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def pem(key: ec.EllipticCurvePrivateKey, encryption: serialization.KeySerializationEncryption) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def tls_of(
    authority: Authority,
    *,
    client_ca: Path | None = None,
    hosts: tuple[str, ...] = LOOPBACK,
    until: datetime.datetime = _UNTIL,
) -> TlsConfig:
    """The configuration of a server with a certificate of this authority."""
    certificate, key = authority.issue("server", hosts=hosts, until=until)
    return TlsConfig(
        cert_path=str(certificate),
        key_path=str(key),
        client_ca_path=str(client_ca) if client_ca else None,
    )
