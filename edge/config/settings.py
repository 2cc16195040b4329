"""Turn routes.toml into an immutable, valid `Config`, or list everything that is wrong with it, line by line.

`load` reads the file and the secrets it names; `parse` takes its text. Here is what the keys are and mean together;
`tables.py` reads them one by one, `values.py` reads the strings, `positions.py` finds the lines. Names in the file
have no unit, since their values carry one (`connect_timeout = "2s"`); the fields here do (`connect_timeout_s`).
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, TypeVar
from urllib.parse import SplitResult, urlsplit

from edge.config.positions import KeyPath, Positions
from edge.config.tables import (
    ConfigError,
    Problem,
    Reader,
    Table,
    dotted,
    nearest,
    problems_json,
    read_toml,
    render_problems,
)
from edge.config.values import Address, Url, check_instance, parse_address, parse_url
from edge.names import (
    PLACEHOLDERS,
    check_host_pattern,
    check_model_name,
    check_placeholders,
    exclusion_of,
    hosts_overlap,
    is_instance_name,
)

__all__ = [
    "Address",
    "Config",
    "ConfigError",
    "EndpointConfig",
    "HealthConfig",
    "JwtConfig",
    "KeyStoreAddress",
    "KeysConfig",
    "LimitConfig",
    "PoolConfig",
    "Problem",
    "RouteConfig",
    "ServerConfig",
    "SharedConfig",
    "TlsConfig",
    "Url",
    "UsageConfig",
    "load",
    "load_keys",
    "parse",
    "problems_json",
    "render_problems",
]

Balance = Literal["least-loaded", "round-robin", "prefix-affinity"]
Engine = Literal["vllm", "sglang", "llamacpp", "openai"]
WhenFull = Literal["serve", "refuse"]
LimitPer = Literal["user", "key"]
PoolUsage = Literal["final", "continuous"]
Network = IPv4Network | IPv6Network
_MAPPED_BITS: Final = 96  # before an IPv4 address that is written as an IPv6 one (RFC 4291 section 2.5.5.2)
T = TypeVar("T")

BALANCES: Final[tuple[Balance, ...]] = ("least-loaded", "round-robin", "prefix-affinity")
ENGINES: Final[tuple[Engine, ...]] = ("vllm", "sglang", "llamacpp", "openai")
WHEN_FULL: Final[tuple[WhenFull, ...]] = ("serve", "refuse")
LIMITS_PER: Final[tuple[LimitPer, ...]] = ("user", "key")
POOL_USAGES: Final[tuple[PoolUsage, ...]] = ("final", "continuous")
LIMITED: Final = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")
# Signed with a key that only the issuer has. HS256 and its kin would let whoever can prove a token make one.
ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
_TAKES_CREDENTIALS: Final = ("http", "https")  # as settings; in the URL of a Redis they have a place
_REDIS_PATH: Final = re.compile(r"/?|/[0-9]{1,5}")
_IS_TLS: Final = ("https", "rediss")
EVERY_ADDRESS: Final = Address("0.0.0.0", 8080)
THIS_MACHINE: Final = Address("127.0.0.1", 9090)  # metrics and the status page are for operators only


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """The PEM files of the listener's certificate chain and key."""

    certificate: Path
    private_key: Path


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """`[server]`: the listeners and what one client may cost.

    `body_memory_bytes` bounds the bodies of all requests together; `body_timeout_s` and `client_idle_timeout_s` run
    between two reads, of a body and between requests (nginx: 60 s and 75 s). `min_client_rate_bytes_per_s` is the floor
    below which a reading client is cut, 0 for none. `max_connections` None is just under half the descriptor limit, as
    every stream holds two descriptors. `shutdown_delay_s` is how long a balancer may take to see `/readyz` fail.
    """

    listen: tuple[Address, ...] = (EVERY_ADDRESS,)
    admin: Address = THIS_MACHINE
    max_body_bytes: int = 64 * 2**20
    body_memory_bytes: int = 2**30
    header_timeout_s: float = 15
    body_timeout_s: float = 60
    client_idle_timeout_s: float = 75
    min_client_rate_bytes_per_s: int = 2**10
    max_connections: int | None = None
    drain_timeout_s: float = 120
    shutdown_delay_s: float = 5
    tls: TlsConfig | None = None
    trusted_proxies: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class KeyStoreAddress:
    """`keys.store`: a SQLite file, or the URL of a server; exactly one of the two. A URL may hold a password."""

    path: Path | None = None
    url: str = field(default="", repr=False)

    def __str__(self) -> str:
        if self.path is not None:
            return f"sqlite:{self.path}"
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    @property
    def scheme(self) -> str:
        """`sqlite`, `http`, `https`, `redis` or `rediss`."""
        return "sqlite" if self.path is not None else self.url.partition(":")[0]


