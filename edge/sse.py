"""Server-sent events: cutting a stream into them, a heartbeat, an error.

Source: html.spec.whatwg.org, "Server-sent events". All of it is content, without the framing of HTTP.
"""

import re
from typing import Final

import orjson

EVENT_DATA = re.compile(rb"(?:\A|[\r\n])data:[ ]?([^\r\n]*)")  # of one line
EVENT_ENDS: Final = (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n")
HEARTBEAT: Final = b": keep-alive\n\n"  # a comment: every client skips it, and no proxy between finds the stream idle

# The beginnings of a stream that opens with an error, in the dialects of vLLM, SGLang, older llama.cpp and Anthropic.
_ERROR_OPENINGS: Final = (
    *(
        opening + rest
        for opening in (b"data: ", b"data:")
        for rest in (b'{"error"', b'{"object":"error"', b'{"object": "error"', b'{ "error"')
    ),
    b"error: {",
    b"error:{",
    b"event: error",
    b"event:error",
)
# Anthropic names no status in an event (docs.anthropic.com, "Errors").
_STATUS_OF_TYPE: Final = {
    "invalid_request_error": 400, "authentication_error": 401, "billing_error": 402, "permission_error": 403,
    "not_found_error": 404, "request_too_large": 413, "rate_limit_error": 429, "overloaded_error": 529,
    "timeout_error": 504,
}  # fmt: skip
_LONGEST_OPENING: Final = max(map(len, _ERROR_OPENINGS))
_LINE_OPENINGS: Final = (b":", b"data:", b"event:", b"id:", b"retry:")  # a comment, and the fields that there are
_LONGEST_LINE_OPENING: Final = max(map(len, _LINE_OPENINGS))
_BOM: Final = b"\xef\xbb\xbf"  # which a stream may begin with
_ERROR_DATA = re.compile(rb"^(?:data|error):[ ]?(.*?)\r?$", re.MULTILINE)
_EVENT_END = re.compile(rb"\n\r?\n|\r\r")
_SILENT: Final = (b":", b"\n", b"\r")
_LINE_END: Final = rb"(?:\r\n?|\n)"
_SILENCE = re.compile(rb"(?:(?::[^\r\n]*+" + _LINE_END + rb")*+" + _LINE_END + rb")*+")


def event_end(data: bytes | bytearray, at: int, no_cr: bool) -> int:
    """Return where the first event that ends behind `at` ends, 0 for none; `no_cr`: no carriage return is behind."""
    if no_cr:
        end = data.find(b"\n\n", at)
        return end + 2 if end >= 0 else 0
    found = _EVENT_END.search(data, at)
    return found.end() if found is not None else 0


def silence_end(data: bytes | bytearray, at: int) -> int:
    """Return where the comments and empty lines end that stand at `at`, between two events; `at` for none.

    They are passed over at once: a server can send thousands of them in one read.
    """
    if data[at : at + 1] not in _SILENT:
        return at
    return _SILENCE.match(data, at).end()  # type: ignore[union-attr]  # it matches nothing at all, too


def opens_stream(content: bytes, whole: bool) -> bool | None:
    """Return whether content is a stream of events, by its first line; None: not certain yet.

    Nothing at all, when that is the whole, is a stream without an event.
    """
    opening = content.removeprefix(_BOM).lstrip(b"\r\n")[:_LONGEST_LINE_OPENING]
    if opening.startswith(_LINE_OPENINGS):
        return True
    if any(each.startswith(opening) for each in (_BOM, *_LINE_OPENINGS)):
        return None if not whole else not opening
    return False


def opens_with_error(content: bytes, whole: bool) -> bool | None:
    """Return whether a stream opens with an error; None: not certain yet, unless `content` is the whole."""
    opening = content[:_LONGEST_OPENING]
    if opening.startswith(_ERROR_OPENINGS):
        return True
    if not whole and any(each.startswith(opening) for each in _ERROR_OPENINGS):
        return None
    return False


def error_in(event: bytes) -> tuple[int, bytes]:
    """Return the status that an error event names, else 502, and the JSON that it carries."""
    found = _ERROR_DATA.search(event)
    body = found[1] if found else b""
    try:
        error = orjson.loads(body)
    except orjson.JSONDecodeError:
        return 502, body
    inner = error.get("error", error) if isinstance(error, dict) else None
    code = inner.get("code") if isinstance(inner, dict) else None
    if not isinstance(code, int) and isinstance(inner, dict):
        code = _STATUS_OF_TYPE.get(str(inner.get("type")))
    return code if isinstance(code, int) and 400 <= code < 600 else 502, body


def unnamed_event(data: bytes) -> bytes:
    """Return an event of one line of data, as chat streams have them."""
    return b"data: " + data + b"\n\n"


def named_event(name: str, data: bytes) -> bytes:
    """Return an event with a name and one line of data."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)
