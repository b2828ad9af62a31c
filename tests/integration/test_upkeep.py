"""A compile worker's store stays within its bound, and damaged artifacts are found and replaced."""

import asyncio
import json
import os
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from precast.fleet.leases import DecodeLease, LoadedGraphRecord, Registry
from precast.fleet.queue.queue import CaptureQueue
from precast.graphs.artifacts.bucket import Bucket
from precast.graphs.artifacts.disk_store import DiskStore
from precast.graphs.artifacts.versions import Lifecycle, encode_lifecycle
from precast.proto.admin.v1 import admin_service_pb2 as admin_pb
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from services.compile_worker.catalog.entry import Phase
from services.compile_worker.catalog.index import GraphIndex
from services.compile_worker.catalog.versions import Versions
from services.compile_worker.graphs import Graphs
from services.compile_worker.maintenance.store import Upkeep
from services.compile_worker.metrics import Metrics
from tests.support.artifacts import graph_file, manifest_for, new_signer, signed, trust
from tests.support.command import precast
from tests.support.compile_worker import (
    BUILD,
    FACTORS,
    Client,
    WorkerProcess,
    compile_worker,
    connect,
    wait_until,
)
from tests.support.ports import free_port
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.asyncio
SIGNER = new_signer()
MIB = 1 << 20


async def graphs_over(store: DiskStore, registry: Registry) -> Graphs:
    """A compile worker's graphs in this process; nothing is captured."""
    index = GraphIndex(registry.redis)
    graphs = Graphs(
        store=store,
        index=index,
        queue=CaptureQueue(registry.redis, "test", max_queued=100),
        versions=Versions(store=store, index=index, trusted=trust(SIGNER)),
        signing=lambda: SIGNER,
        build=BUILD,
    )
    await graphs.restore()
    return graphs