@dataclass(frozen=True, slots=True)
class KeysConfig:
    """`[keys]`: where keys are looked up and how long the answers are believed.

    A revoked key lives at most `cache_ttl_s` longer, where the store does not tell of it; a new one waits at most
    `negative_ttl_s`; while the store is down, or silent for `store_timeout_s`, known keys go on for `stale_for_s`.
    `store_token` (a bearer token), or `store_client_id` and `store_client_secret` (HTTP Basic), are what an
    introspection server wants to see.
    """

    store: KeyStoreAddress
    cache_ttl_s: float = 10
    negative_ttl_s: float = 2
    stale_for_s: float = 600
    cache_entries: int = 100_000
    store_timeout_s: float = 2
    store_token: str | None = field(default=None, repr=False)
    store_client_id: str | None = None
    store_client_secret: str | None = field(default=None, repr=False)
    store_ca_file: Path | None = None


@dataclass(frozen=True, slots=True)
class JwtConfig:
    """`[jwt]`: tokens of one issuer instead of keys; `jwks` is the URL or the file of its keys (RFC 7517).

    `user_claim` must yield the user (`u-...`); `allow_claim` a list of patterns, or text with spaces between them, in
    place of what a key's `allow` says. `leeway_s` is how far the clocks may differ. The keys are fetched every
    `jwks_ttl_s`, and when a token names one that is not known.
    """

    issuer: str
    audience: str
    jwks: str | Path
    algorithms: tuple[str, ...] = ("RS256",)
    user_claim: str = "sub"
    allow_claim: str | None = None
    leeway_s: float = 30
    jwks_ttl_s: float = 600
    ca_file: Path | None = None


@dataclass(frozen=True, slots=True)
class SharedConfig:
    """`[shared]`: the Redis or Valkey by which processes count limits together and hear of revoked keys at once."""

    redis: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class UsageConfig:
    """`[usage]`: where the records of what was used are kept, and where they are shipped.

    `journal` is a directory, with one file at a time for each process, a new one every `rotate_bytes` and every day.
    When it cannot be written, `when_full` says whether requests go on ("serve": their records wait in memory, and a
    crash loses those) or get a 503 ("refuse"). `sink` is the URL of a Redis or of an HTTPS endpoint, None for none;
    `sink_token` a bearer token for the latter.
    """

    journal: Path
    rotate_bytes: int = 64 * 2**20
    when_full: WhenFull = "serve"
    sink: str = field(default="", repr=False)
    sink_token: str | None = field(default=None, repr=False)
    sink_ca_file: Path | None = None


@dataclass(frozen=True, slots=True)
class LimitConfig:
    """`[limits.NAME]`: how much one user, or one key, may do at each route; None is no limit."""

    name: str
    per: LimitPer = "user"
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None


