"""What API keys have used, as gateways count it in a real Redis."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator

import pytest

from precast.access.api_keys import ApiKey
from precast.fleet.leases import connect_redis
from services.gateway.access import quota as quotas
from services.gateway.access.quota import Quota, Ticket
from tests.support.nonsense_redis import WORDS, nonsense_redis

KEY = ApiKey(id="0" * 12, name="ann", digest="0" * 64, created=0)
DEADLINE_S = 30


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "LEASE_S", 2)
    monkeypatch.setattr(quotas, "_RENEW_S", 0.1)


@pytest.fixture
async def doors(redis_url: str) -> AsyncIterator[tuple[Quota, Quota]]:
    """Of two gateways."""
    both = Quota(redis_url), Quota(redis_url)
    yield both
    for one in both:
        await one.close()


def key(number: int, **limits: int) -> ApiKey:
    return KEY.model_copy(update={"id": f"{number:012x}", **limits})


async def entered(door: Quota, whose: ApiKey, expected: int = 0) -> Ticket:
    ticket = Ticket(key=whose)
    assert await door.enter(ticket, expected) is None
    return ticket


async def refused(door: Quota, whose: ApiKey, limit: str) -> bool:
    ticket = Ticket(key=whose)
    answer = await door.enter(ticket)
    await door.leave(ticket)
    if answer is None:
        return False
    assert answer.limit == limit
    assert 1 <= answer.retry_after_s <= 60
    return True


async def until_refused(door: Quota, whose: ApiKey, limit: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await refused(door, whose, limit):
            await asyncio.sleep(0.05)


async def test_clocks_of_gateways_do_not_count(
    doors: tuple[Quota, Quota], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is an hour ahead, the other one behind."""
    if (left := 60 - time.time() % 60) < 2:  # counts start anew with each minute
        await asyncio.sleep(left)
    real, whose = time.time, key(1, max_concurrent=2, requests_per_minute=3)
    shifts = {doors[0]: 3600.0, doors[1]: -3600.0}
    tickets = []
    for door, shift in shifts.items():
        monkeypatch.setattr(time, "time", lambda shift=shift: real() + shift)
        tickets.append(await entered(door, whose))
    for door in doors:
        assert await refused(door, whose, "concurrent requests")
    for door, ticket in zip(doors, tickets, strict=True):
        await door.leave(ticket)
    await doors[0].leave(await entered(doors[0], whose))
    assert await refused(doors[1], whose, "requests per minute")


async def test_what_runs_counts_until_it_ends(doors: tuple[Quota, Quota]) -> None:
    """Longer than its lease, which is renewed; and not a moment more."""
    whose = key(2, max_concurrent=1)
    ticket = await entered(doors[0], whose)
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        assert await refused(doors[1], whose, "concurrent requests")
        await asyncio.sleep(0.1)
    for _ in range(20):  # whatever is renewed meanwhile
        await doors[0].leave(ticket)
        ticket = await entered(doors[1], whose)
        doors = doors[1], doors[0]
        await asyncio.sleep(0.02)


async def test_a_gateway_that_is_gone_gives_back_what_it_held(redis_url: str) -> None:
    whose = key(3, max_concurrent=1)
    gone, left = Quota(redis_url), Quota(redis_url)
    await entered(gone, whose)
    assert await refused(left, whose, "concurrent requests")
    await gone.close()
    async with asyncio.timeout(DEADLINE_S):
        while await refused(left, whose, "concurrent requests"):
            await asyncio.sleep(0.1)
    await left.close()


async def test_tokens_count_while_they_come(doors: tuple[Quota, Quota]) -> None:
    whose = key(4, tokens_per_minute=100)
    ticket = await entered(doors[0], whose)
    assert not await refused(doors[1], whose, "tokens per minute")
    used = itertools.count(100, 100)
    ticket.usage.follow(lambda: next(used))  # more and more: a minute may end amid this
    await until_refused(doors[1], whose, "tokens per minute")
    await doors[0].leave(ticket)


async def test_a_redis_that_is_away_refuses_nobody_and_is_not_waited_for() -> None:
    away = Quota("redis://127.0.0.1:1/0")
    began = time.monotonic()
    for _ in range(50):
        await away.leave(await entered(away, key(5, requests_per_minute=1)))
    assert time.monotonic() - began < 5
    await away.close()


