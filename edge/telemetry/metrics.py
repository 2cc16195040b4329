"""Numbers of finished requests, for Prometheus: a few additions each; what is dear is done per scrape, in steps."""

import asyncio
import bisect
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from edge.exchange import NO_USAGE, End, Exchange
from edge.telemetry.recent import Recent

# LLM answers take from tens of milliseconds to ten minutes (the usual SDK's read timeout).
_DURATION_BOUNDS_S: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 600.0)
OTHER: Final = "(other)"  # the label of what has no series of its own
_LINES_A_STEP: Final = 100  # about a millisecond
_ROUTES_A_STEP: Final = 8  # thirteen lines of a histogram each
_FIRST_BYTE_BOUNDS_S: Final = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


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

    def buckets(self) -> list[tuple[str, float]]:
        """Return cumulative counts, as the exposition format wants them."""
        result, running = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            result.append((bound, float(running)))
        return result


@dataclass(slots=True)
class _RouteNumbers:
    requests: dict[tuple[int, End], int] = field(default_factory=dict)
    duration: Histogram = field(default_factory=lambda: Histogram(_DURATION_BOUNDS_S))
    first_byte: Histogram = field(default_factory=lambda: Histogram(_FIRST_BYTE_BOUNDS_S))
    request_bytes: int = 0
    response_bytes: int = 0
    retries: int = 0
    replays: int = 0
    resumes: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Metrics:
    """The numbers of finished requests by route; gauges are asked for at the scrape.

    What matched no route has the empty label, never the name that was asked: anybody can make those up. The first
    `max_labels` routes have series of their own, and what others count is summed under one label.
    """

    def __init__(self, max_labels: int = 1000) -> None:
        self.max_labels = max_labels
        self._routes: dict[str, _RouteNumbers] = {}
        self.recent = Recent()  # the same of the last minute, for the status page
        self.gauges: list[Callable[[], Iterable[Metric | None]]] = []

    def observe(self, exchange: Exchange) -> None:
        """Count one finished request."""
        numbers = self._routes.get(exchange.route) or self._new(exchange.route)
        assert exchange.end is not None
        outcome = (exchange.status, exchange.end)
        numbers.requests[outcome] = numbers.requests.get(outcome, 0) + 1
        begun, first_byte, usage = exchange.begun, exchange.first_byte, exchange.usage
        numbers.duration.observe(exchange.finished - begun)
        if first_byte:
            numbers.first_byte.observe(first_byte - begun)
        numbers.request_bytes += exchange.request_bytes
        numbers.response_bytes += exchange.response_bytes
        if exchange.retries:
            numbers.retries += exchange.retries
        if exchange.replays:
            numbers.replays += exchange.replays
        if exchange.resume:
            numbers.resumes[exchange.resume] = numbers.resumes.get(exchange.resume, 0) + 1
        if usage is not NO_USAGE:
            numbers.prompt_tokens += usage.prompt_tokens
            numbers.completion_tokens += usage.completion_tokens

    def _new(self, route: str) -> _RouteNumbers:
        """Return the numbers of a route that has none of its own yet, or never will."""
        own = len(self._routes) - ("" in self._routes) - (OTHER in self._routes)
        return self._routes.setdefault(route if not route or own < self.max_labels else OTHER, _RouteNumbers())

    def families(self) -> Iterator[Metric | None]:
        """Yield every metric, each in parts that follow one another; None where a part takes a while to come."""
        routes = list(self._routes.items())  # which others may join meanwhile
        for new, add in _ROUTE_FAMILIES:
            yield new()
            for at in range(0, len(routes), _ROUTES_A_STEP):
                part = new()
                for route, numbers in routes[at : at + _ROUTES_A_STEP]:
                    add(part, route, numbers)
                yield part
        for gauges in self.gauges:
            yield from gauges()

    async def render(self) -> bytes:
        """Return the whole exposition."""
        return b"".join([part async for part in self.parts()])

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield the exposition; the loop gets its turn after each hundred lines, since thousands would hold it up."""
        name = ""
        for family in self.families():
            if family is None:
                await asyncio.sleep(0)
                continue
            for lines in _rendered(family):
                # A part that continues its family has the two lines of its head again.
                yield lines.split(b"\n", 2)[2] if family.name == name else lines
                name = family.name
                await asyncio.sleep(0)


def _rendered(family: Metric) -> Iterator[bytes]:
    """Yield the lines of a family, with its head each time."""
    samples = family.samples
    for at in range(0, max(len(samples), 1), _LINES_A_STEP):
        family.samples = samples[at : at + _LINES_A_STEP]
        yield generate_latest(_One(family))


@dataclass(frozen=True, slots=True)
class _One(Collector):
    family: Metric

    def collect(self) -> Iterator[Metric]:
        yield self.family


def _add_requests(family: Any, route: str, numbers: _RouteNumbers) -> None:
    for (status, end), count in numbers.requests.items():
        family.add_metric((route, str(status), end.value), count)


def _add_resumes(family: Any, route: str, numbers: _RouteNumbers) -> None:
    for outcome, count in numbers.resumes.items():
        family.add_metric((route, outcome), count)


def _add_duration(family: Any, route: str, numbers: _RouteNumbers) -> None:
    family.add_metric((route,), numbers.duration.buckets(), numbers.duration.total)


def _add_first_byte(family: Any, route: str, numbers: _RouteNumbers) -> None:
    family.add_metric((route,), numbers.first_byte.buckets(), numbers.first_byte.total)


def _add_sum(name: str, family: Any, route: str, numbers: _RouteNumbers) -> None:
    family.add_metric((route,), getattr(numbers, name))


_SUMS: Final = {
    "request_bytes": "Bytes of request bodies.",
    "response_bytes": "Bytes of answers, framing included.",
    "retries": "Requests that were sent to another endpoint.",
    "prompt_tokens": "Tokens of prompts, as recorded.",
    "completion_tokens": "Tokens of answers, as recorded.",
    "replays": "Requests sent again because a reused connection had been closed.",
}
_RESUMES_TEXT: Final = "Streams that broke at an endpoint, by what became of going on at another."
_FIRST_BYTE_TEXT: Final = "From a request's head to the first byte of the answer's body."
# What makes each family by route, and what adds a route to it.
_ROUTE_FAMILIES: Final[tuple[tuple[Callable[[], Metric], Callable[[Any, str, _RouteNumbers], None]], ...]] = (
    (
        partial(CounterMetricFamily, "edge_requests", "Finished requests.", labels=("route", "status", "end")),
        _add_requests,
    ),
    (
        partial(HistogramMetricFamily, "edge_request_duration_seconds", "From head to end.", labels=("route",)),
        _add_duration,
    ),
    (
        partial(HistogramMetricFamily, "edge_time_to_first_byte_seconds", _FIRST_BYTE_TEXT, labels=("route",)),
        _add_first_byte,
    ),
    (
        partial(CounterMetricFamily, "edge_resumes", _RESUMES_TEXT, labels=("route", "outcome")),
        _add_resumes,
    ),
    *(
        (partial(CounterMetricFamily, f"edge_{name}", text, labels=("route",)), partial(_add_sum, name))
        for name, text in _SUMS.items()
    ),
)
