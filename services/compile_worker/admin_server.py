"""The admin service: what an operator does with a fleet's graphs."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from precast.errors import InvalidRequest
from precast.fleet.queue.job import Job
from precast.graphs.key import check_key
from precast.proto.admin.v1 import admin_service_pb2 as admin_pb
from precast.proto.admin.v1 import admin_service_pb2_grpc as admin_grpc
from services.compile_worker.catalog.by_hand import lift, pin, roll_back
from services.compile_worker.convert import (
    STAGES,
    canary_progress,
    check_keys,
    collected_message,
    job_message,
    resigned_message,
    scrubbed_message,
    version_message,
)
from services.compile_worker.maintenance.resign import resign
from services.compile_worker.maintenance.store import Upkeep
from services.compile_worker.rollout.recompile import (
    DEFAULT_ADOPTION_S,
    MAX_ADOPTION_S,
    POLL_S,
    Progress,
    Selection,
    recompile,
    select,
)

_CANCEL_WAIT_S: Final = 15.0


class AdminServicer(admin_grpc.AdminServiceServicer):
    """``precast.admin.v1.AdminService``."""

    def __init__(self, upkeep: Upkeep, *, capture_s: float) -> None:
        self._graphs = upkeep.graphs
        self._registry = upkeep.registry
        self._upkeep = upkeep
        self._capture_s = capture_s
        """Longest that one capture may take, from its claim to its end."""

    async def Recompile(
        self, request: admin_pb.RecompileRequest, context: Any
    ) -> AsyncIterator[admin_pb.RecompileResponse]:
        records = select(self._graphs, _selection(request))
        ahead = await self._graphs.queue.length()
        progress = recompile(
            self._graphs,
            self._registry,
            records,
            adoption_s=min(request.adoption_deadline_s or DEFAULT_ADOPTION_S, MAX_ADOPTION_S),
            capture_s=self._capture_s * (ahead + len(records)),
        )
        async for step in progress:
            yield _recompile_response(step)

    async def ListJobs(
        self, request: admin_pb.ListJobsRequest, context: Any
    ) -> admin_pb.ListJobsResponse:
        jobs = await self._graphs.queue.jobs()
        return admin_pb.ListJobsResponse(jobs=map(job_message, jobs))

    async def CancelJob(
        self, request: admin_pb.CancelJobRequest, context: Any
    ) -> admin_pb.CancelJobResponse:
        job = await self._graphs.queue.cancel(request.job_id)
        if job.stage.ended and not job.started_at:
            await self._graphs.cancelled(job)
        return admin_pb.CancelJobResponse(job=job_message(await self._until_ended(job)))

    async def ListVersions(
        self, request: admin_pb.ListVersionsRequest, context: Any
    ) -> admin_pb.ListVersionsResponse:
        check_key(request.key)
        known = self._graphs.versions
        messages = [
            version_message(
                version, await asyncio.to_thread(known.manifest, request.key, version.number)
            )
            for version in await asyncio.to_thread(known.listed, request.key)
        ]
        return admin_pb.ListVersionsResponse(versions=messages)

    async def RollBackGraph(
        self, request: admin_pb.RollBackGraphRequest, context: Any
    ) -> admin_pb.RollBackGraphResponse:
        check_key(request.key)
        serving = await roll_back(self._graphs.versions, request.key, request.version)
        return admin_pb.RollBackGraphResponse(version=serving)

    async def PinVersion(
        self, request: admin_pb.PinVersionRequest, context: Any
    ) -> admin_pb.PinVersionResponse:
        check_key(request.key)
        if not request.version:
            raise InvalidRequest("pin to which version?")
        await pin(self._graphs.versions, request.key, request.version)
        return admin_pb.PinVersionResponse()

    async def UnpinVersion(
        self, request: admin_pb.UnpinVersionRequest, context: Any
    ) -> admin_pb.UnpinVersionResponse:
        check_key(request.key)
        await pin(self._graphs.versions, request.key, 0)
        now = await self._graphs.versions.standing(request.key)
        return admin_pb.UnpinVersionResponse(version=now.serving)

    async def LiftQuarantine(
        self, request: admin_pb.LiftQuarantineRequest, context: Any
    ) -> admin_pb.LiftQuarantineResponse:
        check_key(request.key)
        serving = await lift(self._graphs.versions, request.key, request.version)
        return admin_pb.LiftQuarantineResponse(version=serving)

    async def CollectGarbage(
        self, request: admin_pb.CollectGarbageRequest, context: Any
    ) -> admin_pb.CollectGarbageResponse:
        found = await self._upkeep.collect(dry_run=request.dry_run)
        return collected_message(found, self._upkeep.max_bytes)

    async def ScrubStore(
        self, request: admin_pb.ScrubStoreRequest, context: Any
    ) -> admin_pb.ScrubStoreResponse:
        return scrubbed_message(await self._upkeep.scrub())

    async def ResignGraphs(
        self, request: admin_pb.ResignGraphsRequest, context: Any
    ) -> admin_pb.ResignGraphsResponse:
        return resigned_message(await resign(self._graphs, set(request.signers)))

    async def _until_ended(self, job: Job) -> Job:
        """The job once its capture has been killed, or as it is when that takes too long."""
        end = time.monotonic() + _CANCEL_WAIT_S
        while not job.stage.ended and time.monotonic() < end:
            await asyncio.sleep(POLL_S)
            job = await self._graphs.queue.get(job.id)
        return job


def _selection(request: admin_pb.RecompileRequest) -> Selection:
    check_keys(set(request.keys))
    return Selection(
        keys=tuple(request.keys),
        model=request.model,
        sizes=tuple(request.sizes),
        everything=request.all,
    )


def _recompile_response(progress: Progress) -> admin_pb.RecompileResponse:
    return admin_pb.RecompileResponse(
        job_id=progress.job.id,
        key=progress.job.key,
        stage=STAGES[progress.stage],
        version=progress.job.version,
        detail=progress.detail,
        num_tokens=progress.job.num_tokens,
        adopted=progress.adopted,
        workers=progress.workers,
        canary=canary_progress(progress.trial) if progress.trial else None,
    )
