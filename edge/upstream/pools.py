"""Which endpoint: pools, how one of their endpoints is chosen, and what outlives a change of configuration."""

import asyncio
import logging
import math
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from edge.config.settings import EndpointConfig, Engine, PoolConfig, Url
from edge.config.values import parse_url
from edge.errors import UpstreamUnavailable
from edge.upstream.balancing import affine, least_loaded, round_robin
from edge.upstream.health import Health, Verdict
from edge.upstream.queueing import DrainRate, FairQueue
from edge.wire.connections import ConnectionPool, Shortage
from edge.wire.http1 import request_head

_log = logging.getLogger(__name__)

_MAX_INSTANCES: Final = 10_000  # instance endpoints kept; past it those without a request or connection are dropped
_MAX_OUT_SHARE: Final = 0.5  # of a pool's members: with more of them out, what is left would be crushed next
_MIN_RETRIES: Final = 3  # at once, whatever the budget: else a quiet pool could never retry (Envoy's default)
_LOOK_S: Final = 0.25  # while somebody waits: a member that is well again tells nobody
_LONGEST_RETRY_AFTER_S: Final = 60
_TELL_S: Final = 60.0  # between two lines that an endpoint is out: one that fails now and then floods no log


class Endpoint:
    """One address: its requests in flight, its health and its idle connections, shared by every pool that names it.

    `is_instance` is one that belongs to no pool.
    """

    __slots__ = (
        "_tell_at", "_told_out", "authority", "connections", "health", "in_flight", "is_instance", "url", "waiting",
    )  # fmt: skip

    def __init__(self, url: Url, connections: ConnectionPool, *, is_instance: bool = False) -> None:
        self.url = url
        self.authority = url.authority
        self.connections = connections
        self.health = Health()
        self.in_flight = 0
        self.waiting: dict[Pool, None] = {}  # where requests wait for a place here, first come first
        self.is_instance = is_instance
        self._told_out = False
        self._tell_at = -math.inf

    def __repr__(self) -> str:
        state = self.health.describe(self.connections.loop.time())
        return f"<Endpoint {self.authority} {state}, {self.in_flight} in flight, {len(self.connections)} idle>"

    @property
    def is_used(self) -> bool:
        """Whether a request or an idle connection is there."""
        return bool(self.in_flight or len(self.connections))

    def tell(self, now: float) -> None:
        """Log that its answers took it out, or that it is back; nothing of an instance, which is asked all the same."""
        ejected_until = self.health.ejected_until
        if self.is_instance:
            return
        left_s = ejected_until - now
        if left_s > 0 and not self._told_out and now >= self._tell_at:
            self._told_out, self._tell_at = True, now + _TELL_S
            _log.warning("endpoint %s failed several times in a row: ejected for %.0f s", self.authority, left_s)
        elif self._told_out and not ejected_until:
            self._told_out = False
            _log.info("endpoint %s answers again", self.authority)


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
            head = self.heads[operation] = request_head(target, self.config.url.authority, headers)
        return head


class Lease:
    """One endpoint for one attempt; counted in flight while it is held."""

    __slots__ = ("_era", "endpoint", "member")

    def __init__(self, member: Member) -> None:
        self.member = member
        self.endpoint = member.endpoint
        self._era = -1  # of the endpoint's health; -1 until it is held

    def hold(self) -> None:
        """Count it from now on, before it is entered: a place that is given to somebody who is not awake yet."""
        endpoint = self.endpoint
        endpoint.in_flight += 1
        self._era = endpoint.health.begin()

    def __enter__(self) -> Self:
        if self._era < 0:
            self.hold()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        endpoint = self.endpoint
        endpoint.in_flight -= 1
        if endpoint.health.ejected_until:
            endpoint.health.abandon(self._era)
        if endpoint.waiting:
            for pool in tuple(endpoint.waiting):
                pool.grant()

    def report(self, verdict: Verdict, retry_after_s: float | None = None) -> None:
        """Tell the endpoint's health what an attempt showed."""
        health = self.endpoint.health
        if verdict is Verdict.FINE and not health.is_tainted:
            return
        now = self.endpoint.connections.loop.time()
        if verdict is Verdict.FINE:
            health.fine(now, self._era)
        elif verdict is Verdict.FAULT:
            health.fault(now, self._era)
        else:
            health.backpressure(now, retry_after_s, self._era)
        self.endpoint.tell(now)


@dataclass(slots=True, eq=False)
class _Place:
    """A request that waits; `key` is where `prefix-affinity` sends it."""

    granted: asyncio.Future[Lease]
    key: bytes


