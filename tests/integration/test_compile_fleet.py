"""Compile workers and Redis killed at bad moments; several workers at once."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.disk_store import TEMPORARY, DiskStore
from precast.graphs.artifacts.fetch import fetch_graph
from precast.graphs.artifacts.signing import TrustedKeys
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from precast.system.redis_server import RedisServer, loopback_port, start_redis
from tests.support.compile_worker import (
    FACTORS,
    WorkerProcess,
    compile_worker,
    connect,
    starts,
    wait_until,
)

pytestmark = pytest.mark.asyncio
PUBLISHED = pb.GRAPH_PHASE_PUBLISHED


def spec(how: str = "llama", num_tokens: int = 1) -> dict[str, str]:
    return {**FACTORS, "architecture": how, "num_tokens": str(num_tokens)}


async def until(condition: Callable[[], Any], deadline_s: float = 60.0) -> Any:
    return await asyncio.to_thread(wait_until, condition, deadline_s)


def open_gate(ledger: Path) -> None:
    (ledger / "open").touch()


def whole(store: DiskStore, key: str) -> list[int]:
    """The key's versions, each checked in full; nothing half-written lies about."""
    for version in store.versions(key):
        store.open(key, version)
    return store.versions(key)


def logs(home: Path) -> list[Path]:
    """Of the workers."""
    return list(home.glob("worker-*.log"))


def leftovers(home: Path) -> list[Path]:
    folders = [home / "store" / TEMPORARY, home / "captures"]
    return [path for folder in folders if folder.exists() for path in folder.iterdir()]


async def test_killed_workers_job_is_done_by_the_next(tmp_path: Path, redis_url: str) -> None:
    home, ledger = tmp_path / "home", tmp_path / "ledger"
    with compile_worker(home, redis_url, ledger) as first:
        async with connect(first) as client:
            [state] = await client.request(spec("gated"))
            await until(lambda: starts(ledger))
            first.kill()
    [pid, *_] = starts(ledger)[0]
    await until(lambda: not psutil.pid_exists(int(pid)))
    assert leftovers(home), "the killed capture left its folder"
    open_gate(ledger)
    with compile_worker(home, redis_url, ledger) as second:
        async with connect(second) as client:
            [again] = await client.request(spec("gated"))
            assert again.key == state.key
            done = await client.until([state.key], PUBLISHED)
        await until(lambda: leftovers(home) == [])
    assert done[state.key].version == 1
    assert whole(DiskStore(home / "store"), state.key) == [1]
    assert len(starts(ledger)) == 2


async def test_workers_that_share_a_store_capture_a_key_once(
    tmp_path: Path, redis_url: str
) -> None:
    home, ledger = tmp_path / "home", tmp_path / "ledger"
    specs = [spec(num_tokens=size) for size in range(1, 13)]
    ledger.mkdir()
    (ledger / "closed").touch()
    with (
        compile_worker(home, redis_url, ledger) as one,
        compile_worker(home, redis_url, ledger) as two,
    ):
        async with connect(one) as first, connect(two) as second:
            states, others = await asyncio.gather(first.request(*specs), second.request(*specs))
            keys = [state.key for state in states]
            assert keys == [state.key for state in others]
            await until(lambda: all("capture claimed" in log.read_text() for log in logs(home)))
            open_gate(ledger)
            # each hears of all of them, whoever captured
            await asyncio.gather(first.until(keys, PUBLISHED), second.until(keys, PUBLISHED))
    sizes = [int(size) for _, _, size in starts(ledger)]
    assert sorted(sizes) == list(range(1, 13))
    assert all(whole(DiskStore(home / "store"), key) == [1] for key in keys)


async def test_living_worker_takes_over_from_a_killed_one(tmp_path: Path, redis_url: str) -> None:
    home, ledger = tmp_path / "home", tmp_path / "ledger"
    with compile_worker(home, redis_url, ledger) as one:
        async with connect(one) as client:
            [state] = await client.request(spec("gated"))
        await until(lambda: starts(ledger))
        with compile_worker(home, redis_url, ledger) as two:
            one.kill()
            open_gate(ledger)
            async with connect(two) as client:
                await client.until([state.key], PUBLISHED)
    assert whole(DiskStore(home / "store"), state.key) == [1]
    assert len(starts(ledger)) == 2


async def test_suspended_worker_that_comes_back_publishes_nothing(
    tmp_path: Path, redis_url: str
) -> None:
    home, ledger = tmp_path / "home", tmp_path / "ledger"
    with compile_worker(home, redis_url, ledger) as one:
        async with connect(one) as client:
            [state] = await client.request(spec("gated"))
        await until(lambda: starts(ledger))
        os.kill(one.process.pid, signal.SIGSTOP)  # its lease expires, its capture goes on
        with compile_worker(home, redis_url, ledger) as two:
            open_gate(ledger)
            async with connect(two) as client:
                await client.until([state.key], PUBLISHED)
            os.kill(one.process.pid, signal.SIGCONT)
            async with connect(one) as client:
                await client.until([state.key], PUBLISHED)
                await until(lambda: "capture ended" in one.log.read_text())
    assert '"outcome": "lost"' in one.log.read_text()
    assert whole(DiskStore(home / "store"), state.key) == [1]


