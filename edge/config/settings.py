"""Settings of what is asked upstream, each declared once; `Config` is a whole file that was read and is valid.

Names in the file have no unit, since their values carry one (`connect_timeout = "2s"`); the fields here do.
A new setting is declared here, or in `process_settings.py` if it is the process's own; `edge schema` and `edge schema
--manual` print the rest, and its golden case is made of the declaration. What settings mean together is in `rules.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, Literal

from edge.config import delays, kinds, values
from edge.config.problems import Problem
from edge.config.process_settings import JwtConfig, KeysConfig, ServerConfig, SharedConfig, UsageConfig
from edge.config.values import Url
from edge.config.zones import check_zone
from edge.names import check_host_pattern, check_model_name

Balance = Literal["cache-aware", "least-loaded", "round-robin"]
Engine = Literal["vllm", "sglang", "llamacpp", "openai"]
LimitPer = Literal["user", "key"]
PoolUsage = Literal["final", "continuous"]
Resume = Literal["off", "replay", "content", "auto"]

WITHOUT_HEALTH_PATH: Final[frozenset[Engine]] = frozenset({"openai"})  # engines whose probe needs a path from the file


# fmt: off
# A setting is its name, type and kind on the first line, then its text, and its default at the end.


@dataclass(frozen=True, slots=True)
class LimitConfig:
    """How much one user, or one key, may do at each route that names it."""

    name: str
    per: Annotated[LimitPer, kinds.choice(
        "Whose requests are counted together: all of a user's, or those of one key.", LimitPer)] = "user"
    requests_per_minute: Annotated[int | None, kinds.count(
        "Requests in a sliding minute. Absent: no limit. Each retry of a client counts.",
        10**9, example=60, among="some")] = None
    tokens_per_minute: Annotated[int | None, kinds.count(
        "Tokens of prompts and answers in a sliding minute. Absent: no limit. They are reserved when a request begins "
        "and corrected when it ends: an answer may use more than was reserved for it, and the next ones wait for that.",
        10**12, example=100_000, among="some")] = None
    reserve_at_most: Annotated[int | None, kinds.count(
        "Tokens reserved for an answer at most, however large its max_tokens is. Absent: as many as the latest answers "
        "took on average, at least 256. Too large a number refuses agents that ask for much and use little; too small "
        "a one lets more run at once than the limit has tokens for.", 10**12, example=2000)] = None
    concurrent_requests: Annotated[int | None, kinds.count(
        "Requests at once. Absent: no limit. A stream counts for as long as it runs.", 10**6, example=8, among="some"
    )] = None
    requests_per_day: Annotated[int | None, kinds.count(
        "Requests from one midnight to the next. Absent: no limit.", 10**12, example=10_000, among="some")] = None
    tokens_per_day: Annotated[int | None, kinds.count(
        "Tokens from one midnight to the next, as those of a minute. Absent: no limit.",
        10**14, example=5_000_000, among="some")] = None
    tokens_per_month: Annotated[int | None, kinds.count(
        "Tokens of a month. Absent: no limit. What was used is kept over restarts: by `shared`, else by the journal, "
        "as far as its files are kept.", 10**14, example=100_000_000, among="some")] = None
    time_zone: Annotated[str, kinds.text(
        "Whose midnights begin days and months.", check_zone, example="Asia/Shanghai")] = "UTC"
    smooth: Annotated[bool, kinds.flag(
        "Spreads a minute over its seconds: a sixtieth at once, then each as it is due. Bursts are refused then, and "
        "wait where `wait` lets them.")] = False
    wait_s: Annotated[float | None, kinds.duration(
        "How long a request that is over the limit waits for its turn before it gets a 429; `Prefer: wait=20` of a "
        'client asks for another time, up to a minute. Absent: none waits that does not ask for it; "0s": none at all. '
        "It waits as one of the `queue` of the pool, and never without one. Too long a time outlasts clients.",
        zero=True, example="20s")] = None
    share: Annotated[int | None, kinds.count(
        "The tokens that a user is given in the queue of a pool, against those of others who wait there. Absent: 1. "
        "A key may have a share of its own; that of the key's limit goes before that of the route's.",
        1000, example=4, among="some")] = None


# What pools and routes with an instance have both, declared once.
_EngineChoice = Annotated[Engine, kinds.choice(
    'What runs there. "openai" is a hosted API: its tokenize is under its base, that of engines at their root.',
    Engine)]
_ConnectTimeout = Annotated[float, kinds.duration("For a connection, TLS included.")]
_MaxConnectionAge = Annotated[float, kinds.duration(
    "How long a connection is used again, less up to a fifth at random; a twelfth of it after 64 requests. Too long a "
    "time leaves a server that was added behind a name idle; too short a one costs a handshake a request.")]
_FirstByteTimeout = Annotated[float, kinds.duration(
    "To the first byte of the answer's body. Long prompts queue: too short a time cuts good answers.")]
_IdleTimeout = Annotated[float, kinds.duration(
    "Between two reads after the first byte. An upstream is cut between this time and a quarter more.")]


@dataclass(frozen=True, slots=True)
class EndpointConfig:
    """One server of a pool."""

    url: Annotated[Url, kinds.parsed(
        "Its address. A path in it replaces /v1; a mere / is the root, as in http://10.0.0.1:7997/.",
        values.parse_url, "URL", "://", str, example="http://10.0.0.1:8000")]
    weight: Annotated[int, kinds.count("Its share of the pool's load, against the weights of the others.", 1000)] = 1
    model: Annotated[str | None, kinds.text(
        "The model's name that it expects. Absent: that of the route, or as asked.",
        values.check_upstream_name, example="r1")] = None
    api_key: Annotated[str | None, kinds.secret(
        "The key that it asks for, in visible ASCII. Better a variable or a file.")] = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class HealthConfig:
    """Probes of the pool's endpoints. Absent: they are judged by their answers alone."""

    path: Annotated[str | None, kinds.text(
        "The path that is asked for. Absent: the engine's own. A hosted API, `openai`, has none.",
        values.check_path, example="/health")] = None
    interval_s: Annotated[float, kinds.duration("Between two probes of an endpoint.")] = 5


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """Servers of which any can answer."""

    name: str
    endpoints: Annotated[tuple[EndpointConfig, ...], kinds.servers(
        "The servers: URLs, or tables with a weight, a model or a key. A path in a URL replaces /v1; a mere / is the "
        "root.",
        EndpointConfig, example=["http://10.0.0.1:8000"], among="one")] = ()
    balance: Annotated[Balance, kinds.choice(
        "Which endpoint is next: the one with least to do before the first token, where it has cached a part of the "
        "prompt; the less loaded of two, as for requests without a prompt; or each in turn. `prefix-affinity` is the "
        "former name of the first.",
        Balance, renamed={"prefix-affinity": "cache-aware"})] = "cache-aware"
    share_prefixes: Annotated[bool, kinds.flag(
        "`cache-aware` looks for what other users asked too, such as a system's text that all of them have. How soon "
        "an answer comes may then show a user how the prompts of others begin.")] = False
    engine: _EngineChoice = "vllm"
    connect_timeout_s: _ConnectTimeout = 2
    max_connection_age_s: _MaxConnectionAge = 60
    first_byte_timeout_s: _FirstByteTimeout = 300
    idle_timeout_s: _IdleTimeout = 120
    ca_file: Annotated[Path | None, kinds.file(
        "A PEM file with the authority of https endpoints.", example="tls.crt")] = None
    retry_within_s: Annotated[float, kinds.duration(
        'A 404, 429, 502, 503, 504 or 529, or an answer that does not take the edge (a 401, 402, 403, 407, 409, 421 or '
        'redirect), is retried at another endpoint within this time; "0s" never retries. A later one may have cost the '
        "engine's work.", zero=True)] = 2
    retry_after_send: Annotated[bool, kinds.flag(
        "Retries also when a connection was lost with the request on it. A prompt that crashes one engine then goes "
        "to the next.")] = False
    retry_budget: Annotated[float, kinds.share(
        "Retries at once, as a share of the pool's live requests (three are always allowed). A large share doubles "
        "the load of a pool that is down.")] = 0.2
    hedge_after: Annotated[delays.Delay | None, kinds.parsed(
        "A stream of `chat/completions`, `completions` or `messages`, asked with up to 16KiB, whose first byte takes "
        "longer is asked of a second endpoint too, within the budget of retries and while none waits in the queue: the "
        'one that begins first answers, the other is cut. "p95" is measured by the pool itself. Absent: never. Both '
        "may read the prompt, so too short a time doubles the load.",
        delays.parse_delay, 'duration or "p95"', delays.DELAY_PATTERN, delays.write_delay, example="p95")] = None
    health: Annotated[HealthConfig | None, kinds.table(
        HealthConfig, example={"path": "/health", "interval": "5s"})] = None
    max_inflight: Annotated[int | None, kinds.count(
        "The most requests in flight at each endpoint, from all pools together. Absent: no cap. A cap below what the "
        "engine batches leaves the engine idle.", 10**6, example=64)] = None
    queue: Annotated[int, kinds.count(
        "Requests that wait when all endpoints are full, users in turn. Absent: none waits. Each holds its body in "
        "memory, and a long queue only delays the 503.", 10**5, example=100)] = 0
    queue_timeout_s: Annotated[float, kinds.duration(
        "How long a request waits in the queue before it gets a 503.")] = 10
    allow_members: Annotated[tuple[str, ...], kinds.texts(
        "Members of a body that are refused or dropped with this engine, and that callers of this pool may send: they "
        "steer the engine, past what the edge limits and records.",
        values.check_member, example=["cache_salt"])] = ()
    refuse_members: Annotated[tuple[str, ...], kinds.texts(
        "Further members of a body that are refused with a 400, such as those of a plugin or of a newer release.",
        values.check_member, example=["mm_processor_kwargs"])] = ()
    dns: Annotated[Url | None, kinds.parsed(
        "A name and a port in place of endpoints: every address of the name is a member, over plain HTTP. Changes are "
        "followed within seconds; while DNS fails the last good answer is kept.",
        values.parse_dns, "name and port", ":", lambda url: url.authority, example="vllm.pool.svc:8000", among="one"
    )] = None
    usage: Annotated[PoolUsage, kinds.choice(
        'Where a metered stream states its usage. "final": at its end; when the client leaves before, usage is '
        'estimated by the frames sent. "continuous": in every frame, exact also then, for some microseconds a frame.',
        PoolUsage)] = "final"
    resume: Annotated[Resume, kinds.choice(
        'What becomes of a stream of `chat/completions` or `completions` whose server dies. "replay": another endpoint '
        'is asked the same, and what the client has is dropped, for requests at temperature 0 or with a seed. '
        '"content": another one goes on behind the text. "auto": content where that is exact, else replay. "off": it '
        "ends with an error. See docs/resume.md for what is exact, and what is refused.", Resume)] = "off"
    resume_at_most: Annotated[int, kinds.count(
        "The most tokens that are generated again for a stream. It waits for as long as they take.", 10**6)] = 2000
    resume_memory_bytes: Annotated[int, kinds.size(
        "What is kept of a stream that may have to go on elsewhere, out of body_memory. A longer one ends with an "
        "error as it would otherwise.", most_bytes=2 * 2**20)] = 512 * 2**10


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """The models of one name, or of a prefix that ends in `*`, and where they go.

    Its timeouts, `engine`, `max_inflight` and `usage` are those of an instance; a pool has its own.
    """

    name: str
    pattern: Annotated[str, kinds.name(
        "The name or prefix instead of the table's own, for several routes of one name, each at its hosts.",
        check_model_name, key="match", example="x/*")] = ""
    pool: Annotated[str | None, kinds.text(
        "The pool that answers. Write this or instance.", example="deepseek-r1", among="one")] = None
    instance: Annotated[str | None, kinds.text(
        "The URL of a user's own instance. Write this or pool. {owner} and {service} come from the model's name. A "
        "path replaces /v1; a mere / is the root.",
        values.check_instance, like="://", example="http://{service}.{owner}.svc.cluster.local:8000", among="one"
    )] = None
    model: Annotated[str | None, kinds.text(
        "The name sent upstream, with {owner} and {service} filled in. Absent: as asked. Answers carry it too, unless "
        "model_echo is true.", values.check_upstream_template, example="deepseek-ai/DeepSeek-R1")] = None
    hosts: Annotated[tuple[str, ...], kinds.texts(
        "The hosts it is served at. Absent: any. Lower case, without port; `*` is one label, `!name` excludes.",
        check_host_pattern, empty='an empty list: remove it for any host, or write hosts = ["chat.d.run"]',
        example=["*.d.run", "!chat.d.run"])] = ()
    list: Annotated[tuple[str, ...], kinds.texts(
        "The names that a prefix route shows in `models`.", example=["public/deepseek-r1"])] = ()
    heartbeat_s: Annotated[float, kinds.duration(
        'A stream gets a comment (`messages` a ping) after this silence, so that proxies keep it open; "0s" for none. '
        "One before the answer makes its status 200: no other endpoint is asked after it, an error is an event, and an "
        "answer that is no stream fails. Keep it above retry_within and the time in which upstreams refuse. "
        "fetch-event-source (npm) gives its program a comment as a message without data.",
        zero=True)] = 0
    model_echo: Annotated[bool, kinds.flag(
        "Answers carry the model's name as asked: JSON up to 1 MiB and events of streams, for some microseconds of "
        "CPU an event; an answer with a content encoding is left as it is. A written false confirms that another name "
        "is meant.")] = False
    metered: Annotated[bool, kinds.flag(
        "Billed by token: streams of text are asked for their usage, which is hidden from clients that did not ask "
        "for it. Every other route is recorded with what its upstream reports unasked.")] = False
    limit: Annotated[str | None, kinds.text("A table of limits; instances have none.", example="standard")] = None
    context_length: Annotated[int | None, kinds.count(
        "How many tokens the model takes, for UIs that read it in `models`. Absent: what the pool's server says.",
        10**9, example=131_072)] = None
    engine: _EngineChoice = "vllm"
    connect_timeout_s: _ConnectTimeout = 2
    max_connection_age_s: _MaxConnectionAge = 60
    first_byte_timeout_s: _FirstByteTimeout = 600  # as long as the SDKs of OpenAI and Anthropic wait
    idle_timeout_s: _IdleTimeout = 300
    max_inflight: Annotated[int | None, kinds.count(
        "The most requests in flight at each instance; a further one gets a 503. Absent: no cap. A cap below what the "
        "engine batches leaves the engine idle.", 10**6, example=64)] = None
    usage: Annotated[PoolUsage | None, kinds.choice(
        'Streams of text are asked for their usage, hidden from clients that did not ask for it: "final" at their end, '
        '"continuous" in every frame. Absent: an instance is recorded with what it reports unasked.',
        PoolUsage, example="final")] = None


