"""What a decode worker tells and asks a compile worker about single graphs."""

from typing import Any, Final

import grpc.aio

from precast.errors import InvalidRequest, NotFound
from precast.graphs.artifacts.condemned import Condemned
from precast.log import get_logger
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from precast.rpc.server import error_of
from services.decode_worker.graphs.shadow_trial import Report

log = get_logger(__name__)

RPC_TIMEOUT_S: Final = 10.0


async def report_crash(stub: Any, worker_id: str, crash: Condemned) -> None:
    """Says that an artifact has ended a rank with a signal."""
    request = pb.ReportCrashRequest(worker_id=worker_id, **crash._asdict())
    try:
        await stub.ReportCrash(request, timeout=RPC_TIMEOUT_S)
    except grpc.aio.AioRpcError as failure:
        error = error_of(failure)
        if not isinstance(error, NotFound | InvalidRequest):
            raise
        log.warning("crash not reported", key=crash.key, version=crash.version, reason=str(error))


async def report_trial(stub: Any, worker_id: str, report: Report) -> None:
    """Says how a trial stands."""
    request = pb.ReportCanaryRequest(
        worker_id=worker_id,
        key=report.key,
        version=report.version,
        steps=report.steps,
        max_relative_difference=report.difference,
        time_ratio=report.time_ratio,
        finished=report.finished,
        failure=report.failure,
    )
    try:
        await stub.ReportCanary(request, timeout=RPC_TIMEOUT_S)
    except grpc.aio.AioRpcError as failure:
        if not isinstance(error_of(failure), NotFound | InvalidRequest):
            raise  # else it was decided, or given to another worker, meanwhile


async def explain_missing(stub: Any, state: pb.GraphState) -> None:
    """Logs in which factors the nearest graph differs from a missing one."""
    request = pb.ExplainGraphRequest(key=state.key, limit=1)
    try:
        answer = await stub.ExplainGraph(request, timeout=RPC_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        log.warning("missing graph not explained", key=state.key, reason=str(error_of(error)))
        return
    near = answer.nearest[0] if answer.nearest else pb.NearGraph()
    log.info(
        "graph missing",
        key=state.key,
        num_tokens=int(state.factors["num_tokens"]),
        phase=pb.GraphPhase.Name(state.phase).removeprefix("GRAPH_PHASE_").lower(),
        error=state.error,
        nearest=near.key,
        differs=[f"{d.name}: wanted {d.wanted}, have {d.have}" for d in near.differences],
    )
