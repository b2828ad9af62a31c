"""Looks at certificates before gRPC does, which takes anything: its connections fail then, one by
one, and it does not say why."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from precast.errors import ConfigError
from precast.system.file_state import FileState, file_state

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

CA_FILE: Final = "ca.crt"
CERTIFICATE_FILE: Final = "tls.crt"
KEY_FILE: Final = "tls.key"
_FILES: Final = (CA_FILE, CERTIFICATE_FILE, KEY_FILE)


class Pem(NamedTuple):
    """What one role shows and trusts."""

    authority: bytes
    certificate: bytes
    key: bytes


def read(folder: Path) -> Pem:
    """The files of a role. Raises ``ConfigError`` for what is none, does not belong together or
    does not hold now."""
    try:
        authority, certificate, key = ((folder / name).read_bytes() for name in _FILES)
    except OSError as error:
        raise ConfigError(f"tls_dir {error.filename}: {error.strerror}") from None
    pem = Pem(authority=authority, certificate=certificate, key=key)
    _check(folder, pem)
    return pem


def state(folder: Path) -> FileState:
    """Of the files of a role."""
    return file_state(folder / name for name in _FILES)


def _check(folder: Path, pem: Pem) -> None:
    _check_holds(folder / CA_FILE, _certificates(folder / CA_FILE, pem.authority))
    [own, *_] = _certificates(folder / CERTIFICATE_FILE, pem.certificate)
    _check_holds(folder / CERTIFICATE_FILE, [own])
    if _private_key(folder / KEY_FILE, pem.key).public_key() != own.public_key():
        raise _wrong(folder / KEY_FILE, f"not the key of {CERTIFICATE_FILE}")


def _certificates(path: Path, pem: bytes) -> "list[Certificate]":
    """At least one."""
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise _wrong(path, "not a certificate in PEM") from None
    if pem.count(b"-----") % 4:  # the parser passes over a last one that is half there
        raise _wrong(path, "ends within a certificate")
    return found


def _private_key(path: Path, pem: bytes) -> Any:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        raise _wrong(path, "not a key in PEM without a password") from None


def _check_holds(path: Path, certificates: "list[Certificate]") -> None:
    """At least one of them."""
    now, last = datetime.now(UTC), certificates[-1]
    if any(one.not_valid_before_utc <= now <= one.not_valid_after_utc for one in certificates):
        return
    if last.not_valid_after_utc < now:
        raise _wrong(path, f"expired at {last.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    raise _wrong(path, f"not valid before {last.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")


def _wrong(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"tls_dir {path}: {reason}")
