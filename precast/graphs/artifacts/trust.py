"""Keys as they are now: a worker that runs follows what happens to their files.

A key whose ``.pub`` is deleted vouches for nothing any more, from the next verification on; one
that is copied in counts at once, and a signing key that was replaced signs from then on. Nobody
restarts.
"""

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from precast.errors import ArtifactRejected, ConfigError
from precast.graphs.artifacts.signing import (
    Signature,
    Signer,
    TrustedKeys,
    load_or_create_signer,
    load_public,
    load_signer,
)
from precast.log import get_logger

log = get_logger(__name__)

State: TypeAlias = tuple[tuple[str, int, int, int], ...]
"""What files look like from outside: name, inode, size and time of change (ns) of each."""


class Trust(Protocol):
    """Who decides whether a manifest is to be believed."""

    @property
    def keys(self) -> dict[str, Ed25519PublicKey]:
        """Trusted public keys by signer."""

    def verify(self, message: bytes, signature: Signature) -> None:
        """Raises ``ArtifactRejected`` unless a trusted key signed exactly these bytes."""


@dataclass(kw_only=True)
class TrustFolder:
    """The trusted keys of a folder, read again whenever they change.

    A file that is no key is left out, with a warning: other keys go on to be trusted.
    """

    folder: Path
    allow_unsigned: bool = False
    """Believe what no trusted key has signed. For development."""
    _state: State | None = None
    _known: TrustedKeys = field(default_factory=lambda: TrustedKeys(keys={}))

    @property
    def keys(self) -> dict[str, Ed25519PublicKey]:
        return self.now().keys

    def now(self) -> TrustedKeys:
        state = _state(sorted(self.folder.glob("*.pub")))
        if state != self._state:
            self._known = TrustedKeys(keys=_load_all(self.folder))
            self._state = state
            log.info("trusted keys", folder=str(self.folder), signers=sorted(self._known.keys))
        return self._known

    def require_valid(self) -> None:
        """Raises ``ConfigError`` for a file that is no key: at a start somebody can see to it."""
        TrustedKeys.load(self.folder)

    def verify(self, message: bytes, signature: Signature) -> None:
        try:
            self.now().verify(message, signature)
        except ArtifactRejected:
            if not self.allow_unsigned or self._claims(signature):
                raise

    def _claims(self, signature: Signature) -> bool:
        """Whether it says that a trusted key made it. If that isn't so, somebody has lied."""
        return bool(signature.signature) and signature.signer in self.keys


@dataclass(kw_only=True)
class SigningKey:
    """A compile worker's private key, read again whenever its file changes."""

    path: Path
    trusted_dir: Path
    _state: State | None = None
    _signer: Signer | None = None

    def now(self) -> Signer:
        """Makes the key if there is none yet. Raises ``ConfigError``."""
        state = _state([self.path])
        if self._signer is None:
            self._signer = load_or_create_signer(self.path, self.trusted_dir)
            self._state = _state([self.path])
        elif state and state != self._state:
            try:
                self._signer = load_signer(self.path)
            except OSError as error:
                raise ConfigError(f"signing key {self.path}: {error}") from None
            self._state = state
            log.info("signing key was replaced", signer=self._signer.id)
        return self._signer


def _state(paths: list[Path]) -> State:
    rows = []
    for path in paths:
        try:
            found = path.stat()
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode):
            rows.append((path.name, found.st_ino, found.st_size, found.st_mtime_ns))
    return tuple(rows)


def _load_all(folder: Path) -> dict[str, Ed25519PublicKey]:
    keys = {}
    for path in sorted(folder.glob("*.pub")):
        try:
            signer, key = load_public(path)
        except ConfigError as error:
            log.error("not trusted", reason=str(error))
            continue
        keys[signer] = key
    return keys
