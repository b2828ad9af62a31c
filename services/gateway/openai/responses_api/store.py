"""Responses that are kept in Redis for a while, each tenant's apart.

A tenant has so much room: what is oldest, and would end first, makes way for what is new. Redis
forgets a response when its time is over; the sorted set of a tenant's responses, whose members have
ids and sizes, is put right whenever something is added. Redis' clock counts: gateways' may differ.
"""

import re
from collections.abc import Awaitable
from typing import Any, Final, cast

import msgspec

from precast.errors import Unavailable
from precast.fleet.leases import REDIS_FAILURES, connect_redis

_TIMEOUT_S: Final = 1.0
_ID: Final = re.compile(r"resp_[0-9a-f]{32}")
_SIZES: Final = """
local function forget(member)
  redis.call('ZREM', KEYS[2], member)
  local size = tonumber(string.match(member, ':(%d+)$'))
  local all = tonumber(redis.call('GET', KEYS[3]) or '0')
  if all > 0 then redis.call('DECRBY', KEYS[3], math.min(size, all)) end
end
"""
_PUT: Final = f"""
{_SIZES}
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)) do forget(member) end
local size, most = string.len(ARGV[3]), tonumber(ARGV[4])
if size > most then return 0 end
while tonumber(redis.call('GET', KEYS[3]) or '0') + size > most do
  local oldest = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if not oldest then redis.call('DEL', KEYS[3]) break end
  redis.call('DEL', ARGV[5] .. string.match(oldest, '^[^:]+'))
  forget(oldest)
end
redis.call('SET', KEYS[1], ARGV[3], 'EX', ARGV[1])
redis.call('ZADD', KEYS[2], now + ARGV[1], ARGV[2] .. ':' .. size)
redis.call('INCRBY', KEYS[3], size)
redis.call('EXPIRE', KEYS[2], ARGV[1])
redis.call('EXPIRE', KEYS[3], ARGV[1])
return 1
"""
_DELETE: Final = f"""
{_SIZES}
local size = redis.call('STRLEN', KEYS[1])
if size == 0 then return 0 end
redis.call('DEL', KEYS[1])
forget(ARGV[1] .. ':' .. size)
return 1
"""


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A response, and the conversation that ends with it."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    """As a request's input has them."""


class ResponseStore:
    """Calls take no longer than a second, and raise ``Unavailable`` where Redis is away."""

    def __init__(self, redis_url: str, *, lifetime_s: int, max_bytes: int) -> None:
        """``max_bytes``: of each tenant's."""
        self._redis = connect_redis(redis_url, timeout_s=_TIMEOUT_S)
        self._put = self._redis.register_script(_PUT)
        self._delete = self._redis.register_script(_DELETE)
        self._lifetime_s = lifetime_s
        self._max_bytes = max_bytes

    async def put(self, tenant: str, kept: Kept) -> bool:
        """Whether there is room for it at all."""
        name, data = kept.response["id"], msgspec.json.encode(kept)
        args = [self._lifetime_s, name, data, self._max_bytes, _prefix(tenant)]
        return bool(await _reached(self._put(keys=_keys(tenant, name), args=args)))

    async def get(self, tenant: str, name: str) -> Kept | None:
        """None where the tenant has no such response, or not any more."""
        if not _ID.fullmatch(name):
            return None
        data = await _reached(self._redis.get(_keys(tenant, name)[0]))
        return None if data is None else msgspec.json.decode(data, type=Kept)

    async def delete(self, tenant: str, name: str) -> bool:
        """Whether there was one."""
        if not _ID.fullmatch(name):
            return False
        return bool(await _reached(self._delete(keys=_keys(tenant, name), args=[name])))

    async def close(self) -> None:
        await self._redis.aclose()


async def _reached(call: Any) -> Any:
    try:
        return await cast(Awaitable[Any], call)
    except REDIS_FAILURES as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unavailable(f"Responses that were kept can't be reached: {reason}.") from None


def _prefix(tenant: str) -> str:
    return f"precast:responses:{tenant}:kept:"


def _keys(tenant: str, name: str) -> list[str]:
    """Of the response, of the tenant's list, and of what that takes in all."""
    whole = f"precast:responses:{tenant}"
    return [_prefix(tenant) + name, f"{whole}:all", f"{whole}:bytes"]
