"""How an endpoint behaved, and so who is sent there: ejection by what requests met, and the active probes.

Whatever an endpoint answers may be what one caller sent: engines answer 500 to bad input, gateways 403 and 504, and a
prompt can end a connection or outlast a timeout. So a fault counts for the user who met it, not for the others, until
it met several users with no good answer in between. Only a connection that cannot be made is nobody's input.

| an attempt                                 | shows         | tried elsewhere    | counts against the endpoint      |
|--------------------------------------------|---------------|--------------------|----------------------------------|
| gets no connection                         | UNREACHABLE   | yes                | by itself                        |
| 3xx, 401, 402, 403, 407, 421               | FAULT, logged | yes                | for the user                     |
| 404                                        | NOTHING       | once               | for the user, if another answers |
| 409, 502, 504                              | FAULT         | yes                | for the user                     |
| 408, 500, any other 5xx                    | FAULT         | no                 | for the user                     |
| no answer, or a malformed one              | FAULT         | `retry_after_send` | for the user                     |
| no answer in time                          | FAULT         | no                 | for the user                     |
| cut, stalled, an error within an answer    | FAULT         | no                 | for the user                     |
| 429, 503, 529                              | BACKPRESSURE  | yes                | no: it rests                     |
| another 4xx, 501, a 500 "too large"        | NOTHING       | no                 | no                               |
| the client leaves, is slow; the edge stops | NOTHING       | no                 | no                               |
| the edge lacks descriptors or ports        | NOTHING       | ports only         | no                               |
| a whole answer                             | FINE          |                    | ends every count                 |
| a whole answer of `tokenize`, a stored one | NOTHING       |                    | no                               |

A stream whose first event is an error counts as the status that the event names. *In a row* means: with no good answer
in between, to whomever.

- Three faults in a row that one user met: the endpoint is out for this user alone.
- Three witnesses in a row: it is out for all. A witness is a failed connection, or a user, however many faults, keys
  and bodies that user has.
- Out for 5 s, and for twice the time with each further ejection, at most 120 s. Then requests go there on trial, one of
  a user and three at once: a good answer brings it back, a failed connection ejects it again. A fault on trial takes it
  from that user only, and those of three users eject it again. How requests end that began before the ejection shows
  nothing of what is new.
- Backpressure from an endpoint that is busy lets it rest as long as it asks, at most 5 s, for the user who was told so;
  for all once a second user was told so within that time.
- Two failed probes in a row take it out for all, whatever requests meet, and a good probe mends nothing but that.
- Of a pool no more than half is out at once, for anyone (`pools.py`). An instance is never out.

So one user can take no endpoint from others, nor keep one out. Users who act together can, three of them, until anybody
on trial gets a good answer. A client that leaves shows nothing, so an endpoint that hangs is noticed by timeouts alone.

Beside the peers: Envoy's outlier detection and HAProxy's `observe layer7` count any 5xx in a row, nginx's `max_fails`
what `proxy_next_upstream` lists, whoever asked; a caller's bad input drives all three.

No clock in here: `now` is seconds of the loop's clock.
"""

import enum
from dataclasses import dataclass, field
from typing import Final

_WITNESSES_TO_EJECT: Final = 3  # in a row; Envoy ejects after 5, but an engine's requests are few and long
_FAULTS_OF_ONE: Final = 3
_FIRST_EJECTION_S: Final = 5.0
_LONGEST_EJECTION_S: Final = 120.0
_LONGEST_REST_S: Final = 5.0  # of what Retry-After asks: an engine that asks for more may be free much earlier
_REST_S: Final = 0.5  # without Retry-After
HEALTHY: Final = "healthy"
_EJECTED: Final = "ejected"
_PROBES_TO_FAIL: Final = 2  # in a row: one is a hiccup of the loop that a long prefill holds up

_KEY: Final = "its `api_key`"
_URL: Final = "its URL: scheme, host, port and path"
# What an operator has to check where an endpoint refuses whoever asks through the edge.
CHECKS: Final = {
    **dict.fromkeys(range(300, 400), _URL),
    401: _KEY,
    402: f"the account that pays for {_KEY}",
    403: f"what {_KEY} may do, and which addresses its firewall admits",
    407: f"{_URL}; a proxy stands before it that wants credentials",
    421: _URL,
}
_BUSY: Final = frozenset((429, 503, 529))
_MISSING: Final = 404
_ELSEWHERE: Final = frozenset((*CHECKS, *_BUSY, _MISSING, 409, 502, 504))


