"""What the parts of a process report when they are asked: metrics, and the lines of `/readyz?verbose`."""

import asyncio
import platform
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import islice
from typing import Final

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from edge.client.body import BodyMemory
from edge.client.server import ClientServer
from edge.journal.journal import Journal
from edge.journal.shipping import Shipper
from edge.keys.authenticator import Authenticator
from edge.keys.revocations import RevocationChannel
from edge.keys.tokens import TokenVerifier
from edge.process.admin import Line
from edge.process.parts import Parts, outages
from edge.proxy import Proxy
from edge.telemetry.metrics import Metrics
from edge.upstream.cache_metrics import upstream_metrics
from edge.upstream.endpoints import Endpoints
from edge.upstream.health import HEALTHY

_PROCESS: Final = ProcessCollector(registry=None)
_MAX_LINES: Final = 100  # of endpoints that are out


def report_all(parts: Parts, metrics: Metrics) -> None:
    """Have `/metrics` and `/readyz?verbose` ask every part."""
    keys = parts.authenticator, parts.tokens, parts.channel
    usage = parts.journal, parts.shipper
    parts.readiness.parts += [
        partial(request_lines, parts.proxy, parts.clients),
        partial(key_lines, *keys),
        partial(usage_lines, *usage),
        partial(endpoint_lines, parts.endpoints, asyncio.get_running_loop().time),
    ]
    reporting = (
        *keys, parts.admission, parts.shared_limits, parts.kept_responses, *usage, parts.access_log, parts.readiness
    )  # fmt: skip
    metrics.gauges += [part.metrics for part in reporting if part is not None]
    metrics.gauges += [parts.certificates.metrics, parts.loop_lag.metrics]
    metrics.gauges += [
        partial(client_metrics, parts.proxy, parts.clients, parts.memory),
        lambda: process_metrics(parts, metrics.max_labels),
        lambda: upstream_metrics(parts.endpoints, parts.proxy.generation.pools, metrics.max_labels),
    ]


def request_lines(proxy: Proxy, clients: ClientServer) -> Iterator[Line]:
    """Yield what is configured, and what goes on."""
    yield "routes", str(len(proxy.generation.config.routes))
    yield "requests in flight", str(proxy.in_flight)
    yield "connections", f"{clients.open_connections} of {clients.max_connections}"


def key_lines(
    authenticator: Authenticator, tokens: TokenVerifier | None, channel: RevocationChannel | None
) -> Iterator[Line]:
    """Yield whether keys can be looked up, and whether their changes arrive."""
    lost = authenticator.outage.reason
    yield "key store", f"down: {lost}" if lost else "ok"
    if tokens is not None:
        yield "token keys", f"{tokens.key_count} {tokens.outage.reason}".strip()
    if channel is not None:
        yield "shared redis", channel.outage.reason or "ok"


def usage_lines(journal: Journal, shipper: Shipper | None) -> Iterator[Line]:
    """Yield whether usage is recorded and delivered."""
    waiting = f"{journal.outage.reason}, {journal.lines_waiting} lines wait in memory"
    yield "journal", waiting if journal.outage else "ok"
    if shipper is not None:
        yield "usage sink", f"{shipper.outage.reason or 'ok'}, {shipper.lag_bytes} bytes to go"


def endpoint_lines(endpoints: Endpoints, clock: Callable[[], float]) -> Iterator[Line]:
    """Yield the endpoints that get no requests now, or not those of everybody, and why."""
    now = clock()
    tainted = [endpoint for endpoint in endpoints.states() if endpoint.health.is_tainted]  # few, of thousands
    out = [endpoint for endpoint in tainted if endpoint.health.describe(now) != HEALTHY]
    for endpoint in out[:_MAX_LINES]:
        yield f"endpoint {endpoint.authority}", endpoint.health.describe(now)
    if len(out) > _MAX_LINES:
        yield "endpoints", f"{len(out) - _MAX_LINES} more are out"


def client_metrics(proxy: Proxy, clients: ClientServer, memory: BodyMemory) -> Iterator[Metric]:
    """Yield what clients do now."""
    yield GaugeMetricFamily("edge_requests_in_flight", "Requests being answered.", proxy.in_flight)
    yield GaugeMetricFamily("edge_client_connections", "Open connections of clients.", clients.open_connections)
    yield GaugeMetricFamily("edge_client_connections_limit", "How many there may be.", clients.max_connections)
    yield GaugeMetricFamily("edge_client_connections_idle", "Those that wait for a request.", len(clients.idle))
    yield GaugeMetricFamily("edge_client_connections_silent", "Those of which no byte came yet.", len(clients.silent))
    yield GaugeMetricFamily("edge_client_handshakes", "TLS handshakes that have begun.", clients.handshakes)
    yield CounterMetricFamily("edge_connections_accepted", "Connections accepted.", clients.accepted_connections)
    yield CounterMetricFamily(
        "edge_connections_evicted", "Connections that did nothing, closed for others.", clients.evicted_connections
    )
    yield CounterMetricFamily(
        "edge_connections_refused", "Connections over max_connections.", clients.refused_connections
    )
    yield CounterMetricFamily(
        "edge_connections_refused_of_address", "Connections over max_connections_per_address.",
        clients.addresses.refused,
    )  # fmt: skip
    handshakes = CounterMetricFamily("edge_handshakes_failed", "TLS handshakes that failed.", labels=("reason",))
    handshakes.add_metric(("silent",), clients.silent_handshakes)
    handshakes.add_metric(("failed",), clients.failed_handshakes)
    yield handshakes
    yield CounterMetricFamily("edge_malformed_requests", "Requests that are no HTTP.", clients.malformed_requests)
    yield CounterMetricFamily("edge_heads_parsed", "Heads that no request before had.", clients.parsed_heads)
    yield CounterMetricFamily("edge_plans_made", "Plans of heads, callers and models.", proxy.plans_made)
    yield GaugeMetricFamily("edge_request_body_bytes", "Request bodies held now.", memory.used_bytes)
    yield GaugeMetricFamily("edge_request_body_bytes_limit", "How many there may be.", memory.limit_bytes)


def process_metrics(parts: Parts, max_labels: int) -> Iterator[Metric]:
    """Yield which program this is, what it takes of the machine, and which of the parts it needs are there."""
    build = GaugeMetricFamily("edge_build_info", "Which program this is.", labels=("version", "python"))
    build.add_metric((version("edge"), platform.python_version()), 1)
    yield build
    yield from _PROCESS.collect()
    up = GaugeMetricFamily("edge_part_up", "1, or 0 while what the edge needs is not there.", labels=("part",))
    for name, reason in islice(outages(parts), max_labels):
        up.add_metric((name,), not reason)
    yield up
