"""The job store's transactions, as Lua. Each may be repeated after a lost answer without doing its work twice.

The scripts compute key names from job and worker names, so the store is one Redis, not a Redis Cluster.
"""

from __future__ import annotations

_COMMON = """
local function job_key(id) return 'kvpilot:job:' .. id end
local function events_key(id) return 'kvpilot:events:' .. id end
local SUFFIXES = {':high', '', ':low'}
local function shared_queue(model, suffix) return 'kvpilot:jobs:' .. model .. suffix end
local function queue_for(worker, suffix) return 'kvpilot:jobs-for:' .. worker .. suffix end
local function live(worker) return redis.call('EXISTS', 'kvpilot:worker:' .. worker) == 1 end
local function taker(worker) return redis.call('HGET', 'kvpilot:takers', worker) end
local function leaving(worker) return redis.call('SISMEMBER', 'kvpilot:leaving', worker) == 1 end

local function make_queue(queue)
  if redis.call('EXISTS', queue) == 0 then redis.call('XGROUP', 'CREATE', queue, 'workers', '0', 'MKSTREAM') end
end

local function workers_of(model)
  local found, all = {}, redis.call('HGETALL', 'kvpilot:workers')
  for i = 1, #all, 2 do
    if all[i + 1] == model then found[#found + 1] = all[i] end
  end
  return found
end

local function reads_all(model)  -- whether a job of any priority is sure to be read
  local old = false
  for _, worker in ipairs(workers_of(model)) do
    if live(worker) and not leaving(worker) then
      if taker(worker) == model then return true end
      old = true
    end
  end
  return not old
end

local function wake(model)
  redis.call('XADD', 'kvpilot:released:' .. model, 'MAXLEN', 1, '*', 'wake', 1)
end

local function waiting_in(queue)
  if redis.call('EXISTS', queue) == 0 then return 0 end
  return redis.call('XLEN', queue) - redis.call('XPENDING', queue, 'workers')[1]
end

local function add_event(id, offset, event)
  redis.call('XADD', events_key(id), (offset + 1) .. '-0', 'event', event)
  redis.call('HSET', job_key(id), 'events', offset + 1)
end

local function finish(id, retention_ms)
  local at = redis.call('HMGET', job_key(id), 'queue', 'entry')
  redis.call('HSET', job_key(id), 'state', 'finished')
  redis.call('XACK', at[1], 'workers', at[2])
  redis.call('XDEL', at[1], at[2])
  redis.call('PEXPIRE', job_key(id), retention_ms)
  redis.call('PEXPIRE', events_key(id), retention_ms)
end
"""

SUBMIT = (
    _COMMON
    + """
-- ARGV: job id, job, Accepted event, model, most waiting, idempotency key, digest, its life ms, session key,
--       now ms, suffix of its priority's queues
local id, model, suffix = ARGV[1], ARGV[4], ARGV[11]
if redis.call('EXISTS', job_key(id)) == 1 then return {'created', id} end
if ARGV[6] ~= '' then
  local held = redis.call('HMGET', ARGV[6], 'digest', 'job')
  if held[2] and redis.call('EXISTS', job_key(held[2])) == 1 then
    if held[1] == ARGV[7] then return {'attached', held[2]} end
    return {'conflict', held[2]}
  end
end
local waiting = 0
for _, ahead in ipairs(SUFFIXES) do  -- of its own priority and above
  waiting = waiting + waiting_in(shared_queue(model, ahead))
  for _, worker in ipairs(workers_of(model)) do waiting = waiting + waiting_in(queue_for(worker, ahead)) end
  if ahead == suffix then break end
end
if waiting >= tonumber(ARGV[5]) then return {'full', waiting} end

if suffix ~= '' and not reads_all(model) then suffix = '' end  -- only workers without priorities are there
local queue = shared_queue(model, suffix)
make_queue(queue)
if ARGV[9] ~= '' then
  local worker = redis.call('GET', ARGV[9])
  if worker and live(worker) and redis.call('HGET', 'kvpilot:workers', worker) == model then
    if not leaving(worker) and (suffix == '' or taker(worker) == model) then
      queue = queue_for(worker, suffix)
      make_queue(queue)
    end
  end
end
local entry = redis.call('XADD', queue, '*', 'job', id)
redis.call('HSET', job_key(id), 'job', ARGV[2], 'model', model, 'state', 'queued', 'owner', '', 'epoch', 0,
  'attempts', 0, 'cancel', 0, 'create_ms', ARGV[10], 'session', ARGV[9], 'queue', queue, 'entry', entry)
add_event(id, 0, ARGV[3])
if ARGV[6] ~= '' then
  redis.call('DEL', ARGV[6])
  redis.call('HSET', ARGV[6], 'digest', ARGV[7], 'job', id)
  redis.call('PEXPIRE', ARGV[6], ARGV[8])
end
return {'created', id}
"""
)
"""Idempotency check, queue length check, job, first event and queue entry in one step."""

