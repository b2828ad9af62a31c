"""gRPC servicers: convert, call, convert back."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from precast.errors import ArtifactRejected, GraphNotFound, InvalidRequest
from precast.fleet.queue.asks import Asks
from precast.graphs.artifacts.store import StoredArtifact
from precast.graphs.key import check_key
from precast.proto.admin.v1 import admin_service_pb2 as admin_pb
from precast.proto.admin.v1 import admin_service_pb2_grpc as admin_grpc
from precast.proto.graphs.v1 import graphs_service_pb2 as graphs_pb
from precast.proto.graphs.v1 import graphs_service_pb2_grpc as graphs_grpc
from precast.rpc.server import Service
from services.compile_worker.admin_server import AdminServicer
from services.compile_worker.admission import Admission
from services.compile_worker.catalog.entry import GraphRecord
from services.compile_worker.convert import (
    check_keys,
    crash_reason,
    explanation,
    graph_state,
    trial_of,
)
from services.compile_worker.explain import explain_factors, explain_key
from services.compile_worker.graphs import Graphs
from services.compile_worker.handouts import Handouts
from services.compile_worker.maintenance.store import Upkeep
from services.compile_worker.metrics import Metrics
from services.compile_worker.rollout.canary import Canaries

CHUNK_BYTES: Final = 256 << 10
MAX_SPECS: Final = 1024


class GraphsServicer(graphs_grpc.GraphsServiceServicer):
    """``precast.graphs.v1.GraphsService``."""

    def __init__(self, graphs: Graphs, canaries: Canaries, metrics: Metrics) -> None:
        self._graphs = graphs
        self._canaries = canaries
        self._handouts = Handouts(registry=canaries.registry)
        self._admission = Admission(graphs=graphs, asks=Asks(registry=canaries.registry))
        self._metrics = metrics

    async def RequestGraphs(
        self, request: graphs_pb.RequestGraphsRequest, context: Any
    ) -> graphs_pb.RequestGraphsResponse:
        if len(request.specs) > MAX_SPECS:
            raise InvalidRequest(f"{len(request.specs)} specs in one request; {MAX_SPECS} may be")
        specs = [dict(spec.factors) for spec in request.specs]
        urgencies = [spec.urgency for spec in request.specs]
        records = await self._admission.request(request.worker_id, specs, request.model, urgencies)
        return graphs_pb.RequestGraphsResponse(states=map(self._state, records))

    async def FetchGraph(
        self, request: graphs_pb.FetchGraphRequest, context: Any
    ) -> AsyncIterator[graphs_pb.FetchGraphResponse]:
        check_key(request.key)
        try:
            artifact = await self._graphs.fetch(request.key, request.version, request.worker_id)
        except ArtifactRejected:
            self._metrics.fetches.labels("rejected").inc()
            raise
        await self._handouts.note(request.worker_id, request.key, artifact.manifest.version)
        with artifact.graph_path.open("rb") as file:  # held open: it may be pruned meanwhile
            yield graphs_pb.FetchGraphResponse(header=_header(artifact))
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                yield graphs_pb.FetchGraphResponse(chunk=chunk)
        self._metrics.fetches.labels("sent").inc()

    async def WatchGraphs(
        self, request: graphs_pb.WatchGraphsRequest, context: Any
    ) -> AsyncIterator[graphs_pb.WatchGraphsResponse]:
        wanted = set(request.keys)
        check_keys(wanted)
        with self._graphs.index.changes.subscribe() as changes:
            for key in sorted(wanted):
                if self._graphs.index.get(key) is None:
                    raise GraphNotFound(f"no graph {key}")
            for record in self._graphs.index.records():
                if not wanted or record.key in wanted:
                    yield graphs_pb.WatchGraphsResponse(state=self._state(record))
            while True:
                record = await changes.next()
                if not wanted or record.key in wanted:
                    yield graphs_pb.WatchGraphsResponse(state=self._state(record))

    async def ListGraphs(
        self, request: graphs_pb.ListGraphsRequest, context: Any
    ) -> graphs_pb.ListGraphsResponse:
        matching = [
            record
            for record in self._graphs.index.records()
            if request.model in ("", *record.models)
            and request.num_tokens in (0, int(record.factors["num_tokens"]))
        ]
        return graphs_pb.ListGraphsResponse(graphs=map(self._state, matching))

    async def ExplainGraph(
        self, request: graphs_pb.ExplainGraphRequest, context: Any
    ) -> graphs_pb.ExplainGraphResponse:
        if request.WhichOneof("wanted") == "key":
            check_key(request.key)
            return explanation(explain_key(self._graphs, request.key, request.limit))
        factors = dict(request.spec.factors)
        return explanation(explain_factors(self._graphs, factors, request.limit))

    async def ReportCrash(
        self, request: graphs_pb.ReportCrashRequest, context: Any
    ) -> graphs_pb.ReportCrashResponse:
        check_key(request.key)
        reason = crash_reason(request.worker_id, request.signal)
        await self._graphs.versions.require(request.key, request.version)
        await self._handouts.check(request.worker_id, request.key, request.version)
        await self._graphs.versions.quarantine(
            request.key, request.version, reason, lifts=request.lifts
        )
        return graphs_pb.ReportCrashResponse()

    async def ReportCanary(
        self, request: graphs_pb.ReportCanaryRequest, context: Any
    ) -> graphs_pb.ReportCanaryResponse:
        check_key(request.key)
        await self._canaries.report(
            request.key, trial_of(request, self._canaries.policy.trial_steps)
        )
        return graphs_pb.ReportCanaryResponse()

    def _state(self, record: GraphRecord) -> graphs_pb.GraphState:
        return graph_state(record, self._canaries.policy.live_s)


def services(canaries: Canaries, upkeep: Upkeep, capture_s: float) -> list[Service]:
    """Everything that the compile worker's server offers."""
    return [
        Service(
            descriptor=graphs_pb.DESCRIPTOR.services_by_name["GraphsService"],
            servicer=GraphsServicer(upkeep.graphs, canaries, upkeep.metrics),
            add_to_server=graphs_grpc.add_GraphsServiceServicer_to_server,
        ),
        Service(
            descriptor=admin_pb.DESCRIPTOR.services_by_name["AdminService"],
            servicer=AdminServicer(upkeep, capture_s=capture_s),
            add_to_server=admin_grpc.add_AdminServiceServicer_to_server,
        ),
    ]


def _header(artifact: StoredArtifact) -> graphs_pb.ArtifactHeader:
    return graphs_pb.ArtifactHeader(
        manifest=artifact.manifest_bytes,
        signature=artifact.signature.signature,
        signer=artifact.signature.signer,
    )
