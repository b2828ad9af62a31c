"""Between this service's types and those of its protocols."""

import math
from collections.abc import Iterable, Mapping
from typing import Final

from precast.errors import InvalidRequest
from precast.fleet.queue.job import Job, Stage
from precast.graphs.artifacts.manifest import Manifest
from precast.graphs.artifacts.versions import CRASH_SIGNALS, MAX_REASON, Verdict
from precast.graphs.capture.verify.failure import Mismatch
from precast.graphs.key import check_key
from precast.proto.admin.v1 import admin_service_pb2 as admin_pb
from precast.proto.graphs.v1 import graphs_service_pb2 as graphs_pb
from services.compile_worker.catalog.entry import GraphRecord, Phase, Trial
from services.compile_worker.catalog.versions import Version
from services.compile_worker.explain import Explanation
from services.compile_worker.failures import Failure
from services.compile_worker.maintenance.resign import Resigned
from services.compile_worker.maintenance.store import Collected, Damage, Scrubbed
from services.compile_worker.rollout.recompile import After

MAX_KEYS: Final = 4096
"""In one request."""
PHASES: Final = {
    Phase.QUEUED: graphs_pb.GRAPH_PHASE_QUEUED,
    Phase.CAPTURING: graphs_pb.GRAPH_PHASE_CAPTURING,
    Phase.PUBLISHED: graphs_pb.GRAPH_PHASE_PUBLISHED,
    Phase.FAILED: graphs_pb.GRAPH_PHASE_FAILED,
    Phase.REMOVED: graphs_pb.GRAPH_PHASE_REMOVED,
}
STAGES: Final[Mapping[Stage | After, admin_pb.RecompileStage.ValueType]] = {
    Stage.QUEUED: admin_pb.RECOMPILE_STAGE_QUEUED,
    Stage.CAPTURING: admin_pb.RECOMPILE_STAGE_CAPTURING,
    Stage.CAPTURED: admin_pb.RECOMPILE_STAGE_CAPTURED,
    Stage.VERIFIED: admin_pb.RECOMPILE_STAGE_VERIFIED,
    Stage.PUBLISHED: admin_pb.RECOMPILE_STAGE_PUBLISHED,
    Stage.FAILED: admin_pb.RECOMPILE_STAGE_FAILED,
    Stage.CANCELLED: admin_pb.RECOMPILE_STAGE_CANCELLED,
    After.CANARY: admin_pb.RECOMPILE_STAGE_CANARY,
    After.ROLLED_BACK: admin_pb.RECOMPILE_STAGE_ROLLED_BACK,
    After.ADOPTED: admin_pb.RECOMPILE_STAGE_ADOPTED,
}
VERSION_STATES: Final = {
    Verdict.GOOD: admin_pb.VERSION_STATE_PREVIOUS,
    Verdict.CANDIDATE: admin_pb.VERSION_STATE_CANARY,
    Verdict.WITHDRAWN: admin_pb.VERSION_STATE_ROLLED_BACK,
    Verdict.QUARANTINED: admin_pb.VERSION_STATE_QUARANTINED,
}


def graph_state(record: GraphRecord, live_s: float = 0.0) -> graphs_pb.GraphState:
    """``live_s``: how long a canary waits for live steps."""
    return graphs_pb.GraphState(
        key=record.key,
        phase=PHASES[record.phase],
        version=record.version,
        signer=record.signer,
        factors=record.factors,
        models=record.models,
        error=record.error,
        size_bytes=record.size_bytes,
        published_at_s=record.published_at,
        max_relative_error=record.max_relative_error,
        capture_s=record.capture_s,
        layer_us=record.layer_us,
        quarantined=record.lifecycle.having(Verdict.QUARANTINED),
        lifts={v: mark.lifts for v, mark in record.lifecycle.marks.items() if mark.lifts},
        canary=_assignment(record, live_s),
        failed_capture=_failed_capture(record.failure),
        put_aside=[f"version {number}: {why}" for number, why in sorted(record.aside.items())],
    )


def _failed_capture(failure: Failure | None) -> graphs_pb.FailedCapture | None:
    if failure is None:
        return None
    return graphs_pb.FailedCapture(
        host=failure.host,
        folder=failure.folder,
        files=failure.files,
        failed_at_s=failure.at,
        command=failure.command,
        mismatch=_mismatch(failure.mismatch) if failure.mismatch else None,
    )


def _mismatch(found: Mismatch) -> graphs_pb.Mismatch:
    return graphs_pb.Mismatch(
        case=found.case,
        seed=found.seed,
        context_lens=found.context_lens,
        bound=found.bound,
        differences=found.differences,
        output=found.output,
        index=found.index,
        expected=found.expected,
        actual=found.actual,
    )


