"""The days and months of several processes as one, and over their restarts, in Redis or Valkey.

`edge:quota:` and a quota's names (a JSON array, the period last) name a hash with a field for each process, `requests
tokens at`, absolute as in `limits/shared.py`, and a field `gone`, `requests tokens`: of processes that left, and of
those that reported nothing for a day. What is gone only grows, so each process reports the most it knew of it: a server
that comes back empty has it again with the next report. A hash ends a day after its period.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import orjson

from edge.limits.quotas import Quota, Quotas, Spent
from edge.valkey import Script

if TYPE_CHECKING:
    from redis.asyncio import Redis

PREFIX: Final = "edge:quota:"
_BATCH: Final = 200  # as for the counters of a minute
_FOLDED_AFTER_S: Final = 86_400
_KEPT_S: Final = 86_400  # after the period: clocks differ, and so do time zones of files

_SCRIPT: Final = Script("""
local process, folded_after_s, leaving = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1'
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local lines = {}
for i, key in ipairs(KEYS) do
  local requests, tokens, gone_requests, gone_tokens, ends_at =
    string.match(ARGV[3 + i], '^(%d+) (%d+) (%d+) (%d+) (%d+)$')
  local r, t = string.match(redis.call('HGET', key, 'gone') or '0 0', '^(%d+) (%d+)$')
  gone_requests, gone_tokens = math.max(gone_requests, r or 0), math.max(gone_tokens, t or 0)
  if leaving or requests + tokens == 0 then  -- who merely asks leaves nothing
    gone_requests, gone_tokens = gone_requests + requests, gone_tokens + tokens
    redis.call('HDEL', key, process)
  else
    redis.call('HSET', key, process, string.format('%s %s %.0f', requests, tokens, now))
  end
  local others, other_tokens = 0, 0
  local fields = redis.call('HGETALL', key)
  for j = 1, #fields, 2 do
    if fields[j] ~= process and fields[j] ~= 'gone' then
      local r, t, at = string.match(fields[j + 1], '^(%d+) (%d+) (%d+)$')
      if at and now - at > folded_after_s then
        gone_requests, gone_tokens = gone_requests + r, gone_tokens + t
        redis.call('HDEL', key, fields[j])
      elseif at then
        others, other_tokens = others + r, other_tokens + t
      end
    end
  end
  if gone_requests + gone_tokens > 0 then
    redis.call('HSET', key, 'gone', string.format('%.0f %.0f', gone_requests, gone_tokens))
  end
  redis.call('EXPIREAT', key, ends_at)
  lines[i] = string.format('%.0f %.0f %.0f %.0f', others, other_tokens, gone_requests, gone_tokens)
end
return table.concat(lines, '\\n')
""")


class SharedQuotas:
    """Merges the quotas of this process with those of all others; every method raises what the client raises.

    `name_of` returns what a name is called there.
    """

    def __init__(self, client: "Redis", quotas: Quotas, process: str, name_of: Callable[[str], str] = str) -> None:
        self._client = client
        self._prefix = name_of(PREFIX)
        self._quotas = quotas
        self._process = process
        quotas.shares = True

    async def load(self) -> None:
        """Give the server the script."""
        await _SCRIPT.load(self._client)

    async def report(self, now: float, *, everything: bool, leaving: bool = False) -> None:
        """Report what was counted here, and take over what others counted."""
        for found in self._quotas.collect(everything, now):
            for at in range(0, len(found), _BATCH):
                await self._exchange(found[at : at + _BATCH], leaving)
            await asyncio.sleep(0)

    async def _exchange(self, quotas: Sequence[Quota], leaving: bool) -> None:
        periods = [quota.period for quota in quotas]
        names = [orjson.dumps((*quota.key, quota.period.name)).decode() for quota in quotas]
        reports = [(*each.local, *each.gone, int(each.period.ends_at + _KEPT_S)) for each in quotas]
        lines = await _SCRIPT.run(
            self._client,
            [self._prefix + name for name in names],
            [self._process, str(_FOLDED_AFTER_S), str(int(leaving)), *(" ".join(map(str, each)) for each in reports)],
        )
        for quota, period, line in zip(quotas, periods, lines, strict=True):
            requests, tokens, gone_requests, gone_tokens = map(int, line.split())
            if quota.period is period:  # else another one has begun meanwhile
                quota.gone = Spent(gone_requests, gone_tokens)
                quota.update_remote(Spent(requests + gone_requests, tokens + gone_tokens))
