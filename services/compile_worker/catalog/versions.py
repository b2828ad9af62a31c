"""Which version of a graph serves: decisions by workers' reports, canaries and operators.

A decision is written beside the artifacts in the store first, then told through the index. Every
compile worker brings together what store and index know (``artifacts/versions.py``), so that a
decision outlives this process, Redis, and a store that was not in reach when it was made.
"""

import asyncio
from dataclasses import dataclass

import msgspec

from precast.errors import ArtifactRejected, GraphNotFound, PrecastError
from precast.graphs.artifacts.manifest import Manifest
from precast.graphs.artifacts.signing import Signature
from precast.graphs.artifacts.store import ArtifactStore, StoredArtifact
from precast.graphs.artifacts.trust import Trust
from precast.graphs.artifacts.versions import (
    Lifecycle,
    Verdict,
    decode_lifecycle,
    encode_lifecycle,
)
from precast.log import get_logger
from services.compile_worker.catalog.entry import (
    GraphRecord,
    barred_record,
    changed,
    published_record,
)
from services.compile_worker.catalog.index import GraphIndex

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version as an operator sees it."""

    number: int
    verdict: Verdict
    serving: bool
    pinned: bool
    held: bool
    """Newer than what serves, and the graph is pinned."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a key's versions stand."""

    there: list[int]
    """Published ones in the store, ascending."""
    lifecycle: Lifecycle
    """All that store and index know of them."""

    @property
    def serving(self) -> int:
        """The version that workers should run; 0: none."""
        return self.lifecycle.serving(self.there)


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Decisions on versions, over one store and index."""

    store: ArtifactStore
    index: GraphIndex
    trusted: Trust

    def look(self, key: str) -> Standing:
        """What store and index know of a key. Reads the store: not for an event loop."""
        record = self.index.get(key)
        noted = self._noted(key)
        lifecycle = noted.merged(record.lifecycle) if record else noted
        return Standing(there=self.store.versions(key), lifecycle=lifecycle)

    async def standing(self, key: str) -> Standing:
        """``look`` in a thread."""
        return await asyncio.to_thread(self.look, key)

    async def decide(self, key: str, lifecycle: Lifecycle) -> None:
        """Write a decision beside the artifacts, then tell everybody what serves now."""
        await asyncio.to_thread(self.persist, key, lifecycle)
        await self.refresh(key)

    def manifest(self, key: str, version: int) -> Manifest | None:
        """What was signed of a version; None if it is gone or damaged."""
        try:
            return self.open(key, version).manifest
        except (GraphNotFound, ArtifactRejected):
            return None

    def nominate(self, key: str, version: int, *, known: bool = False) -> None:
        """Make a version a candidate before it is published, unless another process has
        published and judged it already. ``known``: published, and nobody has judged it."""
        now = self.look(key)
        if version not in now.lifecycle.marks and (known or version not in now.there):
            self.persist(key, now.lifecycle.marked(version, Verdict.CANDIDATE))

    def persist(self, key: str, lifecycle: Lifecycle) -> None:
        """Write down what the store's note doesn't know yet."""

        def change(note: bytes | None) -> bytes | None:
            noted = _decoded(key, note)
            merged = noted.merged(lifecycle)
            return encode_lifecycle(merged) if merged != noted else None

        self.store.update_note(key, change)

    def listed(self, key: str) -> list[Version]:
        """Every version that is in the store or was taken out of service, newest first.

        Reads the store: not for an event loop. Raises ``GraphNotFound``.
        """
        now, aside = self.look(key), self.store.put_aside(key)
        lifecycle, serving = now.lifecycle, now.serving
        quarantined = lifecycle.having(Verdict.QUARANTINED)
        numbers = sorted({*now.there, *aside, *quarantined}, reverse=True)
        if not numbers:
            raise GraphNotFound(f"no version of graph {key[:64]!r}")
        return [
            Version(
                number=number,
                verdict=Verdict.QUARANTINED if number in aside else lifecycle.verdict(number),
                serving=number == serving,
                pinned=number == lifecycle.pin.version,
                held=lifecycle.pin.version > 0 and number > serving,
                reason=aside.get(number, "") or lifecycle.reason(number),
            )
            for number in numbers
        ]

    async def follow(self) -> None:
        """Take over what other compile workers decide of versions, until cancelled."""
        with self.index.changes.subscribe() as changes:
            while True:
                record = await changes.next()
                try:
                    await self._take_over(record)
                except (PrecastError, OSError) as error:
                    log.warning("not taken over", key=record.key, reason=str(error))

    async def refresh(self, key: str) -> None:
        """Tell everybody which version serves now."""
        record = await self.record(key)
        known = self.index.get(key)
        lifecycle = (await self.standing(key)).lifecycle
        if record is None and known and lifecycle != known.lifecycle:
            record = barred_record(known, lifecycle)
        if record:
            await self.index.put(record)

    async def quarantine(
        self, key: str, version: int, reason: str, *, lifts: int | None = None
    ) -> None:
        """Take a version out of service everywhere, until an operator lifts that.

        ``lifts``: how often it had been lifted when what speaks against it happened; nothing is
        done if it was lifted since. None: as often as is known.
        """
        lifecycle = (await self.standing(key)).lifecycle
        if lifts is not None and lifts < lifecycle.lifts(version):
            log.info("not quarantined: lifted since", key=key, version=version, reason=reason)
        elif lifecycle.verdict(version) is not Verdict.QUARANTINED:
            log.error("graph quarantined", key=key, version=version, reason=reason)
            await self.decide(key, lifecycle.marked(version, Verdict.QUARANTINED, reason))

    async def untried(self, key: str) -> bool:
        """Whether nothing serves but there is a candidate, which waits for a worker to try it."""
        now = await self.standing(key)
        return not now.serving and bool({*now.lifecycle.having(Verdict.CANDIDATE)} & {*now.there})

    async def require(self, key: str, version: int) -> None:
        """Raises ``GraphNotFound`` for a version that nobody knows."""
        known = self.index.get(key) is not None or version in (await self.standing(key)).there
        if not known or version < 1:
            raise GraphNotFound(f"no graph {key[:64]!r}, version {version}")

    async def _take_over(self, record: GraphRecord) -> None:
        """Write down a decision that came through the index, and act upon it."""
        now = await self.standing(record.key)
        if now.there:
            await asyncio.to_thread(self.persist, record.key, record.lifecycle)
        # what serves may lie in another worker's store: then it is not ours to say
        ours = record.version in now.there or not record.version
        if now.there and ours and now.serving != record.version:
            await self.refresh(record.key)

    async def record(self, key: str) -> GraphRecord | None:
        """The record of the version that serves, its files checked; damaged ones are put
        aside."""
        while number := (now := await self.standing(key)).serving:
            lifecycle = now.lifecycle
            record = self.index.get(key)
            if record and record.version == number:
                same = record.lifecycle == lifecycle
                return record if same else changed(record, lifecycle=lifecycle)
            try:
                artifact = await asyncio.to_thread(self.open, key, number)
            except GraphNotFound:  # removed meanwhile
                return None
            except ArtifactRejected as error:
                log.error("artifact put aside", key=key, version=number, reason=str(error))
                await asyncio.to_thread(self.store.quarantine, key, number, str(error))
                continue
            if not artifact.manifest.verified and number not in lifecycle.marks:
                await asyncio.to_thread(self.nominate, key, number, known=True)
                continue
            aside = await asyncio.to_thread(self.store.put_aside, key)
            found = published_record(artifact.manifest, record, lifecycle)
            return changed(found, aside=aside, signer=artifact.signature.signer)
        return None

    async def barred(self, key: str) -> GraphRecord | None:
        """The record of a graph that the index doesn't know, all of whose versions are out of
        service."""
        now = await self.standing(key)
        lifecycle = now.lifecycle
        if not lifecycle.marks or not now.there:
            return None
        try:
            artifact = await asyncio.to_thread(self.open, key, now.there[-1])
        except (GraphNotFound, ArtifactRejected):
            return None
        return barred_record(published_record(artifact.manifest, None, lifecycle), lifecycle)

    def open(self, key: str, version: int) -> StoredArtifact:
        """An artifact whose digest, and signature if its signer is known here, are right.

        Raises ``GraphNotFound`` or ``ArtifactRejected``.
        """
        artifact = self.store.open(key, version)
        self._verify(artifact.manifest_bytes, artifact.signature)
        return artifact

    def check(self, key: str, version: int) -> None:
        """The same for what the store itself has, whatever copies there are."""
        self._verify(*self.store.read_back(key, version))

    def _verify(self, manifest: bytes, signature: Signature) -> None:
        # another compile worker's key may be unknown here; whoever fetches decides whom to trust
        if signature.signer in self.trusted.keys:
            self.trusted.verify(manifest, signature)

    def _noted(self, key: str) -> Lifecycle:
        try:
            return _decoded(key, self.store.read_note(key))
        except (ArtifactRejected, OSError) as error:
            log.error("note on versions can't be read", key=key, reason=str(error))
            return Lifecycle()


def _decoded(key: str, note: bytes | None) -> Lifecycle:
    """A damaged note counts as none: what it said comes back out of the index, if that knows."""
    try:
        return decode_lifecycle(note) if note is not None else Lifecycle()
    except msgspec.DecodeError as error:
        log.error("note on versions can't be read", key=key, reason=str(error))
        return Lifecycle()
