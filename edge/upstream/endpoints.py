"""Endpoints: one address and all that is known of it, its place in a pool, and the lease that an attempt holds."""

import asyncio
import logging
import math
import ssl
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, Self

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from edge.config.settings import EndpointConfig, Engine, PoolConfig
from edge.config.values import Url, parse_url
from edge.errors import UpstreamUnavailable
from edge.operations import Operation
from edge.outage import Outage
from edge.tls import client_tls
from edge.upstream.cache_aware import Seat, Ticket
from edge.upstream.engines import ENGINES
from edge.upstream.health import CHECKS, Health, Verdict
from edge.upstream.queueing import Turn
from edge.wire.connections import ConnectionPool, Shortage
from edge.wire.http1 import request_head

_log = logging.getLogger(__name__)

_FINE, _NOTHING = Verdict.FINE, Verdict.NOTHING
_MAX_INSTANCES: Final = 10_000  # instance endpoints kept; past it those without a request or connection are dropped
_MOST_LOOKED_AT: Final = 8  # of them at each new one, the longest unused first: all at once would hold the loop up
_REFUSAL_LOG_INTERVAL_S: Final = 3600.0  # somebody has to change a setting
_LOG_INTERVAL_S: Final = 60.0  # between two reports of one kind: an endpoint that comes and goes floods no log
_INSTANCES: Final = "instances"  # the label of them all: a series each, for thousands, would hold the loop up
OTHER: Final = "(other)"  # the label of what has no series of its own, as in `telemetry/metrics.py`
_MOST_FAULTS: Final = 500  # that are remembered of an endpoint
_A_STEP: Final = 100  # endpoints or pools in a step of a scrape, or of a walk through all

_Authority = tuple[Path | None, int]  # a `ca_file` and when it was written, in ns; without one, the system's


class Group(Protocol):
    """A pool as its endpoints know it: members of which any can answer."""

    members: list["Member"]
    held: int  # requests that wait for their limits

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""

    def grant(self) -> None:
        """Give the places that are free to those whose turn it is."""


class Fault(NamedTuple):
    """An attempt that failed, `at` which time of the loop, and how: `answers 401`."""

    at: float
    request_id: str
    what: str


class Endpoint:
    """One address: its requests in flight, its health and its idle connections, shared by every pool that names it.

    `is_instance` is one that belongs to no pool.
    """

    __slots__ = (
        "_log_at", "_outage", "_refusal_log_at", "authority", "connections", "faults", "health", "in_flight",
        "is_instance", "kept_in", "url", "waiting",
    )  # fmt: skip

    def __init__(self, url: Url, connections: ConnectionPool, *, is_instance: bool = False) -> None:
        self.url = url
        self.authority = url.authority
        self.connections = connections
        self.health = Health()
        self.faults: deque[Fault] | None = None  # the latest, of one that had any
        self.in_flight = 0
        self.waiting: dict[Group, None] = {}  # where requests wait for a place here, first come first
        self.is_instance = is_instance
        self.kept_in = 0  # the latest of the walks through all pools in which it was found
        failed, back = f"{self} failed several times in a row", f"{self} answers again"
        self._outage = Outage(_log, failed, back)
        self._log_at = self._refusal_log_at = -math.inf

    def __str__(self) -> str:
        return f"endpoint {self.authority}"

    def __repr__(self) -> str:
        state = self.health.describe(self.connections.loop.time())
        return f"<Endpoint {self.authority} {state}, {self.in_flight} in flight, {len(self.connections)} idle>"

    @property
    def is_used(self) -> bool:
        """Whether a request or an idle connection is there."""
        return bool(self.in_flight or len(self.connections))

    def note_fault(self, request_id: str, what: str) -> None:
        """Remember an attempt that failed, for the status page."""
        if self.faults is None:
            self.faults = deque(maxlen=_MOST_FAULTS)
        self.faults.append(Fault(self.connections.loop.time(), request_id, what))

    def log_state(self, now: float, user: str) -> None:
        """Log that what requests met took it out, for all or for `user`, or that it is back."""
        left_s, of_user_s = self.health.ejected_until - now, self.health.out_until(user) - now
        if not self.health.ejected_until:
            self._outage.up(logging.INFO)
        if now < self._log_at or self._outage:
            return
        if left_s > 0:
            self._log_at = now + _LOG_INTERVAL_S
            self._outage.down(f"ejected for {left_s:.0f} s", logging.WARNING)
        elif of_user_s > 0:
            self._log_at = now + _LOG_INTERVAL_S
            _log.warning(
                "%s failed user %s several times in a row: not asked by that user for %.0f s", self, user, of_user_s
            )

    def log_refusal(self, status: int, now: float) -> None:
        """Log that it refuses the edge itself, and what an operator has to check."""
        if now >= self._refusal_log_at:
            self._refusal_log_at = now + _REFUSAL_LOG_INTERVAL_S
            _log.warning("%s answers %d to the edge: check %s", self, status, CHECKS[status])


