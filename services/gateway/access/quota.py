"""What API keys have used, counted in Redis, so that all gateways agree.

Requests and tokens are counted by calendar minute, and requests that run are a sorted set of leases
that their gateways renew: those of a gateway that died end soon. A request that runs holds the
tokens that it is expected to use and has not yet, so that many at once can't pass the limit. It is
Redis' clock that counts, for those of gateways may differ. While Redis is away limits don't hold:
it is the requests that must not fail then.
"""

import asyncio
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from precast.access.api_keys import ApiKey
from precast.fleet.leases import REDIS_FAILURES, connect_redis
from precast.log import get_logger
from services.gateway.access.quota_scripts import ADMIT, RENEW
from services.gateway.usage import Usage

log = get_logger(__name__)

LEASE_S: Final = 20
"""How long a request counts as running after its gateway was heard of last."""
_RENEW_S: Final = 5.0
_TIMEOUT_S: Final = 0.5
_SPARED_S: Final = 1.0
"""How long Redis is not asked after it failed: where it hangs, each request would wait for it."""
_UNLIMITED: Final = -1
_REFUSALS: Final = ("", "concurrent requests", "requests per minute", "tokens per minute")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a key's request has to wait."""

    limit: str
    retry_after_s: int
    sure_until: float
    """Until when (monotonic, s) the key's other requests would be told the same."""


@dataclass(kw_only=True, eq=False)
class Ticket:
    """A request that counts while it runs."""

    key: ApiKey
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    usage: Usage = field(default_factory=Usage)
    expected: int = 0
    """Tokens that it will use, as far as is known."""
    charged: int = 0
    """Of its tokens, those that are in Redis."""
    asked: bool = False
    """Whether it was let in, or refused."""

    @property
    def limits(self) -> tuple[int | None, ...]:
        """Of requests that run, of requests and of tokens in a minute."""
        key = self.key
        return key.max_concurrent, key.requests_per_minute, key.tokens_per_minute


class Quota:
    """Admits requests of keys, and counts what they used."""

    def __init__(self, redis_url: str) -> None:
        self._redis = connect_redis(redis_url, timeout_s=_TIMEOUT_S)
        self._admit = self._redis.register_script(ADMIT)
        self._renew = self._redis.register_script(RENEW)
        self._refusals: dict[str, tuple[ApiKey, Refusal]] = {}
        """The last one of each key that had any, by id."""
        self._running: dict[str, Ticket] = {}
        """Of keys with limits, by id."""
        self._renewing: asyncio.Task[None] | None = None
        self._renewed = asyncio.Event()
        """Not while leases are renewed: one that ends meanwhile would begin again."""
        self._renewed.set()
        self._spared_until = 0.0

    def refused(self, key: ApiKey) -> Refusal | None:
        """What Redis said of this key lately, if it would say so still."""
        known, refusal = self._refusals.get(key.id, (key, None))
        if refusal is None or known != key or (left := refusal.sure_until - time.monotonic()) <= 0:
            return None
        return replace(refusal, retry_after_s=math.ceil(left))

    async def enter(self, ticket: Ticket, expected: int = 0) -> Refusal | None:
        """Counts a request that is expected to use so many tokens, unless one of the key's limits
        is reached."""
        ticket.asked, ticket.expected = True, expected
        if all(limit is None for limit in ticket.limits):
            return None
        try:
            refusal = await self._asked(ticket)
        except BaseException:  # it may have been counted
            self._running[ticket.id] = ticket
            raise
        if refusal is not None:
            self._refusals[ticket.key.id] = ticket.key, refusal
            return refusal
        self._running[ticket.id] = ticket
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._keep_renewing(), name="renew leases")
        return None

    async def leave(self, ticket: Ticket) -> None:
        """The request has ended. It counts even if nobody ever asked to let it in."""
        if not ticket.asked:
            await self.enter(ticket)
        if self._running.pop(ticket.id, None) is not None:
            await self._renewed.wait()
            await self._tell(ticket.key, [ticket], ended=ticket.id)

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        await self._redis.aclose()

    async def _asked(self, ticket: Ticket) -> Refusal | None:
        if time.monotonic() < self._spared_until:
            return None
        reached, wait_s, sure_ms = 0, 0, 0
        with self._excused("limits of api keys don't hold"):
            bounds = [_UNLIMITED if limit is None else limit for limit in ticket.limits]
            arguments: list[str | int] = [ticket.id, LEASE_S, ticket.expected, *bounds]
            reached, wait_s, sure_ms = await self._admit(keys=_places(ticket.key), args=arguments)
        if not reached:
            return None
        sure_until = time.monotonic() + sure_ms / 1000
        return Refusal(limit=_REFUSALS[reached], retry_after_s=wait_s, sure_until=sure_until)

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_S)
            self._renewed.clear()
            try:
                await self._renew_all()
            finally:
                self._renewed.set()

    async def _renew_all(self) -> None:
        by_key: dict[str, list[Ticket]] = defaultdict(list)
        for ticket in self._running.values():
            by_key[ticket.key.id].append(ticket)
        for tickets in by_key.values():
            await self._tell(tickets[0].key, tickets)

    async def _tell(self, key: ApiKey, tickets: Sequence[Ticket], *, ended: str = "") -> None:
        """These requests run, but for the one that has ended, and have used what they have."""
        if time.monotonic() < self._spared_until:
            return
        used = [ticket.usage.tokens for ticket in tickets]
        fresh = sum(used) - sum(ticket.charged for ticket in tickets)
        running: list[str | int] = []
        for ticket, tokens in zip(tickets, used, strict=True):
            if ticket.id != ended:
                running += (ticket.id, max(0, ticket.expected - tokens))
        with self._excused("use of an api key was not counted"):
            await self._renew(keys=_places(key), args=[LEASE_S, fresh, ended, *running])
            for ticket, tokens in zip(tickets, used, strict=True):
                ticket.charged = tokens

    @contextmanager
    def _excused(self, what: str) -> Iterator[None]:
        """Goes on without Redis where it fails."""
        try:
            yield
        except REDIS_FAILURES as error:
            self._spared_until = time.monotonic() + _SPARED_S
            log.warning(what, reason=str(error))


def _places(key: ApiKey) -> list[str]:
    """What runs, what was used in a minute, and what is expected to be used yet."""
    return [f"precast:quota:{key.id}:{name}" for name in ("running", "used", "expected")]
