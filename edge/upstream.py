"""Which endpoint: pools, how one of their endpoints is chosen, and what outlives a change of configuration."""

import asyncio
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from edge.balancing import affine, least_loaded, round_robin
from edge.config import EndpointConfig, Engine, PoolConfig, Url
from edge.errors import UpstreamUnavailable
from edge.health import Health, Verdict
from edge.notation import parse_url
from edge.wire import ConnectionPool, request_head

_MAX_INSTANCES: Final = 10_000  # instance endpoints kept; past it those without a request or connection are dropped
_MAX_OUT_SHARE: Final = 0.5  # of a pool's members: with more of them out, what is left would be crushed next
_MIN_RETRIES: Final = 3  # at once, whatever the budget: else a quiet pool could never retry (Envoy's default)


class Endpoint:
    """One address: its requests in flight, its health and its idle connections, shared by every pool that names it."""

    __slots__ = ("authority", "connections", "health", "in_flight", "url")

    def __init__(self, url: Url, connections: ConnectionPool) -> None:
        self.url = url
        self.authority = url.authority
        self.connections = connections
        self.health = Health()
        self.in_flight = 0

    def __repr__(self) -> str:
        state = self.health.describe(self.connections.loop.time())
        return f"<Endpoint {self.authority} {state}, {self.in_flight} in flight, {len(self.connections)} idle>"

    @property
    def is_used(self) -> bool:
        """Whether a request or an idle connection is there."""
        return bool(self.in_flight or len(self.connections))