class Verdict(enum.Enum):
    """What an attempt shows of the endpoint that was asked."""

    FINE = "fine"
    NOTHING = "nothing"
    BACKPRESSURE = "backpressure"
    FAULT = "fault"
    UNREACHABLE = "unreachable"


def judge(status: int) -> Verdict:
    """Return what a status shows of its sender."""
    if status in _BUSY:
        return Verdict.BACKPRESSURE
    if status in CHECKS or status in (408, 409) or (status >= 500 and status != 501):
        return Verdict.FAULT
    return Verdict.FINE if status < 300 else Verdict.NOTHING


def may_pass_elsewhere(status: int, last_status: int) -> bool:
    """Return whether another endpoint may do better; `last_status` is what the one before said, 0 for none.

    The one that answered did no work, or does not know us. After two 404 the model is nowhere.
    """
    return status in _ELSEWHERE and not status == last_status == _MISSING


@dataclass(slots=True, eq=False)
class _Breaker:
    """Whether an endpoint is out, for all or for one user. `opened` is the era that began then."""

    until: float = 0.0  # 0.0: it is not
    opened: int = 0
    faults: int = 0  # in a row
    _openings: int = 0  # since it was last well: each doubles the time of the next
    _trials: set[str] = field(default_factory=set)  # whose requests are on trial

    def admits(self, now: float, user: str) -> bool:
        if not self.until:
            return True
        return self.until <= now and user not in self._trials and len(self._trials) < _WITNESSES_TO_EJECT

    def begin(self, user: str) -> None:
        """Note that a request goes there: a trial, when it is out."""
        if self.until:
            self._trials.add(user)

    def abandon(self, era: int, user: str) -> None:
        if era >= self.opened:
            self._trials.discard(user)

    def learns(self, now: float, era: int) -> bool:
        """Whether a fault is news: not of a request that was under way, or was sent although it is out."""
        return not self.until or (era >= self.opened and self.until <= now)

    def open(self, now: float, era: int) -> None:
        self.until = now + min(_FIRST_EJECTION_S * 2**self._openings, _LONGEST_EJECTION_S)
        self.opened = era
        self._openings += 1
        self.faults = 0
        self._trials.clear()


