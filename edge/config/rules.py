"""What settings mean together: each rule notes, with its line, what a table or two of them cannot mean."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final
from urllib.parse import urlsplit

from edge.config import process_settings, settings
from edge.config.kinds import settings_of
from edge.config.problems import dotted
from edge.config.redis_urls import SCHEMES, parse_redis
from edge.config.steering import STEERING
from edge.config.tables import Reader, Table
from edge.names import (
    PLACEHOLDERS,
    HostIndex,
    check_model_name,
    exclusion_of,
    fill,
    hosts_overlap,
    is_instance_name,
    is_metadata_address,
    named_hosts,
)

_SHORTEST_TOKEN: Final = 16
_TAKES_CREDENTIALS: Final = ("http", "https")  # as settings; in the URL of a Redis they have a place
_IS_TLS: Final = ("https", *(scheme for scheme in SCHEMES if scheme.startswith("rediss")))
# What a route has for its instances, and a pool for itself.
_OF_INSTANCES: Final = {each.key for each in settings_of(settings.RouteConfig)} & {
    each.key for each in settings_of(settings.PoolConfig)
}

_OF_THIS_MACHINE: Final = frozenset({"localhost", "127.0.0.1", "0.0.0.0", "::1", "::"})


def check_server(server: process_settings.ServerConfig, table: Table) -> None:
    """Refuse two listeners on one address, memory in which no body fits, and a token that is no secret."""
    if any(server.admin.collides(address) for address in server.listen):
        table.problem("admin", 'is an address of listen too: write another port, such as "127.0.0.1:9090"')
    if server.body_memory_bytes < server.max_body_bytes and table.is_given("body_memory"):
        table.problem("body_memory", "is less than max_body, so such a body would never fit: write at least as much")
    if server.admin_token is not None and len(server.admin_token) < _SHORTEST_TOKEN:
        message = f"has less than {_SHORTEST_TOKEN} characters, and may be guessed: write what `openssl rand -hex 32` "
        table.problem(_as_given(table, "admin_token"), message + "prints")


def fit_server(server: process_settings.ServerConfig) -> process_settings.ServerConfig:
    """Return the server with memory for one body at least, as a file may state only a large body."""
    return replace(server, body_memory_bytes=max(server.body_memory_bytes, server.max_body_bytes))


def check_keys(keys: process_settings.KeysConfig, table: Table) -> None:
    """Refuse settings that the key store has no use for, and half a pair."""
    if not table.is_sound("store"):  # what is wrong itself is not measured by
        return
    _warn_of_metadata(table, ("store",), keys.store.url)
    scheme = keys.store.scheme
    for name in ("store_token", "store_client_id", "store_client_secret", "store_ca_file"):
        used_with = _IS_TLS if name == "store_ca_file" else _TAKES_CREDENTIALS
        _refuse_unused(table, name, getattr(keys, name), scheme in used_with, f"for a store at {scheme}")
    if keys.store_token is not None and keys.store_client_id is not None:
        table.problem(_as_given(table, "store_token"), "store_client_id is given too: remove one of the two")
    elif (keys.store_client_id is None) != (keys.store_client_secret is None):
        name = "store_client_secret" if keys.store_client_id is None else "store_client_id"
        message = "store_client_id and store_client_secret belong together: write both, or remove it"
        table.problem(_as_given(table, name), message)


def check_jwt(jwt: process_settings.JwtConfig, table: Table) -> None:
    """Refuse a table that lacks one of the three settings without which no token can be judged."""
    for setting in settings_of(process_settings.JwtConfig):
        key = setting.key
        if setting.is_required and not getattr(jwt, setting.field) and table.is_sound(key):
            table.reader.problem(table.at, f'{key} is missing: write {key} = "{setting.example}"')
    _warn_of_metadata(table, ("jwks",), str(jwt.jwks or ""))
    if jwt.ca_file is not None and jwt.jwks and not str(jwt.jwks).startswith("https:"):
        table.problem("ca_file", "does nothing without a jwks at https: remove it")


def check_usage(usage: process_settings.UsageConfig, table: Table) -> None:
    """Refuse settings that the sink has no use for."""
    if table.is_sound("sink"):
        _warn_of_metadata(table, ("sink",), usage.sink)
        scheme = usage.sink.partition(":")[0] or "no sink"
        _refuse_unused(table, "keep", usage.keep_s, bool(usage.sink), "without a sink")
        _refuse_unused(table, "sink_token", usage.sink_token, scheme in _TAKES_CREDENTIALS, f"with {scheme}")
        _refuse_unused(table, "sink_ca_file", usage.sink_ca_file, scheme in _IS_TLS, f"with {scheme}")
        _refuse_unused(table, "sink_replicas", usage.sink_replicas, scheme in SCHEMES, f"with {scheme}")


def check_shared(shared: process_settings.SharedConfig, table: Table) -> None:
    """Warn of a place that no Redis is at, and refuse an authority that nothing is proved by."""
    if table.is_sound("redis"):
        _warn_of_metadata(table, ("redis",), shared.redis)
        scheme = shared.redis.partition(":")[0] or "no redis"
        _refuse_unused(table, "redis_ca_file", shared.redis_ca_file, scheme in _IS_TLS, f"with {scheme}")


def _warn_of_metadata(table: Table, key: tuple[str | int, ...], url: str) -> None:
    """Warn of a URL in whose place clouds give a machine's credentials to whoever asks from it."""
    try:
        is_redis = url.startswith("redis")
        hosts = [host for host, _ in parse_redis(url).hosts] if is_redis else [urlsplit(url).hostname or ""]
    except ValueError:  # which is told elsewhere
        return
    for host in hosts:
        _warn_of_address(table, key, host)


