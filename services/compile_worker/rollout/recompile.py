"""Recompiling graphs by hand, from the request through the canary to the workers that take up the
result."""

import asyncio
import enum
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from precast.errors import (
    DeadlineExceeded,
    GraphNotFound,
    InvalidRequest,
    JobNotFound,
    RegistryUnavailable,
    UnsupportedSpec,
)
from precast.fleet.leases import DecodeLease, Registry, version_of
from precast.fleet.queue.job import Job, Stage
from precast.fleet.queue.queue import CaptureQueue
from precast.graphs.artifacts.versions import Verdict
from precast.log import get_logger
from services.compile_worker.catalog.entry import GraphRecord, Trial
from services.compile_worker.graphs import Graphs

log = get_logger(__name__)

POLL_S: Final = 0.2
DEFAULT_ADOPTION_S: Final = 60.0
MAX_ADOPTION_S: Final = 3600.0
_ON_THE_WAY: Final = (
    Stage.QUEUED,
    Stage.CAPTURING,
    Stage.CAPTURED,
    Stage.VERIFIED,
    Stage.PUBLISHED,
)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which graphs. The filters that are given must all match."""

    keys: Sequence[str] = ()
    model: str = ""
    sizes: Sequence[int] = ()
    everything: bool = False


class After(enum.StrEnum):
    """What comes after a publication."""

    CANARY = "canary"
    ROLLED_BACK = "rolled back"
    ADOPTED = "adopted"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One thing that has happened to a job."""

    job: Job
    stage: Stage | After
    detail: str = ""
    trial: Trial | None = None
    """In stage ``CANARY``."""
    adopted: int = 0
    workers: int = 0


@dataclass(kw_only=True)
class _Followed:
    """A job, and what has been said of it so far."""

    job: Job
    told: list[Stage] = field(default_factory=list)
    published_at: float = 0.0
    """On the monotonic clock."""
    trial: Trial | None = None
    adoption: tuple[int, int] | None = None
    done: bool = False


def select(graphs: Graphs, selection: Selection) -> list[GraphRecord]:
    """The graphs to recompile, smallest batch first.

    Graphs that another tool chain's worker made are left out of a filter's result, and refused
    where they are named. Raises ``InvalidRequest``, ``GraphNotFound`` or ``UnsupportedSpec``.
    """
    named = (selection.keys, selection.model, selection.sizes)
    if not any(named) and not selection.everything:
        raise InvalidRequest("recompile what? Give keys, a model, sizes, or all")
    unknown = [key for key in selection.keys if graphs.index.get(key) is None]
    if unknown:
        raise GraphNotFound(f"no graph {unknown[0][:64]!r}")
    matching = [record for record in graphs.index.records() if _matches(record, selection)]
    records = [record for record in matching if graphs.buildable(record)]
    if matching and (not records or (selection.keys and len(records) < len(matching))):
        raise UnsupportedSpec("captured with another compiler or flags than this worker's")
    if not records:
        raise GraphNotFound("no graph matches")
    return sorted(records, key=lambda record: int(record.factors["num_tokens"]))


def _matches(record: GraphRecord, selection: Selection) -> bool:
    return (
        (not selection.keys or record.key in selection.keys)
        and (not selection.model or selection.model in record.models)
        and (not selection.sizes or int(record.factors["num_tokens"]) in selection.sizes)
    )


async def recompile(
    graphs: Graphs,
    registry: Registry,
    records: Sequence[GraphRecord],
    *,
    adoption_s: float,
    capture_s: float,
) -> AsyncIterator[Progress]:
    """Queue the graphs and report each job's stages, then its adoption by live workers.

    Ends when every job has ended and been adopted by all, or ``adoption_s`` after its publication.
    Raises ``DeadlineExceeded`` if the captures take longer than ``capture_s`` in all.
    """
    followed = [_Followed(job=await graphs.recapture(record)) for record in records]
    end = time.monotonic() + capture_s
    while not all(item.done for item in followed):
        leases = await _leases(registry)
        for item in followed:
            for progress in await _step(item, graphs, leases, adoption_s):
                yield progress
        if time.monotonic() > end and not all(item.job.stage.ended for item in followed):
            raise DeadlineExceeded(f"captures did not end within {capture_s:g} s; they go on")
        await asyncio.sleep(POLL_S)


