"""Ratios of paired rounds, and how sure they are; the slope of a cost over a count.

Two figures of one round are compared with each other, never with another round's: what a shared machine does to one it
does to both. The interval is that of the median by order statistics, which is exact for any distribution (Conover,
Practical Nonparametric Statistics, section 3.2): it holds the true median in 95 % of all comparisons or more.
"""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MIN_ROUNDS: Final = 6  # the smallest and the largest of 5 values hold the median 94 % of the time
_CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median and its 95 % interval, from `rounds` rounds; `low` and `high` are None for fewer than `MIN_ROUNDS`."""

    median: float
    low: float | None
    high: float | None
    rounds: int

    @property
    def span(self) -> str:
        """The interval as a text, "" where there is none or it is a point."""
        if self.low is None or self.high is None or self.low == self.high:
            return ""
        return f"[{self.low:.3f}, {self.high:.3f}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the median of `values` with its interval; raises `ValueError` for none."""
    if not values:
        raise ValueError("no values to estimate from")
    ordered = sorted(values)
    outside = _outside(len(ordered))
    low, high = (None, None) if outside is None else (ordered[outside], ordered[-1 - outside])
    return Estimate(statistics.median(ordered), low, high, len(ordered))


def _outside(count: int) -> int | None:
    """Return how many values stand outside of the interval on each side; None where all of them are too few.

    The median is below the `outside + 1`-th value where no more than `outside` coins of `count` show heads.
    """
    outside, below = None, 0
    for heads in range((count + 1) // 2):
        below += math.comb(count, heads)
        if 2 * below > (1 - _CONFIDENCE) * 2**count:
            break
        outside = heads
    return outside


def ratios(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    """Return the ratio of each round that gave a number to both."""
    return [
        one / other
        for one, other in zip(ours, theirs, strict=True)
        if one is not None and other is not None and other > 0
    ]


def differences(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float]:
    """Return the difference in each round that gave a number to both."""
    return [one - other for one, other in zip(ours, theirs, strict=True) if one is not None and other is not None]


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return slope and intercept of the least-squares line; raises `ValueError` for fewer than two different x."""
    if len({x for x, _ in points}) < 2:
        raise ValueError("a line needs two different points")
    fit = statistics.linear_regression([x for x, _ in points], [y for _, y in points])
    return fit.slope, fit.intercept


def passes(names: Sequence[str], rounds: int, seed: int) -> list[list[str]]:
    """Return the order of each round: random, and every second round the one before it backwards (A/B/B/A).

    Whatever drifts steadily over two rounds then falls on all alike.
    """
    draw = random.Random(seed)
    orders: list[list[str]] = []
    while len(orders) < rounds:
        order = draw.sample(list(names), len(names))
        orders += [order, order[::-1]]
    return orders[:rounds]
