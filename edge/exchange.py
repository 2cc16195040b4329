"""The facts of one request with its response.

The proxy sets what was asked and where it went, the relay what came of it. `Exchange.ended` alone says how it ended.
No dict of extras and no context variables: whoever wants to know something of a request finds it here by name.
Modules that every request passes keep the members of enumerations under names of their own: to look one up on its class
takes ten times as long, 0.1 us each time (CPython 3.11).
Times are seconds of `time.monotonic` (uvloop's own clock ticks in milliseconds), except `started_at`: Unix time.
"""

import copy
import enum
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import msgspec

from edge.errors import NO_LIMIT
from edge.operations import UNKNOWN, Operation
from edge.traces import Trace


class Phase(enum.Enum):
    """How far a request has come."""

    CREDENTIAL = "credential"
    BODY = "body"
    ROUTE = "route"
    ADMISSION = "admission"
    LEASE = "lease"
    WAIT = "wait"
    STREAM = "stream"
    DONE = "done"


class End(enum.Enum):
    """How a request ended; the closed vocabulary of the log, the metrics and the usage records."""

    __hash__ = object.__hash__  # a member is only itself; enum's own is a Python call for each look-up

    COMPLETE = "complete"
    REFUSED = "refused"
    CLIENT_GONE = "client_gone"
    UPSTREAM_CUT = "upstream_cut"
    UPSTREAM_ERROR = "upstream_error"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    SLOW_CLIENT = "slow_client"
    DRAINED = "drained"
    INTERNAL_ERROR = "internal_error"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a credential proved to be: the record that every key store yields.

    `user` is the namespace (`u-1100a15812cc`), `expires_at` Unix seconds; `limit` names a table of `[limits]`;
    `share` is that of the user in the queue of a pool, None for the one of a limit.
    """

    id: str
    user: str
    name: str = ""
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    enabled: bool = True
    suspended: bool = False
    out_of_quota: bool = False
    expires_at: float | None = None
    limit: str | None = None
    share: int | None = None

    def has_expired(self, now: float) -> bool:
        """Return whether it has ended by the Unix time `now`."""
        return self.expires_at is not None and self.expires_at <= now


class Credential(NamedTuple):
    """What a request shows, the `Authorization` it came in ("" when in another header), and its SHA-256."""

    header: str
    key: str
    digest: bytes

    def __repr__(self) -> str:
        return "<Credential>"


NO_CREDENTIAL: Final = Credential("", "", b"")


class UsageSource(enum.Enum):
    """Where the counts of a record come from; the closed vocabulary of `usage_source`."""

    FINAL = "final"  # the upstream's own, of a whole answer
    RUNNING = "running"  # the upstream's own, up to where the answer was cut
    ESTIMATED = "estimated"  # ours: the frames that passed, the bytes that were asked
    NONE = "none"  # nothing was used, or nothing is known of it


Unit = Literal["images", "seconds", "characters"]


class Usage(msgspec.Struct, frozen=True):
    """What an answer used, in tokens, or in `units` of the kind `unit`, None where it has none.

    The prompt includes what a cache gave (`cached_tokens`, None where the upstream does not say) and what was written
    to one (`cache_creation_tokens`).
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    reasoning_tokens: int = 0
    units: int = 0
    source: UsageSource = UsageSource.NONE
    unit: Unit | None = None
    cache_creation_tokens: int = 0


NO_USAGE: Final = Usage()


class Choice(msgspec.Struct, frozen=True):
    """Why a `cache-aware` pool chose an endpoint: its score was the lowest; `next_score` is of the one after it.

    `hit_percent` of the prompt it was taken to have cached, `backlog_bytes` it had to read first. `load` is how
    many requests it had in flight.
    """

    hit_percent: int
    backlog_bytes: int
    load: int
    score: int
    next_score: int | None


class Tried(msgspec.Struct, frozen=True):
    """An endpoint that was asked, and what came of it.

    `status` is what it answered, 0 for nothing; `outcome` an `End`, or one of the words of `edge/judgement.py`; `error`
    how it put it, or what befell the connection, "" for none.
    """

    endpoint: str
    status: int
    outcome: str
    error: str
    duration_ms: float


