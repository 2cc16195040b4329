"""The answer's `model` under the name that was asked: `model_echo`.

Only the bytes of that one value change, wherever it stands in the object, and everything else stays as it came. Nothing
is parsed into a tree: a walk over the object's members ends at the value, which stands near the front in most dialects.
"""

import re
from typing import Final

import orjson

from edge.metering.meters import Meter
from edge.metering.scanning import LEVELS, Scanner, values
from edge.sse import EVENT_DATA, event_end, silence_end

MAX_JSON_BYTES: Final = 2**20  # of a JSON answer that is held to be changed; a longer one passes as it is
MAX_ECHOED_BYTES: Final = 64 * 1024  # held of one event; of a longer one only so much is looked through

_MODEL: Final = b"model"
_STRING: Final = rb'"(?:[^"\\]++|\\.)*+"'
_OBJECT = re.compile(rb"[ \t\r\n]*\{")
_MEMBER = re.compile(rb"[ \t\r\n,]*+(" + _STRING + rb")[ \t\r\n]*:[ \t\r\n]*", re.DOTALL)
_TEXT = re.compile(_STRING, re.DOTALL)
# Values are passed whole up to some levels, which is six times faster than a match for each of their brackets.
_VALUE = re.compile(_STRING + rb'|[^ \t\r\n,"{}\[\]]++|[{\[]' + values(LEVELS) + rb"[}\]]", re.DOTALL)
_TO_BRACKET = re.compile(values(LEVELS) + rb"([{}\[\]])", re.DOTALL)
_MAX_STEPS: Final = 1000  # members, or brackets that are deeper: 2 ms, as long as no server writes before the name
# Where the name stands one level down: the events of `responses` and `messages`.
_HOLDERS: Final = (b'"response"', b'"message"')


def model_span(document: bytes, at: int = 0, holders: tuple[bytes, ...] = ()) -> tuple[int, int] | None:
    """Return where the value of `model` stands, quotes included, in the JSON object that begins at `at`.

    It is a member of the object itself or of one of its `holders`; None when there is none that is a string, or not in
    what has come of the object.
    """
    opening = _OBJECT.match(document, at)
    if opening is None:
        return None
    at = opening.end()
    for _ in range(_MAX_STEPS):
        member = _MEMBER.match(document, at)
        if member is None:
            break
        name, at = member[1], member.end()
        found = None
        if name == b'"model"':
            value = _TEXT.match(document, at)
            found = value.span() if value is not None else None
        elif name in holders:
            found = model_span(document, at)
        if found is not None:
            return found
        at = _after_value(document, at)
    return None


def _after_value(document: bytes, at: int) -> int:
    """Return where the value at `at` ends; the end of `document` for one that goes on."""
    value = _VALUE.match(document, at)
    if value is not None:
        return value.end()
    depth = int(document.startswith((b"{", b"["), at))  # it is deep, or goes on, or is no JSON
    at += 1
    for _ in range(_MAX_STEPS):
        bracket = _TO_BRACKET.match(document, at) if depth else None
        if bracket is None:
            break
        at = bracket.end()
        depth += 1 if bracket[1] in b"{[" else -1
    return len(document) if depth else at


class DocumentEcho:
    """Puts the name that was asked into a JSON answer, which is held; `meter` and a scanner read it as it comes."""

    __slots__ = ("_parts", "_scanner", "_value", "held_bytes", "meter")

    def __init__(self, model: str, meter: Meter) -> None:
        self.meter = meter
        self._value = orjson.dumps(model)
        self._scanner = Scanner(_MODEL)
        self._parts: list[bytes] = []
        self.held_bytes = 0

    def feed(self, content: bytes) -> None:
        """Hold the next piece."""
        self.meter.feed(content)
        self._scanner.feed(content)
        self._parts.append(content)
        self.held_bytes += len(content)

    def held(self) -> bytes:
        """Return what came, as it came."""
        return b"".join(self._parts)

    def changed(self) -> bytes:
        """Return the whole answer with the name in it; unchanged where it names no model."""
        document = self.held()
        name, end = self._scanner.found.get(_MODEL, b""), self._scanner.ends.get(_MODEL, 0)
        if not name.startswith(b'"'):
            return document
        return b"".join((document[: end - len(name)], self._value, document[end:]))


class EventEcho:
    """Puts the name that was asked into the events of one stream; gives and holds whole events.

    The data of an event is looked at where it is one line, as every server writes it. Of an event over 64 KiB the
    beginning is changed if the name stands there, and the rest passes as it comes.
    """

    __slots__ = ("_held", "_overlong", "_standing", "_tail", "_value", "_written")

    broken = False  # whatever comes, it goes on

    def __init__(self, model: str) -> None:
        self._value = orjson.dumps(model)
        self._held = b""
        self._overlong = False  # what comes is the rest of an event whose beginning was given
        self._tail = b""  # of what was given of it
        # How the last event began, up to the name, and what was written instead. The events of most streams begin
        # alike, and the same bytes have the name at the same place.
        self._standing = self._written = b""

    @property
    def holds(self) -> bool:
        """Whether an event has begun and not ended."""
        return bool(self._held) or self._overlong

    def feed(self, content: bytes) -> bytes:
        """Return the events that `content` completes."""
        parts: list[bytes] = []
        if self._overlong:
            seen = self._tail + content
            end = event_end(seen, 0, False)
            if not end:
                self._tail = seen[-2:]
                return content
            rest = end - len(self._tail)
            parts.append(content[:rest])
            content = content[rest:]
            self._overlong = False
        looked = max(0, len(self._held) - 2)  # no event ends before, but its end may have begun
        content = self._held + content
        no_cr = content.find(b"\r", looked) < 0
        at = 0
        while True:
            if at >= looked and (end := silence_end(content, at)) > at:
                parts.append(content[at:end])
                at = end
            if not (end := event_end(content, max(at, looked), no_cr)):
                break
            parts.append(self._echo(content[at:end]))
            at = end
        self._held = content[at:]
        if len(self._held) > MAX_ECHOED_BYTES:
            parts.append(self._echo(self._held))
            self._overlong, self._tail, self._held = True, self._held[-2:], b""
        return b"".join(parts)

    def close(self) -> bytes:
        """Return what is held: the stream has ended, in order, without an empty line."""
        held, self._held = self._held, b""
        return self._echo(held)

    def _echo(self, event: bytes) -> bytes:
        if self._standing and event.startswith(self._standing):
            return self._written + event[len(self._standing) :]
        if event.find(b'"model"') < 0:
            return event
        data = EVENT_DATA.search(event)
        # Of a longer event no more is looked through than is held of it, so that its reads make no difference.
        span = model_span(event[:MAX_ECHOED_BYTES], data.start(1), _HOLDERS) if data is not None else None
        if span is None:
            return event
        self._standing = event[: span[1]]
        self._written = event[: span[0]] + self._value
        return self._written + event[span[1] :]
