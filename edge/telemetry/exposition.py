"""Numbers as the text that Prometheus reads: prometheus-client's types, written in a tenth of its own time.

Its writer checks each sample anew, 17 us a line on CPython 3.11, and a scrape has thousands of lines. What it says is
the measure: `tests/telemetry/test_exposition.py` holds each line against it.
Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

LINES_A_STEP: Final = 100  # a third of a millisecond
_MOST_TEXTS: Final = 10_000  # of labels and histograms; some 10 MB
_go_string: Final[Callable[[float], str]] = floatToGoString
_ESCAPES: Final = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})

OTHER: Final = "(other)"  # the label of what has no series of its own

Labels = tuple[str, ...]


class Histogram:
    """Counts by upper bound, in seconds.

    `observe` counts one value, `observe_all` several. They are a list's own `append` and `extend`, a tenth of the cost
    of counting: `fold` counts those that came since the last time, sorted, many at once.
    """

    __slots__ = ("_cumulative", "_new", "_total", "bounds", "observe", "observe_all")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._cumulative = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._new: list[float] = []
        self.observe: Final = self._new.append
        self.observe_all: Final = self._new.extend

    def fold(self) -> None:
        """Count what came; called often enough, what waits is a few numbers."""
        new = self._new
        if not new:
            return
        new.sort()
        for at, bound in enumerate(self.bounds):
            self._cumulative[at] += bisect.bisect_right(new, bound)
        self._cumulative[-1] += len(new)
        self._total += sum(new)
        new.clear()

    @property
    def count(self) -> int:
        """How many values there were."""
        return self._cumulative[-1] + len(self._new)

    @property
    def total(self) -> float:
        """Their sum."""
        self.fold()
        return self._total

    @property
    def cumulative(self) -> tuple[int, ...]:
        """How many were at most each bound, the last of which is infinity."""
        self.fold()
        return tuple(self._cumulative)


class Histograms(NamedTuple):
    """A family of histograms, or a part of one: its name, text and label names, and each by the values of these."""

    name: str
    documentation: str
    labels: Labels
    rows: Sequence[tuple[Labels, Histogram]]


Family = Metric | Histograms


def lines_of(family: Family, *, with_head: bool = True) -> Iterator[bytes]:
    """Yield the lines of a family in pieces that are written in one go; the head of a part before may do for it."""
    if isinstance(family, Histograms):
        kind = "histogram"
        lines: Iterable[str] = (_histogram(family, values, each) for values, each in family.rows)
        step = max(LINES_A_STEP // max((len(each.bounds) + 3 for _, each in family.rows), default=1), 1)
    else:
        kind = family.type
        lines = (
            f"{each.name}{_labelled(tuple(each.labels.items()))} {_number(each.value)}\n" for each in family.samples
        )
        step = LINES_A_STEP
    piece = [_head(family.name, family.documentation, kind)] if with_head else []
    for number, line in enumerate(lines, 1):
        piece.append(line)
        if number % step == 0:
            yield "".join(piece).encode()
            piece = []
    if piece:
        yield "".join(piece).encode()


def _number(value: float) -> str:
    """Return a number as Prometheus reads it; most are counts, which need no care."""
    return str(value) if type(value) is int else _go_string(value)


@lru_cache(maxsize=1000)
def _head(name: str, documentation: str, kind: str) -> str:
    """Return the two lines that stand before a family, as prometheus-client writes them."""
    return generate_latest(_One(Metric(name, documentation, kind))).decode()


@dataclass(frozen=True, slots=True)
class _One(Collector):
    family: Metric

    def collect(self) -> Iterator[Metric]:
        yield self.family


@lru_cache(maxsize=_MOST_TEXTS)
def _labelled(labels: tuple[tuple[str, str], ...]) -> str:
    inside = ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels)
    return f"{{{inside}}}" if inside else ""


def _histogram(family: Histograms, values: Labels, histogram: Histogram) -> str:
    counts = histogram.cumulative
    template = _template(family.name, family.labels, values, histogram.bounds)
    return template % (*counts, counts[-1], _number(histogram.total))


@lru_cache(maxsize=_MOST_TEXTS)
def _template(name: str, names: Labels, values: Labels, bounds: tuple[float, ...]) -> str:
    """Return the lines of a histogram with places for its counts, how many there were, and their sum."""
    labels = tuple(zip(names, values, strict=True))
    series = [f"{name}_bucket{_labelled((*labels, ('le', each)))}" for each in (*map(_number, bounds), "+Inf")]
    series += [f"{name}_{part}{_labelled(labels)}" for part in ("count", "sum")]
    return "".join(f"{each.replace('%', '%%')} %s\n" for each in series)
