"""The manifest that binds an artifact's bytes to what they are.

An artifact is ``graph.pt2`` (one AOTInductor package), ``manifest.json`` (canonical JSON) and
``manifest.sig`` (who signed the manifest's bytes, and the signature). The manifest names the digest
and size of the package, so one signature covers both.
"""

from pathlib import Path
from typing import Annotated, Final

import msgspec
from blake3 import blake3

from precast.errors import ArtifactRejected
from precast.graphs.key import is_key, key_of_factors

FORMAT: Final = 1
GRAPH_FILE: Final = "graph.pt2"
MANIFEST_FILE: Final = "manifest.json"
SIGNATURE_FILE: Final = "manifest.sig"
MAX_MANIFEST_BYTES: Final = 64 << 10
MAX_ARTIFACT_BYTES: Final = 512 << 20
READ_BYTES: Final = 1 << 20

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Version = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is signed."""

    format: int = FORMAT
    key: str
    version: Version
    """1 for the first capture of a key; a recompile adds one."""
    factors: dict[str, str]
    """Spec and build factors; the key is their digest."""
    models: tuple[str, ...] = ()
    """Labels it was captured for: a help to find it, no part of the key."""
    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_ARTIFACT_BYTES)]
    """Bytes of ``graph.pt2``."""
    digest: Digest
    """BLAKE3 of ``graph.pt2``."""
    created_at: float
    """Unix seconds."""
    max_relative_error: float
    """Largest difference to eager in verification, relative to the largest reference value."""
    capture_s: float
    layer_us: float
    """Median time of one layer on one thread, microseconds; 0: not measured."""
    compiler: str
    verified: bool = True
    """False for a graph of a CPU that its compile worker hasn't: one that has tries it first."""


def encode_manifest(manifest: Manifest) -> bytes:
    """Canonical bytes: what is signed, stored and sent."""
    return msgspec.json.encode(manifest, order="deterministic")


def decode_manifest(raw: bytes) -> Manifest:
    """Parse a manifest whose signature has been verified (or is about to be).

    Raises:
        ArtifactRejected: too large, malformed, of an unknown format, or its key isn't the digest of
            its factors.
    """
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ArtifactRejected(f"manifest of {len(raw)} bytes exceeds {MAX_MANIFEST_BYTES}")
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtifactRejected(f"manifest is malformed: {error}") from None
    if manifest.format != FORMAT:
        raise ArtifactRejected(f"manifest has format {manifest.format}; {FORMAT} is supported")
    if not is_key(manifest.key) or key_of_factors(manifest.factors) != manifest.key:
        raise ArtifactRejected("manifest's key is not the digest of its factors")
    return manifest


def file_digest(path: Path) -> str:
    """BLAKE3 hex digest of a file, read in pieces."""
    digest = blake3()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_graph_file(path: Path, manifest: Manifest) -> None:
    """Compare ``graph.pt2`` on disk with its manifest.

    Raises:
        ArtifactRejected: missing, not a regular file, or of another size or digest.
    """
    if path.is_symlink() or not path.is_file():
        raise ArtifactRejected(f"{path.name} of {manifest.key} is missing or no regular file")
    check_graph_bytes(path, manifest)


def check_graph_bytes(path: Path, manifest: Manifest) -> None:
    """The same of a file whose place is known to be right. Raises ``ArtifactRejected``."""
    size = path.stat().st_size
    if size != manifest.size:
        raise ArtifactRejected(
            f"{GRAPH_FILE} of {manifest.key} has {size} bytes, its manifest says {manifest.size}"
        )
    if file_digest(path) != manifest.digest:
        raise ArtifactRejected(f"{GRAPH_FILE} of {manifest.key} differs from its digest")
