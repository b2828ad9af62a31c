"""The artifacts that a worker's ranks run: out of its cache or fetched, verified in either case,
and offered to the ranks once there is one for each of them.
"""

import asyncio
from collections.abc import Callable, Sequence

from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.store import StoredArtifact
from precast.graphs.key import spec_digest, spec_part
from precast.graphs.targets import lesser
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from services.decode_worker.graphs.candidates import Offer
from services.decode_worker.graphs.manager import GraphSet
from services.decode_worker.graphs.shadow_trial import Assignment

Spec = dict[str, str]


class GraphShelf:
    def __init__(
        self,
        *,
        graphs: GraphSet,
        cache: GraphCache,
        candidates: GraphCache,
        on_offer: Callable[[], None],
    ) -> None:
        """``candidates`` keeps graphs that this worker tries, out of the sight of others that
        share ``cache``. ``on_offer`` is called when ranks have a graph to load or to drop."""
        self.graphs = graphs
        self.cache = cache
        self.candidates = candidates
        self._on_offer = on_offer
        self._artifacts: dict[str, StoredArtifact] = {}
        """Newest verified artifact by spec digest."""

    def get(self, spec: Spec) -> StoredArtifact | None:
        """What is used for a spec."""
        return self._artifacts.get(spec_digest(spec))

    def put(self, spec: Spec, artifact: StoredArtifact) -> None:
        """To be used for a spec from now on."""
        self._artifacts[spec_digest(spec)] = artifact
        self._offer_complete()

    def borrows(self, spec: Spec) -> bool:
        """Whether what is used for a spec was captured for a lesser instruction set."""
        present = self.get(spec)
        return present is not None and present.manifest.factors["isa"] != spec["isa"]

    def specs(self) -> list[Spec]:
        """Each distinct spec once, smallest batch first: ranks with equal shards share a graph."""
        unique = {spec_digest(spec): spec for wanted in self.graphs.wanted for spec in wanted.specs}
        return list(unique.values())

    def load_cached(self) -> None:
        """Offers what the cache holds. Reads and hashes files."""
        for wanted in self.graphs.wanted:
            for spec in wanted.specs:
                if spec_digest(spec) in self._artifacts:
                    continue
                found = map(self.cache.find, [spec, *lesser_specs(spec)])
                artifact = next(filter(None, found), None)
                if artifact is not None:
                    self._artifacts[spec_digest(spec)] = artifact
        self._offer_complete()

    def distrust(self) -> None:
        """Drops graphs whose key was revoked. Reads and hashes files."""
        for key, _ in self.candidates.distrust():
            self.graphs.canary.withdraw(key)
        self.cache.distrust()
        for digest, artifact in list(self._artifacts.items()):
            if not artifact.graph_path.exists():
                del self._artifacts[digest]

    def assign(self, wanted: pb.CanaryAssignment, candidate: StoredArtifact) -> None:
        """Has the ranks of the candidate's key try it, beside the others' present graphs."""
        digest = spec_digest(spec_part(candidate.manifest.factors))
        size = int(candidate.manifest.factors["num_tokens"])
        specs = [w.specs for w in self.graphs.wanted if w.num_tokens == size]
        digests = [spec_digest(spec) for spec in (specs[0] if specs else ())]
        found = [candidate if d == digest else self._artifacts.get(d) for d in digests]
        artifacts = [artifact for artifact in found if artifact is not None]
        if len(artifacts) < len(found):
            return
        self.graphs.canary.assign(
            Assignment(
                key=candidate.manifest.key,
                version=wanted.version,
                num_tokens=size,
                paths=tuple(str(artifact.graph_path) for artifact in artifacts),
                keys=tuple(artifact.manifest.key for artifact in artifacts),
                versions=tuple(artifact.manifest.version for artifact in artifacts),
                steps=wanted.steps,
                live_s=wanted.live_s,
            )
        )
        self._on_offer()

    async def retire(self, state: pb.GraphState) -> None:
        """Forgets versions that must not be loaded any more."""
        quarantined = frozenset(state.quarantined)
        for cache, serving in ((self.cache, state.version), (self.candidates, 0)):
            await asyncio.to_thread(cache.retire, state.key, serving, quarantined)
        self.graphs.quarantine(state.key, quarantined)
        self._artifacts = {
            digest: artifact
            for digest, artifact in self._artifacts.items()
            if artifact.manifest.key != state.key or artifact.manifest.version not in quarantined
        }
        if self.graphs.pending:
            self._on_offer()

    def forget_removed(self) -> None:
        """Has ranks drop graphs whose artifacts are gone."""
        self.graphs.forget_removed()
        self._on_offer()

    def _offer_complete(self) -> None:
        """Offers every size for which all ranks' artifacts are here and not loaded yet."""
        for wanted in self.graphs.wanted:
            artifacts = [self._artifacts.get(spec_digest(spec)) for spec in wanted.specs]
            complete = [artifact for artifact in artifacts if artifact is not None]
            if len(complete) == len(artifacts):
                self._offer(wanted.num_tokens, complete)

    def _offer(self, num_tokens: int, artifacts: Sequence[StoredArtifact]) -> None:
        offer = Offer(
            num_tokens=num_tokens,
            paths=tuple(artifact.graph_path for artifact in artifacts),
            keys=tuple(artifact.manifest.key for artifact in artifacts),
            versions=tuple(artifact.manifest.version for artifact in artifacts),
            layer_us=_slowest(artifacts),
            signed=all(map(self.cache.is_signed, artifacts)),
        )
        current = self.graphs.current(num_tokens)
        if current is None or current.identity != offer.identity:
            self.graphs.offer(offer)
            self._on_offer()


def _slowest(artifacts: Sequence[StoredArtifact]) -> float:
    """Of the ranks' layers; 0 if one's is not known."""
    times = [artifact.manifest.layer_us for artifact in artifacts]
    return max(times) if all(times) else 0.0


def lesser_specs(spec: Spec) -> list[Spec]:
    """The same graph for the instruction sets below, best first."""
    return [{**spec, "isa": isa} for isa in lesser(spec["isa"])]