def publish(store: DiskStore, folder: Path, *, num_tokens: int, version: int = 1) -> str:
    path = graph_file(folder, seed=100 * num_tokens + version, size=MIB // 2)
    manifest = manifest_for(path.read_bytes(), version=version, num_tokens=str(num_tokens))
    store.publish(*signed(manifest, SIGNER), path)
    return manifest.key


def lease(key: str, version: int) -> DecodeLease:
    return DecodeLease(
        worker_id="worker",
        address="127.0.0.1:1",
        model="tiny",
        state="ready",
        max_batch_size=1,
        max_context_length=1,
        weight_dtype="fp32",
        quantization="int8",
        graphs=(LoadedGraphRecord(num_tokens=1, keys=(key,), versions=(version,)),),
    )


def age(store: DiskStore) -> None:
    """Make all artifacts look as if they had last been used an hour ago, in their order."""
    for holding in store.holdings():
        at = holding.used_at - 3600
        os.utime(store.root / holding.key / str(holding.version), (at, at))


async def test_graphs_that_nobody_runs_make_room(tmp_path: Path, redis_url: str) -> None:
    """Those in use and the pinned ones stay, over the bound too. What went is captured again for
    whoever asks, under a number that was never used."""
    store = DiskStore(tmp_path / "store")
    keys = [publish(store, tmp_path, num_tokens=size) for size in (1, 2, 4, 8)]
    publish(store, tmp_path, num_tokens=1, version=2)
    used, pinned, idle, recent = keys
    store.update_note(pinned, lambda _: encode_lifecycle(Lifecycle().pinned(1)))
    registry = Registry.connect(redis_url, lease_ttl_s=30)
    graphs = await graphs_over(store, registry)
    clock = [0.0]
    upkeep = Upkeep(
        graphs=graphs,
        registry=registry,
        metrics=Metrics(),
        max_bytes=2 * MIB - MIB // 4,
        scrub_interval_s=1.0,
        clock=lambda: clock[0],
    )
    await registry.publish(lease(used, 2))
    await graphs.fetch(recent, 0, "")  # the last to be used

    first = await upkeep.collect(dry_run=True)
    assert [removal.holding.version for removal in first.removals] == [1]
    assert len(store.holdings()) == 5, "a dry run removes nothing"
    await upkeep.collect(dry_run=False)
    assert store.versions(used) == [2]
    assert store.published_keys() == sorted(keys), "all count as in use at first"

    clock[0] += 61
    upkeep.max_bytes = 3 * MIB // 2 + 10_000
    assert (await upkeep.collect(dry_run=True)).removals == [], "all were just published"
    age(store)
    await upkeep.collect(dry_run=False)
    assert store.published_keys() == sorted([used, pinned, recent])
    record = graphs.index.get(idle)
    assert record and (record.phase, record.version) == (Phase.REMOVED, 0)

    upkeep.max_bytes = 1
    age(store)
    found = await upkeep.collect(dry_run=False)
    assert store.published_keys() == sorted([used, pinned])
    assert found.after == sum(holding.size for holding in store.holdings()) > upkeep.max_bytes
    assert upkeep.metrics.count("compile_worker_store_bytes") == found.after
    assert upkeep.metrics.count("compile_worker_removed_artifacts_total") == 3

    [again] = await graphs.request([{**FACTORS, "num_tokens": "4"}], "tiny")
    assert (again.key, again.phase) == (idle, Phase.QUEUED)
    [job] = await graphs.queue.jobs()
    assert (job.key, job.version) == (idle, 2)
    await registry.close()


async def test_all_graphs_count_as_in_use_while_redis_is_away(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    key = publish(store, tmp_path, num_tokens=1)
    registry = Registry.connect("redis://127.0.0.1:1/0")
    clock = [0.0]
    upkeep = Upkeep(
        graphs=await graphs_over(store, registry),
        registry=registry,
        metrics=Metrics(),
        max_bytes=1,
        scrub_interval_s=1.0,
        clock=lambda: clock[0],
    )
    clock[0] += 1000
    age(store)
    assert (await upkeep.collect(dry_run=False)).removals == []
    assert store.published_keys() == [key]
    await registry.close()


def cli(worker: WorkerProcess, *arguments: str) -> "subprocess.CompletedProcess[str]":
    wide = {"COLUMNS": "200"}
    return precast("graphs", *arguments, "--address", worker.address, environment=wide)


async def recompiled(client: Client, key: str) -> None:
    request = admin_pb.RecompileRequest(keys=[key], adoption_deadline_s=1)
    async for _ in client.admin.Recompile(request, timeout=30):
        pass


async def test_publications_keep_the_store_within_its_bound(tmp_path: Path, redis_url: str) -> None:
    """Each capture has 400 kB and the bound is 1 MiB: of three versions two may stay."""
    home, ledger = tmp_path / "home", tmp_path / "ledger"
    ledger.mkdir()
    graph_file(tmp_path, size=400_000).rename(ledger / "package")
    settings = {"canary_steps": 0, "store_max_mb": 1}
    store = DiskStore(home / "store")
    with compile_worker(home, redis_url, ledger, **settings) as worker:
        async with connect(worker) as client:
            [state] = await client.request(FACTORS)
            await client.until([state.key], pb.GRAPH_PHASE_PUBLISHED)
            await recompiled(client, state.key)
            pin = admin_pb.PinVersionRequest(key=state.key, version=1)
            await client.admin.PinVersion(pin, timeout=30)
            await recompiled(client, state.key)
            await asyncio.to_thread(wait_until, lambda: store.versions(state.key) == [1, 3])
        done = await asyncio.to_thread(cli, worker, "gc", "--dry-run")
        assert "0 artifacts would be removed: 0.8 MiB before" in done.stdout
        described = await asyncio.to_thread(cli, worker, "gc", "--json")
        assert json.loads(described.stdout)["removed"] == []


def damage(worker: WorkerProcess, url: str | None, key: str) -> None:
    """Change a byte in the store, whichever it is."""
    graph = DiskStore(worker.home / "store").open(key).graph_path if url is None else None
    if graph:
        graph.write_bytes(_last_bit_flipped(graph.read_bytes()))
        return
    bucket = Bucket(str(url))
    [name] = [meta["path"] for meta in bucket.listing(key) if meta["path"].endswith(".pt2")]
    bucket.write(name, _last_bit_flipped(bucket.read(name, MIB)))


def _last_bit_flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("kind", ["disk", "s3"])
async def test_scrub_finds_what_is_damaged_and_has_it_replaced(
    kind: str, by_hand: bool, s3: S3Server, tmp_path: Path, redis_url: str
) -> None:
    url, port = (s3.new_store() if kind == "s3" else None), free_port()
    settings: dict[str, Any] = {"metrics_port": port, **({"store_url": url} if url else {})}
    if not by_hand:
        settings["scrub_interval_s"] = 0.5
    with compile_worker(tmp_path / "home", redis_url, tmp_path / "ledger", **settings) as worker:
        async with connect(worker) as client:
            specs = [{**FACTORS, "num_tokens": str(size)} for size in (1, 2)]
            keys = [state.key for state in await client.request(*specs)]
            await client.until(keys, pb.GRAPH_PHASE_PUBLISHED)
            await asyncio.to_thread(damage, worker, url, keys[0])
            if by_hand:
                done = await asyncio.to_thread(cli, worker, "scrub")
                assert done.returncode == 1
                assert "2 artifacts read, 1 put aside" in done.stdout

            async def replaced() -> pb.GraphState:
                listed = await client.graphs.ListGraphs(pb.ListGraphsRequest(), timeout=30)
                [state] = [graph for graph in listed.graphs if graph.key == keys[0]]
                return state

            async with asyncio.timeout(20):
                while (state := await replaced()).version != 2:
                    await asyncio.sleep(0.05)
            assert len(state.put_aside) == 1
            assert "version 1: graph" in state.put_aside[0]
            assert "differs from its digest" in state.put_aside[0]
            shown = await asyncio.to_thread(cli, worker, "show", keys[0][:8], "--json")
            assert json.loads(shown.stdout)["put_aside"] == list(state.put_aside)
            listed = await asyncio.to_thread(cli, worker, "list")
            assert "1 put aside" in " ".join(listed.stdout.split())
            clean = await asyncio.to_thread(cli, worker, "scrub", "--json")
            assert json.loads(clean.stdout) == {"checked": 2, "damaged": []}
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            metrics = answer.read().decode()
        assert 'compile_worker_scrubbed_artifacts_total{result="damaged"} 1.0' in metrics


async def test_what_is_published_while_it_is_asked_for_is_not_made_again(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the store and the job: the job must be for what is there by then."""
    store = DiskStore(tmp_path / "store")
    registry = Registry.connect(redis_url, lease_ttl_s=30)
    graphs = await graphs_over(store, registry)
    untried = Versions.untried

    async def published_first(versions: Versions, key: str) -> bool:
        assert publish(store, tmp_path, num_tokens=1) == key
        return await untried(versions, key)

    monkeypatch.setattr(Versions, "untried", published_first)
    await graphs.request([{**FACTORS, "num_tokens": "1"}])
    [job] = await graphs.queue.jobs()
    assert job.version == 1
    assert await graphs.last_version(job.key) == 1  # so the job ends at once
    await registry.close()
