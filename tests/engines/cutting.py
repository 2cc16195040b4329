"""A relay on loopback that breaks each connection after some bytes of what the server said."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from loadtest.processes import free_port

_LEAST_BYTES: Final = 1000  # the head of an answer, and a frame or two
_MOST_BYTES: Final = 6000
_READ_BYTES: Final = 65536


@asynccontextmanager
async def cutting(server_port: int) -> AsyncIterator[int]:
    """Return the port of such a relay; connections break at random, and in the same places in each run."""
    draws = random.Random(1)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", server_port)
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(_copy(reader, to_server))
            await _copy(from_server, writer, draws.randint(_LEAST_BYTES, _MOST_BYTES))
            asked.cancel()
        for side in (to_server, writer):
            side.close()

    port = free_port()
    server = await asyncio.start_server(relay, "127.0.0.1", port)
    async with server:
        yield port


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int | None = None) -> None:
    """Copy until one side has closed, or `most` bytes have gone on."""
    with contextlib.suppress(OSError):
        while data := await reader.read(_READ_BYTES if most is None else min(most, _READ_BYTES)):
            writer.write(data)
            await writer.drain()
            most = None if most is None else most - len(data)
            if most == 0:
                return
