"""`edge explain`: what a request would meet, the routes of the file, its keys and a name in, status and reason out.

What decides is what serves: `routing.py` finds the route, `keys/` judges the key, in the order of `proxy.py`.
The health of endpoints is not asked for: a pool that is down is no fault of the file.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass

import orjson

from edge.commands.arguments import add_config, add_json
from edge.config.delays import HEDGED_BYTES, Delay
from edge.config.kinds import settings_of
from edge.config.reading import load
from edge.config.settings import Config, LimitConfig, PoolConfig, RouteConfig
from edge.config.values import parse_url, write_size
from edge.config.values import write_duration as duration
from edge.envelope.json import read_json
from edge.errors import EdgeError, MisdirectedRequest, ModelNotFound, OutOfQuota, PermissionDenied, Unauthenticated
from edge.exchange import Principal
from edge.keys.caller import Caller
from edge.keys.stores.administration import UnknownKey
from edge.keys.stores.keyfile import KeyFileBlank
from edge.keys.stores.table import registry_of
from edge.names import host_matches
from edge.plan import decide, routes_at
from edge.resume.rules import THINKING
from edge.routing import Match, RouteTable, host_name, is_loopback
from edge.upstream.first_bytes import LEAST_SAMPLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `edge explain`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="the name that a client would ask for")
    add("--host", default="localhost", metavar="H", help="the Host asked; default: this machine's")
    add("--key-id", metavar="ID", help="a key of `edge keys list`; default: one that may")
    add_config(parser)
    add_json(parser)


def run(parsed: argparse.Namespace) -> int:
    """Print what a request would meet."""
    config = load(parsed.config)
    keys: list[Principal] = []
    if parsed.key_id is not None:
        with contextlib.suppress(KeyFileBlank, UnknownKey), registry_of(config.keys) as registry:
            found = registry.find(parsed.key_id)
            keys += [] if found.revoked else [found]
    explanation = explain(config, parsed.model, parsed.host, parsed.key_id, keys, time.time())
    print(explanation.as_json().decode() if parsed.json else explanation.render())
    return 0


@dataclass(frozen=True, slots=True)
class Target:
    """A server that may be asked: its URL, its share of the pool's load and the model's name it is asked for."""

    url: str
    weight: int
    model: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a request for `model` would meet.

    `status` is the edge's own answer, 200 when the request would go upstream; `route`, `pool` and `endpoints` are those
    of the route that wins, also when the key may not use it. `facts`, by name, are for people, and `routes` has every
    route by name and why it wins or loses.
    """

    model: str
    status: int
    reason: str
    route: str | None
    pool: str | None
    endpoints: tuple[Target, ...]
    facts: tuple[tuple[str, str], ...]
    routes: tuple[tuple[str, str], ...]

    def as_json(self) -> bytes:
        """Return the JSON object of `route, status, reason, pool, endpoints`, the endpoints being URLs."""
        return orjson.dumps(
            {
                "route": self.route,
                "status": self.status,
                "reason": self.reason,
                "pool": self.pool,
                "endpoints": [endpoint.url for endpoint in self.endpoints],
            }
        )

    def render(self) -> str:
        """Return the text for a person at a terminal."""
        facts = (("answer", f"{self.status}, {self.reason}"), *self.facts)
        lines = [self.model, *(f"  {name:<8} {value}" for name, value in facts)]
        width = max((len(endpoint.url) for endpoint in self.endpoints), default=0)
        lines += [
            f"  endpoint {each.url:<{width}}  weight {each.weight}  asked for {each.model}" for each in self.endpoints
        ]
        width = max(len(name) for name, _ in self.routes)
        return "\n".join([*lines, "routes", *(f"  {name:<{width}}  {why}" for name, why in self.routes)])


def explain(
    config: Config, model: str, authority: str, key_id: str | None, keys: Iterable[Principal], now: float
) -> Explanation:
    """Return what a request for `model` meets at the host of `authority`, a Host header, at the Unix time `now`.

    A loopback host stands for a call from this machine, which every `hosts` list matches. Without `key_id` the caller
    is one that may use the model; an id that is not among `keys` is an unknown key.
    """
    principal = next((each for each in keys if each.id == key_id), None)
    routes, host, loopback, match = RouteTable(config.routes), authority, False, None
    try:
        host = host_name(authority)
        loopback = is_loopback(host)
        match = routes.for_host(host, loopback).find(model)
        if principal is None and key_id is not None:
            raise Unauthenticated("no key has this id, or it was revoked")
        caller = Caller(principal) if principal is not None else None
        if caller is not None:
            caller.check_state(now)
        table = routes_at(routes, host, "unix")
        read_json(json.dumps({"model": model}).encode())
        status, reason = 200, _destination(decide(table, model, caller))
    except EdgeError as error:
        status, reason = error.status, _reason(error, host, model, match, principal, now)
    pool = config.pools.get(match.route.pool or "") if match else None
    facts = [("host", f"{host}, as from this machine: every hosts list lets it in" if loopback else host)]
    facts.append(("who", _who(model)))
    if key_id is not None:
        facts.append(("key", _key(key_id, principal)))
    if match is not None:
        facts += [("route", match.route.name), ("limits", _limits(config, match.route, principal))]
    if pool is not None:
        facts += _pool_settings(pool)
    return Explanation(
        model=model,
        status=status,
        reason=reason,
        route=match.route.name if match else None,
        pool=pool.name if pool else None,
        endpoints=_endpoints(config, match, model) if match else (),
        facts=tuple(facts),
        routes=_contest(config.routes, match, model, None if loopback else host),
    )


