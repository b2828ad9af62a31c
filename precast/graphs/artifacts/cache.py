"""A worker's own copy of the graphs it runs: fetched over gRPC, verified, kept on disk.

Nothing gets into the cache, and nothing comes out of it, without a manifest that a trusted key
signed and bytes that match the manifest's digest. What is refused raises ``ArtifactRejected`` with
the reason. The cache works without any compile worker alive.
"""

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from typing import Any, Final

import grpc.aio

from precast.errors import ArtifactRejected, GraphNotFound, Unavailable
from precast.graphs.artifacts.disk_store import TEMPORARY, DiskStore
from precast.graphs.artifacts.manifest import GRAPH_FILE, MANIFEST_FILE, Manifest, decode_manifest
from precast.graphs.artifacts.signing import Signature
from precast.graphs.artifacts.store import StoredArtifact, VersionExists
from precast.graphs.artifacts.trust import Trust
from precast.graphs.key import spec_digest, spec_part
from precast.log import get_logger
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from precast.rpc.server import error_of
from precast.system.scratch import scratch_folder

log = get_logger(__name__)

FETCH_TIMEOUT_S: Final = 60.0
KEEP_VERSIONS: Final = 2
MAX_CACHE_BYTES: Final = 8 << 30


class GraphCache:
    """Verified artifacts in a folder, found by what they were captured for.

    Methods read and hash files: call them in a thread where an event loop must not wait.
    """

    def __init__(self, root: Path, trusted: Trust, *, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self._store = DiskStore(root)
        self._store.sweep()
        self._trusted = trusted
        self._max_bytes = max_bytes

    @property
    def temporary(self) -> Path:
        """Where unfinished downloads lie: the cache's own file system, swept at the next start."""
        return self._store.root / TEMPORARY

    def find(self, spec: Mapping[str, str]) -> StoredArtifact | None:
        """The newest good artifact for these spec factors; bad ones are removed on the way."""
        for key, version in self._candidates()[spec_digest(spec)]:
            try:
                return self.open(key, version, spec)
            except (ArtifactRejected, GraphNotFound) as error:
                log.warning("cached graph removed", key=key, reason=str(error))
                self._store.remove(key, version)
        return None

    def retire(self, key: str, serving: int, quarantined: Collection[int]) -> None:
        """Remove what must not be found any more: quarantined versions, and those newer than
        the one that serves (0: none does)."""
        for version in self._store.versions(key):
            if version in quarantined or 0 < serving < version:
                self._store.remove(key, version)

    def condemn(self, key: str, version: int, reason: str) -> None:
        """Put an artifact aside for good: it is never found, opened or added again."""
        self._store.quarantine(key, version, reason)

    def condemned(self) -> set[tuple[str, int, str]]:
        """(key, version, reason) of what was put aside."""
        return {
            (key, version, reason)
            for key in self._store.keys_put_aside()
            for version, reason in self._store.put_aside(key).items()
        }

    def is_signed(self, artifact: StoredArtifact) -> bool:
        """Whether a trusted key signed an artifact that was verified, or nothing but the switch for
        unsigned ones let it through."""
        return artifact.signature.signer in self._trusted.keys

    def knows_signer(self, signer: str) -> bool:
        return signer in self._trusted.keys

    def distrust(self) -> set[tuple[str, int]]:
        """Remove what no key that is trusted now has signed: (key, version) of each."""
        removed = set()
        for key in self._store.published_keys():
            for version in self._store.versions(key):
                try:
                    artifact = self._store.open(key, version)
                    self._trusted.verify(artifact.manifest_bytes, artifact.signature)
                except GraphNotFound:
                    continue
                except ArtifactRejected as error:
                    log.warning("cached graph removed", key=key, reason=str(error))
                    self._store.remove(key, version)
                    removed.add((key, version))
        return removed

    def open(self, key: str, version: int, spec: Mapping[str, str]) -> StoredArtifact:
        """A cached artifact, verified. Raises ``GraphNotFound`` or ``ArtifactRejected``."""
        artifact = self._store.open(key, version)
        self.check(artifact.manifest_bytes, artifact.signature, spec)
        os.utime(artifact.graph_path.parent)  # its place in the order of eviction
        return artifact

    def check(self, manifest: bytes, signature: Signature, spec: Mapping[str, str]) -> Manifest:
        """Verify a manifest: signed by a trusted key, well-formed, and of the graph asked for."""
        self._trusted.verify(manifest, signature)
        parsed = decode_manifest(manifest)
        if (reason := self._store.put_aside(parsed.key).get(parsed.version)) is not None:
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
        for key in self._store.published_keys():
            for version in self._store.versions(key):
                path = self._store.root / key / str(version) / MANIFEST_FILE
                try:
                    manifest = decode_manifest(path.read_bytes())
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


async def fetch_graph(
    stub: Any,
    cache: GraphCache,
    key: str,
    *,
    spec: Mapping[str, str],
    version: int = 0,
    worker_id: str = "",
    timeout_s: float = FETCH_TIMEOUT_S,
) -> StoredArtifact:
    """Stream an artifact from a compile worker into the cache (version 0: the newest).

    ``stub`` is a ``GraphsServiceStub``; ``spec`` are the factors that the graph was asked for with.

    Raises:
        ArtifactRejected: unsigned, signed by a key that isn't trusted, not what was asked for,
            longer or shorter than signed, or of another digest. Nothing of it is kept.
        PrecastError: what the server answered, as ``precast.rpc.server.error_of`` reads it.
    """
    call = stub.FetchGraph(
        pb.FetchGraphRequest(key=key, version=version, worker_id=worker_id), timeout=timeout_s
    )
    parts = aiter(call)
    try:
        header = await _read_header(parts)
        signature = Signature(signer=header.signer, signature=header.signature)
        manifest = cache.check(header.manifest, signature, spec)
        if manifest.key != key or version not in (0, manifest.version):
            raise ArtifactRejected(
                f"asked for {key}/{version}, got {manifest.key}/{manifest.version}"
            )
        with scratch_folder(cache.temporary, key) as folder:
            await _receive(parts, folder / GRAPH_FILE, manifest.size)
            return await asyncio.to_thread(
                cache.add, header.manifest, signature, folder / GRAPH_FILE
            )
    except grpc.aio.AioRpcError as failure:
        raise error_of(failure) from None
    except OSError as error:
        raise Unavailable(f"graph cache: {error}") from None
    finally:
        call.cancel()


async def _read_header(parts: AsyncIterator[pb.FetchGraphResponse]) -> pb.ArtifactHeader:
    first = await anext(parts, None)
    if first is None or first.WhichOneof("part") != "header":
        raise ArtifactRejected("stream does not begin with a header")
    return first.header


async def _receive(parts: AsyncIterator[pb.FetchGraphResponse], path: Path, size: int) -> None:
    """Write the stream's chunks to ``path``, and not one byte more than was signed."""
    received = 0
    with path.open("xb") as file:
        async for message in parts:
            if message.WhichOneof("part") != "chunk":
                raise ArtifactRejected("stream has something other than a chunk after its header")
            received += len(message.chunk)
            if received > size:
                raise ArtifactRejected(f"stream is longer than the {size} bytes that were signed")
            file.write(message.chunk)
    if received != size:
        raise ArtifactRejected(f"stream ended after {received} of {size} bytes")
