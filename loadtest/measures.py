"""One load on one proxy: each measure returns raw numbers of one round, with its CPU from a `Meter`.

Latencies are from the intended send time; a send that was late by less
than a timer's own resolution counts from when it happened.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import orjson

from loadtest import processes
from loadtest.arrivals import schedule
from loadtest.client import Address, Client, Connections, Sample
from loadtest.meter import Meter
from loadtest.pairing import line
from loadtest.peers import HOST, MODEL
from loadtest.upstream import DONE, Wish, find_stamp, read_event, usage_event
from loadtest.values import histogram, percentile_ms
from loadtest.workload import raw_request

PERCENTILES: Final = (50, 99, 99.9)
_TIMER_RESOLUTION_S: Final = 0.0015  # libuv's timers tick in milliseconds
_PROMPT_CHARACTERS: Final = 200
_GIVE_UP_S: Final = 60.0
_BESIDE_INTERVAL_MS: Final = 10.0
_BETWEEN_BIG_S: Final = 0.1

Numbers = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much load each measure makes."""

    connections: int = 32
    requests: int = 4000
    streams: int = 100
    interval_ms: float = 20.0
    event_counts: tuple[int, ...] = (10, 40, 160)
    arrivals_s: float = 2.0
    arrival_events: int = 10
    memory_streams: tuple[int, ...] = (1000, 2000)
    memory_settle_s: float = 1.0  # every stream has had two events by then, so its buffers are what they will be
    bodies: int = 20
    big_bodies: int = 4
    beside_streams: int = 20
    beside_events: int = 50
    together: int = 256
    ticks: int = 20
    tick_ms: float = 50.0
    aborts: int = 20


@dataclass(frozen=True, slots=True)
class Target:
    """A proxy under load; `pids` its process tree, `rig_pids` the processes of each core of the rig."""

    name: str
    port: int
    upstream_port: int
    key: str
    pids: Sequence[int]
    rig_pids: Sequence[Sequence[int]]
    load_divisor: int = 1

    def scaled(self, count: int) -> int:
        """Return how much of a count this proxy gets."""
        return max(1, round(count / self.load_divisor))

    def address(self) -> Address:
        """Return where it listens."""
        return Address("127.0.0.1", self.port)

    def request(self, wish: Wish | None = None, *, characters: int = _PROMPT_CHARACTERS, key: str = "") -> bytes:
        """Return a raw request; with a wish, for a stream."""
        text = f"{wish.text()} " if wish else ""
        text += "x" * (characters - len(text))
        body: dict[str, object] = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
        if wish:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return raw_request("chat", orjson.dumps(body), host=HOST, key=key or self.key)


class Failed(Exception):
    """A proxy did not do what was asked; the message says what it did."""


@dataclass(slots=True)
class Stamps:
    """A reader of a stream of the benchmark upstream: how long each event was on its way, and what became of it.

    `exact`: every byte as it was sent. `whole`: every token once and in order, and the end, however encoded.
    """

    expected: int
    lags_s: list[float] = field(default_factory=list)
    tokens: int = 0
    exact: bool = True
    ordered: bool = True
    done: bool = False
    first: asyncio.Event | None = None

    def event(self, event: bytes, now: float) -> None:
        """Take an event."""
        try:
            number, sent_ns = read_event(event)
        except ValueError:
            stamp = find_stamp(event)
            if stamp is None:
                if event == DONE:
                    self.done = True
                elif event + b"\n\n" != usage_event(self.expected):
                    self.exact = False
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

    def body(self, body: bytes) -> None:
        """Take what was to be a stream and is none."""
        self.ordered = False

    @property
    def whole(self) -> bool:
        """Whether nothing was lost, doubled or swapped."""
        return self.done and self.ordered and self.tokens == self.expected


