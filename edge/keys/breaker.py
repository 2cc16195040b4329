"""A circuit breaker: when something that is down is asked again.

No clock in here: `now` is seconds of the loop's clock.
"""

from typing import Final

FAILURES_TO_OPEN: Final = 3
_PAUSE_S: Final = 1.0  # an asker of a dead store loses nothing, and one that is back refuses no longer than that


class Breaker:
    """Closed, all may ask. A few failures in a row open it: then one asks at a time, a second after the last."""

    __slots__ = ("_ask_again_at", "_failures", "_trying")

    def __init__(self) -> None:
        self.reset()

    @property
    def is_open(self) -> bool:
        """Whether it takes what it guards for dead."""
        return self._failures >= FAILURES_TO_OPEN

    def reset(self) -> None:
        """Close it."""
        self._failures = 0
        self._ask_again_at = 0.0
        self._trying = False

    def admits(self, now: float) -> bool:
        """Return whether one may ask now; who does while it is open begins with `begin` and ends with `end`."""
        return not self.is_open or (not self._trying and now >= self._ask_again_at)

    def begin(self) -> None:
        """Note that one tries, while it is open."""
        self._trying = True

    def end(self) -> None:
        """Note that the one who tried has ended, with or without an answer."""
        self._trying = False

    def fail(self, now: float, *, is_try: bool = False) -> None:
        """Note that there was no answer, for one who tried or for one who asked while it was closed."""
        if is_try or not self.is_open:
            self._failures += 1
            self._ask_again_at = now + _PAUSE_S
