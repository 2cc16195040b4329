"""The state of a process as one document: what `/status.json`, its page and `edge status` show.

It holds no key, no digest and no prompt. It is made in steps and bounded: of thousands of routes, pools and endpoints
the busiest and those in trouble are shown, and how many more there are.
"""

import asyncio
import heapq
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

from edge.generation import Generation
from edge.limits.nearest import Nearness, find_nearest
from edge.process.parts import Parts, outages
from edge.process.troubles import find_troubles
from edge.tasks import in_steps
from edge.telemetry.recent import MINUTE_S, Failure, Traffic
from edge.upstream.endpoints import Endpoint, Fault, Member
from edge.upstream.health import HEALTHY
from edge.upstream.pools import Pool

Document = dict[str, Any]

_MOST_ROUTES: Final = 50
_MOST_POOLS: Final = 50
_MOST_MEMBERS: Final = 20  # of a pool
_MOST_LIMITS: Final = 10
_LIMITS_AGE_S: Final = 5.0  # a look at a hundred thousand counters takes a tenth of a second, in steps
_A_STEP: Final = 10  # pools or routes
_MOST_REASONS: Final = 3
_MOST_TEXT: Final = 200  # of what an upstream said


class Snapshots:
    """Makes the document of a process; `clock` is that of `Exchange.finished`."""

    def __init__(self, parts: Parts, clock: Callable[[], float] = time.monotonic) -> None:
        self._parts = parts
        self._clock = clock
        self._started_at = time.time()
        self._version = version("edge")
        self._nearest: list[Nearness] = []
        self._nearest_at = -_LIMITS_AGE_S

    async def take(self) -> Document:
        """Return the state of now."""
        parts, generation = self._parts, self._parts.proxy.generation
        routes: dict[str, Traffic] = {}
        endpoints: dict[str, Traffic] = {}
        recent = parts.metrics.recent
        await in_steps(parts.metrics.count())
        await in_steps(recent.minute(routes, endpoints, self._clock()))
        await self._look_at_limits()
        total = Traffic()
        await in_steps(_add_up(routes, total))
        shown_routes, shown_pools = _Shown(_MOST_ROUTES), _Shown(_MOST_POOLS)
        await in_steps(_find_routes(generation, routes, shown_routes))
        await in_steps(self._find_pools(generation, endpoints, shown_pools))
        failures = [_failure(each) for each in reversed(recent.failures)]
        best_routes, best_pools = shown_routes.best(), shown_pools.best()
        await asyncio.sleep(0)
        status = {
            "version": self._version,
            "pid": os.getpid(),
            "time": time.time(),
            "started_at": self._started_at,
            "ready": parts.readiness.ready,
            "stage": parts.readiness.lifecycle.stage.name.lower(),
            "config": self._config(generation),
            "now": self._now(),
            "minute": _traffic(total),
            "routes": best_routes,
            "routes_more": shown_routes.more,
            "pools": best_pools,
            "pools_more": shown_pools.more,
            "limits": [each._asdict() for each in self._nearest],
            "parts": list(_parts(parts)),
            "certificates": [each._asdict() for each in parts.certificates.known],
            "failures": failures,
        }
        return status | {"troubles": find_troubles(status)}

    def _config(self, generation: Generation) -> Document:
        readiness = self._parts.readiness
        return {
            "generation": generation.number,
            "sha256": generation.config.digest,
            "loaded_at": generation.loaded_at,
            "reload_failures": readiness.reload_failures,
            "last_reload_error": readiness.reload_failed,
            "warnings": [f"line {each.line}: {each}" for each in generation.config.warnings[:_MOST_LIMITS]],
        }

    def _now(self) -> Document:
        parts = self._parts
        return {
            "in_flight": parts.proxy.in_flight,
            "connections": parts.clients.open_connections,
            "max_connections": parts.clients.max_connections,
            "body_bytes": parts.memory.used_bytes,
            "max_body_bytes": parts.memory.limit_bytes,
            "clock_step_s": round(parts.loop_lag.clock_step_s, 1),
        }

    async def _look_at_limits(self) -> None:
        now = self._clock()
        if now - self._nearest_at >= _LIMITS_AGE_S:
            self._nearest_at = now
            found: list[Nearness] = []
            await in_steps(find_nearest(self._parts.admission, _MOST_LIMITS, found))
            self._nearest = found

    def _find_pools(self, generation: Generation, traffic: Mapping[str, Traffic], shown: "_Shown") -> Iterator[None]:
        loop_s = asyncio.get_running_loop().time()
        unix_s = time.time() - loop_s
        for number, (name, pool) in enumerate(list(generation.pools.items()), 1):
            members = _Shown(_MOST_MEMBERS)
            for member in pool.members:
                document, trouble = _member(member, pool, traffic, loop_s, unix_s)
                members.add(trouble, document)
            out = sum(not member.endpoint.health.admits(loop_s) for member in pool.members)
            in_flight = sum(member.load for member in pool.members)
            shown.add((out > 0, pool.waiting, in_flight), _pool(name, pool, out, in_flight, members))
            if number % _A_STEP == 0:
                yield


