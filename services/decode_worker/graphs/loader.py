"""Finds the artifacts that a worker's ranks run, in its cache or fetched, verified in either case,
and offers a size to the ranks once there is an artifact for each of them.

Threads read and hash files, and return what they found: only the event loop changes anything here.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from precast.errors import ArtifactRejected, GraphNotFound
from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.sealed import seal_graph
from precast.graphs.artifacts.store import StoredArtifact
from precast.graphs.key import spec_digest, spec_part
from precast.graphs.targets import lesser
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from precast.system.owner import ThreadOwner
from precast.system.sealed_file import SealedFile
from services.decode_worker.graphs.candidates import Candidate
from services.decode_worker.graphs.manager import GraphManager
from services.decode_worker.graphs.shadow_trial import Assignment

Spec = dict[str, str]


class Held(NamedTuple):
    """An artifact that was verified, and its graph as it was then."""

    artifact: StoredArtifact
    graph: SealedFile


class ArtifactLoader:
    def __init__(
        self,
        *,
        graphs: GraphManager,
        cache: GraphCache,
        trial_cache: GraphCache,
        on_due: Callable[[], None],
    ) -> None:
        """``trial_cache`` keeps graphs that this worker tries, out of the sight of others that
        share ``cache``. ``on_due`` is called when the ranks have a graph to load or to drop."""
        self.graphs = graphs
        self.cache = cache
        self.trial_cache = trial_cache
        self._on_due = on_due
        self._owner = ThreadOwner()
        self._held: dict[str, Held] = {}
        """Newest verified artifact by spec digest."""

    def get(self, spec: Spec) -> StoredArtifact | None:
        """What is used for a spec."""
        held = self._held.get(spec_digest(spec))
        return held.artifact if held else None

    async def put(self, spec: Spec, artifact: StoredArtifact) -> None:
        """To be used for a spec from now on. Raises ArtifactRejected."""
        self._owner.check()
        held = await asyncio.to_thread(_hold, artifact)
        self._held[spec_digest(spec)] = held
        self._offer_complete()

    def borrows(self, spec: Spec) -> bool:
        """Whether what is used for a spec was captured for a lesser instruction set."""
        present = self.get(spec)
        return present is not None and present.manifest.factors["isa"] != spec["isa"]

    def specs(self) -> list[Spec]:
        """Each distinct spec once, smallest size first: ranks with equal shards share a graph."""
        unique = {spec_digest(spec): spec for wanted in self.graphs.wanted for spec in wanted.specs}
        return list(unique.values())

    async def load_cached(self) -> None:
        """Offers what the cache holds."""
        unknown = [spec for spec in self.specs() if self.get(spec) is None]
        found = await asyncio.to_thread(_find, self.cache, unknown)
        self._held = {**found, **self._held}  # what was fetched meanwhile is newer
        self._offer_complete()

    async def distrust(self) -> None:
        """Has the ranks drop graphs that nobody vouches for any more: their key was revoked."""
        for key, _ in await asyncio.to_thread(self.trial_cache.distrust):
            self.graphs.trials.withdraw(key)
        await asyncio.to_thread(self.cache.distrust)
        known = dict(self._held)
        trusted = await asyncio.to_thread(_still_trusted, self.cache, known)
        gone = set()
        for digest, held in known.items():
            if self._held.get(digest) is not held:  # another one came meanwhile
                continue
            if digest in trusted:
                self._held[digest] = trusted[digest]
            else:
                del self._held[digest]
                gone.add((held.artifact.manifest.key, held.artifact.manifest.version))
        self.graphs.forget(gone)
        self._on_due()

    async def assign(self, wanted: pb.CanaryAssignment, new: StoredArtifact) -> None:
        """Has the ranks of the new graph's key try it, beside the others' present graphs. Raises
        ArtifactRejected."""
        tried = await asyncio.to_thread(_hold, new)
        digest = spec_digest(spec_part(new.manifest.factors))
        size = int(new.manifest.factors["num_tokens"])
        specs = [w.specs for w in self.graphs.wanted if w.num_tokens == size]
        digests = [spec_digest(spec) for spec in (specs[0] if specs else ())]
        found = [tried if d == digest else self._held.get(d) for d in digests]
        held = [one for one in found if one is not None]
        if len(held) < len(found):
            return
        self.graphs.trials.assign(
            Assignment(
                key=new.manifest.key,
                version=wanted.version,
                num_tokens=size,
                graphs=tuple(one.graph for one in held),
                keys=tuple(one.artifact.manifest.key for one in held),
                versions=tuple(one.artifact.manifest.version for one in held),
                steps=wanted.steps,
                live_s=wanted.live_s,
            )
        )
        self._on_due()

    async def retire(self, state: pb.GraphState) -> None:
        """Forgets versions that must not be loaded any more, and what speaks against those whose
        quarantine was lifted."""
        quarantined, lifts = frozenset(state.quarantined), dict(state.lifts)
        if lifts:
            self.graphs.lift(state.key, lifts)
        for cache, serving in ((self.cache, state.version), (self.trial_cache, 0)):
            if lifts:
                await asyncio.to_thread(cache.lift, state.key, lifts)
            await asyncio.to_thread(cache.retire, state.key, serving, quarantined)
        self.graphs.quarantine(state.key, quarantined)
        self._held = {
            digest: held
            for digest, held in self._held.items()
            if held.artifact.manifest.key != state.key
            or held.artifact.manifest.version not in quarantined
        }
        if self.graphs.pending:
            self._on_due()

    def _offer_complete(self) -> None:
        """Offers every size for which all ranks' artifacts are here and not loaded yet."""
        for wanted in self.graphs.wanted:
            found = [self._held.get(spec_digest(spec)) for spec in wanted.specs]
            held = [one for one in found if one is not None]
            if len(held) == len(found):
                self._offer(wanted.num_tokens, held)

    def _offer(self, num_tokens: int, held: Sequence[Held]) -> None:
        artifacts = [one.artifact for one in held]
        candidate = Candidate(
            num_tokens=num_tokens,
            graphs=tuple(one.graph for one in held),
            keys=tuple(artifact.manifest.key for artifact in artifacts),
            versions=tuple(artifact.manifest.version for artifact in artifacts),
            layer_us=_slowest(artifacts),
            signed=all(map(self.cache.is_signed, artifacts)),
        )
        current = self.graphs.current(num_tokens)
        if current is None or current.identity != candidate.identity:
            self.graphs.offer(candidate)
            self._on_due()


