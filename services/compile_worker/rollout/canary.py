"""Promotes a new version, or rolls it back, by what one decode worker finds when it tries it.

A recompiled version is a candidate: nobody but the chosen worker is told of it or gets it. The
worker reports to whichever compile worker it talks to; reports and the choice travel in the graph's
record, so that any compile worker can go on after another one's death. Decisions are marks that
merge (``versions.py``): several compile workers may look after the same candidate.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from precast.errors import (
    GraphNotFound,
    InvalidRequest,
    PrecastError,
    RegistryUnavailable,
)
from precast.fleet.leases import DecodeLease, Registry, version_of
from precast.graphs.artifacts.versions import Verdict
from precast.graphs.capture.verify.tolerances import bound_of
from precast.graphs.key import explain
from precast.graphs.targets import runs
from precast.log import get_logger
from precast.system.backoff import Backoff
from services.compile_worker.catalog.entry import GraphRecord, Trial, changed
from services.compile_worker.catalog.versions import Versions

log = get_logger(__name__)

_PACE: Final = Backoff(first_s=0.2, max_s=5.0)
"""Between two looks at a candidate whose record doesn't change."""
UNVERIFIED_STEPS: Final = 32
"""Of the trial of a graph that the compile worker couldn't run, where others have none."""
NO_WORKER_S: Final = 3.5
"""How long no worker may be seen before a candidate is promoted untried: longer than a lease, for
leases are gone for a moment when Redis comes back empty."""
ANSWER_S: Final = 30.0
"""What a worker has beyond the time for live steps before another one is chosen."""


@dataclass(frozen=True, kw_only=True)
class CanaryPolicy:
    """How a candidate is tried."""

    steps: int
    """Steps to compare; 0: candidates that were verified are promoted untried."""
    live_s: float
    """Seconds in which they should be live steps; what is missing then is made up."""
    max_slowdown: float
    """Most that it may be slower than the serving version: 0.25 is a quarter."""

    @property
    def trial_steps(self) -> int:
        """Of a trial that takes place."""
        return self.steps or UNVERIFIED_STEPS


def _differs_in_isa(a: GraphRecord, b: GraphRecord) -> bool:
    return a.factors.keys() == b.factors.keys() and explain(a.factors, b.factors).keys() == {"isa"}


def bound(record: GraphRecord) -> float:
    """Largest difference of two graphs that each agree with eager; 0: they give the same bits."""
    return 2 * bound_of(record.factors)


def objection(record: GraphRecord, trial: Trial, policy: CanaryPolicy) -> str:
    """Why a finished trial speaks against the candidate; "" if it doesn't."""
    against = f"version {record.version}"
    if trial.failure:
        return f"canary failed on {trial.worker_id}: {trial.failure}"
    if not trial.difference <= bound(record):
        return (
            f"differs from {against} by {trial.difference:.1e} of the largest logit, more than "
            f"{bound(record):.0e}"
        )
    if trial.time_ratio > 1 + policy.max_slowdown:
        return (
            f"takes {trial.time_ratio:.2f} times as long as {against}, more than "
            f"{1 + policy.max_slowdown:.2f}"
        )
    return ""


@dataclass(kw_only=True)
class _Watch:
    """What this process has seen of a candidate."""

    since: float
    tried: set[str] = field(default_factory=set)
    """Workers that did not finish in time."""
    unseen_since: float | None = None
    """Since when no worker runs the graph."""


@dataclass(frozen=True, kw_only=True)
class Agenda:
    """When to look at which candidate."""

    clock: Callable[[], float]
    _looks: dict[str, int] = field(default_factory=dict)
    """Since the record has changed."""
    _due: dict[str, float] = field(default_factory=dict)

    def renew(self, record: GraphRecord) -> None:
        """A record is new or has changed."""
        if waits(record):
            self._looks[record.key] = 0
            self._due[record.key] = self.clock()

    def due(self) -> list[str]:
        now = self.clock()
        return [key for key, at in self._due.items() if at <= now]

    def looked(self, record: GraphRecord | None, key: str) -> None:
        if record is None or not waits(record):
            self._looks.pop(key, None)
            self._due.pop(key, None)
            return
        self._looks[key] = self._looks.get(key, 0) + 1
        self._due[key] = self.clock() + _PACE.wait_s(self._looks[key])

    def wait_s(self) -> float | None:
        """Until the next look; None: for a change."""
        if not self._due:
            return None
        return max(min(self._due.values()) - self.clock(), 0.0)


def waits(record: GraphRecord) -> bool:
    """Whether a candidate of the graph may be promoted, now or later."""
    return not record.lifecycle.pin.version and bool(record.lifecycle.having(Verdict.CANDIDATE))


