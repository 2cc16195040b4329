"""The prompt of a JSON body: the raw texts that an engine may have read before, in the order in which it reads them.

Chat templates put tools and the system's text in front, wherever they stand in the body. Nothing is decoded: whether an
engine has read a prompt's beginning is seen by its bytes. Where messages end is seen by how JSON looks between them; a
place that only looks so does no harm, as it looks so in the next request too.
"""

import re
from typing import Final, NamedTuple

from edge.envelope.json import Envelope

_HEAD: Final = ("previous_response_id", "tools", "system", "instructions")
_TEXTS: Final = ("messages", "input", "prompt")
_SESSIONS: Final = ("prompt_cache_key", "session_id")
_MAX_SESSION_BYTES: Final = 1024
_ENDS: Final = 8  # of messages, the last ones
_MOST_LOOKED_AT: Final = 256  # places that might be one
_WINDOW_BYTES: Final = 1 << 17  # from the end, and from the start: a turn that is longer is found by less
_HOME_BYTES: Final = 512
_MAX_CLEANED_BYTES: Final = 1 << 22
_CACHE_CONTROL: Final = b'"cache_control"'
_OPENS: Final = re.compile(rb"[ \t\r\n]*\{")
# What stands near the beginning of a message or an item, and of nothing within one.
_MESSAGE: Final = re.compile(rb'[ \t\r\n]*\{[^{}]{0,32}?"role"')
_ITEM: Final = re.compile(rb'[ \t\r\n]*\{[^{}]{0,64}?"(?:role"|call_id"|id"|function_call|reasoning")')
_ROLE_BYTES: Final = 32  # in which a message may end with its role
_OWN: Final = re.compile(rb'"(?:assistant|function_call|reasoning)"')
_OWN_WITHIN_BYTES: Final = 96  # of the beginning of what the model wrote, or of its end
_CLOSING: Final = b"] \t\r\n"

Raw = bytes | memoryview


class Prompt(NamedTuple):
    """What an engine reads: the values in `head`, then `data` from `start` to the last of `ends`.

    `ends` are where the last messages end, in their order; of a text there is only its own end. `previous` is the one
    with which the request before ended, 0 where there was none. `home` is how the conversation began. `session` is the
    caller's own name for it, b"" for none.
    """

    head: tuple[Raw, ...]
    data: bytes
    start: int
    ends: tuple[int, ...]
    previous: int
    home: bytes
    session: bytes
    is_text: bool


def prompt_of(envelope: Envelope, body: bytes, *, cleaned: bool = False) -> Prompt:
    """Return the prompt of a body that was read.

    `cleaned` leaves `cache_control` out, which moves from message to message (docs.anthropic.com, "Prompt caching").
    """
    is_long = envelope.members is None
    head, data, start, end, session = _of_long(envelope, body) if is_long else _of_short(envelope)
    if cleaned and end - start <= _MAX_CLEANED_BYTES and data.find(_CACHE_CONTROL, start, end) >= 0:
        data = _without_cache_control(data[start:end])
        start, end = 0, len(data)
    if data[start : start + 1] == b"[":
        while end > start + 1 and data[end - 1] in _CLOSING:
            end -= 1
        ends = _message_ends(data, start, end)
        return Prompt(head, data, start, ends, _previous(data, ends), _home(data, start, end), session, False)
    end -= end > start + 1  # a text that goes on has no quote there
    return Prompt(head, data, start, (end,), 0, data[start : min(end, start + _HOME_BYTES)], session, True)


def _of_short(envelope: Envelope) -> tuple[tuple[Raw, ...], bytes, int, int, bytes]:
    found = envelope.members
    assert found is not None
    head = tuple([memoryview(found[name]) for name in _HEAD if name in found])
    data = next((bytes(found[name]) for name in _TEXTS if name in found), b"")
    session = next((bytes(found[name]) for name in _SESSIONS if name in found), b"")
    return head, data, 0, len(data), session[:_MAX_SESSION_BYTES]


def _of_long(envelope: Envelope, body: bytes) -> tuple[tuple[Raw, ...], bytes, int, int, bytes]:
    members = envelope.places.members if envelope.places is not None else ()
    places, view = {name: (start, end) for name, _, start, end in members}, memoryview(body)
    head = tuple([view[slice(*places[name])] for name in _HEAD if name in places])
    start, end = next((places[name] for name in _TEXTS if name in places), (0, 0))
    session = next(
        (bytes(view[slice(*places[name])][:_MAX_SESSION_BYTES]) for name in _SESSIONS if name in places), b""
    )
    return head, body, start, end, session


def _message_ends(data: bytes, start: int, end: int) -> tuple[int, ...]:
    """Return where the last messages or items end, the last one at `end`."""
    sure, others = [end], [end]
    low, at = max(start, end - _WINDOW_BYTES), end
    begins = _MESSAGE if data.find(b'"type"', start, start + _OWN_WITHIN_BYTES) < 0 else _ITEM
    for _ in range(_MOST_LOOKED_AT):
        at = data.rfind(b"},", low, at)
        if at < 0 or len(sure) > _ENDS:
            break
        if begins.match(data, at + 2, end) or data.find(b'"role"', max(start, at - _ROLE_BYTES), at) >= 0:
            sure.append(at + 1)
        elif len(others) <= _ENDS and _OPENS.match(data, at + 2, end):
            others.append(at + 1)
    found = sure if len(sure) > 1 else others
    return tuple(found[_ENDS - 1 :: -1])


def _previous(data: bytes, ends: tuple[int, ...]) -> int:
    """Return the end of the message before the model's last ones, of which one may be an answer in several items."""
    answered = False
    for number in range(len(ends) - 1, 0, -1):
        begin, end = ends[number - 1], ends[number]
        is_own = _OWN.search(data, begin, min(end, begin + _OWN_WITHIN_BYTES)) or _OWN.search(
            data, max(begin, end - _OWN_WITHIN_BYTES), end
        )
        if answered and not is_own:
            return end
        answered = answered or is_own is not None
    return ends[0] if answered and len(ends) < _ENDS else 0


def _home(data: bytes, start: int, end: int) -> bytes:
    """Return how the user's first message begins, by which conversations differ; a system's text they may share."""
    at = data.find(b'"user"', start, min(end, start + _WINDOW_BYTES))
    if at < 0:
        return data[start : min(end, start + _HOME_BYTES)]
    begin = max(data.rfind(b"{", start, at), start)
    close = data.find(b"},", at, min(end, begin + _HOME_BYTES))
    return data[begin : min(begin + _HOME_BYTES, end if close < 0 else close + 1)]


def _without_cache_control(text: bytes) -> bytes:
    """Return a text without the members of that name, each with its comma."""
    parts: list[bytes] = []
    at = 0
    while (key := text.find(_CACHE_CONTROL, at)) >= 0 and len(parts) < _MOST_LOOKED_AT:
        close = text.find(b"}", key) + 1
        if not close:
            break
        before = text[at:key].rstrip(b" \t\r\n")
        if before.endswith(b","):
            before = before[:-1]
        elif text[close : close + 1] == b",":
            close += 1
        parts.append(before)
        at = close
    parts.append(text[at:])
    return b"".join(parts)
