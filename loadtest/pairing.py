"""Ratios of paired rounds, and how sure they are; the slope of a cost over a count.

Two figures of one round are compared with each other, never with another round's: what a shared machine does to one it
does to both. The interval is the percentile bootstrap of the median (Efron and Tibshirani, An Introduction to the
Bootstrap, chapter 13).
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_RESAMPLES: Final = 2000
_CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median and its 95 % interval, from `rounds` rounds."""

    median: float
    low: float
    high: float
    rounds: int


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """Return the median of `values` with its interval; raises `ValueError` for none."""
    if not values:
        raise ValueError("no values to estimate from")
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    cut = round(_RESAMPLES * (1 - _CONFIDENCE) / 2)
    return Estimate(statistics.median(values), medians[cut], medians[-1 - cut], len(values))


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
