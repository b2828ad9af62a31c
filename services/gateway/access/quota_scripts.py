"""What Redis does with the counts of one API key, at once and by its own clock.

Keys: a sorted set of the requests that run, by when their lease ends (s); a hash of what was used
in a minute: ``minute``, ``requests``, ``tokens``; and a hash of the tokens that requests which run
are expected to use yet.
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

local function lease(id, seconds, expected)
  redis.call('ZADD', KEYS[1], now + seconds, id)
  redis.call('EXPIRE', KEYS[1], seconds + 1)
  redis.call('HSET', KEYS[3], id, expected)
  redis.call('EXPIRE', KEYS[3], seconds + 1)
end
"""

ADMIT: Final = (
    _CLOCK
    + """
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)) do
  redis.call('ZREM', KEYS[1], id)
  redis.call('HDEL', KEYS[3], id)
end
local expected = 0
if tonumber(ARGV[6]) >= 0 then
  for _, tokens in ipairs(redis.call('HVALS', KEYS[3])) do expected = expected + tokens end
end
local used = redis.call('HMGET', KEYS[2], 'requests', 'tokens')
local requests, tokens = tonumber(used[1] or 0), tonumber(used[2] or 0)
local counts = {redis.call('ZCARD', KEYS[1]), requests, tokens + expected}
for i, count in ipairs(counts) do
  local limit = tonumber(ARGV[3 + i])
  if limit >= 0 and count >= limit then
    local final = i == 2 or (i == 3 and tokens >= limit)
    local wait = final and 60 - now % 60 or 1
    return {i, math.ceil(wait), final and math.floor(wait * 1000) or 0}
  end
end
lease(ARGV[1], tonumber(ARGV[2]), ARGV[3])
use('requests', 1)
return {0, 0, 0}
"""
)
"""Arguments: the request, its lease in seconds, the tokens that it is expected to use, limits of
requests that run, of requests and of tokens in a minute, -1 for none. Returns the limit that is
reached, from 1 on, how long to wait (s), and how long it will surely stay reached (ms); three times
0 if the request was counted."""

RENEW: Final = (
    _CLOCK
    + """
if tonumber(ARGV[2]) > 0 then use('tokens', ARGV[2]) end
if ARGV[3] ~= '' then
  redis.call('ZREM', KEYS[1], ARGV[3])
  redis.call('HDEL', KEYS[3], ARGV[3])
end
for i = 4, #ARGV, 2 do lease(ARGV[i], tonumber(ARGV[1]), ARGV[i + 1]) end
"""
)
"""Arguments: the lease in seconds, tokens that were used, the request that has ended or nothing,
and requests that run, each with the tokens that it is expected to use yet."""
