"""What Redis does with the counts of one API key, at once and by its own clock.

Keys: a sorted set of the requests that run, by when their lease ends (s), and a hash of what was
used in a minute: ``minute``, ``requests``, ``tokens``.
"""

from typing import Final

_CLOCK: Final = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local minute = tostring(math.floor(now / 60))
if redis.call('HGET', KEYS[2], 'minute') ~= minute then redis.call('DEL', KEYS[2]) end

local function use(what, amount)
  redis.call('HSET', KEYS[2], 'minute', minute)
  redis.call('HINCRBY', KEYS[2], what, amount)
  redis.call('EXPIRE', KEYS[2], 120)
end

local function lease(id, seconds)
  redis.call('ZADD', KEYS[1], now + seconds, id)
  redis.call('EXPIRE', KEYS[1], seconds + 1)
end
"""

ADMIT: Final = (
    _CLOCK
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local used = redis.call('HMGET', KEYS[2], 'requests', 'tokens')
local counts = {redis.call('ZCARD', KEYS[1]), tonumber(used[1] or 0), tonumber(used[2] or 0)}
for i, count in ipairs(counts) do
  local limit = tonumber(ARGV[2 + i])
  if limit >= 0 and count >= limit then return {i, i == 1 and 1 or 60 - math.floor(now % 60)} end
end
lease(ARGV[1], tonumber(ARGV[2]))
use('requests', 1)
return {0, 0}
"""
)
"""Arguments: the request, its lease in seconds, limits of requests that run, of requests and of
tokens in a minute, -1 for none. Returns the limit that is reached, from 1 on, and how long to wait
(s); 0 and 0 if the request was counted."""

RENEW: Final = (
    _CLOCK
    + """
if tonumber(ARGV[2]) > 0 then use('tokens', ARGV[2]) end
if ARGV[3] ~= '' then redis.call('ZREM', KEYS[1], ARGV[3]) end
for i = 4, #ARGV do lease(ARGV[i], tonumber(ARGV[1])) end
"""
)
"""Arguments: the lease in seconds, tokens that were used, the request that has ended or nothing,
and requests that run."""
