"""How many jobs wait for a worker, and how long the oldest of them has: for metrics."""

from __future__ import annotations

from dataclasses import dataclass

from redis.asyncio import Redis

from kvpilot.bus import keys
from kvpilot.bus.connection import Connection, translated_errors
from kvpilot.bus.values import BusSettings

_QUEUES = """
-- ARGV: suffixes of queues by priority
-- Answers for each model that was ever served: name, live workers, then for each suffix jobs and age in ms.
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local function age_ms(entry) return now_ms - tonumber(string.match(entry, '^%d+')) end

local function live(worker) return redis.call('EXISTS', 'kvpilot:worker:' .. worker) end

local function look(queue)
  if redis.call('EXISTS', queue) == 0 then return 0, 0 end
  local pending = redis.call('XPENDING', queue, 'workers')
  local jobs, oldest = redis.call('XLEN', queue) - pending[1], 0
  if jobs > 0 then
    local group = redis.call('XINFO', 'GROUPS', queue)[1]
    local delivered = '0-0'
    for i = 1, #group, 2 do
      if group[i] == 'last-delivered-id' then delivered = group[i + 1] end
    end
    local first = redis.call('XRANGE', queue, '(' .. delivered, '+', 'COUNT', 1)[1]
    if first then oldest = age_ms(first[1]) end
  end
  for _, consumer in ipairs(pending[4] or {}) do
    if live(consumer[1]) == 0 then  -- 'released', who has what was handed back, or a worker that was lost
      jobs = jobs + tonumber(consumer[2])
      oldest = math.max(oldest, age_ms(redis.call('XPENDING', queue, 'workers', '-', '+', 1, consumer[1])[1][1]))
    end
  end
  return jobs, oldest
end

local workers, answer = redis.call('HGETALL', 'kvpilot:workers'), {}
for _, model in ipairs(redis.call('HKEYS', 'kvpilot:models')) do
  local serving, found = 0, {}
  for i = 1, #workers, 2 do
    if workers[i + 1] == model then serving = serving + live(workers[i]) end
  end
  for _, suffix in ipairs(ARGV) do
    local jobs, oldest = look('kvpilot:jobs:' .. model .. suffix)
    for i = 1, #workers, 2 do
      if workers[i + 1] == model then
        local more, age = look('kvpilot:jobs-for:' .. workers[i] .. suffix)
        jobs, oldest = jobs + more, math.max(oldest, age)
      end
    end
    found[#found + 1] = jobs
    found[#found + 1] = oldest
  end
  answer[#answer + 1] = {model, serving, unpack(found)}
end
return answer
"""


@dataclass(frozen=True)
class Waiting:
    """Jobs of one priority that no live worker has: queued, handed back, or left behind by a worker that was lost.

    Attributes:
        jobs: how many.
        oldest_s: time since the oldest was submitted; 0 where there is none.
    """

    jobs: int
    oldest_s: float


@dataclass(frozen=True)
class ModelQueue:
    """What waits for a model.

    Attributes:
        model: its name.
        workers: live ones that serve it.
        waiting: by priority.
    """

    model: str
    workers: int
    waiting: dict[str, Waiting]


class QueueBoard(Connection):
    """The queues' part of the bus."""

    def __init__(self, client: Redis, settings: BusSettings) -> None:
        super().__init__(client, settings)
        self._queues = self._client.register_script(_QUEUES)

    async def queues(self) -> list[ModelQueue]:
        """Returns what waits now, of every model that a worker has ever served.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        with translated_errors():
            answer = await self._queues(args=[priority.suffix for priority in keys.Priority])
        found = []
        for name, workers, *figures in answer:
            pairs = zip(keys.Priority, figures[::2], figures[1::2], strict=True)
            waiting = {priority.value: Waiting(int(jobs), int(age_ms) / 1000) for priority, jobs, age_ms in pairs}
            found.append(ModelQueue(name.decode(), int(workers), waiting))
        return sorted(found, key=lambda queue: queue.model)
