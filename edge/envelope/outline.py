"""A long JSON body read in steps: whether it is JSON, and where the members of its top level stand.

No parser that is quick can stop half-way, so the body is cut into pieces, and each is parsed for itself. What stood
before a piece is written short in front of it, and what is open at its end is closed behind it: `{"a":[1,2` and `,3]}`
are read as `{"a":[1,2]}` and `{"":["",3]}`. All pieces are JSON exactly when the body is (RFC 8259 section 2). Where a
piece may end: within a text, not within an escape or a character; else behind a token, or between two digits.
"""

import re
from collections.abc import Generator
from time import thread_time
from typing import Final

import msgspec

from edge.envelope.members import (
    MAX_MEMBERS,
    SPACE,
    Member,
    check_text,
    no_object,
    not_json,
    too_deep,
    too_many_members,
)

PIECE_BYTES: Final = 1 << 15  # at most, with structure in it
_DENSE_PIECE_BYTES: Final = 1 << 12  # with a mark in each of them up to 2 ms
_FIRST_PIECE_BYTES: Final = 1 << 12  # behind a long text: what ends one and begins the next is short
_MANY_MARKS: Final = 8  # in a piece is one in so many bytes
_FEW_QUOTES: Final = 256  # is one in so many; few are looked at one by one
_LONG_TEXT_BYTES: Final = 1 << 13  # a text is read by itself where so many follow
_FIRST_TEXT_BYTES: Final = 1 << 14
_TEXT_PIECE_BYTES: Final = 1 << 18  # in 0.3 ms
_STEP_S: Final = 0.001  # of CPU; pieces that cost less share a step
_MAX_DEPTH: Final = 1000  # about what the parser takes
_MAX_KEY_BYTES: Final = 512  # of a member that anyone looks for; a letter that is escaped has six
_BREAKS: Final = b' \t\r\n,:[]{}"'
_LONG_TOKEN_BYTES: Final = 64  # only a number has more behind the last of the breaks
_NOT_MARKS: Final = bytes(set(range(256)) - set(b'[]{},:"'))
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_CLOSED: Final = bytes.maketrans(b"[{", b"]}")
_TOKEN = re.compile(rb'"[^"]*+"?+|[\[\]{},:]')
_DIGITS = re.compile(rb"[0-9]{3,}")
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")  # the other half follows: twelve bytes, one character
_ESCAPE_BYTES: Final = 6
_OPENS: Final = b"[{"
_OPENING_BIT: Final = 2  # which "[" and "{" have, and "]" and "}" have not
_TOP: Final = 2  # open brackets within which no member of the top level begins or ends
_ARRAY, _OBJECT = b"[{"
_FEW_BYTES: Final = 1 << 12
# The phases of a member.
_KEY: Final = "key"
_COLON: Final = "colon"
_VALUE: Final = "value"
_json = msgspec.json.Decoder(msgspec.Raw)
_text = msgspec.json.Decoder(str)


def plain_quotes(window: bytes) -> bytes:
    """Return a piece of JSON, of the same length, in which each quote begins or ends a text."""
    if b"\\" not in window:
        return window
    return window.replace(b"\\\\", b"__").replace(b'\\"', b"__")


def _text_in(window: bytes) -> int:
    """Return how much of a piece that begins within a text is that text."""
    at = window.find(b'"')
    if at >= 0 and window.count(b'"') > len(window) // _FEW_QUOTES:
        at = plain_quotes(window).find(b'"')
        return at if at >= 0 else len(window)
    while at >= 0:
        if not _is_escaped(window, at):
            return at
        at = window.find(b'"', at + 1)
    return len(window)


def _is_escaped(window: bytes, at: int) -> bool:
    """Return whether an odd number of backslashes stands before a place."""
    before = window[max(0, at - _FEW_BYTES) : at]
    kept = before.rstrip(b"\\")
    if not kept:
        before = window[:at]
        kept = before.rstrip(b"\\")
    return (len(before) - len(kept)) % 2 == 1


def end_within_text(window: bytes) -> int:
    """Return where a piece may end that goes on within a text: not within an escape, a pair of them or a character."""
    end = len(window)
    escape = window.rfind(b"\\", max(0, end - 2 * _ESCAPE_BYTES))
    if escape >= 0:
        end = escape - _is_escaped(window, escape)  # where the last one begins
        half = max(0, end - _ESCAPE_BYTES)
        return half if _HIGH_SURROGATE.match(window, half, end) and not _is_escaped(window, half) else end
    for last in range(end - 1, end - 5, -1):
        if window[last] < 0x80:
            break
        if window[last] >= 0xC0:
            return last
    return end


