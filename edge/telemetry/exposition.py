"""Numbers as the text that Prometheus reads: prometheus-client's types, written in a tenth of its own time.

Its writer checks each sample anew, 17 us a line on CPython 3.11, and a scrape has thousands of lines. What it says is
the measure: `tests/telemetry/test_exposition.py` holds each line against it.
Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
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


@dataclass(slots=True)
class Histogram:
    """Counts by upper bound, in seconds."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> tuple[int, ...]:
        """Return how many were at most each bound, the last of which is infinity."""
        return tuple(accumulate(self.counts))


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
    counts = histogram.cumulative()
    template = _template(family.name, family.labels, values, histogram.bounds)
    return template % (*counts, counts[-1], _number(histogram.total))


@lru_cache(maxsize=_MOST_TEXTS)
def _template(name: str, names: Labels, values: Labels, bounds: tuple[float, ...]) -> str:
    """Return the lines of a histogram with places for its counts, how many there were, and their sum."""
    labels = tuple(zip(names, values, strict=True))
    series = [f"{name}_bucket{_labelled((*labels, ('le', each)))}" for each in (*map(_number, bounds), "+Inf")]
    series += [f"{name}_{part}{_labelled(labels)}" for part in ("count", "sum")]
    return "".join(f"{each.replace('%', '%%')} %s\n" for each in series)
