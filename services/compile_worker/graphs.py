"""What a compile worker does with graphs, whatever the protocol: request, publish, fetch, select.

The store on disk is the authority on what is published; the index is what is told about it.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from precast.errors import (
    ArtifactRejected,
    GraphNotFound,
    InvalidRequest,
    Overloaded,
    RegistryUnavailable,
)
from precast.fleet.queue.job import Job, Stage, new_job
from precast.fleet.queue.queue import LAPSED, CaptureQueue
from precast.graphs.artifacts.manifest import Manifest, encode_manifest, file_digest
from precast.graphs.artifacts.signing import Signer
from precast.graphs.artifacts.store import ArtifactStore, StoredArtifact, VersionExists
from precast.graphs.artifacts.versions import Verdict
from precast.graphs.key import graph_key, parse_spec, spec_part
from precast.log import get_logger
from precast.system.backoff import Backoff
from services.compile_worker.catalog.entry import MAX_FAILURES, NEVER_S, GraphRecord, Phase, changed
from services.compile_worker.catalog.gc_policy import surplus
from services.compile_worker.catalog.index import GraphIndex
from services.compile_worker.catalog.versions import Versions
from services.compile_worker.failures import Failure
from services.compile_worker.sandbox.capture import CaptureReport

log = get_logger(__name__)

BACKOFF: Final = Backoff(first_s=15.0)
"""Wait after the first failure of a capture; each further one doubles it."""
CANCEL_HOLD_S: Final = 600.0
DISK_WAIT_S: Final = 30.0
"""Until a capture is tried again that could not write."""
LOOKED_UP_AT_ONCE: Final = 8
ENDING_POLLS: Final = 20
ENDING_POLL_S: Final = 0.1
MAX_MODEL_LABEL: Final = 128


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """The parts that have to do with graphs, and what to do with them."""

    store: ArtifactStore
    index: GraphIndex
    queue: CaptureQueue
    versions: Versions
    signing: Callable[[], Signer]
    """The key that signs now: it may be replaced at any time."""
    build: Mapping[str, str]
    """This worker's build factors."""
    isa_targets: tuple[str, ...] = ()
    """Instruction sets that it builds for; empty: any."""
    backoff: Backoff = BACKOFF
    canary: bool = False
    """Whether a further version has to pass a canary before it serves."""
    published: asyncio.Event = field(default_factory=asyncio.Event)
    """Set after each publication."""

    @property
    def _targets(self) -> str:
        return ", ".join(self.isa_targets)

    async def restore(self) -> None:
        """Fill the index from the store; damaged artifacts are put aside."""
        keys = await asyncio.to_thread(self.store.published_keys)
        for key, found in zip(keys, await self._looked_up(keys), strict=True):
            record = found or await self.versions.barred(key)
            if record:
                self.index.restore(record)

    async def request(
        self,
        specs: Iterable[Mapping[str, str]],
        model: str = "",
        urgencies: Sequence[int] = (),
    ) -> list[GraphRecord]:
        """Make sure that each graph is published or queued, smallest batch first.

        ``urgencies``: for each spec, how often it was missed; those are captured first.
        Returns their states in the order of the request. All factors are checked before anything
        is queued. Raises ``UnsupportedSpec``, ``InvalidRequest`` or ``Overloaded``.
        """
        if len(model) > MAX_MODEL_LABEL:
            raise InvalidRequest(f"model label is longer than {MAX_MODEL_LABEL} characters")
        wanted = [self._check(factors) for factors in specs]
        order = sorted(range(len(wanted)), key=lambda i: int(wanted[i]["num_tokens"]))
        known = await self._looked_up([graph_key(spec, self.build) for spec in wanted])
        urgency = dict(enumerate(urgencies))
        states = {
            i: await self._request(wanted[i], known[i], model, urgency.get(i, 0)) for i in order
        }
        return [states[i] for i in range(len(wanted))]

    def keys(self, specs: Iterable[Mapping[str, str]]) -> list[str]:
        """The keys of graphs that this worker would make. Raises ``UnsupportedSpec``."""
        return [graph_key(self._check(factors), self.build) for factors in specs]

    async def known(self, key: str) -> GraphRecord | None:
        """What there is to tell of a graph."""
        return (
            await self.versions.record(key)
            or self.index.get(key)
            or await self.versions.barred(key)
        )

    async def recapture(self, record: GraphRecord) -> Job:
        """Queue a further version of a known graph, whatever became of the ones before.

        A capture that is under way already counts, unless it is just ending.
        """
        for _ in range(ENDING_POLLS):
            job = await self._enqueue(record, await self._next_version(record.key), kept=True)
            ending = job.version <= await self.last_version(record.key)
            if not ending and (record.phase is not Phase.FAILED or not job.started_at):
                break
            await asyncio.sleep(ENDING_POLL_S)
        if record.phase is Phase.FAILED:
            await self.index.put(changed(record, phase=Phase.QUEUED, failures=0, retry_at=0.0))
        return job

    async def fetch(self, key: str, version: int, worker_id: str) -> StoredArtifact:
        """An artifact with its digest and signature checked; a candidate for its canary alone.

        A damaged one is put aside and queued for capture again. Raises ``GraphNotFound``, or
        ``ArtifactRejected`` for the damaged one.
        """
        now = await self.versions.standing(key)
        number = version or now.serving
        lifecycle = now.lifecycle
        if not number:
            raise GraphNotFound(f"no artifact of graph {key} serves")
        if lifecycle.verdict(number) is Verdict.QUARANTINED:
            raise GraphNotFound(
                f"version {number} of graph {key} is quarantined: {lifecycle.reason(number)}"
            )
        trial = record.trial if (record := self.index.get(key)) else None
        chosen = trial is not None and (trial.version, trial.worker_id) == (number, worker_id)
        if lifecycle.verdict(number) is Verdict.CANDIDATE and not chosen:
            raise GraphNotFound(f"version {number} of graph {key} is not promoted yet")
        try:
            artifact = await asyncio.to_thread(self.versions.open, key, number)
            await asyncio.to_thread(self.store.touch, key, number)
            return artifact
        except ArtifactRejected as error:
            await self.put_aside(key, number, str(error))
            raise ArtifactRejected(f"{error}; it was put aside, ask for the graph again") from None

    async def capturing(self, job: Job) -> None:
        """A capture has begun."""
        record = self._record(job)
        if record.phase is not Phase.PUBLISHED:
            await self.index.put(changed(record, phase=Phase.CAPTURING))

    async def failed(self, job: Job, error: str, failure: Failure | None = None) -> None:
        """A capture has failed; what was published before stays in service."""
        record = changed(self._record(job), failure=failure)
        failures = record.failures + 1
        wait = self.backoff.wait_s(failures) if failures < MAX_FAILURES else NEVER_S
        await self._unsuccessful(record, error, failures, wait)

    async def postponed(self, job: Job, error: str) -> None:
        """A capture could not write: that is not the graph's fault, so it is tried for ever."""
        record = self._record(job)
        await self._unsuccessful(record, error, record.failures, DISK_WAIT_S)

    async def cancelled(self, job: Job) -> None:
        """A capture was cancelled: for a while it is not begun again because a worker misses it."""
        record = self._record(job)
        await self._unsuccessful(record, "capture was cancelled", record.failures, CANCEL_HOLD_S)

    async def lapsed(self, job: Job) -> None:
        """Nobody wants a capture any more; whoever asks next has it queued again."""
        log.info("capture lapsed", key=job.key, num_tokens=job.num_tokens)
        record = self._record(job)
        await self._unsuccessful(record, LAPSED, record.failures, 0.0)

    async def publish(self, job: Job, report: CaptureReport, graph: Path) -> None:
        """Sign and publish what a capture made. If another process was first, its artifact
        stays."""
        await asyncio.to_thread(self._publish, job, report, graph)
        await self.versions.refresh(job.key)
        self.published.set()

    async def last_version(self, key: str) -> int:
        """The highest number that the store has used; 0: none."""
        return await asyncio.to_thread(self.store.last_version, key)

    async def put_aside(self, key: str, version: int, reason: str) -> None:
        """Take a damaged artifact out of service. Unless a newer one serves, the graph is queued
        for capture again."""
        log.error("artifact put aside", key=key, version=version, reason=reason)
        superseded = version < (await self.versions.standing(key)).serving
        await asyncio.to_thread(self.store.quarantine, key, version, reason)
        record = await self.versions.record(key) or self.index.get(key)
        if record is None:
            return
        record = changed(record, aside={**record.aside, version: reason})
        await self.index.put(record)
        if not superseded and self.buildable(record):
            await self._replace(record, version)

    async def _replace(self, record: GraphRecord, version: int) -> None:
        """Capture a graph again whose version was put aside."""
        try:
            await self.recapture(record)
        except (RegistryUnavailable, Overloaded) as error:
            log.warning("not queued for capture again", key=record.key, reason=str(error))
            return
        now = self.index.get(record.key)
        if now and now.version == version:  # else it has been captured already
            await self.index.put(changed(now, phase=Phase.QUEUED, version=0))

    async def remove(self, key: str, version: int, reason: str) -> None:
        """Delete an artifact to make room; its number stays used."""
        log.info("artifact removed", key=key, version=version, reason=reason)
        now = await self.versions.standing(key)
        if version == now.serving:
            noted = now.lifecycle.marked(version, Verdict.GOOD, "was removed to make room")
            await asyncio.to_thread(self.versions.persist, key, noted)
        await asyncio.to_thread(self.store.remove, key, version)
        record = self.index.get(key)
        if record and record.version == version == now.serving:
            await self.index.put(changed(record, phase=Phase.REMOVED, version=0))

    def buildable(self, record: GraphRecord) -> bool:
        """Whether this worker's tool chain is the one that the key was made for."""
        return graph_key(spec_part(record.factors), self.build) == record.key

    def _check(self, factors: Mapping[str, str]) -> dict[str, str]:
        parse_spec(factors)
        return dict(factors)

    async def _looked_up(self, keys: Sequence[str]) -> list[GraphRecord | None]:
        """The records of what serves, several at once: a bucket may be far away."""
        some = asyncio.Semaphore(LOOKED_UP_AT_ONCE)

        async def look_up(key: str) -> GraphRecord | None:
            async with some:
                return await self.versions.record(key)

        return list(await asyncio.gather(*map(look_up, keys)))

    async def _request(
        self, spec: dict[str, str], known: GraphRecord | None, model: str, urgency: int
    ) -> GraphRecord:
        key = graph_key(spec, self.build)
        # Before it is known that nothing is published: a capture that ends meanwhile is of this
        # number, and a job for it ends at once. One for the number after would make a second.
        version = 0 if known else await self._next_version(key)
        known = known or await self.versions.record(key)  # it may have been published since
        if known:
            await self.index.put(known.with_model(model))
            return known.with_model(model)
        fresh = GraphRecord(key=key, phase=Phase.QUEUED, factors={**spec, **self.build})
        record = self.index.get(key) or await self.versions.barred(key) or fresh
        record = record.with_model(model)
        if record.phase is Phase.FAILED and time.time() < record.retry_at:
            return record
        if await self.versions.untried(key):
            return record
        if self.isa_targets and spec["isa"] not in self.isa_targets:
            return await self._not_built(record)
        return await self._queue_missing(record, version, urgency)

    async def _not_built(self, record: GraphRecord) -> GraphRecord:
        """Another compile worker of the fleet may build for this instruction set."""
        if record.phase in (Phase.QUEUED, Phase.CAPTURING) and self.index.get(record.key):
            return record
        reason = f"{record.factors['isa']}: this compile worker builds for {self._targets}"
        record = changed(record, phase=Phase.FAILED, version=0, error=reason)
        await self.index.put(record)
        return record

    async def _queue_missing(self, record: GraphRecord, version: int, urgency: int) -> GraphRecord:
        try:
            job = await self._enqueue(record, version, urgency)
        except RegistryUnavailable as error:
            reason = f"not queued for capture, ask again: {error}"
            return changed(record, phase=Phase.FAILED, version=0, error=reason)
        phase = Phase.QUEUED if job.stage is Stage.QUEUED else Phase.CAPTURING
        if (record.phase, record.version) != (phase, 0) or not self.index.get(record.key):
            record = changed(record, phase=phase, version=0)
        await self.index.put(record)
        return record

    async def _next_version(self, key: str) -> int:
        """One above all that are in the store, or that something is known of."""
        marks = {*(await self.versions.standing(key)).lifecycle.marks}
        if record := self.index.get(key):
            marks |= {*record.lifecycle.marks, record.version}
        return max(await self.last_version(key), *marks, 0) + 1

    async def _enqueue(
        self, record: GraphRecord, version: int, urgency: int = 0, *, kept: bool = False
    ) -> Job:
        job = new_job(
            record.key,
            record.factors,
            num_tokens=int(record.factors["num_tokens"]),
            version=version,
            models=record.models,
        )
        return await self.queue.enqueue(job, urgency=urgency, kept=kept)

    async def _unsuccessful(
        self, record: GraphRecord, error: str, failures: int, wait_s: float
    ) -> None:
        phase = Phase.PUBLISHED if record.version else Phase.FAILED
        retry_at = time.time() + wait_s
        await self.index.put(
            changed(record, phase=phase, error=error, failures=failures, retry_at=retry_at)
        )

    def _record(self, job: Job) -> GraphRecord:
        fresh = GraphRecord(key=job.key, phase=Phase.QUEUED, factors=job.factors, models=job.models)
        return self.index.get(job.key) or fresh

    def _publish(self, job: Job, report: CaptureReport, graph: Path) -> None:
        manifest = encode_manifest(
            Manifest(
                key=job.key,
                version=job.version,
                factors=job.factors,
                models=job.models,
                size=graph.stat().st_size,
                digest=file_digest(graph),
                created_at=time.time(),
                max_relative_error=report.max_relative_error,
                capture_s=report.capture_s,
                layer_us=report.layer_us,
                compiler=self.build.get("compiler", ""),
                verified=report.verified,
            )
        )
        tried = self.canary and self.versions.look(job.key).serving
        if tried or not report.verified:
            self.versions.nominate(job.key, job.version)
        try:
            self.store.publish(manifest, self.signing().sign(manifest), graph)
        except VersionExists:
            log.warning("published by another process first", key=job.key)
        else:
            log.info("graph published", key=job.key, version=job.version)
        for number in surplus(self.versions.look(job.key)):
            self.store.remove(job.key, number)
