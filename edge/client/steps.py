"""Reads that are parsed in steps, with the chunks in them followed: what of a connection concerns a body."""

from typing import Any, Final

from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler

from edge.client.chunks import Chunks
from edge.errors import EdgeError

STEP_BYTES: Final = 8192  # of what may have many chunks, in up to 3 ms


class SteppedHandler(RequestHandler):
    """aiohttp's connection, of which the parser gets a long read in pieces, and others run in between."""

    __slots__ = ("_chunks", "_parked", "_parser_reads", "_rest", "_tail", "answering")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._rest = b""  # of a read
        self._chunks: Chunks | None = None  # of the body that is received
        self._tail = b""  # the last bytes of a read that has no whole head
        self._parser_reads = True
        self._parked = b""  # received while the parser is full
        self.answering: object | None = None

    @property
    def unparsed_bytes(self) -> int:
        """How much of a read the parser has not got yet."""
        return len(self._rest)

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

    def _follow_chunks(self, data: bytes, count: int, max_body_bytes: int) -> None:
        """Refuse chunks that no client needs; `count` requests were parsed of `data`."""
        if count:
            message = self._messages[-1][0]
            is_chunked = count == 1 and isinstance(message, RawRequestMessage) and message.chunked
            self._chunks = Chunks(self._messages[-1][1], max_body_bytes) if is_chunked else None
            data = (self._tail + data).partition(b"\r\n\r\n")[2] if is_chunked else b""
            self._tail = b""
        elif self._chunks is None:
            self._tail = data[-3:]
        if self._chunks is None:
            return
        try:
            self._chunks.follow(data)
        except EdgeError as error:
            payload, self._chunks = self._chunks.payload, None
            if self._messages and self._messages[-1][1] is payload:
                self._messages[-1] = (error, EMPTY_PAYLOAD)  # type: ignore[assignment]  # for its turn
            else:
                self._close = True
                payload.set_exception(error)
