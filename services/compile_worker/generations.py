"""Which generation of a graph serves: decisions by workers' reports, canaries and operators.

A decision is written beside the artifacts in the store first, then told through the index. Every
compile worker brings together what store and index know (``lifecycle.py``), so that a decision
outlives this process, Redis, and a store that was not in reach when it was made.
"""

import asyncio
import time
from dataclasses import dataclass

import msgspec

from precast.errors import ArtifactRejected, GraphNotFound, InvalidRequest
from precast.graphs.artifact import Manifest
from precast.graphs.lifecycle import (
    Lifecycle,
    Verdict,
    decode_lifecycle,
    encode_lifecycle,
    previous,
)
from precast.graphs.signing import TrustedKeys
from precast.graphs.store import DiskStore, StoredArtifact
from precast.log import get_logger
from services.compile_worker.index import GraphIndex
from services.compile_worker.record import (
    MAX_FAILURES,
    NEVER_S,
    GraphRecord,
    Phase,
    changed,
    published_record,
)

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation as an operator sees it."""

    number: int
    verdict: Verdict
    serving: bool
    pinned: bool
    held: bool
    """Newer than what serves, and the graph is pinned."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Generations:
    """Decisions on generations, over one store and index."""

    store: DiskStore
    index: GraphIndex
    trusted: TrustedKeys

    def lifecycle(self, key: str) -> Lifecycle:
        """All that is known of a key's generations."""
        record = self.index.get(key)
        noted = self._noted(key)
        return noted.merged(record.lifecycle) if record else noted

    def serving(self, key: str) -> int:
        """The generation that workers should run; 0: none."""
        return self.lifecycle(key).serving(self.store.generations(key))

    async def decide(self, key: str, lifecycle: Lifecycle) -> None:
        """Write a decision beside the artifacts, then tell everybody what serves now."""
        await asyncio.to_thread(self.persist, key, lifecycle)
        await self.refresh(key)

    def manifest(self, key: str, generation: int) -> Manifest | None:
        """What was signed of a generation; None if it is gone or damaged."""
        try:
            return self.open(key, generation).manifest
        except (GraphNotFound, ArtifactRejected):
            return None

    def nominate(self, key: str, generation: int) -> None:
        """Make a generation a candidate before it is published, unless another process has
        published and judged it already."""
        lifecycle = self.lifecycle(key)
        if generation not in lifecycle.marks and generation not in self.store.generations(key):
            self.persist(key, lifecycle.marked(generation, Verdict.CANDIDATE))

    def persist(self, key: str, lifecycle: Lifecycle) -> None:
        """Write down what the store's note doesn't know yet."""
        noted = self._noted(key)
        merged = noted.merged(lifecycle)
        if merged != noted:
            self.store.write_note(key, encode_lifecycle(merged))

    def listed(self, key: str) -> list[Generation]:
        """Every generation that is in the store or was taken out of service, newest first.

        Raises ``GraphNotFound``.
        """
        there, aside = self.store.generations(key), self.store.put_aside(key)
        lifecycle, serving = self.lifecycle(key), self.serving(key)
        quarantined = lifecycle.having(Verdict.QUARANTINED)
        numbers = sorted({*there, *aside, *quarantined}, reverse=True)
        if not numbers:
            raise GraphNotFound(f"no generation of graph {key[:64]!r}")
        return [
            Generation(
                number=number,
                verdict=Verdict.QUARANTINED if number in aside else lifecycle.verdict(number),
                serving=number == serving,
                pinned=number == lifecycle.pin.generation,
                held=lifecycle.pin.generation > 0 and number > serving,
                reason=aside.get(number, "") or lifecycle.reason(number),
            )
            for number in numbers
        ]

    async def roll_back(self, key: str, to: int) -> int:
        """Serve an earlier generation (0: the one before) and withdraw what is newer.

        Returns its number. Raises ``GraphNotFound`` or ``InvalidRequest``.
        """
        lifecycle, there = self.lifecycle(key), self.store.generations(key)
        if lifecycle.pin.generation:
            raise InvalidRequest(
                f"graph {key} is pinned to generation {lifecycle.pin.generation}; unpin it first"
            )
        target = to or previous(lifecycle, there)
        if not target:
            raise InvalidRequest(f"graph {key} has no earlier generation to go back to")
        self._check_servable(key, target, lifecycle)
        for number in there:
            if number > target and lifecycle.verdict(number) is not Verdict.QUARANTINED:
                reason = f"rolled back to generation {target} by hand"
                lifecycle = lifecycle.marked(number, Verdict.WITHDRAWN, reason)
        lifecycle = lifecycle.marked(target, Verdict.GOOD, "chosen by hand")
        await self.decide(key, lifecycle)
        return target

    async def pin(self, key: str, generation: int) -> None:
        """Fix the serving generation; 0 frees it. Raises ``GraphNotFound`` or
        ``InvalidRequest``."""
        lifecycle = self.lifecycle(key)
        if generation:
            self._check_servable(key, generation, lifecycle)
        elif not self.store.generations(key):
            raise GraphNotFound(f"no generation of graph {key[:64]!r}")
        await self.decide(key, lifecycle.pinned(generation))

    async def follow(self) -> None:
        """Take over what other compile workers decide of generations, until cancelled."""
        with self.index.changes.subscribe() as changes:
            while True:
                await self._take_over(await changes.next())

    async def refresh(self, key: str) -> None:
        """Tell everybody which generation serves now."""
        record = await self.record(key)
        known = self.index.get(key)
        lifecycle = self.lifecycle(key)
        if record is None and known and lifecycle != known.lifecycle:
            record = _barred(known, lifecycle)
        if record:
            await self.index.put(record)

    async def quarantine(self, key: str, generation: int, reason: str) -> None:
        """Take a generation out of service everywhere and for good."""
        lifecycle = self.lifecycle(key)
        if lifecycle.verdict(generation) is not Verdict.QUARANTINED:
            log.error("graph quarantined", key=key, generation=generation, reason=reason)
            await self.decide(key, lifecycle.marked(generation, Verdict.QUARANTINED, reason))

    async def crashed(self, key: str, generation: int, reason: str) -> None:
        """Quarantine a generation that crashed a worker. Raises ``GraphNotFound``."""
        known = self.index.get(key) is not None or generation in self.store.generations(key)
        if not known or generation < 1:
            raise GraphNotFound(f"no graph {key[:64]!r}, generation {generation}")
        await self.quarantine(key, generation, reason)

    async def _take_over(self, record: GraphRecord) -> None:
        """Write down a decision that came through the index, and act upon it."""
        there = self.store.generations(record.key)
        if there:
            await asyncio.to_thread(self.persist, record.key, record.lifecycle)
        # what serves may lie in another worker's store: then it is not ours to say
        ours = record.generation in there or not record.generation
        if there and ours and self.serving(record.key) != record.generation:
            await self.refresh(record.key)

    async def record(self, key: str) -> GraphRecord | None:
        """The record of the generation that serves, its files checked; damaged ones are put
        aside."""
        while number := self.serving(key):
            lifecycle = self.lifecycle(key)
            record = self.index.get(key)
            if record and record.generation == number:
                same = record.lifecycle == lifecycle
                return record if same else changed(record, lifecycle=lifecycle)
            try:
                artifact = await asyncio.to_thread(self.open, key, number)
            except GraphNotFound:  # removed meanwhile
                return None
            except ArtifactRejected as error:
                await asyncio.to_thread(self.store.quarantine, key, number, str(error))
                continue
            return published_record(artifact.manifest, record, lifecycle)
        return None

    async def barred(self, key: str) -> GraphRecord | None:
        """The record of a graph that the index doesn't know, all of whose generations are out of
        service."""
        lifecycle = self.lifecycle(key)
        if not lifecycle.marks or not self.store.generations(key):
            return None
        try:
            artifact = await asyncio.to_thread(self.open, key, self.store.generations(key)[-1])
        except (GraphNotFound, ArtifactRejected):
            return None
        return _barred(published_record(artifact.manifest, None, lifecycle), lifecycle)

    def open(self, key: str, generation: int) -> StoredArtifact:
        """An artifact whose digest, and signature if its signer is known here, are right.

        Raises ``GraphNotFound`` or ``ArtifactRejected``.
        """
        artifact = self.store.open(key, generation)
        # another compile worker's key may be unknown here; whoever fetches decides whom to trust
        if artifact.signature.signer in self.trusted.keys:
            self.trusted.verify(artifact.manifest_bytes, artifact.signature)
        return artifact

    def _check_servable(self, key: str, generation: int, lifecycle: Lifecycle) -> None:
        if lifecycle.verdict(generation) is Verdict.QUARANTINED:
            raise InvalidRequest(
                f"generation {generation} of graph {key} is quarantined: "
                f"{lifecycle.reason(generation)}"
            )
        if generation not in self.store.generations(key):
            known = ", ".join(map(str, self.store.generations(key))) or "none"
            raise GraphNotFound(f"graph {key} has no generation {generation} (there are: {known})")

    def _noted(self, key: str) -> Lifecycle:
        try:
            raw = self.store.read_note(key)
            return decode_lifecycle(raw) if raw is not None else Lifecycle()
        except (msgspec.DecodeError, ArtifactRejected, OSError) as error:
            log.error("note on generations can't be read", key=key, reason=str(error))
            return Lifecycle()


def _barred(record: GraphRecord, lifecycle: Lifecycle) -> GraphRecord:
    """The record of a graph of which no generation may serve: a recompile by hand ends that."""
    quarantined = lifecycle.having(Verdict.QUARANTINED)
    newest = max(quarantined, default=0)
    if not newest:
        return changed(record, lifecycle=lifecycle)
    return changed(
        record,
        phase=Phase.FAILED,
        generation=0,
        error=f"generation {newest} is quarantined: {lifecycle.reason(newest)}",
        failures=MAX_FAILURES,
        retry_at=time.time() + NEVER_S,
        lifecycle=lifecycle,
    )
