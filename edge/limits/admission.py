"""Whether a request may start now, by the limits of its route and of its key; no clock and no I/O in here.

A counter belongs to a limit, a route, and a user or a key. It counts requests and tokens over a sliding minute, made of
two fixed ones: used = previous x (1 - share of this minute that is gone) + current. Requests that run are a gauge. All
limits are checked before any is charged, so a refusal charges nothing. Tokens are reserved when a request starts and
settled when it ends, in the minute they were reserved in.

Processes share what they counted (`limits/shared.py`), and none waits for it: a counter knows what the others had used
when this process last heard of it. All of them together use at most

    limit + (processes - 1) x left + what requests in flight use beyond their reservations

with left = limit - what all had used at the last moment of which each knew when it last admitted a request: two merges
before, 0.2 s, while there are few hundred counters; with more, those that are not used here are heard of in turn. A
process that has not used one for two minutes knows nothing of others: where all begin at once, left is the whole limit.
The last term is there for tokens only, and in a single process too.

Source of the window: https://blog.cloudflare.com/counting-things-a-lot-of-different-things/
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from edge.config.settings import LimitConfig
from edge.errors import RateLimited

_log = logging.getLogger(__name__)

_MINUTE_S: Final = 60
_EVERYTHING: Final = 10**14  # what a limit that is not set allows; a comparison with a float is slow above 2**48
_UNKNOWN_WAIT_S: Final = 0.5  # for one of the running requests to end
_LONGEST_RETRY_AFTER_S: Final = 60  # SDKs sleep what they are told, and heed no more
_ROUNDING_S: Final = 1e-6  # Unix time in a float is exact to 0.25 us
SLOTS_EXPIRE_S: Final = 3.0  # when a process that tells no more is taken for dead
_REFRESH_S: Final = 1.0  # how often slots are told that are merely held
_IN_TURN: Final = 200  # counters that are told again with each merge though nothing happened here
_MAX_NAMES: Final = 1000  # of the combinations, and of the unknown ones, that key records may name
# As OpenAI writes it, for 0 to 120 s: https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers
_RESETS: Final = tuple(b"%dm%ds" % divmod(each, 60) if each >= 60 else b"%ds" % each for each in range(121))


class Told(NamedTuple):
    """What is told of a counter: by a process of its own part, to it of all other parts together."""

    minute: int  # Unix time / 60
    requests: int
    tokens: int
    previous_requests: int
    previous_tokens: int
    running: int


class Counter:
    """What was used of one limit at one route by one user or key, here and, as far as is known, elsewhere.

    The counts are those of all processes; `others_` is the part of them that was told. What runs elsewhere is kept
    apart, since it expires.
    """

    __slots__ = (
        "key",
        "minute",
        "others_previous_requests",
        "others_previous_tokens",
        "others_requests",
        "others_running",
        "others_running_until",
        "others_tokens",
        "previous_requests",
        "previous_tokens",
        "requests",
        "running",
        "tokens",
        "touched",
    )

    def __init__(self, key: tuple[str, str, str], minute: int) -> None:
        self.key = key  # limit, route, user or key id
        self.minute = minute
        self.requests = self.tokens = self.previous_requests = self.previous_tokens = 0
        self.others_requests = self.others_tokens = self.others_previous_requests = self.others_previous_tokens = 0
        self.running = self.others_running = 0
        self.others_running_until = 0.0
        self.touched = False  # since it was told last

    def __repr__(self) -> str:
        requests, tokens = self.previous_requests + self.requests, self.previous_tokens + self.tokens
        return f"<Counter {' '.join(self.key)}: {requests} requests, {tokens} tokens, {self.running} running>"

    def holds_at(self, minute: int) -> bool:
        """Say whether something that was used still counts in a minute."""
        if minute == self.minute:
            return bool(self.requests or self.tokens or self.previous_requests or self.previous_tokens)
        return minute == self.minute + 1 and bool(self.requests or self.tokens)

    def roll(self, minute: int) -> None:
        """Let a later minute begin."""
        if minute == self.minute + 1:
            self.previous_requests, self.previous_tokens = self.requests, self.tokens
            self.others_previous_requests, self.others_previous_tokens = self.others_requests, self.others_tokens
        else:
            self.previous_requests = self.previous_tokens = 0
            self.others_previous_requests = self.others_previous_tokens = 0
        self.requests = self.tokens = self.others_requests = self.others_tokens = 0
        self.minute = minute

    def correct(self, minute: int, tokens: int) -> None:
        """Add tokens, or take them back, in the minute they were reserved in; in one that is gone only add.

        No more is taken back than is here: minutes are counted anew when a clock is set back.
        """
        if minute == self.minute:
            self.tokens = max(self.others_tokens, self.tokens + tokens)
        elif minute == self.minute - 1:
            self.previous_tokens = max(self.others_previous_tokens, self.previous_tokens + tokens)
        elif tokens > 0:
            self.tokens += tokens

    def uncount(self, minute: int) -> None:
        """Take one request back."""
        if minute == self.minute:
            self.requests = max(self.others_requests, self.requests - 1)
        elif minute == self.minute - 1:
            self.previous_requests = max(self.others_previous_requests, self.previous_requests - 1)

    def own(self) -> Told:
        """Return what this process has to tell: absolute counts, so that telling them twice changes nothing."""
        return Told(
            self.minute,
            self.requests - self.others_requests,
            self.tokens - self.others_tokens,
            self.previous_requests - self.others_previous_requests,
            self.previous_tokens - self.others_previous_tokens,
            self.running,
        )

    def hear(self, told: Told, now: float) -> None:
        """Take over what all other processes told."""
        self.others_running, self.others_running_until = told.running, now + SLOTS_EXPIRE_S
        if told.minute == self.minute:
            previous_requests, previous_tokens = told.previous_requests, told.previous_tokens
            self.requests += told.requests - self.others_requests
            self.tokens += told.tokens - self.others_tokens
            self.others_requests, self.others_tokens = told.requests, told.tokens
        elif told.minute == self.minute - 1:  # a minute has begun since it was asked
            previous_requests, previous_tokens = told.requests, told.tokens
        else:
            return
        self.previous_requests += previous_requests - self.others_previous_requests
        self.previous_tokens += previous_tokens - self.others_previous_tokens
        self.others_previous_requests, self.others_previous_tokens = previous_requests, previous_tokens


class Permit:
    """Leave to run; `headers` are the lines of the limits that its answer carries, b"" for none."""

    __slots__ = ("_admission", "_held", "_minute", "headers")

    def __init__(
        self, admission: "Admission | None", held: Sequence[tuple[Counter, int]], minute: int, headers: bytes
    ) -> None:
        self.headers = headers
        self._admission = admission
        self._held = held
        self._minute = minute

    def settle(self, tokens: int) -> None:
        """Charge the tokens that were really used in place of the reserved ones, and run no more.

        A second call does nothing.
        """
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.settle(self._held, self._minute, tokens)

    def cancel(self) -> None:
        """Take back all that was charged, in place of `settle`: the request was refused after all."""
        self.settle(0)
        for counter, _ in self._held:
            counter.uncount(self._minute)


UNLIMITED: Final = Permit(None, (), 0, b"")


class _Limit:
    """A `LimitConfig` that is quickly compared with: plain numbers, and header lines that want two more."""

    __slots__ = ("name", "per", "per_user", "request_lines", "requests", "running", "token_lines", "tokens")

    def __init__(self, config: LimitConfig) -> None:
        self.name = config.name
        self.per = config.per
        self.per_user = config.per == "user"
        requests, tokens = config.requests_per_minute, config.tokens_per_minute
        self.requests = _EVERYTHING if requests is None else requests
        self.tokens = _EVERYTHING if tokens is None else tokens
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
    """Admits requests, or says when to come back.

    `clock` yields Unix seconds and never jumps; the counters of a limit outlive a reload by its name.
    """

    def __init__(self, limits: Mapping[str, LimitConfig], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._offset_s = 0.0  # of the clock that processes share
        self._minute = 0
        self._minute_began = 0.0
        self._counters: dict[tuple[str, str, str], Counter] = {}
        self._touched: list[Counter] = []
        self._refreshed_at = 0.0
        self._in_turn: list[Counter] = []
        self._limits: dict[str, _Limit] = {}
        self._applying: dict[tuple[str | None, ...], tuple[_Limit, ...]] = {}  # by the names that are given
        self._unknown: set[str] = set()
        self.reconfigure(limits)

    @property
    def counter_count(self) -> int:
        """How many counters are held in memory."""
        return len(self._counters)

    def reconfigure(self, limits: Mapping[str, LimitConfig]) -> None:
        """Take over the limits of a reload."""
        self._limits = {name: _Limit(limit) for name, limit in limits.items()}
        self._applying.clear()
        self._unknown.clear()

    # --- requests

    def admit(self, route: str, names: tuple[str | None, ...], user: str, key_id: str, tokens: int) -> Permit:
        """Charge one request, the `tokens` that it may use and one place, to each of the named limits (None: none).

        More tokens than a limit has are taken for all of it: such a request runs when nothing else was used. Raises:
        `RateLimited`.
        """
        limits = self._applying.get(names)
        if limits is None:
            limits = self._resolve(names)
        if not limits:
            return UNLIMITED
        now = self._clock() + self._offset_s
        elapsed_s = now - self._minute_began
        if not 0.0 <= elapsed_s < _MINUTE_S:
            elapsed_s = self._turn(now)
        minute, weight = self._minute, 1.0 - elapsed_s / _MINUTE_S
        held = []
        fits = True
        for limit in limits:
            key = (limit.name, route, user if limit.per_user else key_id)
            counter = self._counters.get(key)
            if counter is None:
                counter = self._counters[key] = Counter(key, minute)
            elif counter.minute != minute:
                counter.roll(minute)
            if not counter.touched:
                counter.touched = True
                self._touched.append(counter)
            reserved = tokens if tokens < limit.tokens else limit.tokens
            if counter.others_running and counter.others_running_until <= now:
                counter.others_running = 0
            if (
                counter.running + counter.others_running >= limit.running
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
        return Permit(self, held, minute, _headers(limits, held, elapsed_s))

    def settle(self, held: Sequence[tuple[Counter, int]], minute: int, tokens: int) -> None:
        """Correct what a permit reserved in `minute`, and give its places back; called once, by the permit."""
        self._now()
        for counter, reserved in held:
            if counter.minute != self._minute:
                counter.roll(self._minute)
            if tokens != reserved:
                counter.correct(minute, tokens - reserved)
            counter.running -= 1
            if not counter.touched:
                counter.touched = True
                self._touched.append(counter)

    def _resolve(self, names: tuple[str | None, ...]) -> tuple[_Limit, ...]:
        limits = []
        for name in dict.fromkeys(names):
            limit = self._limits.get(name) if name is not None else None
            if limit is not None:
                limits.append(limit)
            elif name is not None and name not in self._unknown and len(self._unknown) < _MAX_NAMES:
                self._unknown.add(name)
                _log.warning("limit %r, named by a key, is not in [limits]: it limits nothing", name)
        if len(self._applying) >= _MAX_NAMES:
            self._applying.clear()
        self._applying[names] = tuple(limits)
        return self._applying[names]

    # --- time

    def _now(self) -> float:
        """Return Unix time, after its minute has begun."""
        now = self._clock() + self._offset_s
        if not 0.0 <= now - self._minute_began < _MINUTE_S:
            self._turn(now)
        return now

    def _turn(self, now: float) -> float:
        """Let the minute of `now` begin; return how much of it is gone, in seconds.

        A minute that has begun goes on when the shared clock is set back by less than one; when it is set back by more,
        the counters go with it.
        """
        elapsed_s = now - self._minute_began
        if -_MINUTE_S < elapsed_s < 0:
            return 0.0
        minute = int(now // _MINUTE_S)
        if elapsed_s < 0:
            for counter in self._counters.values():
                counter.minute += minute - self._minute
        self._minute, self._minute_began = minute, float(minute * _MINUTE_S)
        self._forget_idle()
        return now - self._minute_began

    def _forget_idle(self) -> None:
        """Drop the counters in which nothing is left: memory holds who came in the last two minutes."""
        idle = [each for each in self._counters.values() if not each.running and not each.holds_at(self._minute)]
        for counter in idle:
            del self._counters[counter.key]
            counter.touched = False
        self._touched = [counter for counter in self._touched if counter.touched]

    # --- other processes

    @property
    def offset_s(self) -> float:
        """How far the clock that processes share is ahead of this one's."""
        return self._offset_s

    def adopt(self, offset_s: float) -> None:
        """Count in the minutes of a clock that is so much ahead."""
        self._offset_s = offset_s

    def collect(self, everything: bool = False) -> list[Counter]:
        """Return the counters of which others must be told.

        Those touched since the last call, once a second those of which requests run, and of the rest, whose news from
        others would be old at their next request, some in turn; or all of them.
        """
        now = self._now()
        collected, self._touched = self._touched, []
        if everything:
            collected = list(self._counters.values())
        elif not 0.0 <= now - self._refreshed_at < _REFRESH_S:
            collected += [each for each in self._counters.values() if each.running and not each.touched]
            self._refreshed_at = now
        if not everything:
            collected += self._next_in_turn()
        for counter in collected:
            counter.touched = False
            if counter.minute != self._minute:
                counter.roll(self._minute)
        return collected

    def _next_in_turn(self) -> list[Counter]:
        """Return some counters that were used in this minute or the one before, and not touched since the last call."""
        if not self._in_turn:
            self._in_turn = list(self._counters.values())
        turn, self._in_turn = self._in_turn[-_IN_TURN:], self._in_turn[:-_IN_TURN]
        return [each for each in turn if not each.touched and each.holds_at(self._minute)]

    def merge(self, counters: Sequence[Counter], told: Sequence[Told]) -> None:
        """Take over what other processes told of these counters."""
        now = self._now()
        for counter, each in zip(counters, told, strict=True):
            counter.hear(each, now)