class Member:
    """An endpoint's place in a pool, or alone as an instance.

    `name` is the same on every machine, `weight` its share of the load, `credit` the state of the round-robin, `seat`
    that of `cache-aware`.
    """

    __slots__ = ("_engine", "_heads", "config", "credit", "endpoint", "engine", "name", "seat", "weight")

    def __init__(
        self, endpoint: Endpoint, config: EndpointConfig, engine: Engine = "vllm", seat: Seat | None = None
    ) -> None:
        self.endpoint = endpoint
        self.config = config
        self.name = endpoint.authority
        self.weight = config.weight
        self.credit = 0
        self.seat = seat
        self.engine = engine
        self._engine = ENGINES[engine]
        self._heads: dict[str, bytes] = {}

    @property
    def load(self) -> int:
        """Its requests in flight, whichever pool they came through."""
        return self.endpoint.in_flight

    def head(self, operation: Operation) -> bytes:
        """Return the constant part of the head of a request: its method, path, host and key."""
        head = self._heads.get(operation.name)
        if head is None:
            head = self._heads[operation.name] = self.head_of("POST", operation.name, operation)
        return head

    def head_of(self, method: str, path: str, operation: Operation) -> bytes:
        """Return the constant part of the head of a request for a path under the base.

        A path in the endpoint's URL takes the place of `/v1`, and a mere `/` is the root; an operation of another
        version is beside it.
        """
        headers = [("Accept-Encoding", "identity")]  # a compressed stream could be neither metered nor flushed
        if self.config.api_key is not None:
            headers.append(("Authorization", f"Bearer {self.config.api_key}"))
        base = self.config.url.base
        if operation.at_root and self._engine.tokenizes_at_root:
            base = ""
        elif operation.has_version:
            base = base.removesuffix("/v1")
        return request_head(f"{base}/{path}", self.config.url.authority, headers, method)


class Lease:
    """One endpoint for one attempt; counted in flight while it is held. `ticket` is of a prompt in a line.

    `turn` is what it was waited for by, which whoever holds it settles.
    """

    __slots__ = ("_era", "_user", "endpoint", "member", "ticket", "turn")

    def __init__(self, member: Member, user: str = "", ticket: Ticket | None = None) -> None:
        self.member = member
        self.endpoint = member.endpoint
        self.ticket = ticket
        self.turn: Turn[Any] | None = None
        self._user = user
        self._era = -1  # of the endpoint's health; -1 until it is held

    def hold(self) -> None:
        """Count it from now on, before it is entered: a place that is given to somebody who is not awake yet."""
        endpoint = self.endpoint
        endpoint.in_flight += 1
        self._era = endpoint.health.begin(self._user)
        if self.ticket is not None:
            self.ticket.dispatch(time.monotonic())

    def first_byte(self, streamed: bool) -> None:
        """Note that the answer begins, which `streamed` says is a stream."""
        if self.ticket is not None:
            self.ticket.first_byte(time.monotonic(), streamed=streamed)

    def __enter__(self) -> Self:
        if self._era < 0:
            self.hold()
        return self

    def give_back(self, *_: object) -> None:
        """Give the place back, to whoever waits for one."""
        endpoint = self.endpoint
        endpoint.in_flight -= 1
        if self.ticket is not None:
            self.ticket.end(time.monotonic())
        if endpoint.health.is_tainted:
            endpoint.health.abandon(self._era, self._user)
        if endpoint.waiting:
            for pool in tuple(endpoint.waiting):
                pool.grant()

    __exit__ = give_back

    def report(self, verdict: Verdict, retry_after_s: float | None = None, status: int = 0) -> None:
        """Report to the endpoint's health what an attempt showed; `status` is what it answered, 0 for nothing."""
        health, user = self.endpoint.health, self._user
        if verdict is _NOTHING or (verdict is _FINE and not health.is_tainted) or self.endpoint.is_instance:
            return  # an instance is asked whatever it answered
        now = self.endpoint.connections.loop.time()
        if verdict is _FINE:
            health.fine(now, self._era)
        elif verdict is Verdict.FAULT:
            health.fault(now, self._era, user)
        elif verdict is Verdict.UNREACHABLE:
            health.unreachable(now, self._era, user)
            if health.ejected_until > now and self.ticket is not None:
                self.ticket.forget()
        else:
            health.backpressure(now, retry_after_s, self._era, user)
        if status in CHECKS:
            self.endpoint.log_refusal(status, now)
        self.endpoint.log_state(now, user)


