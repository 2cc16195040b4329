"""Numbers of finished requests, for Prometheus: a few additions each; what is dear is done per scrape, in steps."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily

from edge.errors import EdgeError
from edge.exchange import End, Exchange
from edge.telemetry.alike import Alike, alike
from edge.telemetry.exposition import OTHER, Family, Histogram, Histograms, Labels, lines_of
from edge.telemetry.recent import Recent
from edge.telemetry.upstreams import Upstreams

# LLM answers take from tens of milliseconds to ten minutes (the usual SDK's read timeout).
_DURATION_BOUNDS_S: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 600.0)
FOLD_INTERVAL_S: Final = 1.0
_ROUTES_A_STEP: Final = 8
_REQUESTS_A_STEP: Final = 200
_ERRORS_A_STEP: Final = 100
_FIRST_BYTE_BOUNDS_S: Final = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_OWN_BOUNDS_S: Final = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1)


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
    """The numbers of finished requests by route, and of what was wrong with them; gauges are asked for at the scrape.

    `observe` notes a finished request, which changes no more: it is a list's own `append`, and `count` counts it.

    What matched no route has the empty label, never the name that was asked: anybody can make those up. The first
    `max_labels` routes, and limits, have series of their own, and what others count is summed under one label.
    """

    def __init__(self, max_labels: int = 1000) -> None:
        self.upstreams = Upstreams()
        self.max_labels = max_labels
        self._routes: dict[str, _RouteNumbers] = {}
        self.recent = Recent()  # the same of the last minute, for the status page
        self._finished: list[Exchange] = []
        self.observe: Final = self._finished.append
        self._own = Histogram(_OWN_BOUNDS_S)
        self._errors: dict[tuple[str, str, str], int] = {}
        self._limits = {""}  # that have refused, and have series of their own
        self.gauges: list[Callable[[], Iterable[Family | None]]] = []

    @property
    def max_labels(self) -> int:
        """How many routes, limits, and members of pools, have series of their own."""
        return self._max_labels

    @max_labels.setter
    def max_labels(self, most: int) -> None:
        self._max_labels = self.upstreams.max_labels = most

    def count(self) -> Iterator[None]:
        """Count the requests that were observed, in steps: whoever reads their numbers does it before."""
        while self._finished:
            batch = self._finished[:_REQUESTS_A_STEP]
            del self._finished[:_REQUESTS_A_STEP]
            for requests in alike(batch):
                self._count(requests)
                self.upstreams.count(requests)
                self.recent.count(requests)
            yield

    def _count(self, requests: Alike) -> None:
        numbers = self._routes.get(requests.route) or self._new(requests.route)
        exchanges, outcome = requests.exchanges, (requests.status, requests.end)
        numbers.requests[outcome] = numbers.requests.get(outcome, 0) + len(exchanges)
        numbers.duration.observe_all([each.finished - each.begun for each in exchanges])
        numbers.first_byte.observe_all(requests.first_bytes_s)
        numbers.request_bytes += sum([each.request_bytes for each in exchanges])
        numbers.response_bytes += sum([each.response_bytes for each in exchanges])
        numbers.prompt_tokens += sum([each.usage.prompt_tokens for each in exchanges])
        numbers.completion_tokens += requests.completion_tokens
        if not requests.is_plain:
            for each in exchanges:
                numbers.retries += each.retries
                numbers.replays += each.replays
                if each.resume:
                    numbers.resumes[each.resume] = numbers.resumes.get(each.resume, 0) + 1
        if requests.endpoint:
            self._own.observe_all(
                [each.asked_at - each.begun - each.waited_s for each in exchanges if not each.retries]
            )

    def _new(self, route: str) -> _RouteNumbers:
        """Return the numbers of a route that has none of its own yet, or never will."""
        own = len(self._routes) - ("" in self._routes) - (OTHER in self._routes)
        return self._routes.setdefault(route if not route or own < self.max_labels else OTHER, _RouteNumbers())

    def fold(self) -> Iterator[None]:
        """Count what came, in steps; called every second."""
        yield from self.count()
        self._own.fold()
        for at, numbers in enumerate(list(self._routes.values())):
            numbers.duration.fold()
            numbers.first_byte.fold()
            if at % _ROUTES_A_STEP == _ROUTES_A_STEP - 1:
                yield
        yield from self.upstreams.fold()

    def count_error(self, error: EdgeError) -> None:
        """Count an answer that is an error, by its class's code: that of an instance may be any text."""
        limit, what = error.limit
        if limit not in self._limits:
            if len(self._limits) > self._max_labels:
                limit = OTHER
            else:
                self._limits.add(limit)
        cause = (type(error).code, limit, what)
        self._errors[cause] = self._errors.get(cause, 0) + 1

    def families(self) -> Iterator[Family | None]:
        """Yield every metric, each in parts that follow one another; None where a part takes a while to come."""
        for _ in self.count():
            yield None
        routes = [((route,), numbers) for route, numbers in self._routes.items()]  # which others may join meanwhile
        for new, add in _ROUTE_FAMILIES:
            yield new()
            for at in range(0, len(routes), _ROUTES_A_STEP):
                part = new()
                for labels, numbers in routes[at : at + _ROUTES_A_STEP]:
                    add(part, labels, numbers)
                yield part
        errors = list(self._errors.items())
        for at in range(0, max(len(errors), 1), _ERRORS_A_STEP):
            part = CounterMetricFamily("edge_errors", "Errors that callers got.", labels=("error", "limit", "of"))
            for cause, count in errors[at : at + _ERRORS_A_STEP]:
                part.add_metric(cause, count)
            yield part
        yield Histograms("edge_overhead_seconds", _OWN_TEXT, (), [((), self._own)])
        yield from self.upstreams.families()
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
            for lines in lines_of(family, with_head=family.name != name):
                yield lines
                await asyncio.sleep(0)
            name = family.name


