"""A circuit breaker: when something that is down is asked again.

No clock in here: `now` is seconds of the loop's clock.
"""

from typing import Final

FAILURES_TO_OPEN: Final = 3
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 8.0


class Breaker:
    """Closed, all may ask. A few failures in a row open it: then one asks at a time, after pauses that double."""

    __slots__ = ("_ask_again_at", "_failures", "_pause_s", "_trying")

    def __init__(self) -> None:
        self.reset()

    @property
    def is_open(self) -> bool:
        """Whether it takes what it guards for dead."""
        return self._failures >= FAILURES_TO_OPEN

    def reset(self) -> None:
        """Close it."""
        self._failures = 0
        self._pause_s = _FIRST_PAUSE_S
        self._ask_again_at = 0.0
        self._trying = False

    def admits(self, now: float) -> bool:
        """Return whether one may ask now; who does while it is open begins with `begin` and ends with `abandon`."""
        return not self.is_open or (not self._trying and now >= self._ask_again_at)

    def begin(self) -> None:
        """Note that one tries, while it is open."""
        self._trying = True

    def abandon(self) -> None:
        """Note that the one who tried has ended, with or without an answer."""
        self._trying = False

    def fail(self, now: float, *, is_try: bool = False) -> None:
        """Note that there was no answer, for one who tried or for one who asked while it was closed."""
        if is_try:
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self._trying = False
        elif self.is_open:
            return
        self._failures += 1
        self._ask_again_at = now + self._pause_s
