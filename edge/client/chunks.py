"""What the chunks of a request's body may be, beyond what the parser checks (RFC 9112 section 7.1).

The parser takes any extension and any size. So the framing is followed beside it: who sends a byte a chunk costs a
hundred times as much as who sends the same body in one, and a size that no body may have would be waited for.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

from aiohttp import StreamReader, hdrs
from aiohttp.http_parser import RawRequestMessage

from edge.errors import InvalidRequest, RequestTooLarge

MAX_EXTENSION_BYTES: Final = 4096  # of all chunks of a request, and its trailers; nobody is known to send one
_FEW_CHUNKS: Final = 1024  # that may be of any size
_MIN_CHUNK_BYTES: Final = 16  # on average, of all beyond them; what is written piece by piece is buffered in KiB
_MAX_DIGITS: Final = 16
_CRLF: Final = b"\r\n"
_BLANK_LINE: Final = b"\r\n\r\n"
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]++)([^\r\n]*+)\r\n")


class Framing:
    """Where the requests of a connection stand in its bytes; `due_bytes` of a body are to come first.

    The parser tells which requests there are, not where. It may tell of one later, and holds its bytes back until then.
    """

    __slots__ = ("_due_bytes", "_head", "_held", "_is_lost", "_max_body_bytes", "chunks")

    def __init__(self, due_bytes: int, max_body_bytes: int) -> None:
        self._due_bytes = due_bytes
        self._max_body_bytes = max_body_bytes
        self._head = b""  # the last bytes of half a one
        self._held = b""
        self._is_lost = False  # behind what only the parser understands
        self.chunks: Chunks | None = None  # of the body that is received

    def follow(self, data: bytes, messages: Iterable[tuple[Any, StreamReader]]) -> None:
        """Follow what was received, of which the parser made these messages; raises as `Chunks.follow` does."""
        told = iter(messages)
        data, self._held = self._held + data, b""
        while data and not self._is_lost:
            if self.chunks is not None:
                data = self.chunks.follow(data)
                self._is_lost = self.chunks.is_broken
                if self.chunks.done:
                    self.chunks = None
            elif self._due_bytes:
                count = min(self._due_bytes, len(data))
                self._due_bytes -= count
                data = data[count:]
            else:
                data = self._take_head(data, told)

    def _take_head(self, data: bytes, told: Iterator[tuple[Any, StreamReader]]) -> bytes:
        """Return what stands behind a head; nothing when it is not whole, or not told of yet."""
        if not self._head:
            data = data.lstrip(_CRLF)  # as the parser does (RFC 9112 section 2.2)
        head = self._head + data
        end = head.find(_BLANK_LINE)
        if end < 0:
            self._head = head[1 - len(_BLANK_LINE) :]
            return b""
        message, payload = next(told, (None, None))
        if message is None or payload is None:
            self._held = data
            return b""
        self._head = b""
        if not isinstance(message, RawRequestMessage) or message.upgrade:
            self._is_lost = True
        elif message.chunked:
            self.chunks = Chunks(payload, self._max_body_bytes)
        else:
            self._due_bytes = int(message.headers.get(hdrs.CONTENT_LENGTH, 0))
        return head[end + len(_BLANK_LINE) :]


class Chunks:
    """The framing of one body, which comes to `payload`, followed from its first byte."""

    __slots__ = (
        "_count", "_extension_bytes", "_is_last", "_left", "_max_body_bytes", "_partial", "_received", "done",
        "is_broken", "payload",
    )  # fmt: skip

    def __init__(self, payload: StreamReader, max_body_bytes: int) -> None:
        self.payload = payload
        self._max_body_bytes = max_body_bytes
        self._left = 0  # of the chunk's content, and the CRLF behind it
        self._partial = b""  # how a line begins
        self._count = self._received = self._extension_bytes = 0
        self._is_last = False  # whether trailers are due
        self.done = False
        self.is_broken = False

    def follow(self, data: bytes) -> bytes:
        """Follow what was received, and return what stands behind the body; what is no framing is left to the parser.

        Raises: `InvalidRequest` for too long extensions and too small chunks, `RequestTooLarge` for one that says so.
        """
        data, self._partial = self._partial + data, b""
        at, end = 0, len(data)
        while at < end and not self.done:
            if self._left:
                count = min(self._left, end - at)
                self._left -= count
                at += count
                continue
            line = (self._trailer if self._is_last else self._chunk)(data, at)
            if not line:
                self._partial = data[at:]
                self._check_extensions(len(self._partial) - _MAX_DIGITS - len(_CRLF))
                return b""
            at += line
        return data[at:]

    def _chunk(self, data: bytes, at: int) -> int:
        """Take a size line; return its length, 0 for half a one."""
        line = _SIZE_LINE.match(data, at)
        if line is None:
            self.is_broken = data.find(_CRLF, at) >= 0
            return 0
        digits, extension = line.span(1), line.span(2)
        if digits[1] - digits[0] > _MAX_DIGITS:
            raise InvalidRequest("the size of a chunk has too many digits")
        size = int(line[1], 16)
        self._extension_bytes += extension[1] - extension[0]
        self._check_extensions(0)
        self._count += 1
        self._received += size
        if self._received > self._max_body_bytes:
            raise RequestTooLarge(f"the body is over the limit of {self._max_body_bytes} bytes")
        if self._count > _FEW_CHUNKS + self._received // _MIN_CHUNK_BYTES:
            raise InvalidRequest(
                f"the chunks of the body are too small: send at least {_MIN_CHUNK_BYTES} bytes in each"
            )
        self._is_last = not size
        self._left = size + len(_CRLF) if size else 0
        return line.end() - at

    def _trailer(self, data: bytes, at: int) -> int:
        """Take a line behind the last chunk; return its length, 0 for half a one."""
        end = data.find(_CRLF, at)
        if end < 0:
            return 0
        self.done = end == at
        self._extension_bytes += end - at
        self._check_extensions(0)
        return end - at + len(_CRLF)

    def _check_extensions(self, more: int) -> None:
        if self._extension_bytes + more > MAX_EXTENSION_BYTES:
            raise InvalidRequest(f"the extensions of the body's chunks are over {MAX_EXTENSION_BYTES} bytes")
