"""What a running process tells of itself: gauges for Prometheus, and the lines of the status page."""

from collections.abc import Callable, Iterator

from prometheus_client.core import Metric

from edge.client.body import BodyMemory
from edge.client.server import ClientServer
from edge.journal.journal import Journal
from edge.journal.shipping import Shipper
from edge.keys.authenticator import Authenticator
from edge.keys.revocations import RevocationChannel
from edge.keys.tokens import TokenVerifier
from edge.limits.admission import Admission
from edge.limits.shared import SharedLimits
from edge.process.admin import Health
from edge.proxy import Proxy
from edge.telemetry.metrics import AccessLog, counter, gauge
from edge.upstream.endpoints import Endpoints


class Status:
    """Reads the parts of a process when it is asked.

    `clock` is the loop's; `channel` is None where there is no `shared.redis`.
    """

    def __init__(
        self,
        *,
        health: Health,
        proxy: Proxy,
        clients: ClientServer,
        authenticator: Authenticator,
        tokens: TokenVerifier | None,
        admission: Admission,
        shared_limits: SharedLimits | None,
        channel: RevocationChannel | None,
        endpoints: Endpoints,
        journal: Journal,
        shipper: Shipper | None,
        memory: BodyMemory,
        access_log: AccessLog,
        clock: Callable[[], float],
    ) -> None:
        self._health = health
        self._proxy = proxy
        self._clients = clients
        self._authenticator = authenticator
        self._tokens = tokens
        self._admission = admission
        self._shared_limits = shared_limits
        self._channel = channel
        self._endpoints = endpoints
        self._journal = journal
        self._shipper = shipper
        self._memory = memory
        self._access_log = access_log
        self._clock = clock

    def details(self) -> list[tuple[str, str]]:
        """Return the lines of the status page, name and value."""
        proxy, journal, shipper = self._proxy, self._journal, self._shipper
        key_store_lost = self._authenticator.outage.reason
        lines = [
            ("routes", str(len(proxy.generation.config.routes))),
            ("requests in flight", str(proxy.in_flight)),
            ("connections", str(len(self._clients.clients))),
            ("key store", f"down: {key_store_lost}" if key_store_lost else "ok"),
        ]
        if self._tokens is not None:
            lines.append(("token keys", f"{self._tokens.key_count} {self._tokens.outage.reason}".strip()))
        if self._channel is not None:
            lines.append(("shared redis", self._channel.outage.reason or "ok"))
        waiting = f"{journal.outage}, {journal.lines_waiting} lines wait in memory"
        lines.append(("journal", waiting if journal.outage else "ok"))
        if shipper is not None:
            lines.append(("usage sink", f"{shipper.outage or 'ok'}, {shipper.lag_bytes} bytes to go"))
        now = self._clock()
        unwell = [each for each in self._endpoints.states() if not each.health.admits(now)]
        return lines + [(f"endpoint {each.authority}", each.health.describe(now)) for each in unwell]

    def gauges(self) -> Iterator[Metric]:
        """Yield what is so now, and what was counted outside of requests."""
        yield from self._of_clients()
        for part in (self._authenticator, self._tokens, self._channel):
            if part is not None:
                yield from part.metrics()
        yield from self._of_limits()
        yield from self._of_usage()
        yield counter("edge_access_log_dropped", "Log lines dropped for a stuck reader.", self._access_log.dropped)
        yield from self._of_configuration()
        yield from self._endpoints.metrics(self._proxy.generation.pools)

    def _of_clients(self) -> Iterator[Metric]:
        clients = self._clients
        yield gauge("edge_requests_in_flight", "Requests being answered.", self._proxy.in_flight)
        yield gauge("edge_client_connections", "Open connections of clients.", len(clients.clients))
        yield counter("edge_connections_accepted", "Connections accepted.", clients.accepted_connections)
        yield counter("edge_connections_refused", "Connections over max_connections.", clients.refused_connections)
        yield counter("edge_malformed_requests", "Requests that are no HTTP.", clients.malformed_requests)
        yield gauge("edge_request_body_bytes", "Request bodies held now.", self._memory.used_bytes)

    def _of_limits(self) -> Iterator[Metric]:
        yield from self._admission.metrics()
        if self._shared_limits is not None:
            yield from self._shared_limits.metrics()

    def _of_usage(self) -> Iterator[Metric]:
        journal, shipper = self._journal, self._shipper
        yield counter("edge_usage_records_opened", "Requests accepted and recorded.", journal.records_open)
        yield counter("edge_usage_records_closed", "Records that say how a request ended.", journal.records_closed)
        yield counter("edge_usage_records_recovered", "Records ended for a process that crashed.", journal.recovered)
        yield counter("edge_usage_write_errors", "Writes to the journal that failed.", journal.write_errors)
        yield gauge("edge_usage_lines_waiting", "Lines in memory, for a disk with room.", journal.lines_waiting)
        yield counter("edge_usage_bad_lines", "Lines of crashed processes that cannot be read.", journal.bad_lines)
        if shipper is not None:
            yield counter("edge_usage_shipped", "Records that the sink has acknowledged.", shipper.shipped)
            yield gauge("edge_usage_unshipped_bytes", "What stands in the journal only.", shipper.lag_bytes)
            yield gauge("edge_usage_unshipped_age_seconds", "The oldest record that is not delivered.", shipper.lag_s)
            yield gauge("edge_usage_sink_up", "1, or 0 while the sink does not acknowledge.", not shipper.outage)

    def _of_configuration(self) -> Iterator[Metric]:
        health = self._health
        yield gauge("edge_config_last_reload_successful", "1, or 0 when the file is bad.", not health.reload_failed)
        yield counter("edge_config_reload_failures", "Reloads refused.", health.reload_failures)
        yield gauge("edge_config_last_reload_success_timestamp_seconds", "Unix time.", health.loaded_at)
        yield gauge("edge_config_generation", "Configurations loaded since the start.", health.generation)
