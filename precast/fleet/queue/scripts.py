"""Lua scripts of the capture queue: each is one atomic step inside Redis.

What they share (``queue.py`` has the names): a stream of job ids, a hash of job records by id,
a hash of the one active job of each key, a hash of jobs whose cancellation was asked for, a list
of ended jobs, and a lease for each key that is being captured. A waiting job that traffic needs is
also in a sorted set by its urgency; a hash names the stream's entry of each waiting job, and a set
has the jobs that were asked for by hand.
"""

from typing import Final

ENQUEUE: Final = """
-- KEYS: stream records active urgent entries kept
-- ARGV: key id record max_queued urgency kept
local urgency = tonumber(ARGV[5])
local existing = redis.call('HGET', KEYS[3], ARGV[1])
if existing then
  local record = redis.call('HGET', KEYS[2], existing)
  if record then
    if urgency > 0 and redis.call('HEXISTS', KEYS[5], existing) == 1 then
      redis.call('ZADD', KEYS[4], 'GT', urgency, existing)
    end
    if ARGV[6] == '1' then redis.call('SADD', KEYS[6], existing) end
    return {'existing', record}
  end
end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[4]) then return {'full', ''} end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[2])
local entry = redis.call('XADD', KEYS[1], '*', 'job', ARGV[2])
redis.call('HSET', KEYS[5], ARGV[2], entry)
if urgency > 0 then redis.call('ZADD', KEYS[4], urgency, ARGV[2]) end
if ARGV[6] == '1' then redis.call('SADD', KEYS[6], ARGV[2]) end
return {'new', ARGV[3]}
"""

CLAIM_URGENT: Final = """
-- KEYS: stream urgent entries   ARGV: group consumer
redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
while true do
  local top = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')
  if not top[1] then return false end
  -- of equally urgent ones the one that was asked for first
  local chosen, entry, ms, seq
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], top[2], top[2])) do
    local at = redis.call('HGET', KEYS[3], id)
    local m, s = string.match(at or '', '^(%d+)-(%d+)$')
    m, s = tonumber(m), tonumber(s)
    if not chosen or (m and (not ms or m < ms or (m == ms and s < seq))) then
      chosen, entry, ms, seq = id, at, m, s
    end
  end
  redis.call('ZREM', KEYS[2], chosen)
  redis.call('HDEL', KEYS[3], chosen)
  -- FORCE: the group has not come to this entry yet
  if entry and #redis.call('XRANGE', KEYS[1], entry, entry) > 0 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, entry, 'FORCE', 'JUSTID')
    return {entry, chosen}
  end
end
"""

RENEW: Final = """
-- KEYS: stream records active cancels lease urgent entries
-- ARGV: token ttl_ms group consumer entry id key record
local owner = redis.call('GET', KEYS[5])
if owner and owner ~= ARGV[1] then return 'lost' end
local known = redis.call('HGET', KEYS[2], ARGV[6])
if not owner and known and cjson.decode(known).ended_at > 0 then return 'lost' end
redis.call('SET', KEYS[5], ARGV[1], 'PX', ARGV[2])
redis.call('ZREM', KEYS[6], ARGV[6])
redis.call('HDEL', KEYS[7], ARGV[6])
if not known then
  -- Redis came back empty: put the job back so that it outlives this worker too
  redis.call('XADD', KEYS[1], '*', 'job', ARGV[6])
end
redis.call('HSET', KEYS[2], ARGV[6], ARGV[8])
redis.call('HSETNX', KEYS[3], ARGV[7], ARGV[6])
-- claiming one's own entry resets its idle time; there is no group after a loss of data
redis.pcall('XCLAIM', KEYS[1], ARGV[3], ARGV[4], 0, ARGV[5], 'JUSTID')
if redis.call('HEXISTS', KEYS[4], ARGV[6]) == 1 then return 'cancelled' end
return 'held'
"""

FINISH: Final = """
-- KEYS: stream records active cancels lease ended urgent entries kept
-- ARGV: token group entry id key record history
local owner = redis.call('GET', KEYS[5])
if owner and owner ~= ARGV[1] then return 0 end
local known = redis.call('HGET', KEYS[2], ARGV[4])
if not owner and known and cjson.decode(known).ended_at > 0 then return 0 end
redis.call('DEL', KEYS[5])
redis.call('HSET', KEYS[2], ARGV[4], ARGV[6])
if redis.call('HGET', KEYS[3], ARGV[5]) == ARGV[4] then redis.call('HDEL', KEYS[3], ARGV[5]) end
redis.call('HDEL', KEYS[4], ARGV[4])
redis.call('ZREM', KEYS[7], ARGV[4])
redis.call('HDEL', KEYS[8], ARGV[4])
redis.call('SREM', KEYS[9], ARGV[4])
if ARGV[3] ~= '' then
  redis.call('XACK', KEYS[1], ARGV[2], ARGV[3])
  redis.call('XDEL', KEYS[1], ARGV[3])
end
redis.call('LREM', KEYS[6], 0, ARGV[4])
redis.call('LPUSH', KEYS[6], ARGV[4])
while redis.call('LLEN', KEYS[6]) > tonumber(ARGV[7]) do
  redis.call('HDEL', KEYS[2], redis.call('RPOP', KEYS[6]))
end
return 1
"""

DROP: Final = """
-- KEYS: stream lease   ARGV: token group entry
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
redis.call('XACK', KEYS[1], ARGV[2], ARGV[3])
return redis.call('XDEL', KEYS[1], ARGV[3])
"""

RELEASE: Final = """
-- KEYS: lease   ARGV: token
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""
