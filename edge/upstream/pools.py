"""Pools: which of several endpoints is asked, and who waits while all of them are full."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final

from edge.config.settings import EndpointConfig, PoolConfig
from edge.errors import LONGEST_RETRY_AFTER_S, ResponseNotFound, UpstreamUnavailable
from edge.upstream.balancing import least_loaded, round_robin
from edge.upstream.cache_aware import CacheAware
from edge.upstream.endpoints import Endpoint, Lease, Member
from edge.upstream.first_bytes import FirstBytes
from edge.upstream.prefixes import Prefix
from edge.upstream.queueing import DEMANDS_NOTHING, Demand, DrainRate, FairQueue, Turn

_MAX_OUT_SHARE: Final = 0.5  # of a pool's members: with more of them out, what is left would be crushed next
_MIN_RETRIES: Final = 3  # at once, whatever the budget: else a quiet pool could never retry (Envoy's default)
_POLL_S: Final = 0.25  # while somebody waits: nothing reports that a member is well again


@dataclass(slots=True, eq=False)
class _Place:
    """A request of a user that waits, with the prefix of its prompt."""

    granted: asyncio.Future[Lease]
    user: str
    prefix: Prefix | None


class Pool:
    """Endpoints of which any can answer; `before` is the pool of that name in the generation before."""

    def __init__(self, config: PoolConfig, endpoints: Iterable[Endpoint], before: "Pool | None" = None) -> None:
        self.config = config
        self.caches: CacheAware | None = None
        if config.balance == "cache-aware":
            known = before.caches if before is not None else None
            self.caches = known or CacheAware()
        self.hedges: Counter[str] = before.hedges if before is not None else Counter()  # by what became of them
        self.first_bytes: FirstBytes | None = None
        if config.hedge_after == "p95":
            self.first_bytes = (before.first_bytes if before is not None else None) or FirstBytes()
        self.members = [self._member(*pair) for pair in zip(endpoints, config.endpoints, strict=True)]
        self._forget_others()
        self.retrying = 0
        self.duplicates: dict[Lease, Callable[[], None]] = {}  # of a request that has another; what leaves it
        self.held = 0  # requests that wait for their limits
        self._waiting: FairQueue[_Place] = FairQueue()
        self._drain = DrainRate()
        self._poll: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Pool {self.config.name} {[member.endpoint for member in self.members]}>"

    def replace(self, endpoints: Iterable[Endpoint]) -> None:
        """Let the addresses of the name in `dns` be the members; requests at others end as they will."""
        assert self.config.dns is not None  # other pools have the members of their file
        known = {member.endpoint: member for member in self.members}
        config = EndpointConfig(self.config.dns)
        for member in self.members:
            member.endpoint.waiting.pop(self, None)
        self.members = [known.get(each) or self._member(each, config) for each in endpoints]
        self._forget_others()
        if self._waiting:
            for member in self.members:
                member.endpoint.waiting[self] = None
            self.grant()

    def _member(self, endpoint: Endpoint, config: EndpointConfig) -> Member:
        seat = self.caches.seat(endpoint) if self.caches is not None else None
        return Member(endpoint, config, self.config.engine, seat)

    def _forget_others(self) -> None:
        if self.caches is not None:
            self.caches.keep_only({member.endpoint for member in self.members})

    @property
    def reads_prompts(self) -> bool:
        """Whether what a prompt begins with matters for where it goes."""
        return self.caches is not None and len(self.members) > 1

    @property
    def hedge_after_s(self) -> float | None:
        """How long an answer may take to begin before a second endpoint is asked; None: for ever, or not known yet."""
        after = self.config.hedge_after
        return after if after != "p95" else self.first_bytes.p95_s if self.first_bytes is not None else None

    def stays(self, config: PoolConfig, endpoints: Iterable[Endpoint]) -> bool:
        """Return whether these settings and endpoints are the ones it has; those by DNS follow by themselves."""
        same = self.config is config or self.config == config
        return same and (config.dns is not None or [member.endpoint for member in self.members] == list(endpoints))

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    @property
    def has_room_to_wait(self) -> bool:
        """Whether one more request may wait for its limits; those that wait for a place have as much room, apart."""
        return self.held < self.config.queue

    def lease(self, tried: Iterable[Endpoint] = (), prefix: Prefix | None = None, user: str = "") -> Lease | None:
        """Return a lease of an endpoint that was not tried; None: all are full. `prefix` is that of the prompt, if any.

        Raises: `UpstreamUnavailable` when there is none.
        """
        members = self._candidates(tried, user)
        if self.config.max_inflight is not None:
            members = self._with_room(members)
            if members and self._waiting and not tried:  # nobody overtakes: those who may take the place come first
                self.grant()
                members = self._with_room(self._candidates(tried, user))
            if not members:
                members = self._left_by_duplicates(tried, user) if self.duplicates else []
            if not members:
                return None
        return self._lease(members, prefix, user)

    def _left_by_duplicates(self, tried: Iterable[Endpoint], user: str) -> list[Member]:
        """Return the member that a duplicate leaves for a request without a place, if any."""
        candidates = self._candidates(tried, user)
        for lease, leave in list(self.duplicates.items()):
            if lease.member in candidates:
                leave()
                if members := self._with_room(candidates):
                    return members
        return []

    def duplicate(self, lease: Lease, leave: Callable[[], None]) -> None:
        """Note that a request has a second lease, which takes budget; `leave` is called where another needs it."""
        self.retrying += 1
        self.duplicates[lease] = leave

    def no_duplicate(self, lease: Lease) -> None:
        """Note that a second lease is over, or is its request's only one."""
        if self.duplicates.pop(lease, None) is not None:
            self.retrying -= 1

    def spare(self, tried: Iterable[Endpoint], user: str = "") -> Lease | None:
        """Return a lease of an endpoint that is out but has room, the one that is back soonest; None for none."""
        members = self._with_room([member for member in self.members if member.endpoint not in tried])
        return Lease(min(members, key=lambda member: member.endpoint.health.back_at(user)), user) if members else None

    def beside(self, first: Endpoint, prefix: Prefix | None, user: str) -> Lease | None:
        """Return a lease of another endpoint than `first`, well and with room; None for none: it is one too many."""
        now = first.connections.loop.time()
        others = [
            member
            for member in self._with_room(self.members)
            if member.endpoint is not first and member.endpoint.health.is_well(now, user)
        ]
        return self._lease(others, prefix, user) if others else None

    def lease_of(self, name: str, user: str, prefix: Prefix | None = None) -> Lease:
        """Return a lease of the member of that name; raises `LookupError` for none, `UpstreamUnavailable` when full."""
        for member in self.members:
            if member.name == name:
                if not self._with_room([member]):
                    raise UpstreamUnavailable("The model's server is busy, try again later.", retry_after_s=1)
                return self._lease([member], prefix, user)
        raise LookupError(name)

    def lease_of_keeper(self, name: str, tried: Collection[Endpoint], user: str, prefix: Prefix | None) -> Lease:
        """Return a lease of the member that keeps a response; it alone is asked, and once.

        Raises: `ResponseNotFound` when it is not here any more, `UpstreamUnavailable`.
        """
        if tried:
            raise UpstreamUnavailable("The model's server that keeps this response is not reachable right now.")
        try:
            return self.lease_of(name, user, prefix)
        except LookupError:
            raise ResponseNotFound("The model's server that kept this response is not here any more.") from None

    def _candidates(self, tried: Iterable[Endpoint], user: str) -> list[Member]:
        members = self.members
        if len(members) > 1:
            members = self._admitted(tried, user)
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

    def _lease(self, members: list[Member], prefix: Prefix | None, user: str) -> Lease:
        if prefix is not None and self.caches is not None:
            member, ticket = self.caches.choose(members, prefix, time.monotonic())
            return Lease(member, user, ticket)
        if len(members) == 1:
            return Lease(members[0], user)
        choose = round_robin if self.config.balance == "round-robin" else least_loaded
        return Lease(choose(members), user)

    async def wait(self, user: str, prefix: Prefix | None = None, demand: Demand = DEMANDS_NOTHING) -> Lease:
        """Return a lease, counted already, as soon as an endpoint has room and it is the turn of `user`.

        Its `turn` is to be settled by what the request uses in the end.

        Raises: `UpstreamUnavailable` when too many wait, or this one has for too long.
        """
        loop = asyncio.get_running_loop()
        if self.waiting >= self.config.queue:
            raise self._busy(loop.time())
        place = _Place(loop.create_future(), user, prefix)
        if not self._waiting:
            self._drain.begin(loop.time())
            self._poll = loop.call_later(_POLL_S, self._poll_again)
            for member in self.members:
                member.endpoint.waiting[self] = None
        turn = self._waiting.push(user, place, demand)
        try:
            async with asyncio.timeout(self.config.queue_timeout_s):
                return await place.granted
        except TimeoutError:
            self._leave(turn)
            raise self._busy(loop.time()) from None
        except asyncio.CancelledError:
            self._leave(turn)
            raise

    def grant(self) -> None:
        """Give the places that are free to those whose turn it is."""
        while self._waiting:
            if not self._with_room(self._admitted(())):
                return
            now = self.members[0].endpoint.connections.loop.time()
            turn = self._waiting.pop(now, self._has_room)
            if turn is None:
                return
            place = turn.item
            if place.granted.done():  # its request was cancelled, and is about to leave
                turn.cancel()
                continue
            members = self._with_room(self._admitted((), place.user))
            lease = self._lease(members, place.prefix, place.user)
            lease.turn = turn
            lease.hold()
            place.granted.set_result(lease)
            self._drain.note(now)
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        for member in self.members:
            member.endpoint.waiting.pop(self, None)

    def _has_room(self, user: str) -> bool:
        return bool(self._with_room(self._admitted((), user)))

    def _poll_again(self) -> None:
        self._poll = asyncio.get_running_loop().call_later(_POLL_S, self._poll_again)
        self.grant()

    def _leave(self, turn: Turn[_Place]) -> None:
        """Take a request out that waits no more; a place it was given already goes to the next."""
        place = turn.item
        self._waiting.remove(turn)
        turn.cancel()
        if place.granted.done() and not place.granted.cancelled():
            with place.granted.result():
                pass
        self.grant()

    def _busy(self, now: float) -> UpstreamUnavailable:
        wait_s = min(math.ceil(self._drain.wait_s(self.waiting, now)), LONGEST_RETRY_AFTER_S)
        return UpstreamUnavailable("The model's servers are busy, try again later.", retry_after_s=max(wait_s, 1))

    def _admitted(self, tried: Iterable[Endpoint], user: str = "") -> list[Member]:
        """Return the members that a user may ask; so many that no more than a share of the pool is ever out."""
        members = self.members
        for member in members:
            if member.endpoint.health.is_tainted:
                break
        else:
            return members
        now = members[0].endpoint.connections.loop.time()
        admitted = [member for member in members if member.endpoint.health.admits(now, user)]
        missing = len(members) - int(len(members) * _MAX_OUT_SHARE) - len(admitted)
        if missing > 0:
            out = [member for member in members if member not in admitted]
            out.sort(key=lambda member: (member.endpoint in tried, member.endpoint.health.back_at(user)))
            admitted += out[:missing]
        return admitted

    def may_retry(self) -> bool:
        """Return whether the budget allows one more retry at once."""
        live = 1 + sum(member.endpoint.in_flight for member in self.members)  # it has no place while it asks
        return self.retrying < max(_MIN_RETRIES, self.config.retry_budget * live)