def _warn_of_address(table: Table, key: tuple[str | int, ...], host: str) -> None:
    if is_metadata_address(host):
        what = f"{host} is an address at which clouds keep the credentials of a machine"
        table.reader.warn((*table.at, *key), f"{what}: write the server's own address")


def _refuse_unused(table: Table, name: str, value: object, is_used: bool, what: str) -> None:
    """Refuse a setting that is given and does nothing; `what` names what it does nothing with."""
    if value is not None and not is_used:
        table.problem(_as_given(table, name), f"does nothing {what}: remove it")


def _as_given(table: Table, name: str) -> str:
    """Return the name under which a setting stands in the file: a secret may be in one of its own."""
    return f"{name}_file" if f"{name}_file" in table.data else name


_ABOVE: Final = {
    "reserve_at_most": ("tokens_per_minute", "tokens_per_day", "tokens_per_month"),
    "smooth": ("requests_per_minute", "tokens_per_minute"),
    "time_zone": ("requests_per_day", "tokens_per_day", "tokens_per_month"),
}  # what a setting of a limit does nothing without


def check_limit(limit: settings.LimitConfig, table: Table) -> None:
    """Refuse a limit of nothing, and a reservation that nothing is reserved from."""
    limiting = [setting.key for setting in settings_of(settings.LimitConfig) if setting.among]
    if not table.data.keys() & set(limiting):
        table.reader.problem(table.at, f"limits nothing: write one of {', '.join(limiting)}")
        return
    for key, above in _ABOVE.items():
        if key in table.data and not table.data.keys() & set(above):
            table.problem(key, f"does nothing without {above[0]}: write {above[0]} too, or remove it")


def check_pool(pool: settings.PoolConfig, table: Table) -> None:
    """Refuse what does nothing in this pool, and an engine that cannot be probed without a path."""
    for below, above in (("queue", "max_inflight"), ("queue_timeout", "queue")):
        if below in table.data and above not in table.data:
            table.problem(below, f"does nothing without {above}: write {above} too, or remove it")
    if pool.health is not None and pool.health.path is None and pool.engine in settings.WITHOUT_HEALTH_PATH:
        message = f'the engine "{pool.engine}" has no health check of its own: write one such as "/v1/models"'
        table.reader.problem((*table.at, "health", "path"), message)
    for name in ("resume_at_most", "resume_memory"):
        if name in table.data and pool.resume == "off":
            table.problem(name, 'does nothing without resume: write resume = "auto" too, or remove it')
    if pool.resume == "content" and pool.engine == "openai":
        message = 'cannot be "content" with the engine "openai", which counts no tokens: write resume = "replay"'
        table.problem("resume", message)
    if pool.resume == "content" and "resume_at_most" in table.data:
        message = 'does nothing with resume = "content", which generates nothing again: remove it'
        table.problem("resume_at_most", message)
    _check_hedge(pool, table)
    for other in ("endpoints", "ca_file") if "dns" in table.data else ():
        if table.is_given(other):
            table.problem(other, "cannot stand beside dns, whose members speak plain HTTP: remove one of them")
    for at, name in table.listed.get("allow_members", ()):
        if name in pool.refuse_members:
            table.reader.problem(at, f"{name!r} stands in refuse_members too: remove one of the two")
        elif name not in STEERING[pool.engine]:
            what = f'{name!r} is neither refused nor dropped with the engine "{pool.engine}": remove it'
            table.reader.warn(at, what)
    for index, endpoint in enumerate(pool.endpoints):
        _warn_of_address(table, ("endpoints", index), endpoint.url.host)
    if pool.dns is not None:
        _warn_of_address(table, ("dns",), pool.dns.host)


