"""How late an event comes: of streams at random, together, beside long bodies, and at 70 % of a proxy's capacity.

And how soon the upstream hears of a client who leaves.
"""

import asyncio
import time
from collections.abc import Sequence
from random import Random
from typing import Final

import orjson

from loadtest.arrivals import schedule
from loadtest.client import Address, Connections, Sample
from loadtest.measures.load import (
    Failed,
    Numbers,
    Scale,
    Stamps,
    Target,
    check,
    in_turn,
    percentiles,
    send_streams,
    warm,
)  # fmt: skip
from loadtest.meter import Meter
from loadtest.upstream import Wish
from loadtest.values import percentile_ms

_TIMER_RESOLUTION_S: Final = 0.0015  # libuv's timers tick in milliseconds
_GIVE_UP_S: Final = 60.0
_BESIDE_INTERVAL_MS: Final = 10.0
_BETWEEN_BIG_S: Final = 0.1
_LOAD: Final = 0.7
_LOADED_WISH: Final = Wish(2, 10.0)  # short, so that a rig on one core can fill a proxy's
_LOADED_PERCENTILES: Final = ("p50_ms", "p99_ms")


async def arrivals(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Streams that arrive at random, so many that `scale.streams` live at a time."""
    connections = Connections(target.address())
    live = target.scaled(scale.streams)
    wish = Wish(scale.arrival_events, scale.interval_ms)
    rate = live / (wish.events * wish.interval_ms / 1e3)
    await warm(connections, target, live + live // 2)
    starts = schedule(max(1, round(rate * scale.arrivals_s)), rate, seed=draw.randrange(2**32))
    with meter:
        results = await send_streams(connections, target, wish, starts)
    connections.close()
    late = [sample.sent - sample.intended for sample, _ in results]
    numbers = percentiles("ttft", _first_events(results)) | percentiles(
        "lag", [lag for _, each in results for lag in each.lags_s]
    )
    if meter.rig_bound:
        numbers = {name: None for name in numbers}
    return numbers | {
        "live": live,
        "generator_lag_p99_ms": percentile_ms(sorted(max(0.0, each) for each in late), 99),
    }


async def loaded(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Short streams at random at 70 % of what the proxy's core could serve: the time to the first event, over direct.

    The capacity is a core's time by what a stream takes of it in a closed loop, where the proxy is busy or the rig is.
    The same arrivals go straight to the upstream too; which of both is first is drawn.
    """
    rate = _LOAD * await _capacity_per_s(target, scale)
    starts = schedule(max(1, round(rate * scale.loaded_s)), rate, seed=draw.randrange(2**32))
    direct = target.direct()
    beside = Meter(direct.pids, direct.rig_pids)
    ttfts: dict[str, Numbers] = {}
    for each, watched in draw.sample([(target, meter), (direct, beside)], 2):
        connections = Connections(each.address())
        await warm(connections, each, target.scaled(scale.streams))
        with watched:
            results = await send_streams(connections, each, _LOADED_WISH, starts)
        connections.close()
        ttfts[each.name] = percentiles("ttft", _first_events(results))
    numbers: Numbers = {"loaded_per_s": rate, "loaded_busy_percent": 100 * meter.proxy_busy, "unfit": beside.unfit}
    for name in _LOADED_PERCENTILES:
        own, rig = ttfts[target.name][f"ttft_{name}"], ttfts[direct.name][f"ttft_{name}"]
        numbers[f"loaded_ttft_{name}"] = own
        numbers[f"loaded_added_{name}"] = None if own is None or rig is None else own - rig
    return numbers


async def _capacity_per_s(target: Target, scale: Scale) -> float:
    """Return how many streams of `loaded` a core of the proxy's could serve in a second."""
    connections, meter = Connections(target.address()), Meter(target.pids, target.rig_pids)
    workers, count = target.scaled(scale.streams), target.scaled(scale.capacity_streams)

    async def send() -> None:
        await send_streams(connections, target, _LOADED_WISH, [0.0])

    await warm(connections, target, workers)
    with meter:
        await in_turn([send] * count, workers)
    connections.close()
    return count / meter.cpu_s


def _first_events(results: Sequence[tuple[Sample, Stamps]]) -> list[float]:
    """Return how long each stream's first event took; a send that was late by a timer counts from when it was sent."""
    return [
        sample.first_byte - (sample.sent if sample.sent - sample.intended < _TIMER_RESOLUTION_S else sample.intended)
        for sample, _ in results
    ]


async def together(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Many streams whose events all come at the same instants."""
    connections = Connections(target.address())
    count = target.scaled(scale.together)
    await warm(connections, target, count)
    with meter:
        results = await send_streams(connections, target, Wish(scale.ticks, scale.tick_ms, aligned=True), [0.0] * count)
    connections.close()
    # The first event of a stream follows its request; only from the second on they are together.
    lags = [lag for _, stamps in results for lag in stamps.lags_s[1:]]
    return percentiles("together", lags)


async def beside_big(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Small streams without, and then beside, bodies of 10 MB: the worst lag of any event."""
    connections = Connections(target.address())
    count, raw = target.scaled(scale.beside_streams), target.request(characters=10_000_000)
    await warm(connections, target, count)
    check(await connections.request(raw))
    wish = Wish(scale.beside_events, _BESIDE_INTERVAL_MS)
    starts = [draw.random() * wish.interval_ms / 1e3 for _ in range(count)]

    async def worst() -> float:
        results = await send_streams(connections, target, wish, starts)
        return max(lag for _, stamps in results for lag in stamps.lags_s) * 1e3

    async def send_big() -> None:
        for _ in range(scale.big_bodies):
            await asyncio.sleep(_BETWEEN_BIG_S)
            check(await connections.request(raw))

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
        check(await upstream.request(raw, whole))
        seen = [int(each) for each in orjson.loads(whole.content)]
        if seen or time.monotonic() >= until:
            return seen
        await asyncio.sleep(0.002)
