"""Whose captures are made: those that a live worker, or an operator, wants."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from precast.fleet.leases import DecodeLease, Registry
from precast.fleet.queue.queue import LAPSED
from precast.proto.admin.v1 import admin_service_pb2 as admin_pb
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from tests.support.compile_worker import (
    FACTORS,
    Client,
    compile_worker,
    connect,
    starts,
    wait_until,
)
from tests.support.leases import lease

pytestmark = pytest.mark.asyncio
PUBLISHED = pb.GRAPH_PHASE_PUBLISHED
ASKED = "precast:asks:"


def spec(num_tokens: int, **factors: str) -> dict[str, str]:
    return {**FACTORS, "num_tokens": str(num_tokens), **factors}


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A compile worker whose captures begin once a gate is open, and leases of decode workers."""

    client: Client
    registry: Registry
    ledger: Path

    async def ask(self, worker_id: str, *specs: dict[str, str]) -> list[pb.GraphState]:
        request = pb.RequestGraphsRequest(
            specs=[pb.GraphSpec(factors=factors) for factors in specs], worker_id=worker_id
        )
        return list((await self.client.graphs.RequestGraphs(request, timeout=30)).states)

    async def refused(self, worker_id: str, *specs: dict[str, str]) -> tuple[str, str]:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await self.ask(worker_id, *specs)
        return failure.value.code().name, str(failure.value.details())

    async def publish(self, record: DecodeLease) -> None:
        await self.registry.publish(record)

    async def jobs(self) -> dict[int, admin_pb.Job]:
        """By size: the latest."""
        listed = await self.client.admin.ListJobs(admin_pb.ListJobsRequest(), timeout=30)
        return {job.num_tokens: job for job in listed.jobs}

    def captured(self) -> list[int]:
        return [int(size) for _, _, size in starts(self.ledger)]

    def close_gate(self) -> None:
        (self.ledger / "open").unlink(missing_ok=True)
        (self.ledger / "closed").touch()

    def open_gate(self) -> None:
        (self.ledger / "open").touch()


@asynccontextmanager
async def fleet(folder: Path, redis_url: str) -> AsyncIterator[Fleet]:
    registry = Registry.connect(redis_url, lease_ttl_s=60)
    with compile_worker(folder / "home", redis_url, folder / "ledger") as worker:
        async with connect(worker) as client:
            yield Fleet(client=client, registry=registry, ledger=folder / "ledger")
    await registry.close()


async def until(condition: Callable[[], Any], deadline_s: float = 60.0) -> Any:
    return await asyncio.to_thread(wait_until, condition, deadline_s)


async def until_stage(fleet: Fleet, size: int, stage: int, deadline_s: float = 60.0) -> str:
    """Wait until the size's job is there; its detail."""
    async with asyncio.timeout(deadline_s):
        while (job := (await fleet.jobs())[size]).stage != stage:
            await asyncio.sleep(0.1)
    return job.detail


async def test_captures_of_a_worker_that_is_gone_are_left(tmp_path: Path, redis_url: str) -> None:
    gone = lease("gone", wanted=[1, 2, 3], tensor_parallel_size=2)
    async with fleet(tmp_path, redis_url) as each:
        await each.publish(gone)
        await each.publish(lease("live", wanted=[16, 32]))
        each.close_gate()
        await each.ask("live", spec(32), spec(16))
        await until(lambda: each.captured() == [16])
        states = await each.ask("gone", *(spec(size, tp_size="2") for size in (1, 2, 3)))
        await each.registry.withdraw(gone)
        each.open_gate()
        recompile = admin_pb.RecompileRequest(keys=[states[2].key], adoption_deadline_s=1)
        steps = [step.stage async for step in each.client.admin.Recompile(recompile, timeout=30)]
        assert admin_pb.RECOMPILE_STAGE_PUBLISHED in steps, "an operator's job is not left"
        assert each.captured()[:2] == [16, 32]
        assert sorted(each.captured()) == [3, 16, 32]
        jobs = await each.jobs()
        queued = admin_pb.RECOMPILE_STAGE_QUEUED
        assert [jobs[size].stage for size in (1, 2)] == [queued, queued], "it may come back"

        await each.registry.redis.delete(ASKED + "gone")  # as a minute does
        for size in (1, 2):
            detail = await until_stage(each, size, admin_pb.RECOMPILE_STAGE_CANCELLED)
            assert detail == LAPSED
        assert sorted(each.captured()) == [3, 16, 32]

        await each.publish(lease("new", wanted=[1], tensor_parallel_size=2))
        [again] = await each.ask("new", spec(1, tp_size="2"))
        await each.client.until([again.key], PUBLISHED)
        assert sorted(each.captured()) == [1, 3, 16, 32]


