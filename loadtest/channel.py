"""What the command and its generator processes tell each other over pipes: frames of a length and its bytes."""

import asyncio
import os
import struct
from typing import BinaryIO, Final

import msgspec

from loadtest.outcome import Outcome

_LENGTH: Final = struct.Struct(">I")


class Ready(msgspec.Struct, tag=True):
    """A process could begin."""


class Batch(msgspec.Struct, tag=True):
    """What has finished since the last; `changes` and `until` as `timeline.Live` takes them."""

    outcomes: list[Outcome]
    changes: list[float]
    until: float


class Done(msgspec.Struct, tag=True):
    """A process has sent all; shares of the time that it ran, waited for a core, and that a hypervisor took.

    `unfinished`: requests that were given up because the run was stopped.
    """

    busy: float
    waited: float
    steal: float
    unfinished: int


class Failed(msgspec.Struct, tag=True):
    """A process cannot begin, and why."""

    problem: str


Told = Ready | Batch | Done | Failed
_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[Told]] = msgspec.msgpack.Decoder(Told)


def frame(content: bytes) -> bytes:
    """Return the bytes of a frame."""
    return _LENGTH.pack(len(content)) + content


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """Return the content of the next frame, None at the end."""
    try:
        head = await reader.readexactly(_LENGTH.size)
        return await reader.readexactly(_LENGTH.unpack(head)[0])
    except asyncio.IncompleteReadError:
        return None


async def receive(reader: asyncio.StreamReader) -> Told | None:
    """Return the next message of a process, None at its end."""
    content = await read_frame(reader)
    return None if content is None else _decoder.decode(content)


class Teller(asyncio.BaseProtocol):
    """A process's end of the pipe to the command; it never waits for who reads."""

    def __init__(self) -> None:
        self._closed = asyncio.get_running_loop().create_future()
        self._transport: asyncio.WriteTransport | None = None

    @classmethod
    async def open(cls, pipe: BinaryIO) -> "Teller":
        """Return one that writes to the pipe."""
        own = os.fdopen(os.dup(pipe.fileno()), "wb", buffering=0)
        transport, teller = await asyncio.get_running_loop().connect_write_pipe(cls, own)
        teller._transport = transport
        return teller

    def tell(self, message: Told) -> None:
        """Send a message."""
        assert self._transport is not None
        self._transport.write(frame(_encoder.encode(message)))

    async def close(self) -> None:
        """Return when everything is sent, or nobody reads any more."""
        assert self._transport is not None
        self._transport.close()
        await self._closed

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        self._closed.set_result(None)