@dataclass(slots=True, eq=False)
class Health:
    """What is known of one endpoint; kept by address across reloads.

    `is_tainted`: whether anything at all is held against it; a request needs no clock while nothing is. An *era* is
    the time between two ejections; a request is known by the one that it began in.
    """

    is_tainted: bool = False
    since: float = 0.0  # when it was taken out for all, or came back; 0.0: it has been well all the time
    total_ejections: int = 0  # for all, for the metrics
    _era: int = 0
    _everyone: _Breaker = field(default_factory=_Breaker)
    _users: dict[str, _Breaker] = field(default_factory=dict)  # that met faults: at most two, a third ejects it
    _rest_until: float = 0.0
    _told: tuple[str, float] = ("", 0.0)  # who was told last that it is busy, and until when that holds
    _probe_failures: int = 0

    @property
    def ejected_until(self) -> float:
        """When its ejection is over, for all; 0.0: it is not ejected."""
        return self._everyone.until

    def out_until(self, user: str) -> float:
        """Return when its ejection for a user is over; 0.0: it is not ejected."""
        own = self._users.get(user)
        return own.until if own is not None else 0.0

    def describe(self, now: float) -> str:
        """Return the state, of one that is ejected with for how long."""
        state = self.state(now)
        return f"ejected for {self.ejected_until - now:.0f} s" if state == _EJECTED else state

    def state(self, now: float) -> str:
        """Return the state in a word or two, of a closed vocabulary."""
        if self.fails_probes:
            return "fails its health check"
        if self.ejected_until > now:
            return _EJECTED
        if self.ejected_until:
            return "on trial"
        if self._rest_until > now:
            return "busy"
        if self.is_out_for_some:
            return "ejected for some users"
        return HEALTHY

    @property
    def is_out_for_some(self) -> bool:
        """Whether users whom it failed, and no others, are sent elsewhere, or there on trial."""
        return any(own.until for own in self._users.values())

    @property
    def fails_probes(self) -> bool:
        """Whether active probes have taken it out."""
        return self._probe_failures >= _PROBES_TO_FAIL

    def _note_taint(self) -> None:
        everyone = self._everyone
        self.is_tainted = bool(
            everyone.until
            or everyone.faults
            or self._users
            or self._rest_until
            or self._told[1]
            or self._probe_failures
        )

    def admits(self, now: float, user: str = "") -> bool:
        """Return whether a request of a user may go there, without one of a user who met no fault."""
        if self.fails_probes or self._rest_until > now or not self._everyone.admits(now, user):
            return False
        told, until = self._told
        if told == user and until > now:
            return False
        own = self._users.get(user)
        return own is None or own.admits(now, user)

    def is_well(self, now: float, user: str) -> bool:
        """Return whether a request of a user may go there that no other needs: on trial there is none to spare."""
        return self.admits(now, user) and not self._everyone.until and not self.out_until(user)

    def back_at(self, user: str = "") -> float:
        """Return when it may be asked again, for choosing among those that may not."""
        told, until = self._told
        return max(self.ejected_until, self._rest_until, self.out_until(user), until if told == user else 0.0)

    def begin(self, user: str = "") -> int:
        """Note that a request goes there, a trial when it is ejected; return the era, for how it went."""
        if self.is_tainted:
            self._everyone.begin(user)
            if (own := self._users.get(user)) is not None:
                own.begin(user)
        return self._era

    def abandon(self, era: int, user: str = "") -> None:
        """Note that a request ended and showed nothing of the endpoint, as when its client left."""
        self._everyone.abandon(era, user)
        if (own := self._users.get(user)) is not None:
            own.abandon(era, user)

    def fine(self, now: float, era: int) -> None:
        """Note a good answer; one is enough to come back, when its request began after the ejection.

        A rest that the endpoint asked for goes on: requests that were under way do not show room for others.
        """
        if self._everyone.until:
            if era < self._everyone.opened:
                return
            self.since = now
        self._everyone = _Breaker(opened=self._era)
        self._users = {user: own for user, own in self._users.items() if own.until and era < own.opened}
        if self._rest_until <= now:
            self._rest_until = 0.0
        if self._told[1] <= now:
            self._told = ("", 0.0)
        self._note_taint()

    def fault(self, now: float, era: int, user: str) -> None:
        """Note a fault that a user met, and whose input may have made it."""
        self.abandon(era, user)
        everyone = self._everyone
        if not everyone.learns(now, era):
            return
        self.is_tainted = True
        own = self._users.setdefault(user, _Breaker())
        if not own.learns(now, era):
            return
        own.faults += 1
        if own.faults >= _FAULTS_OF_ONE or own.until or everyone.until:
            self._era += 1
            own.open(now, self._era)
        self._eject_if_due(now)

    def unreachable(self, now: float, era: int, user: str = "") -> None:
        """Note that no connection could be made, which no request brings about."""
        self.abandon(era, user)
        if not self._everyone.learns(now, era):
            return
        self.is_tainted = True
        self._everyone.faults += _WITNESSES_TO_EJECT if self._everyone.until else 1
        self._eject_if_due(now)

    def _eject_if_due(self, now: float) -> None:
        if self._everyone.faults + len(self._users) >= _WITNESSES_TO_EJECT:
            if not self._everyone.until:
                self.since = now
            self.total_ejections += 1
            self._era += 1
            self._everyone.open(now, self._era)
            self._users.clear()

    def backpressure(self, now: float, retry_after_s: float | None, era: int, user: str = "") -> None:
        """Note that the endpoint is busy; it rests as long as it asks, within a bound."""
        self.abandon(era, user)
        self.is_tainted = True
        until = now + (_REST_S if retry_after_s is None else min(retry_after_s, _LONGEST_REST_S))
        told, told_until = self._told
        if told != user and told_until > now:
            self._rest_until = max(self._rest_until, until)
        elif told == user:
            until = max(until, told_until)
        self._told = (user, until)

    def probed(self, healthy: bool, now: float) -> None:
        """Note the outcome of an active probe."""
        before = self.fails_probes
        self._probe_failures = 0 if healthy else self._probe_failures + 1
        if self.fails_probes is not before:
            self.since = now
        self._note_taint()
