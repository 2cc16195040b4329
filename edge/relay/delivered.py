"""What a client was given of a stream that may go on elsewhere, kept by reference, and the break of such a stream."""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from edge.client.connection import ClientConnection
from edge.exchange import End, Exchange
from edge.protocols import NOTHING_BEGUN
from edge.relay.pace import Heartbeat
from edge.relay.terms import Settlement, State, broken_stream, last_event
from edge.wire.http1 import LAST_CHUNK, Chunked, Malformed, chunk

_DONE: Final = b"data: [DONE]\n\n"
_BLOCK_BYTES: Final = 16 * 1024  # that are reserved at once
_STEP_BYTES: Final = 16 * 1024  # that are read in one go: less than a millisecond
_forget: Final[Callable[[bytes], None]] = deque[bytes](maxlen=0).append


class Memory(Protocol):
    """What bounds the bytes of all requests together."""

    def spare(self, count: int) -> bool:
        """Take `count` bytes that new requests do without; return whether there are any."""

    def release(self, count: int) -> None:
        """Give `count` bytes back."""


class Delivered:
    """Passes what a client gets and keeps it, up to `most_bytes` and as long as `memory` can spare that.

    Past that it lets go of all of it: the stream ends as any other then.
    """

    __slots__ = ("_memory", "_most_bytes", "_parts", "_reserved_bytes", "is_whole")

    def __init__(self, memory: Memory, most_bytes: int) -> None:
        self._memory = memory
        self._most_bytes = most_bytes
        self._parts: list[bytes] = []
        self._reserved_bytes = 0
        self.is_whole = True

    def passing(self, write: Callable[[bytes], None], let_go: Callable[[], None]) -> Callable[[bytes], None]:
        """Return what writes to the client as `write` does, and keeps what it wrote; it runs once a token.

        `let_go` lets go of what was asked, once no more is kept.
        """
        keep: Callable[[bytes], None] = self._parts.append
        room: float = 0

        def pass_on(data: bytes) -> None:
            nonlocal keep, room
            write(data)
            keep(data)
            room -= len(data)
            if room < 0:
                room = self._reserve(-room)
                if not self.is_whole:
                    keep = _forget
                    let_go()

        return pass_on

    def _reserve(self, missing_bytes: float) -> float:
        """Reserve at least so many bytes; return how many are left, infinitely many where nothing is kept."""
        if self.is_whole:
            count = max(_BLOCK_BYTES, int(missing_bytes))
            if self._reserved_bytes + missing_bytes <= self._most_bytes and self._memory.spare(count):
                self._reserved_bytes += count
                return count - missing_bytes
            self.release()
        return math.inf

    def release(self) -> None:
        """Let go of what was kept, and keep nothing more."""
        self._memory.release(self._reserved_bytes)
        self._reserved_bytes = 0
        self._parts.clear()
        self.is_whole = False

    async def content(self, *, bare: bool) -> bytes | None:
        """Return the content that the client has, which is `bare` of chunks, or None where it is no whole chunks.

        It is read in steps: a MiB of small chunks takes 60 ms.
        """
        _, _, body = b"".join(self._parts).partition(b"\r\n\r\n")
        if bare:
            return body
        payload: list[bytes] = []
        framing, held = Chunked(), b""
        try:
            for at in range(0, len(body), _STEP_BYTES):
                held += body[at : at + _STEP_BYTES]
                held = held[framing.scan(held, payload) :]
                await asyncio.sleep(0)
        except Malformed:
            return None
        return b"".join(payload) if not held and framing.between_chunks else None


class Interrupted(Exception):
    """A stream broke between two events that its client has, and may go on at another endpoint; `how` it did.

    While it does neither, this is the client's running answer.
    """

    begun = True
    exchange: Exchange
    _client: ClientConnection

    def __init__(self, how: End) -> None:
        super().__init__(how)
        self.how = how
        self.is_cut = False
        self.is_over = False  # all of the answer had come but the event that ends its stream
        self.paused = False  # the client's buffer is full
        self._task: asyncio.Task[Any] | None = None
        self._heartbeat: Heartbeat | None = None

    def hold(self, exchange: Exchange, client: ClientConnection, heartbeat_s: float) -> None:
        """Be the client's answer until another one is, with heartbeats after that silence, 0 for none."""
        self._task = asyncio.current_task()
        self.exchange, self._client, self.paused = exchange, client, False
        client.attach(self)
        self.rest()
        if heartbeat_s:
            self._heartbeat = Heartbeat(self, self, heartbeat_s, client.loop)

    def rest(self) -> None:
        """Send no more heartbeats."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None

    def cut(self) -> None:
        """End what looks for another endpoint because the edge has to stop."""
        self.is_cut = True
        if self._task is not None:
            self._task.cancel()

    @property
    def state(self) -> State:
        """Whether another answer is the client's."""
        return State.FRAMED if self._client.answering is self else State.ENDED

    @property
    def sent_bytes(self) -> int:
        """What the client has got."""
        return self.exchange.response_bytes

    def may_beat(self) -> bool:
        """Whether a heartbeat can stand here: between two events."""
        return True

    def beat(self) -> None:
        """Give the client a heartbeat."""
        beat = self.exchange.operation.protocol.heartbeat
        self._send(beat if self._client.bare else chunk(beat))

    def _send(self, data: bytes) -> None:
        self.exchange.response_bytes += len(data)
        self._client.send(data)

    def client_paused(self) -> None:
        """Nothing is read that could wait, and a heartbeat need not be sent."""
        self.paused = True

    def client_resumed(self) -> None:
        """Nothing is read that could go on."""
        self.paused = False

    def client_gone(self) -> None:
        """Its handler is cancelled, and with it whatever was asked."""

    def close(self, settlement: Settlement) -> None:
        """End the stream as any that breaks, with what its client had as its usage; in order if that was all."""
        exchange, client = self.exchange, self._client
        self.rest()
        end = exchange.end or (End.DRAINED if self.is_cut else self.how)
        client.attach(None)
        if self.is_cut and self._task is not None:
            self._task.uncancel()
            exchange.resume = ""
        settlement.settle(End.COMPLETE if self.is_over else end)
        if self.is_over:
            data = _DONE if client.bare else chunk(_DONE) + LAST_CHUNK
        else:
            begun = NOTHING_BEGUN._replace(model=exchange.model)
            data = last_event(exchange, broken_stream(end), begun, bare=client.bare)
        self._send(data)