def use(ticket: Ticket, tokens: int) -> None:
    ticket.usage.follow(lambda: tokens)


async def enter_at_once(doors: tuple[Quota, Quota], whose: ApiKey, expected: int) -> list[Ticket]:
    """A hundred requests, half of them at each; those that got in."""
    tickets = [Ticket(key=whose) for _ in range(100)]
    asked = [doors[n % 2].enter(one, expected) for n, one in enumerate(tickets)]
    answers = await asyncio.gather(*asked)
    return [one for one, refusal in zip(tickets, answers, strict=True) if refusal is None]


async def test_a_burst_passes_the_limit_by_one_request_at_most(
    doors: tuple[Quota, Quota], redis_url: str
) -> None:
    whose = key(6, tokens_per_minute=1000)
    inside = await enter_at_once(doors, whose, 150)
    assert len(inside) == 7
    for ticket in inside:
        use(ticket, 20)
        await doors[0 if ticket.id in doors[0]._running else 1].leave(ticket)
    assert len(await enter_at_once(doors, whose, 150)) in (6, 7)  # 140 were used, this minute


async def test_what_was_expected_and_is_used_counts_once(doors: tuple[Quota, Quota]) -> None:
    """While it runs, after its renewals, and when it has ended with less."""
    whose = key(7, tokens_per_minute=200)
    if (left := 60 - time.time() % 60) < 3:  # counts start anew with each minute
        await asyncio.sleep(left)
    ticket = await entered(doors[0], whose, 199)
    use(ticket, 150)
    async with asyncio.timeout(DEADLINE_S):
        while ticket.charged != 150:
            await asyncio.sleep(0.02)
    assert not await refused(doors[1], whose, "tokens per minute")
    other = await entered(doors[1], whose, 1)
    assert await refused(doors[1], whose, "tokens per minute")
    await doors[0].leave(ticket)
    assert not await refused(doors[1], whose, "tokens per minute")
    await doors[1].leave(other)


async def test_what_a_gateway_that_is_gone_expected_comes_back(redis_url: str) -> None:
    whose = key(8, tokens_per_minute=100)
    gone, left = Quota(redis_url), Quota(redis_url)
    await entered(gone, whose, 100)
    assert await refused(left, whose, "tokens per minute")
    assert left.refused(whose) is None  # it may be over soon
    await gone.close()
    async with asyncio.timeout(DEADLINE_S):
        while await refused(left, whose, "tokens per minute"):
            await asyncio.sleep(0.1)
    await left.close()


async def test_what_is_used_up_is_known_without_asking_until_the_minute_ends(
    doors: tuple[Quota, Quota],
) -> None:
    whose = key(9, tokens_per_minute=100)
    while doors[0].refused(whose) is None:
        ticket = Ticket(key=whose)
        if await doors[0].enter(ticket) is None:
            use(ticket, 100)
            await doors[0].leave(ticket)
    known = doors[0].refused(whose)
    assert known is not None
    assert known.limit == "tokens per minute"
    assert 0 < known.sure_until - time.monotonic() <= 60
    assert doors[0].refused(whose.model_copy(update={"tokens_per_minute": 200})) is None


async def test_a_request_asks_redis_twice(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "_RENEW_S", 60.0)
    door, whose = Quota(redis_url), key(10, tokens_per_minute=10**6)
    await door.leave(await entered(door, whose, 10))  # scripts are loaded
    async with connect_redis(redis_url, timeout_s=5) as watching:
        before = await watching.info("commandstats")
        for _ in range(10):
            ticket = await entered(door, whose, 10)
            use(ticket, 5)
            await door.leave(ticket)
        after = await watching.info("commandstats")
    calls = [stats["cmdstat_evalsha"]["calls"] for stats in (before, after)]
    assert calls[1] - calls[0] == 20
    await door.close()


@pytest.mark.parametrize("words", WORDS)
async def test_what_is_no_redis_refuses_nobody(words: bytes) -> None:
    async with nonsense_redis(words) as url:
        door = Quota(url)
        await door.leave(await entered(door, key(11, tokens_per_minute=1), 5))
        await door.close()
