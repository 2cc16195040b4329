"""What the last minute was like, by route and endpoint, and the latest failures: for the status page.

Requests are counted once, after their end, in the cell of its second, route and endpoint. All sums are made when
somebody looks: quantiles are those of a sample, since a cell keeps the first times of its second only.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from edge.exchange import End, Exchange
from edge.telemetry.alike import Alike

MINUTE_S: Final = 60
OTHER: Final = "(other)"  # routes and endpoints past `_MOST_CELLS`
_MOST_CELLS: Final = 200  # of a second
_MOST_TIMES: Final = 20  # of a cell
_MOST_SORTED: Final = 1000  # for a quantile, in less than a tenth of a millisecond
_MOST_FAILURES: Final = 20
_A_STEP: Final = 200  # cells that are added up, in less than a millisecond
_COMPLETE: Final = End.COMPLETE
# What is nobody's failure: a refusal is the caller's, or that of a limit.
_BY_CALLER: Final = frozenset((End.REFUSED, End.CLIENT_GONE, End.SLOW_CLIENT))

_Place = tuple[str, str]  # route and endpoint


@dataclass(slots=True, eq=False)
class _Cell:
    requests: int = 0
    failed: int = 0
    refused: int = 0
    tokens: int = 0
    first_bytes_s: list[float] = field(default_factory=list)


class Failure(NamedTuple):
    """A request that failed; `at` is Unix seconds, `upstream_status` 0 where no status came."""

    at: float
    request_id: str
    route: str
    endpoint: str
    status: int
    end: str
    error: str
    upstream_status: int
    upstream_error: str
    retries: int
    duration_s: float


@dataclass(slots=True, eq=False)
class Traffic:
    """The last minute of one route or endpoint; each list has a number for each second, the oldest first."""

    requests: list[int] = field(default_factory=lambda: [0] * MINUTE_S)
    tokens: list[int] = field(default_factory=lambda: [0] * MINUTE_S)
    first_byte_s: list[float | None] = field(default_factory=lambda: [None] * MINUTE_S)
    failed: int = 0
    refused: int = 0
    times_s: list[float] = field(default_factory=list)

    def add(self, at: int, cell: _Cell) -> None:
        """Add what happened in a second; `first_byte_s` is the slowest of it."""
        self.requests[at] += cell.requests
        self.tokens[at] += cell.tokens
        self.failed += cell.failed
        self.refused += cell.refused
        if cell.first_bytes_s:
            self.times_s += cell.first_bytes_s
            self.first_byte_s[at] = max(self.first_byte_s[at] or 0.0, *cell.first_bytes_s)

    def first_byte_quantile_s(self, share: float) -> float | None:
        """Return the time to the first byte that a share of the requests were not slower than, None without any."""
        times = sorted(self.times_s[:: len(self.times_s) // _MOST_SORTED + 1])
        return times[max(math.ceil(share * len(times)) - 1, 0)] if times else None


class Recent:
    """Keeps a minute of finished requests."""

    def __init__(self) -> None:
        self.failures: deque[Failure] = deque(maxlen=_MOST_FAILURES)
        self._second = 0
        self._cells: dict[_Place, _Cell] = {}  # of the second
        self._seconds: deque[tuple[int, dict[_Place, _Cell]]] = deque([(0, self._cells)], maxlen=MINUTE_S)

    def count(self, requests: Alike) -> None:
        """Count finished requests."""
        if requests.second > self._second:
            self._second = requests.second
            self._cells = {}
            self._seconds.append((requests.second, self._cells))
        cell = self._cells.get((requests.route, requests.endpoint))
        if cell is None:
            cell = self._new(requests.route, requests.endpoint)
        cell.requests += len(requests.exchanges)
        cell.tokens += requests.completion_tokens
        if len(cell.first_bytes_s) < _MOST_TIMES:
            cell.first_bytes_s += requests.first_bytes_s[: _MOST_TIMES - len(cell.first_bytes_s)]
        if requests.end is not _COMPLETE:
            for each in requests.exchanges:
                self._note_failure(each, cell)

    def _new(self, route: str, endpoint: str) -> _Cell:
        place = (route, endpoint) if len(self._cells) < _MOST_CELLS else (OTHER, OTHER)
        return self._cells.setdefault(place, _Cell())

    def _note_failure(self, exchange: Exchange, cell: _Cell) -> None:
        end = exchange.end
        assert end is not None
        if end in _BY_CALLER and exchange.status < 500:
            cell.refused += end is End.REFUSED
            return
        cell.failed += 1
        duration_s = exchange.finished - exchange.begun
        at = exchange.started_at + duration_s
        self.failures.append(
            Failure(
                at, exchange.request_id, exchange.route, exchange.endpoint, exchange.status, end.value,
                exchange.error, exchange.upstream_status, exchange.upstream_error, exchange.retries, duration_s,
            )
        )  # fmt: skip

    def minute(self, routes: dict[str, Traffic], endpoints: dict[str, Traffic], now: float) -> Iterator[None]:
        """Add the last whole minute up to `now`, of `time.monotonic`, to the traffic of each, in steps."""
        first = int(now) - MINUTE_S
        for number, (at, (route, endpoint), cell) in enumerate(self._since(first), 1):
            routes.setdefault(route, Traffic()).add(at, cell)
            if endpoint:
                endpoints.setdefault(endpoint, Traffic()).add(at, cell)
            if number % _A_STEP == 0:
                yield

    def _since(self, first: int) -> Iterable[tuple[int, _Place, _Cell]]:
        for second, cells in list(self._seconds):
            if first <= second < first + MINUTE_S:
                for place, cell in list(cells.items()):
                    yield second - first, place, cell
