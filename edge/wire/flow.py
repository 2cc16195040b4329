"""The flow of an upstream's connection: a long read is taken, and a long request written, in steps; others run between.

One read may have 256 KB, and the event loop makes many of them in one turn: to read a long answer's usage would hold
every other stream. What costs are lines more than bytes: those of chunks, events and heads. A long request that is
written at once would be encrypted at once.
"""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Final

from edge.wire.http1 import READ_STEP_BYTES

_LONG_STEP_BYTES: Final = 16 * 1024  # of what has no more lines than servers write: an event of 60 bytes in each chunk
_MANY_LINES: Final = 1000
_WRITE_STEP_BYTES: Final = 128 * 1024


class Flow(asyncio.Protocol):
    """The bytes of one connection, in both directions."""

    __slots__ = ("_at", "_is_full", "_is_paused", "_long_read", "_loop", "_step", "_unsent", "transport")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.transport: asyncio.Transport | None = None
        self._long_read = b""  # of which what stands from `_at` on was not taken yet
        self._at = 0
        self._step: asyncio.Handle | None = None
        self._is_paused = False
        self._unsent: Iterator[memoryview] | None = None
        self._is_full = False  # the transport holds what its peer does not read

    # --- what is read

    def first_step(self, data: bytes) -> bytes:
        """Return how a long read begins; the rest comes in the next turns of the loop, before what is read then.

        What was taken of a read and then held may be given again, with more of it behind.
        """
        count = _step_bytes(data, 0)
        if count >= len(data):
            return data
        assert self.transport is not None
        behind = self._long_read[self._at :]
        self._long_read, self._at = data + behind if behind else data, count
        if self._step is None:
            self.transport.pause_reading()
            self._step = self._loop.call_soon(self._next_step)
        return data[:count]

    def _next_step(self) -> None:
        self._step = None
        data, at = self._long_read, self._at
        count = _step_bytes(data, at)
        self._at = at + count
        if self._at >= len(data):
            self._long_read, self._at = b"", 0
        self.data_received(data[at : at + count])
        if not self._is_paused:
            self._go_on()

    def _go_on(self) -> None:
        if self._step is not None:
            return
        if self._long_read:
            self._step = self._loop.call_soon(self._next_step)
        else:
            assert self.transport is not None
            self.transport.resume_reading()

    def pause_reading(self) -> None:
        """Take nothing more."""
        assert self.transport is not None
        self._is_paused = True
        if self._step is not None:
            self._step.cancel()
            self._step = None
        else:
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on taking what comes."""
        if self._is_paused:
            self._is_paused = False
            self._go_on()

    # --- what is written

    @property
    def is_sending(self) -> bool:
        """Whether a long request is held that was not sent yet."""
        return self._unsent is not None or self._is_full

    def send_long(self, parts: Sequence[bytes | memoryview]) -> None:
        """Write a long request in pieces, as its peer takes them."""
        self._unsent = _pieces(parts)
        self._write_piece()

    def _write_piece(self) -> None:
        if self._unsent is None or self.transport is None:
            return
        piece = next(self._unsent, None)
        if piece is None:
            self._unsent = None
            return
        self.transport.write(piece)
        if not self._is_full:
            self._loop.call_soon(self._write_piece)

    def pause_writing(self) -> None:
        """Wait until the peer reads."""
        self._is_full = True

    def resume_writing(self) -> None:
        """Go on writing."""
        self._is_full = False
        self._write_piece()

    def forget(self) -> None:
        """Let go of all bytes: the connection is over."""
        self._long_read, self._at, self._unsent, self._is_paused = b"", 0, None, True
        if self._step is not None:
            self._step.cancel()


def _step_bytes(data: bytes, at: int) -> int:
    """Return how much of a read is taken at once."""
    many = data.count(b"\n", at, at + _LONG_STEP_BYTES) > _MANY_LINES
    return READ_STEP_BYTES if many else _LONG_STEP_BYTES


def _pieces(parts: Sequence[bytes | memoryview]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        for at in range(0, len(view), _WRITE_STEP_BYTES):
            yield view[at : at + _WRITE_STEP_BYTES]