class Pool:
    """Endpoints of which any can answer."""

    def __init__(self, config: PoolConfig, endpoints: Iterable[Endpoint]) -> None:
        self.config = config
        self.members = [Member(*pair, config.engine) for pair in zip(endpoints, config.endpoints, strict=True)]
        self.retrying = 0
        self._waiting: FairQueue[_Place] = FairQueue()
        self._drain = DrainRate()
        self._look: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Pool {self.config.name} {self.members}>"

    def replace(self, endpoints: Iterable[Endpoint]) -> None:
        """Let the addresses of the name in `dns` be the members; requests at others end as they will."""
        assert self.config.dns is not None  # other pools have the members of their file
        known = {member.endpoint: member for member in self.members}
        config = EndpointConfig(self.config.dns)
        for member in self.members:
            member.endpoint.waiting.pop(self, None)
        self.members = [known.get(each) or Member(each, config, self.config.engine) for each in endpoints]
        if self._waiting:
            for member in self.members:
                member.endpoint.waiting[self] = None
            self.grant()

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    def lease(self, tried: Iterable[Endpoint] = (), key: bytes = b"") -> Lease | None:
        """Return a lease of an endpoint that was not tried, where `prefix-affinity` sends `key`; None: all are full.

        Raises: `UpstreamUnavailable` when there is none.
        """
        members = self._candidates(tried)
        if self.config.max_inflight is not None:
            members = self._with_room(members)
            if not members or (self._waiting and not tried):  # nobody overtakes
                return None
        return Lease(self._choose(members, key))

    def _candidates(self, tried: Iterable[Endpoint]) -> list[Member]:
        members = self.members
        if len(members) > 1:
            members = self._admitted(tried)
            if tried:
                members = [member for member in members if member.endpoint not in tried]
        elif tried:
            members = []
        if not members:
            raise UpstreamUnavailable("The model's servers are not reachable right now.", retry_after_s=5)
        return members

    def _with_room(self, members: list[Member]) -> list[Member]:
        most = self.config.max_inflight
        return [member for member in members if most is None or member.load < most]

    def _choose(self, members: list[Member], key: bytes) -> Member:
        if len(members) == 1:
            return members[0]
        if self.config.balance == "round-robin":
            return round_robin(members)
        if self.config.balance == "prefix-affinity":
            return affine(members, key)
        return least_loaded(members)

    async def wait(self, user: str, key: bytes = b"") -> Lease:
        """Return a lease, counted already, as soon as an endpoint has room and it is the turn of `user`.

        Raises: `UpstreamUnavailable` when too many wait, or this one has for too long.
        """
        loop = asyncio.get_running_loop()
        if len(self._waiting) >= self.config.queue:
            raise self._busy(loop.time())
        place = _Place(loop.create_future(), key)
        if not self._waiting:
            self._drain.begin(loop.time())
            self._look = loop.call_later(_LOOK_S, self._look_again)
            for member in self.members:
                member.endpoint.waiting[self] = None
        self._waiting.push(user, place)
        try:
            async with asyncio.timeout(self.config.queue_timeout_s):
                return await place.granted
        except TimeoutError:
            self._leave(place)
            raise self._busy(loop.time()) from None
        except asyncio.CancelledError:
            self._leave(place)
            raise

    def grant(self) -> None:
        """Give the places that are free to those whose turn it is."""
        while self._waiting:
            members = self._with_room(self._admitted(()))
            if not members:
                return
            place = self._waiting.pop()
            if not place.granted.done():  # its request was cancelled, and is about to leave
                lease = Lease(self._choose(members, place.key))
                lease.hold()
                place.granted.set_result(lease)
                self._drain.note(place.granted.get_loop().time())
        if self._look is not None:
            self._look.cancel()
            self._look = None
        for member in self.members:
            member.endpoint.waiting.pop(self, None)

    def _look_again(self) -> None:
        self._look = asyncio.get_running_loop().call_later(_LOOK_S, self._look_again)
        self.grant()

    def _leave(self, place: _Place) -> None:
        """Take a request out that waits no more; a place it was given already goes to the next."""
        self._waiting.remove(place)
        if place.granted.done() and not place.granted.cancelled():
            with place.granted.result():
                pass
        self.grant()

    def _busy(self, now: float) -> UpstreamUnavailable:
        wait_s = min(math.ceil(self._drain.wait_s(len(self._waiting), now)), _LONGEST_RETRY_AFTER_S)
        return UpstreamUnavailable("The model's servers are busy, try again later.", retry_after_s=max(wait_s, 1))

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
        self._tls: dict[tuple[Path | None, int], ssl.SSLContext] = {}  # one takes 20 ms and 0.8 MB
        self._instances: dict[str, Member] = {}
        self._shortage = Shortage(lambda: [endpoint.connections for endpoint in self.states()])

    def member(self, url: Url, ca_file: Path | None) -> Endpoint:
        """Return the endpoint of a pool's address; raises `OSError` or `ssl.SSLError` for a bad `ca_file`."""
        changed_ns = ca_file.stat().st_mtime_ns if ca_file else 0
        key = (url.scheme, url.host, url.port, ca_file, changed_ns)
        endpoint = self._members.get(key)
        if endpoint is None:
            endpoint = self._members[key] = self._new(url, ca_file, changed_ns)
        return endpoint

    def instance(self, address: str) -> Lease:
        """Return a lease of the instance at a URL; raises `ValueError` when no such URL can be."""
        member = self._instances.get(address)
        if member is None:
            if len(self._instances) >= _MAX_INSTANCES:
                self._instances = {at: each for at, each in self._instances.items() if each.endpoint.is_used}
            url = parse_url(address)
            member = self._instances[address] = Member(self._new(url, is_instance=True), EndpointConfig(url))
        return Lease(member)

    def _new(
        self, url: Url, ca_file: Path | None = None, changed_ns: int = 0, *, is_instance: bool = False
    ) -> Endpoint:
        tls = self._tls_for(ca_file, changed_ns) if url.scheme == "https" else None
        return Endpoint(url, ConnectionPool(url, tls, self._loop, self._shortage), is_instance=is_instance)

    def _tls_for(self, ca_file: Path | None, changed_ns: int) -> ssl.SSLContext:
        state = (ca_file, changed_ns)
        context = self._tls.get(state)
        if context is None:
            self._tls = {known: each for known, each in self._tls.items() if known[0] != ca_file}
            context = self._tls[state] = tls_context(ca_file)
        return context

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
