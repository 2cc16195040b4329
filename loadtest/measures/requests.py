"""What a request costs in CPU: small, refused, on a connection of its own, over TLS, and with a long body."""

import asyncio
from functools import partial
from random import Random
from typing import Final

from loadtest.client import Connections
from loadtest.measures.load import Failed, Numbers, Scale, Target, check, in_turn, send_streams
from loadtest.meter import Meter
from loadtest.upstream import Wish

_WRONG_KEY: Final = "sk-wrong-0123456789abcdef0123456789abcdef"
_CLOSE: Final = {"Connection": "close"}
_MIN_PROMPT_CHARACTERS: Final = 200_000
_MAX_PROMPT_CHARACTERS: Final = 400_000
_PROMPT_EVENTS: Final = 16
_PROMPTS_AT_A_TIME: Final = 8


async def small(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Small JSON requests in a closed loop."""
    return await _kept(target, scale, meter, target.request(), 200, "request")


async def refused(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Send the same request with one and the same wrong key."""
    return await _kept(target, scale, meter, target.request(key=_WRONG_KEY), 401, "refusal")


async def tls(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Small requests on connections that are kept, over TLS."""
    return await _kept(target, scale, meter, target.request(), 200, "tls_request")


async def unkept(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Small requests on a connection each, which the server is asked to close."""
    return await _unkept(target, scale, meter, scale.new_connections, "unkept_request")


async def handshakes(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Send the same over TLS: a whole handshake for every request."""
    return await _unkept(target, scale, meter, scale.handshakes, "handshake")


async def megabyte(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Bodies of 1 MB, one after another."""
    connections = Connections(target.address())
    count, raw = target.scaled(scale.bodies), target.request(characters=1_000_000)
    for _ in range(2):
        check(await connections.request(raw))
    with meter:
        for _ in range(count):
            check(await connections.request(raw))
    connections.close()
    return {"cpu_per_megabyte_ms": meter.cpu_s / count * 1e3}


async def prompts(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Long prompts with short answers, as agents send them: 200 to 400 kB, 16 tokens.

    The lengths are spread evenly, so that every proxy gets the same bytes whatever their order.
    """
    connections = Connections(target.address())
    count, wish = target.scaled(scale.prompts), Wish(_PROMPT_EVENTS)
    span = _MAX_PROMPT_CHARACTERS - _MIN_PROMPT_CHARACTERS
    lengths = [_MIN_PROMPT_CHARACTERS + round((place + 0.5) / count * span) for place in range(count)]
    draw.shuffle(lengths)

    async def send(characters: int) -> None:
        await send_streams(connections, target, wish, [0.0], characters=characters)

    workers = min(_PROMPTS_AT_A_TIME, count)
    await asyncio.gather(*(send(_MIN_PROMPT_CHARACTERS) for _ in range(workers)))
    with meter:
        await in_turn([partial(send, length) for length in lengths], workers)
    connections.close()
    return {"cpu_per_prompt_ms": meter.cpu_s / count * 1e3}


async def _kept(target: Target, scale: Scale, meter: Meter, raw: bytes, status: int, unit: str) -> Numbers:
    connections = Connections(target.address())

    async def ask() -> None:
        sample = await connections.request(raw)
        if sample.error or sample.status != status:
            raise Failed(sample.error or f"status {sample.status}")

    count, workers = target.scaled(scale.requests), min(scale.connections, target.scaled(scale.requests))
    await connections.warm(workers)
    await in_turn([ask] * max(count // 10, workers), workers)
    with meter:
        await in_turn([ask] * count, workers)
    connections.close()
    rate = count / meter.elapsed_s if meter.saturated else None  # else it is the rate of the rig, or of a round trip
    return {f"cpu_per_{unit}_us": meter.cpu_s / count * 1e6, f"{unit}s_per_s": rate}


async def _unkept(target: Target, scale: Scale, meter: Meter, requests: int, unit: str) -> Numbers:
    connections, raw = Connections(target.address()), target.request(headers=_CLOSE)

    async def ask() -> None:
        client = await connections.open()
        check(await client.request(raw))
        client.abort()

    count = target.scaled(requests)
    workers = min(scale.connections, count)
    await in_turn([ask] * workers, workers)
    with meter:
        await in_turn([ask] * count, workers)
    return {f"cpu_per_{unit}_us": meter.cpu_s / count * 1e6}