def _check_hedge(pool: settings.PoolConfig, table: Table) -> None:
    """Refuse a second endpoint where there is none, or that would be asked when the first one is given up."""
    after = pool.hedge_after
    if after is None:
        return
    if pool.dns is None and len(pool.endpoints) < 2:
        table.problem("hedge_after", "does nothing with one endpoint: write another one to ask, or remove it")
    elif after != "p95" and after >= pool.first_byte_timeout_s:
        table.problem("hedge_after", "is not below first_byte_timeout, which ends the request: write less")


def check_route(
    route: settings.RouteConfig,
    table: Table,
    pools: Mapping[str, settings.PoolConfig],
    limits: Mapping[str, settings.LimitConfig],
) -> None:
    """Refuse a route that leads nowhere, or that shows or limits what it cannot; warn of answers with another name."""
    _check_pattern(route, table)
    _check_hosts(route, table)
    _check_limit(route, table, limits, pools)
    _check_target(route, table, pools)
    _check_instance_settings(route, table)
    _check_instance_names(route, table)
    _check_list(route, table)
    if route.instance is not None:
        _warn_of_metadata(table, ("instance",), fill(route.instance, "x", "x"))
    if "model_echo" not in table.data:
        _warn_of_rewriting(route, table, pools)
    pool = pools.get(route.pool or "")
    if pool is not None and isinstance(pool.hedge_after, float) and 0 < route.heartbeat_s <= pool.hedge_after:
        what = f"comes before the hedge_after of {route.pool!r}, and no second endpoint is asked behind one"
        table.reader.warn((*table.at, "heartbeat"), f"{what}: write a longer time")


def _check_pattern(route: settings.RouteConfig, table: Table) -> None:
    at = (*table.at, "match") if "match" in table.data else table.at
    if not route.pattern or "*" in route.pattern[:-1]:
        what = f'the "*" of {route.pattern!r} is not at its end' if route.pattern else "the pattern is empty"
        table.reader.problem(at, f'{what}: write a model\'s name, or a prefix and "*"')
    table.reader.check(table.at, check_model_name, route.name)  # it is shown, also where it matches nothing


def _check_hosts(route: settings.RouteConfig, table: Table) -> None:
    for at, text in table.listed.get("hosts", ()):
        if text == "*":
            table.reader.warn(at, 'matches hosts of one label only, such as "localhost": remove hosts for any host')
        if text and not text.startswith("!") and (exclusion := exclusion_of(text, route.hosts)):
            table.reader.problem(at, f'"{exclusion}" excludes all of it: remove one of the two')


def _check_limit(
    route: settings.RouteConfig,
    table: Table,
    limits: Mapping[str, settings.LimitConfig],
    pools: Mapping[str, settings.PoolConfig],
) -> None:
    """Refuse a limit that is none, and what instances do not have: their owners pay for them by the hour."""
    for key, is_set in (("metered", route.metered), ("limit", route.limit is not None)):
        if is_set and route.instance is not None:
            table.problem(key, f"instances are recorded, never {key if key == 'metered' else 'limited'}: remove it")
    if route.limit is None or route.instance is not None:
        return
    if route.limit not in limits:
        _refuse_unknown(table, "limit", route.limit, limits, "what it limits")
    elif limits[route.limit].wait_s and (pool := pools.get(route.pool or "")) is not None and not pool.queue:
        what = f"its wait does nothing with the pool {pool.name!r}, which has no queue"
        table.reader.warn((*table.at, "limit"), f"{what}: write queue in [{dotted(('pools', pool.name))}]")


def _check_target(route: settings.RouteConfig, table: Table, pools: Mapping[str, settings.PoolConfig]) -> None:
    match sorted({"pool", "instance"} & table.data.keys()):
        case []:
            message = 'neither pool nor instance: write pool = "NAME" or instance = "http://..."'
            table.reader.problem(table.at, message)
        case [_, _]:
            table.reader.problem(table.at, "both pool and instance: remove one of the two")
    if route.pool is not None and route.pool not in pools:
        _refuse_unknown(table, "pool", route.pool, pools, "its endpoints")


def _refuse_unknown(table: Table, kind: str, name: str, known: Mapping[str, object], what: str) -> None:
    """Refuse the name of a pool or limit that is not in the file; `what` such a table would hold."""
    near = table.reader.nearest(name, known)
    hint = f'did you mean "{near}"?' if near else f"write [{dotted((f'{kind}s', name))}] with {what}"
    table.problem(kind, f"there is no {kind} {name!r}: {hint}")


def _check_instance_settings(route: settings.RouteConfig, table: Table) -> None:
    """Refuse beside a pool what the pool has as a setting of its own."""
    if route.pool is None or "instance" in table.data:
        return
    for key in _OF_INSTANCES & table.data.keys():
        if table.is_sound(key):
            table.problem(key, f"is a setting of the pool: write it in [{dotted(('pools', route.pool))}]")


