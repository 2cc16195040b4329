"""What a proxy holds: with no stream, and for each live one; of a process that has served nothing else."""

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Final

from loadtest import processes
from loadtest.client import Client, Connections
from loadtest.measures.load import Failed, Numbers, Scale, Stamps, Target, check
from loadtest.meter import Meter
from loadtest.pairing import line
from loadtest.upstream import Wish

_GIVE_UP_S: Final = 60.0
_IDLE: Final = Wish(10_000, 1000.0)  # an event a second: idle, mostly
_AT_A_TIME: Final = 50


async def memory(target: Target, scale: Scale, meter: Meter, draw: Random) -> Numbers:
    """Thousands of streams that are mostly idle: what each holds, and what of a core all of them take."""
    connections = Connections(target.address())
    for _ in range(20):
        check(await connections.request(target.request()))
    base = processes.pss_bytes(target.pids)
    points = [(0.0, float(base))]
    clients: list[Client] = []
    readers: list[Stamps] = []
    async with asyncio.TaskGroup() as group:
        for wanted in (target.scaled(each) for each in scale.memory_streams):
            while len(clients) < wanted:
                client, stamps = await connections.open(), Stamps(_IDLE.events, first=asyncio.Event())
                clients.append(client)
                readers.append(stamps)
                group.create_task(_held(client, target.request(_IDLE), stamps))
                if len(clients) % _AT_A_TIME == 0 or len(clients) == wanted:
                    await _all_begun(readers[-_AT_A_TIME:], clients)
            with meter:
                await asyncio.sleep(scale.memory_settle_s)
            points.append((float(len(clients)), float(processes.pss_bytes(target.pids))))
        for client in clients:
            client.abort()
    connections.close()
    per_stream, _ = line(points)
    return {
        "base_mb": base / 1e6,
        "memory_per_stream_kb": per_stream / 1e3,
        "idle_cpu_per_event_us": meter.last_cpu_s / (len(clients) * scale.memory_settle_s) * 1e6,
        "memory_points": points,
        "start_s": target.start_s,
    }


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