@dataclass(frozen=True, slots=True)
class EndpointConfig:
    """One server of a pool: its share of the load, and the model's name and API key that it wants, None: as asked."""

    url: Url
    weight: int = 1
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class HealthConfig:
    """`health`: how the endpoints of a pool are probed; no `path` is the engine's own."""

    path: str | None = None
    interval_s: float = 5


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """`[pools.NAME]`: servers of which any can answer.

    `first_byte_timeout_s` runs to the first byte of the answer's body, `idle_timeout_s` after it between two reads.
    Before that first byte another endpoint is asked after a refused connection and, within `retry_within_s`, after a
    429, 502, 503 or 504; with `retry_after_send` also after a connection that died with the request on it, which may
    carry a prompt that crashes engines from one to the next. Retries are at most the share `retry_budget` of the pool's
    live requests (and three). No `health`: endpoints are judged by their answers alone.

    `max_inflight` caps the requests in flight at each endpoint, those of other pools included; past it up to `queue`
    requests wait, users taking turns, each no longer than `queue_timeout_s`; others get a 503 that says when to come
    back. `dns` in place of endpoints: a member for each address of the name.

    `usage` is what a stream of a metered route is asked for: its counts at the end ("final"; one that is cut before is
    estimated by its frames), or in every frame ("continuous"; exact also for a cut one, at the cost of a longer frame
    that is read, and written anew without them for who did not ask).
    """

    name: str
    endpoints: tuple[EndpointConfig, ...]
    balance: Balance = "least-loaded"
    engine: Engine = "vllm"
    connect_timeout_s: float = 2
    first_byte_timeout_s: float = 300
    idle_timeout_s: float = 120
    ca_file: Path | None = None
    retry_within_s: float = 2
    retry_after_send: bool = False
    retry_budget: float = 0.2
    health: HealthConfig | None = None
    max_inflight: int | None = None
    queue: int = 0
    queue_timeout_s: float = 10
    dns: Url | None = None
    usage: PoolUsage = "final"


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """`[routes.NAME]`: the models of one pattern, sent to a pool or to instances; exactly one of the two is set.

    `pattern` is a model's name, or a prefix that ends in `*`. `instance` is the template of a URL and `model` that of
    the name sent upstream (None: as asked), with `{owner}` and `{service}`. No `hosts`: any host. `list` names the
    models of a prefix that are shown.

    `heartbeat_s` is the silence after which a stream gets a comment, 0 (the default) for none, looked for a few times
    in it; it keeps proxies between from closing a stream whose first token is far. Hazard: a heartbeat before the
    answer makes its status 200, so no other endpoint is asked after it, an error comes as an event and an answer that
    is no stream fails; keep it above the pool's `retry_within` and the time in which upstreams refuse. `model_echo`
    (default off) puts the name that was asked into JSON answers up to 1 MiB and into the events of streams, which then
    are framed anew: some microseconds of CPU an event. Neither touches an answer with a content encoding.
    """

    name: str
    pattern: str
    pool: str | None = None
    instance: str | None = None
    model: str | None = None
    hosts: tuple[str, ...] = ()
    list: tuple[str, ...] = ()
    heartbeat_s: float = 0
    model_echo: bool = False
    metered: bool = False
    limit: str | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """A valid routes.toml; `watched` is every secret, TLS and CA file it names."""

    path: Path
    server: ServerConfig
    keys: KeysConfig
    jwt: JwtConfig | None
    usage: UsageConfig
    shared: SharedConfig
    limits: Mapping[str, LimitConfig]
    pools: Mapping[str, PoolConfig]
    routes: tuple[RouteConfig, ...]
    watched: tuple[Path, ...] = ()
    warnings: tuple[Problem, ...] = ()


def load(path: Path, env: Mapping[str, str] = os.environ) -> Config:
    """Return the configuration of the file at `path`.

    Raises: `ConfigError`, also for a file that cannot be read or is not UTF-8.
    """
    return parse(_text_of(path), path, env)


def load_keys(path: Path, env: Mapping[str, str] = os.environ) -> KeysConfig:
    """Return only `[keys]` of the file at `path`: what else is wrong with it must not keep a key from being revoked.

    Raises: `ConfigError`.
    """
    return _read(_text_of(path), path, env, lambda reader, root: _keys(root.section("keys")))


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(path, [Problem(line, "", "not UTF-8: save the file as UTF-8")]) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        message = f"cannot be read ({reason}): name a readable file"
        raise ConfigError(path, [Problem(1, "", message)]) from None


def parse(text: str, path: Path, env: Mapping[str, str]) -> Config:
    """Return the configuration of `text`; relative paths in it start at the directory of `path`.

    Raises: `ConfigError`.
    """
    return _read(text, path, env, _config)


def _read(text: str, path: Path, env: Mapping[str, str], read: Callable[[Reader, Table], T]) -> T:
    try:
        data = read_toml(text, path)
        reader = Reader(path, env, Positions(text))
        found = read(reader, Table(reader, (), data))
    except RecursionError:
        raise ConfigError(path, [Problem(1, "", "nested too deeply: write fewer brackets within brackets")]) from None
    if reader.problems:
        watched = tuple(dict.fromkeys(reader.watched))
        raise ConfigError(path, sorted(reader.problems, key=lambda problem: problem.line), watched)
    return found


def _config(reader: Reader, root: Table) -> Config:
    if not root.left.get("routes"):
        reader.problem(("routes",), 'no routes, so nothing is served: write [routes."public/name"] with pool = "..."')
    server = _server(root.section("server"))
    keys = _keys(root.section("keys"))
    jwt = _jwt(root.table("jwt"))
    usage = _usage(root.section("usage"))
    shared = _shared(root.section("shared"))
    limits = {name: _limit(name, table) for name, table in root.section("limits").tables()}
    pools = {name: _pool(name, table) for name, table in root.section("pools").tables()}
    routes = [_route(name, table, pools, limits) for name, table in root.section("routes").tables()]
    root.close()
    _refuse_ties(reader, routes)
    return Config(
        path=reader.path,
        server=server,
        keys=keys,
        jwt=jwt,
        usage=usage,
        shared=shared,
        limits=MappingProxyType(limits),
        pools=MappingProxyType(pools),
        routes=tuple(routes),
        watched=tuple(dict.fromkeys(reader.watched)),
        warnings=tuple(sorted(reader.warnings, key=lambda warning: warning.line)),
    )


