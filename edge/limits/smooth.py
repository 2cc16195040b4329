"""A minute that is spread over its seconds: what is used now moves on when the next may begin.

A request begins when what was used before it is paid at the rate of the limit, but for what one second allows. One that
takes more than a second's worth begins when all is paid. What other processes used moves it on when it becomes known.

Source: the generic cell rate algorithm, ITU-T I.371. No clock in here: `now` is Unix seconds.
"""

from collections.abc import Iterator
from typing import Final

from edge.config.settings import LimitConfig
from edge.limits.counters import MINUTE_S, Counter
from edge.limits.quotas import Reason

_AT_ONCE_S: Final = 1.0  # what may be used at once: that of a second
_ROUNDING_S: Final = 1e-6  # Unix time in a float is exact to 0.25 us


class Paid:
    """When all that was used by one user or key is paid."""

    __slots__ = ("requests_at", "tokens_at")

    def __init__(self) -> None:
        self.requests_at = self.tokens_at = 0.0


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
        self.move(paid, 1, tokens, now)

    def correct(self, paid: Paid, begun: None, requests: int, tokens: int, now: float) -> None:
        """Correct what a request was counted as."""
        paid.requests_at += self._request_s * requests
        paid.tokens_at += self._token_s * tokens

    def move(self, paid: Paid, requests: int, tokens: int, now: float) -> None:
        """Count what was used by now."""
        if requests:
            paid.requests_at = max(paid.requests_at, now) + self._request_s * requests
        if tokens:
            paid.tokens_at = max(paid.tokens_at, now) + self._token_s * tokens

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


def _wait_s(paid_at: float, takes_s: float, now: float) -> float:
    """Return the seconds until what takes so long to pay may begin."""
    return paid_at + takes_s - now - max(_AT_ONCE_S, takes_s) - _ROUNDING_S if takes_s else 0.0
