"""What is known of one graph: the row of the index."""

import enum
import time
from typing import Final

import msgspec

from precast.graphs.artifacts.manifest import Manifest
from precast.graphs.artifacts.versions import Lifecycle, Verdict
from services.compile_worker.failures import Failure

MAX_FAILURES: Final = 5
NEVER_S: Final = 1.0e9
"""After this many failures, or a quarantine, only a recompile by hand tries again."""


class Phase(enum.StrEnum):
    QUEUED = "queued"
    CAPTURING = "capturing"
    PUBLISHED = "published"
    """There is a version to fetch, whatever else happens to the graph."""
    FAILED = "failed"
    REMOVED = "removed"
    """To make room, while nobody ran it. Captured again for whoever asks."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate on the worker that was chosen to try it."""

    version: int
    worker_id: str
    wanted: int
    """Steps to compare."""
    steps: int = 0
    """Steps compared so far."""
    difference: float = 0.0
    """Largest difference of logits to the serving version, relative to the largest logit."""
    time_ratio: float = 0.0
    """Candidate's step time to the serving version's; 0: not known yet."""
    finished: bool = False
    failure: str = ""
    """Why the worker gave up, if it did."""


class GraphRecord(msgspec.Struct, frozen=True, kw_only=True):
    """State of a key, as kept in Redis for all compile workers. Times are Unix seconds."""

    key: str
    phase: Phase
    factors: dict[str, str]
    models: tuple[str, ...] = ()
    version: int = 0
    """The one that serves; 0: none."""
    signer: str = ""
    """Whose key has signed it."""
    error: str = ""
    """Why the last capture failed, if it did."""
    failure: Failure | None = None
    """What is left of it."""
    failures: int = 0
    """In a row."""
    retry_at: float = 0.0
    """A failed capture isn't begun again before this time, unless by hand."""
    size_bytes: int = 0
    published_at: float = 0.0
    max_relative_error: float = 0.0
    capture_s: float = 0.0
    layer_us: float = 0.0
    lifecycle: Lifecycle = Lifecycle()
    """What was decided of the versions; merged where two versions of a record meet."""
    trial: Trial | None = None
    """The newest candidate's canary; kept for a look when it has ended."""
    aside: dict[int, str] = {}
    """Versions that were put aside because they were damaged, and the reasons."""
    updated_at: float = 0.0
    """Of two versions of a record the later one counts."""

    def with_model(self, model: str) -> "GraphRecord":
        if not model or model in self.models:
            return self
        models = tuple(sorted((*self.models, model)))
        return changed(self, models=models, lifecycle=self.lifecycle.labelled(model))


def changed(record: GraphRecord, **changes: object) -> GraphRecord:
    """A later version of the record."""
    later = max(time.time(), record.updated_at + 1e-6)
    return msgspec.structs.replace(record, **changes, updated_at=later)


def merge(a: GraphRecord, b: GraphRecord) -> GraphRecord:
    """The later of two versions, with what either knows of the versions."""
    later = max(a, b, key=lambda record: record.updated_at)
    lifecycle = a.lifecycle.merged(b.lifecycle)
    return msgspec.structs.replace(later, lifecycle=lifecycle)


def published_record(
    manifest: Manifest, previous: GraphRecord | None, lifecycle: Lifecycle
) -> GraphRecord:
    """The record of the artifact that serves; labels add up, failures are forgotten."""
    models = {*manifest.models, *lifecycle.models, *(previous.models if previous else ())}
    base = previous or GraphRecord(key=manifest.key, phase=Phase.PUBLISHED, factors={})
    return changed(
        base,
        phase=Phase.PUBLISHED,
        factors=manifest.factors,
        models=tuple(sorted(models)),
        version=manifest.version,
        error="",
        failure=None,
        failures=0,
        retry_at=0.0,
        size_bytes=manifest.size,
        published_at=manifest.created_at,
        max_relative_error=manifest.max_relative_error,
        capture_s=manifest.capture_s,
        layer_us=manifest.layer_us,
        lifecycle=lifecycle,
    )


def barred_record(record: GraphRecord, lifecycle: Lifecycle) -> GraphRecord:
    """The record of a graph of which no version may serve: a recompile by hand ends that, or a
    worker that can try what this compile worker's CPU can't run."""
    quarantined = lifecycle.having(Verdict.QUARANTINED)
    newest = max(quarantined, default=0)
    waiting = max(lifecycle.having(Verdict.CANDIDATE), default=0)
    if waiting > newest:
        error = f"version {waiting} waits for a worker of {record.factors['isa']} to try it"
        return changed(record, phase=Phase.CAPTURING, version=0, error=error, lifecycle=lifecycle)
    if not newest:
        return changed(record, lifecycle=lifecycle)
    return changed(
        record,
        phase=Phase.FAILED,
        version=0,
        error=f"version {newest} is quarantined: {lifecycle.reason(newest)}",
        failures=MAX_FAILURES,
        retry_at=time.time() + NEVER_S,
        lifecycle=lifecycle,
    )