class _Shown:
    """The documents of highest rank, in the order of the file."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._heap: list[tuple[Any, int, Document]] = []

    def add(self, rank: object, document: Document) -> None:
        entry = (rank, -self._count, document)
        self._count += 1
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def best(self) -> list[Document]:
        return [document for _, _, document in sorted(self._heap, key=lambda entry: -entry[1])]

    @property
    def more(self) -> int:
        """How many are not shown."""
        return self._count - len(self._heap)


def _find_routes(generation: Generation, traffic: Mapping[str, Traffic], shown: _Shown) -> Iterator[None]:
    """Find the routes with the most requests; what matched none comes last, where there was any."""
    known = [(route.name, route.pool or "an instance", route.limit or "") for route in generation.config.routes]
    names = {name for name, _, _ in known}
    known += [(name, "", "") for name in traffic if name not in names]
    for number, (name, pool, limit) in enumerate(known, 1):
        of_route = traffic.get(name)
        count = sum(of_route.requests) if of_route is not None else 0
        document = {"name": name or "(no route)", "pool": pool, "limit": limit, **_traffic(of_route or _NO_TRAFFIC)}
        if of_route is not None:
            document["series"] = _series(of_route)
        shown.add(count, document)
        if number % _A_STEP == 0:
            yield


_NO_TRAFFIC: Final = Traffic()


def _traffic(traffic: Traffic) -> Document:
    """Return the numbers of a minute; what takes no time to the first byte has none."""
    return {
        "requests": sum(traffic.requests),
        "failed": traffic.failed,
        "refused": traffic.refused,
        "ttft_p50_ms": _ms(traffic.first_byte_quantile_s(0.5)),
        "ttft_p95_ms": _ms(traffic.first_byte_quantile_s(0.95)),
        "tokens_per_s": round(sum(traffic.tokens) / MINUTE_S, 1),
    }


def _series(traffic: Traffic) -> Document:
    """Return a number a second of the last minute, the latest last."""
    return {
        "requests": traffic.requests,
        "tokens": traffic.tokens,
        "ttft_ms": [_ms(each) for each in traffic.first_byte_s],
    }


def _add_up(routes: Mapping[str, Traffic], total: Traffic) -> Iterator[None]:
    """Add the traffic of all routes up, in steps."""
    for number, each in enumerate(list(routes.values()), 1):
        total.requests = [a + b for a, b in zip(total.requests, each.requests, strict=True)]
        total.tokens = [a + b for a, b in zip(total.tokens, each.tokens, strict=True)]
        total.failed += each.failed
        total.refused += each.refused
        total.times_s += each.times_s
        if number % _A_STEP == 0:
            yield


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def _pool(name: str, pool: Pool, out: int, in_flight: int, members: _Shown) -> Document:
    return {
        "name": name,
        "engine": pool.config.engine,
        "balance": pool.config.balance,
        "dns": pool.config.dns.authority if pool.config.dns is not None else None,
        "waiting": pool.waiting,
        "queue": pool.config.queue,
        "in_flight": in_flight,
        "out": out,
        "members_count": len(pool.members),
        "members": members.best(),
        "members_more": members.more,
    }


def _member(
    member: Member, pool: Pool, traffic: Mapping[str, Traffic], loop_s: float, unix_s: float
) -> tuple[Document, object]:
    """Return what is known of a member, and how much trouble it is."""
    endpoint = member.endpoint
    of_member = traffic.get(endpoint.authority, _NO_TRAFFIC)
    faults = [each for each in endpoint.faults or () if each.at > loop_s - MINUTE_S]
    state, back_in_s = _state(endpoint, loop_s)
    document = {
        "endpoint": endpoint.authority,
        "state": state,
        "why": _why(endpoint, state, faults),
        "since": endpoint.health.since + unix_s if endpoint.health.since else None,
        "back_in_s": back_in_s,
        "in_flight": endpoint.in_flight,
        "max_in_flight": pool.config.max_inflight,
        "idle_connections": len(endpoint.connections),
        "requests": sum(of_member.requests),
        "errors": len(faults),
        "last_request_id": faults[-1].request_id if faults else "",
        "ttft_p50_ms": _ms(of_member.first_byte_quantile_s(0.5)),
        "ttft_p95_ms": _ms(of_member.first_byte_quantile_s(0.95)),
    }
    return document, (state != HEALTHY, len(faults), endpoint.in_flight)


def _state(endpoint: Endpoint, loop_s: float) -> tuple[str, float | None]:
    """Return the state in a word or two, and the seconds until it is tried again."""
    left_s, state = endpoint.health.ejected_until - loop_s, endpoint.health.state(loop_s)
    return state, round(left_s, 1) if state == "ejected" else None


def _why(endpoint: Endpoint, state: str, faults: Sequence[Fault]) -> str:
    """Return what attempts of the last minute met, the most frequent first; of one that is out, what the last did."""
    if not faults and state != HEALTHY and endpoint.faults:
        return endpoint.faults[-1].what
    counts = Counter(each.what for each in faults).most_common(_MOST_REASONS)
    return ", ".join(f"{what} ({count} times)" if count > 1 else what for what, count in counts)


def _parts(parts: Parts) -> Iterator[Document]:
    """Yield what the process needs beside upstreams, whether it is there, and some facts of it."""
    counts, journal, shipper = parts.authenticator.counts, parts.journal, parts.shipper
    facts: dict[str, dict[str, float]] = {
        "key store": {"lookups": counts.misses, "failures": counts.failures, "declined": counts.declined},
        "responses": {"known": parts.kept_responses.known_count},
        "journal": {
            "opened": journal.records_open, "closed": journal.records_closed, "waiting": journal.lines_waiting,
            "write_errors": journal.write_errors,
        },
    }  # fmt: skip
    if parts.tokens is not None:
        facts["token keys"] = {"keys": parts.tokens.key_count}
    if shipper is not None:
        facts["sink"] = {"shipped": shipper.shipped, "lag_bytes": shipper.lag_bytes, "lag_s": round(shipper.lag_s, 1)}
    yield _part("key cache", "", hits=counts.hits, unknown=counts.negative_hits, stale=counts.stale)
    yield _part("access log", "", dropped=parts.access_log.dropped)
    for name, reason in outages(parts):
        if reason or not name.startswith("dns "):  # of which there may be thousands
            yield _part(name, reason, **facts.get(name, {}))


def _part(name: str, reason: str, **facts: float) -> Document:
    return {"name": name, "up": not reason, "why": reason, "facts": facts}


def _failure(failure: Failure) -> Document:
    return failure._asdict() | {"upstream_error": failure.upstream_error[:_MOST_TEXT]}
