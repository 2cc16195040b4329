"""Numbers of finished requests, for Prometheus: a few additions each; what is dear is done per scrape, in steps."""

import asyncio
import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from edge.exchange import NO_USAGE, End, Exchange

# LLM answers take from tens of milliseconds to ten minutes (the usual SDK's read timeout).
_DURATION_BOUNDS_S: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 600.0)
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
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Metrics:
    """The numbers of finished requests by route; gauges are asked for at the scrape.

    What matched no route has the empty label, never the name that was asked: anybody can make those up.
    """

    def __init__(self) -> None:
        self._routes: dict[str, _RouteNumbers] = {}
        self.gauges: list[Callable[[], Iterable[Metric]]] = []

    def observe(self, exchange: Exchange) -> None:
        """Count one finished request."""
        numbers = self._routes.get(exchange.route)
        if numbers is None:
            numbers = self._routes[exchange.route] = _RouteNumbers()
        assert exchange.end is not None
        outcome = (exchange.status, exchange.end)
        numbers.requests[outcome] = numbers.requests.get(outcome, 0) + 1
        numbers.duration.observe(exchange.finished - exchange.begun)
        if exchange.first_byte:
            numbers.first_byte.observe(exchange.first_byte - exchange.begun)
        numbers.request_bytes += exchange.request_bytes
        numbers.response_bytes += exchange.response_bytes
        numbers.retries += exchange.retries
        numbers.replays += exchange.replays
        usage = exchange.usage
        if usage is not NO_USAGE:
            numbers.prompt_tokens += usage.prompt_tokens
            numbers.completion_tokens += usage.completion_tokens

    def families(self) -> Iterator[Metric]:
        """Yield every metric."""
        requests = CounterMetricFamily("edge_requests", "Finished requests.", labels=("route", "status", "end"))
        duration = HistogramMetricFamily("edge_request_duration_seconds", "From head to end.", labels=("route",))
        first_byte = HistogramMetricFamily(
            "edge_time_to_first_byte_seconds", "From a request's head to the first byte of the answer's body.",
            labels=("route",),
        )  # fmt: skip
        sums = {
            name: CounterMetricFamily(f"edge_{name}", text, labels=("route",))
            for name, text in (
                ("request_bytes", "Bytes of request bodies."),
                ("response_bytes", "Bytes of answers, framing included."),
                ("retries", "Requests that were sent to another endpoint."),
                ("prompt_tokens", "Tokens of prompts, as recorded."),
                ("completion_tokens", "Tokens of answers, as recorded."),
                ("replays", "Requests sent again because a reused connection had been closed."),
            )
        }
        for route, numbers in self._routes.items():
            for (status, end), count in numbers.requests.items():
                requests.add_metric((route, str(status), end.value), count)
            duration.add_metric((route,), numbers.duration.buckets(), numbers.duration.total)
            first_byte.add_metric((route,), numbers.first_byte.buckets(), numbers.first_byte.total)
            for name, family in sums.items():
                family.add_metric((route,), getattr(numbers, name))
        yield from (requests, duration, first_byte, *sums.values())
        for gauges in self.gauges:
            yield from gauges()

    async def render(self) -> bytes:
        """Return the exposition; yields to the loop between two families, since rendering takes milliseconds."""
        parts = []
        for family in self.families():
            parts.append(generate_latest(_One(family)))
            await asyncio.sleep(0)
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class _One(Collector):
    family: Metric

    def collect(self) -> Iterator[Metric]:
        yield self.family
