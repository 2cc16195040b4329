"""How long the first bytes of a pool's answers take: the time after which one is late.

Every sample is of the endpoint that a request went to first, so none is left out for being slow. One that was cut, as
another endpoint was faster, its time was over or its client left, counts with the time it had had by then. It would
have taken longer, but that time is over the percentile already, and how far over changes none. One that was left sooner
shows nothing. What the faster endpoint took is no sample: it is one only where it was short. Source of the percentile:
Dean and Barroso, "The Tail at Scale", 2013.
"""

from bisect import bisect_left, insort
from collections import deque
from typing import Final

LEAST_SAMPLES: Final = 100  # of which five are over the percentile; with fewer one slow answer decides
_MOST_SAMPLES: Final = 500  # the latest: a pool that becomes slower is known after some 25 slow answers
_PERCENTILE: Final = 95


class FirstBytes:
    """The latest times, in seconds; they outlive a reload that changes other settings of the pool."""

    __slots__ = ("_latest", "_sorted")

    def __init__(self) -> None:
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []

    def note(self, time_s: float) -> None:
        """Take the time of one more answer, or what it had taken when it was cut."""
        latest, ordered = self._latest, self._sorted
        if len(latest) == _MOST_SAMPLES:
            del ordered[bisect_left(ordered, latest.popleft())]
        latest.append(time_s)
        insort(ordered, time_s)

    def note_cut(self, time_s: float) -> None:
        """Take what an answer had taken that was left before it began, if that is long."""
        p95_s = self.p95_s
        if p95_s is not None and time_s >= p95_s:
            self.note(time_s)

    @property
    def p95_s(self) -> float | None:
        """The time within which 95 of 100 answers begin, None before enough are known."""
        count = len(self._sorted)
        return self._sorted[_PERCENTILE * count // 100] if count >= LEAST_SAMPLES else None