def _server(table: Table) -> ServerConfig:
    default = ServerConfig()
    max_body_bytes = table.size_bytes("max_body", default.max_body_bytes)
    config = ServerConfig(
        listen=_listen(table) or default.listen,
        admin=table.parsed("admin", partial(parse_address, base=table.reader.base), default.admin),
        max_body_bytes=max_body_bytes,
        body_memory_bytes=table.size_bytes("body_memory", max(default.body_memory_bytes, max_body_bytes)),
        header_timeout_s=table.duration_s("header_timeout", default.header_timeout_s),
        body_timeout_s=table.duration_s("body_timeout", default.body_timeout_s),
        client_idle_timeout_s=table.duration_s("client_idle_timeout", default.client_idle_timeout_s),
        min_client_rate_bytes_per_s=table.size_bytes("min_client_rate", default.min_client_rate_bytes_per_s, zero=True),
        max_connections=table.integer("max_connections", default.max_connections, highest=10**7),
        drain_timeout_s=table.duration_s("drain_timeout", default.drain_timeout_s, zero=True),
        shutdown_delay_s=table.duration_s("shutdown_delay", default.shutdown_delay_s, zero=True),
        tls=_tls(table),
        trusted_proxies=_trusted_proxies(table),
    )
    if any(config.admin.collides(address) for address in config.listen):
        table.problem("admin", 'is an address of listen too: write another port, such as "127.0.0.1:9090"')
    if config.body_memory_bytes < max_body_bytes:
        table.problem("body_memory", "is less than max_body, so such a body would never fit: write at least as much")
    table.close()
    return config


def _listen(table: Table) -> tuple[Address, ...]:
    addresses: list[Address] = []
    if table.left.get("listen") == []:
        table.problem("listen", 'an empty list: write "0.0.0.0:8080"')
    for at, text in table.texts("listen", single=True):
        address = table.reader.check(at, partial(parse_address, base=table.reader.base), text, None)
        if address and any(address.collides(other) for other in addresses):
            table.reader.problem(at, "is listened on already: remove it, or write another port")
        elif address:
            addresses.append(address)
    return tuple(addresses)


def _tls(table: Table) -> TlsConfig | None:
    below = table.table("tls")
    if below is None:
        return None
    certificate, private_key = below.file("certificate"), below.file("private_key")
    below.close()
    if certificate and private_key:
        return TlsConfig(certificate, private_key)
    table.problem("tls", 'write both files: tls = { certificate = "tls.crt", private_key = "tls.key" }')
    return None


def _trusted_proxies(table: Table) -> tuple[Network, ...]:
    networks = [table.reader.check(at, _network, text, None) for at, text in table.texts("trusted_proxies")]
    return tuple(network for network in networks if network)


def _network(text: str) -> Network:
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f'{text!r} is not a network: write an address or a range such as "10.0.0.0/8"') from None
    if "/" in text and str(network.network_address) != text.partition("/")[0]:
        raise ValueError(f'{text!r} is not the beginning of its range: write "{network}"')
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if mapped is not None and network.prefixlen >= _MAPPED_BITS:  # an IPv4 client is one on every listener
        return IPv4Network((mapped, network.prefixlen - _MAPPED_BITS))
    return network


def _keys(table: Table) -> KeysConfig:
    default = KeysConfig(KeyStoreAddress(table.reader.base / "edge.db"))
    is_given = "store" in table.left
    store = table.parsed("store", partial(_key_store, base=table.reader.base), None)
    config = KeysConfig(
        store=store or default.store,
        cache_ttl_s=table.duration_s("cache_ttl", default.cache_ttl_s),
        negative_ttl_s=table.duration_s("negative_ttl", default.negative_ttl_s),
        stale_for_s=table.duration_s("stale_for", default.stale_for_s, zero=True),
        cache_entries=table.integer("cache_entries", default.cache_entries, highest=10**9),
        store_timeout_s=table.duration_s("store_timeout", default.store_timeout_s),
        store_token=table.secret("store_token"),
        store_client_id=table.text("store_client_id"),
        store_client_secret=table.secret("store_client_secret"),
        store_ca_file=table.file("store_ca_file"),
    )
    if store is not None or not is_given:  # what is wrong itself is not measured by
        _check_store_settings(config, table)
    table.close()
    return config


