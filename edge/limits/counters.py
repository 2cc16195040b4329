"""What was used of one limit over a sliding minute, here and in other processes.

The sliding minute is made of two fixed ones: used = previous x (1 - share of this minute that is gone) + current.

Source of the window: https://blog.cloudflare.com/counting-things-a-lot-of-different-things/
"""

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from edge.limits.smooth import Paid, Smooth

MINUTE_S: Final = 60
ASSUMED_ANSWER_TOKENS: Final = 256  # of one of which nothing is known
_LATEST_SHARE: Final = 4  # of the mean, the latest answer has a quarter: four answers show what an agent does now
RUNNING_EXPIRES_S: Final = 3.0  # when a process that reports no more is taken for dead


class Counts(NamedTuple):
    """One part of a counter as processes exchange it: what this one counted, or what all others did together."""

    minute: int  # Unix time / 60
    requests: int
    tokens: int
    previous_requests: int
    previous_tokens: int
    running: int


class Counter:
    """What was used of one limit at one route by one user or key.

    The counts are those of all processes; `remote_` is the part of them that others reported. What runs elsewhere is
    kept apart, since it expires. `answer_tokens` is what an answer may be expected to take: the mean of the latest ones
    that were settled here, at least `ASSUMED_ANSWER_TOKENS`.
    """

    __slots__ = (
        "answer_tokens", "is_dirty", "key", "minute", "paid", "previous_requests", "previous_tokens",
        "remote_previous_requests", "remote_previous_tokens", "remote_requests", "remote_running",
        "remote_running_until", "remote_tokens", "requests", "running", "smooth", "tokens",
    )  # fmt: skip

    def __init__(self, key: tuple[str, str, str], minute: int) -> None:
        self.key = key  # limit, route, user or key id
        self.minute = minute
        self.requests = self.tokens = self.previous_requests = self.previous_tokens = 0
        self.remote_requests = self.remote_tokens = self.remote_previous_requests = self.remote_previous_tokens = 0
        self.running = self.remote_running = 0
        self.remote_running_until = 0.0
        self.answer_tokens = ASSUMED_ANSWER_TOKENS
        self.is_dirty = False  # used since the last report
        self.smooth: Smooth | None = None  # of a limit whose minute is spread over its seconds
        self.paid: Paid | None = None

    def __repr__(self) -> str:
        requests, tokens = self.previous_requests + self.requests, self.previous_tokens + self.tokens
        return f"<Counter {' '.join(self.key)}: {requests} requests, {tokens} tokens, {self.running} running>"

    def counts_in(self, minute: int) -> bool:
        """Return whether something that was used still counts in a minute."""
        if minute == self.minute:
            return bool(self.requests or self.tokens or self.previous_requests or self.previous_tokens)
        return minute == self.minute + 1 and bool(self.requests or self.tokens)

    def roll(self, minute: int) -> None:
        """Let a later minute begin; where nothing is left, what answers took is old too."""
        if not self.running and not self.counts_in(minute):
            self.answer_tokens = ASSUMED_ANSWER_TOKENS
        if minute == self.minute + 1:
            self.previous_requests, self.previous_tokens = self.requests, self.tokens
            self.remote_previous_requests, self.remote_previous_tokens = self.remote_requests, self.remote_tokens
        else:
            self.previous_requests = self.previous_tokens = 0
            self.remote_previous_requests = self.remote_previous_tokens = 0
        self.requests = self.tokens = self.remote_requests = self.remote_tokens = 0
        self.minute = minute

    def correct(self, minute: int, tokens: int) -> None:
        """Add tokens, or take them back, in the minute they were reserved in; in one that is gone only add.

        No more is taken back than is here: minutes are counted anew when a clock is set back.
        """
        if minute == self.minute:
            self.tokens = max(self.remote_tokens, self.tokens + tokens)
        elif minute == self.minute - 1:
            self.previous_tokens = max(self.remote_previous_tokens, self.previous_tokens + tokens)
        elif tokens > 0:
            self.tokens += tokens

    def shift(self, minutes: int) -> None:
        """Go along with a clock that was set."""
        self.minute += minutes
        self.remote_running_until += MINUTE_S * minutes
        if self.paid is not None:
            self.paid.shift(minutes)

    def learn(self, answer_tokens: int) -> None:
        """Let an answer count in what the next ones are expected to take."""
        mean = self.answer_tokens
        mean += (answer_tokens - mean) // _LATEST_SHARE
        self.answer_tokens = mean if mean > ASSUMED_ANSWER_TOKENS else ASSUMED_ANSWER_TOKENS

    def uncount(self, minute: int) -> None:
        """Take one request back."""
        if minute == self.minute:
            self.requests = max(self.remote_requests, self.requests - 1)
        elif minute == self.minute - 1:
            self.previous_requests = max(self.remote_previous_requests, self.previous_requests - 1)

    def local(self) -> Counts:
        """Return what this process counted: absolute counts, so that reporting them twice changes nothing."""
        return Counts(
            self.minute,
            self.requests - self.remote_requests,
            self.tokens - self.remote_tokens,
            self.previous_requests - self.remote_previous_requests,
            self.previous_tokens - self.remote_previous_tokens,
            self.running,
        )

    def update_remote(self, counts: Counts, now: float) -> None:
        """Take over what all other processes counted."""
        self._update_remote(counts, now)
        if self.smooth is not None and self.paid is not None:
            self.smooth.merge(self.paid, self, now)

    def _update_remote(self, counts: Counts, now: float) -> None:
        self.remote_running, self.remote_running_until = counts.running, now + RUNNING_EXPIRES_S
        if counts.minute == self.minute:
            previous_requests, previous_tokens = counts.previous_requests, counts.previous_tokens
            self.requests += counts.requests - self.remote_requests
            self.tokens += counts.tokens - self.remote_tokens
            self.remote_requests, self.remote_tokens = counts.requests, counts.tokens
        elif counts.minute == self.minute - 1:  # a minute has begun since the report
            previous_requests, previous_tokens = counts.requests, counts.tokens
        else:
            return
        self.previous_requests += previous_requests - self.remote_previous_requests
        self.previous_tokens += previous_tokens - self.remote_previous_tokens
        self.remote_previous_requests, self.remote_previous_tokens = previous_requests, previous_tokens
