"""What Redis loses comes back out of the store, on disk or in a bucket."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import redis

from precast.fleet.leases import Registry, connect_redis
from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.fetch import fetch_graph
from precast.graphs.artifacts.signing import TrustedKeys
from precast.proto.admin.v1 import admin_service_pb2 as admin_pb
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from services.compile_worker.catalog.entry import GraphRecord, Phase
from services.compile_worker.catalog.index import CHANNEL, HASH, GraphIndex
from tests.support.command import precast
from tests.support.compile_worker import (
    FACTORS,
    Client,
    compile_worker,
    connect,
    starts,
    wait_until,
)
from tests.support.leases import lease
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.asyncio
PUBLISHED = pb.GRAPH_PHASE_PUBLISHED
SPECS = [{**FACTORS, "num_tokens": str(size)} for size in (1, 2, 4)]


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest) -> dict[str, str]:
    """Settings of a store."""
    if request.param == "disk":
        return {}
    return {"store_url": request.getfixturevalue("s3").new_store()}


def empty(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()


def rows(redis_url: str) -> int:
    with redis.Redis.from_url(redis_url) as client:
        return int(client.execute_command("HLEN", HASH))


async def until_known(redis_url: str, count: int) -> None:
    await asyncio.to_thread(wait_until, lambda: rows(redis_url) == count)


async def listed(client: Client) -> dict[str, Any]:
    """What the index says of each graph, but for the time of its last change."""
    answer = await client.graphs.ListGraphs(pb.ListGraphsRequest(), timeout=30)
    return {
        graph.key: (graph.phase, graph.version, graph.published_at_s, sorted(graph.models))
        for graph in answer.graphs
    }


async def versions(client: Client, key: str) -> list[Any]:
    request = admin_pb.ListVersionsRequest(key=key)
    answer = await client.admin.ListVersions(request, timeout=30)
    return [(each.version, each.state, each.pinned, each.reason) for each in answer.versions]


async def quarantined(client: Client, redis_url: str, key: str) -> None:
    """By the report of a worker that runs the graph."""
    registry = Registry.connect(redis_url)
    await registry.publish(lease("w", keys=[key]))
    crash = pb.ReportCrashRequest(worker_id="w", key=key, version=1, signal="SIGSEGV")
    await client.graphs.ReportCrash(crash, timeout=30)
    await registry.close()


async def recompiled(client: Client, key: str) -> None:
    request = admin_pb.RecompileRequest(keys=[key], adoption_deadline_s=1)
    async for _ in client.admin.Recompile(request, timeout=30):
        pass


async def test_emptied_redis_is_filled_again(
    store: dict[str, str], tmp_path: Path, redis_url: str
) -> None:
    """While the worker runs, and when it is started on an empty Redis: graphs, the models that
    asked for them, and all decisions on versions."""
    home, ledger = tmp_path / "home", tmp_path / "ledger"
    settings = {"canary_steps": 0, **store}
    with compile_worker(home, redis_url, ledger, **settings) as worker:
        async with connect(worker) as client:
            keys = [state.key for state in await client.request(*SPECS, model="first")]
            await client.until(keys, PUBLISHED)
            await client.request(SPECS[0], SPECS[1], model="second")
            for key in keys[:2]:
                await recompiled(client, key)
            rollback = admin_pb.RollBackGraphRequest(key=keys[0])
            await client.admin.RollBackGraph(rollback, timeout=30)
            pin = admin_pb.PinVersionRequest(key=keys[1], version=1)
            await client.admin.PinVersion(pin, timeout=30)
            await quarantined(client, redis_url, keys[2])
            known = await listed(client)
            decided = [await versions(client, key) for key in keys]
            assert [(known[key][1], known[key][3]) for key in keys] == [
                (1, ["first", "second"]),
                (1, ["first", "second"]),
                (0, ["first"]),
            ]
            empty(redis_url)
            await until_known(redis_url, len(keys))
            assert await listed(client) == known
        worker.kill()
    empty(redis_url)
    with compile_worker(home, redis_url, ledger, **settings) as worker:
        async with connect(worker) as client:
            await until_known(redis_url, len(keys))
            again = await listed(client)
            assert [version[1:] for version in again.values()] == [
                version[1:] for version in known.values()
            ]
            assert again == known
            assert [await versions(client, key) for key in keys] == decided
    assert len(starts(ledger)) == len(SPECS) + 2


async def test_worker_without_anything_of_its_own_serves_from_the_bucket(
    s3: S3Server, tmp_path: Path, redis_url: str
) -> None:
    """Two workers on two machines fill a bucket, each graph once. Then both machines are lost."""
    settings = {"store_url": s3.new_store()}
    ledger, trusted = tmp_path / "ledger", tmp_path / "trusted"
    shared = {**settings, "trusted_keys_dir": str(trusted)}
    with (
        compile_worker(tmp_path / "one", redis_url, ledger, **shared) as one,
        compile_worker(tmp_path / "two", redis_url, ledger, **shared) as two,
    ):
        async with connect(one) as first, connect(two) as second:
            states, others = await asyncio.gather(first.request(*SPECS), second.request(*SPECS))
            keys = [state.key for state in states]
            assert keys == [state.key for state in others]
            await asyncio.gather(first.until(keys, PUBLISHED), second.until(keys, PUBLISHED))
            for client, cache in ((first, tmp_path / "a"), (second, tmp_path / "b")):
                await fetched(client, GraphCache(cache, TrustedKeys.load(trusted)), keys)
        one.kill()
        two.kill()
    empty(redis_url)
    with compile_worker(tmp_path / "three", redis_url, ledger, **shared) as three:
        async with connect(three) as client:
            assert set(await listed(client)) == set(keys)
            await fetched(client, GraphCache(tmp_path / "c", TrustedKeys.load(trusted)), keys)
    assert len(starts(ledger)) == len(SPECS)


async def fetched(client: Client, cache: GraphCache, keys: list[str]) -> None:
    for key, spec in zip(keys, SPECS, strict=True):
        assert (await fetch_graph(client.graphs, cache, key, spec=spec)).manifest.key == key


async def test_rows_that_make_no_sense_are_ignored(tmp_path: Path, redis_url: str) -> None:
    rows: list[Any] = [
        b"noise",
        b"{}",
        b'{"key": "../../etc", "phase": "published", "factors": {}}',
    ]
    with (
        redis.Redis.from_url(redis_url) as client,
        compile_worker(tmp_path / "home", redis_url, tmp_path / "ledger") as worker,
    ):
        for number, row in enumerate(rows):
            client.hset(HASH, f"row-{number}", row)
            client.publish(CHANNEL, row)
        async with connect(worker) as stubs:
            keys = [state.key for state in await stubs.request(*SPECS)]
            await stubs.until(keys, PUBLISHED)
            await asyncio.to_thread(
                wait_until, lambda: worker.log.read_text().count("index row ignored") >= 6
            )
            assert set(await listed(stubs)) == set(keys)
        assert worker.process.poll() is None


async def test_graphs_imported_beside_a_running_worker_are_not_captured(
    store: dict[str, str], tmp_path: Path, redis_url: str
) -> None:
    """A worker finds them in its store when it is asked for them, or by a scrub."""
    trusted, bundle, ledger = tmp_path / "trusted", tmp_path / "graphs.tar", tmp_path / "ledger"
    shared = {"trusted_keys_dir": str(trusted)}
    environment = {"PRECAST_TRUSTED_KEYS_DIR": str(trusted)}
    with compile_worker(tmp_path / "one", redis_url, tmp_path / "elsewhere", **shared) as one:
        async with connect(one) as client:
            keys = [state.key for state in await client.request(*SPECS)]
            await client.until(keys, PUBLISHED)
    await graphs(environment, "export", str(bundle), "--home", str(tmp_path / "one"))
    empty(redis_url)
    home = tmp_path / "two"
    with compile_worker(home, redis_url, ledger, **shared, **store) as two:
        async with connect(two) as client:
            assert await listed(client) == {}
            for name, value in store.items():
                environment[f"PRECAST_{name.upper()}"] = value
            await graphs(environment, "import", str(bundle), "--home", str(home))
            states = await client.request(SPECS[0])
            assert [(state.key, state.phase) for state in states] == [(keys[0], PUBLISHED)]
            await graphs({}, "scrub", "--address", two.address)
            assert set(await listed(client)) == set(keys)
            await fetched(client, GraphCache(tmp_path / "a", TrustedKeys.load(trusted)), keys)
    assert starts(ledger) == []


async def graphs(environment: dict[str, str], *arguments: str) -> None:
    done = await asyncio.to_thread(precast, "graphs", *arguments, environment=environment)
    assert done.returncode == 0, done.stderr


async def test_index_may_grow_while_it_is_reconciled(redis_url: str) -> None:
    """Publications come in while what Redis has lost is put back."""
    records = [
        GraphRecord(key=f"{n:032x}", phase=Phase.PUBLISHED, factors={}, version=1, updated_at=1)
        for n in range(60)
    ]
    async with connect_redis(redis_url) as client:
        index = GraphIndex(client)
        for record in records[:30]:
            index.restore(record)
        reconciling = asyncio.create_task(index.reconcile())
        for record in records[30:]:
            await index.put(record)
        await reconciling
        other = GraphIndex(client)
        await other.reconcile()
        assert other.records() == index.records() == records