# --- what is said


def _headers(limits: Sequence[_Limit], held: Sequence[tuple[Counter, int]], elapsed_s: float) -> bytes:
    """Return the header lines: of requests and of tokens, each of the limit that has the smallest share left."""
    weight, seconds = 1.0 - elapsed_s / _MINUTE_S, int(elapsed_s)
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

    What was used counts for up to two minutes, which the message tells; `Retry-After` says no more than one.
    """
    weight = 1.0 - elapsed_s / _MINUTE_S
    reasons = []
    for limit, (counter, reserved) in zip(limits, held, strict=True):
        for what, allowed, previous, current, asked in (
            ("requests per minute", limit.requests, counter.previous_requests, counter.requests, 1),
            ("tokens per minute", limit.tokens, counter.previous_tokens, counter.tokens, reserved),
            ("concurrent requests", limit.running, 0, counter.running + counter.others_running, 1),
        ):
            used = previous * weight + current
            if used + asked > allowed:
                is_gauge = what == "concurrent requests"
                wait_s = _UNKNOWN_WAIT_S if is_gauge else _wait_s(previous, current, allowed - asked, elapsed_s)
                numbers = f"limit {allowed}, used {math.ceil(used)}, requested {asked}"
                reasons.append((wait_s, f"{what} of this {limit.per} with this model: {numbers}"))
    wait_s, reason = max(reasons)
    free_in_s = int(wait_s + _ROUNDING_S) + 1
    lines = _headers(limits, held, elapsed_s).decode().splitlines()
    return RateLimited(
        f"Rate limit reached for {reason}. Try again in {free_in_s} s.",
        retry_after_s=min(free_in_s, _LONGEST_RETRY_AFTER_S),
        headers=tuple((name, value) for name, _, value in (line.partition(": ") for line in lines)),
    )


def _wait_s(previous: int, current: int, room: int, elapsed_s: float) -> float:
    """Return the seconds until no more than `room` is left of what was used in two minutes."""
    if current <= room:
        return _MINUTE_S * (1 - (room - current) / previous) - elapsed_s
    return _MINUTE_S * (2 - room / current) - elapsed_s
