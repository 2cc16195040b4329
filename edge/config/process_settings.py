"""Settings of the process: its listeners, how keys are proved, where usage goes, and what it shares with others.

What is asked upstream is in `settings.py`, with how a setting is declared.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Final, Literal

from edge.config import kinds, redis_urls, values
from edge.config.values import Address, KeyStoreAddress, Network, Place, check_server

WhenFull = Literal["serve", "refuse"]

# Each scheme has its row in `keys/stores/table.py` or `journal/sinks/table.py`.
KEY_STORES: Final = (
    Place(("sqlite",), '"sqlite:FILE", such as "sqlite:edge.db"'),
    Place(("http", "https"), "the URL of an introspection server", check_server),
    Place(redis_urls.SCHEMES, redis_urls.SAMPLE, redis_urls.check_redis),
)
SINKS: Final = (
    Place(("http", "https"), '"https://HOST/PATH"', check_server),
    Place(redis_urls.SCHEMES, redis_urls.SAMPLE, redis_urls.check_redis),
)
_EVERY_ADDRESS: Final = Address("0.0.0.0", 8080)
_THIS_MACHINE: Final = Address("127.0.0.1", 9090)  # metrics are for operators only
_KEY_FILE: Final = KeyStoreAddress(Path("edge.db"))


# fmt: off


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """The listener's certificate. Its files are read again when they change."""

    certificate: Annotated[Path, kinds.file("The PEM file of the certificate and its chain.", example="tls.crt")]
    private_key: Annotated[Path, kinds.file("The PEM file of the private key.", example="tls.key")]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The listeners, and what one client may cost."""

    listen: Annotated[tuple[Address, ...], kinds.addresses(
        'Where clients connect: "host:port" or "unix:PATH", or a list.', restart="value")] = (_EVERY_ADDRESS,)
    admin: Annotated[Address, kinds.placed(
        "Where operators find health and metrics, for which no key is asked: keep it off public addresses.",
        values.parse_address, "address", ":", restart="value")] = _THIS_MACHINE
    admin_token: Annotated[str | None, kinds.secret(
        "The bearer token for keys and users over HTTP at `admin`, and for the purge of keys. Absent: keys and users "
        "are not there, and anybody who reaches the listener may purge. Whoever has it makes keys for every user; it "
        "goes over plain HTTP, so keep the listener on a network of your own."
    )] = field(default=None, repr=False)
    region: Annotated[str, kinds.text(
        "Where this edge runs, for its usage records: a bill may have several.",
        values.check_region, example="cn-shanghai-1", restart="value")] = ""
    max_body_bytes: Annotated[int, kinds.size(
        "The largest body of a request; a larger one gets a 413. Too small a size refuses images.")] = 64 * 2**20
    body_memory_bytes: Annotated[int, kinds.size(
        "Memory for all bodies together; a request past it gets a 503. Keep it under the machine's memory, and not "
        "under max_body.")] = 2**30
    header_timeout_s: Annotated[float, kinds.duration("For the whole head of a request, from its first byte.")] = 15
    body_timeout_s: Annotated[float, kinds.duration(
        "Between two reads of a body. Too short a time cuts uploads over bad links.")] = 60
    client_idle_timeout_s: Annotated[float, kinds.duration(
        "Between two requests of a connection. Keep it above the idle timeout of the balancer in front.")] = 75
    min_client_rate_bytes_per_s: Annotated[int, kinds.size(
        'The slowest rate, a second: a client that reads slower for long is cut. "0B" cuts only one that takes '
        "nothing for 30 s.",
        zero=True, key="min_client_rate")] = 2**10
    max_connections: Annotated[int | None, kinds.count(
        "Connections of clients. One more closes the longest idle one; without any it is refused with a 503. Absent: "
        "just under half the limit of open files, as a stream holds two.",
        10**7, example=10_000)] = None
    max_connections_per_address: Annotated[int | None, kinds.count(
        "Connections of one client address, or of one IPv6 network of 64 bits; one more gets a 429. Absent: no bound. "
        "Trusted proxies and unix sockets may open any number: for each client behind them, requests that are being "
        "answered count. Too small a number refuses users who share an address, as those of one company or of one "
        "mobile network do.",
        10**7, example=500)] = None
    drain_timeout_s: Annotated[float, kinds.duration(
        "How long a stop waits for running answers before it cuts them. Let the supervisor wait longer.", zero=True
    )] = 120
    shutdown_delay_s: Annotated[float, kinds.duration(
        "How long new requests are still accepted at a stop, while `/readyz` fails already. A time shorter than the "
        "balancer's probe interval loses requests.", zero=True)] = 5
    tls: Annotated[TlsConfig | None, kinds.table(
        TlsConfig, 'write both files: tls = { certificate = "tls.crt", private_key = "tls.key" }',
        example={"certificate": "tls.crt", "private_key": "tls.key"}, restart="presence")] = None
    operations: Annotated[tuple[str, ...], kinds.texts(
        "Further operations, by their path behind /v1: JSON with a `model`, passed on as it comes, with what usage its "
        "answer reports.", values.check_operation, example=["classify"])] = ()
    timing: Annotated[bool, kinds.flag(
        "Every answer of a model says in `Server-Timing` what took its time, as errors always do: the edge, the queue, "
        "the model's server. It costs a small request 1.5 % of the edge's work.")] = False
    traces: Annotated[str, kinds.parsed(
        "Where spans of requests are sent, by OTLP over HTTP. Needs the extra `otel`.", values.check_server, "URL",
        values.pattern_of((Place(("http", "https"), ""),)), example="http://127.0.0.1:4318/v1/traces", restart="value"
    )] = ""
    trace_share: Annotated[float, kinds.share(
        "The share of traces that is kept, of those that their callers keep.", restart="value")] = 0.01
    max_metric_labels: Annotated[int, kinds.count(
        'Routes, limits, endpoints and pools that have series of their own in `/metrics`, 40 lines a route; what '
        'others count is summed under "(other)". Many make every scrape long.', 10**6)] = 1000
    trusted_proxies: Annotated[tuple[Network, ...], kinds.texts(
        "Networks whose X-Forwarded-For is believed. Anyone there can claim any client address.",
        values.parse_network, kind="list of networks", example=["10.0.0.0/8"])] = ()


@dataclass(frozen=True, slots=True)
class KeysConfig:
    """How an API key is looked up."""

    store: Annotated[KeyStoreAddress, kinds.placed(
        "`sqlite:FILE`, made at the start or by `edge keys create`; the URL of a token introspection server (RFC "
        "7662), which receives each key; or the URL of a Redis: `redis://HOST`, `redis+sentinel://HOST,HOST/SERVICE` "
        "or `redis+cluster://HOST,HOST`, with TLS `rediss`.",
        partial(values.parse_store, places=KEY_STORES), "key store", values.pattern_of(KEY_STORES), restart="value"
    )] = _KEY_FILE
    cache_ttl_s: Annotated[float, kinds.duration(
        "How long an answer is believed when the store reports no change. An introspection server reports none: there "
        "a revoked key may work this much longer.")] = 10
    negative_ttl_s: Annotated[float, kinds.duration(
        'The same for the answer "unknown": with an introspection server a new key may be refused this long.')] = 2
    stale_for_s: Annotated[float, kinds.duration(
        "How long known keys go on working while the store is down.", zero=True)] = 600
    cache_entries: Annotated[int, kinds.count(
        "Keys remembered, known and unknown ones each, at about 1 kB a key.", 10**9)] = 100_000
    store_timeout_s: Annotated[float, kinds.duration(
        "How long a look-up may take before the store counts as down: then known keys go on and unknown ones get a "
        "503. Requests with a new key wait that long.")] = 2
    store_token: Annotated[str | None, kinds.secret(
        "The bearer token for an introspection server.")] = field(default=None, repr=False)
    store_client_id: Annotated[str | None, kinds.text(
        "The name for HTTP Basic at an introspection server.", example="edge")] = None
    store_client_secret: Annotated[str | None, kinds.secret(
        "The password that belongs to store_client_id.")] = field(default=None, repr=False)
    store_ca_file: Annotated[Path | None, kinds.file(
        "A PEM file with the authority of a store at https or rediss.", example="tls.crt", restart="value")] = None


@dataclass(frozen=True, slots=True)
class JwtConfig:
    """Tokens that an issuer signed, instead of keys. Needs the extra `jwt`."""

    issuer: Annotated[str, kinds.text(
        "The `iss` of its tokens; a token with another one is looked up as a key.", example="https://console.example/")]
    audience: Annotated[str, kinds.text(
        "The `aud` that a token must have; tokens made for something else are refused.", example="models")]
    jwks: Annotated[str | Path, kinds.key_set(
        "The URL or the file of the issuer's public keys (RFC 7517).", example="jwks.json")]
    algorithms: Annotated[tuple[str, ...], kinds.texts(
        "How tokens may be signed.", values.check_algorithm,
        empty='an empty list: remove it for "RS256", or write how the tokens are signed', options=values.ALGORITHMS
    )] = ("RS256",)
    user_claim: Annotated[str, kinds.text("The claim that names the user, `u-...`.", values.check_claim)] = "sub"
    allow_claim: Annotated[str | None, kinds.text(
        "The claim that lists the models a token may use, as patterns: a list, or text with spaces between them. "
        "Absent: the models a key without `allow` may use.", values.check_claim, example="models")] = None
    leeway_s: Annotated[float, kinds.duration(
        "How far the issuer's clock and this one may differ. Tokens live this much longer.", zero=True)] = 30
    jwks_ttl_s: Annotated[float, kinds.duration(
        "How often the keys are fetched. A token that names an unknown key has them fetched at once, at most every 10 "
        "s. A withdrawn key is accepted this much longer.")] = 600
    ca_file: Annotated[Path | None, kinds.file(
        "A PEM file with the authority of a jwks at https.", example="tls.crt", restart="value")] = None


@dataclass(frozen=True, slots=True)
class UsageConfig:
    """The record of what was used: two lines for each request."""

    journal: Annotated[Path, kinds.placed(
        "The directory of the records, of every process on this machine.",
        values.parse_directory, "directory")] = Path("usage")
    rotate_bytes: Annotated[int, kinds.size(
        "A new file begins at this size, and every day. Old ones stay, unless `keep` says otherwise.")] = 64 * 2**20
    keep_s: Annotated[float | None, kinds.duration(
        "How long a file of records that the sink has is kept after its last line. Absent: nothing is deleted. What is "
        "not shipped is never deleted. Bills are questioned for longer than a month.", example="30d")] = None
    when_full: Annotated[WhenFull, kinds.choice(
        'When the journal cannot be written: "serve" keeps records in memory, where a crash loses them; "refuse" '
        "answers 503.", WhenFull)] = "serve"
    sink: Annotated[str, kinds.parsed(
        "Where records are shipped, each at least once: a Redis (the stream `edge:usage`) or a URL that accepts "
        "batches. It may be down for as long as the disk has room.",
        partial(values.check_sink, places=SINKS), "URL", values.pattern_of(SINKS), lambda url: url.partition("://")[0],
        example="redis://:${SET}@127.0.0.1:6379/0")] = field(default="", repr=False)
    sink_token: Annotated[str | None, kinds.secret(
        "The bearer token of a sink at http or https.", restart="never")] = field(default=None, repr=False)
    sink_ca_file: Annotated[Path | None, kinds.file(
        "A PEM file with the authority of a sink at https or rediss.", example="tls.crt")] = None
    sink_replicas: Annotated[int | None, kinds.count(
        "How many replicas of a Redis must have a record before it counts as shipped. Absent: none, and a failover may "
        "lose what the primary acknowledged last. With fewer replicas there, records wait in the journal.",
        100, example=1)] = None


@dataclass(frozen=True, slots=True)
class SharedConfig:
    """What processes share."""

    redis: Annotated[str, kinds.parsed(
        "A Redis or Valkey: limits count for all processes together, and `POST /keys/purge` at one reaches all. While "
        "it is down each process counts alone. With several servers `redis+sentinel://` or `redis+cluster://`, as for "
        "keys and records. Needs the extra `redis`.",
        redis_urls.check_redis, "URL", redis_urls.PATTERN, lambda url: "(secret)",
        example="redis://:${SET}@127.0.0.1:6379/0")] = field(default="", repr=False)
    redis_ca_file: Annotated[Path | None, kinds.file(
        "A PEM file with the authority of a Redis at rediss.", example="tls.crt")] = None
