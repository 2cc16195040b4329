"""Heads that come again: an SDK sends the same one with each request, but for the length of the body.

To parse a head costs more than to answer what it asks for. So what the parser made of one is kept for its connection,
and a read that is the same head with another length, and so many bytes behind it, needs no parser. Only what the parser
accepted is kept, and only a read that holds exactly one request is looked for; all else goes to the parser. Here bytes
are compared, and counted, to know when the parser stands between two requests.
"""

import re
from typing import Final

from aiohttp import hdrs
from aiohttp.http_parser import RawRequestMessage

from edge.client.head import Head

_MAX_HEADS: Final = 4  # of a connection: a proxy in front mixes clients
_MAX_HEAD_BYTES: Final = 4096
_MAX_STRANGE: Final = 8  # heads in a row kept in vain: such a client writes a new one each time
_LENGTH = re.compile(rb"\r\ncontent-length: ?([0-9]{1,15})\r\n", re.IGNORECASE)
_MAX_DIGITS: Final = 15
_CRLF: Final = b"\r\n"
_BLANK_LINE: Final = b"\r\n\r\n"


class Repeats:
    """The heads that one connection has shown, each as what stands before the digits of its length and behind them."""

    __slots__ = ("_known", "_oldest", "_read", "_strange", "due_bytes")

    def __init__(self) -> None:
        self.due_bytes: int | None = 0  # of the body that the parser is at; None: it is not known where it stands
        self._read = b""  # which held the next request, when its head may come again
        self._known: list[tuple[bytes, bytes, Head]] = []
        self._oldest = 0
        self._strange = 0

    def find(self, data: bytes) -> tuple[Head, bytes] | None:
        """Return the head that a read repeats and the body behind it, None for what is not just that."""
        if self.due_bytes != 0:
            return None
        for before, after, head in self._known:
            if not data.startswith(before):
                continue
            at = len(before)
            end = data.find(b"\r", at, at + _MAX_DIGITS + 1)
            if end > at and data.startswith(after, end):
                digits, body = data[at:end], data[end + len(after) :]
                if digits.isdigit() and int(digits) == len(body):
                    self._strange = 0
                    return head, body
        return None

    def is_simple(self, data: bytes) -> bool:
        """Whether a read is known to hold a part of one body at most, and no chunk."""
        due = self.due_bytes
        if due:
            return due >= len(data)
        end = data.find(_BLANK_LINE, 0, _MAX_HEAD_BYTES)
        if due is None or end < 0:
            return False
        length = _LENGTH.search(data, 0, end + len(_CRLF))
        return length is not None and end + len(_BLANK_LINE) + int(length[1]) >= len(data)

    def follow(self, data: bytes, parsed: object, *, waits: bool) -> None:
        """Note where the parser stands after a read, of which it made the message `parsed`, None for none or several.

        A read that begins between two requests must begin with the head of one. Whatever else it has makes the count
        too small, so that it ends below 0: then only the parser knows where it stands. `waits`: no other request is
        there.
        """
        due = self.due_bytes
        if due is None:
            return
        if due:
            due -= len(data)
        elif isinstance(parsed, RawRequestMessage) and not (parsed.chunked or parsed.upgrade or data[:1] in _CRLF):
            due = (
                data.find(_BLANK_LINE) + len(_BLANK_LINE) + int(parsed.headers.get(hdrs.CONTENT_LENGTH, 0)) - len(data)
            )
            if waits and due == 0:
                self._read = data
        else:
            due = -1
        self.due_bytes = due if due >= 0 else None

    def keep(self, head: Head) -> None:
        """Keep the head of the request that is taken now, if it may come again."""
        data, self._read = self._read, b""
        end = data.find(_BLANK_LINE, 0, _MAX_HEAD_BYTES) + len(_BLANK_LINE)
        length = _LENGTH.search(data, 0, end)
        if length is None or head.method != "POST" or hdrs.EXPECT in head.headers or self._strange >= _MAX_STRANGE:
            return
        known = data[: length.start(1)], data[length.end(1) : end], head
        self._strange += 1
        if len(self._known) < _MAX_HEADS:
            self._known.append(known)
        else:
            self._known[self._oldest] = known
            self._oldest = (self._oldest + 1) % _MAX_HEADS