def _check(sample: Sample, stamps: Stamps | None = None) -> None:
    """Raise `Failed` unless the answer is what it must be."""
    if sample.error or not sample.ok:
        raise Failed(sample.error or f"status {sample.status}")
    if stamps is not None and not stamps.whole:
        raise Failed(f"a stream lost tokens: {stamps.tokens} of {stamps.expected}")


async def _stream(connections: Connections, target: Target, wish: Wish, start_at: float = 0.0) -> tuple[Sample, Stamps]:
    delay = start_at - time.monotonic()
    if delay > 0:
        await asyncio.sleep(delay)
    stamps = Stamps(wish.events)
    sample = await connections.request(target.request(wish), stamps, start_at)
    _check(sample, stamps)
    return sample, stamps


async def _streams(
    connections: Connections, target: Target, wish: Wish, starts: Sequence[float]
) -> list[tuple[Sample, Stamps]]:
    async with asyncio.TaskGroup() as group:
        begun = time.monotonic() + 0.005
        tasks = [group.create_task(_stream(connections, target, wish, begun + start)) for start in starts]
    return [task.result() for task in tasks]


async def _warm(connections: Connections, target: Target, count: int) -> None:
    """Let the proxy open as many upstream connections as it will need."""
    await connections.warm(count)
    await _streams(connections, target, Wish(2, 50.0), [0.0] * count)


def _percentiles(name: str, seconds: Sequence[float]) -> Numbers:
    ordered = sorted(seconds)
    numbers: Numbers = {f"{name}_p{each:g}_ms": percentile_ms(ordered, each) for each in PERCENTILES}
    return numbers | {f"{name}_hdr": histogram(seconds).encode().decode()}


async def _closed_loop(connections: Connections, raw: bytes, count: int, workers: int, status: int = 200) -> None:
    left = count

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            sample = await connections.request(raw)
            if sample.error or sample.status != status:
                raise Failed(sample.error or f"status {sample.status}")

    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(work())


