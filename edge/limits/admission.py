"""Whether a request may start now, by the limits of its route and of its key; no clock and no I/O in here.

A counter belongs to a limit, a route, and a user or a key. It counts requests and tokens over a sliding minute
(`limits/counters.py`), and the requests that run. All limits are checked before any is charged, so a refusal charges
nothing. Tokens are reserved when a request starts and corrected when it ends, in the minute they were reserved in. An
answer reserves what the latest ones of its counter took on average, or `reserve_at_most`, and never more than it may
have: agents ask for 32,000 and use 100.

A limit may have further parts: a day and a month (`limits/quotas.py`), and a minute that is spread over its seconds
(`limits/smooth.py`). They are checked and charged with the minute.

Processes share what they counted (`limits/shared.py`), and none waits for it: a counter knows what the others had used
at the last merge. All of them together use at most

    limit + (processes - 1) x left + what requests in flight use beyond their reservations

with left = limit - what all had used at the last moment of which each knew when it last admitted a request: two merges
before, 0.2 s, while there are few hundred counters; with more, those that are not used here are merged in turn. A
process that has not used one for two minutes knows nothing of others: where all begin at once, left is the whole limit.
The last term is there for tokens only, and in a single process too.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from prometheus_client.core import GaugeMetricFamily, Metric

from edge.config.settings import LimitConfig
from edge.limits.counters import MINUTE_S, Counter, Counts
from edge.limits.quotas import Allowance, Quota, Quotas
from edge.limits.terms import HeldPart, Limit, Part, header_lines, refusal_of

_log = logging.getLogger(__name__)

_REFRESH_S: Final = 1.0  # how often counters are reported of which requests merely run
_IN_TURN: Final = 200  # counters that are reported with each merge though nothing happened here
_A_STEP: Final = 1000  # counters that are looked at
IDLE_INTERVAL_S: Final = 30.0  # between two looks for those in which nothing is left
_MAX_NAMES: Final = 1000  # of the combinations, and of the unknown ones, that key records may name


class Standing(NamedTuple):
    """What of a limit is used by now, at one route by one user or key; `per` says of which.

    `quotas` are its day and its month, as far as it has them.
    """

    limit: str
    per: str
    requests: int
    tokens: int
    running: int
    quotas: tuple[tuple[Quota, Allowance], ...] = ()


class Permit(msgspec.Struct, eq=False):
    """Leave to run; `headers` are the lines of the limits that its answer carries, b"" for none."""

    _admission: "Admission | None"
    _held: Sequence[tuple[Counter, int]]
    _minute: int
    headers: bytes
    _answers: int = 0
    _parts: Sequence[tuple[Part, Any, int, Any]] = ()

    def charge(self, tokens: int, answer_tokens: int = 0) -> None:
        """Charge the tokens that were really used in place of the reserved ones, and run no more.

        `answer_tokens` are those of all answers to the request. A second call does nothing.
        """
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.correct(self._held, self._minute, tokens, answer_tokens // self._answers if self._answers else 0)
            for part, found, reserved, begun in self._parts:
                part.correct(found, begun, 0, tokens - reserved, admission.now)

    def cancel(self) -> None:
        """Take back all that was charged, in place of `charge`: the request was refused after all."""
        admission = self._admission
        self.charge(0)
        if admission is not None:
            for part, found, _, begun in self._parts:
                part.correct(found, begun, -1, 0, admission.now)
        for counter, _ in self._held:
            counter.uncount(self._minute)


UNLIMITED: Final = Permit(None, (), 0, b"")


class Admission:
    """Admits requests, or refuses them with the time to come back.

    `clock` yields Unix seconds and never jumps; the counters of a limit outlive a reload by its name.
    """

    def __init__(self, limits: Mapping[str, LimitConfig], clock: Callable[[], float]) -> None:
        self.clock = clock
        self.clock_offset_s = 0.0  # how far the clock that processes share is ahead
        self._minute = 0
        self._minute_began = 0.0
        self._counters: dict[tuple[str, str, str], Counter] = {}
        self._dirty: list[Counter] = []
        self._refreshed_at = 0.0
        self._in_turn: list[Counter] = []
        self.quotas = Quotas()
        self.reconfigure(limits)

    def metrics(self) -> Iterator[Metric]:
        """Yield what Prometheus asks for."""
        counted = "Users and keys that are counted now, by limit and route."
        yield GaugeMetricFamily("edge_limit_counters", counted, value=len(self._counters))
        held = "Days and months of users and keys that are held now, by limit and route."
        yield GaugeMetricFamily("edge_limit_quotas", held, value=len(self.quotas))

    def counted(self) -> tuple[list[Counter], Mapping[str, LimitConfig], int, float]:
        """Return every counter, the limits, the minute, and how much of the minute before still counts."""
        elapsed_s = self._now() - self._minute_began
        return list(self._counters.values()), self._configs, self._minute, 1.0 - elapsed_s / MINUTE_S

    @property
    def configs(self) -> Mapping[str, LimitConfig]:
        """The limits, by name."""
        return self._configs

    @property
    def now(self) -> float:
        """Unix time, of the clock that processes share."""
        return self.clock() + self.clock_offset_s

    def reconfigure(self, limits: Mapping[str, LimitConfig]) -> None:
        """Take over the limits of a reload."""
        self._configs = limits
        self._limits: dict[str, Limit] = {}  # that were used; thousands are not made in one step of the loop
        self._applying: dict[tuple[str | None, ...], tuple[Limit, ...]] = {}  # by the names that are given
        self._unknown: set[str] = set()

    # --- requests

    def admit(
        self,
        route: str,
        names: tuple[str | None, ...],
        user: str,
        key_id: str,
        tokens: int,
        answers: int = 0,
        max_tokens: int | None = None,
    ) -> Permit:
        """Charge one request, the tokens that it may use and one place, to each of the named limits (None: none).

        It uses `tokens` for its prompt, and what an answer takes for each of its `answers`, which have `max_tokens` at
        most each (None: no limit). More than a limit has is taken for all of it: such a request runs when nothing else
        was used. Raises: `RateLimited`.
        """
        limits = self._applying.get(names)
        if limits is None:
            limits = self._resolve(names)
        if not limits:
            return UNLIMITED
        now = self.clock() + self.clock_offset_s
        elapsed_s = now - self._minute_began
        if not 0.0 <= elapsed_s < MINUTE_S:
            elapsed_s = self._turn(now)
        minute, weight = self._minute, 1.0 - elapsed_s / MINUTE_S
        held = []
        parts: tuple[HeldPart, ...] = ()
        fits = True
        for limit in limits:
            key = (limit.name, route, user if limit.per_user else key_id)
            counter = self._counters.get(key)
            if counter is None:
                counter = self._counters[key] = Counter(key, minute)
            elif counter.minute != minute:
                counter.roll(minute)
            if not counter.is_dirty:
                counter.is_dirty = True
                self._dirty.append(counter)
            reserved = tokens
            if answers:
                each = counter.answer_tokens
                if limit.reserve_at_most is not None:
                    each = min(limit.reserve_at_most, each if max_tokens is None else max_tokens)
                elif max_tokens is not None and max_tokens < each:
                    each = max_tokens
                reserved += answers * each
            for part in limit.parts:
                found, reserved_there = part.find(counter, now), part.reserved(reserved)
                if not part.has_room(found, reserved_there, now):
                    fits = False
                parts += ((part, found, reserved_there),)
            if reserved > limit.tokens:
                reserved = limit.tokens if limit.token_lines else 0
            if counter.remote_running and counter.remote_running_until <= now:
                counter.remote_running = 0
            if (
                counter.running + counter.remote_running >= limit.running
                or counter.previous_requests * weight + counter.requests + 1 > limit.requests
                or counter.previous_tokens * weight + counter.tokens + reserved > limit.tokens
            ):
                fits = False
            held.append((counter, reserved))
        if not fits:
            raise refusal_of(limits, held, parts, elapsed_s, now)
        for counter, reserved in held:
            counter.requests += 1
            counter.tokens += reserved
            counter.running += 1
        charged = [(part, found, n, part.charge(found, n, now)) for part, found, n in parts] if parts else ()
        return Permit(self, held, minute, header_lines(limits, held, elapsed_s), answers, charged)

    def correct(self, held: Sequence[tuple[Counter, int]], minute: int, tokens: int, answer_tokens: int) -> None:
        """Correct what a permit reserved in `minute`, and give its places back; called once, by the permit.

        `answer_tokens` is what an answer took, 0 where there was none.
        """
        now = self.clock() + self.clock_offset_s
        if not 0.0 <= now - self._minute_began < MINUTE_S:
            self._turn(now)
        for counter, reserved in held:
            if counter.minute != self._minute:
                counter.roll(self._minute)
            if tokens != reserved:
                counter.correct(minute, tokens - reserved)
            counter.running -= 1
            if answer_tokens:
                counter.learn(answer_tokens)
            if not counter.is_dirty:
                counter.is_dirty = True
                self._dirty.append(counter)

    def standing(self, route: str, names: tuple[str | None, ...], user: str, key_id: str) -> Iterator[Standing]:
        """Yield how far each of the named limits (None: none) is used at a route by now; nothing is charged."""
        now = self._now()
        weight = 1.0 - (now - self._minute_began) / MINUTE_S
        for limit in self._applying.get(names) or self._resolve(names):
            counter = self._counters.get((limit.name, route, user if limit.per_user else key_id))
            key = limit.name, route, user if limit.per_user else key_id
            quotas = tuple((self.quotas.peek(each, key, now), each) for each in limit.allowances)
            if counter is None:
                yield Standing(limit.name, limit.per, 0, 0, 0, quotas)
                continue
            if counter.minute != self._minute:
                counter.roll(self._minute)
            yield Standing(
                limit.name,
                limit.per,
                math.ceil(counter.previous_requests * weight + counter.requests),
                math.ceil(counter.previous_tokens * weight + counter.tokens),
                counter.running + counter.remote_running,
                quotas,
            )

    def _resolve(self, names: tuple[str | None, ...]) -> tuple[Limit, ...]:
        limits = []
        for name in dict.fromkeys(each for each in names if each is not None):
            if name in self._configs:
                limit = self._limits.get(name)
                if limit is None:
                    limit = self._limits[name] = Limit(self._configs[name], self.quotas)
                limits.append(limit)
            elif name not in self._unknown and len(self._unknown) < _MAX_NAMES:
                self._unknown.add(name)
                _log.warning("limit %r, named by a key, is not in [limits]: it limits nothing", name)
        if len(self._applying) >= _MAX_NAMES:
            self._applying.clear()
        self._applying[names] = tuple(limits)
        return self._applying[names]

    # --- time

    def _now(self) -> float:
        """Return Unix time, after its minute has begun."""
        now = self.clock() + self.clock_offset_s
        if not 0.0 <= now - self._minute_began < MINUTE_S:
            self._turn(now)
        return now

    def _turn(self, now: float) -> float:
        """Let the minute of `now` begin; return how much of it is gone, in seconds.

        A minute that has begun goes on when the shared clock is set back by less than one; when it is set back by more,
        the counters go with it.
        """
        elapsed_s = now - self._minute_began
        if -MINUTE_S < elapsed_s < 0:
            return 0.0
        minute = int(now // MINUTE_S)
        if elapsed_s < 0:
            for counter in self._counters.values():
                counter.shift(minute - self._minute)
        self._minute, self._minute_began = minute, float(minute * MINUTE_S)
        return now - self._minute_began

    def forget_idle(self) -> Iterator[None]:
        """Drop the counters in which nothing is left, in steps; one call ends before the next begins.

        Called every half a minute, memory holds who came in the last two and a half.
        """
        self._now()
        for number, counter in enumerate(list(self._counters.values()), 1):
            if not counter.running and not counter.counts_in(self._minute):
                del self._counters[counter.key]
                counter.is_dirty = False
            if number % _A_STEP == 0:
                yield
        dirty, self._dirty = self._dirty, []
        for at in range(0, len(dirty), _A_STEP):
            self._dirty += [counter for counter in dirty[at : at + _A_STEP] if counter.is_dirty]
            yield
        yield from self.quotas.forget_past(self._now())

    # --- other processes

    def collect(self, everything: bool = False) -> Iterator[list[Counter]]:
        """Yield the counters to report to others, all or those of which there is news, in steps; a step may find none.

        News are those used since the last call, once a second those of which requests run, and of the rest, whose
        remote part would be old at their next request, some in turn.
        """
        now = self._now()
        dirty, self._dirty = self._dirty, []
        if everything:
            yield from self._collected(list(self._counters.values()), lambda each: True)
            return
        turn = self._next_in_turn()
        if not 0.0 <= now - self._refreshed_at < _REFRESH_S:
            self._refreshed_at = now
            yield from self._collected(list(self._counters.values()), lambda each: each.running and not each.is_dirty)
        yield from self._collected(dirty, lambda each: each.is_dirty)
        yield from self._collected(turn, lambda each: not each.is_dirty)

    def _next_in_turn(self) -> list[Counter]:
        """Return some counters that were used in this minute or the one before, and not since the last call."""
        if not self._in_turn:
            self._in_turn = list(self._counters.values())
        turn = self._in_turn[-_IN_TURN:]
        del self._in_turn[-_IN_TURN:]
        return [each for each in turn if not each.is_dirty and each.counts_in(self._minute)]

    def _collected(self, counters: list[Counter], is_wanted: Callable[[Counter], object]) -> Iterator[list[Counter]]:
        """Yield those of some counters that are wanted, as reported."""
        for at in range(0, len(counters), _A_STEP):
            wanted = [counter for counter in counters[at : at + _A_STEP] if is_wanted(counter)]
            for counter in wanted:
                counter.is_dirty = False
                if counter.minute != self._minute:
                    counter.roll(self._minute)
            yield wanted

    def merge(self, counters: Sequence[Counter], remote: Sequence[Counts]) -> None:
        """Take over what other processes counted of these counters."""
        now = self._now()
        for counter, counts in zip(counters, remote, strict=True):
            counter.update_remote(counts, now)
