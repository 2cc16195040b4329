"""What was used of a limit in a day or a month, here and elsewhere; no clock and no I/O in here.

Requests count when they begin, and tokens are reserved then and corrected when they end, as with the minute. What
ends in another period than it began in gives nothing back, and what it took more counts in the new one.

What others used, and this process before it was started anew, is known from where it is kept: `limits/shared_quotas.py`
or, in a process that shares nothing, the journal (`process/quotas.py`).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from edge.config.settings import LimitConfig
from edge.config.zones import zone_of
from edge.limits.counters import Counter
from edge.limits.periods import Calendar, Period, Span

NO_LIMIT: Final = 10**14  # what a limit that is not set allows; a comparison with a float is slow above 2**48
_A_STEP: Final = 1000
_LATELY_S: Final = 120.0  # as long as a counter of a minute is in use
_REPORTED_S: Final = 12 * 3600.0  # after which it is reported again: what is silent for a day is taken for gone
_IN_TURN: Final = 200  # quotas that are reported with each merge though nothing happened here

Key = tuple[str, str, str]  # limit, route, user or key id


class Spent(NamedTuple):
    """Requests and tokens."""

    requests: int = 0
    tokens: int = 0


NOTHING: Final = Spent()


class Reason(NamedTuple):
    """Why a request does not fit, and for how long: `what` of a `limit` is used up. `ends` says when a quota does."""

    wait_s: float
    text: str
    limit: str
    what: str
    ends: str = ""


class Quota:
    """What one user or key used of a limit at a route in a period: all of it, and the part that others counted.

    `gone` is of processes that have ended, where that is known; `used_at` and `reported_at` are Unix seconds.
    """

    __slots__ = (
        "gone", "is_dirty", "key", "period", "remote", "reported_at", "requests", "span", "tokens", "used_at",
    )  # fmt: skip

    def __init__(self, span: Span, key: Key, period: Period, remote: Spent = NOTHING) -> None:
        self.span = span
        self.key = key
        self.period = period
        self.remote = remote
        self.requests, self.tokens = remote
        self.gone = NOTHING
        self.is_dirty = False  # used since the last report
        self.used_at = self.reported_at = 0.0

    def __repr__(self) -> str:
        return f"<Quota {' '.join(self.key)} {self.period.name}: {self.requests} requests, {self.tokens} tokens>"

    def roll(self, period: Period) -> None:
        """Let a period be the current one; what was counted goes along when the clock is set back."""
        if period.begins_at > self.period.begins_at:
            self.requests = self.tokens = 0
            self.remote = self.gone = NOTHING
        self.period = period

    def correct(self, begun: Period, requests: int, tokens: int) -> None:
        """Add what a request of a period took more, or take back what it took less, of what is counted here."""
        if begun.begins_at != self.period.begins_at:
            requests, tokens = max(requests, 0), max(tokens, 0)
        self.requests = max(self.remote.requests, self.requests + requests)
        self.tokens = max(self.remote.tokens, self.tokens + tokens)

    @property
    def local(self) -> Spent:
        """What was counted here."""
        return Spent(self.requests - self.remote.requests, self.tokens - self.remote.tokens)

    def update_remote(self, remote: Spent) -> None:
        """Take over what all others counted."""
        self.requests += remote.requests - self.remote.requests
        self.tokens += remote.tokens - self.remote.tokens
        self.remote = remote


class Allowance:
    """What a limit allows in a day or a month."""

    __slots__ = ("_quotas", "calendar", "is_per_user", "name", "per", "requests", "span", "tokens", "zone")

    def __init__(
        self, quotas: "Quotas", config: LimitConfig, span: Span, requests: int | None, tokens: int | None
    ) -> None:
        self._quotas = quotas
        self.name = config.name
        self.zone = config.time_zone
        self.calendar = quotas.calendar_of(config.time_zone)
        self.span: Span = span
        self.per = config.per
        self.is_per_user = config.per == "user"
        self.requests = NO_LIMIT if requests is None else requests
        self.tokens = NO_LIMIT if tokens is None else tokens

    def find(self, counter: Counter, now: float) -> Quota:
        """Return what counts in the period of now."""
        return self._quotas.find(self, counter.key, now)

    def reserved(self, tokens: int) -> int:
        """Return what a request reserves that may take so many tokens: more than there are is all of them."""
        return min(tokens, self.tokens)

    def has_room(self, quota: Quota, tokens: int, now: float) -> bool:
        """Return whether a request may begin that reserves so many tokens."""
        return quota.requests < self.requests and quota.tokens + tokens <= self.tokens

    def charge(self, quota: Quota, tokens: int, now: float) -> Period:
        """Count a request; return in which period."""
        quota.requests += 1
        quota.tokens += tokens
        return quota.period

    def correct(self, quota: Quota, begun: Period, requests: int, tokens: int, now: float) -> None:
        """Correct what a request was counted as in the period in which it began."""
        self._quotas.find_held(self, quota.key, now).correct(begun, requests, tokens)

    def reasons(self, quota: Quota, tokens: int, now: float) -> Iterator[Reason]:
        """Yield why a request does not fit that reserves so many tokens."""
        ends_at = quota.period.ends_at
        ends = f"The next {self.span} begins at {self.begins_anew(quota)}"
        for what, allowed, used, asked in (
            ("requests", self.requests, quota.requests, 1),
            ("tokens", self.tokens, quota.tokens, tokens),
        ):
            if used + asked > allowed:
                what = f"{what} per {self.span}"
                numbers = f"limit {allowed}, used {used}, requested {asked}"
                text = f"{what} of this {self.per} with this model: {numbers}"
                yield Reason(ends_at - now, text, self.name, what, ends)

    def begins_anew(self, quota: Quota) -> str:
        """Return when the next period begins, RFC 3339 with the offset of its time zone."""
        return self.calendar.written(quota.period.ends_at)


class Quotas:
    """Every quota that is counted; `past` says of one that is new what others used of it."""

    def __init__(self) -> None:
        self.past: Callable[[Allowance, Key, Period], Spent] | None = None
        self.shares = False  # whether what was used is reported to others
        self._counters: dict[tuple[Span, Key], tuple[Quota, Allowance]] = {}
        self._calendars: dict[str, Calendar] = {}
        self._dirty: list[Quota] = []
        self._lately: OrderedDict[Quota, None] = OrderedDict()  # those that were used, latest last
        self._in_turn: list[Quota] = []

    def __len__(self) -> int:
        return len(self._counters)

    def calendar_of(self, zone: str) -> Calendar:
        """Return the calendar of a time zone."""
        calendar = self._calendars.get(zone)
        if calendar is None:
            calendar = self._calendars[zone] = Calendar(zone_of(zone))
        return calendar

    def allowances(self, config: LimitConfig) -> tuple[Allowance, ...]:
        """Return what a limit allows in a day and in a month, as far as it says so."""
        found = []
        if config.requests_per_day is not None or config.tokens_per_day is not None:
            found.append(Allowance(self, config, "day", config.requests_per_day, config.tokens_per_day))
        if config.tokens_per_month is not None:
            found.append(Allowance(self, config, "month", None, config.tokens_per_month))
        return tuple(found)

    def find(self, allowance: Allowance, key: Key, now: float) -> Quota:
        """Return what counts in the period of now; what others used of it is to be known, also by who is refused."""
        known = self._counters.get((allowance.span, key))
        period = allowance.calendar.current(allowance.span, now)
        if known is None:
            past = NOTHING if self.past is None else self.past(allowance, key, period)
            quota = Quota(allowance.span, key, period, past)
            self._counters[allowance.span, key] = quota, allowance
        else:
            quota = known[0]
            if known[1] is not allowance:  # of a reload
                self._counters[allowance.span, key] = quota, allowance
                if quota.period.ends_at > now:
                    quota.period = period  # in another time zone; what was used goes along
            if quota.period is not period:
                quota.roll(period)
        if self.shares:
            self._note(quota, now)
        return quota

    def find_held(self, allowance: Allowance, key: Key, now: float) -> Quota:
        """Return what counts now for a request that began by an allowance; that of a later reload holds."""
        known = self._counters.get((allowance.span, key))
        return self.find(allowance if known is None else known[1], key, now)

    def peek(self, allowance: Allowance, key: Key, now: float) -> Quota:
        """Return what counts in the period of now; one that is new is kept where others have to say what they used."""
        known = (allowance.span, key) in self._counters
        quota = self.find(allowance, key, now)
        if not known and not self.shares:
            del self._counters[allowance.span, key]
        return quota

    def _note(self, quota: Quota, now: float) -> None:
        if not quota.is_dirty:
            quota.is_dirty = True
            self._dirty.append(quota)
            quota.used_at = now
            self._lately[quota] = None
            self._lately.move_to_end(quota)

    def forget_past(self, now: float) -> Iterator[None]:
        """Drop what is of another period and what nobody used, in steps; let what is long silent be reported again."""
        again = 0
        for number, (name, (quota, allowance)) in enumerate(list(self._counters.items()), 1):
            is_over = allowance.calendar.current(quota.span, now).begins_at > quota.period.begins_at
            is_used = any(quota.local) or any(quota.gone) or quota.used_at > now - _LATELY_S
            if is_over or not is_used:
                del self._counters[name]
                self._lately.pop(quota, None)
            elif self.shares and again < _A_STEP and any(quota.local) and quota.reported_at < now - _REPORTED_S:
                again += 1
                if not quota.is_dirty:
                    quota.is_dirty = True
                    self._dirty.append(quota)
            if number % _A_STEP == 0:
                yield

    def counted(self) -> list[tuple[Quota, Allowance]]:
        """Return every quota and what it is of."""
        return list(self._counters.values())

    def collect(self, everything: bool, now: float) -> Iterator[list[Quota]]:
        """Yield the quotas to report, in steps: all, or those used since the last call, and some others in turn.

        What others used of one that was used here lately would be old at its next request.
        """
        found, self._dirty = self._dirty, []
        if everything:
            found = [quota for quota, _ in self._counters.values()]
        else:
            found += self._next_in_turn(now)
        for at in range(0, len(found), _A_STEP):
            yield self._collected(found[at : at + _A_STEP], now)

    def _next_in_turn(self, now: float) -> list[Quota]:
        """Return some quotas that were used lately, and not since the last call."""
        for _ in range(min(_A_STEP, len(self._lately))):
            quota = next(iter(self._lately))
            if quota.used_at > now - _LATELY_S:
                break
            del self._lately[quota]
        if not self._in_turn:
            self._in_turn = list(self._lately)
        turn = self._in_turn[-_IN_TURN:]
        del self._in_turn[-_IN_TURN:]
        return [quota for quota in turn if not quota.is_dirty]

    @staticmethod
    def _collected(quotas: Sequence[Quota], now: float) -> list[Quota]:
        for quota in quotas:
            quota.is_dirty = False
            quota.reported_at = now
        return [quota for quota in quotas if quota.period.ends_at > now]