async def test_lease_that_was_lost_for_a_moment_costs_no_capture(
    tmp_path: Path, redis_url: str
) -> None:
    async with fleet(tmp_path, redis_url) as each:
        busy, cut_off = lease("busy", wanted=[1]), lease("cut-off", wanted=[2, 4])
        for record in (busy, cut_off, lease("live", wanted=[8])):
            await each.publish(record)
        each.close_gate()
        await each.ask("live", spec(8))
        await until(lambda: each.captured() == [8])
        [first] = await each.ask("busy", spec(1))
        await each.ask("cut-off", spec(2))
        await each.registry.withdraw(busy)
        await each.registry.withdraw(cut_off)
        states = await each.ask("cut-off", spec(2), spec(4))  # it lives, whatever Redis says
        each.open_gate()
        await each.client.until([state.key for state in states], PUBLISHED)
        assert each.captured() == [8, 2, 4]
        await each.publish(busy)
        await each.client.until([first.key], PUBLISHED)
        assert each.captured() == [8, 2, 4, 1]


async def test_what_a_worker_wants_no_more_leaves_the_queue(tmp_path: Path, redis_url: str) -> None:
    async with fleet(tmp_path, redis_url) as each:
        for worker_id in ("one", "two"):
            await each.publish(lease(worker_id, wanted=[1, 2, 3, 4]))
        each.close_gate()
        await each.ask("one", spec(1))
        await until(lambda: each.captured() == [1])
        await each.ask("two", spec(2))
        await each.ask("one", spec(2), spec(3))
        await each.ask("one", spec(4))
        jobs = await each.jobs()
        assert [jobs[size].detail for size in (2, 3, 4)] == ["", LAPSED, ""]
        each.open_gate()
        await until(lambda: each.captured() == [1, 2, 4])
        # whatever is invented, no more can wait than the worker has sizes
        for number in range(1, 21):
            await each.ask("one", *(spec(size, hidden_size=str(64 * number)) for size in (1, 4)))
        waiting = [
            job
            for job in (
                await each.client.admin.ListJobs(admin_pb.ListJobsRequest(), timeout=30)
            ).jobs
            if not job.ended_at_s
        ]
        assert len(waiting) <= 3


async def test_invented_sizes_are_refused(tmp_path: Path, redis_url: str) -> None:
    async with fleet(tmp_path, redis_url) as each:
        await each.publish(lease("real", wanted=[1, 2]))
        invented = [spec(size) for size in range(3, 43)]
        shapes = [spec(1, hidden_size=str(64 * number)) for number in range(1, 4)]
        for worker_id, specs, status, detail in (
            (
                "real",
                invented,
                "INVALID_ARGUMENT",
                "num_tokens = 3: worker real has graphs of 1, 2",
            ),
            ("real", [spec(1, tp_size="2")], "INVALID_ARGUMENT", "tp_size = 2"),
            ("real", shapes, "RESOURCE_EXHAUSTED", "3 graphs in one request"),
            ("", [spec(1)], "INVALID_ARGUMENT", "worker_id ''"),
            ("../x", [spec(1)], "INVALID_ARGUMENT", "worker_id '../x'"),
            ("evil", [spec(1)], "FAILED_PRECONDITION", "worker evil holds no lease"),
        ):
            code, text = await each.refused(worker_id, *specs)
            assert code == status
            assert detail in text
        assert await each.jobs() == {}
        [state] = await each.ask("real", spec(1))
        await each.client.until([state.key], PUBLISHED)
        told = await each.ask("evil", spec(1), spec(2))
        assert [each.phase for each in told] == [PUBLISHED, pb.GRAPH_PHASE_FAILED]
        assert "worker evil holds no lease" in told[1].error
        assert each.captured() == [1]
        listed = await each.client.graphs.ListGraphs(pb.ListGraphsRequest(), timeout=30)
        assert [graph.key for graph in listed.graphs] == [state.key]
