"""A minute that is spread over its seconds: what is used now moves on when the next may begin.

A request begins when what was used before it is paid at the rate of the limit, but for what one second allows. One that
takes more than a second's worth begins when all is paid. What other processes used moves it on when it becomes known;
what they used in more than a second of which nothing was known counts as used evenly in that time.

Source: the generic cell rate algorithm, ITU-T I.371. No clock in here: `now` is Unix seconds.
"""

from collections.abc import Iterator
from typing import Final

from edge.config.settings import LimitConfig
from edge.limits.counters import MINUTE_S, Counter
from edge.limits.quotas import Reason

_AT_ONCE_S: Final = 1.0  # what may be used at once: that of a second
_GAP_S: Final = 1.0  # between two merges, from which on what others used is not taken for used just now
_ROUNDING_S: Final = 1e-6  # Unix time in a float is exact to 0.25 us


class Paid:
    """When all that was used by one user or key is paid, and what is known of others.

    `remote_requests` and `remote_tokens` are the most that others were known to have used in `minute`, as of
    `merged_at`: a server that comes back empty tells less, and then the same again.
    """

    __slots__ = ("merged_at", "minute", "remote_requests", "remote_tokens", "requests_at", "tokens_at")

    def __init__(self) -> None:
        self.requests_at = self.tokens_at = self.merged_at = 0.0
        self.minute = self.remote_requests = self.remote_tokens = 0

    def shift(self, minutes: int) -> None:
        """Go along with a clock that was set."""
        self.minute += minutes
        for name in ("requests_at", "tokens_at", "merged_at"):
            setattr(self, name, getattr(self, name) + MINUTE_S * minutes)


class Smooth:
    """The rates of a limit whose minute is spread."""

    __slots__ = ("_name", "_per", "_request_s", "_requests", "_token_s", "_tokens")

    def __init__(self, config: LimitConfig) -> None:
        self._name, self._per = config.name, config.per
        self._requests, self._tokens = config.requests_per_minute, config.tokens_per_minute
        self._request_s = MINUTE_S / self._requests if self._requests else 0.0
        self._token_s = MINUTE_S / self._tokens if self._tokens else 0.0

    def find(self, counter: Counter, now: float) -> Paid:
        """Return what counts for a user or key."""
        counter.smooth = self  # which is another one after a reload
        if counter.paid is None:
            counter.paid = Paid()
        return counter.paid

    def reserved(self, tokens: int) -> int:
        """Return what a request reserves that may take so many tokens."""
        return tokens if self._tokens is None else min(tokens, self._tokens)

    def has_room(self, paid: Paid, tokens: int, now: float) -> bool:
        """Return whether a request may begin that reserves so many tokens."""
        return _wait_s(paid.requests_at, self._request_s, now) <= 0 and (
            _wait_s(paid.tokens_at, self._token_s * tokens, now) <= 0
        )

    def charge(self, paid: Paid, tokens: int, now: float) -> None:
        """Count a request."""
        paid.requests_at = _moved(paid.requests_at, self._request_s, now, 0.0)
        if tokens:
            paid.tokens_at = _moved(paid.tokens_at, self._token_s * tokens, now, 0.0)

    def correct(self, paid: Paid, begun: None, requests: int, tokens: int, now: float) -> None:
        """Correct what a request was counted as."""
        paid.requests_at += self._request_s * requests
        paid.tokens_at += self._token_s * tokens

    def merge(self, paid: Paid, counter: Counter, now: float) -> None:
        """Count what others used in this minute, as far as it is news."""
        if paid.minute != counter.minute:
            paid.minute, paid.remote_requests, paid.remote_tokens = counter.minute, 0, 0
        gap_s = now - max(paid.merged_at, counter.minute * MINUTE_S)
        if gap_s < _GAP_S:
            gap_s = 0.0
        paid.merged_at = now
        if (requests := counter.remote_requests - paid.remote_requests) > 0:
            paid.remote_requests += requests
            paid.requests_at = _moved(paid.requests_at, self._request_s * requests, now, gap_s)
        if (tokens := counter.remote_tokens - paid.remote_tokens) > 0:
            paid.remote_tokens += tokens
            paid.tokens_at = _moved(paid.tokens_at, self._token_s * tokens, now, gap_s)

    def reasons(self, paid: Paid, tokens: int, now: float) -> Iterator[Reason]:
        """Yield why a request does not fit that reserves so many tokens."""
        for what, limit, paid_at, takes_s in (
            ("requests", self._requests, paid.requests_at, self._request_s),
            ("tokens", self._tokens, paid.tokens_at, self._token_s * tokens),
        ):
            wait_s = _wait_s(paid_at, takes_s, now)
            if wait_s > 0:
                what = f"{what} per minute"
                text = f"{what} of this {self._per} with this model, over its seconds: limit {limit}"
                yield Reason(wait_s, text, self._name, what)


def _moved(paid_at: float, takes_s: float, now: float, gap_s: float) -> float:
    """Return when all is paid after more was used, evenly in the last `gap_s` seconds."""
    return max(paid_at, now - gap_s) + max(takes_s - gap_s, 0.0)


def _wait_s(paid_at: float, takes_s: float, now: float) -> float:
    """Return the seconds until what takes so long to pay may begin."""
    return paid_at + takes_s - now - max(_AT_ONCE_S, takes_s) - _ROUNDING_S if takes_s else 0.0
