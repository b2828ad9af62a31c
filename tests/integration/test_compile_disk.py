"""A compile worker that can't write: it says what, and goes on."""

import asyncio
import shutil
from pathlib import Path

import pytest

from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from tests.support.compile_worker import FACTORS, compile_worker, connect, wait_until

pytestmark = pytest.mark.asyncio


async def test_a_folder_that_cant_be_written_costs_no_more_than_the_capture(
    tmp_path: Path, redis_url: str
) -> None:
    home = tmp_path / "home"
    with compile_worker(home, redis_url, tmp_path / "ledger") as worker:
        async with connect(worker) as client:
            (good,) = await client.request(FACTORS)
            await client.until([good.key], pb.GRAPH_PHASE_PUBLISHED)
            shutil.rmtree(home / "captures")
            (home / "captures").write_text("in the way, as a full disk is")
            (bad,) = await client.request({**FACTORS, "num_tokens": "2"})
            await client.until([bad.key], pb.GRAPH_PHASE_FAILED)
            (state,) = await client.request({**FACTORS, "num_tokens": "2"})
            assert f"can't use {home / 'captures'}" in state.error
            assert "capture can't write" in await asyncio.to_thread(worker.log.read_text)
            (home / "captures").unlink()
            (other,) = await client.request({**FACTORS, "num_tokens": "4"})
            await client.until([other.key], pb.GRAPH_PHASE_PUBLISHED)
        await asyncio.to_thread(wait_until, lambda: worker.process.poll() is None)
