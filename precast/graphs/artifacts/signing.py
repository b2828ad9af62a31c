"""Ed25519 signatures over manifests, and the keys that a worker trusts.

A compile worker has a private key (PEM, mode 0600). A decode worker has a folder of trusted public
keys, ``<signer>.pub`` (PEM), where ``<signer>`` is the first 16 hex digits of the BLAKE3 digest of
the raw public key. To trust another compile worker, copy its ``.pub``; to stop, delete it: a worker
that runs notices (``trust.py``).
"""

import base64
import binascii
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blake3 import blake3
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from precast.errors import ArtifactRejected, ConfigError

MAX_SIGNATURE_FILE_BYTES: Final = 256
_SIGNER: Final = re.compile(r"[0-9a-f]{16}")
_UNSIGNED: Final = b"unsigned\n"


@dataclass(frozen=True, kw_only=True)
class Signature:
    """A detached signature and who made it; nobody, where there are no bytes of one."""

    signer: str
    signature: bytes

    def encode(self) -> bytes:
        """The content of ``manifest.sig``: one line, ``<signer> <base64>`` or ``unsigned``."""
        if not self.signature:
            return _UNSIGNED
        return f"{self.signer} {base64.b64encode(self.signature).decode()}\n".encode()

    @staticmethod
    def decode(raw: bytes) -> "Signature":
        """Read ``manifest.sig``. Raises ``ArtifactRejected`` if it is malformed."""
        if raw in (_UNSIGNED, _UNSIGNED.strip()):
            return Signature(signer="", signature=b"")
        try:
            signer, encoded = raw[:MAX_SIGNATURE_FILE_BYTES].decode("ascii").split()
            signature = base64.b64decode(encoded, validate=True)
        except (ValueError, binascii.Error):
            raise ArtifactRejected("signature file is malformed") from None
        return Signature(signer=signer, signature=signature)


@dataclass(frozen=True, kw_only=True)
class Signer:
    """A compile worker's private key."""

    key: Ed25519PrivateKey

    @property
    def id(self) -> str:
        return signer_id(self.key.public_key())

    def sign(self, message: bytes) -> Signature:
        return Signature(signer=self.id, signature=self.key.sign(message))


@dataclass(frozen=True, kw_only=True)
class TrustedKeys:
    """Public keys whose signatures are accepted, by signer id."""

    keys: dict[str, Ed25519PublicKey]

    @staticmethod
    def load(folder: Path) -> "TrustedKeys":
        """Read every ``*.pub`` of a folder. A missing folder trusts nobody.

        Raises:
            ConfigError: a file is no Ed25519 public key or isn't named after its key.
        """
        return TrustedKeys(keys=dict(load_public(path) for path in sorted(folder.glob("*.pub"))))

    def verify(self, message: bytes, signature: Signature) -> None:
        """Raises ``ArtifactRejected`` unless a trusted key signed exactly these bytes."""
        if not signature.signature:
            raise ArtifactRejected("not signed")
        key = self.keys.get(signature.signer)
        if key is None:
            known = ", ".join(sorted(self.keys)) or "none"
            raise ArtifactRejected(
                f"signed by {signature.signer[:32]!r}, who is not trusted (trusted: {known})"
            )
        try:
            key.verify(signature.signature, message)
        except InvalidSignature:
            raise ArtifactRejected(f"signature of {signature.signer} does not match") from None


def signer_id(key: Ed25519PublicKey) -> str:
    """First 16 hex digits of the public key's BLAKE3 digest."""
    return blake3(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]


def load_or_create_signer(signing_key: Path, trusted_dir: Path) -> Signer:
    """The signing key, made at the first start; its public half is put among the trusted keys.

    Raises:
        ConfigError: the file can't be read or written, or is no Ed25519 private key.
    """
    try:
        if not signing_key.exists():
            _create_key(signing_key)
        signer = load_signer(signing_key)
        trust_key(signer.key.public_key(), trusted_dir)
    except OSError as error:
        raise ConfigError(f"signing key {signing_key}: {error}") from None
    return signer


def load_signer(signing_key: Path) -> Signer:
    """Raises ConfigError if the file is no Ed25519 private key, and OSError."""
    return Signer(key=_load_private(signing_key))


def replace_signer(signing_key: Path, trusted_dir: Path) -> Signer:
    """Make a new signing key in the place of the old one, whose private half is gone then.

    The new one is trusted before it signs. Raises ConfigError.
    """
    signer = Signer(key=Ed25519PrivateKey.generate())
    beside = signing_key.with_name(f".{signing_key.name}.{secrets.token_hex(4)}")
    try:
        trust_key(signer.key.public_key(), trusted_dir)
        _write_new(beside, _private_pem(signer.key), mode=0o600)
        beside.replace(signing_key)
    except OSError as error:
        raise ConfigError(f"signing key {signing_key}: {error}") from None
    finally:
        beside.unlink(missing_ok=True)
    return signer


def trust_key(key: Ed25519PublicKey, trusted_dir: Path) -> Path:
    """Put a public key among the trusted ones; its file. Raises OSError."""
    path = trusted_dir / f"{signer_id(key)}.pub"
    if not path.exists():
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        trusted_dir.mkdir(parents=True, exist_ok=True)
        _write_new(path, pem, mode=0o644)
    return path


def _create_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write_new(path, _private_pem(Ed25519PrivateKey.generate()), mode=0o600)


def _private_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_new(path: Path, content: bytes, *, mode: int) -> None:
    """Write a file that appears whole or not at all; of two writers the first one wins."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _load_private(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"signing key {path}: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"signing key {path} is no Ed25519 key")
    return key


def load_public(path: Path) -> tuple[str, Ed25519PublicKey]:
    """A trusted key and its signer's id, after which the file must be named. Raises ConfigError."""
    key = read_public(path)
    if not _SIGNER.fullmatch(path.stem) or path.stem != signer_id(key):
        raise ConfigError(f"trusted key {path} must be named {signer_id(key)}.pub")
    return path.stem, key


def read_public(path: Path) -> Ed25519PublicKey:
    """The public key in a file of any name. Raises ConfigError."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"trusted key {path}: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"trusted key {path} is no Ed25519 key")
    return key
