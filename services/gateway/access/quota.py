"""What API keys have used, counted in Redis, so that all gateways agree.

Requests and tokens are counted by calendar minute; requests that run are a sorted set by the time
at which they can't be running any more, so that those of a gateway that died end too. While Redis
is away limits don't hold: it is the requests that must not fail then.
"""

import time
import uuid
from dataclasses import dataclass
from typing import Final

from redis.exceptions import RedisError

from precast.access.api_keys import ApiKey
from precast.fleet.leases import connect_redis
from precast.log import get_logger

log = get_logger(__name__)

_MINUTE_S: Final = 60
_TIMEOUT_S: Final = 0.5
_UNLIMITED: Final = -1
_REFUSALS: Final = ("", "concurrent requests", "requests per minute", "tokens per minute")
_ADMIT: Final = """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1])
local limits = {tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])}
if limits[1] >= 0 and redis.call('ZCARD', KEYS[1]) >= limits[1] then return 1 end
for i = 2, 3 do
  if limits[i] >= 0 and tonumber(redis.call('GET', KEYS[i]) or '0') >= limits[i] then return i end
end
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[3])
redis.call('EXPIREAT', KEYS[1], math.ceil(ARGV[2]) + 1)
redis.call('INCR', KEYS[2])
redis.call('EXPIRE', KEYS[2], 120)
return 0
"""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a key's request has to wait."""

    limit: str
    retry_after_s: int


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A request that counts while it runs."""

    key: ApiKey
    id: str


class Quota:
    """Admits requests of keys, and counts what they used."""

    def __init__(self, redis_url: str, *, longest_s: float) -> None:
        """``longest_s``: how long a request may run."""
        self._redis = connect_redis(redis_url, timeout_s=_TIMEOUT_S)
        self._admit = self._redis.register_script(_ADMIT)
        self._longest_s = longest_s

    async def enter(self, key: ApiKey) -> Ticket | Refusal:
        """Counts a request, unless one of the key's limits is reached."""
        ticket = Ticket(key=key, id=uuid.uuid4().hex)
        limits = (key.max_concurrent, key.requests_per_minute, key.tokens_per_minute)
        if all(limit is None for limit in limits):
            return ticket
        now = time.time()
        keys = [_running(key), _used("requests", key, now), _used("tokens", key, now)]
        bounds = [_UNLIMITED if limit is None else limit for limit in limits]
        try:
            reached = await self._admit(
                keys=keys, args=[now, now + self._longest_s, ticket.id, *bounds]
            )
        except (RedisError, OSError) as error:
            log.warning("limits of api keys don't hold", reason=str(error))
            return ticket
        if not reached:
            return ticket
        wait_s = 1 if reached == 1 else int(_MINUTE_S - now % _MINUTE_S) + 1
        return Refusal(limit=_REFUSALS[reached], retry_after_s=wait_s)

    async def leave(self, ticket: Ticket, tokens: int) -> None:
        """The request has ended, and has used so many tokens."""
        key = ticket.key
        if key.max_concurrent is None and key.tokens_per_minute is None:
            return
        used = _used("tokens", key, time.time())
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.zrem(_running(key), ticket.id)
                pipe.incrby(used, tokens)
                pipe.expire(used, 2 * _MINUTE_S)
                await pipe.execute()
        except (RedisError, OSError) as error:
            log.warning("use of an api key was not counted", reason=str(error))

    async def close(self) -> None:
        await self._redis.aclose()


def _running(key: ApiKey) -> str:
    return f"precast:quota:{key.id}:running"


def _used(what: str, key: ApiKey, now: float) -> str:
    return f"precast:quota:{key.id}:{what}:{int(now) // _MINUTE_S}"