async def _step(
    item: _Followed, graphs: Graphs, leases: list[DecodeLease] | None, adoption_s: float
) -> list[Progress]:
    """What is new about one job."""
    if item.done:
        return []
    if not item.job.stage.ended:
        await _refresh(item, graphs.queue)
    news = [
        Progress(job=item.job, stage=stage, detail=item.job.detail)
        for stage in _stages_of(item.job)
        if stage not in item.told
    ]
    item.told += [stage for stage in _stages_of(item.job) if stage not in item.told]
    if item.job.stage is Stage.PUBLISHED:
        news += await _after_publication(item, graphs, leases, adoption_s)
    elif item.job.stage.ended:
        item.done = True
    return news


async def _refresh(item: _Followed, queue: CaptureQueue) -> None:
    try:
        item.job = await queue.get(item.job.id)
    except RegistryUnavailable as error:
        log.warning("progress of recompile unknown for now", reason=str(error))
    except JobNotFound:
        # Redis came back empty. The same job again: if it has been published meanwhile, whoever
        # claims it will see that.
        item.job = await queue.enqueue(item.job, kept=True)


def _stages_of(job: Job) -> list[Stage]:
    """Stages may pass faster than they are looked at; each is told once, in order."""
    if job.stage in _ON_THE_WAY:
        return list(_ON_THE_WAY[: _ON_THE_WAY.index(job.stage) + 1])
    begun = [Stage.CAPTURING] if job.started_at else []
    return [Stage.QUEUED, *begun, job.stage]


async def _after_publication(
    item: _Followed, graphs: Graphs, leases: list[DecodeLease] | None, adoption_s: float
) -> list[Progress]:
    """What becomes of a new version: its canary, then adoption or the way back."""
    key, version = item.job.key, item.job.version
    now = await graphs.versions.standing(key)
    lifecycle = now.lifecycle
    verdict, pinned = lifecycle.verdict(version), lifecycle.pin.version
    news = _canary(item, graphs.index.get(key))
    if verdict in (Verdict.QUARANTINED, Verdict.WITHDRAWN):
        item.done = True
        reason = lifecycle.reason(version)
        return [*news, Progress(job=item.job, stage=After.ROLLED_BACK, detail=reason)]
    if pinned and now.serving != version:
        item.done = True
        detail = f"pinned to version {pinned}"
        return [*news, Progress(job=item.job, stage=Stage.PUBLISHED, detail=detail)]
    if verdict is Verdict.CANDIDATE:
        return news
    return [*news, *_adoption(item, leases, adoption_s)]


def _canary(item: _Followed, record: GraphRecord | None) -> list[Progress]:
    """How the canary stands, if that is new."""
    trial = record.trial if record else None
    if trial is None or trial == item.trial or trial.version != item.job.version:
        return []
    item.trial = trial
    return [Progress(job=item.job, stage=After.CANARY, trial=trial)]


def _adoption(
    item: _Followed, leases: list[DecodeLease] | None, adoption_s: float
) -> list[Progress]:
    item.published_at = item.published_at or time.monotonic()
    expired = time.monotonic() - item.published_at > adoption_s
    count = count_adopted(leases, item.job) if leases is not None else item.adoption
    item.done = expired or (count is not None and count[0] == count[1])
    if count is None or (count == item.adoption and not item.done):
        return []
    item.adoption = count
    detail = "not all within the deadline" if count[0] < count[1] and expired else ""
    return [
        Progress(
            job=item.job,
            stage=After.ADOPTED,
            detail=detail,
            adopted=count[0],
            workers=count[1],
        )
    ]


def count_adopted(leases: Sequence[DecodeLease], job: Job) -> tuple[int, int]:
    """(workers that run the job's version or a later one, workers that run its key)."""
    running = [
        version
        for lease in leases
        for version in [version_of(lease, job.key)]
        if version is not None
    ]
    return sum(version >= job.version for version in running), len(running)


async def _leases(registry: Registry) -> list[DecodeLease] | None:
    try:
        return await registry.decode_workers()
    except RegistryUnavailable:
        return None
