"""Many numbers of one kind: exact while they are few enough to keep, then in a histogram, so that memory stays flat."""

import math
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from hdrh.histogram import HdrHistogram

_MAX_US: Final = 3_600_000_000  # an hour
_DIGITS: Final = 3
_BITS: Final = 13  # two more than three digits take
_KEPT: Final = 1 << 17  # 1 MB of each kind, so that an hour at a hundred requests a second is flat by its half
_FOLDED: Final = 1 << 16  # at once, when there are more


def percentile_ms(ordered: Sequence[float], percentile: float) -> float | None:
    """Return a percentile in milliseconds, exact, of seconds that are in order, between two of them by a straight line.

    None where so few values have no such percentile: p99 wants 100 of them, p99.9 a thousand.
    """
    if not has_percentile(len(ordered), percentile):
        return None
    place = (len(ordered) - 1) * percentile / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return (ordered[below] + (ordered[above] - ordered[below]) * (place - below)) * 1e3


def ranked_ms(ordered: Sequence[float], shares: Sequence[float]) -> list[float]:
    """Return the milliseconds at or below which each share lies of seconds that are in order."""
    return [ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3 for share in shares]


def has_percentile(count: int, percentile: float) -> bool:
    """Return whether so many values have such a percentile: one of them or more lies beyond it."""
    return bool(count) and not (50 < percentile < 100 and round(count * (100 - percentile), 6) < 100)


def histogram(seconds: Iterable[float]) -> HdrHistogram:
    """Return an HDR histogram, in microseconds, to three digits."""
    made = HdrHistogram(1, _MAX_US, _DIGITS)
    _record(made, seconds)
    return made


def _record(made: HdrHistogram, seconds: Iterable[float]) -> None:
    """Add values to a histogram; those that it does not tell apart at once, since its own method takes microseconds."""
    buckets: Counter[int] = Counter()
    for us, count in Counter([int(each * 1e6 + 0.5) for each in seconds]).items():
        step = max(us.bit_length() - _BITS, 0)
        buckets[us >> step << step] += count
    for us, count in buckets.items():
        made.record_value(min(max(us, 1), _MAX_US), count)


class Values:
    """Seconds, all of them while they are no more than `kept`; `is_exact` tells whether that is so."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._kept = kept
        self._recent = array("d")
        self._histogram: HdrHistogram | None = None
        self._folded = 0
        self._mean = self._squares = 0.0  # of those that are folded; squares of the distances from their mean
        self._highest = 0.0

    @property
    def is_exact(self) -> bool:
        """Whether no value is in the histogram only."""
        return self._histogram is None

    @property
    def count(self) -> int:
        """How many there are."""
        return self._folded + len(self._recent)

    def add(self, seconds: float) -> None:
        """Take one."""
        self._recent.append(seconds)
        if len(self._recent) > self._kept:
            self._fold()

    def extend(self, seconds: Sequence[float]) -> None:
        """Take several."""
        self._recent.extend(seconds)
        if len(self._recent) > self._kept:
            self._fold()

    def exact(self) -> list[float]:
        """Return the values that are kept, in order of size: all of them while `is_exact`."""
        return sorted(self._recent)

    def moments(self) -> tuple[float, float, float]:
        """Return mean, standard deviation (of the values themselves, not of a sample) and the highest."""
        count, mean, squares, highest = self._with_recent()
        return mean, math.sqrt(squares / count) if count else 0.0, highest

    def percentiles_ms(self, percentiles: Sequence[float]) -> list[float | None]:
        """Return percentiles in milliseconds, None for those that so few values do not have."""
        if self._histogram is None:
            ordered = self.exact()
            return [percentile_ms(ordered, each) for each in percentiles]
        self._fold()
        return [float(self._histogram.get_value_at_percentile(each)) / 1e3 for each in percentiles]

    def ranked_ms(self, shares: Sequence[float]) -> list[float]:
        """Return the milliseconds at or below which each share of the values lies."""
        if self._histogram is None:
            return ranked_ms(self.exact(), shares)
        self._fold()
        return [float(self._histogram.get_value_at_percentile(share * 100)) / 1e3 for share in shares]

    def histogram(self) -> HdrHistogram:
        """Return all values as an HDR histogram, in microseconds, to three digits."""
        if self._histogram is None:
            return histogram(self._recent)
        self._fold()
        return self._histogram

    def _with_recent(self) -> tuple[int, float, float, float]:
        """Return count, mean, squares and the highest of all, by the parallel algorithm (Chan, Golub, LeVeque 1979)."""
        recent = self._recent
        if not recent:
            return self._folded, self._mean, self._squares, self._highest
        own = statistics.fmean(recent)
        away, count = own - self._mean, self._folded + len(recent)
        squares = self._squares + math.fsum((each - own) ** 2 for each in recent)
        squares += away**2 * self._folded * len(recent) / count
        return count, self._mean + away * len(recent) / count, squares, max(self._highest, max(recent))

    def _fold(self) -> None:
        """Move what was kept into the histogram."""
        if self._histogram is None:
            self._histogram = HdrHistogram(1, _MAX_US, _DIGITS)
            self._kept = min(self._kept, _FOLDED)
        self._folded, self._mean, self._squares, self._highest = self._with_recent()
        _record(self._histogram, self._recent)
        self._recent = array("d")