class Redis:
    """A Redis that a test kills and starts again at the same address."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.server: RedisServer = start_redis(folder)
        self.url = self.server.url

    def kill(self) -> None:
        self.server.process.send_signal(signal.SIGKILL)
        self.server.process.wait()

    def start(self, *, empty: bool) -> None:
        if empty:
            for path in self._folder.glob("dump.rdb"):
                path.unlink()
        self.server = start_redis(self._folder, loopback_port(self.url) or 0)

    def rows(self, name: str) -> int:
        with redis.Redis.from_url(self.url) as client:
            return int(client.execute_command("HLEN", name))


@pytest.mark.parametrize("empty", [False, True])
async def test_killed_redis_costs_nothing(tmp_path: Path, empty: bool) -> None:
    home, ledger = tmp_path / "home", tmp_path / "ledger"
    server = await asyncio.to_thread(Redis, tmp_path / "redis")
    with compile_worker(home, server.url, ledger) as worker:
        async with connect(worker) as client:
            [here] = await client.request(spec())
            await client.until([here.key], PUBLISHED)
            gated = [spec("gated"), spec("gated", 2)]
            keys = [state.key for state in await client.request(*gated)]
            await until(lambda: len(starts(ledger)) == 2)
            await asyncio.to_thread(server.kill)
            await serves_without_redis(client, worker, tmp_path, here.key)
            open_gate(ledger)
            # the running capture is published while Redis is away
            await client.until(keys[:1], PUBLISHED)
            await asyncio.to_thread(server.start, empty=empty)
            # workers ask again, as they do every now and then, until they have all
            await until(lambda: server.rows("precast:graphs") >= 2)
            await client.request(spec(), *gated)
            await client.until([here.key, *keys], PUBLISHED)
            await until(lambda: server.rows("precast:graphs") == 3)
    store = DiskStore(home / "store")
    assert [whole(store, key) for key in (here.key, *keys)] == [[1], [1], [1]]
    assert len(starts(ledger)) == 3
    server.server.stop()


async def serves_without_redis(
    client: Any, worker: WorkerProcess, tmp_path: Path, key: str
) -> None:
    cache = GraphCache(tmp_path / "cache", TrustedKeys.load(worker.home / "keys" / "trusted"))
    fetched = await fetch_graph(client.graphs, cache, key, spec=spec())
    assert fetched.manifest.key == key
    known, unknown = await client.request(spec(), spec(num_tokens=7))
    assert known.phase == PUBLISHED
    assert unknown.phase == pb.GRAPH_PHASE_FAILED
    assert "ask again: Redis" in unknown.error
    assert len((await client.graphs.ListGraphs(pb.ListGraphsRequest(), timeout=30)).graphs) >= 1


async def test_worker_starts_and_serves_with_redis_away(tmp_path: Path) -> None:
    home, ledger = tmp_path / "home", tmp_path / "ledger"
    server = await asyncio.to_thread(Redis, tmp_path / "redis")
    with compile_worker(home, server.url, ledger) as worker:
        async with connect(worker) as client:
            [state] = await client.request(spec())
            await client.until([state.key], PUBLISHED)
    server.kill()
    with compile_worker(home, server.url, ledger) as worker:
        async with connect(worker) as client:
            await serves_without_redis(client, worker, tmp_path, state.key)


async def test_kills_at_many_moments_lose_and_double_nothing(
    tmp_path: Path, redis_url: str
) -> None:
    """Workers are killed one after the other, each a little later in its work."""
    home, ledger = tmp_path / "home", tmp_path / "ledger"
    specs = [spec(num_tokens=size) for size in range(1, 9)]
    keys: list[str] = []
    for work_s in (0.0, 0.06, 0.13, 0.3):
        with compile_worker(home, redis_url, ledger) as worker:
            async with connect(worker) as client:
                keys = [state.key for state in await client.request(*specs)]
            await asyncio.sleep(work_s)
            worker.kill()
    with compile_worker(home, redis_url, ledger) as worker:
        async with connect(worker) as client:
            await client.request(*specs)
            await client.until(keys, PUBLISHED, deadline_s=60)
        await until(lambda: leftovers(home) == [])
    store = DiskStore(home / "store")
    assert store.published_keys() == sorted(keys)
    assert all(whole(store, key) == [1] for key in keys)
