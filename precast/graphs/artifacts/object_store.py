"""Artifacts in an S3 bucket, for compile workers that share one and keep nothing of their own.

Objects under ``<prefix>/<key>/``: for each version ``<version>/<digest>.pt2``, then
``<version>/artifact`` (signature and manifest), which is what makes it visible: it is created
only if it isn't there, so of several publishers one wins, and a publisher that dies before leaves a
file that nothing names. ``<version>/aside`` (why) takes an artifact out of service, ``used``
dates its last use, ``lifecycle.json`` is the key's note.
"""

import os
import secrets
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from precast.errors import ArtifactRejected, ConfigError, GraphNotFound, StoreUnavailable
from precast.graphs.artifacts.bucket import Bucket
from precast.graphs.artifacts.manifest import (
    GRAPH_FILE,
    MAX_MANIFEST_BYTES,
    Manifest,
    check_graph_file,
    decode_manifest,
)
from precast.graphs.artifacts.signing import MAX_SIGNATURE_FILE_BYTES, Signature
from precast.graphs.artifacts.store import (
    MAX_NOTE_BYTES,
    MAX_PUT_ASIDE,
    MAX_REASON_BYTES,
    ArtifactStore,
    Holding,
    StoredArtifact,
    VersionExists,
    check_key,
    number_of,
)
from precast.graphs.key import is_key
from precast.system.scratch import scratch_folder, sweep

if TYPE_CHECKING:
    from obstore import ObjectMeta

ARTIFACT: Final = "artifact"
ASIDE: Final = "aside"
USED: Final = "used"
NOTE: Final = "lifecycle.json"
NOTE_TRIES: Final = 20
PROBE: Final = "probe"
MAX_ARTIFACT_OBJECT_BYTES: Final = MAX_SIGNATURE_FILE_BYTES + MAX_MANIFEST_BYTES
MAX_COPIES_BYTES: Final = 2 << 30
ABANDONED_S: Final = 3600.0
"""After this time a graph that no artifact names was left by a publisher that died."""

Listed: TypeAlias = "dict[int, dict[str, ObjectMeta]]"
"""What a key has: by version and last part of the name."""