def _destination(match: Match) -> str:
    """Return where a request goes; raises `ModelNotFound` for a name that makes no URL of an instance."""
    if match.route.instance is None:
        return f"goes to the pool {match.route.pool}"
    url = match.filled(match.route.instance)
    try:
        parse_url(url)
    except ValueError as error:
        raise ModelNotFound(f"no instance can have this name: {error}") from None
    return f"goes to the instance at {url}"


def _reason(
    error: EdgeError, host: str, model: str, found: Match | None, principal: Principal | None, now: float
) -> str:
    """Return why a request is refused, for an operator: what a caller reads names no pattern and no state of a key."""
    match error:
        case Unauthenticated() | OutOfQuota() if principal is not None:
            return _state(principal, now)
        case MisdirectedRequest():
            return f"no route serves the host {host!r}"
        case PermissionDenied():
            return "a deny pattern of the key names this model"
        case ModelNotFound() if found is None:
            return "no route of this host has this name, or it is no owner/service in DNS labels"
        case ModelNotFound() if principal is not None and not Caller(principal).may_call(model):
            return "the key may not use this model: no allow pattern of it opens the name"
    return error.message


def _state(principal: Principal, now: float) -> str:
    if principal.has_expired(now):
        return "the key has expired"
    if not principal.enabled:
        return "the key is disabled"
    return f"the keys of {principal.user} are suspended" if principal.suspended else f"{principal.user} is out of quota"


def _key(key_id: str, principal: Principal | None) -> str:
    if principal is None:
        return f"{key_id}: unknown"
    patterns = f"allow {' '.join(principal.allow) or 'the default'}, deny {' '.join(principal.deny) or 'nothing'}"
    return f"{principal.id} of {principal.user}: {patterns}"


def _who(model: str) -> str:
    if Caller(Principal("", "")).may_call(model):
        return "every key, unless its allow and deny patterns say otherwise"
    owner, slash, _ = model.partition("/")
    if not slash:
        return "keys that an allow pattern opens it to"
    others = "name that user" if owner.startswith("u-") else "match it"
    return f"keys of {owner}, and keys whose allow patterns {others}"


def _endpoints(config: Config, match: Match, model: str) -> tuple[Target, ...]:
    route = match.route
    asked = match.filled(route.model) if route.model is not None else model
    if route.instance is not None:
        return (Target(match.filled(route.instance), 1, asked),)
    pool = config.pools[route.pool or ""]
    return tuple(Target(str(each.url), each.weight, each.model or asked) for each in pool.endpoints)


def _pool_settings(pool: PoolConfig) -> tuple[tuple[str, str], ...]:
    """Return what a pool does with a request, as far as its settings have an effect."""
    times = (
        f"connect {duration(pool.connect_timeout_s)}, first byte {duration(pool.first_byte_timeout_s)}, "
        f"idle {duration(pool.idle_timeout_s)}"
    )
    settings = [("pool", f"{pool.name}: {pool.balance}, {pool.engine}, {times}"), ("choice", _choice(pool))]
    settings.append(("health", _health(pool)))
    if pool.max_inflight is not None:
        waits = f"then {pool.queue} wait, for {duration(pool.queue_timeout_s)}" if pool.queue else "none waits"
        settings.append(("queue", f"{pool.max_inflight} requests at each endpoint, {waits}"))
    settings.append(("retries", _retries(pool)))
    if pool.hedge_after is not None:
        settings.append(("hedge", _hedge(pool, pool.hedge_after)))
    if pool.resume != "off":
        settings.append(("resume", _resume(pool)))
    return tuple(settings)