def _check_store_settings(config: KeysConfig, table: Table) -> None:
    """Refuse settings that the store has no use for."""
    scheme = config.store.scheme
    what = f"for a store at {scheme}"
    for name, value in (
        ("store_token", config.store_token),
        ("store_client_id", config.store_client_id),
        ("store_client_secret", config.store_client_secret),
    ):
        _refuse_unused(table, name, value, scheme in _TAKES_CREDENTIALS, what)
    _refuse_unused(table, "store_ca_file", config.store_ca_file, scheme in _IS_TLS, what)
    if config.store_token is not None and config.store_client_id is not None:
        table.problem(_as_given(table, "store_token"), "store_client_id is given too: remove one of the two")
    elif (config.store_client_id is None) != (config.store_client_secret is None):
        name = "store_client_secret" if config.store_client_id is None else "store_client_id"
        message = "store_client_id and store_client_secret belong together: write both, or remove it"
        table.problem(_as_given(table, name), message)


def _refuse_unused(table: Table, name: str, value: object, is_used: bool, what: str) -> None:
    """Refuse a setting that is given and does nothing; `what` says with what it would not."""
    if value is not None and not is_used:
        table.problem(_as_given(table, name), f"does nothing {what}: remove it")


def _as_given(table: Table, name: str) -> str:
    """Return the name under which a setting stands in the file: a secret may be in one of its own."""
    return f"{name}_file" if (*table.at, f"{name}_file") in table.reader.positions else name


def _key_store(text: str, base: Path) -> KeyStoreAddress:
    scheme, _, rest = text.partition(":")
    if scheme in ("http", "https"):
        return KeyStoreAddress(url=_server_url(text))
    if scheme in ("redis", "rediss"):
        return KeyStoreAddress(url=_redis_url(text))
    if scheme != "sqlite" or not rest or rest.startswith(("//", ":")) or "\0" in rest:
        raise ValueError(
            'not a key store: write "sqlite:FILE", such as "sqlite:edge.db", the URL of an introspection server, or '
            '"redis://HOST:PORT/0"'
        )
    return KeyStoreAddress(base / rest)


def _server_url(text: str) -> str:
    """Return the URL of something that is asked over HTTP; a query may stand in it, a password may not."""
    parts = _split(text)
    if parts is not None and (parts.username is not None or parts.password is not None):
        raise ValueError("a password does not belong into a URL, where logs show it: write it as a setting of its own")
    if parts is None or parts.fragment or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError('not a URL: write "https://HOST:PORT/PATH"')
    return text


def _redis_url(text: str) -> str:
    parts = _split(text)
    if (
        parts is None
        or parts.scheme not in ("redis", "rediss")
        or not _REDIS_PATH.fullmatch(parts.path)
        or parts.query
        or parts.fragment
    ):
        raise ValueError('not the URL of a Redis: write "redis://:${PASSWORD}@HOST:PORT/0", or rediss:// for TLS')
    return text


def _split(text: str) -> SplitResult | None:
    """Return the parts of a URL, None when its host or port is none.

    What is wrong with them is not told: a password that is not encoded is taken for a host.
    """
    try:
        parts = urlsplit(text)
        parse_url(f"http://{parts.netloc.rpartition('@')[2]}")
    except ValueError:
        return None
    return parts


def _jwt(table: Table | None) -> JwtConfig | None:
    if table is None:
        return None
    default = JwtConfig("", "", "")
    has_jwks = "jwks" in table.left
    if table.left.get("algorithms") == []:
        table.problem("algorithms", 'an empty list: remove it for "RS256", or write how the tokens are signed')
    listed = table.texts("algorithms")
    for at, text in listed:
        if text not in ALGORITHMS:
            hint = f"write one of {', '.join(ALGORITHMS)}"
            table.reader.problem(at, f"{text!r} is not an algorithm that only the issuer can sign with: {hint}")
    user_claim, allow_claim = table.text("user_claim"), table.text("allow_claim")
    config = JwtConfig(
        issuer=table.text("issuer") or "",
        audience=table.text("audience") or "",
        jwks=table.parsed("jwks", partial(_key_set, table=table), default.jwks),
        algorithms=tuple(text for _, text in listed) or default.algorithms,
        user_claim=user_claim or default.user_claim,
        allow_claim=allow_claim,
        leeway_s=table.duration_s("leeway", default.leeway_s, zero=True),
        jwks_ttl_s=table.duration_s("jwks_ttl", default.jwks_ttl_s),
        ca_file=table.file("ca_file"),
    )
    for name, value in (("user_claim", user_claim), ("allow_claim", allow_claim)):
        if value == "":
            table.problem(name, "is empty: write the name of a claim, or remove it")
    for name, sample in (("issuer", "https://console.example/"), ("audience", "models"), ("jwks", "jwks.json")):
        if not getattr(config, name) and not (name == "jwks" and has_jwks):  # what is wrong itself is not missing
            table.reader.problem(table.at, f'{name} is missing: write {name} = "{sample}"')
    if config.ca_file is not None and config.jwks and not str(config.jwks).startswith("https:"):
        table.problem("ca_file", "does nothing without a jwks at https: remove it")
    table.close()
    return config