CLAIM = (
    _COMMON
    + """
-- ARGV: worker, model, most jobs, lease ms, 1 to take over ended leases, affinity ms, session life ms
local me, model, room, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local claims = {}
for _, suffix in ipairs(SUFFIXES) do make_queue(shared_queue(model, suffix)) end
make_queue(queue_for(me, ''))

local function take(queue, entries)
  for _, entry in ipairs(entries or {}) do
    local id = entry[2] and entry[2][2]
    if not id or redis.call('EXISTS', job_key(id)) == 0 then  -- expired or lost: nothing to run
      redis.call('XACK', queue, 'workers', entry[1])
      redis.call('XDEL', queue, entry[1])
    else
      local key = job_key(id)
      local epoch = redis.call('HINCRBY', key, 'epoch', 1)
      local attempts = redis.call('HINCRBY', key, 'attempts', 1)
      redis.call('HSET', key, 'state', 'running', 'owner', me, 'queue', queue, 'entry', entry[1])
      local job = redis.call('HMGET', key, 'job', 'cancel', 'events', 'session')
      if job[4] ~= '' then redis.call('SET', job[4], me, 'PX', ARGV[7]) end
      claims[#claims + 1] = {job[1], epoch, attempts, tonumber(job[2]), tonumber(job[3])}
      room = room - 1
      redis.call('INCR', 'kvpilot:turns:' .. model)
    end
  end
end

local function read(queue, count)
  if count < 1 or redis.call('EXISTS', queue) == 0 then return end
  local found = redis.call('XREADGROUP', 'GROUP', 'workers', me, 'COUNT', count, 'STREAMS', queue, '>')
  if found then take(queue, found[1][2]) end
end

local function take_over(queue)
  if room < 1 or ARGV[5] ~= '1' or redis.call('EXISTS', queue) == 0 then return end
  for _, idle in ipairs(redis.call('XPENDING', queue, 'workers', 'IDLE', lease_ms, '-', '+', room)) do
    take(queue, redis.call('XCLAIM', queue, 'workers', me, lease_ms, idle[1]))
  end
end

-- Of 16 turns the low queue comes first in one and the normal one in three, so that neither waits for ever.
local function order()
  local turn = tonumber(redis.call('GET', 'kvpilot:turns:' .. model) or 0) % 16
  if turn == 15 then return {':low', ':high', ''} end
  if turn % 4 == 3 then return {'', ':high', ':low'} end
  return SUFFIXES
end

local function delivered(queue)
  if redis.call('EXISTS', queue) == 0 then return '0-0' end
  local group = redis.call('XINFO', 'GROUPS', queue)[1]
  for i = 1, #group, 2 do
    if group[i] == 'last-delivered-id' then return group[i + 1] end
  end
end

local function oldest_waiting_ms(queue, now_ms)
  local first = redis.call('XRANGE', queue, '(' .. delivered(queue), '+', 'COUNT', 1)[1]
  return first and now_ms - tonumber(string.match(first[1], '^%d+')) or 0
end

local function forget(worker)  -- a gone worker without queued jobs; its name stays where it still holds any
  redis.call('HDEL', 'kvpilot:workers', worker)
  redis.call('HDEL', 'kvpilot:takers', worker)
  redis.call('SREM', 'kvpilot:leaving', worker)
  for _, suffix in ipairs(SUFFIXES) do
    local shared = shared_queue(model, suffix)
    redis.call('DEL', queue_for(worker, suffix))
    if #redis.call('XPENDING', shared, 'workers', '-', '+', 1, worker) == 0 then
      redis.call('XGROUP', 'DELCONSUMER', shared, 'workers', worker)
    end
  end
end

local others, known = {}, {[me] = true}
local function other(worker)
  if not known[worker] then others[#others + 1] = worker end
  known[worker] = true
end
for _, worker in ipairs(workers_of(model)) do other(worker) end
local takers = redis.call('HGETALL', 'kvpilot:takers')
for i = 1, #takers, 2 do  -- a worker without priorities forgets others without a look at all their queues
  if takers[i + 1] == model then other(takers[i]) end
end

for _, suffix in ipairs(SUFFIXES) do
  take_over(shared_queue(model, suffix))
  take_over(queue_for(me, suffix))
  for _, worker in ipairs(others) do take_over(queue_for(worker, suffix)) end
end

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local function read_others(suffix)  -- one job that another worker keeps waiting
  for _, worker in ipairs(others) do
    local queue = queue_for(worker, suffix)
    if redis.call('EXISTS', queue) == 1 then
      local stays = live(worker) and not leaving(worker)
      if not stays or oldest_waiting_ms(queue, now_ms) > tonumber(ARGV[6]) then
        local before = room
        read(queue, 1)
        if room < before then return end
      end
    end
  end
end

while room > 0 do
  local before = room
  for _, suffix in ipairs(order()) do
    read(queue_for(me, suffix), 1)
    if room == before then read(shared_queue(model, suffix), 1) end
    if room == before then read_others(suffix) end
    if room < before then break end
  end
  if room == before then break end
end

for _, worker in ipairs(others) do
  if not live(worker) then
    local left = 0
    for _, suffix in ipairs(SUFFIXES) do left = left + redis.call('XLEN', queue_for(worker, suffix)) end
    if left == 0 then forget(worker) end
  end
end

local after = {}
for _, suffix in ipairs(SUFFIXES) do
  for _, queue in ipairs({shared_queue(model, suffix), queue_for(me, suffix)}) do
    after[#after + 1] = queue
    after[#after + 1] = delivered(queue)
  end
end
local released = redis.call('XREVRANGE', 'kvpilot:released:' .. model, '+', '-', 'COUNT', 1)[1]
after[#after + 1] = 'kvpilot:released:' .. model
after[#after + 1] = released and released[1] or '0-0'
return {claims, after}
"""
)
"""Jobs whose lease has ended first; then one by one in the order of priorities, of each from the worker's own queue,
the shared one, and what waits too long elsewhere. Gives the claims, and behind which entries of streams to wait."""