def _hold(artifact: StoredArtifact) -> Held:
    return Held(artifact, seal_graph(artifact.graph_path, artifact.manifest))


def _find(cache: GraphCache, specs: Sequence[Spec]) -> dict[str, Held]:
    """The best artifact that is cached for each spec, by spec digest."""
    found = {}
    for spec in specs:
        artifacts = map(cache.find, [spec, *lesser_specs(spec)])
        if artifact := next(filter(None, artifacts), None):
            with suppress(ArtifactRejected):  # changed since it was verified a moment ago
                found[spec_digest(spec)] = _hold(artifact)
    return found


def _still_trusted(cache: GraphCache, known: Mapping[str, Held]) -> dict[str, Held]:
    """Those that a trusted key has signed; another one may have done so since."""
    trusted = {}
    for digest, held in known.items():
        with suppress(ArtifactRejected, GraphNotFound):
            trusted[digest] = Held(_vouched(cache, held.artifact), held.graph)
    return trusted


def _vouched(cache: GraphCache, artifact: StoredArtifact) -> StoredArtifact:
    """The artifact with a signature that is trusted now. Raises ArtifactRejected or
    GraphNotFound."""
    manifest, spec = artifact.manifest, spec_part(artifact.manifest.factors)
    try:
        cache.check(artifact.manifest_bytes, artifact.signature, spec)
        return artifact
    except ArtifactRejected:
        present = cache.open(manifest.key, manifest.version, spec)
        if present.manifest != manifest:
            raise
        return present


def _slowest(artifacts: Sequence[StoredArtifact]) -> float:
    """Of the ranks' layers; 0 if one's is not known."""
    times = [artifact.manifest.layer_us for artifact in artifacts]
    return max(times) if all(times) else 0.0


def lesser_specs(spec: Spec) -> list[Spec]:
    """The same graph for the instruction sets below, best first."""
    return [{**spec, "isa": isa} for isa in lesser(spec["isa"])]
