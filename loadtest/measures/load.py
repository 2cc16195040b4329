"""Where a load goes and how much of it there is; streams and closed loops, sent and checked."""

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import orjson

from loadtest.client import Address, Connections, Sample
from loadtest.peers.peer import HOST, MODEL
from loadtest.stamped import CHAT, DIALECTS, Dialect, find_stamp
from loadtest.upstream import Wish
from loadtest.values import histogram, percentile_ms
from loadtest.workload import raw_request

PERCENTILES: Final = (50, 99, 99.9)
_PROMPT_CHARACTERS: Final = 200
_MAX_TOKENS: Final = 1024
_NOT_SERVED: Final = (404, 405, 501)
_REPEATED: Final = ("requests", "new_connections", "handshakes", "bodies", "prompts", "aborts", "capacity_streams")
_LASTING: Final = ("arrivals_s", "loaded_s", "published_s")

Numbers = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much load each measure makes."""

    connections: int = 32
    requests: int = 4000
    new_connections: int = 1000
    handshakes: int = 300
    streams: int = 100
    interval_ms: float = 20.0
    event_counts: tuple[int, ...] = (10, 40, 160)
    dialect_events: int = 40
    arrivals_s: float = 2.0
    arrival_events: int = 10
    memory_streams: tuple[int, ...] = (1000, 5000)
    memory_settle_s: float = 1.0  # every stream has had two events by then, so its buffers are what they will be
    bodies: int = 20
    big_bodies: int = 4
    prompts: int = 32
    beside_streams: int = 20
    beside_events: int = 50
    together: int = 256
    ticks: int = 20
    tick_ms: float = 50.0
    aborts: int = 20
    capacity_streams: int = 1000
    loaded_s: float = 2.0
    published_per_s: float = 100.0
    published_s: float = 2.0

    def repeated(self, share: float) -> "Scale":
        """Return the same load at a time, so much of it: what is repeated or lasts, as a share of this."""
        changed = {name: max(1, round(getattr(self, name) * share)) for name in _REPEATED}
        return replace(self, **changed, **{name: getattr(self, name) * share for name in _LASTING})


@dataclass(frozen=True, slots=True)
class Target:
    """A proxy under load; `pids` its process tree, `rig_pids` the processes of each core of the rig.

    `headers` are what each request needs besides; with `tls` it is asked over TLS.
    """

    name: str
    port: int
    upstream_port: int
    key: str
    pids: Sequence[int]
    rig_pids: Sequence[Sequence[int]]
    load_divisor: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None
    start_s: float = 0.0

    def scaled(self, count: int) -> int:
        """Return how much of a count this proxy gets."""
        return max(1, round(count / self.load_divisor))

    def address(self) -> Address:
        """Return where it listens."""
        return Address("127.0.0.1", self.port, self.tls)

    def direct(self) -> "Target":
        """Return the upstream itself in the place of the proxy."""
        return Target("direct", self.upstream_port, self.upstream_port, self.key, [], self.rig_pids, self.load_divisor)

    def request(
        self,
        wish: Wish | None = None,
        *,
        kind: str = "chat",
        characters: int = _PROMPT_CHARACTERS,
        key: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """Return a raw request; with a wish, for a stream."""
        text = f"{wish.text()} " if wish else ""
        text += "x" * (characters - len(text))
        body: dict[str, object] = {"model": MODEL}
        body |= {"input": text} if kind == "responses" else {"messages": [{"role": "user", "content": text}]}
        if kind == "messages":
            body["max_tokens"] = _MAX_TOKENS
        if wish:
            body["stream"] = True
            if kind == "chat":
                body["stream_options"] = {"include_usage": True}
        shown = key or self.key
        # Whatever the protocol: some proxies look nowhere else.
        named = {"Authorization": f"Bearer {shown}", **self.headers, **(headers or {})}
        return raw_request(kind, orjson.dumps(body), host=HOST, key=shown, headers=named)


class Failed(Exception):
    """A proxy did not do what was asked; the message says what it did."""


class NotServed(Failed):
    """A proxy has no such operation."""


@dataclass(slots=True)
class Stamps:
    """A reader of a stream of the benchmark upstream: how long each event was on its way, and what became of it.

    `exact`: every byte as it was sent. `whole`: every token once and in order, and the end, however encoded.
    """

    expected: int
    dialect: Dialect = CHAT
    lags_s: list[float] = field(default_factory=list)
    tokens: int = 0
    exact: bool = True
    ordered: bool = True
    done: bool = False
    first: asyncio.Event | None = None

    def event(self, event: bytes, now: float) -> None:
        """Take an event."""
        try:
            number, sent_ns = self.dialect.read(event)
        except ValueError:
            stamp = find_stamp(event)
            if stamp is None:
                self._other(event)
                return
            self.exact = False
            number, sent_ns = stamp
        if number == self.tokens:
            self.lags_s.append(now - sent_ns / 1e9)
        else:
            self.ordered = False
        self.tokens += 1
        if self.first is not None:
            self.first.set()

    def _other(self, event: bytes) -> None:
        """Take an event without a token."""
        known = self.dialect.closing(self.expected) if self.tokens else self.dialect.opening
        self.exact = self.exact and event in known
        self.done = self.done or self.dialect.end in event

    def body(self, body: bytes) -> None:
        """Take what was to be a stream and is none."""
        self.ordered = False

    @property
    def whole(self) -> bool:
        """Whether nothing was lost, doubled or swapped."""
        return self.done and self.ordered and self.tokens == self.expected


def check(sample: Sample, stamps: Stamps | None = None) -> None:
    """Raise `Failed` unless the answer is what it must be."""
    if not sample.error and sample.status in _NOT_SERVED:
        raise NotServed(f"status {sample.status}")
    if sample.error or not sample.ok:
        raise Failed(sample.error or f"status {sample.status}")
    if stamps is not None and not stamps.whole:
        raise Failed(f"a stream lost tokens: {stamps.tokens} of {stamps.expected}")


async def _stream(
    connections: Connections, raw: bytes, wish: Wish, dialect: Dialect, start_at: float
) -> tuple[Sample, Stamps]:
    delay = start_at - time.monotonic()
    if delay > 0:
        await asyncio.sleep(delay)
    stamps = Stamps(wish.events, dialect)
    sample = await connections.request(raw, stamps, start_at)
    check(sample, stamps)
    return sample, stamps


async def send_streams(
    connections: Connections,
    target: Target,
    wish: Wish,
    starts: Sequence[float],
    *,
    kind: str = "chat",
    characters: int = _PROMPT_CHARACTERS,
) -> list[tuple[Sample, Stamps]]:
    """Send a stream at each of `starts`, seconds from now; raises `Failed` unless all come whole."""
    raw = target.request(wish, kind=kind, characters=characters)
    async with asyncio.TaskGroup() as group:
        begun = time.monotonic() + 0.005
        tasks = [group.create_task(_stream(connections, raw, wish, DIALECTS[kind], begun + start)) for start in starts]
    return [task.result() for task in tasks]


async def in_turn(calls: Sequence[Callable[[], Awaitable[None]]], workers: int) -> None:
    """Await all calls, so many at a time: a closed loop."""
    left = iter(calls)

    async def work() -> None:
        for call in left:
            await call()

    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(work())


async def warm(connections: Connections, target: Target, count: int) -> None:
    """Let the proxy open as many upstream connections as it will need."""
    await connections.warm(count)
    await send_streams(connections, target, Wish(2, 50.0), [0.0] * count)


def percentiles(name: str, seconds: Sequence[float]) -> Numbers:
    """Return the percentiles in ms, under `name`, and the histogram that they are of."""
    ordered = sorted(seconds)
    numbers: Numbers = {f"{name}_p{each:g}_ms": percentile_ms(ordered, each) for each in PERCENTILES}
    return numbers | {f"{name}_hdr": histogram(seconds).encode().decode()}


async def ready(target: Target, patience_s: float, *, streams: bool) -> None:
    """Wait until the proxy serves a request and, where it can, a whole stream.

    Raises `Failed` with what it does instead.
    """
    until = time.monotonic() + patience_s
    while True:
        connections = Connections(target.address())
        try:
            async with asyncio.timeout(max(until - time.monotonic(), 1.0)):
                check(await connections.request(target.request()))
                if streams:
                    stamps = Stamps(3)
                    check(await connections.request(target.request(Wish(3, 1.0)), stamps), stamps)
                return
        except (Failed, TimeoutError) as error:
            if time.monotonic() >= until:
                raise Failed(f"{target.name} never served: {error}") from None
        finally:
            connections.close()
        await asyncio.sleep(0.2)
