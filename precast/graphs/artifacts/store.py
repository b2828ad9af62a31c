"""Where published artifacts are kept, by key and version.

``ArtifactStore`` is the contract; ``disk_store`` keeps it in a folder, ``object_store`` in an S3
bucket. A version is published once and never changed but for its signature: it appears whole,
and a second publisher of the same version is told so. Numbers are not reused, not even after a
quarantine.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from precast.errors import GraphNotFound
from precast.graphs.artifacts.manifest import Manifest
from precast.graphs.artifacts.signing import Signature
from precast.graphs.key import is_key

MAX_PUT_ASIDE: Final = 32
MAX_NOTE_BYTES: Final = 256 << 10
MAX_REASON_BYTES: Final = 4096


@dataclass(frozen=True, kw_only=True)
class StoredArtifact:
    """An artifact whose files on disk have been compared with its manifest."""

    manifest: Manifest
    manifest_bytes: bytes
    """What the signature covers."""
    signature: Signature
    graph_path: Path


@dataclass(frozen=True, kw_only=True)
class Holding:
    """One published artifact, as ``ArtifactStore.holdings`` counts it."""

    key: str
    version: int
    size: int
    """Bytes."""
    used_at: float
    """Unix seconds of its publication or last ``touch``."""


class VersionExists(Exception):
    """Another publisher was first. Not an error to a user: the work is done."""


class ArtifactStore(ABC):
    """Artifacts by key and version.

    Every method may be called from several processes at once. ``key`` is checked by each method:
    what isn't a key raises ``GraphNotFound`` and never becomes a path. Methods read, write and hash
    files, some over a network: where an event loop must not wait, call them in a thread. Each ends
    within a deadline; a store that can't be reached raises ``StoreUnavailable``.
    """

    @property
    @abstractmethod
    def location(self) -> str:
        """Where it is, for messages."""

    @property
    @abstractmethod
    def temporary(self) -> Path:
        """A local folder for files on their way in; what the dead left there is swept."""

    @abstractmethod
    def require_writable(self) -> None:
        """Raises ``ConfigError`` if artifacts can't be published here as the contract says."""

    @abstractmethod
    def sweep(self) -> int:
        """Remove what killed publishers left behind; the number of leftovers."""

    @abstractmethod
    def publish(self, manifest_bytes: bytes, signature: Signature, graph: Path) -> None:
        """Make an artifact visible, whole and durable, copying ``graph``.

        Raises ``VersionExists``, or ``ArtifactRejected`` if graph and manifest don't match.
        """

    @abstractmethod
    def open(self, key: str, version: int = 0) -> StoredArtifact:
        """Read an artifact (0: the newest) and compare its digest; no signature is checked.

        Raises ``GraphNotFound`` or ``ArtifactRejected``.
        """

    @abstractmethod
    def read_back(self, key: str, version: int) -> tuple[bytes, Signature]:
        """Manifest and signature of an artifact, after its digest was compared with every byte
        that the store has: not with a copy. Raises ``GraphNotFound`` or ``ArtifactRejected``."""

    @abstractmethod
    def resign(self, key: str, version: int, signature: Signature) -> None:
        """Put another signature of the same manifest in the place of the present one, whole and
        durably. Raises ``GraphNotFound``."""

    @abstractmethod
    def versions(self, key: str) -> list[int]:
        """Published versions, ascending; empty for an unknown key."""

    @abstractmethod
    def last_version(self, key: str) -> int:
        """The highest number ever used, quarantined ones included; 0 if none."""

    @abstractmethod
    def published_keys(self) -> list[str]:
        """Keys that have a published version."""

    @abstractmethod
    def holdings(self) -> list[Holding]:
        """Every published artifact, with its size and last use."""

    @abstractmethod
    def touch(self, key: str, version: int) -> None:
        """Note that an artifact is used now. No error if it is gone."""

    @abstractmethod
    def remove(self, key: str, version: int) -> None:
        """Delete an artifact. No error if it is gone; whoever has its file open keeps it."""

    @abstractmethod
    def read_note(self, key: str) -> bytes | None:
        """What was written beside the key's artifacts (``versions.py``); ``None``: nothing."""

    @abstractmethod
    def update_note(self, key: str, change: Callable[[bytes | None], bytes | None]) -> None:
        """Replace the key's note by what ``change`` makes of it (``None``: of none, or of one that
        can't be read), whole and durably, unless it gives ``None``.

        Of updates at the same time none is lost: ``change`` may be called several times.
        """

    @abstractmethod
    def put_aside(self, key: str) -> dict[int, str]:
        """Why ``quarantine`` was called, by version."""

    @abstractmethod
    def quarantine(self, key: str, version: int, reason: str) -> None:
        """Take an artifact out of service and keep it aside for a look. No error if it is gone."""


def check_key(key: str) -> str:
    """Raises ``GraphNotFound`` for what must not become a part of a path."""
    if not is_key(key):
        raise GraphNotFound(f"{key[:64]!r} is no graph key (32 hex digits)")
    return key


def number_of(name: str) -> int:
    """The version of which this is the name: "7", not "07"; 0: of none."""
    plain = name.isascii() and name.isdecimal() and not name.startswith("0")
    return int(name) if plain else 0