class Outline:
    """What the top level of an object holds: its `members`, in their order.

    `inside` is where the first one could stand.
    """

    __slots__ = (
        "_at", "_body", "_in_text", "_is_key", "_key", "_last", "_mark", "_name", "_number",
        "_phase", "_piece_bytes", "_stack", "_text_bytes", "inside", "members",
    )  # fmt: skip

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.members: list[Member] = []
        self.inside = 0
        self._at = 0  # where the next piece begins
        self._piece_bytes = PIECE_BYTES  # how long it may be
        self._text_bytes = _FIRST_TEXT_BYTES  # and where it is within a text alone
        self._stack = bytearray()  # what is open there, each by its bracket
        self._in_text = False  # whether it begins within a text
        self._is_key = False  # whether the text that was begun last is a key
        self._last = b""  # the byte before it that is no space, b"0" for any end of a value
        self._number = b""  # the number within which it begins, in short
        self._phase = _KEY  # of the member of the top level that is open
        self._name: str | None = None  # None for a very long one
        self._key = 0  # where its key begins
        self._mark = 0  # where its key, or its value, begins

    def read(self) -> Generator[None, None, None]:
        """Read the body, and yield where others may run. Raises: `InvalidRequest`."""
        begun = thread_time()
        while self._at < len(self._body):
            if self._in_text and self._read_text():
                self._piece_bytes = _FIRST_PIECE_BYTES
                self._text_bytes = min(2 * self._text_bytes, _TEXT_PIECE_BYTES)
            else:
                self._text_bytes = _FIRST_TEXT_BYTES
                self._read_piece()
                self._piece_bytes = min(2 * self._piece_bytes, PIECE_BYTES)
            if thread_time() - begun > _STEP_S:
                yield
                begun = thread_time()
        if self._stack or self._in_text or not self._last:
            raise not_json()
        for index, (name, key, start, end) in enumerate(self.members):
            self.members[index] = Member(name, key, *(yield from _without_space(self._body, start, end)))

    def _read_text(self) -> bool:
        """Read on in the text that is open, where that is long; most of a large body is text, and has no structure."""
        body, at = self._body, self._at
        window = body[at : at + self._text_bytes]
        count = _text_in(window)
        if count == len(window) and at + count < len(body):
            count = end_within_text(window)
        if count < _LONG_TEXT_BYTES:
            return False
        window = window[:count]
        check_text(window)
        _check(b'"%b"' % window)
        self._at += len(window)
        return True

    def _read_piece(self) -> None:
        window = self._body[self._at : self._at + self._piece_bytes]
        if len(window.translate(None, _NOT_MARKS)) > len(window) // _MANY_MARKS:
            window = window[:_DENSE_PIECE_BYTES]
        plain = plain_quotes(window)
        if self._at + len(window) < len(self._body):
            count = self._end(window, plain)
            window, plain = window[:count], plain[:count]
        check_text(window)
        if not self._last:
            told = window.lstrip(SPACE)
            if not told:
                self._at += len(window)
                return
            if not told.startswith(b"{"):
                raise no_object()
        before, depth, was_in_text = self._opened(), len(self._stack), self._in_text
        lowest = self._follow(plain)
        _check(before + window + self._closed())
        if lowest <= 1:
            self._list_members(plain, depth, was_in_text)
        self._at += len(window)

    def _end(self, window: bytes, plain: bytes) -> int:
        """Return where a piece of the window may end."""
        count = len(plain)
        if self._in_text != bool(plain.count(b'"') % 2):  # it ends within a text
            return end_within_text(window)
        for end in range(count, count - _LONG_TOKEN_BYTES, -1):
            if plain[end - 1] in _BREAKS:
                return end
        for end in range(count - 1, count - _LONG_TOKEN_BYTES, -1):
            if plain[end - 2 : end + 1].isdigit():
                return end
        raise not_json()

    def _opened(self) -> bytes:
        """Return in short what stands before the next piece."""
        if not self._stack:
            return b"{}" if self._last else b""
        opened, tail = bytes(self._stack[:-1]).replace(b"{", b'{"":'), b""
        is_object = self._stack[-1] == _OBJECT
        if self._in_text:
            tail = b'"' if self._is_key or not is_object else b'"":"'
        elif self._last == b",":
            tail = b'"":0,' if is_object else b"0,"
        elif self._last == b":":
            tail = b'"":'
        elif self._last == b'"':
            tail = b'""'
        elif self._last == b"0":
            tail = (b'"":' if is_object else b"") + (self._number or b'""')  # which nothing goes on
        return opened + self._stack[-1:] + tail

    def _closed(self) -> bytes:
        """Return what closes all that is open."""
        if not self._stack:
            return b""
        is_object = self._stack[-1] == _OBJECT
        if self._in_text:
            tail = b'":0' if self._is_key else b'"'
        elif self._last == b",":
            tail = b'"":0' if is_object else b"0"
        else:
            tail = {b":": b"0", b'"': b":0"}.get(self._last, b"")
        return tail + self._stack[::-1].translate(_CLOSED)

    def _follow(self, plain: bytes) -> int:
        """Go on to the end of a piece; return the lowest depth in it."""
        texts = plain.split(b'"')
        brackets = b"".join(texts[self._in_text :: 2]).translate(None, _NOT_BRACKETS)
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"").replace(b"[]", b"").replace(b"{}", b"")
        lowest = self._follow_brackets(brackets)
        begun_in_text, self._in_text = self._in_text, self._in_text != (len(texts) % 2 == 0)
        self._follow_tokens(plain, begun_in_text)
        return lowest

    def _follow_brackets(self, brackets: bytes) -> int:
        """Open and close what a piece does, whose brackets match: that is checked with it; return the lowest depth."""
        lowest = min(len(self._stack), _TOP)
        inner = self._stack[_TOP:]
        push, pop = inner.append, inner.pop
        try:
            for bracket in brackets:  # most often this loop is the whole cost of a piece that is built to be slow
                if bracket & _OPENING_BIT:
                    push(bracket)
                else:
                    pop()
            self._stack[_TOP:] = inner
        except IndexError:  # it reaches the top level
            lowest = len(self._stack)
            for bracket in brackets:
                if bracket & _OPENING_BIT:
                    self._stack.append(bracket)
                elif self._stack:
                    self._stack.pop()
                    lowest = min(lowest, len(self._stack))
                else:
                    raise not_json() from None
        if len(self._stack) > _MAX_DEPTH:
            raise too_deep()
        return lowest

    def _follow_tokens(self, plain: bytes, begun_in_text: bool) -> None:
        """Note between which tokens a piece ends."""
        told = plain.rstrip(SPACE)
        if not told and not self._in_text:
            self._number = b""
            return
        last = told[-1:]
        quote = len(plain)  # that begins the last text
        if self._in_text:
            quote = plain.rfind(b'"')
        elif last == b'"':
            quote = plain.rfind(b'"', 0, len(told) - 1)
        if 0 <= quote < len(plain):
            before = plain[:quote].rstrip(SPACE)[-1:] or (b'"' if begun_in_text else self._last)
            self._is_key = before in (b"{", b",") and self._stack[-1:] == b"{"
        if self._in_text:
            self._last = b'"'
            return
        number, self._number = self._number, b""
        if last not in _BREAKS and len(told) == len(plain):
            written = re.split(rb'[\s,:\[\]{}"]', plain)[-1]
            self._number = _DIGITS.sub(b"11", (number if written == plain else b"") + written)
        self._last = last if last in (b"[", b"{", b",", b":") or (last == b'"' and self._is_key) else b"0"

    def _list_members(self, plain: bytes, depth: int, begun_in_text: bool) -> None:
        """Note the members of the top level that begin or end in a piece."""
        at, first = self._at, 0
        if begun_in_text:
            first = plain.find(b'"') + 1
            if first and depth == 1 and self._phase is _KEY:
                self._begin_member(at + first)
        for token in _TOKEN.finditer(plain, first) if first or not begun_in_text else ():
            start = token.start()
            kind = plain[start]
            if kind in _OPENS:
                if not depth:
                    self.inside = at + start + 1
                depth += 1
            elif kind in b"]}":
                depth -= 1
                if not depth:
                    self._end_member(at + start)
            elif depth != 1:
                continue
            elif kind == ord('"') and self._phase is _KEY:
                self._mark = at + start
                if plain[token.end() - 1] == kind and token.end() > start + 1:
                    self._begin_member(at + token.end())
            elif kind == ord(":"):
                self._phase, self._mark = _VALUE, at + start + 1
            elif kind == ord(","):
                self._end_member(at + start)

    def _begin_member(self, end: int) -> None:
        """Take the key that ends there."""
        self._phase, self._name, self._key = _COLON, None, self._mark
        if len(self.members) == MAX_MEMBERS:
            raise too_many_members()
        if end - self._mark <= _MAX_KEY_BYTES:
            try:
                self._name = _text.decode(self._body[self._mark : end])
            except msgspec.DecodeError:  # half a pair of surrogates
                raise not_json() from None

    def _end_member(self, end: int) -> None:
        """Take the value that ends there."""
        if self._phase is _VALUE:
            self.members.append(Member(self._name, self._key, self._mark, end))
        self._phase = _KEY


def _check(piece: bytes) -> None:
    try:
        _json.decode(piece)
    except RecursionError:
        raise too_deep() from None
    except msgspec.DecodeError:
        raise not_json() from None


def _without_space(body: bytes, start: int, end: int) -> Generator[None, None, tuple[int, int]]:
    """Return where a value begins and ends that has space around it."""
    while body[start : start + 1] in (b" ", b"\t", b"\r", b"\n"):
        piece = body[start : min(end, start + PIECE_BYTES)]
        start += len(piece) - len(piece.lstrip(SPACE))
        yield
    while body[end - 1 : end] in (b" ", b"\t", b"\r", b"\n"):
        piece = body[max(start, end - PIECE_BYTES) : end]
        end -= len(piece) - len(piece.rstrip(SPACE))
        yield
    return start, end