class Endpoints:
    """Every endpoint of the process, by scheme, address and TLS settings, so that a reload finds them as they were."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._members: dict[tuple[object, ...], Endpoint] = {}
        self._tls: dict[_Authority, ssl.SSLContext] = {}  # one takes 20 ms and 0.8 MB
        self._instances: OrderedDict[tuple[str, Engine], Member] = OrderedDict()
        self._labels: set[str] = set()  # the authorities that have series of their own
        self._walk = 0  # of `keep_only`, the latest
        self._gone: dict[str, int] = {}  # ejections of endpoints that are no more, by a label that sums
        self._shortage = Shortage(lambda: [endpoint.connections for endpoint in self.states()])

    def member(self, url: Url, pool: PoolConfig) -> Endpoint:
        """Return the endpoint at an address of a pool; raises `Unusable` for a bad `ca_file`."""
        authority = pool.ca_file, _changed_ns(pool.ca_file)
        key = (url.scheme, url.host, url.port, *authority)
        endpoint = self._members.get(key)
        if endpoint is None:
            endpoint = self._members[key] = self._new(url, authority, f"pools.{pool.name}.ca_file")
        endpoint.kept_in = self._walk  # a pool has it from now on, which a walk under way may have passed
        return endpoint

    def instance(self, address: str, engine: Engine = "vllm", max_inflight: int | None = None) -> Lease:
        """Return a lease of the instance at a URL.

        Raises: `ValueError` when no such URL can be, `UpstreamUnavailable` when so many requests are there already.
        """
        member = self._instances.get((address, engine))
        if member is None:
            if len(self._instances) >= _MAX_INSTANCES:
                self._drop_instances()
            url = parse_url(address)
            member = Member(self._new(url, is_instance=True), EndpointConfig(url), engine)
            self._instances[address, engine] = member
        if max_inflight is not None and member.load >= max_inflight:
            raise UpstreamUnavailable("The model's server is busy, try again in a moment.", retry_after_s=1)
        return Lease(member)

    def _drop_instances(self) -> None:
        """Drop some instances without a request or connection; those that have one are looked at last next time."""
        for at in list(islice(self._instances, _MOST_LOOKED_AT)):
            if self._instances[at].endpoint.is_used:
                self._instances.move_to_end(at)
            else:
                self._forget(self._instances.pop(at).endpoint)

    def _new(
        self, url: Url, authority: _Authority = (None, 0), setting: str = "", *, is_instance: bool = False
    ) -> Endpoint:
        tls = self._tls_for(authority, setting) if url.scheme == "https" else None
        return Endpoint(url, ConnectionPool(url, tls, self._loop, self._shortage), is_instance=is_instance)

    def _tls_for(self, authority: _Authority, setting: str) -> ssl.SSLContext:
        context = self._tls.get(authority)
        if context is None:
            context = client_tls(authority[0], setting)
            context.set_alpn_protocols(["http/1.1"])
            self._tls = {known: each for known, each in self._tls.items() if known[0] != authority[0]}
            self._tls[authority] = context
        return context

    def keep_only(self, pools: Iterable[Group]) -> Iterator[None]:
        """Close the idle connections of endpoints that no pool names any more, in steps.

        Requests in flight end as they will. An endpoint that is asked for between two steps stays.
        """
        self._walk += 1
        walk = self._walk
        for number, pool in enumerate(list(pools)):
            for member in pool.members:
                member.endpoint.kept_in = walk
            if number % _A_STEP == _A_STEP - 1:
                yield
        work = 0
        for key, endpoint in list(self._members.items()):
            work += 1
            if endpoint.kept_in < walk and self._members.get(key) is endpoint:  # not gone by a later walk
                work += len(endpoint.connections)
                endpoint.connections.close()
                del self._members[key]
                self._forget(endpoint)
            if work >= _A_STEP:
                work = 0
                yield

    def close(self) -> None:
        """Close every idle connection."""
        for endpoint in self.states():
            endpoint.connections.close()

    def states(self) -> Iterator[Endpoint]:
        """Yield every endpoint, instances too."""
        yield from self._members.values()
        yield from (member.endpoint for member in self._instances.values())

    def metrics(self, pools: Mapping[str, Group], max_labels: int) -> Iterator[Metric | None]:
        """Yield what is so now of the endpoints, and how many requests wait at `pools`; None after each hundred.

        The first `max_labels` endpoints and pools have series of their own.
        """
        at = ("endpoint",)
        in_flight = GaugeMetricFamily("edge_upstream_in_flight", "Requests at an endpoint.", labels=at)
        idle = GaugeMetricFamily("edge_upstream_idle_connections", "Idle connections.", labels=at)
        ejections = CounterMetricFamily("edge_upstream_ejections", "Times it was ejected.", labels=at)
        out = GaugeMetricFamily("edge_upstream_out", "1 while an endpoint is not asked.", labels=at)
        some = GaugeMetricFamily("edge_upstream_out_for_some", "1 while users it failed leave it.", labels=at)
        waiting = GaugeMetricFamily("edge_pool_waiting", "Requests that wait for a place.", labels=("pool",))
        held = GaugeMetricFamily("edge_pool_held", "Requests that wait for their limits.", labels=("pool",))
        now = self._loop.time()
        totals = {name: [0, 0, count, 0, 0] for name, count in self._gone.items()}
        self._label(max_labels)
        for number, endpoint in enumerate(list(self.states())):
            total = totals.setdefault(self._label_of(endpoint), [0] * 5)
            total[0] += endpoint.in_flight
            total[1] += len(endpoint.connections)
            total[2] += endpoint.health.total_ejections
            total[3] += not endpoint.health.admits(now)
            total[4] += endpoint.health.is_out_for_some
            if number % _A_STEP == _A_STEP - 1:
                yield None
        for number, (name, total) in enumerate(totals.items()):
            in_flight.add_metric((name,), total[0])
            idle.add_metric((name,), total[1])
            if name != _INSTANCES:  # which are asked all the same
                ejections.add_metric((name,), total[2])
                out.add_metric((name,), total[3] if name == OTHER else bool(total[3]))
                some.add_metric((name,), total[4] if name == OTHER else bool(total[4]))
            if number % _A_STEP == _A_STEP - 1:
                yield None
        others = others_held = 0
        for number, (name, pool) in enumerate(list(pools.items())):
            if number < max_labels:
                waiting.add_metric((name,), pool.waiting)
                held.add_metric((name,), pool.held)
            else:
                others += pool.waiting
                others_held += pool.held
            if number % _A_STEP == _A_STEP - 1:
                yield None
        if len(pools) > max_labels:
            waiting.add_metric((OTHER,), others)
            held.add_metric((OTHER,), others_held)
        yield from (in_flight, idle, out, some, ejections, waiting, held)

    def _label(self, most: int) -> None:
        """Give endpoints that came since the last scrape a label of their own, as far as there may be more."""
        if len(self._labels) < most:
            for endpoint in self._members.values():
                if len(self._labels) >= most:
                    break
                self._labels.add(endpoint.authority)

    def _label_of(self, endpoint: Endpoint) -> str:
        if endpoint.is_instance:
            return _INSTANCES
        return endpoint.authority if endpoint.authority in self._labels else OTHER

    def _forget(self, endpoint: Endpoint) -> None:
        """Keep what an endpoint that goes had counted, where it is a part of a sum."""
        label = self._label_of(endpoint)
        if label == OTHER:
            self._gone[label] = self._gone.get(label, 0) + endpoint.health.total_ejections
        else:
            self._labels.discard(label)


def _changed_ns(file: Path | None) -> int:
    """Return when a file was written last; 0: there is none, or none any more, which who reads it reports."""
    try:
        return file.stat().st_mtime_ns if file else 0
    except OSError:
        return 0
