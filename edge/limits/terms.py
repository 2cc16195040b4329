"""What a limit allows and says: the header lines of its answers, and its refusals."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

from edge.config.settings import LimitConfig
from edge.errors import LONGEST_RETRY_AFTER_S, QuotaSpent, RateLimited
from edge.limits.counters import MINUTE_S, Counter
from edge.limits.quotas import NO_LIMIT, Quotas, Reason
from edge.limits.smooth import Smooth

_UNKNOWN_WAIT_S: Final = 0.5  # for one of the running requests to end
_RUNNING: Final = "concurrent requests"
_LONGEST_RETRY_S: Final = 120  # after which no SDK tries again by itself
_ROUNDING_S: Final = 1e-6  # Unix time in a float is exact to 0.25 us
# As OpenAI writes it, for 0 to 120 s: https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers
_RESETS: Final = tuple(b"%dm%ds" % divmod(each, 60) if each >= 60 else b"%ds" % each for each in range(121))


class Part(Protocol):
    """What a limit has beside its minute: a day, a month, or a rate. `found` is what counts there for a user or key."""

    def find(self, counter: Counter, now: float) -> Any:
        """Return what counts for the user or key of a counter."""

    def reserved(self, tokens: int) -> int:
        """Return what a request reserves that may take so many tokens."""

    def has_room(self, found: Any, tokens: int, now: float) -> bool:
        """Return whether a request may begin that reserves so many tokens."""

    def charge(self, found: Any, tokens: int, now: float) -> Any:
        """Count a request; return what `correct` wants as `begun`."""

    def correct(self, found: Any, begun: Any, requests: int, tokens: int, now: float) -> None:
        """Correct what a request was counted as."""

    def reasons(self, found: Any, tokens: int, now: float) -> Iterator[Reason]:
        """Yield why a request does not fit that reserves so many tokens."""


HeldPart = tuple[Part, Any, int]  # what counts there, and the tokens that a request reserves


class Limit:
    """A `LimitConfig` that is quickly compared with: plain numbers, and header lines that want two more."""

    __slots__ = (
        "allowances", "name", "parts", "per", "per_user", "request_lines", "requests", "reserve_at_most", "running",
        "token_lines", "tokens",
    )  # fmt: skip

    def __init__(self, config: LimitConfig, quotas: Quotas) -> None:
        self.name = config.name
        self.per = config.per
        self.per_user = config.per == "user"
        requests, tokens = config.requests_per_minute, config.tokens_per_minute
        self.requests = NO_LIMIT if requests is None else requests
        self.tokens = NO_LIMIT if tokens is None else tokens
        self.reserve_at_most = config.reserve_at_most
        self.running = NO_LIMIT if config.concurrent_requests is None else config.concurrent_requests
        self.request_lines = b"" if requests is None else _lines(b"requests", requests)
        self.token_lines = b"" if tokens is None else _lines(b"tokens", tokens)
        self.allowances = quotas.allowances(config)
        self.parts: tuple[Part, ...] = (*self.allowances, Smooth(config)) if config.smooth else self.allowances


def _lines(what: bytes, limit: int) -> bytes:
    """Return three header lines that want what remains and when all of it is free again."""
    return (
        b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b\r\n"
        % (what, limit, what, what)
    )  # fmt: skip


def header_lines(limits: Sequence[Limit], held: Sequence[tuple[Counter, int]], elapsed_s: float) -> bytes:
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


def _fullest(limits: Sequence[Limit], held: Sequence[tuple[Counter, int]], weight: float) -> tuple[int, int]:
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


def refusal_of(
    limits: Sequence[Limit],
    held: Sequence[tuple[Counter, int]],
    parts: Sequence[HeldPart],
    elapsed_s: float,
    now: float,
) -> RateLimited:
    """Return the error of a request that does not fit; it names the limit that holds it up for longest.

    What was used counts for up to two minutes, as the message has it; `Retry-After` is one at most. That of a day or a
    month is how long it is.
    """
    reasons = list(_minute_reasons(limits, held, elapsed_s))
    for part, found, reserved in parts:
        reasons += part.reasons(found, reserved, now)
    reason = max(reasons)
    free_in_s = int(reason.wait_s + _ROUNDING_S) + 1
    lines = header_lines(limits, held, elapsed_s).decode().splitlines()
    headers = tuple((name, value) for name, _, value in (line.partition(": ") for line in lines))
    refusal: RateLimited
    if reason.ends:
        refusal = QuotaSpent(
            f"Quota reached for {reason.text}. {reason.ends}, in {_in_words(free_in_s)}.",
            retry_after_s=free_in_s,
            headers=headers,
        )
        refusal.should_retry = None if free_in_s <= _LONGEST_RETRY_S else False
    else:
        refusal = RateLimited(
            f"Rate limit reached for {reason.text}. Try again in {free_in_s} s.",
            retry_after_s=min(free_in_s, LONGEST_RETRY_AFTER_S),
            headers=headers,
        )
    refusal.wait_s = reason.wait_s if reason.what != _RUNNING else 0.0
    refusal.limit = (reason.limit, reason.what)
    return refusal


def _in_words(seconds: int) -> str:
    """Return a time as people say it: 40 s, 12 min, 7 h 12 min or 19 d 3 h."""
    if seconds < 120:
        return f"{seconds} s"
    minutes = math.ceil(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return "{} d {} h".format(*divmod(hours + bool(minutes), 24))


def _minute_reasons(limits: Sequence[Limit], held: Sequence[tuple[Counter, int]], elapsed_s: float) -> Iterator[Reason]:
    """Yield what a minute, or its places, have no room for."""
    weight = 1.0 - elapsed_s / MINUTE_S
    for limit, (counter, reserved) in zip(limits, held, strict=True):
        for what, allowed, previous, current, asked in (
            ("requests per minute", limit.requests, counter.previous_requests, counter.requests, 1),
            ("tokens per minute", limit.tokens, counter.previous_tokens, counter.tokens, reserved),
            (_RUNNING, limit.running, 0, counter.running + counter.remote_running, 1),
        ):
            used = previous * weight + current
            if used + asked > allowed:
                is_gauge = what == _RUNNING
                wait_s = _UNKNOWN_WAIT_S if is_gauge else _wait_s(previous, current, allowed - asked, elapsed_s)
                numbers = f"limit {allowed}, used {math.ceil(used)}, requested {asked}"
                yield Reason(wait_s, f"{what} of this {limit.per} with this model: {numbers}", limit.name, what)


def _wait_s(previous: int, current: int, room: int, elapsed_s: float) -> float:
    """Return the seconds until no more than `room` is left of what was used in two minutes."""
    if current <= room:
        return MINUTE_S * (1 - (room - current) / previous) - elapsed_s
    return MINUTE_S * (2 - room / current) - elapsed_s
