"""The parts of a process that report what they do."""

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
from edge.proxy import Proxy
from edge.telemetry.access_log import AccessLog
from edge.telemetry.recent import Recent
from edge.upstream.discovery import Discovery
from edge.upstream.endpoints import Endpoints
from edge.upstream.kept_responses import KeptResponses


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What a running process is made of; None is a part that its file does not ask for."""

    readiness: Readiness
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
    kept_responses: KeptResponses
    journal: Journal
    shipper: Shipper | None
    access_log: AccessLog
    recent: Recent