def _key_set(text: str, table: Table) -> str | Path:
    if text.startswith(("http://", "https://")):
        return _server_url(text)
    return table.reader.file((*table.at, "jwks"), text)[0]


def _shared(table: Table) -> SharedConfig:
    config = SharedConfig(table.parsed("redis", _redis_url, ""))
    table.close()
    return config


def _usage(table: Table) -> UsageConfig:
    default = UsageConfig(table.reader.base / "usage")
    has_sink = "sink" in table.left
    journal = table.text("journal")
    if journal is not None and (not journal or "\0" in journal):
        table.problem("journal", 'is not a directory: write one such as "usage"')
        journal = None
    config = UsageConfig(
        journal=default.journal if journal is None else table.reader.base / journal,
        rotate_bytes=table.size_bytes("rotate", default.rotate_bytes),
        when_full=table.choice("when_full", WHEN_FULL, default.when_full),
        sink=table.parsed("sink", _sink_url, default.sink),
        sink_token=table.secret("sink_token"),
        sink_ca_file=table.file("sink_ca_file"),
    )
    if config.sink or not has_sink:  # what is wrong itself is not measured by
        scheme = config.sink.partition(":")[0] or "no sink"
        _refuse_unused(table, "sink_token", config.sink_token, scheme in _TAKES_CREDENTIALS, f"with {scheme}")
        _refuse_unused(table, "sink_ca_file", config.sink_ca_file, scheme in _IS_TLS, f"with {scheme}")
    table.close()
    return config


def _sink_url(text: str) -> str:
    if text.startswith(("http://", "https://")):
        return _server_url(text)
    try:
        return _redis_url(text)
    except ValueError:
        raise ValueError('not a sink: write "https://HOST/PATH" or "redis://HOST:PORT/0"') from None


def _limit(name: str, table: Table) -> LimitConfig:
    default = LimitConfig(name)
    if not table.left.keys() & set(LIMITED):
        table.reader.problem(table.at, f"limits nothing: write one of {', '.join(LIMITED)}")
    limit = LimitConfig(
        name=name,
        per=table.choice("per", LIMITS_PER, default.per),
        requests_per_minute=table.integer("requests_per_minute", None, highest=10**9),
        tokens_per_minute=table.integer("tokens_per_minute", None, highest=10**12),
        concurrent_requests=table.integer("concurrent_requests", None, highest=10**6),
    )
    table.close()
    return limit


def _pool(name: str, table: Table) -> PoolConfig:
    default = PoolConfig(name, ())
    for below, above in (("queue", "max_inflight"), ("queue_timeout", "queue")):
        if below in table.left and above not in table.left:
            table.problem(below, f"does nothing without {above}: write {above} too, or remove it")
    engine = table.choice("engine", ENGINES, default.engine)
    pool = PoolConfig(
        name=name,
        endpoints=() if "dns" in table.left else _endpoints(table),
        balance=table.choice("balance", BALANCES, default.balance),
        engine=engine,
        connect_timeout_s=table.duration_s("connect_timeout", default.connect_timeout_s),
        first_byte_timeout_s=table.duration_s("first_byte_timeout", default.first_byte_timeout_s),
        idle_timeout_s=table.duration_s("idle_timeout", default.idle_timeout_s),
        ca_file=table.file("ca_file"),
        retry_within_s=table.duration_s("retry_within", default.retry_within_s, zero=True),
        retry_after_send=bool(table.flag("retry_after_send")),
        retry_budget=table.share("retry_budget", default.retry_budget),
        health=_health(table, engine),
        max_inflight=table.integer("max_inflight", None, highest=10**6),
        queue=table.integer("queue", default.queue, highest=10**5),
        queue_timeout_s=table.duration_s("queue_timeout", default.queue_timeout_s),
        dns=table.parsed("dns", _dns, None),
        usage=table.choice("usage", POOL_USAGES, default.usage),
    )
    if pool.dns is not None:
        for other in ("endpoints", "ca_file"):
            if table.take(other) is not None or (other == "ca_file" and pool.ca_file is not None):
                table.problem(other, "cannot stand beside dns, whose members speak plain HTTP: remove one of them")
    table.close()
    return pool


