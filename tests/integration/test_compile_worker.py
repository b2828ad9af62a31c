"""A compile worker over gRPC: requests, captures, fetches, errors."""

from pathlib import Path

import pytest

from precast.graphs.fetch import GraphCache, fetch_graph
from precast.graphs.signing import TrustedKeys
from precast.graphs.v1 import graphs_service_pb2 as pb
from tests.support.compile_worker import FACTORS, compile_worker, connect, starts

pytestmark = pytest.mark.asyncio


async def test_captures_each_graph_once_and_hands_it_out(tmp_path: Path, redis_url: str) -> None:
    specs = [{**FACTORS, "batch_size": str(size)} for size in (4, 1, 2)]
    ledger = tmp_path / "ledger"
    with compile_worker(tmp_path / "home", redis_url, ledger) as worker:
        async with connect(worker) as client:
            states = await client.request(*specs)
            again = await client.request(*specs)
            keys = [state.key for state in states]
            done = await client.until(keys, pb.GRAPH_PHASE_PUBLISHED)
            cache = GraphCache(
                tmp_path / "cache", TrustedKeys.load(worker.home / "keys" / "trusted")
            )
            fetched = await fetch_graph(client.graphs, cache, keys[0], spec=specs[0])
    assert [state.key for state in again] == keys
    assert {state.generation for state in done.values()} == {1}
    assert [size for _, _, size in starts(ledger)] == ["1", "2", "4"]
    assert fetched.manifest.key == keys[0]
    assert fetched.manifest.models == ("tiny",)
    assert cache.find(specs[0]) == fetched
    assert cache.find(specs[1]) is None
