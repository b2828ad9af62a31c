"""What a worker did for a request, as spans: in the queue, its prompt, its tokens."""

import time
from typing import Final

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.telemetry import Attributes, Times, Tracer
from services.decode_worker.engine.request import Request

_PHASES: Final = ("queue", "prefill", "decode")


def record_request(tracer: Tracer, request: Request, worker_id: str) -> None:
    """Of a request that has ended. Phases that it didn't come to have no span."""
    now = time.monotonic()
    came = request.came_s or now
    ends = [at or now for at in (request.started_s, request.first_s, 0.0)]
    failed = request.end if isinstance(request.end, pb.GenerationError) else None
    parent = tracer.record(
        "generate",
        Times(began_s=came, ended_s=now),
        parent=request.traceparent,
        attributes=_attributes(request, worker_id),
        error=failed.message if failed is not None else "",
    )
    began = came
    for phase, ended in zip(_PHASES, ends, strict=True):
        tracer.record(phase, Times(began_s=began, ended_s=ended), parent=parent)
        if ended == now:
            return
        began = ended


def _attributes(request: Request, worker_id: str) -> Attributes:
    sequence = request.sequence
    found: dict[str, str | int] = {
        "precast.worker_id": worker_id,
        "precast.request_id": request.trace_id,
        "gen_ai.usage.input_tokens": len(sequence.prompt),
        "gen_ai.usage.output_tokens": request.completion_tokens,
        "precast.cached_tokens": min(sequence.cached, len(sequence.prompt)),
    }
    if isinstance(request.end, pb.GenerationFinished):
        found["precast.finish_reason"] = pb.FinishReason.Name(request.end.reason)
    elif request.end is not None:
        found["error.type"] = pb.ErrorCode.Name(request.end.code)
    return found
