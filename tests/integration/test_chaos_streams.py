"""Streams whose workers end in every way there is; ``make chaos-streams`` has 500 of them."""

import asyncio
from pathlib import Path

import pytest

from precast.system.redis_server import start_redis
from tests.support.chaos_streams import Fleet, again_and_again, answers, bodies, fleet
from tests.support.decode_worker import DecodeWorker, eventually

STREAMS = 16
TOKENS = 200


@pytest.mark.timeout(120)
def test_streams_outlive_their_workers(tmp_path: Path) -> None:
    """One worker hangs, is killed for it and comes back; meanwhile another one is killed, a third
    one's ranks are, and those that are back are drained."""
    asked = bodies(STREAMS, TOKENS)
    with start_redis(tmp_path / "redis") as redis, fleet(tmp_path, redis.url) as running:
        expected = asyncio.run(answers(running, asked))
        count = asyncio.run(again_and_again(running, asked, expected, lambda: strike(running)))
        assert running.retries("resumptions") > 4
        assert running.faults.total() == 4
    assert count > STREAMS


def strike(running: Fleet) -> None:
    begun = [steps(worker) for worker in running.workers]
    # else streams would be struck that have no tokens yet, and begin anew
    eventually(lambda: all(steps(w) > n + 16 for w, n in zip(running.workers, begun, strict=True)))
    before = running.retries()
    assert running.strike("worker stopped", 0)
    assert running.strike("worker killed", 1)
    eventually(lambda: running.retries() > before)
    eventually(running.workers[1].is_ready)
    assert running.strike("rank killed", 2)
    eventually(running.ready)
    assert running.strike("drained", 2)


def steps(worker: DecodeWorker) -> int:
    status = worker.status()
    return int(status.eager_steps + status.graph_steps)