async def small(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Small JSON requests in a closed loop."""
    return await _requests(target, scale, meter, target.request(), 200, "request")


async def refused(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Send the same request with one and the same wrong key."""
    raw = target.request(key="sk-wrong-0123456789abcdef0123456789abcdef")
    return await _requests(target, scale, meter, raw, 401, "refusal")


async def _requests(target: Target, scale: Scale, meter: Meter, raw: bytes, status: int, unit: str) -> Numbers:
    connections = Connections(target.address())
    count, workers = target.scaled(scale.requests), min(scale.connections, target.scaled(scale.requests))
    await connections.warm(workers)
    await _closed_loop(connections, raw, max(count // 10, workers), workers, status)
    with meter:
        await _closed_loop(connections, raw, count, workers, status)
    connections.close()
    rate = count / meter.elapsed_s if meter.saturated else None  # else it is the rate of the rig, or of a round trip
    return {f"cpu_per_{unit}_us": meter.cpu_s / count * 1e6, f"{unit}s_per_s": rate}


async def slope(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Streams of different lengths: what an event costs, and what a stream without events would."""
    connections = Connections(target.address())
    live = target.scaled(scale.streams)
    await _warm(connections, target, live)
    points, reads, events, exact = [], 0, 0, True
    for count in scale.event_counts:
        repeats = max(1, scale.event_counts[-1] // 4 // count)  # the short ones more often, or they weigh nothing
        wish = Wish(count, scale.interval_ms)
        with meter:
            for _ in range(repeats):
                starts = [draw.random() * scale.interval_ms / 1e3 for _ in range(live)]
                for sample, stamps in await _streams(connections, target, wish, starts):
                    reads, events, exact = reads + sample.reads, events + sample.events, exact and stamps.exact
        points.append((float(count), meter.last_cpu_s / (repeats * live) * 1e6))
    connections.close()
    per_event, per_stream = line(points)
    return {
        "cpu_per_event_us": per_event,
        "cpu_per_stream_us": per_stream,
        "points": points,
        "events_per_read": events / reads,
        "exact": exact,
    }


async def arrivals(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Streams that arrive at random, so many that `scale.streams` live at a time."""
    connections = Connections(target.address())
    live = target.scaled(scale.streams)
    wish = Wish(scale.arrival_events, scale.interval_ms)
    rate = live / (wish.events * wish.interval_ms / 1e3)
    await _warm(connections, target, live + live // 2)
    starts = schedule(max(1, round(rate * scale.arrivals_s)), rate, seed=draw.randrange(2**32))
    with meter:
        results = await _streams(connections, target, wish, starts)
    connections.close()
    late = [sample.sent - sample.intended for sample, _ in results]
    ttfts = [
        sample.first_byte - (sample.sent if lag < _TIMER_RESOLUTION_S else sample.intended)
        for (sample, _), lag in zip(results, late, strict=True)
    ]
    numbers = _percentiles("ttft", ttfts) | _percentiles("lag", [lag for _, each in results for lag in each.lags_s])
    if meter.rig_bound:
        numbers = {name: None for name in numbers}
    return numbers | {
        "live": live,
        "generator_lag_p99_ms": percentile_ms(sorted(max(0.0, each) for each in late), 99),
    }


async def together(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Many streams whose events all come at the same instants."""
    connections = Connections(target.address())
    count = target.scaled(scale.together)
    await _warm(connections, target, count)
    with meter:
        results = await _streams(connections, target, Wish(scale.ticks, scale.tick_ms, aligned=True), [0.0] * count)
    connections.close()
    # The first event of a stream follows its request; only from the second on they are together.
    lags = [lag for _, stamps in results for lag in stamps.lags_s[1:]]
    return _percentiles("together", lags)


async def megabyte(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Bodies of 1 MB, one after another."""
    connections = Connections(target.address())
    count, raw = target.scaled(scale.bodies), target.request(characters=1_000_000)
    for _ in range(2):
        _check(await connections.request(raw))
    with meter:
        for _ in range(count):
            _check(await connections.request(raw))
    connections.close()
    return {"cpu_per_megabyte_ms": meter.cpu_s / count * 1e3}


async def beside_big(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Small streams without, and then beside, bodies of 10 MB: the worst lag of any event."""
    connections = Connections(target.address())
    count, raw = target.scaled(scale.beside_streams), target.request(characters=10_000_000)
    await _warm(connections, target, count)
    _check(await connections.request(raw))
    wish = Wish(scale.beside_events, _BESIDE_INTERVAL_MS)
    starts = [draw.random() * wish.interval_ms / 1e3 for _ in range(count)]

    async def worst() -> float:
        results = await _streams(connections, target, wish, starts)
        return max(lag for _, stamps in results for lag in stamps.lags_s) * 1e3

    async def send_big() -> None:
        for _ in range(scale.big_bodies):
            await asyncio.sleep(_BETWEEN_BIG_S)
            _check(await connections.request(raw))

    alone, beside = await worst(), 0.0
    with meter:
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(send_big())
            while not sending.done():
                beside = max(beside, await worst())
    connections.close()
    return {"worst_alone_ms": alone, "worst_beside_big_ms": beside}


async def aborts(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Clients that leave in the middle of a stream: how soon the upstream's connection ends."""
    connections, upstream = Connections(target.address()), Connections(Address("127.0.0.1", target.upstream_port))
    await _told_aborts(upstream, 0.0)
    took: list[float | None] = []
    for _ in range(target.scaled(scale.aborts)):
        stamps = Stamps(500, first=asyncio.Event())
        client = await connections.open()
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(client.request(target.request(Wish(500, scale.interval_ms)), stamps))
            assert stamps.first is not None
            try:
                await asyncio.wait_for(stamps.first.wait(), _GIVE_UP_S)
            except TimeoutError:
                client.abort()
                raise Failed("no event came") from None
            left_ns = time.monotonic_ns()
            client.abort()
            await asking
        seen = await _told_aborts(upstream, 1.0)
        took.append((seen[0] - left_ns) / 1e6 if seen else None)
    connections.close()
    upstream.close()
    told = sorted(each for each in took if each is not None)
    never = len(took) - len(told)
    return {
        "abort_p50_ms": told[len(told) // 2] if len(told) > never else None,
        "abort_max_ms": told[-1] if told else None,
        "aborts_never_told": never,
    }


class _Whole:
    """A reader that keeps a JSON answer."""

    def __init__(self) -> None:
        self.content = b""

    def event(self, event: bytes, now: float) -> None:
        """Take an event, which never comes."""

    def body(self, body: bytes) -> None:
        """Keep the body."""
        self.content = body


async def _told_aborts(upstream: Connections, patience_s: float) -> list[int]:
    """Return the times, in monotonic nanoseconds, of aborts since the last call; waits for the first."""
    raw = b"GET /aborts HTTP/1.1\r\nHost: upstream\r\n\r\n"
    until = time.monotonic() + patience_s
    while True:
        whole = _Whole()
        _check(await upstream.request(raw, whole))
        seen = [int(each) for each in orjson.loads(whole.content)]
        if seen or time.monotonic() >= until:
            return seen
        await asyncio.sleep(0.002)


async def memory(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Memory with no stream, and with many live ones; of a process that has served nothing big yet."""
    connections = Connections(target.address())
    for _ in range(20):
        _check(await connections.request(target.request()))
    base = processes.pss_bytes(target.pids)
    points = [(0.0, float(base))]
    wish = Wish(10_000, 1000.0)
    clients: list[Client] = []
    readers: list[Stamps] = []
    async with asyncio.TaskGroup() as group:
        for wanted in (target.scaled(each) for each in scale.memory_streams):
            while len(clients) < wanted:
                client, stamps = await connections.open(), Stamps(wish.events, first=asyncio.Event())
                clients.append(client)
                readers.append(stamps)
                group.create_task(_held(client, target.request(wish), stamps))
                if len(clients) % 50 == 0 or len(clients) == wanted:
                    await _all_begun(readers[-50:], clients)
            await asyncio.sleep(scale.memory_settle_s)
            points.append((float(len(clients)), float(processes.pss_bytes(target.pids))))
        for client in clients:
            client.abort()
    connections.close()
    per_stream, _ = line(points)
    return {"base_mb": base / 1e6, "memory_per_stream_kb": per_stream / 1e3, "memory_points": points}


async def _held(client: Client, raw: bytes, stamps: Stamps) -> None:
    await client.request(raw, stamps)


async def _all_begun(readers: Sequence[Stamps], clients: Sequence[Client]) -> None:
    try:
        async with asyncio.timeout(_GIVE_UP_S):
            for stamps in readers:
                assert stamps.first is not None
                await stamps.first.wait()
    except TimeoutError:
        for client in clients:
            client.abort()
        raise Failed("not every stream began") from None


async def ready(target: Target, patience_s: float) -> None:
    """Wait until the proxy serves a request and a whole stream; raises `Failed` with what it does instead."""
    until = time.monotonic() + patience_s
    while True:
        connections = Connections(target.address())
        try:
            async with asyncio.timeout(max(until - time.monotonic(), 1.0)):
                _check(await connections.request(target.request()))
                stamps = Stamps(3)
                _check(await connections.request(target.request(Wish(3, 1.0)), stamps), stamps)
                return
        except (Failed, TimeoutError) as error:
            if time.monotonic() >= until:
                raise Failed(f"{target.name} never served: {error}") from None
        finally:
            connections.close()
        await asyncio.sleep(0.2)


Measure = Callable[[Target, Scale, Meter, Random], Awaitable[Numbers]]
MEASURES: Final[Mapping[str, Measure]] = {
    measure.__name__: measure for measure in (small, slope, arrivals, together, megabyte, beside_big, aborts, refused)
}
