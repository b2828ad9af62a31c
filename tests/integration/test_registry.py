"""Leases in a real Redis, through its outages."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from precast.errors import ConfigError, RegistryUnavailable
from precast.fleet.heartbeat import Heartbeat
from precast.fleet.leases import CompileLease, DecodeLease, LoadedGraphRecord, Registry
from precast.system.redis_server import RedisServer, start_redis
from tests.support.nonsense_redis import WORDS, nonsense_redis
from tests.support.ports import free_port

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


def decode_lease(worker_id: str = "d1", running: int = 0) -> DecodeLease:
    return DecodeLease(
        worker_id=worker_id,
        address="127.0.0.1:7200",
        model="tiny",
        state="ready",
        running=running,
        max_batch_size=4,
        max_context_length=128,
        weight_dtype="fp32",
        quantization="int8",
        graphs=(LoadedGraphRecord(num_tokens=1, keys=("k0", "k1"), versions=(1, 2)),),
        captures_wanted=(2, 4),
    )


@pytest_asyncio.fixture
async def registry(redis_url: str) -> AsyncIterator[Registry]:
    registry = Registry.connect(redis_url)
    yield registry
    await registry.close()


async def eventually(check: Callable[[], Awaitable[bool]], deadline_s: float = 30.0) -> None:
    end = time.monotonic() + deadline_s
    while not await check():
        assert time.monotonic() < end, "deadline passed"
        await asyncio.sleep(0.02)


async def test_published_records_are_listed_by_kind(registry: Registry) -> None:
    await registry.publish(decode_lease("d2"))
    await registry.publish(decode_lease("d1", running=3))
    await registry.publish(CompileLease(worker_id="c1", address="127.0.0.1:7100", queued=5))
    assert await registry.decode_workers() == [decode_lease("d1", running=3), decode_lease("d2")]
    assert [worker.queued for worker in await registry.compile_workers()] == [5]
    await registry.withdraw(decode_lease("d1"))
    await registry.withdraw(decode_lease("d1"))
    assert [worker.worker_id for worker in await registry.decode_workers()] == ["d2"]


async def test_a_lease_that_is_not_renewed_expires(redis_url: str) -> None:
    registry = Registry.connect(redis_url, lease_ttl_s=0.2)
    await registry.publish(decode_lease())

    async def gone() -> bool:
        return await registry.decode_workers() == []

    assert not await gone()
    await eventually(gone)
    await registry.close()


async def test_unreadable_and_newer_records(registry: Registry) -> None:
    newer = decode_lease("new").model_dump_json()[:-1] + ', "field_of_a_later_version": 1}'
    await registry.redis.set("precast:lease:decode:new", newer)
    await registry.redis.set("precast:lease:decode:bad", b"\xff not json")
    assert [worker.worker_id for worker in await registry.decode_workers()] == ["new"]


WRONG: list[dict[str, object]] = [
    {"max_context_length": 10**9},
    {"max_context_length": 0},
    {"model": "../../x\n"},
    {"model": "tiny\n"},
    {"model": ""},
    {"model": "m" * 300},
    {"address": "nowhere"},
    {"address": "127.0.0.1:0"},
    {"address": "0.0.0.0:7200"},
    {"address": "127.0.0.1:7200\n"},
    {"worker_id": "somebody-else"},
    {"running": -1},
    {"max_batch_size": 10**7},
    {"state": "great"},
    {"tokenizer_digest": "d" * 100},
    {"captures_wanted": [1] * 5000},
    {"isa": "x" * (300 << 10)},
]


async def test_leases_are_checked_like_any_input(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    good = decode_lease("good")
    await registry.publish(good)
    for number, wrong in enumerate(WRONG):
        lease = {**decode_lease(f"w{number}").model_dump(mode="json"), **wrong}
        await registry.redis.set(f"precast:lease:decode:w{number}", json.dumps(lease))
    await registry.redis.lpush("precast:lease:decode:list", "x")
    await registry.redis.set(b"precast:lease:decode:\xff", "{}")
    capsys.readouterr()
    for _ in range(3):
        assert await registry.decode_workers() == [good]
    lines = [line for line in "".join(capsys.readouterr()).splitlines() if "lease ignored" in line]
    assert len(lines) == len(WRONG), "one line each, not one for every look"


async def test_other_keys_are_not_looked_through_at_every_look(registry: Registry) -> None:
    await registry.publish(decode_lease())
    await registry.decode_workers()
    before = (await registry.redis.info("commandstats")).get("cmdstat_scan", {"calls": 0})["calls"]
    for _ in range(10):
        assert len(await registry.decode_workers()) == 1
    after = (await registry.redis.info("commandstats"))["cmdstat_scan"]["calls"]
    assert after == before


async def test_expired_leases_leave_their_set(redis_url: str) -> None:
    registry = Registry.connect(redis_url, lease_ttl_s=0.1)
    await registry.publish(decode_lease())

    async def forgotten() -> bool:
        await registry.decode_workers()
        return not await registry.redis.exists("precast:leases:decode")

    await eventually(forgotten)
    await registry.close()


async def test_a_redis_that_refuses_writes_can_be_read(redis_url: str) -> None:
    registry = Registry.connect(redis_url, lease_ttl_s=0.2)
    await registry.publish(decode_lease())
    await registry.redis.config_set("maxmemory", "1")
    with pytest.raises(RegistryUnavailable, match="maxmemory"):
        await registry.publish(decode_lease())

    async def expired() -> bool:
        return await registry.decode_workers() == []

    await eventually(expired)
    await registry.close()


async def test_wrong_url_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="redis_url 'http://x'"):
        Registry.connect("http://x")


async def test_no_redis_is_reported_quickly() -> None:
    registry = Registry.connect(f"redis://127.0.0.1:{free_port()}/0")
    started = time.monotonic()
    with pytest.raises(RegistryUnavailable):
        await registry.decode_workers()
    assert time.monotonic() - started < 6
    await registry.close()


@pytest.mark.parametrize("words", WORDS)
async def test_what_is_no_redis_is_reported(words: bytes) -> None:
    async with nonsense_redis(words) as url:
        registry = Registry.connect(url)
        with pytest.raises(RegistryUnavailable):
            await registry.decode_workers()
        await registry.close()


async def test_a_redis_that_hangs_is_reported_in_bounded_time(redis_server: RedisServer) -> None:
    registry = Registry.connect(redis_server.url)
    await registry.ping()
    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(RegistryUnavailable):
            await registry.publish(decode_lease())
        assert time.monotonic() - started < 8
    finally:
        redis_server.process.send_signal(signal.SIGCONT)
    await registry.publish(decode_lease())
    await registry.close()


async def test_heartbeat_renews_follows_changes_and_withdraws(registry: Registry) -> None:
    load = {"running": 0}
    beat = Heartbeat(registry, lambda: decode_lease(running=load["running"]), interval_s=30)

    async def shows(running: int) -> bool:
        return [worker.running for worker in await registry.decode_workers()] == [running]

    async with beat:
        await eventually(lambda: shows(0))
        load["running"] = 7
        beat.publish_soon()
        await eventually(lambda: shows(7))
    assert await registry.decode_workers() == []


async def test_heartbeat_survives_the_death_of_redis(tmp_path: Path) -> None:
    port = free_port()
    first = start_redis(tmp_path / "first", port)
    registry = Registry.connect(first.url)

    async def alive() -> bool:
        return len(await registry.decode_workers()) == 1

    async with Heartbeat(registry, decode_lease, interval_s=0.05):
        await eventually(alive)
        first.process.kill()
        first.process.wait()
        with pytest.raises(RegistryUnavailable):
            await registry.decode_workers()
        with start_redis(tmp_path / "second", port):  # an empty one: the record must be put back
            await eventually(alive)
    await registry.close()


async def test_heartbeat_stops_in_bounded_time_without_redis(redis_server: RedisServer) -> None:
    registry = Registry.connect(redis_server.url)
    beat = Heartbeat(registry, decode_lease)
    beat.start()
    redis_server.process.kill()
    redis_server.process.wait()
    await asyncio.wait_for(beat.stop(), 5)
    await registry.close()