def _dns(text: str) -> Url:
    """Return the URL of a name and a port; raises `ValueError`."""
    name, _, port = text.rpartition(":")
    if not name or not port.isdigit() or "/" in text:
        raise ValueError(f'{text!r} is not a name and a port: write one such as "vllm.pool.svc:8000"')
    return parse_url(f"http://{text}")


def _health(table: Table, engine: Engine) -> HealthConfig | None:
    below = table.table("health")
    if below is None:
        return None
    default = HealthConfig()
    path = below.text("path")
    if path is not None and not (path.startswith("/") and path.isascii() and path.isprintable() and " " not in path):
        below.problem("path", 'is not a path: write one such as "/health", or remove it for the engine\'s own')
    if path is None and engine == "openai":
        below.problem("path", 'the engine "openai" has no health check of its own: write one such as "/v1/models"')
    health = HealthConfig(path, below.duration_s("interval", default.interval_s))
    below.close()
    return health


def _endpoints(table: Table) -> tuple[EndpointConfig, ...]:
    value = table.take("endpoints")
    if not isinstance(value, list) or not value:
        table.problem("endpoints", 'a pool needs its servers: write endpoints = ["http://host:port"]')
        return ()
    endpoints: list[EndpointConfig] = []
    for index, element in enumerate(value):
        at = (*table.at, "endpoints", index)
        endpoint = _endpoint(table.reader, at, element)
        if endpoint and any(_server_of(endpoint) == _server_of(other) for other in endpoints):
            table.reader.problem(
                at, f"{endpoint.url.authority} is in this pool already: remove one, or write its weight"
            )
        elif endpoint:
            endpoints.append(endpoint)
    return tuple(endpoints)


def _server_of(endpoint: EndpointConfig) -> tuple[str, int]:
    return endpoint.url.host, endpoint.url.port


def _endpoint(reader: Reader, at: KeyPath, element: object) -> EndpointConfig | None:
    if isinstance(element, str):
        url = reader.check(at, parse_url, element, None)
        return EndpointConfig(url) if url else None
    if not isinstance(element, dict):
        reader.problem(at, 'must be a URL or a table: write "http://host:port" or { url = "http://host:port" }')
        return None
    table = Table(reader, at, element)
    if "url" not in element:
        table.problem("url", 'is missing: write url = "http://host:port"')
    url = table.parsed("url", parse_url, None)
    weight = table.integer("weight", 1, highest=1000)
    model, api_key = table.text("model"), table.secret("api_key")
    if model == "":
        table.problem("model", "is empty: write the name sent upstream, or remove it to send it as asked")
    table.close()
    return EndpointConfig(url, weight, model, api_key) if url else None


def _route(name: str, table: Table, pools: Mapping[str, PoolConfig], limits: Mapping[str, LimitConfig]) -> RouteConfig:
    _check_one_target(table)
    listed = table.texts("list")
    echo = table.flag("model_echo")
    route = RouteConfig(
        name=name,
        pattern=_pattern(name, table),
        pool=table.text("pool"),
        instance=table.text("instance"),
        model=table.text("model"),
        hosts=_hosts(table),
        list=tuple(text for _, text in listed),
        heartbeat_s=table.duration_s("heartbeat", 0, zero=True),
        model_echo=bool(echo),
        metered=bool(table.flag("metered")),
        limit=table.text("limit"),
    )
    _check_usage(route, table, limits)
    _check_target(route, table, pools)
    _check_instance_names(route, table)
    _check_list(route, table, listed)
    if echo is None:
        _warn_of_rewriting(route, table, pools)
    table.close()
    return route


def _check_usage(route: RouteConfig, table: Table, limits: Mapping[str, LimitConfig]) -> None:
    """Refuse a limit that is none, and what instances do not have: their owners pay for them by the hour."""
    for key, is_set in (("metered", route.metered), ("limit", route.limit is not None)):
        if is_set and route.instance is not None:
            table.problem(key, f"instances are recorded, never {key if key == 'metered' else 'limited'}: remove it")
    if route.limit is not None and route.instance is None and route.limit not in limits:
        near = nearest(route.limit, limits)
        hint = f'did you mean "{near}"?' if near else f"write [{dotted(('limits', route.limit))}] with what it limits"
        table.problem("limit", f"there is no limit {route.limit!r}: {hint}")