def _add_requests(family: Any, labels: Labels, numbers: _RouteNumbers) -> None:
    for (status, end), count in numbers.requests.items():
        family.add_metric((*labels, str(status), end.value), count)


def _add_histogram(name: str, family: Any, labels: Labels, numbers: _RouteNumbers) -> None:
    family.rows.append((labels, getattr(numbers, name)))


def _add_resumes(family: Any, labels: Labels, numbers: _RouteNumbers) -> None:
    for outcome, count in numbers.resumes.items():
        family.add_metric((*labels, outcome), count)


def _add_sum(name: str, family: Any, labels: Labels, numbers: _RouteNumbers) -> None:
    family.add_metric(labels, getattr(numbers, name))


def _histograms(name: str, text: str) -> Histograms:
    return Histograms(f"edge_{name}_seconds", text, ("route",), [])


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
_OWN_TEXT: Final = "From a request's head until an endpoint is asked, without waiting for its body or for a place."
# What makes each family by route, and what adds a route to it.
_ROUTE_FAMILIES: Final[tuple[tuple[Callable[[], Any], Callable[[Any, Labels, _RouteNumbers], None]], ...]] = (
    (
        partial(CounterMetricFamily, "edge_requests", "Finished requests.", labels=("route", "status", "end")),
        _add_requests,
    ),
    (partial(_histograms, "request_duration", "From head to end."), partial(_add_histogram, "duration")),
    (partial(_histograms, "time_to_first_byte", _FIRST_BYTE_TEXT), partial(_add_histogram, "first_byte")),
    (
        partial(CounterMetricFamily, "edge_resumes", _RESUMES_TEXT, labels=("route", "outcome")),
        _add_resumes,
    ),
    *(
        (partial(CounterMetricFamily, f"edge_{name}", text, labels=("route",)), partial(_add_sum, name))
        for name, text in _SUMS.items()
    ),
)
