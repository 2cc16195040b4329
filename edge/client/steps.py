"""Reads that are parsed in steps, with the chunks in them followed: what of a connection concerns a body."""

from typing import Any, Final

from aiohttp import StreamReader
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler

from edge.client.chunks import Framing
from edge.errors import EdgeError

_MAX_PARKED_BYTES: Final = 256 * 1024  # pipelined behind a running answer and its 32 queued requests
_MAX_QUEUED_BYTES: Final = 512 * 1024  # of the bodies of these
STEP_BYTES: Final = 8192  # of what may have many chunks, in up to 3 ms


class SteppedHandler(RequestHandler):
    """aiohttp's connection, of which the parser gets a long read in pieces, and others run in between."""

    __slots__ = ("_framing", "_parked", "_parser_reads", "_rest", "answering")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._rest = b""  # of a read
        self._framing: Framing | None = None  # where it is not plain
        self._parser_reads = True
        self._parked = b""  # received while the parser is full
        self.answering: object | None = None

    @property
    def unparsed_bytes(self) -> int:
        """How much of a read the parser has not got yet."""
        return len(self._rest)

    def _pause_transport_reading(self) -> None:
        """Keep what comes from the parser, which is full of pipelined requests; do not stop noticing departure."""
        self._parser_reads = False
        if self.answering is None:
            super()._pause_transport_reading()

    def _resume_transport_reading(self) -> None:
        """Let the parser have what came in the meantime, and go on."""
        self._parser_reads = True
        parked, self._parked = self._parked, b""
        if parked:
            self.data_received(parked)
        if self._parser_reads:
            super()._resume_transport_reading()

    def _park(self, data: bytes) -> None:
        """Hold bytes behind a running answer; a client that sends too many gets no further answer (RFC 9112 9.3.2)."""
        self._parked += data
        if len(self._parked) > _MAX_PARKED_BYTES:
            self._drop_queue()

    def _has_room(self) -> bool:
        """Whether the bodies behind a running answer are as few as may be: no memory counts one before its turn."""
        return sum(payload.total_bytes for _, payload in self._messages) <= _MAX_QUEUED_BYTES

    def _drop_queue(self) -> None:
        """Give no answer any more but the running one."""
        self._parked = b""
        self._messages.clear()
        self._close = True

    def _wait(self, data: bytes) -> None:
        """Hold what came before the parser was through with a read."""
        self._rest += data
        RequestHandler._pause_transport_reading(self)

    def _first_step(self, data: bytes) -> bytes:
        """Return so much of a read as the parser may have now; a byte a chunk, all of it would take 50 ms."""
        self._rest = data[STEP_BYTES:]
        RequestHandler._pause_transport_reading(self)
        self._loop.call_soon(self._next_step)
        return data[:STEP_BYTES]

    def _next_step(self) -> None:
        data, self._rest = self._rest, b""
        if not self._parser_reads:
            self._parked = data + self._parked
        elif data:
            self.data_received(data)
        if not self._rest and (self._parser_reads or self.answering is not None):
            RequestHandler._resume_transport_reading(self)

    def _follow_framing(self, data: bytes, count: int, due_bytes: int, max_body_bytes: int) -> None:
        """Refuse chunks that no client needs; `count` requests were parsed of `data`.

        It is called for each read from the first on that is more than one request, or a part of one, with a length;
        `due_bytes` of a body were to come before that.
        """
        if self._framing is None:
            self._framing = Framing(due_bytes, max_body_bytes)
        try:
            self._framing.follow(data, list(self._messages)[len(self._messages) - count :])
        except EdgeError as error:
            chunks = self._framing.chunks
            assert chunks is not None  # which only their body's can be
            self._refuse_body(chunks.payload, error)

    def _refuse_body(self, payload: StreamReader, error: EdgeError) -> None:
        """Let a body fail for its request, which is the last that is served."""
        while self._messages:
            message = self._messages.pop()
            if message[1] is payload:
                self._messages.append((error, EMPTY_PAYLOAD))  # type: ignore[arg-type]  # for its turn
                return
        self._close = True
        payload.set_exception(error)