APPEND = (
    _COMMON
    + """
-- ARGV: worker, retention ms, most outcomes, then per job: id, epoch, first offset, 1 if the last event is Finished,
--       outcome or '', number of events, the events
local me, at, answers = ARGV[1], 4, {}
local function append(id, epoch, first, finished, outcome, count)
  local key = job_key(id)
  local job = redis.call('HMGET', key, 'owner', 'epoch', 'events', 'state', 'cancel')
  if not job[1] then return {'gone', 0} end
  if job[1] ~= me or job[2] ~= epoch then return {'fenced', 0} end
  local stored, cancel = tonumber(job[3]), tonumber(job[5])
  if first > stored then return {'gap', cancel} end
  if job[4] == 'finished' and first + count > stored then return {'fenced', 0} end
  for i = stored - first, count - 1 do add_event(id, first + i, ARGV[at + 6 + i]) end
  if finished and job[4] ~= 'finished' then
    finish(id, ARGV[2])
    if outcome ~= '' then redis.call('XADD', 'kvpilot:outcomes', 'MAXLEN', '~', ARGV[3], '*', 'outcome', outcome) end
  end
  return {'stored', cancel}
end
while ARGV[at] do
  local count = tonumber(ARGV[at + 5])
  answers[#answers + 1] =
    append(ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2]), ARGV[at + 3] == '1', ARGV[at + 4], count)
  at = at + 6 + count
end
return answers
"""
)
"""Events of many jobs under their claims; an event that is already stored is passed over."""

