"""What the chunks of a request's body may be, beyond what the parser checks (RFC 9112 section 7.1).

The parser takes any extension and any size. So the framing is followed beside it: who sends a byte a chunk costs a
hundred times as much as who sends the same body in one, and a size that no body may have would be waited for.
"""

import re
from typing import Final

from aiohttp import StreamReader

from edge.errors import InvalidRequest, RequestTooLarge

MAX_EXTENSION_BYTES: Final = 4096  # of all chunks of a request, and its trailers; nobody is known to send one
_FEW_CHUNKS: Final = 1024  # that may be of any size
_MIN_CHUNK_BYTES: Final = 16  # on average, of all beyond them; what is written piece by piece is buffered in KiB
_MAX_DIGITS: Final = 16
_CRLF: Final = b"\r\n"
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]++)([^\r\n]*+)\r\n")


class Chunks:
    """The framing of one body, which comes to `payload`, followed from its first byte."""

    __slots__ = (
        "_count", "_extension_bytes", "_is_last", "_left", "_max_body_bytes", "_partial", "_received", "done",
        "payload",
    )  # fmt: skip

    def __init__(self, payload: StreamReader, max_body_bytes: int) -> None:
        self.payload = payload
        self._max_body_bytes = max_body_bytes
        self._left = 0  # of the chunk's content, and the CRLF behind it
        self._partial = b""  # how a line begins
        self._count = self._received = self._extension_bytes = 0
        self._is_last = False  # whether trailers are due
        self.done = False

    def follow(self, data: bytes) -> None:
        """Follow what was received; what is no framing is left to the parser.

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
                return
            at += line

    def _chunk(self, data: bytes, at: int) -> int:
        """Take a size line; return its length, 0 for half a one."""
        line = _SIZE_LINE.match(data, at)
        if line is None:
            self.done = data.find(_CRLF, at) >= 0
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