@dataclass(slots=True, eq=False)
class Hedged:
    """What became of asking a second endpoint as the first was slow, in a word.

    `won`: the second one began first. `lost`: the first one did, or refused the request. `failed`: the second one did,
    and the first was waited for. `room`: a request needed the second one's place. `left`: the request ended before.
    Else it was not asked, as there was no `budget` or `member` for it, or a `queue`. `asked_at` is when the first was
    asked, 0.0 where no second one was.
    """

    outcome: str
    asked_at: float = 0.0


@dataclass(slots=True, eq=False)
class Exchange:
    """One request through its life. No `Struct`: a store into a field of one takes ten times as long.

    `asked_at` is when the last endpoint was asked, 0.0 for none. `waited_s` is the time before that which was not the
    edge's own: for the body, `queued_s` for its limits or a place in the pool, and for an endpoint that another one
    outran. `limit` is which limit refused the request, and what of it was used up. `failures` are the attempts that
    failed, None without any.
    """

    request_id: str
    method: str
    started_at: float
    begun: float
    path: str = ""
    operation: Operation = UNKNOWN
    host: str = ""
    client: str = ""
    phase: Phase = Phase.CREDENTIAL
    principal: Principal | None = None
    model: str = ""
    stream: bool = False
    route: str = ""
    pool: str = ""
    endpoint: str = ""
    choice: Choice | None = None
    upstream_model: str = ""
    upstream_id: str = ""  # of the last attempt: what the upstream's own log has
    upstream_status: int = 0  # of an answer that is an error, and how its body begins
    upstream_error: str = ""
    request_bytes: int = 0
    response_bytes: int = 0
    retries: int = 0
    replays: int = 0
    status: int = 0
    end: End | None = None
    first_byte: float = 0.0
    silent_since: float = 0.0  # by the loop's clock, for heartbeats: the client has got nothing
    finished: float = 0.0
    error: str = ""
    limit_headers: bytes = b""
    asked_at: float = 0.0
    waited_s: float = 0.0
    queued_s: float = 0.0
    limit: tuple[str, str] = NO_LIMIT
    failures: list[Tried] | None = None
    trace: Trace | None = None
    tells_timing: bool = False  # what took its time, to the caller
    usage: Usage = NO_USAGE
    resumes: int = 0  # of a stream that broke and went on elsewhere
    resume: str = ""  # what became of that, or why it was not tried
    resumed_from: str = ""  # the endpoint that broke
    resumed_usage: Usage | None = None  # as the second endpoint told it
    hedge: Hedged | None = None

    @contextmanager
    def queueing(self) -> Iterator[None]:
        """Note how long it waits for its turn."""
        since = time.monotonic()
        try:
            yield
        finally:
            waited_s = time.monotonic() - since
            self.queued_s += waited_s
            self.waited_s += waited_s

    @property
    def hedges(self) -> int:
        """How many endpoints were asked beside one that was slow: 1 at most."""
        return 1 if self.hedge is not None and self.hedge.asked_at else 0

    @property
    def has_failed_last(self) -> bool:
        """Whether the last attempt is one of `failures`."""
        return self.failures is not None and len(self.failures) > self.retries + self.hedges

    def of_another_attempt(self) -> "Exchange":
        """Return a copy, for what comes of an attempt beside the one that is the request's."""
        other = copy.copy(self)
        other.phase, other.end, other.first_byte, other.failures = Phase.LEASE, None, 0.0, None
        return other

    def take_over(self, other: "Exchange") -> None:
        """Be of that attempt from now on, whatever came of the one before."""
        self.phase, self.end, self.finished, self.first_byte = other.phase, other.end, other.finished, other.first_byte
        self.endpoint, self.choice, self.asked_at = other.endpoint, other.choice, other.asked_at
        self.upstream_model, self.upstream_id = other.upstream_model, other.upstream_id

    def ended(self, end: End) -> None:
        """Note how and when the request ended: the first end counts, so that its record, log line and metrics agree."""
        if self.end is None:
            self.end = end
            self.finished = time.monotonic()