HEARTBEAT = (
    _COMMON
    + """
-- ARGV: worker, model, card, Model, lease ms, 1 if it is leaving, then per claim: job id, epoch
local me, lost, cancelled = ARGV[1], {}, {}
redis.call('HSET', 'kvpilot:takers', me, ARGV[2])
if ARGV[6] == '0' then
  redis.call('SREM', 'kvpilot:leaving', me)
elseif redis.call('SADD', 'kvpilot:leaving', me) == 1 then
  wake(ARGV[2])  -- for what waits in its own queues
end
redis.call('SET', 'kvpilot:worker:' .. me, ARGV[3], 'PX', ARGV[5])
redis.call('HSET', 'kvpilot:workers', me, ARGV[2])
redis.call('HSET', 'kvpilot:models', ARGV[2], ARGV[4])
for at = 7, #ARGV, 2 do
  local id = ARGV[at]
  local job = redis.call('HMGET', job_key(id), 'owner', 'epoch', 'state', 'cancel', 'queue', 'entry')
  if job[1] ~= me or job[2] ~= ARGV[at + 1] then
    lost[#lost + 1] = id
  elseif job[3] ~= 'finished' then
    redis.call('XCLAIM', job[5], 'workers', me, 0, job[6], 'JUSTID')
    if job[4] == '1' then cancelled[#cancelled + 1] = id end
  end
end
return {lost, cancelled}
"""
)
"""Publishes the worker and renews the leases of its claims."""

RELEASE = (
    _COMMON
    + """
-- ARGV: then per claim: worker, job id, epoch
for at = 1, #ARGV, 3 do
  local key = job_key(ARGV[at + 1])
  local job = redis.call('HMGET', key, 'owner', 'epoch', 'state', 'queue', 'entry')
  if job[1] == ARGV[at] and job[2] == ARGV[at + 2] and job[3] == 'running' then
    redis.call('HINCRBY', key, 'epoch', 1)
    redis.call('HINCRBY', key, 'attempts', -1)
    redis.call('HSET', key, 'state', 'queued', 'owner', '')
    redis.call('XCLAIM', job[4], 'workers', 'released', 0, job[5], 'IDLE', 31536000000, 'JUSTID')
    wake(redis.call('HGET', key, 'model'))
  end
end
"""
)
"""Hands jobs back: the next claim of any worker takes them over at once."""

CANCEL = (
    _COMMON
    + """
-- ARGV: job id, offset of the Finished event, that event, retention ms, notices' life ms
local id, key = ARGV[1], job_key(ARGV[1])
local job = redis.call('HMGET', key, 'state', 'owner', 'events')
if not job[1] then return {'gone', 0} end
if job[1] == 'finished' then return {'finished', 0} end
if job[1] == 'queued' or not live(job[2]) then  -- nobody works on it: end it here, and fence whoever comes back
  if job[3] ~= ARGV[2] then return {'again', tonumber(job[3])} end
  redis.call('HINCRBY', key, 'epoch', 1)
  add_event(id, tonumber(ARGV[2]), ARGV[3])
  finish(id, ARGV[4])
else
  redis.call('HSET', key, 'cancel', 1)
  local notices = 'kvpilot:notices:' .. job[2]
  redis.call('XADD', notices, 'MAXLEN', '~', 1000, '*', 'job', id)
  redis.call('PEXPIRE', notices, ARGV[5])
end
return {job[1], 0}
"""
)
"""Ends a job that nobody works on; tells the worker otherwise."""

RETIRE = (
    _COMMON
    + """
-- ARGV: worker
redis.call('DEL', 'kvpilot:worker:' .. ARGV[1], 'kvpilot:notices:' .. ARGV[1])
"""
)
"""Takes a stopped worker off the list of live ones; its queue is emptied by the others."""
