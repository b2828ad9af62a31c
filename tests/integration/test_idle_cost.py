"""What idle graphs and candidates cost: the same for none and for many."""

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import redis

from precast.fleet.leases import connect_redis
from precast.graphs.artifacts.versions import Lifecycle, Verdict
from precast.graphs.key import KEY_LENGTH
from services.compile_worker.catalog import index as indexing
from services.compile_worker.catalog.entry import GraphRecord, Phase
from services.compile_worker.catalog.events import Changes
from services.compile_worker.catalog.index import COUNTER, GraphIndex
from services.compile_worker.rollout.canary import Agenda, Canaries, CanaryPolicy

pytestmark = pytest.mark.asyncio
WATCHED_S = 1.0


NOTHING = Lifecycle()


def record(number: int, lifecycle: Lifecycle = NOTHING) -> GraphRecord:
    key = f"{number:0{KEY_LENGTH}x}"
    return GraphRecord(key=key, phase=Phase.PUBLISHED, factors={}, version=1, lifecycle=lifecycle)


def commands(client: "redis.Redis") -> dict[str, int]:
    """Calls of each command since the counters were reset, but for those that look at them."""
    rows: Any = client.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): row["calls"] for name, row in rows.items()}
    return {
        name: n for name, n in calls.items() if name not in ("info", "config", "config|resetstat")
    }


async def idle_commands(redis_url: str, count: int) -> dict[str, int]:
    client = connect_redis(redis_url)
    index = GraphIndex(client)
    for number in range(count):
        await index.put(record(number))
    running = asyncio.create_task(index.run())
    await asyncio.sleep(4 * indexing.RECONCILE_INTERVAL_S)  # it sees its own writes once
    with redis.Redis.from_url(redis_url) as observer:
        observer.config_resetstat()
        await asyncio.sleep(WATCHED_S)
        found = commands(observer)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await client.aclose()
    return found


async def test_the_index_costs_the_same_with_many_graphs(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "RECONCILE_INTERVAL_S", 0.1)
    few, many = await idle_commands(redis_url, 1), await idle_commands(redis_url, 200)
    assert few.keys() == many.keys() == {"get"}  # of one counter
    assert max(few["get"], many["get"]) <= WATCHED_S / 0.1 + 2


async def test_what_redis_lost_comes_back(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "RECONCILE_INTERVAL_S", 0.05)
    client = connect_redis(redis_url)
    one, other = GraphIndex(client), GraphIndex(client)
    await one.put(record(1))
    tasks = [asyncio.create_task(index.run()) for index in (one, other)]
    with redis.Redis.from_url(redis_url) as direct:
        await asyncio.sleep(0.5)
        direct.flushall()
        async with asyncio.timeout(30):
            while not direct.exists(COUNTER) or not direct.hlen(indexing.HASH):
                await asyncio.sleep(0.02)
        one.restore(record(2))  # known to the store alone
        async with asyncio.timeout(30):
            while other.get(record(2).key) is None:
                await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()


class Store:
    """What candidates ask of index and store; counts the looks at the store."""

    def __init__(self, records: list[GraphRecord]) -> None:
        self.looks = 0
        self.index = self
        self.changes = Changes()
        self._records = {each.key: each for each in records}

    def records(self) -> list[GraphRecord]:
        return list(self._records.values())

    def get(self, key: str) -> GraphRecord | None:
        return self._records.get(key)

    async def standing(self, key: str) -> Any:
        self.looks += 1
        return type("Standing", (), {"there": [], "serving": 0})()


async def looks(records: list[GraphRecord], seconds: float) -> int:
    store: Any = Store(records)
    registry: Any = None
    policy = CanaryPolicy(steps=1, live_s=1.0, max_slowdown=0.25)
    canaries = Canaries(versions=store, registry=registry, policy=policy)
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await canaries.run()
    return int(store.looks)


async def test_graphs_without_a_candidate_are_not_looked_at() -> None:
    good = Lifecycle().marked(1, Verdict.GOOD)
    assert await looks([record(number, good) for number in range(200)], 0.5) == 0


async def test_a_candidate_that_waits_is_looked_at_ever_more_rarely() -> None:
    candidate = Lifecycle().marked(2, Verdict.CANDIDATE)
    assert 2 <= await looks([record(1, candidate)], 1.0) <= 5


async def test_looks_grow_rare_and_a_change_starts_anew() -> None:
    now = 0.0
    agenda = Agenda(clock=lambda: now)
    waiting = record(1, Lifecycle().marked(2, Verdict.CANDIDATE))
    agenda.renew(waiting)
    taken = []
    while now < 3600:
        if agenda.due():
            taken.append(now)
            agenda.looked(waiting, waiting.key)
        now += agenda.wait_s() or 0.001
    assert len(taken) < 3600 / 2.5 + 10  # where five a second were 18,000
    agenda.renew(waiting)
    assert agenda.due() == [waiting.key]
    agenda.looked(record(1), waiting.key)
    assert agenda.wait_s() is None