@dataclass(frozen=True, kw_only=True)
class Canaries:
    versions: Versions
    registry: Registry
    policy: CanaryPolicy
    clock: Callable[[], float] = time.monotonic
    _verified: dict[tuple[str, int], bool] = field(default_factory=dict)
    _watches: dict[tuple[str, int, str], _Watch] = field(default_factory=dict)
    """By key, version and worker."""

    async def run(self) -> None:
        """Look after candidates until cancelled.

        A graph without one costs nothing. One that waits is looked at ever more rarely, until its
        record changes: each look reads the store.
        """
        with self.versions.index.changes.subscribe() as changes:
            agenda = Agenda(clock=self.clock)
            for record in self.versions.index.records():
                agenda.renew(record)
            while True:
                for key in agenda.due():
                    await self._look_after(key)
                    agenda.looked(self.versions.index.get(key), key)
                with suppress(TimeoutError):
                    async with asyncio.timeout(agenda.wait_s()):
                        agenda.renew(await changes.next())

    async def _look_after(self, key: str) -> None:
        record = self.versions.index.get(key)
        try:
            candidates = await self._candidates(record) if record else []
            if record and candidates:
                await self._tend(record, candidates)
        except (PrecastError, OSError) as error:
            log.warning("canary not looked after", key=key, reason=str(error))

    async def report(self, key: str, trial: Trial) -> None:
        """A worker's result so far. Raises ``GraphNotFound`` or ``InvalidRequest``."""
        record = self.versions.index.get(key)
        if record is None:
            raise GraphNotFound(f"no graph {key[:64]!r}")
        known = record.trial
        if known is None or (known.version, known.worker_id) != (
            trial.version,
            trial.worker_id,
        ):
            raise InvalidRequest(f"{trial.worker_id[:128]} was not chosen to try graph {key}")
        await self.versions.index.put(changed(record, trial=trial))

    async def _candidates(self, record: GraphRecord) -> list[int]:
        """Those in our store, ascending; none while the graph is pinned."""
        if not waits(record):
            return []
        marked = record.lifecycle.having(Verdict.CANDIDATE)
        there = (await self.versions.standing(record.key)).there
        return [version for version in marked if version in there]

    async def _tend(self, record: GraphRecord, candidates: list[int]) -> None:
        *older, candidate = candidates
        for version in older:
            await self._mark(record.key, version, Verdict.WITHDRAWN, "a newer one was captured")
        serving = (await self.versions.standing(record.key)).serving
        verified = await self._is_verified(record.key, candidate)
        if verified and (not self.policy.steps or not serving):
            await self._promote(
                record.key, candidate, "verified; there was nothing to try it against"
            )
            return
        try:
            leases = await self.registry.decode_workers()
        except RegistryUnavailable:
            return
        trial = record.trial
        if trial is not None and trial.version == candidate and trial.finished:
            await self._decide(record, trial)
        else:
            await self._choose(record, candidate, self._able(record, leases, verified), verified)

    async def _decide(self, record: GraphRecord, trial: Trial) -> None:
        reason = objection(record, trial, self.policy)
        if reason:
            await self.versions.quarantine(record.key, trial.version, reason)
        else:
            told = f"agreed with version {record.version} in {trial.steps} steps"
            await self._promote(record.key, trial.version, told)

    async def _is_verified(self, key: str, version: int) -> bool:
        """Whether a compile worker has compared a candidate with eager."""
        known = self._verified.get((key, version))
        if known is None:
            manifest = await asyncio.to_thread(self.versions.manifest, key, version)
            known = self._verified[key, version] = manifest is None or manifest.verified
        return known

    def _able(
        self, record: GraphRecord, leases: list[DecodeLease], verified: bool
    ) -> list[DecodeLease]:
        """Workers that have something to compare a candidate with: another version, or, of a
        graph that only their CPU runs, one for a lesser instruction set."""
        running = [lease for lease in leases if version_of(lease, record.key) is not None]
        if running or verified:
            return running
        keys = [r.key for r in self.versions.index.records() if _differs_in_isa(record, r)]
        return [
            lease
            for lease in leases
            if runs(lease.isa, record.factors["isa"])
            and any(version_of(lease, key) is not None for key in keys)
        ]

    async def _choose(
        self, record: GraphRecord, candidate: int, running: list[DecodeLease], verified: bool
    ) -> None:
        """Keep the chosen worker while it lives and has time left, else choose another one."""
        key, now = record.key, self.clock()
        watch = self._watches.setdefault((key, candidate, ""), _Watch(since=now))
        trial = record.trial
        if trial is not None and trial.version == candidate:
            alive = any(lease.worker_id == trial.worker_id for lease in running)
            mine = self._watches.setdefault((key, candidate, trial.worker_id), _Watch(since=now))
            late = now - mine.since > self.policy.live_s + ANSWER_S
            if alive and not late:
                return
            watch.tried |= {trial.worker_id} if late else set()
        ready = [lease for lease in running if lease.worker_id not in watch.tried]
        ready = [lease for lease in ready if lease.state == "ready"]
        if ready:
            watch.unseen_since = None
            await self._assign(record, candidate, min(ready, key=_preference))
        elif running and watch.tried:
            reason = f"{len(watch.tried)} workers did not finish its canary in time"
            await self.versions.quarantine(key, candidate, reason)
        elif not running and verified:
            watch.unseen_since = watch.unseen_since or now
            if now - watch.unseen_since > NO_WORKER_S:
                await self._promote(key, candidate, "verified; no worker was there to try it")

    async def _assign(self, record: GraphRecord, candidate: int, lease: DecodeLease) -> None:
        log.info("canary begins", key=record.key, version=candidate, worker=lease.worker_id)
        trial = Trial(version=candidate, worker_id=lease.worker_id, wanted=self.policy.trial_steps)
        await self.versions.index.put(changed(record, trial=trial))

    async def _promote(self, key: str, version: int, reason: str) -> None:
        log.info("version promoted", key=key, version=version, reason=reason)
        await self._mark(key, version, Verdict.GOOD, reason)

    async def _mark(self, key: str, version: int, verdict: Verdict, reason: str) -> None:
        lifecycle = (await self.versions.standing(key)).lifecycle
        await self.versions.decide(key, lifecycle.marked(version, verdict, reason))
        for watched in [watched for watched in self._watches if watched[:2] == (key, version)]:
            del self._watches[watched]


def _preference(lease: DecodeLease) -> tuple[bool, str]:
    """A worker with requests first, for it has live steps; then any order that all agree on."""
    return lease.running == 0, lease.worker_id