def _check_instance_names(route: settings.RouteConfig, table: Table) -> None:
    """Refuse names without an owner and a service where the route needs both."""
    fills_model = any(name in (route.model or "") for name in PLACEHOLDERS)
    if not fills_model and (route.instance is None or route.pool is not None):
        return
    if route.pattern and not route.pattern.endswith("*") and not is_instance_name(route.pattern):
        hint = 'write a prefix such as "u-*", or "owner/service" in DNS labels'
        table.reader.problem(table.at, f"{route.pattern!r} has no owner and service: {hint}")


def _check_list(route: settings.RouteConfig, table: Table) -> None:
    if route.list and not route.pattern.endswith("*"):
        table.problem("list", "an exact name is shown by itself: remove it")
        return
    for at, name in table.listed.get("list", ()):
        table.reader.check(at, check_model_name, name)
        if "*" in name or not name.startswith(route.pattern[:-1]):
            what = f"{name!r} is not a name that {route.pattern} matches"
            table.reader.problem(at, f"{what}: write one that is, or remove it")
        elif route.instance is not None and not is_instance_name(name):
            table.reader.problem(at, f'{name!r} has no owner and service: write "owner/service" in DNS labels')


def _warn_of_rewriting(route: settings.RouteConfig, table: Table, pools: Mapping[str, settings.PoolConfig]) -> None:
    """Warn where answers may name another model than the client asked for."""
    same = {None, "{owner}/{service}", route.pattern}
    pool = pools.get(route.pool or "")
    if route.model not in same:
        what, key = f"upstreams are asked for {route.model!r}", "model"
    elif pool and any(endpoint.model not in same for endpoint in pool.endpoints):
        what, key = f"endpoints of {pool.name!r} have a model of their own", "pool"
    else:
        return
    hint = (
        "start the upstream with the public name and remove it, or write model_echo = true to have the asked one put "
        "in, false if it is meant"
    )
    table.reader.warn((*table.at, key), f"{what}, and answers carry that name: {hint}")


def warn_of_loops(
    reader: Reader, server: process_settings.ServerConfig, pools: Mapping[str, settings.PoolConfig]
) -> None:
    """Warn of endpoints at which this edge listens itself."""
    here = {address.port for address in server.listen if address.host in _OF_THIS_MACHINE} - {0}
    for name, pool in pools.items():
        for index, endpoint in enumerate(pool.endpoints):
            if endpoint.url.host in _OF_THIS_MACHINE and endpoint.url.port in here:
                what = "is an address of listen, so requests would come back: write that of the model's server"
                reader.warn(("pools", name, "endpoints", index), what)


def warn_of_unused(reader: Reader, kind: str, known: Iterable[str], used: Collection[str | None]) -> None:
    """Warn of pools or limits that no route names, and that may be meant for one."""
    unless = ", unless keys do" if kind == "limit" else ""
    for name in known:
        if name not in used:
            what = f'no route names this {kind}: write {kind} = "{name}" in one, or remove it{unless}'
            reader.warn((f"{kind}s", name), what)


def refuse_ties(reader: Reader, routes: Sequence[settings.RouteConfig]) -> None:
    """Refuse two routes that could both win: the same pattern on one same host."""
    rivals: dict[str, _Rivals] = {}
    for route in routes:
        if route.pattern and (other := rivals.setdefault(route.pattern, _Rivals()).tie_with(route)):
            line = reader.positions.line(("routes", other.name))
            what = f"could win as well as {dotted(('routes', other.name))} of line {line}"
            reader.problem(("routes", route.name), f"{what}: give the two different names, or hosts that never meet")


class _Rivals:
    """The routes of one pattern so far, by the hosts they name: ten thousand are not compared in pairs.

    Of two that tie anyway, for they name the same or none, only the first is known.
    """

    def __init__(self) -> None:
        self._routes: list[settings.RouteConfig] = []
        self._by_name = HostIndex()
        self._names: set[str] = set()
        self._nameless: int | None = None  # the first that has exclusions at most

    def tie_with(self, route: settings.RouteConfig) -> settings.RouteConfig | None:
        """Return the first route that could win as well as this one, None when none could; then know this one too."""
        names, place = named_hosts(route.hosts), len(self._routes)
        near: Iterable[int] = range(place)
        if names:
            near = {at for name in names for at in self._by_name.meeting(name)}
            near = sorted(near if self._nameless is None else {*near, self._nameless})
        others = (self._routes[at] for at in near)
        tied = next((other for other in others if hosts_overlap(other.hosts, route.hosts)), None)
        self._routes.append(route)
        if not names and self._nameless is None:
            self._nameless = place
        for name in names:
            if name not in self._names:
                self._names.add(name)
                self._by_name.add(name, place)
        return tied
