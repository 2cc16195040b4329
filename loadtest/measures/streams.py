"""What a stream costs in CPU, by its events, in three protocols; and a load that another router's makers published."""

from random import Random
from typing import Final

from loadtest.arrivals import schedule
from loadtest.client import Connections
from loadtest.measures.load import Numbers, Scale, Target, send_streams, warm
from loadtest.meter import Meter
from loadtest.pairing import line
from loadtest.upstream import Wish

PUBLISHED_QPS: Final = 500
_PUBLISHED_CHARACTERS: Final = 800  # 200 tokens of English
_PUBLISHED_EVENTS: Final = 100
_PUBLISHED_INTERVAL_MS: Final = 10.0


async def slope(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Streams of different lengths: what an event costs, and what a stream without events would."""
    connections = Connections(target.address())
    live = target.scaled(scale.streams)
    await warm(connections, target, live)
    points, reads, events, exact = [], 0, 0, True
    for count in scale.event_counts:
        repeats = max(1, scale.event_counts[-1] // 4 // count)  # the short ones more often, or they weigh nothing
        wish = Wish(count, scale.interval_ms)
        with meter:
            for _ in range(repeats):
                starts = [draw.random() * scale.interval_ms / 1e3 for _ in range(live)]
                for sample, stamps in await send_streams(connections, target, wish, starts):
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


async def messages(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Streams of Anthropic's messages."""
    return await _dialect(target, scale, meter, draw, "messages")


async def responses(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Streams of OpenAI's responses."""
    return await _dialect(target, scale, meter, draw, "responses")


async def _dialect(target: Target, scale: Scale, meter: Meter, draw: Random, kind: str) -> Numbers:
    connections = Connections(target.address())
    live, wish = target.scaled(scale.streams), Wish(scale.dialect_events, scale.interval_ms)
    starts = [draw.random() * scale.interval_ms / 1e3 for _ in range(live)]
    await send_streams(connections, target, Wish(2, scale.interval_ms), starts, kind=kind)
    with meter:
        sent = await send_streams(connections, target, wish, starts, kind=kind)
    connections.close()
    return {
        f"cpu_per_{kind}_stream_us": meter.cpu_s / live * 1e6,
        f"{kind}_exact": all(stamps.exact for _, stamps in sent),
    }


async def published(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Open loop of 200 tokens in and 100 out: what llm-d's makers publish the cores of their router for, at 500/s.

    The rig carries a part of that rate. The cores of the whole are told as if each request cost the same then; on a
    core with more to do it costs less, since several events come with one look at the sockets.
    https://github.com/llm-d/llm-d-router/blob/main/docs/operations.md
    """
    connections = Connections(target.address())
    rate = scale.published_per_s / target.load_divisor
    count = max(1, round(rate * scale.published_s))
    wish = Wish(_PUBLISHED_EVENTS, _PUBLISHED_INTERVAL_MS)
    await warm(connections, target, max(1, round(rate * wish.events * wish.interval_ms / 1e3)))
    starts = schedule(count, rate, seed=draw.randrange(2**32))
    with meter:
        await send_streams(connections, target, wish, starts, characters=_PUBLISHED_CHARACTERS)
    connections.close()
    return {"published_cores": meter.cpu_s / count * PUBLISHED_QPS, "published_per_s": rate}