@dataclass(slots=True)
class Member:
    """An endpoint's place in a pool, or alone as an instance; `credit` is the state of smooth weighted round-robin."""

    endpoint: Endpoint
    config: EndpointConfig
    engine: Engine = "vllm"
    credit: int = 0
    heads: dict[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tells it from the others of its pool, the same on every machine."""
        return self.endpoint.authority

    @property
    def weight(self) -> int:
        """Its share of the load."""
        return self.config.weight

    @property
    def load(self) -> int:
        """Its requests in flight, whichever pool they came through."""
        return self.endpoint.in_flight

    def head(self, operation: str) -> bytes:
        """Return the constant part of the head of a request.

        A path in the endpoint's URL takes the place of `/v1`. The engines serve `tokenize` and `detokenize` at their
        root; a hosted API (`engine = "openai"`) has all of its paths under its base.
        """
        head = self.heads.get(operation)
        if head is None:
            at_root = self.engine != "openai" and operation in ("tokenize", "detokenize")
            headers = [("Accept-Encoding", "identity")]  # a compressed stream could be neither metered nor flushed
            if self.config.api_key is not None:
                headers.append(("Authorization", f"Bearer {self.config.api_key}"))
            target = f"{'' if at_root else self.config.url.path or '/v1'}/{operation}"
            head = self.heads[operation] = request_head(target, self.endpoint.authority, headers)
        return head


class Lease:
    """One endpoint for one attempt; counted in flight while it is held."""

    __slots__ = ("endpoint", "member")

    def __init__(self, member: Member) -> None:
        self.member = member
        self.endpoint = member.endpoint

    def __enter__(self) -> Self:
        self.endpoint.in_flight += 1
        if self.endpoint.health.ejected_until:
            self.endpoint.health.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.endpoint.in_flight -= 1
        if self.endpoint.health.ejected_until:
            self.endpoint.health.abandon()

    def report(self, verdict: Verdict, retry_after_s: float | None = None) -> None:
        """Tell the endpoint's health what an attempt showed."""
        health = self.endpoint.health
        if verdict is Verdict.FINE:
            if health.is_tainted:
                health.fine()
            return
        now = self.endpoint.connections.loop.time()
        if verdict is Verdict.FAULT:
            health.fault(now)
        else:
            health.backpressure(now, retry_after_s)


class Pool:
    """Endpoints of which any can answer."""

    def __init__(self, config: PoolConfig, endpoints: Iterable[Endpoint]) -> None:
        self.config = config
        self.members = [Member(*pair, config.engine) for pair in zip(endpoints, config.endpoints, strict=True)]
        self.retrying = 0

    def __repr__(self) -> str:
        return f"<Pool {self.config.name} {self.members}>"

    def lease(self, tried: Iterable[Endpoint] = (), key: bytes = b"") -> Lease:
        """Return a lease of an endpoint that was not tried, where `prefix-affinity` sends `key`.

        Raises: `UpstreamUnavailable` when there is none.
        """
        members = self.members
        if len(members) > 1:
            members = self._admitted(tried)
            if tried:
                members = [member for member in members if member.endpoint not in tried]
        elif tried:
            members = []
        if not members:
            raise UpstreamUnavailable("The model's servers are not reachable right now.", retry_after_s=5)
        if len(members) == 1:
            member = members[0]
        elif self.config.balance == "round-robin":
            member = round_robin(members)
        elif self.config.balance == "prefix-affinity":
            member = affine(members, key)
        else:
            member = least_loaded(members)
        return Lease(member)

    def _admitted(self, tried: Iterable[Endpoint]) -> list[Member]:
        """Return the members that may be asked; so many that no more than a share of the pool is ever out."""
        members = self.members
        if not any(member.endpoint.health.is_tainted for member in members):
            return members
        now = members[0].endpoint.connections.loop.time()
        admitted = [member for member in members if member.endpoint.health.admits(now)]
        missing = len(members) - int(len(members) * _MAX_OUT_SHARE) - len(admitted)
        if missing > 0:
            out = [member for member in members if member not in admitted]
            out.sort(key=lambda member: (member.endpoint in tried, member.endpoint.health.back_at()))
            admitted += out[:missing]
        return admitted

    def may_retry(self) -> bool:
        """Say whether the budget allows one more retry at once."""
        live = sum(member.endpoint.in_flight for member in self.members)
        return self.retrying < max(_MIN_RETRIES, self.config.retry_budget * live)


def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Return the TLS settings towards upstreams: certificates and host names are always checked."""
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    return context


class Endpoints:
    """Every endpoint of the process, by scheme, address and TLS settings, so that a reload finds them as they were."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._members: dict[tuple[object, ...], Endpoint] = {}
        self._instances: dict[str, Member] = {}

    def member(self, url: Url, ca_file: Path | None) -> Endpoint:
        """Return the endpoint of a pool's address; raises `OSError` or `ssl.SSLError` for a bad `ca_file`."""
        key = (url.scheme, url.host, url.port, ca_file, ca_file.stat().st_mtime_ns if ca_file else None)
        endpoint = self._members.get(key)
        if endpoint is None:
            endpoint = self._members[key] = self._new(url, ca_file)
        return endpoint

    def instance(self, address: str) -> Lease:
        """Return a lease of the instance at a URL; raises `ValueError` when no such URL can be."""
        member = self._instances.get(address)
        if member is None:
            if len(self._instances) >= _MAX_INSTANCES:
                self._instances = {at: each for at, each in self._instances.items() if each.endpoint.is_used}
            url = parse_url(address)
            member = self._instances[address] = Member(self._new(url, None), EndpointConfig(url))
        return Lease(member)

    def _new(self, url: Url, ca_file: Path | None) -> Endpoint:
        tls = tls_context(ca_file) if url.scheme == "https" else None
        return Endpoint(url, ConnectionPool(url, tls, self._loop))

    def keep_only(self, pools: Iterable[Pool]) -> None:
        """Close the idle connections of endpoints that no pool names any more; requests in flight end as they will."""
        named = {member.endpoint for pool in pools for member in pool.members}
        for key, endpoint in list(self._members.items()):
            if endpoint not in named:
                endpoint.connections.close()
                del self._members[key]

    def close(self) -> None:
        """Close every idle connection."""
        for endpoint in self.states():
            endpoint.connections.close()

    def states(self) -> Iterator[Endpoint]:
        """Yield every endpoint, for the metrics."""
        yield from self._members.values()
        yield from (member.endpoint for member in self._instances.values())
