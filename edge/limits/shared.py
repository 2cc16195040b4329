"""The limits of several processes as one: every 0.1 s each reports its counts to Redis or Valkey and reads the others'.

`edge:limit:` and a counter's names (a JSON array) name a hash with a field for each process: `minute requests tokens
previous_requests previous_tokens running at`, the last in Redis's own time, whose minutes all processes share. A field
holds absolute counts and has one writer. Increments would be smaller, but when a reply is lost nobody knows whether
they were applied; a field that is written again stays right, so a process that cannot be sure, and one that finds the
server empty, reports everything once more. What only processes that are gone had counted starts anew then. A field that
is written in another way is of a newer edge: it is not counted, and left to it. A process that reports nothing for 3 s
is taken for dead: what runs there counts no more, what it used goes with its minutes.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import orjson
from prometheus_client.core import GaugeMetricFamily, Metric

from edge.limits.admission import Admission
from edge.limits.counters import RUNNING_EXPIRES_S, Counter, Counts
from edge.limits.shared_quotas import SharedQuotas
from edge.outage import Outage
from edge.valkey import Script, answer_of, reason_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

_log = logging.getLogger(__name__)

PREFIX: Final = "edge:limit:"
_INTERVAL_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 1.0  # between two tries
_LEAVE_TIMEOUT_S: Final = 1.0
_BATCH: Final = 200  # counters in a call: what the server and the loop are held up by
_HASH_EXPIRES_S: Final = 180  # two minutes are counted, and clocks differ
_CLOCKS_DIFFER_S: Final = 0.05  # less is not worth a step

_SCRIPT: Final = Script("""
local process, alive_s, keep_s = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local lines, unknown = {}, 0
for i, key in ipairs(KEYS) do
  local own = ARGV[3 + i]
  redis.call('HSET', key, process, own .. string.format(' %.3f', now))
  redis.call('EXPIRE', key, keep_s)
  local this = tonumber(string.match(own, '^%d+'))
  local requests, tokens, previous_requests, previous_tokens, running = 0, 0, 0, 0, 0
  local fields = redis.call('HGETALL', key)
  for j = 1, #fields, 2 do
    if fields[j] ~= process then
      local minute, r, t, pr, pt, n, at =
        string.match(fields[j + 1], '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+%.%d+)$')
      if not at then
        unknown = unknown + 1
      elseif now - at > keep_s then
        redis.call('HDEL', key, fields[j])
      else
        local age = this - minute
        if age == 0 then
          requests, tokens = requests + r, tokens + t
          previous_requests, previous_tokens = previous_requests + pr, previous_tokens + pt
        elseif age == 1 then
          previous_requests, previous_tokens = previous_requests + r, previous_tokens + t
        elseif age == -1 then  -- its next minute has begun some milliseconds before ours
          requests, tokens = requests + r + pr, tokens + t + pt
        end
        if now - at < alive_s then running = running + n end
      end
    end
  end
  lines[i] = string.format('%.0f %.0f %.0f %.0f %.0f',
    requests, tokens, previous_requests, previous_tokens, running)
end
return string.format('%.6f %d\\n', now, unknown) .. table.concat(lines, '\\n')
""")


class SharedLimits:
    """Merges the counters of this process with those of all others, while Redis answers.

    While it does not, requests are admitted by what is known here. `name_of` returns what a name is
    called there.
    """

    def __init__(self, client: "Redis", admission: Admission, name_of: Callable[[str], str] = str) -> None:
        self.outage = Outage(
            _log,
            "shared.redis is unavailable, limits count what this process serves, news of keys waits",
            "shared.redis answers again, limits are shared",
        )
        self.merges = 0
        self._client = client
        self._admission = admission
        self._prefix = name_of(PREFIX)
        self._process = secrets.token_hex(8)
        self._quotas = SharedQuotas(client, admission.quotas, self._process, name_of)
        self._joined = False  # whether all that was counted here has been reported
        self._is_told = False  # that others report in a way that is not known here

    async def run(self) -> None:
        """Merge until cancelled; `leave` follows."""
        from redis.exceptions import RedisError

        pause_s = _INTERVAL_S
        while True:
            try:
                await self.merge()
                self.outage.up()
                pause_s = _INTERVAL_S
            except (RedisError, OSError) as error:
                self.outage.down(reason_of(error))
                # The others that the pool keeps are dead too, and one would fail the first merge with a new server.
                with contextlib.suppress(RedisError, OSError):
                    await answer_of(self._client.connection_pool.disconnect(inuse_connections=False))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)

    async def leave(self) -> None:
        """Report that nothing runs here any more, when `run` has ended; not to a Redis that is down or slow."""
        from redis.exceptions import RedisError

        if not self.outage:
            with contextlib.suppress(RedisError, OSError):
                async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                    await self._leave()

    async def merge(self) -> None:
        """Report what was counted since the last merge, and read what others did; raises what the client raises."""
        joined, self._joined = self._joined, False
        if not joined:
            await _SCRIPT.load(self._client)
            await self._quotas.load()
            await self._exchange([])  # for its time: reports are in its minutes
        await self._report(everything=not joined)
        self._joined = True
        self.merges += 1

    async def _leave(self) -> None:
        await self._report(everything=True, leaving=True)

    async def _report(self, *, everything: bool, leaving: bool = False) -> None:
        """Exchange counters as they are found; where there are none, only the time."""
        found: list[Counter] = []
        for some in self._admission.collect(everything):
            found += some
            while len(found) >= _BATCH:
                await self._exchange(found[:_BATCH], leaving)
                del found[:_BATCH]
            await asyncio.sleep(0)
        await self._exchange(found, leaving)
        await self._quotas.report(self._admission.now, everything=everything, leaving=leaving)

    async def _exchange(self, counters: Sequence[Counter], leaving: bool = False) -> None:
        local = [counter.local() for counter in counters]
        if leaving:
            local = [each._replace(running=0) for each in local]
        asked_at = self._admission.clock()
        first, *lines = await _SCRIPT.run(
            self._client,
            [self._prefix + orjson.dumps(counter.key).decode() for counter in counters],
            [
                self._process,
                str(RUNNING_EXPIRES_S),
                str(_HASH_EXPIRES_S),
                *(" ".join(map(str, each)) for each in local),
            ],
        )
        time, unknown = first.split()
        if int(unknown) and not self._is_told:
            self._is_told = True
            _log.error("shared.redis: limits of another version of the edge are not counted here: run one version")
        self._keep_time(float(time), asked_at, self._admission.clock())
        remote = [Counts(each.minute, *map(int, line.split())) for each, line in zip(local, lines, strict=True)]
        self._admission.merge(counters, remote)

    def _keep_time(self, time: float, asked_at: float, answered_at: float) -> None:
        """Follow Redis's clock, where it differs by more than is lost on the way."""
        offset_s = time - (asked_at + answered_at) / 2
        if abs(offset_s - self._admission.clock_offset_s) > max(_CLOCKS_DIFFER_S, answered_at - asked_at):
            self._admission.clock_offset_s = offset_s

    def metrics(self) -> Iterator[Metric]:
        """Yield what Prometheus asks for."""
        text = "1, or 0 while limits count this process alone."
        yield GaugeMetricFamily("edge_shared_limits_up", text, value=not self.outage)
