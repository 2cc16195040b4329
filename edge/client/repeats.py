"""Heads that come again: an SDK sends the same one with each request, but for the length of the body.

To parse a head costs more than to answer what it asks for. So what the parser made of one is kept for its connection,
and a read that is the same head with another length, and so many bytes behind it, needs no parser. Only what the parser
accepted is kept, and only a read that holds exactly one request is looked for; all else goes to the parser. Here bytes
are compared; `connection.py` knows when the parser stands between two requests.
"""

import re
from typing import Final

from aiohttp import hdrs

from edge.client.head import Head

_MAX_HEADS: Final = 4  # of a connection: a proxy in front mixes clients
_MAX_HEAD_BYTES: Final = 4096
_MAX_STRANGE: Final = 8  # heads in a row kept in vain: such a client writes a new one each time
_LENGTH = re.compile(rb"\r\ncontent-length: ?([0-9]{1,15})\r\n", re.IGNORECASE)
_MAX_DIGITS: Final = 15


class Repeats:
    """The heads that one connection has shown, each as what stands before the digits of its length and behind them."""

    __slots__ = ("_known", "_oldest", "_strange")

    def __init__(self) -> None:
        self._known: list[tuple[bytes, bytes, Head]] = []
        self._oldest = 0
        self._strange = 0

    def find(self, data: bytes) -> tuple[Head, bytes] | None:
        """Return the head that a read repeats and the body behind it, None for what is not just that."""
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

    def keep(self, data: bytes, head: Head) -> None:
        """Keep the head of a read that the parser found to be one whole request."""
        end = data.find(b"\r\n\r\n", 0, _MAX_HEAD_BYTES) + 4
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
