"""A certificate authority of the fleet's own, in one command; see ``precast.rpc.tls``."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from precast.access.files import write_whole
from precast.errors import ConfigError
from precast.rpc.tls import NAME, Role
from precast.rpc.tls_files import CA_FILE, CERTIFICATE_FILE, KEY_FILE

AUTHORITY_KEY: Final = "ca.key"
_AUTHORITY_DAYS: Final = 3650
_DAYS: Final = 825
_NAMES: Final = (
    x509.DNSName(NAME),
    x509.DNSName("localhost"),
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    x509.IPAddress(ipaddress.ip_address("::1")),
)
"""The last three for an HTTPS gateway that is tried on one machine."""
_SKEW: Final = datetime.timedelta(minutes=5)
"""How far clocks of hosts may differ."""


@dataclass(frozen=True, kw_only=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make(folder: Path) -> bool:
    """Certificates for every role, anew; whether the authority was made too. Its key stays in
    ``folder``, is needed to make further ones only, and is best kept elsewhere. Raises
    ``ConfigError``."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = not (folder / AUTHORITY_KEY).exists()
        authority = _make_authority(folder) if fresh else _load_authority(folder)
        for role in Role:
            _make_role(folder / role, authority, role)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    return fresh


def _make_authority(folder: Path) -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(f"{NAME} authority")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(subject, subject, key.public_key(), _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    write_whole(folder / CA_FILE, certificate.public_bytes(Encoding.PEM), 0o644)
    write_whole(folder / AUTHORITY_KEY, _pem(key), 0o600)
    return _Authority(certificate=certificate, key=key)


def _load_authority(folder: Path) -> _Authority:
    try:
        key = load_pem_private_key((folder / AUTHORITY_KEY).read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((folder / CA_FILE).read_bytes())
    except ValueError as error:
        raise ConfigError(f"{folder}: not an authority's key and certificate: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{folder / AUTHORITY_KEY}: not a key that this command has made")
    return _Authority(certificate=certificate, key=key)


def _make_role(folder: Path, authority: _Authority, role: Role) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    both = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
    certificate = (
        _builder(_name(role), authority.certificate.subject, key.public_key(), _DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(_NAMES), critical=False)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    folder.mkdir(exist_ok=True, mode=0o700)
    write_whole(folder / CA_FILE, authority.certificate.public_bytes(Encoding.PEM), 0o644)
    write_whole(folder / CERTIFICATE_FILE, certificate.public_bytes(Encoding.PEM), 0o644)
    write_whole(folder / KEY_FILE, _pem(key), 0o600)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
