"""Between this service's types and those of its protocols."""

from typing import Final

from precast.admin.v1 import admin_service_pb2 as admin_pb
from precast.graphs.v1 import graphs_service_pb2 as graphs_pb
from precast.job import Job, Stage
from services.compile_worker.explain import Explanation
from services.compile_worker.record import GraphRecord, Phase

PHASES: Final = {
    Phase.QUEUED: graphs_pb.GRAPH_PHASE_QUEUED,
    Phase.CAPTURING: graphs_pb.GRAPH_PHASE_CAPTURING,
    Phase.PUBLISHED: graphs_pb.GRAPH_PHASE_PUBLISHED,
    Phase.FAILED: graphs_pb.GRAPH_PHASE_FAILED,
}
STAGES: Final = {
    Stage.QUEUED: admin_pb.RECOMPILE_STAGE_QUEUED,
    Stage.CAPTURING: admin_pb.RECOMPILE_STAGE_CAPTURING,
    Stage.CAPTURED: admin_pb.RECOMPILE_STAGE_CAPTURED,
    Stage.VERIFIED: admin_pb.RECOMPILE_STAGE_VERIFIED,
    Stage.PUBLISHED: admin_pb.RECOMPILE_STAGE_PUBLISHED,
    Stage.FAILED: admin_pb.RECOMPILE_STAGE_FAILED,
    Stage.CANCELLED: admin_pb.RECOMPILE_STAGE_CANCELLED,
}


def graph_state(record: GraphRecord) -> graphs_pb.GraphState:
    return graphs_pb.GraphState(
        key=record.key,
        phase=PHASES[record.phase],
        generation=record.generation,
        factors=record.factors,
        models=record.models,
        error=record.error,
        size_bytes=record.size_bytes,
        published_at_s=record.published_at,
        max_relative_error=record.max_relative_error,
        capture_s=record.capture_s,
        step_us=record.step_us,
    )


def job_message(job: Job) -> admin_pb.Job:
    return admin_pb.Job(
        job_id=job.id,
        key=job.key,
        batch_size=job.batch_size,
        stage=STAGES[job.stage],
        detail=job.detail,
        queued_at_s=job.queued_at,
        started_at_s=job.started_at,
        ended_at_s=job.ended_at,
    )


def explanation(found: Explanation) -> graphs_pb.ExplainGraphResponse:
    return graphs_pb.ExplainGraphResponse(
        key=found.key,
        factors=found.factors,
        state=graph_state(found.record) if found.record else None,
        nearest=[
            graphs_pb.NearGraph(
                key=record.key,
                generation=record.generation,
                models=record.models,
                differences=[
                    graphs_pb.FactorDifference(name=name, wanted=wanted, have=have)
                    for name, (wanted, have) in differences.items()
                ],
            )
            for record, differences in found.near
        ],
    )
