"""A worker's own copy of the graphs it runs: verified, kept on disk.

Nothing gets into the cache, and nothing comes out of it, without a manifest that a trusted key
signed and bytes that match the manifest's digest. What is refused raises ``ArtifactRejected`` with
the reason. The cache works without any compile worker alive.

A cache that can't be written (graphs shipped in an image, a full disk) is read as it is. What is
fetched then is kept in a temporary folder for as long as the process lives.
"""

import errno
import os
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from precast.errors import ArtifactRejected, GraphNotFound
from precast.graphs.artifacts.condemned import Condemnations, Condemned
from precast.graphs.artifacts.disk_store import TEMPORARY, DiskStore
from precast.graphs.artifacts.manifest import MANIFEST_FILE, Manifest, decode_manifest
from precast.graphs.artifacts.signing import Signature
from precast.graphs.artifacts.store import StoredArtifact, VersionExists
from precast.graphs.artifacts.trust import Trust
from precast.graphs.key import spec_digest, spec_part
from precast.log import get_logger
from precast.system.scratch import SHARED_MEMORY, scratch_folder, scratch_root

log = get_logger(__name__)

KEEP_VERSIONS: Final = 2
MAX_CACHE_BYTES: Final = 8 << 30


class GraphCache:
    """Verified artifacts in a folder, found by what they were captured for.

    Methods read and hash files: call them in a thread where an event loop must not wait.
    """

    def __init__(self, root: Path, trusted: Trust, *, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self._root = root
        self._trusted = trusted
        self._max_bytes = max_bytes
        self._only_read: list[DiskStore] = []
        """Where nothing can be written or removed."""
        self._hidden: set[tuple[str, int]] = set()
        """Keys and versions in there that must not be found."""
        self._condemned = Condemnations()
        try:
            self._store = _writable(root)
        except OSError as error:
            self.give_up_writing(error)

    @property
    def temporary(self) -> Path:
        """Where unfinished downloads lie: the cache's own file system, swept at the next start."""
        return self._store.root / TEMPORARY

    def give_up_writing(self, error: OSError) -> bool:
        """Goes on in a temporary folder; whether it did not do so before."""
        if self._only_read:
            return False
        self._temporary = _temporary_folder(error)
        log.warning(
            "graph cache can't be written; graphs are kept in a temporary folder until the end",
            path=str(self._root),
            reason=error.strerror,
            folder=self._temporary.name,
        )
        with suppress(OSError):  # there is none, and none can be made
            self._only_read = [DiskStore(self._root)]
        self._store = DiskStore(Path(self._temporary.name))
        return True

    def find(self, spec: Mapping[str, str]) -> StoredArtifact | None:
        """The newest good artifact for these spec factors; bad ones are removed on the way."""
        for key, version in self._candidates()[spec_digest(spec)]:
            try:
                return self.open(key, version, spec)
            except (ArtifactRejected, GraphNotFound, OSError) as error:
                log.warning("cached graph removed", key=key, reason=str(error))
                self._remove(key, version)
        return None

    def retire(self, key: str, serving: int, quarantined: Collection[int]) -> None:
        """Remove what must not be found any more: quarantined versions, and those newer than
        the one that serves (0: none does)."""
        for version in self._versions(key):
            if version in quarantined or 0 < serving < version:
                self._remove(key, version)

    def lift(self, key: str, lifts: Mapping[int, int]) -> None:
        """How often quarantines of versions were lifted: what was put aside before counts no more,
        not even for a next start that knows nothing of the lift."""
        for version, count in lifts.items():
            if self._condemned.lift(key, version, count):
                self._hidden.discard((key, version))
                aside = self._store.put_aside(key).get(version)
                if aside is not None and self._put_aside(key, version) is None:
                    self._store.forget_put_aside(key, version)

    def condemn(self, key: str, version: int, signal: str, lifts: int = 0) -> None:
        """Put an artifact aside: it is not found, opened or added until its quarantine, which was
        lifted so often before, is lifted once more."""
        one = Condemned(key=key, version=version, signal=signal, lifts=lifts)
        self._condemned.add(one)
        self._hidden.add((key, version))
        try:
            self._store.quarantine(key, version, one.reason)
        except OSError as error:
            log.warning("graph can't be put aside on disk", key=key, reason=error.strerror)

    def condemned(self) -> set[Condemned]:
        """What was put aside, and not lifted since."""
        return self._condemned.all(
            {
                (key, version): reason
                for store in self._stores
                for key in store.keys_put_aside()
                for version, reason in store.put_aside(key).items()
            }
        )

    def is_signed(self, artifact: StoredArtifact) -> bool:
        """Whether a trusted key signed an artifact that was verified, or nothing but the switch for
        unsigned ones let it through."""
        return artifact.signature.signer in self._trusted.keys

    def knows_signer(self, signer: str) -> bool:
        return signer in self._trusted.keys

    def distrust(self) -> set[tuple[str, int]]:
        """Remove what no key that is trusted now has signed: (key, version) of each."""
        removed = set()
        for key, version in self._published():
            try:
                artifact = self._open(key, version)
                self._trusted.verify(artifact.manifest_bytes, artifact.signature)
            except GraphNotFound:
                continue
            except ArtifactRejected as error:
                log.warning("cached graph removed", key=key, reason=str(error))
                self._remove(key, version)
                removed.add((key, version))
        return removed

    def open(self, key: str, version: int, spec: Mapping[str, str]) -> StoredArtifact:
        """A cached artifact, verified. Raises ``GraphNotFound`` or ``ArtifactRejected``."""
        artifact = self._open(key, version)
        self.check(artifact.manifest_bytes, artifact.signature, spec)
        with suppress(OSError):
            os.utime(artifact.graph_path.parent)  # its place in the order of eviction
        return artifact

    def check(self, manifest: bytes, signature: Signature, spec: Mapping[str, str]) -> Manifest:
        """Verify a manifest: signed by a trusted key, well-formed, and of the graph asked for."""
        self._trusted.verify(manifest, signature)
        parsed = decode_manifest(manifest)
        if (reason := self._put_aside(parsed.key, parsed.version)) is not None:
            raise ArtifactRejected(
                f"version {parsed.version} of graph {parsed.key} was put aside: {reason}"
            )
        if spec_part(parsed.factors) != dict(spec):
            raise ArtifactRejected(f"graph {parsed.key} was captured for other factors")
        return parsed

    def add(self, manifest: bytes, signature: Signature, graph: Path) -> StoredArtifact:
        """Keep a file whose manifest ``check`` has accepted, if its bytes are what that says."""
        parsed = decode_manifest(manifest)
        if self._holds(parsed):
            self._store.resign(parsed.key, parsed.version, signature)
        else:
            try:
                self._store.publish(manifest, signature, graph)
            except VersionExists:
                log.info("graph was cached by another process meanwhile", key=parsed.key)
        self._prune(parsed)
        self._evict(parsed.key)
        return self.open(parsed.key, parsed.version, spec_part(parsed.factors))

    def _holds(self, manifest: Manifest) -> bool:
        """Whether the same bytes are cached; others under the same number make room."""
        try:
            present = self._store.open(manifest.key, manifest.version)
        except GraphNotFound:
            return False
        except ArtifactRejected:
            same = False
        else:
            same = present.manifest == manifest
        if not same:
            self._store.remove(manifest.key, manifest.version)
        return same

    def _candidates(self) -> dict[str, list[tuple[str, int]]]:
        """spec digest -> (key, version), newest first; read from manifests, not yet verified."""
        found: dict[str, list[tuple[float, str, int]]] = defaultdict(list)
        for key, version in self._published():
            try:
                manifest = decode_manifest(self._manifest_path(key, version).read_bytes())
            except (OSError, ArtifactRejected) as error:
                log.warning("cached graph ignored", key=key, reason=str(error))
                continue
            digest = spec_digest(spec_part(manifest.factors))
            found[digest].append((manifest.created_at, key, version))
        newest_first = {digest: sorted(rows, reverse=True) for digest, rows in found.items()}
        return defaultdict(
            list,
            {d: [(key, number) for _, key, number in rows] for d, rows in newest_first.items()},
        )

    @property
    def _stores(self) -> list[DiskStore]:
        return [self._store, *self._only_read]

    def _versions(self, key: str) -> list[int]:
        """Those that may be found."""
        there = {version for store in self._stores for version in store.versions(key)}
        written = set(self._store.versions(key))
        return sorted(v for v in there if v in written or (key, v) not in self._hidden)

    def _published(self) -> list[tuple[str, int]]:
        keys = {key for store in self._stores for key in store.published_keys()}
        return [(key, version) for key in sorted(keys) for version in self._versions(key)]

    def _store_of(self, key: str, version: int) -> DiskStore:
        """The one to look for an artifact in."""
        hidden = (key, version) in self._hidden
        others = [store for store in self._only_read if not hidden]
        return next(
            (store for store in [self._store, *others] if version in store.versions(key)),
            self._store,
        )

    def _open(self, key: str, version: int) -> StoredArtifact:
        return self._store_of(key, version).open(key, version)

    def _manifest_path(self, key: str, version: int) -> Path:
        return self._store_of(key, version).root / key / str(version) / MANIFEST_FILE

    def _remove(self, key: str, version: int) -> None:
        self._store.remove(key, version)
        if self._only_read:
            self._hidden.add((key, version))

    def _put_aside(self, key: str, version: int) -> str | None:
        """Why, if it was."""
        reasons = [store.put_aside(key).get(version) for store in self._stores]
        on_disk = next((reason for reason in reasons if reason is not None), None)
        one = self._condemned.get(key, version, on_disk)
        return one.reason if one else None

    def _prune(self, added: Manifest) -> None:
        """Keep the newest versions, and the one just added whatever its number."""
        for version in self._store.versions(added.key)[:-KEEP_VERSIONS]:
            if version != added.version:
                self._store.remove(added.key, version)

    def _evict(self, kept: str) -> None:
        """Remove the least recently used artifacts until the cache fits its bound."""
        holdings = self._store.holdings()
        total = sum(holding.size for holding in holdings)
        for holding in sorted(holdings, key=lambda holding: holding.used_at):
            if total <= self._max_bytes:
                return
            if holding.key != kept:
                self._store.remove(holding.key, holding.version)
                total -= holding.size


def _writable(root: Path) -> DiskStore:
    """Raises OSError if nothing can be written there."""
    store = DiskStore(root)
    store.sweep()
    with scratch_folder(store.temporary, "probe"):
        return store


def _temporary_folder(trouble: OSError) -> "tempfile.TemporaryDirectory[str]":
    """On another file system than the one that is in trouble, as far as that can be guessed."""
    roots = [scratch_root(), SHARED_MEMORY]
    if trouble.errno == errno.ENOSPC:
        roots.reverse()
    for root in roots[:-1]:
        with suppress(OSError):
            return tempfile.TemporaryDirectory(prefix="precast-graphs-", dir=root)
    return tempfile.TemporaryDirectory(prefix="precast-graphs-", dir=roots[-1])
