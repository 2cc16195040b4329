"""Every setting of routes.toml in one table, and the JSON Schema made of it, by which an editor completes the file.

`settings.py` decides what is valid; this tells editors, and `changes.py` writes values by it. A setting that the one
knows and the other does not fails `tests/config/test_schema.py`. To add one: a line in its table here, then
`edge schema > edge/routes.schema.json`.

The schema is JSON Schema draft 4, in plain keywords without `$ref`: what Taplo follows (https://taplo.tamasfe.dev).
A string may hold `${NAME}` in place of anything, so every pattern lets a `$` through.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edge.config.settings import (
    ALGORITHMS,
    BALANCES,
    ENGINES,
    LIMITED,
    LIMITS_PER,
    POOL_USAGES,
    WHEN_FULL,
    EndpointConfig,
    HealthConfig,
    JwtConfig,
    KeysConfig,
    KeyStoreAddress,
    LimitConfig,
    PoolConfig,
    RouteConfig,
    ServerConfig,
    SharedConfig,
    TlsConfig,
    Url,
    UsageConfig,
)

_DRAFT: Final = "http://json-schema.org/draft-04/schema#"
_TIMES: Final = (("d", 86400), ("h", 3600), ("m", 60))
_SIZES: Final = (("GiB", 2**30), ("GB", 10**9), ("MiB", 2**20), ("MB", 10**6), ("KiB", 2**10), ("KB", 10**3))
_COUNTED_IN_SECONDS_S: Final = 600  # below ten minutes people say seconds: "75s", "300s"


def duration(value_s: float) -> str:
    """Return seconds as routes.toml writes a duration, `"250ms"`, `"75s"`, `"10m"`."""
    if value_s >= _COUNTED_IN_SECONDS_S:
        for unit, unit_s in _TIMES:
            if value_s % unit_s == 0:
                return f"{value_s / unit_s:.0f}{unit}"
    if value_s == int(value_s):
        return f"{value_s:.0f}s"
    return f"{value_s * 1000:.12g}ms"


def size(value_bytes: int) -> str:
    """Return bytes as routes.toml writes a size, `"64MiB"`, `"2GB"`."""
    for unit, unit_bytes in _SIZES:
        if value_bytes and value_bytes % unit_bytes == 0:
            return f"{value_bytes // unit_bytes}{unit}"
    return f"{value_bytes}B"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value is: its schema, the unit of its field in `settings.py`, and how the file writes it."""

    schema: Mapping[str, object]
    unit: str = ""
    write: Callable[[Any], object] = lambda value: value


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a table: what it does, with its unit and hazard.

    `example` is a value for a key without default. `field` is the name in its class of `settings.py`: that of the
    key and the unit of its kind when it is None, and none of its own when it is empty.
    """

    name: str
    kind: Kind
    text: str
    example: object = None
    field: str | None = None

    @property
    def attribute(self) -> str:
        """The name of the field that holds the value, empty when there is none."""
        return f"{self.name}{self.kind.unit}" if self.field is None else self.field


@dataclass(frozen=True, slots=True)
class Section:
    """A table of the file; `absent` is what its class holds when no key is given.

    `one_of` keys exclude each other, and of `any_of` there must be one.
    """

    text: str
    absent: object
    settings: tuple[Setting, ...]
    required: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()

    def default(self, setting: Setting) -> object:
        """Return the value, as the file writes it, that is the same as none; None when there is no such value."""
        value = getattr(self.absent, setting.attribute) if setting.attribute else None
        return None if value in (None, (), "") else setting.kind.write(value)

    def schema(self) -> dict[str, object]:
        """Return the JSON Schema of this table."""
        schema: dict[str, object] = {"type": "object", "description": self.text, "additionalProperties": False}
        if self.required:
            schema["required"] = list(self.required)
        if self.one_of:
            schema["oneOf"] = [{"required": [name]} for name in self.one_of]
        if self.any_of:
            schema["anyOf"] = [{"required": [name]} for name in self.any_of]
        schema["properties"] = {setting.name: self._property(setting) for setting in self.settings}
        return schema

    def _property(self, setting: Setting) -> dict[str, object]:
        default = self.default(setting) if setting.name not in self.required else None
        text = setting.text
        if default is None and setting.example is not None:
            text = f"{text} For example `{json.dumps(setting.example)}`."
        schema = {**setting.kind.schema, "description": text}
        return schema if default is None else {**schema, "default": default}


# --- kinds


def _string(pattern: str) -> dict[str, object]:
    return {"type": "string", "pattern": rf"{pattern}|\$"}


def _first_or_all(values: tuple[object, ...]) -> object:
    return str(values[0]) if len(values) == 1 else [str(value) for value in values]


def _choice(options: tuple[str, ...]) -> Kind:
    return Kind({"type": "string", "anyOf": [{"enum": list(options)}, {"pattern": r"\$"}]})


def _count(highest: int) -> Kind:
    return Kind({"type": "integer", "minimum": 1, "maximum": highest})


def _table(section: Section) -> Kind:
    return Kind(section.schema())


_ANY_TEXT: Final = {"type": "string"}
_URL_TEXT: Final = _string("://")
_ADDRESS_TEXT: Final = _string(":")
TEXT: Final = Kind(_ANY_TEXT)
TEXTS: Final = Kind({"type": "array", "items": _ANY_TEXT}, write=lambda values: [str(value) for value in values])
FILE: Final = Kind(_ANY_TEXT, write=str)
SECRET: Final = Kind(_ANY_TEXT, write=lambda value: "(secret)")
URL: Final = Kind(_URL_TEXT, write=str)
DURATION: Final = Kind(_string(r"^[0-9]{1,12}(\.[0-9]{1,9})?(ms|s|m|h|d)$"), "_s", duration)
SIZE: Final = Kind(_string(r"^[0-9]{1,12}(\.[0-9]{1,9})?(B|KB|MB|GB|KiB|MiB|GiB)$"), "_bytes", size)
FLAG: Final = Kind({"type": "boolean"})
SHARE: Final = Kind({"type": "number", "minimum": 0, "maximum": 1})
ADDRESS: Final = Kind(_ADDRESS_TEXT, write=str)
ADDRESSES: Final = Kind(
    {"anyOf": [_ADDRESS_TEXT, {"type": "array", "items": _ADDRESS_TEXT, "minItems": 1}]}, write=_first_or_all
)
STORE: Final = Kind(_string("^(sqlite:.|https?://|rediss?://)"), write=str)


# --- the settings

TLS: Final = Section(
    "The listener's certificate, PEM files that are read again when they change.",
    TlsConfig(Path("tls.crt"), Path("tls.key")),
    (
        Setting("certificate", FILE, "The PEM file of the certificate and its chain.", "tls.crt"),
        Setting("private_key", FILE, "The PEM file of the private key.", "tls.key"),
    ),
    required=("certificate", "private_key"),
)

SERVER: Final = Section(
    "The listeners, and what one client may cost.",
    ServerConfig(),
    (
        Setting(
            "listen",
            ADDRESSES,
            'Where clients connect: "host:port", "unix:PATH", or a list. A change needs a restart.',
        ),
        Setting(
            "admin",
            ADDRESS,
            "Health, metrics and the status page. No key is asked there: keep it off public addresses. A change needs "
            "a restart.",
        ),
        Setting("max_body", SIZE, "The largest body of a request; a larger one is a 413. Too small refuses images."),
        Setting(
            "body_memory",
            SIZE,
            "All bodies together; a 503 when it is spent. Keep it under the machine's memory, and not under max_body.",
        ),
        Setting("header_timeout", DURATION, "For the whole head of a request, from its first byte."),
        Setting("body_timeout", DURATION, "Between two reads of a body. Too short cuts uploads over bad links."),
        Setting(
            "client_idle_timeout",
            DURATION,
            "Between two requests of a connection. Keep it above that of the balancer in front.",
        ),
        Setting(
            "min_client_rate",
            SIZE,
            'A second: a client that reads slower for long is cut. "0B" never cuts.',
            field="min_client_rate_bytes_per_s",
        ),
        Setting(
            "max_connections",
            _count(10**7),
            "Connections of clients; absent: just under half the limit of open files, as a stream holds two.",
            10_000,
        ),
        Setting(
            "drain_timeout",
            DURATION,
            "How long a stop waits for running answers before it cuts them. Keep the supervisor's patience above it.",
        ),
        Setting(
            "shutdown_delay",
            DURATION,
            "At a stop, how long new requests are still taken. Shorter than the balancer's probe interval loses some.",
        ),
        Setting("tls", _table(TLS), TLS.text, {"certificate": "tls.crt", "private_key": "tls.key"}),
        Setting(
            "trusted_proxies",
            TEXTS,
            "Networks whose X-Forwarded-For is believed. Anyone there can claim any client address.",
            ["10.0.0.0/8"],
        ),
    ),
)

KEYS: Final = Section(
    "How an API key is looked up.",
    KeysConfig(KeyStoreAddress(Path("edge.db"))),
    (
        Setting(
            "store",
            STORE,
            "`sqlite:FILE`, made by `edge keys create`; the URL of a token introspection server (RFC 7662), which gets "
            "each key; or that of a Redis. A change needs a restart.",
        ),
        Setting(
            "cache_ttl",
            DURATION,
            "How long an answer is believed when no news of a change comes. An introspection server tells of none: "
            "there a revoked key may still work this long.",
        ),
        Setting(
            "negative_ttl",
            DURATION,
            'The same for "unknown": with an introspection server a new key may still be refused this long.',
        ),
        Setting("stale_for", DURATION, "While the store is down, known keys go on this long."),
        Setting("cache_entries", _count(10**9), "Keys remembered, known and unknown ones each; about 1 kB each."),
        Setting(
            "store_timeout",
            DURATION,
            "How long a look-up may take before the store counts as down: known keys go on, unknown ones get a 503. "
            "Requests with a new key wait that long.",
        ),
        Setting("store_token", SECRET, "The bearer token that an introspection server asks for.", "${SET}"),
        Setting("store_token_file", FILE, "A file that holds store_token and nothing else.", "secret", ""),
        Setting("store_client_id", TEXT, "The name for HTTP Basic at an introspection server.", "edge"),
        Setting("store_client_secret", SECRET, "The password that belongs to store_client_id.", "${SET}"),
        Setting("store_client_secret_file", FILE, "A file that holds store_client_secret.", "secret", ""),
        Setting("store_ca_file", FILE, "A PEM file with the authority of a store at https or rediss.", "tls.crt"),
    ),
)

JWT: Final = Section(
    "Tokens that an issuer signed, instead of keys. Needs the extra `jwt`.",
    JwtConfig("", "", ""),
    (
        Setting("issuer", TEXT, "The `iss` of its tokens; a token that names another one is looked up as a key."),
        Setting("audience", TEXT, "The `aud` that they must have: tokens made for something else are refused."),
        Setting("jwks", TEXT, "The URL or the file of the issuer's public keys (RFC 7517)."),
        Setting(
            "algorithms",
            Kind(
                {"type": "array", "items": {"type": "string", "enum": list(ALGORITHMS)}, "minItems": 1},
                write=TEXTS.write,
            ),
            "How tokens may be signed.",
        ),
        Setting("user_claim", TEXT, "The claim that names the user, `u-...`."),
        Setting(
            "allow_claim",
            TEXT,
            "The claim that lists the models a token opens, as patterns; without one: what a key opens.",
            "models",
        ),
        Setting("leeway", DURATION, "How far the issuer's clock and this one may differ; tokens live as much longer."),
        Setting(
            "jwks_ttl",
            DURATION,
            "How often the keys are fetched; also at once when a token names an unknown one, at most every 10 s. A key "
            "that was withdrawn proves tokens this long.",
        ),
        Setting("ca_file", FILE, "A PEM file with the authority of a jwks at https.", "tls.crt"),
    ),
    required=("issuer", "audience", "jwks"),
)

USAGE: Final = Section(
    "The record of what was used: two lines a request. A change needs a restart.",
    UsageConfig(Path("usage")),
    (
        Setting("journal", FILE, "The directory of the records, of every process on this machine."),
        Setting(
            "rotate", SIZE, "A new file at this size, and every day. Nothing deletes old ones.", field="rotate_bytes"
        ),
        Setting(
            "when_full",
            _choice(WHEN_FULL),
            "When the journal cannot be written: serve, the records waiting in memory, where a crash loses them, or "
            "refuse with a 503.",
        ),
        Setting(
            "sink",
            Kind(_string("^(https?|rediss?)://"), write=lambda url: url.partition("://")[0]),
            "Where records are shipped, at least once: a Redis (the stream `edge:usage`) or a URL that takes batches. "
            "It can be down for as long as the disk holds.",
            "redis://:${SET}@127.0.0.1:6379/0",
        ),
        Setting("sink_token", SECRET, "The bearer token of a sink at http or https.", "${SET}"),
        Setting("sink_token_file", FILE, "A file that holds sink_token and nothing else.", "secret", ""),
        Setting("sink_ca_file", FILE, "A PEM file with the authority of a sink at https or rediss.", "tls.crt"),
    ),
)

LIMIT: Final = Section(
    "How much one user, or one key, may do at each route that names it.",
    LimitConfig(""),
    (
        Setting("per", _choice(LIMITS_PER), "Whose requests are counted together: all of a user's, or of one key."),
        Setting(
            "requests_per_minute",
            _count(10**9),
            "Requests in a sliding minute; absent: no limit. Clients that retry count each try.",
            60,
        ),
        Setting(
            "tokens_per_minute",
            _count(10**12),
            "Tokens in a sliding minute, of prompts and answers; absent: no limit. An answer may use more than was "
            "reserved for it, when its request names no max_tokens.",
            100_000,
        ),
        Setting(
            "concurrent_requests",
            _count(10**6),
            "Requests at once; absent: no limit. A stream is one for as long as it runs.",
            8,
        ),
    ),
    any_of=LIMITED,
)

SHARED: Final = Section(
    "What processes share. A change needs a restart.",
    SharedConfig(),
    (
        Setting(
            "redis",
            Kind(_string("^rediss?://"), write=lambda url: "(secret)"),
            "A Redis or Valkey: limits count for all processes together, and `POST /keys/purge` at one reaches all. "
            "While it is down each process counts alone. Needs the extra `redis`.",
            "redis://:${SET}@127.0.0.1:6379/0",
        ),
    ),
)

ENDPOINT: Final = Section(
    "One server of a pool.",
    EndpointConfig(Url("http", "10.0.0.1", 8000)),
    (
        Setting("url", URL, "Its address; a path in it replaces /v1.", "http://10.0.0.1:8000"),
        Setting("weight", _count(1000), "Its share of the pool's load, against that of the others."),
        Setting("model", TEXT, "The model's name that it wants; absent: that of the route, or as asked.", "r1"),
        Setting("api_key", SECRET, "The key that it asks for, in visible ASCII. Better a variable.", "${SET}"),
        Setting(
            "api_key_file",
            FILE,
            "A file that holds api_key and nothing else; read again when it changes.",
            "secret",
            "",
        ),
    ),
    required=("url",),
)

HEALTH: Final = Section(
    "Probes of the pool's endpoints; absent: they are judged by their answers alone.",
    HealthConfig(),
    (
        Setting(
            "path", TEXT, 'The path that is asked; absent: the engine\'s own. The engine "openai" has none.', "/health"
        ),
        Setting("interval", DURATION, "Between two probes of an endpoint."),
    ),
)

POOL: Final = Section(
    "Servers of which any can answer.",
    PoolConfig("", ()),
    (
        Setting(
            "endpoints",
            Kind(
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {"anyOf": [{**_URL_TEXT, "description": ENDPOINT.text}, ENDPOINT.schema()]},
                },
                write=lambda endpoints: [str(endpoint.url) for endpoint in endpoints],
            ),
            "The servers: URLs, or tables with a weight, a model or a key. A path in a URL replaces /v1.",
            ["http://10.0.0.1:8000"],
        ),
        Setting(
            "balance",
            _choice(BALANCES),
            "Which endpoint is next: the less loaded of two, each in turn, or the one that knows the conversation.",
        ),
        Setting(
            "engine",
            _choice(ENGINES),
            'What runs there. "openai" is a hosted API: its tokenize is under its base, that of engines at their root.',
        ),
        Setting("connect_timeout", DURATION, "For a connection, TLS included."),
        Setting(
            "first_byte_timeout",
            DURATION,
            "To the first byte of the answer's body. Long prompts queue: too short cuts honest answers.",
        ),
        Setting(
            "idle_timeout",
            DURATION,
            "After the first byte, between two reads. An upstream is cut between this and a quarter more.",
        ),
        Setting("ca_file", FILE, "A PEM file with the authority of https endpoints.", "tls.crt"),
        Setting(
            "retry_within",
            DURATION,
            'A 429, 502, 503 or 504 that came within this is retried at another endpoint; "0s" never. A late one may '
            "have cost the engine's work.",
        ),
        Setting(
            "retry_after_send",
            FLAG,
            "Retry also when a connection died with the request on it. A prompt that crashes one engine goes on to the "
            "next.",
        ),
        Setting(
            "retry_budget",
            SHARE,
            "Retries at once, as a share of the pool's live requests (three are always allowed). A large one doubles "
            "the load of a pool that is down.",
        ),
        Setting("health", _table(HEALTH), HEALTH.text, {"path": "/health", "interval": "5s"}),
        Setting(
            "max_inflight",
            _count(10**6),
            "The most requests in flight at each endpoint, whichever pool they came through; absent: no cap. Below "
            "what the engine batches it leaves the engine idle.",
            64,
        ),
        Setting(
            "queue",
            _count(10**5),
            "Requests that wait when all endpoints are full, users taking turns; absent: none. Each holds its body in "
            "memory, and a long queue is only a slower 503.",
            100,
        ),
        Setting(
            "dns",
            Kind(_ADDRESS_TEXT, write=lambda url: url.authority),
            "A name and a port in place of endpoints: every address of the name is a member, over plain HTTP. Changes "
            "are followed within some seconds; the last good answer goes on while DNS fails.",
            "vllm.pool.svc:8000",
        ),
        Setting("queue_timeout", DURATION, "How long a request waits for its turn before it gets a 503."),
        Setting(
            "usage",
            _choice(POOL_USAGES),
            "Where a metered stream says what it used: at its end, where a client that leaves before is estimated by "
            "the frames it got, or in every frame, exact for those too. The latter costs some microseconds a frame.",
        ),
    ),
    one_of=("endpoints", "dns"),
)

ROUTE: Final = Section(
    "The models of one name, or of a prefix that ends in `*`, and where they go.",
    RouteConfig("", ""),
    (
        Setting(
            "match",
            TEXT,
            "The name or prefix instead of the table's, so that one has a route per host.",
            "x/*",
            "pattern",
        ),
        Setting("pool", TEXT, "The pool that answers: this or instance.", "deepseek-r1"),
        Setting(
            "instance",
            URL,
            "The URL of a user's own instance: this or pool. {owner} and {service} come from the model's name.",
            "http://{service}.{owner}.svc.cluster.local:8000",
        ),
        Setting(
            "model",
            TEXT,
            "The name sent upstream, {owner} and {service} filled in; absent: as asked. Answers carry it too, unless "
            "model_echo.",
            "deepseek-ai/DeepSeek-R1",
        ),
        Setting(
            "hosts",
            Kind({**TEXTS.schema, "minItems": 1}, write=TEXTS.write),
            "The hosts it is served at; absent: any. Lower case, without port; `*` is one label, `!name` excludes.",
            ["*.d.run", "!chat.d.run"],
        ),
        Setting("list", TEXTS, "The names that a prefix route shows in `models`.", ["public/deepseek-r1"]),
        Setting(
            "heartbeat",
            DURATION,
            'A comment after this silence of a stream, so that proxies keep it open; "0s" for none. One before the '
            "answer makes its status 200, and no other endpoint is asked: keep it above retry_within.",
        ),
        Setting(
            "model_echo",
            FLAG,
            "Answers carry the model's name that was asked, also in events. Some microseconds of CPU an event. A false "
            "that is written says that another name is meant.",
        ),
        Setting(
            "metered",
            FLAG,
            "Billed by token: streams of text are asked for their usage, which is hidden from clients that did not ask "
            "for it. Every other route is recorded with what its upstream says unasked.",
        ),
        Setting("limit", TEXT, "One of the tables of limits; instances have none.", "standard"),
    ),
    one_of=("pool", "instance"),
)

SECTIONS: Final[Mapping[type, Section]] = {
    type(section.absent): section
    for section in (SERVER, TLS, KEYS, JWT, USAGE, SHARED, LIMIT, POOL, ENDPOINT, HEALTH, ROUTE)
}


def routes_schema() -> dict[str, object]:
    """Return the JSON Schema of a routes.toml."""
    limits = {"type": "object", "description": LIMIT.text, "additionalProperties": LIMIT.schema()}
    pools = {"type": "object", "description": POOL.text, "additionalProperties": POOL.schema()}
    routes = {"type": "object", "description": ROUTE.text, "minProperties": 1, "additionalProperties": ROUTE.schema()}
    return {
        "$schema": _DRAFT,
        "title": "routes.toml",
        "description": "The routes of the edge. `edge check` finds what this schema cannot.",
        "type": "object",
        "additionalProperties": False,
        "required": ["routes"],
        "properties": {
            "server": SERVER.schema(),
            "keys": KEYS.schema(),
            "jwt": JWT.schema(),
            "usage": USAGE.schema(),
            "shared": SHARED.schema(),
            "limits": limits,
            "pools": pools,
            "routes": routes,
        },
    }


def render() -> str:
    """Return the schema as the text of `routes.schema.json`."""
    return json.dumps(routes_schema(), indent=2, ensure_ascii=False) + "\n"