@dataclass(frozen=True, slots=True)
class Config:
    """The routes of the edge. `edge check` finds what this schema cannot.

    `watched` is every secret, TLS and CA file that the file names, `digest` the SHA-256 of the file.
    """

    path: Path
    server: Annotated[ServerConfig, kinds.Section(ServerConfig)]
    keys: Annotated[KeysConfig, kinds.Section(KeysConfig)]
    jwt: Annotated[JwtConfig | None, kinds.Section(JwtConfig, restart="presence")]
    usage: Annotated[UsageConfig, kinds.Section(UsageConfig, restart="value")]
    shared: Annotated[SharedConfig, kinds.Section(SharedConfig, restart="value")]
    limits: Annotated[Mapping[str, LimitConfig], kinds.Section(LimitConfig, is_named=True)]
    pools: Annotated[Mapping[str, PoolConfig], kinds.Section(PoolConfig, is_named=True)]
    routes: Annotated[tuple[RouteConfig, ...], kinds.Section(RouteConfig, is_named=True)]
    digest: str = ""
    watched: tuple[Path, ...] = ()
    warnings: tuple[Problem, ...] = ()

    def keeping(self, before: "Config") -> "Config":
        """Return the same with the pools and routes of another that are equal: a reload then makes what it changes."""
        known = {route.name: route for route in before.routes}
        routes = tuple(known[each.name] if known.get(each.name) == each else each for each in self.routes)
        pools = {
            name: before.pools[name] if before.pools.get(name) == each else each for name, each in self.pools.items()
        }
        return replace(self, routes=routes, pools=MappingProxyType(pools))