def _choice(pool: PoolConfig) -> str:
    """Return how one of the endpoints is chosen; what a request was chosen by is in its log line."""
    if pool.dns is None and len(pool.endpoints) == 1:
        return "none, it has one endpoint"
    match pool.balance:
        case "cache-aware":
            of = "of all users" if pool.share_prefixes else "of the same user"
            score = "(bytes not cached + backlog + 1024) x (answers under way + 8) / weight"
            return f"the lowest {score}, by what prompts {of} went where; `choice` in the log line has each"
        case "round-robin":
            return "each in turn, by weight"
        case _:
            return "of two that are drawn by weight, the one with fewer requests for its weight"


def _health(pool: PoolConfig) -> str:
    if pool.health is None:
        return "not probed, judged by its answers"
    return f"probed every {duration(pool.health.interval_s)} at {pool.health.path or 'the path of its engine'}"


def _retries(pool: PoolConfig) -> str:
    if pool.dns is None and len(pool.endpoints) == 1:
        return "none, it has one endpoint"
    failures = ["a refused connection"]
    if pool.retry_within_s:
        within = f"within {duration(pool.retry_within_s)}"
        failures.append(f"a 429, 502, 503, 504 or 529, or a refusal of the edge itself, {within}")
    if pool.retry_after_send:
        failures.append("a connection that died with the request on it")
    return f"after {', '.join(failures)}; a share of {pool.retry_budget:g} at once, three always"


def _hedge(pool: PoolConfig, after: Delay) -> str:
    """Return when a second endpoint is asked; the word in the log line is what became of it."""
    if pool.dns is None and len(pool.endpoints) == 1:
        return "none, it has one endpoint"
    time = f"the p95 of the pool, once {LEAST_SAMPLES} are measured" if after == "p95" else duration(after)
    which = f"a stream of chat/completions, completions or messages, asked with up to {write_size(HEDGED_BYTES)}"
    return f"{which}, is asked of a second endpoint after {time}; within the retries, while none waits in the queue"


def _resume(pool: PoolConfig) -> str:
    """Return what becomes of a stream whose server dies; the word in its log line is why one does not go on."""
    if pool.dns is None and len(pool.endpoints) == 1:
        return "none, it has one endpoint"
    again = f"asked again at temperature 0 or with a seed, up to {pool.resume_at_most} tokens"
    thoughts = "" if pool.engine not in THINKING else ", or within and behind thoughts of DeepSeek-R1"
    on = f"gone on with behind its text{thoughts}"
    ways = {"replay": again, "content": on, "auto": f"{on}, or {again}"}
    which = f"a stream of chat/completions or completions, of up to {write_size(pool.resume_memory_bytes)}"
    return f"{which}, is {ways[pool.resume]}; docs/resume.md has what is refused"


def _limits(config: Config, route: RouteConfig, principal: Principal | None) -> str:
    """Return the limits that count a request of this route and key, the route's and then the key's."""
    if route.instance is not None:
        return "none, as for every instance"
    names = dict.fromkeys((route.limit, principal.limit if principal is not None else None))
    limits = [f"{name}: {_described(config.limits.get(name))}" for name in names if name is not None]
    return "; ".join(limits) or "none"


def _described(limit: LimitConfig | None) -> str:
    if limit is None:
        return "not in the file, so none"
    values = ((setting, getattr(limit, setting.field)) for setting in settings_of(LimitConfig))
    shown = ((each, value) for each, value in values if value != each.default or each.key == "per")
    return ", ".join(each.key if value is True else f"{each.key} {each.write(value)}" for each, value in shown)


def _contest(
    routes: Iterable[RouteConfig], match: Match | None, model: str, host: str | None
) -> tuple[tuple[str, str], ...]:
    """Return every route and why it wins or loses, first those whose pattern fits; no `host` lets every list match."""
    winner = match.route if match else None
    verdicts = []
    for route in routes:
        fits = route.pattern == model or (route.pattern.endswith("*") and model.startswith(route.pattern[:-1]))
        verdicts.append((route is not winner, not fits, route.name, _standing(route, winner, fits, model, host)))
    return tuple((name, why) for *_, name, why in sorted(verdicts, key=lambda verdict: verdict[:2]))


def _standing(route: RouteConfig, winner: RouteConfig | None, fits: bool, model: str, host: str | None) -> str:
    if route is winner:
        return "wins"
    if host is not None and not host_matches(route.hosts, host):
        return f"not at this host: hosts are {', '.join(route.hosts)}"
    if not fits:
        return "another name" if route.pattern == route.name else f"another name: {route.pattern}"
    if winner is None:
        alone = RouteTable((route,)).for_host("", loopback=True).find(model)
        return "behind the route that decides" if alone else "needs an owner/service in DNS labels"
    if winner.pattern == route.pattern:
        return "later in the file than the one that wins"
    return "an exact name goes first" if winner.pattern == model else "a longer prefix goes first"
