"""Fetching graphs over gRPC, and the cache that keeps them.

What is refused: ``test_hostile_artifacts.py``.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from precast.errors import GraphNotFound, PrecastError
from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.disk_store import DiskStore
from precast.graphs.artifacts.fetch import fetch_graph
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from precast.proto.graphs.v1 import graphs_service_pb2_grpc as grpc_pb
from precast.rpc.server import Service, open_channel, start_server
from tests.support.artifacts import graph_file, manifest_for, signed, trust
from tests.support.compile_worker import FACTORS
from tests.support.hostile import GOOD, GRAPH, MANIFEST, STRANGER, liar


@pytest.mark.asyncio
async def test_good_stream_is_kept(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path, trust(GOOD))
    async with liar() as (_, stub):
        for _ in range(2):  # the second time it is there already
            fetched = await fetch_graph(stub, cache, MANIFEST.key, spec=FACTORS, version=1)
            assert fetched.graph_path.read_bytes() == GRAPH
    assert cache.find(FACTORS) == fetched
    assert GraphCache(tmp_path, trust(GOOD)).find(FACTORS) == fetched


@pytest.mark.asyncio
async def test_server_error_keeps_its_meaning(tmp_path: Path) -> None:
    class Empty(grpc_pb.GraphsServiceServicer):
        async def FetchGraph(self, request: Any, context: Any) -> AsyncIterator[Any]:
            raise GraphNotFound("no graph here")
            yield

    cache = GraphCache(tmp_path, trust(GOOD))
    service = Service(
        descriptor=pb.DESCRIPTOR.services_by_name["GraphsService"],
        servicer=Empty(),
        add_to_server=grpc_pb.add_GraphsServiceServicer_to_server,
    )
    server = await start_server("127.0.0.1:0", [service])
    channel = open_channel(f"127.0.0.1:{server.port}")
    stub = grpc_pb.GraphsServiceStub(channel)
    with pytest.raises(GraphNotFound, match="no graph here"):
        await fetch_graph(stub, cache, MANIFEST.key, spec=FACTORS)
    await server.stop(0)
    with pytest.raises(PrecastError):
        await fetch_graph(stub, cache, MANIFEST.key, spec=FACTORS, timeout_s=2)
    await channel.close()


def test_cache_falls_back_to_an_older_good_version(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "cache", trust(GOOD))
    artifacts = []
    for version in (1, 2):
        made = graph_file(tmp_path, seed=version)
        manifest = manifest_for(made.read_bytes(), version=version)
        artifacts.append(cache.add(*signed(manifest, GOOD), made))
    assert cache.find(FACTORS) == artifacts[1]
    artifacts[1].graph_path.write_bytes(b"damaged")
    assert cache.find(FACTORS) == artifacts[0]


def test_revoked_key_empties_the_cache(tmp_path: Path) -> None:
    made = graph_file(tmp_path)
    manifest = manifest_for(made.read_bytes())
    GraphCache(tmp_path / "cache", trust(GOOD)).add(*signed(manifest, GOOD), made)
    assert GraphCache(tmp_path / "cache", trust(STRANGER)).find(FACTORS) is None


def test_other_bytes_under_a_cached_number_replace_it(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "cache", trust(GOOD))
    for seed in (1, 2):
        made = graph_file(tmp_path, seed=seed)
        artifact = cache.add(*signed(manifest_for(made.read_bytes()), GOOD), made)
        assert artifact.graph_path.read_bytes() == made.read_bytes()


def test_cache_is_bounded_and_forgets_what_was_not_used(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "cache", trust(GOOD), max_bytes=350_000)
    specs = []
    for number in range(5):
        made = graph_file(tmp_path, seed=number)
        manifest = manifest_for(made.read_bytes(), num_tokens=str(number + 1))
        cache.add(*signed(manifest, GOOD), made)
        specs.append({**FACTORS, "num_tokens": str(number + 1)})
        assert cache.find(specs[0]) is not None, "what is used stays"
    assert [cache.find(spec) is not None for spec in specs] == [True, False, False, True, True]


def test_few_versions_are_kept_and_always_the_one_just_fetched(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "cache", trust(GOOD))
    for version in (5, 6, 7, 1):  # 1: the store was emptied and has begun anew
        made = graph_file(tmp_path, seed=version)
        manifest = manifest_for(made.read_bytes(), version=version)
        assert cache.add(*signed(manifest, GOOD), made).manifest == manifest
    assert DiskStore(tmp_path / "cache").versions(MANIFEST.key) == [1, 6, 7]
