"""The parts of a process that report what they do."""

from collections.abc import Iterator
from dataclasses import dataclass

from edge.client.body import BodyMemory
from edge.client.server import ClientServer
from edge.journal.journal import Journal
from edge.journal.shipping import Shipper
from edge.keys.authenticator import Authenticator
from edge.keys.revocations import RevocationChannel
from edge.keys.tokens import TokenVerifier
from edge.limits.admission import Admission
from edge.limits.shared import SharedLimits
from edge.process.admin import Readiness
from edge.process.certificates import Certificates
from edge.process.quotas import JournalQuotas
from edge.proxy import Proxy
from edge.telemetry.access_log import AccessLog
from edge.telemetry.loop_lag import LoopLag
from edge.telemetry.metrics import Metrics
from edge.upstream.discovery import Discovery
from edge.upstream.endpoints import Endpoints
from edge.upstream.kept_responses import KeptResponses


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What a running process is made of; None is a part that its file does not ask for."""

    readiness: Readiness
    certificates: Certificates
    loop_lag: LoopLag
    proxy: Proxy
    clients: ClientServer
    memory: BodyMemory
    endpoints: Endpoints
    discovery: Discovery
    authenticator: Authenticator
    tokens: TokenVerifier | None
    channel: RevocationChannel | None
    admission: Admission
    shared_limits: SharedLimits | None
    quotas: JournalQuotas
    kept_responses: KeptResponses
    journal: Journal
    shipper: Shipper | None
    access_log: AccessLog
    metrics: Metrics


def outages(parts: Parts) -> Iterator[tuple[str, str]]:
    """Yield what the process needs beside upstreams, and why it is not there, "" when it is."""
    yield "key store", parts.authenticator.outage.reason
    if parts.tokens is not None:
        yield "token keys", parts.tokens.outage.reason
    if parts.channel is not None:
        yield "revocations", parts.channel.outage.reason
    if parts.shared_limits is not None:
        yield "shared limits", parts.shared_limits.outage.reason
    if parts.quotas.is_used:
        yield "quotas", parts.quotas.outage.reason
    yield "responses", parts.kept_responses.outage.reason
    yield "journal", parts.journal.outage.reason or parts.journal.sync_outage.reason
    if parts.shipper is not None:
        yield "sink", parts.shipper.outage.reason or parts.shipper.note_outage.reason
    yield from ((f"dns {name}", reason) for name, reason in parts.discovery.states())
