"""The capture queue against a real Redis: single flight, takeover, cancellation, loss of data."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from precast.errors import JobNotFound, Overloaded, RegistryUnavailable
from precast.fleet.leases import Registry
from precast.fleet.queue.job import Job, Stage, new_job, replace_job
from precast.fleet.queue.queue import HISTORY, CaptureQueue, Claim, Hold
from precast.system.redis_server import RedisServer, loopback_port, start_redis

pytestmark = pytest.mark.asyncio
TTL_S = 0.6


def job(key: str = "a" * 32, *, num_tokens: int = 1, version: int = 1) -> Job:
    return new_job(key, {"num_tokens": str(num_tokens)}, num_tokens=num_tokens, version=version)


@pytest_asyncio.fixture
async def registry(redis_url: str) -> AsyncIterator[Registry]:
    registry = Registry.connect(redis_url)
    yield registry
    await registry.close()


@pytest.fixture
def queue(registry: Registry) -> CaptureQueue:
    return CaptureQueue(registry.redis, "build", lease_ttl_s=TTL_S, max_queued=5)


async def claimed(queue: CaptureQueue, consumer: str = "one", deadline_s: float = 5.0) -> Claim:
    async with asyncio.timeout(deadline_s):
        while True:
            claim = await queue.claim(consumer)
            if claim:
                return claim


async def unclaimed(queue: CaptureQueue, consumer: str = "two", tries: int = 3) -> bool:
    return not any([await queue.claim(consumer) for _ in range(tries)])


def ended(claim: Claim, stage: Stage = Stage.PUBLISHED) -> Claim:
    done = replace_job(claim.job, stage=stage, ended_at=time.time())
    return Claim(job=done, entry=claim.entry, token=claim.token)


async def test_a_key_has_one_active_job(queue: CaptureQueue) -> None:
    first = await queue.enqueue(job())
    assert await queue.enqueue(job()) == first
    assert await queue.length() == 1
    claim = await claimed(queue)
    assert (claim.job.id, claim.job.worker, claim.job.attempts) == (first.id, "one", 1)
    assert (await queue.enqueue(job())).id == first.id
    assert await queue.finish(ended(claim))
    assert (await queue.enqueue(job())).id != first.id


async def test_jobs_come_in_the_order_of_their_requests(queue: CaptureQueue) -> None:
    made = [await queue.enqueue(job(letter * 32)) for letter in "cab"]
    assert [(await claimed(queue)).job.id for _ in made] == [each.id for each in made]


async def test_what_is_missed_most_comes_first(queue: CaptureQueue) -> None:
    urgencies = {"a": 0, "b": 3, "c": 70, "d": 3, "e": 0}
    made = {k: await queue.enqueue(job(k * 32), urgency=n) for k, n in urgencies.items()}
    again = await queue.enqueue(job("e" * 32), urgency=5)
    assert again.id == made["e"].id, "it waits already, and becomes urgent"
    await queue.enqueue(job("c" * 32), urgency=1)  # somebody who misses it less
    claims = [await claimed(queue) for _ in made]
    assert [claim.job.key[0] for claim in claims] == ["c", "e", "b", "d", "a"]
    assert [claim.job.attempts for claim in claims] == [1] * 5
    for claim in claims:
        assert await queue.renew(claim, "one") is Hold.HELD
        await queue.finish(ended(claim))
    assert await unclaimed(queue)
    assert await queue.length() == 0


async def test_urgent_job_of_a_dead_worker_is_taken_over_once(
    queue: CaptureQueue, registry: Registry
) -> None:
    await queue.enqueue(job("b" * 32))
    made = await queue.enqueue(job(), urgency=9)
    lost = await claimed(queue, "dead")
    assert lost.job.id == made.id
    await queue.enqueue(job(), urgency=99)  # missed all the same while it is captured
    first = await claimed(queue, "two")
    assert first.job.key == "b" * 32, "what is being captured is not claimed again"
    assert await unclaimed(queue, tries=1)
    await queue.finish(ended(first))
    taken = await claimed(queue, "two")
    assert (taken.job.id, taken.job.attempts) == (made.id, 1)
    assert not await queue.finish(ended(lost))
    assert await queue.finish(ended(taken))
    assert await unclaimed(queue)
    rows = await registry.redis.keys("precast:jobs:build*")
    left = [await registry.redis.type(row) for row in rows]
    assert left == [b"stream"], "no set or hash is left behind"


async def test_urgent_job_is_cancelled_like_any_other(queue: CaptureQueue) -> None:
    made = await queue.enqueue(job(), urgency=4)
    assert (await queue.cancel(made.id)).stage is Stage.CANCELLED
    assert await unclaimed(queue)
    assert (await queue.enqueue(job(), urgency=1)).id != made.id


async def test_two_workers_share_urgent_jobs(queue: CaptureQueue) -> None:
    for number, letter in enumerate("abcde"):
        await queue.enqueue(job(letter * 32), urgency=number)
    taken: list[str] = []

    async def work(consumer: str) -> None:
        while len(taken) < 5:
            claim = await queue.claim(consumer)
            if claim:
                taken.append(claim.job.key)
                await asyncio.sleep(0.05)
                assert await queue.renew(claim, consumer) is Hold.HELD
                assert await queue.finish(ended(claim))

    async with asyncio.timeout(10):
        await asyncio.gather(work("one"), work("two"), work("three"))
    assert sorted(taken) == [letter * 32 for letter in "abcde"]


async def test_full_queue_says_so(queue: CaptureQueue) -> None:
    for letter in "abcde":
        await queue.enqueue(job(letter * 32))
    with pytest.raises(Overloaded, match="5 jobs"):
        await queue.enqueue(job("f" * 32))
    assert (await queue.enqueue(job("a" * 32))).key == "a" * 32


async def test_renewed_claim_stays_and_an_abandoned_one_is_taken_over(queue: CaptureQueue) -> None:
    made = await queue.enqueue(job())
    claim = await claimed(queue)
    for _ in range(4):
        await asyncio.sleep(TTL_S / 2)
        assert await queue.renew(claim, "one") is Hold.HELD
    assert await unclaimed(queue, tries=1)
    taken = await claimed(queue, "two")  # "one" renews no more
    assert (taken.job.id, taken.job.attempts, taken.job.worker) == (made.id, 2, "two")
    assert await queue.renew(claim, "one") is Hold.LOST
    assert not await queue.finish(ended(claim, Stage.FAILED)), "a lost claim can't end the job"
    assert await queue.finish(ended(taken))
    assert (await queue.get(made.id)).stage is Stage.PUBLISHED


async def test_attempts_count_the_claims_that_were_recorded(queue: CaptureQueue) -> None:
    await queue.enqueue(job())
    for attempt in (1, 2, 3):
        claim = await claimed(queue, f"worker-{attempt}")
        assert claim.job.attempts == attempt
        assert await queue.renew(claim, f"worker-{attempt}") is Hold.HELD


async def test_two_listeners_share_the_work_without_doing_any_twice(queue: CaptureQueue) -> None:
    made = {(await queue.enqueue(job(letter * 32))).id for letter in "abcde"}
    done: list[str] = []

    async def listen(name: str) -> None:
        while len(done) < len(made):
            claim = await queue.claim(name)
            if claim:
                done.append(claim.job.id)
                await queue.finish(ended(claim))

    async with asyncio.timeout(10):
        await asyncio.gather(*(listen(name) for name in ("one", "two", "three")))
    assert sorted(done) == sorted(made)


async def test_other_tool_chains_do_not_see_the_job(
    queue: CaptureQueue, registry: Registry
) -> None:
    await queue.enqueue(job())
    other = CaptureQueue(registry.redis, "another build", lease_ttl_s=TTL_S)
    assert await unclaimed(other)
    assert await claimed(queue)


async def test_queued_job_is_cancelled_at_once(queue: CaptureQueue) -> None:
    made = await queue.enqueue(job())
    cancelled = await queue.cancel(made.id)
    assert cancelled.stage is Stage.CANCELLED
    assert cancelled.ended_at > 0
    assert await unclaimed(queue)
    assert await queue.length() == 0
    assert await queue.cancel(made.id) == cancelled
    assert (await queue.enqueue(job())).id != made.id


async def test_running_job_learns_of_its_cancellation(queue: CaptureQueue) -> None:
    made = await queue.enqueue(job())
    claim = await claimed(queue)
    assert (await queue.cancel(made.id)).stage is not Stage.CANCELLED
    assert await queue.renew(claim, "one") is Hold.CANCELLED
    await queue.finish(ended(claim, Stage.CANCELLED))
    assert (await queue.get(made.id)).stage is Stage.CANCELLED


async def test_unknown_job(queue: CaptureQueue) -> None:
    for call in (queue.get, queue.cancel):
        with pytest.raises(JobNotFound, match="nothing"):
            await call("nothing")


async def test_history_is_bounded(queue: CaptureQueue) -> None:
    for number in range(HISTORY + 10):
        await queue.enqueue(job(f"{number:032x}"))
        await queue.finish(ended(await claimed(queue)))
    jobs = await queue.jobs()
    assert len(jobs) == HISTORY
    assert jobs[-1].key == f"{HISTORY + 9:032x}"


async def test_holder_puts_its_job_back_after_a_loss_of_all_data(
    queue: CaptureQueue, registry: Registry
) -> None:
    made = await queue.enqueue(job())
    claim = await claimed(queue)
    await registry.redis.flushall()
    assert await queue.renew(claim, "one") is Hold.HELD
    assert (await queue.enqueue(job())).id == made.id, "still one job for the key"
    assert await unclaimed(queue, tries=1)
    # the holder dies now: its job must come up again
    taken = await claimed(queue, "two")
    assert taken.job.id == made.id
    await queue.finish(ended(taken))
    assert await unclaimed(queue)


async def test_queue_survives_a_killed_redis(tmp_path: Path) -> None:
    server: RedisServer = await asyncio.to_thread(start_redis, tmp_path / "redis")
    port = loopback_port(server.url)
    assert port
    registry = Registry.connect(server.url)
    queue = CaptureQueue(registry.redis, "build", lease_ttl_s=TTL_S)
    for letter in "ab":
        await queue.enqueue(job(letter * 32))
    claim = await claimed(queue)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    for call in (queue.claim("one"), queue.renew(claim, "one"), queue.finish(claim), queue.jobs()):
        with pytest.raises(RegistryUnavailable):
            await call
    # what the last snapshot did not have is gone: whoever wants a graph asks again
    with await asyncio.to_thread(start_redis, tmp_path / "redis", port):
        assert await queue.renew(claim, "one") is not Hold.CANCELLED
        await queue.finish(ended(claim))
        again = await queue.enqueue(job("b" * 32))
        assert (await claimed(queue)).job.id == again.id
    await registry.close()


async def test_names_of_dead_workers_are_forgotten(
    queue: CaptureQueue, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.forget_dead_consumers()  # nothing there yet
    await queue.enqueue(job())
    await claimed(queue, "busy")
    await queue.claim("idle")
    monkeypatch.setattr("precast.fleet.queue.queue._FORGET_CONSUMER_MS", -1)
    await queue.forget_dead_consumers()
    rows = await registry.redis.xinfo_consumers("precast:jobs:build", "compile")
    assert [row["name"] for row in rows] == [b"busy"]
