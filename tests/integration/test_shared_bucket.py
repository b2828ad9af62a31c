"""Compile workers over a bucket that goes away, and that die over one that stays."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.aio
import pytest

from precast.graphs.artifacts.open_store import open_store
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from tests.support.compile_worker import (
    FACTORS,
    Client,
    compile_worker,
    connect,
    starts,
    wait_until,
)
from tests.support.ports import free_port
from tests.support.s3_server import S3Server, s3_server

pytestmark = pytest.mark.asyncio
PUBLISHED, FAILED = pb.GRAPH_PHASE_PUBLISHED, pb.GRAPH_PHASE_FAILED


def spec(how: str = "llama", num_tokens: int = 1) -> dict[str, str]:
    return {**FACTORS, "architecture": how, "num_tokens": str(num_tokens)}


async def until(condition: Callable[[], Any]) -> None:
    await asyncio.to_thread(wait_until, condition)


async def refused(client: Client, *specs: dict[str, str]) -> str:
    """The message of a request that can't be answered now."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await client.request(*specs)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    return str(failure.value.details())


async def test_bucket_that_goes_away_stops_captures_and_nothing_else(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, port = tmp_path / "ledger", free_port()
    with s3_server(tmp_path, port) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        url = server.new_store()
        with compile_worker(tmp_path / "home", redis_url, ledger, store_url=url) as worker:
            async with connect(worker) as client:
                [state] = await client.request(spec("gated"))
                await until(lambda: starts(ledger))
                await asyncio.to_thread(server.kill)
                (ledger / "open").touch()
                failed = await client.until([state.key], FAILED)
                assert f"{url}: " in failed[state.key].error
                assert url in await refused(client, spec(num_tokens=2))
                listed = await client.graphs.ListGraphs(pb.ListGraphsRequest(), timeout=30)
                assert [graph.key for graph in listed.graphs] == [state.key]
                with s3_server(tmp_path, port) as again:
                    again.make_bucket(urlsplit(url).netloc)
                    [other] = await client.request(spec(num_tokens=2))
                    await client.until([other.key], PUBLISHED)
            assert worker.process.poll() is None
            assert "Traceback" not in worker.log.read_text()


async def test_kills_at_many_moments_lose_and_double_nothing(
    s3: S3Server, tmp_path: Path, redis_url: str
) -> None:
    """Workers on other machines take over from each that is killed, a little later in its work."""
    url, ledger = s3.new_store(), tmp_path / "ledger"
    specs = [spec(num_tokens=size) for size in range(1, 7)]
    keys: list[str] = []
    for number, work_s in enumerate((0.0, 0.1, 0.25)):
        home = tmp_path / f"home-{number}"
        with compile_worker(home, redis_url, ledger, store_url=url) as worker:
            async with connect(worker) as client:
                keys = [state.key for state in await client.request(*specs)]
            await asyncio.sleep(work_s)
            worker.kill()
    with compile_worker(tmp_path / "last", redis_url, ledger, store_url=url) as worker:
        async with connect(worker) as client:
            await client.request(*specs)
            await client.until(keys, PUBLISHED, deadline_s=60)
    store = open_store(tmp_path / "copies", url)
    assert store.published_keys() == sorted(keys)
    for key in keys:
        assert store.versions(key) == [1]
        store.read_back(key, 1)
