"""Numbers of what was asked upstream, by pool and endpoint: which member is slow, and which one fails and how.

A request is counted once, at its end, by facts that it has anyhow. So an event costs nothing: the time of an output
token is that between the first and the last, shared by those between. The names of the histograms are those of
OpenTelemetry (https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from prometheus_client.core import CounterMetricFamily

from edge.exchange import End
from edge.telemetry.alike import Alike
from edge.telemetry.exposition import OTHER, Family, Histogram, Histograms

_DURATION_BOUNDS_S: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_FIRST_TOKEN_BOUNDS_S: Final = (0.02, 0.06, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 100.0)
_TOKEN_BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0)
_WAIT_BOUNDS_S: Final = (0.01, 0.1, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0)
_INSTANCES: Final = "instances"  # the label of them all, which belong to no pool
_A_STEP: Final = 8  # members
_COMPLETE, _OK = End.COMPLETE, 200
_AT: Final = ("pool", "endpoint")

Place = tuple[str, str]  # pool and endpoint


@dataclass(slots=True)
class _Numbers:
    asked: dict[tuple[int, str], int] = field(default_factory=dict)  # by status and outcome, but whole answers
    duration: Histogram = field(default_factory=lambda: Histogram(_DURATION_BOUNDS_S))
    first_token: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN_BOUNDS_S))
    token: Histogram = field(default_factory=lambda: Histogram(_TOKEN_BOUNDS_S))
    completion_tokens: int = 0

    def count(self, outcome: tuple[int, str], count: int) -> None:
        if count:
            self.asked[outcome] = self.asked.get(outcome, 0) + count


class Upstreams:
    """The numbers of members, the first `max_labels` each by itself; what others count is summed under one label."""

    def __init__(self, max_labels: int = 1000) -> None:
        self.max_labels = max_labels
        self._members: dict[Place, _Numbers] = {}
        self._waits: dict[str, Histogram] = {}

    def count(self, requests: Alike) -> None:
        """Count finished requests at the endpoint that was asked last, and at those that had failed before."""
        if not requests.is_plain:
            self._count_waits(requests)
            self._count_failures(requests)
        if not requests.endpoint:
            return
        numbers, exchanges = self._of(requests.pool, requests.endpoint), requests.exchanges
        if requests.end is _COMPLETE and requests.status == _OK:
            numbers.duration.observe_all([each.finished - each.asked_at for each in exchanges])
        else:
            ended_here = sum(not each.has_failed_last for each in exchanges)
            numbers.count((requests.status, requests.end.value), ended_here)
        began = [each for each in exchanges if each.first_byte > each.asked_at]  # else another member began the stream
        numbers.first_token.observe_all([each.first_byte - each.asked_at for each in began])
        numbers.completion_tokens += requests.completion_tokens
        if requests.stream:
            streams = [(each.finished - each.first_byte, each.usage.completion_tokens - 1) for each in began]
            numbers.token.observe_all([took_s / gaps for took_s, gaps in streams if gaps > 0])

    def _count_waits(self, requests: Alike) -> None:
        """Count those that waited for a place in their pool or for their limits, whether they got one or not."""
        waits_s = [each.queued_s for each in requests.exchanges if each.queued_s]
        if waits_s:
            pool = requests.pool if requests.pool in self._waits or len(self._waits) < self.max_labels else OTHER
            self._waits.setdefault(pool, Histogram(_WAIT_BOUNDS_S)).observe_all(waits_s)

    def _count_failures(self, requests: Alike) -> None:
        for exchange in requests.exchanges:
            for each in exchange.failures or ():
                self._of(requests.pool, each.endpoint).count((each.status, each.outcome), 1)

    def _of(self, pool: str, endpoint: str) -> _Numbers:
        place = (pool, endpoint if pool else _INSTANCES)
        if place not in self._members and len(self._members) >= self.max_labels:
            place = (OTHER, OTHER)
        return self._members.get(place) or self._members.setdefault(place, _Numbers())

    def keep_only(self, places: Iterable[Place]) -> None:
        """Forget members that are gone, as those of a name in DNS, whose addresses change all the time."""
        kept = {*places, ("", _INSTANCES), (OTHER, OTHER)}
        self._members = {place: numbers for place, numbers in self._members.items() if place in kept}

    def fold(self) -> Iterator[None]:
        """Count what the histograms got, in steps."""
        for at, numbers in enumerate(list(self._members.values())):
            numbers.duration.fold()
            numbers.first_token.fold()
            numbers.token.fold()
            if at % _A_STEP == _A_STEP - 1:
                yield
        for wait in list(self._waits.values()):
            wait.fold()

    def families(self) -> Iterator[Family | None]:
        """Yield every metric, each in parts that follow one another."""
        members = list(self._members.items())
        text, tokens = "Requests to an endpoint.", "Tokens of its answers."
        for at in range(0, max(len(members), 1), _A_STEP):
            requests = CounterMetricFamily("edge_upstream_requests", text, labels=(*_AT, "status", "outcome"))
            for place, numbers in members[at : at + _A_STEP]:
                whole = numbers.duration.count
                asked = numbers.asked | ({(_OK, _COMPLETE.value): whole} if whole else {})
                for (status, outcome), count in asked.items():
                    requests.add_metric((*place, str(status), outcome), count)
            yield requests
        completion = CounterMetricFamily("edge_upstream_completion_tokens", tokens, labels=_AT)
        for place, numbers in members:
            completion.add_metric(place, numbers.completion_tokens)
        yield completion
        for name, text, histograms in (
            ("request_duration", "From asking an endpoint to the end.", [(p, each.duration) for p, each in members]),
            ("time_to_first_token", "From asking to the content.", [(p, each.first_token) for p, each in members]),
            ("time_per_output_token", "Of a stream, after the first.", [(p, each.token) for p, each in members]),
        ):
            yield Histograms(f"gen_ai_server_{name}_seconds", text, _AT, histograms)
        waits = [((pool,), each) for pool, each in list(self._waits.items())]
        yield Histograms("edge_pool_wait_seconds", "Waiting for a place in a pool.", ("pool",), waits)
