"""Where messages end by RFC 9112 section 6.3, read as strictly as it can be; nothing else of them is looked at.

What two recipients could frame differently ends the reading, "refused". Other parsers forgive more, each in its way.
"""

import re

from tests.fuzz.peers import Message, Reading

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?\r\n")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_BARE = (b"204", b"304")


class _Refused(Exception):
    """Two recipients could differ here."""


class _Open(Exception):
    """More is to come."""


def requests_by_rules(data: bytes) -> Reading:
    """Read the requests of a connection, up to one behind which none may follow."""
    messages: list[Message] = []
    try:
        while data := data.lstrip(b"\r\n"):
            lines, data = _head(data)
            method, target, version = [*lines[0].split(), b"", b""][:3]
            fields = _fields(lines[1:])
            content, data = _content(fields, data, version) or (b"", data)
            messages.append(Message(method, target, content))
            expectation = fields.get(b"expect", [b"100-continue"])[0].lower()
            if version != b"HTTP/1.1" or b"close" in _words(fields, b"connection") or expectation != b"100-continue":
                break
    except (_Refused, _Open) as end:
        return Reading(messages, "refused" if isinstance(end, _Refused) else "open")
    return Reading(messages, "end")


def answer_by_rules(data: bytes) -> Reading:
    """Read the answer to a POST, whose connection ends behind the data."""
    try:
        while True:
            lines, data = _head(data)
            version, status = [*lines[0].split(), b""][:2]
            if not status.startswith(b"1"):
                break
        found = (b"", data) if status in _BARE else _content(_fields(lines[1:]), data, version)
        content = data if found is None else found[0]
    except (_Refused, _Open) as end:
        return Reading([], "refused" if isinstance(end, _Refused) else "open")
    return Reading([Message(b"", status, content)], "end")


def _head(data: bytes) -> tuple[list[bytes], bytes]:
    head, blank, rest = data.partition(b"\r\n\r\n")
    if not blank:
        raise _Open
    return head.split(b"\r\n"), rest


def _fields(lines: list[bytes]) -> dict[bytes, list[bytes]]:
    fields: dict[bytes, list[bytes]] = {}
    for line in lines:
        name, _, value = line.partition(b":")
        fields.setdefault(name.lower(), []).append(value.strip(b" \t"))
    return fields


def _words(fields: dict[bytes, list[bytes]], name: bytes) -> list[bytes]:
    return [each.strip().lower() for each in b",".join(fields.get(name, [])).split(b",")]


def _content(fields: dict[bytes, list[bytes]], data: bytes, version: bytes) -> tuple[bytes, bytes] | None:
    """Return the content and what stands behind it, None where no field tells its end."""
    codings, lengths = fields.get(b"transfer-encoding"), fields.get(b"content-length")
    if codings is not None:
        if lengths is not None or version != b"HTTP/1.1" or set(_words(fields, b"transfer-encoding")) != {b"chunked"}:
            raise _Refused
        return _chunks(data)
    if lengths is None:
        return None
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise _Refused
    length = int(lengths[0])
    if len(data) < length:
        raise _Open
    return data[:length], data[length:]


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    content = b""
    while True:
        line = _SIZE_LINE.match(data)
        if line is None:
            raise _Refused if b"\r\n" in data else _Open
        size, data = int(line[1], 16), data[line.end() :]
        if not size:
            break
        if len(data) < size + 2:
            raise _Open
        if data[size : size + 2] != b"\r\n":
            raise _Refused
        content, data = content + data[:size], data[size + 2 :]
    while True:  # trailers
        line, line_end, data = data.partition(b"\r\n")
        if not line_end:
            raise _Open
        if not line:
            return content, data
