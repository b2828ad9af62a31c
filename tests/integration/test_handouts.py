"""Who may report that a graph has crashed."""

from pathlib import Path

import pytest

from precast.errors import InvalidRequest
from precast.fleet.leases import Registry
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from services.compile_worker.handouts import Handouts
from tests.support.compile_worker import FACTORS, compile_worker, connect
from tests.support.leases import lease

pytestmark = pytest.mark.asyncio
KEY, OTHER = "a" * 64, "b" * 64


async def refused(handouts: Handouts, worker_id: str, key: str, version: int = 1) -> str:
    with pytest.raises(InvalidRequest) as refusal:
        await handouts.check(worker_id, key, version)
    return str(refusal.value)


async def test_only_a_worker_that_was_given_a_graph_is_believed(redis_url: str) -> None:
    registry = Registry.connect(redis_url)
    handouts = Handouts(registry=registry)
    assert "holds no lease" in await refused(handouts, "evil", KEY)
    await registry.publish(lease("fetched", address="127.0.0.1:1"))
    await registry.publish(lease("running", keys=[KEY], address="127.0.0.1:2"))
    await handouts.note("fetched", OTHER, 1)
    await handouts.note("evil", OTHER, 1)
    await handouts.check("fetched", OTHER, 1)
    await handouts.check("running", KEY, 1)
    assert "was not given version 2" in await refused(handouts, "running", KEY, 2)
    assert "was not given" in await refused(handouts, "running", OTHER)
    assert "holds no lease" in await refused(handouts, "evil", OTHER)
    await registry.publish(lease("restarted", address="127.0.0.1:1"))
    await handouts.check("restarted", OTHER, 1)
    await registry.close()


async def test_a_stranger_quarantines_nothing(tmp_path: Path, redis_url: str) -> None:
    with compile_worker(tmp_path / "home", redis_url, tmp_path / "ledger") as worker:
        async with connect(worker) as client:
            (state,) = await client.request(FACTORS)
            await client.until([state.key], pb.GRAPH_PHASE_PUBLISHED)
            crash = pb.ReportCrashRequest(
                worker_id="evil", key=state.key, version=1, signal="SIGSEGV"
            )
            with pytest.raises(Exception, match="holds no lease"):
                await client.graphs.ReportCrash(crash, timeout=30)
            (still,) = await client.request(FACTORS)
            assert (still.version, list(still.quarantined)) == (1, [])