def _pattern(name: str, table: Table) -> str:
    given = table.text("match")
    pattern = name if given is None else given
    if not pattern or "*" in pattern[:-1]:
        what = f'the "*" of {pattern!r} is not at its end' if pattern else "the pattern is empty"
        message = f'{what}: write a model\'s name, or a prefix and "*"'
        table.reader.problem(table.at if given is None else (*table.at, "match"), message)
    table.reader.check(table.at, check_model_name, name, None)  # it is shown, also where it matches nothing
    if given is not None:
        table.reader.check((*table.at, "match"), check_model_name, given, None)
    return pattern


def _hosts(table: Table) -> tuple[str, ...]:
    if table.left.get("hosts") == []:
        table.problem("hosts", 'an empty list: remove it for any host, or write hosts = ["chat.d.run"]')
    texts = table.texts("hosts")
    for at, text in texts:
        table.reader.check(at, check_host_pattern, text, None)
    hosts = tuple(text for _, text in texts)
    for at, text in texts:
        if text and not text.startswith("!") and (exclusion := exclusion_of(text, hosts)):
            table.reader.problem(at, f'"{exclusion}" excludes all of it: remove one of the two')
    return hosts


def _check_one_target(table: Table) -> None:
    match sorted({"pool", "instance"} & table.left.keys()):
        case []:
            message = 'neither pool nor instance: write pool = "NAME" or instance = "http://..."'
            table.reader.problem(table.at, message)
        case [_, _]:
            table.reader.problem(table.at, "both pool and instance: remove one of the two")


def _check_target(route: RouteConfig, table: Table, pools: Mapping[str, PoolConfig]) -> None:
    if route.pool is not None and route.pool not in pools:
        near = nearest(route.pool, pools)
        hint = f'did you mean "{near}"?' if near else f"write [{dotted(('pools', route.pool))}] with its endpoints"
        table.problem("pool", f"there is no pool {route.pool!r}: {hint}")
    if route.instance is not None:
        table.reader.check((*table.at, "instance"), check_instance, route.instance, None)
    if route.model is not None:
        table.reader.check((*table.at, "model"), check_placeholders, route.model, None)
        if not route.model:
            table.problem("model", "is empty: write the name sent upstream, or remove it to send it as asked")


def _check_instance_names(route: RouteConfig, table: Table) -> None:
    """Refuse names without an owner and a service where the route needs both."""
    fills_model = any(name in (route.model or "") for name in PLACEHOLDERS)
    if not fills_model and (route.instance is None or route.pool is not None):
        return
    if route.pattern and not route.pattern.endswith("*") and not is_instance_name(route.pattern):
        hint = 'write a prefix such as "u-*", or "owner/service" in DNS labels'
        table.reader.problem(table.at, f"{route.pattern!r} has no owner and service: {hint}")


def _check_list(route: RouteConfig, table: Table, listed: Sequence[tuple[KeyPath, str]]) -> None:
    if route.list and not route.pattern.endswith("*"):
        table.problem("list", "an exact name is shown by itself: remove it")
        return
    for at, name in listed:
        table.reader.check(at, check_model_name, name, None)
        if "*" in name or not name.startswith(route.pattern[:-1]):
            table.reader.problem(
                at, f"{name!r} is not a name that {route.pattern} matches: write one that is, or remove it"
            )
        elif route.instance is not None and not is_instance_name(name):
            table.reader.problem(at, f'{name!r} has no owner and service: write "owner/service" in DNS labels')


def _warn_of_rewriting(route: RouteConfig, table: Table, pools: Mapping[str, PoolConfig]) -> None:
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


def _refuse_ties(reader: Reader, routes: Sequence[RouteConfig]) -> None:
    """Refuse two routes that could both win: the same pattern on one same host."""
    by_pattern: dict[str, list[RouteConfig]] = {}
    for route in (route for route in routes if route.pattern):
        earlier = by_pattern.setdefault(route.pattern, [])
        other = next((other for other in earlier if hosts_overlap(other.hosts, route.hosts)), None)
        if other:
            line = reader.positions.line(("routes", other.name))
            what = f"could win as well as {dotted(('routes', other.name))} of line {line}"
            reader.problem(("routes", route.name), f"{what}: give the two different names, or hosts that never meet")
        earlier.append(route)
