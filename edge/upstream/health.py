"""How an endpoint behaved, and so whether it is asked: passive ejection, and the verdict of the active probes.

Three classes of answers. A *fault* is a transport error, 500, 502 or 504, or that the endpoint does not take us, as in
a 401: a few in a row eject it for a time that doubles. *Backpressure*, 429, 503 or 529, comes from an endpoint that is
busy: it rests as long as it asks, and is no worse for it. Anything else is *fine*, also another 4xx, which is the
request's fault. After its time an ejected endpoint gets one request on trial, and all of them again when that went
well. How requests end that began before the ejection does not show whether the endpoint is well again: streams may run
to their end on an engine that takes no new ones.

No clock in here: `now` is seconds of the loop's clock.
"""

import enum
from dataclasses import dataclass
from typing import Final

_FAULTS_TO_EJECT: Final = 3  # in a row; Envoy ejects after 5, but an engine's requests are few and long
_FIRST_EJECTION_S: Final = 5.0
_LONGEST_EJECTION_S: Final = 120.0
_LONGEST_REST_S: Final = 5.0  # of what Retry-After asks: an engine that asks for more may be free much earlier
_REST_S: Final = 0.5  # without Retry-After
# Of the server itself, or of who set it up: it does not know our key, or sends us elsewhere.
_FAULTS: Final = frozenset((*range(300, 400), 401, 403, 407, 409, 500, 502, 504))
_PROBES_TO_FAIL: Final = 2  # in a row: one is a hiccup of the loop that a long prefill holds up


class Verdict(enum.Enum):
    """What an answer shows of the endpoint that gave it."""

    FINE = "fine"
    BACKPRESSURE = "backpressure"
    FAULT = "fault"


def judge(status: int) -> Verdict:
    """Return what a status shows of its sender."""
    if status in _FAULTS:
        return Verdict.FAULT
    if status in (429, 503, 529):
        return Verdict.BACKPRESSURE
    return Verdict.FINE


@dataclass(slots=True, eq=False)
class Health:
    """What is known of one endpoint; kept by address across reloads.

    `is_tainted`: whether anything at all is held against it; a request needs no clock while nothing is.
    """

    ejected_until: float = 0.0  # 0.0: not ejected
    is_tainted: bool = False
    total_ejections: int = 0  # for the metrics
    _ejections: int = 0  # since it was last well: each doubles the time of the next
    _faults: int = 0  # in a row
    _rest_until: float = 0.0
    _trial: bool = False
    _probe_failures: int = 0

    def describe(self, now: float) -> str:
        """Return the state in a word or two."""
        if self.fails_probes:
            return "fails its health check"
        if self.ejected_until > now:
            return f"ejected for {self.ejected_until - now:.0f} s"
        if self.ejected_until:
            return "on trial"
        if self._rest_until > now:
            return "busy"
        return "healthy"

    @property
    def fails_probes(self) -> bool:
        """Whether active probes have taken it out."""
        return self._probe_failures >= _PROBES_TO_FAIL

    def _note_taint(self) -> None:
        self.is_tainted = bool(self._faults or self.ejected_until or self._rest_until or self._probe_failures)

    def admits(self, now: float) -> bool:
        """Return whether a request may go there."""
        if self.fails_probes or self._rest_until > now:
            return False
        if self.ejected_until:
            return self.ejected_until <= now and not self._trial
        return True

    def back_at(self) -> float:
        """Return when it may be asked again, for choosing among those that may not."""
        return max(self.ejected_until, self._rest_until)

    def begin(self) -> int:
        """Note that a request goes there, the trial when it is ejected; return the era, for how it went."""
        if self.ejected_until:
            self._trial = True
        return self.total_ejections

    def abandon(self, era: int) -> None:
        """Note that a request ended and showed nothing of the endpoint, as when its client left."""
        if era == self.total_ejections:
            self._trial = False

    def fine(self, now: float, era: int) -> None:
        """Note an answer; one is enough to come back, when its request began after the ejection.

        A rest that the endpoint asked for goes on: requests that were under way do not show room for others.
        """
        if self.ejected_until and era != self.total_ejections:
            return
        self._trial = False
        self._faults = self._ejections = 0
        self.ejected_until = 0.0
        if self._rest_until <= now:
            self._rest_until = 0.0
        self._note_taint()

    def fault(self, now: float, era: int) -> None:
        """Note a fault; eject when it is one too many, or the trial's."""
        self.abandon(era)
        if self.ejected_until and (era != self.total_ejections or now < self.ejected_until):
            return  # of requests that were under way, or sent although it is ejected, for want of another
        self.is_tainted = True
        self._faults += 1
        if self._faults >= _FAULTS_TO_EJECT or self.ejected_until:
            self._faults = 0
            self._ejections += 1
            self.total_ejections += 1
            self.ejected_until = now + min(_FIRST_EJECTION_S * 2 ** (self._ejections - 1), _LONGEST_EJECTION_S)

    def backpressure(self, now: float, retry_after_s: float | None, era: int) -> None:
        """Note that the endpoint is busy; it rests as long as it asks, within a bound."""
        self.abandon(era)
        self.is_tainted = True
        rest_s = _REST_S if retry_after_s is None else min(retry_after_s, _LONGEST_REST_S)
        self._rest_until = max(self._rest_until, now + rest_s)

    def probed(self, healthy: bool) -> None:
        """Note the outcome of an active probe."""
        self._probe_failures = 0 if healthy else self._probe_failures + 1
        self._note_taint()