def _assignment(record: GraphRecord, live_s: float) -> graphs_pb.CanaryAssignment | None:
    trial = record.trial
    if trial is None or record.lifecycle.verdict(trial.version) is not Verdict.CANDIDATE:
        return None
    return graphs_pb.CanaryAssignment(
        worker_id=trial.worker_id,
        version=trial.version,
        steps=trial.wanted,
        live_s=live_s,
    )


def canary_progress(trial: Trial) -> admin_pb.CanaryProgress:
    return admin_pb.CanaryProgress(
        worker_id=trial.worker_id,
        steps_done=trial.steps,
        steps=trial.wanted,
        max_relative_difference=trial.difference,
        time_ratio=trial.time_ratio,
    )


def trial_of(request: graphs_pb.ReportCanaryRequest, wanted: int) -> Trial:
    """Raises ``InvalidRequest`` for measures that are no numbers."""
    numbers = (request.max_relative_difference, request.time_ratio)
    if not all(0 <= number < math.inf for number in numbers):
        raise InvalidRequest(f"canary measures {numbers} are not finite and positive")
    return Trial(
        version=request.version,
        worker_id=request.worker_id,
        wanted=wanted,
        steps=request.steps,
        difference=request.max_relative_difference,
        time_ratio=request.time_ratio,
        finished=request.finished,
        failure=request.failure[:MAX_REASON],
    )


def check_keys(keys: set[str]) -> None:
    """Raises ``InvalidRequest`` for too many, or one that hasn't the form of a key."""
    if len(keys) > MAX_KEYS:
        raise InvalidRequest(f"{len(keys)} keys in one request; {MAX_KEYS} may be")
    for key in keys:
        check_key(key)


def job_message(job: Job) -> admin_pb.Job:
    return admin_pb.Job(
        job_id=job.id,
        key=job.key,
        num_tokens=job.num_tokens,
        stage=STAGES[job.stage],
        detail=job.detail,
        queued_at_s=job.queued_at,
        started_at_s=job.started_at,
        ended_at_s=job.ended_at,
    )


def crash_reason(worker_id: str, signal: str) -> str:
    """Raises ``InvalidRequest`` for a signal that is no crash of native code."""
    if signal not in CRASH_SIGNALS:
        raise InvalidRequest(f"signal {signal[:20]!r} is none of {', '.join(CRASH_SIGNALS)}")
    return f"crashed a rank of {worker_id[:128]} with {signal}"


def version_message(version: Version, manifest: Manifest | None) -> admin_pb.Version:
    """``manifest``: None if the artifact can't be read any more."""
    message = admin_pb.Version(
        version=version.number,
        state=version_state(version),
        pinned=version.pinned,
        reason=version.reason,
    )
    if manifest:
        message.published_at_s = manifest.created_at
        message.size_bytes = manifest.size
        message.max_relative_error = manifest.max_relative_error
        message.layer_us = manifest.layer_us
    return message


def version_state(version: Version) -> admin_pb.VersionState.ValueType:
    if version.serving:
        return admin_pb.VERSION_STATE_SERVING
    if version.held and version.verdict in (Verdict.GOOD, Verdict.CANDIDATE):
        return admin_pb.VERSION_STATE_WAITING
    return VERSION_STATES[version.verdict]


def collected_message(found: Collected, bound: int) -> admin_pb.CollectGarbageResponse:
    return admin_pb.CollectGarbageResponse(
        removed=[
            admin_pb.RemovedArtifact(
                key=removal.holding.key,
                version=removal.holding.version,
                size_bytes=removal.holding.size,
                used_at_s=removal.holding.used_at,
                reason=removal.reason,
            )
            for removal in found.removals
        ],
        bytes_before=found.before,
        bytes_after=found.after,
        bytes_bound=bound,
    )


def scrubbed_message(found: Scrubbed) -> admin_pb.ScrubStoreResponse:
    return admin_pb.ScrubStoreResponse(checked=found.checked, damaged=_damaged(found.damages))


def resigned_message(found: Resigned) -> admin_pb.ResignGraphsResponse:
    return admin_pb.ResignGraphsResponse(
        signer=found.signer,
        signed=found.signed,
        unchanged=found.unchanged,
        refused=_damaged(found.refused),
    )


def _damaged(damages: Iterable[Damage]) -> list[admin_pb.DamagedArtifact]:
    return [
        admin_pb.DamagedArtifact(key=d.key, version=d.version, reason=d.reason) for d in damages
    ]


def explanation(found: Explanation) -> graphs_pb.ExplainGraphResponse:
    return graphs_pb.ExplainGraphResponse(
        key=found.key,
        factors=found.factors,
        state=graph_state(found.record) if found.record else None,
        nearest=[
            graphs_pb.NearGraph(
                key=record.key,
                version=record.version,
                models=record.models,
                differences=[
                    graphs_pb.FactorDifference(name=name, wanted=wanted, have=have)
                    for name, (wanted, have) in differences.items()
                ],
            )
            for record, differences in found.near
        ],
    )
