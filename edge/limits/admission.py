"""Whether a request may start now, by the limits of its route and of its key; no clock and no I/O in here.

A counter belongs to a limit, a route, and a user or a key. It counts requests and tokens over a sliding minute
(`limits/counters.py`), and the requests that run. All limits are checked before any is charged, so a refusal charges
nothing. Tokens are reserved when a request starts and corrected when it ends, in the minute they were reserved in. An
answer reserves what the latest ones of its counter took on average, or `reserve_at_most`, and never more than it may
have: agents ask for 32,000 and use 100.

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
from typing import Final, NamedTuple

import msgspec
from prometheus_client.core import GaugeMetricFamily, Metric

from edge.config.settings import LimitConfig
from edge.errors import RateLimited
from edge.limits.counters import MINUTE_S, Counter, Counts

_log = logging.getLogger(__name__)

_EVERYTHING: Final = 10**14  # what a limit that is not set allows; a comparison with a float is slow above 2**48
_UNKNOWN_WAIT_S: Final = 0.5  # for one of the running requests to end
_LONGEST_RETRY_AFTER_S: Final = 60  # SDKs ignore a longer one
_ROUNDING_S: Final = 1e-6  # Unix time in a float is exact to 0.25 us
_REFRESH_S: Final = 1.0  # how often counters are reported of which requests merely run
_IN_TURN: Final = 200  # counters that are reported with each merge though nothing happened here
_A_STEP: Final = 1000  # counters that are looked at
IDLE_INTERVAL_S: Final = 30.0  # between two looks for those in which nothing is left
_MAX_NAMES: Final = 1000  # of the combinations, and of the unknown ones, that key records may name
# As OpenAI writes it, for 0 to 120 s: https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers
_RESETS: Final = tuple(b"%dm%ds" % divmod(each, 60) if each >= 60 else b"%ds" % each for each in range(121))


class Standing(NamedTuple):
    """What of a limit is used by now, at one route by one user or key; `per` says of which."""

    limit: str
    per: str
    requests: int
    tokens: int
    running: int


class Permit(msgspec.Struct, eq=False):
    """Leave to run; `headers` are the lines of the limits that its answer carries, b"" for none."""

    _admission: "Admission | None"
    _held: Sequence[tuple[Counter, int]]
    _minute: int
    headers: bytes
    _answers: int = 0

    def charge(self, tokens: int, answer_tokens: int = 0) -> None:
        """Charge the tokens that were really used in place of the reserved ones, and run no more.

        `answer_tokens` are those of all answers to the request. A second call does nothing.
        """
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.correct(self._held, self._minute, tokens, answer_tokens // self._answers if self._answers else 0)

    def cancel(self) -> None:
        """Take back all that was charged, in place of `charge`: the request was refused after all."""
        self.charge(0)
        for counter, _ in self._held:
            counter.uncount(self._minute)


UNLIMITED: Final = Permit(None, (), 0, b"")


class _Limit:
    """A `LimitConfig` that is quickly compared with: plain numbers, and header lines that want two more."""

    __slots__ = (
        "name", "per", "per_user", "request_lines", "requests", "reserve_at_most", "running", "token_lines", "tokens",
    )  # fmt: skip

    def __init__(self, config: LimitConfig) -> None:
        self.name = config.name
        self.per = config.per
        self.per_user = config.per == "user"
        requests, tokens = config.requests_per_minute, config.tokens_per_minute
        self.requests = _EVERYTHING if requests is None else requests
        self.tokens = _EVERYTHING if tokens is None else tokens
        self.reserve_at_most = config.reserve_at_most
        self.running = _EVERYTHING if config.concurrent_requests is None else config.concurrent_requests
        self.request_lines = b"" if requests is None else _lines(b"requests", requests)
        self.token_lines = b"" if tokens is None else _lines(b"tokens", tokens)


def _lines(what: bytes, limit: int) -> bytes:
    """Return three header lines that want what remains and when all of it is free again."""
    return (
        b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b\r\n"
        % (what, limit, what, what)
    )  # fmt: skip


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
        self.reconfigure(limits)

    def metrics(self) -> Iterator[Metric]:
        """Yield what Prometheus asks for."""
        counted = "Users and keys that are counted now, by limit and route."
        yield GaugeMetricFamily("edge_limit_counters", counted, value=len(self._counters))

    def counted(self) -> tuple[list[Counter], Mapping[str, LimitConfig], int, float]:
        """Return every counter, the limits, the minute, and how much of the minute before still counts."""
        elapsed_s = self._now() - self._minute_began
        return list(self._counters.values()), self._configs, self._minute, 1.0 - elapsed_s / MINUTE_S

    def reconfigure(self, limits: Mapping[str, LimitConfig]) -> None:
        """Take over the limits of a reload."""
        self._configs = limits
        self._limits: dict[str, _Limit] = {}  # that were used; thousands are not made in one step of the loop
        self._applying: dict[tuple[str | None, ...], tuple[_Limit, ...]] = {}  # by the names that are given
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
            raise _refusal(limits, held, elapsed_s)
        for counter, reserved in held:
            counter.requests += 1
            counter.tokens += reserved
            counter.running += 1
        return Permit(self, held, minute, _headers(limits, held, elapsed_s), answers)

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
        weight = 1.0 - (self._now() - self._minute_began) / MINUTE_S
        for limit in self._applying.get(names) or self._resolve(names):
            counter = self._counters.get((limit.name, route, user if limit.per_user else key_id))
            if counter is None:
                yield Standing(limit.name, limit.per, 0, 0, 0)
                continue
            if counter.minute != self._minute:
                counter.roll(self._minute)
            yield Standing(
                limit.name,
                limit.per,
                math.ceil(counter.previous_requests * weight + counter.requests),
                math.ceil(counter.previous_tokens * weight + counter.tokens),
                counter.running + counter.remote_running,
            )

    def _resolve(self, names: tuple[str | None, ...]) -> tuple[_Limit, ...]:
        limits = []
        for name in dict.fromkeys(each for each in names if each is not None):
            if name in self._configs:
                limit = self._limits.get(name)
                if limit is None:
                    limit = self._limits[name] = _Limit(self._configs[name])
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
                counter.minute += minute - self._minute
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


# --- headers and refusals


def _headers(limits: Sequence[_Limit], held: Sequence[tuple[Counter, int]], elapsed_s: float) -> bytes:
    """Return the header lines: of requests and of tokens, each of the limit that has the smallest share left."""
    weight, seconds = 1.0 - elapsed_s / MINUTE_S, int(elapsed_s)
    by_requests = by_tokens = 0
    if len(limits) > 1:
        by_requests, by_tokens = _fullest(limits, held, weight)
    lines = b""
    limit, counter = limits[by_requests], held[by_requests][0]
    if limit.request_lines:
        current, previous = counter.requests, counter.previous_requests
        left = int(limit.requests - previous * weight - current)
        free_in_s = 120 - seconds if current else 60 - seconds if previous else 0
        lines = limit.request_lines % (left if left > 0 else 0, _RESETS[free_in_s])
    limit, counter = limits[by_tokens], held[by_tokens][0]
    if limit.token_lines:
        current, previous = counter.tokens, counter.previous_tokens
        left = int(limit.tokens - previous * weight - current)
        free_in_s = 120 - seconds if current else 60 - seconds if previous else 0
        lines += limit.token_lines % (left if left > 0 else 0, _RESETS[free_in_s])
    return lines


def _fullest(limits: Sequence[_Limit], held: Sequence[tuple[Counter, int]], weight: float) -> tuple[int, int]:
    """Return the positions of the limit with the smallest share of requests left, and of that for tokens."""
    shares = [
        (
            (counter.previous_requests * weight + counter.requests) / limit.requests if limit.request_lines else -1.0,
            (counter.previous_tokens * weight + counter.tokens) / limit.tokens if limit.token_lines else -1.0,
        )
        for limit, (counter, _) in zip(limits, held, strict=True)
    ]
    positions = range(len(limits))
    return max(positions, key=lambda at: shares[at][0]), max(positions, key=lambda at: shares[at][1])


def _refusal(limits: Sequence[_Limit], held: Sequence[tuple[Counter, int]], elapsed_s: float) -> RateLimited:
    """Return the error of a request that does not fit; it names the limit that holds it up for longest.

    What was used counts for up to two minutes, as the message has it; `Retry-After` is one at most.
    """
    weight = 1.0 - elapsed_s / MINUTE_S
    reasons = []
    for limit, (counter, reserved) in zip(limits, held, strict=True):
        for what, allowed, previous, current, asked in (
            ("requests per minute", limit.requests, counter.previous_requests, counter.requests, 1),
            ("tokens per minute", limit.tokens, counter.previous_tokens, counter.tokens, reserved),
            ("concurrent requests", limit.running, 0, counter.running + counter.remote_running, 1),
        ):
            used = previous * weight + current
            if used + asked > allowed:
                is_gauge = what == "concurrent requests"
                wait_s = _UNKNOWN_WAIT_S if is_gauge else _wait_s(previous, current, allowed - asked, elapsed_s)
                numbers = f"limit {allowed}, used {math.ceil(used)}, requested {asked}"
                reasons.append((wait_s, f"{what} of this {limit.per} with this model: {numbers}", limit.name, what))
    wait_s, reason, *refusing = max(reasons)
    free_in_s = int(wait_s + _ROUNDING_S) + 1
    lines = _headers(limits, held, elapsed_s).decode().splitlines()
    refusal = RateLimited(
        f"Rate limit reached for {reason}. Try again in {free_in_s} s.",
        retry_after_s=min(free_in_s, _LONGEST_RETRY_AFTER_S),
        headers=tuple((name, value) for name, _, value in (line.partition(": ") for line in lines)),
    )
    refusal.wait_s = wait_s
    refusal.limit = (refusing[0], refusing[1])
    return refusal


def _wait_s(previous: int, current: int, room: int, elapsed_s: float) -> float:
    """Return the seconds until no more than `room` is left of what was used in two minutes."""
    if current <= room:
        return MINUTE_S * (1 - (room - current) / previous) - elapsed_s
    return MINUTE_S * (2 - room / current) - elapsed_s