class ObjectStore(ArtifactStore):
    """Artifacts at ``s3://bucket/prefix``, with local copies of what is used in a folder."""

    def __init__(self, url: str, copies: Path) -> None:
        copies.mkdir(parents=True, exist_ok=True)
        self._bucket = Bucket(url)
        self._copies = copies

    @property
    def location(self) -> str:
        return self._bucket.url

    @property
    def temporary(self) -> Path:
        return self._copies / ".tmp"

    def require_writable(self) -> None:
        """Sees that writes can be conditional: publishing and notes depend on it."""
        name = f"{PROBE}/{secrets.token_hex(8)}"
        try:
            self._bucket.create(name, b"")
        except FileNotFoundError:
            raise ConfigError(f"store_url {self.location}: no such bucket") from None
        ignored = self._bucket.create(name, b""), self._bucket.replace(name, b"", '"other"')
        self._bucket.delete([name])
        if any(ignored):
            header = "If-None-Match" if ignored[0] else "If-Match"
            raise ConfigError(f"store_url {self.location}: its server ignores {header}")

    def sweep(self) -> int:
        old = time.time() - ABANDONED_S
        abandoned = [
            meta["path"]
            for listed in self._list_all().values()
            for objects in listed.values()
            for meta in objects.values()
            if ARTIFACT not in objects and _modified(meta) < old
        ]
        self._bucket.delete(abandoned)
        return len(abandoned) + sweep(self.temporary)

    def publish(self, manifest_bytes: bytes, signature: Signature, graph: Path) -> None:
        manifest = decode_manifest(manifest_bytes)
        check_graph_file(graph, manifest)
        name = _name(manifest.key, manifest.version, ARTIFACT)
        self._bucket.upload(_graph_name(manifest), graph)
        content = signature.encode() + manifest_bytes
        if self._bucket.create(name, content):
            return
        winner, _ = self._bucket.read_tagged(name, MAX_ARTIFACT_OBJECT_BYTES)
        if winner == content:
            return  # ours: the answer to a first attempt was lost
        if manifest.digest.encode() not in (winner or b""):
            self._bucket.delete([_graph_name(manifest)])
        raise VersionExists(f"{manifest.key}/{manifest.version}")

    def open(self, key: str, version: int = 0) -> StoredArtifact:
        number = version or max(self.versions(key), default=0)
        manifest, raw, signature = self._manifest(key, number)
        return StoredArtifact(
            manifest=manifest,
            manifest_bytes=raw,
            signature=signature,
            graph_path=self._copy(manifest),
        )

    def read_back(self, key: str, version: int) -> tuple[bytes, Signature]:
        manifest, raw, signature = self._manifest(key, version)
        with scratch_folder(self.temporary, key) as scratch:
            self._download(manifest, scratch / GRAPH_FILE)
        return raw, signature

    def resign(self, key: str, version: int, signature: Signature) -> None:
        name = _name(key, version, ARTIFACT)
        for _ in range(NOTE_TRIES):
            content, tag = self._bucket.read_tagged(name, MAX_ARTIFACT_OBJECT_BYTES)
            if content is None or tag is None:
                raise GraphNotFound(f"no artifact of graph {key}, version {version}")
            raw = content.partition(b"\n")[2]
            if self._bucket.replace(name, signature.encode() + raw, tag):
                return
        raise StoreUnavailable(f"{self.location}: others change {name} all the time")

    def versions(self, key: str) -> list[int]:
        return _published(self._list(key))

    def last_version(self, key: str) -> int:
        used = (n for n, objects in self._list(key).items() if {ARTIFACT, ASIDE} & objects.keys())
        return max(used, default=0)

    def published_keys(self) -> list[str]:
        return sorted(key for key, listed in self._list_all().items() if _published(listed))

    def holdings(self) -> list[Holding]:
        return [
            Holding(
                key=key,
                version=number,
                size=sum(meta["size"] for meta in listed[number].values()),
                used_at=max(_modified(meta) for meta in listed[number].values()),
            )
            for key, listed in self._list_all().items()
            for number in _published(listed)
        ]

    def touch(self, key: str, version: int) -> None:
        if version in self.versions(key):
            self._bucket.write(_name(key, version, USED), b"")

    def remove(self, key: str, version: int) -> None:
        objects = self._list(key).get(version, {})
        if ASIDE not in objects:
            self._bucket.delete([_name(key, version, ARTIFACT)])
            self._bucket.delete(meta["path"] for meta in objects.values())

    def read_note(self, key: str) -> bytes | None:
        try:
            return self._bucket.read(f"{check_key(key)}/{NOTE}", MAX_NOTE_BYTES)
        except FileNotFoundError:
            return None

    def update_note(self, key: str, change: Callable[[bytes | None], bytes | None]) -> None:
        name = f"{check_key(key)}/{NOTE}"
        for _ in range(NOTE_TRIES):
            present, tag = self._bucket.read_tagged(name, MAX_NOTE_BYTES)
            note = change(present)
            if note is None or self._bucket.replace(name, note, tag):
                return
        raise StoreUnavailable(f"{self.location}: others change {name} all the time")

    def put_aside(self, key: str) -> dict[int, str]:
        aside = [number for number, objects in self._list(key).items() if ASIDE in objects]
        return {number: self._reason(key, number) for number in aside}

    def quarantine(self, key: str, version: int, reason: str) -> None:
        if version in self.versions(key):
            raw = reason.encode()[:MAX_REASON_BYTES]
            self._bucket.write(_name(key, version, ASIDE), raw)
            self._drop_oldest_aside()

    def _manifest(self, key: str, version: int) -> tuple[Manifest, bytes, Signature]:
        if version not in self.versions(key):
            raise GraphNotFound(f"no artifact of graph {key!r}, version {version}")
        try:
            name = _name(key, version, ARTIFACT)
            content = self._bucket.read(name, MAX_ARTIFACT_OBJECT_BYTES)
        except FileNotFoundError:
            raise GraphNotFound(f"artifact {key}/{version} was removed") from None
        line, _, raw = content.partition(b"\n")
        signature, manifest = Signature.decode(line), decode_manifest(raw)
        if (manifest.key, manifest.version) != (key, version):
            raise ArtifactRejected(f"manifest of {key}/{version} is that of another artifact")
        return manifest, raw, signature

    def _copy(self, manifest: Manifest) -> Path:
        """A local copy of a graph, kept for the next time."""
        path = self._copies / f"{manifest.digest}.pt2"
        try:
            check_graph_file(path, manifest)
            os.utime(path)  # its place in the order of eviction
        except (ArtifactRejected, FileNotFoundError):
            with scratch_folder(self.temporary, manifest.key) as scratch:
                self._download(manifest, scratch / GRAPH_FILE)
                (scratch / GRAPH_FILE).replace(path)
            self._evict_copies(path)
        return path

    def _download(self, manifest: Manifest, path: Path) -> None:
        """Raises ``ArtifactRejected`` unless the object is what the manifest says."""
        try:
            self._bucket.download(_graph_name(manifest), path, manifest.size)
        except FileNotFoundError:
            raise ArtifactRejected(f"graph of {manifest.key} is missing") from None
        check_graph_file(path, manifest)

    def _evict_copies(self, kept: Path) -> None:
        copies = [(path.stat().st_mtime, path.stat().st_size, path) for path in _files(kept.parent)]
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total > MAX_COPIES_BYTES and path != kept:
                path.unlink(missing_ok=True)
                total -= size

    def _drop_oldest_aside(self) -> None:
        aside = [
            (_modified(objects[ASIDE]), [meta["path"] for meta in objects.values()])
            for listed in self._list_all().values()
            for objects in listed.values()
            if ASIDE in objects
        ]
        for _, paths in sorted(aside)[:-MAX_PUT_ASIDE]:
            self._bucket.delete(paths)

    def _reason(self, key: str, version: int) -> str:
        try:
            return self._bucket.read(_name(key, version, ASIDE), MAX_REASON_BYTES).decode(
                errors="replace"
            )
        except FileNotFoundError:
            return ""

    def _list(self, key: str) -> Listed:
        return self._listed(f"{check_key(key)}/")[key]

    def _list_all(self) -> dict[str, Listed]:
        return self._listed(None)

    def _listed(self, prefix: str | None) -> dict[str, Listed]:
        """Objects that belong to versions, by key."""
        found: dict[str, Listed] = defaultdict(lambda: defaultdict(dict))
        for meta in self._bucket.listing(prefix):
            key, *rest = meta["path"].split("/")
            if is_key(key) and len(rest) == 2 and (number := number_of(rest[0])):
                found[key][number][rest[1]] = meta
        return found


def _name(key: str, version: int, last: str) -> str:
    return f"{check_key(key)}/{version}/{last}"


def _graph_name(manifest: Manifest) -> str:
    return _name(manifest.key, manifest.version, f"{manifest.digest}.pt2")


def _published(listed: Listed) -> list[int]:
    return sorted(
        n for n, objects in listed.items() if ARTIFACT in objects and ASIDE not in objects
    )


def _modified(meta: "ObjectMeta") -> float:
    return meta["last_modified"].timestamp()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.pt2") if path.is_file()]
