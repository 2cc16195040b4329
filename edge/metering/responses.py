"""The meter of `responses`.

Source: platform.openai.com, "Responses".
"""

import re
from typing import Final

import msgspec

from edge.exchange import NO_USAGE, Usage
from edge.metering.events import Events, decoded, is_error
from edge.metering.scanning import Scanner
from edge.metering.usage_objects import ABSENT, Response, begun_of, raw_of, response_of, usage_in
from edge.protocols import NOTHING_BEGUN, Begun

_DELTA_TYPE: Final = re.compile(rb'"type": ?"response\.[a-z_.]+\.delta" ?\}[\r\n]+')


class _ResponseEvent(msgspec.Struct):
    type: str = ""
    response: Response | None = None
    error: msgspec.Raw = ABSENT
    sequence_number: msgspec.Raw = ABSENT


_response_event = msgspec.json.Decoder(_ResponseEvent)
# Of an event that was not read, a delta: within its text quotes are escaped.
_SEQUENCE_NUMBER: Final = re.compile(rb'"sequence_number": ?([0-9]+)')
_MAX_DIGITS: Final = 15


class ResponseEvents(Events):
    """`responses`: the last event has the usage, and the whole answer once more."""

    _begun: Begun = NOTHING_BEGUN
    _number: bytes = b""  # of the event that was read last
    _response: Scanner | None = None  # of an event too long to be parsed

    def _read(self, event: bytes) -> bytes:
        found = decoded(_response_event, event)
        if found is None:
            self._read_other(event)
            return event
        self._number = bytes(found.sequence_number)
        if found.type.endswith(".delta"):
            self._frames += 1
            self._take(None, is_last=False)
            if self.learns:
                at = event.rfind(b'"type"')
                self.ending = event[at:] if _DELTA_TYPE.fullmatch(event, at) else b""
        elif is_error(found.type, found.error, event):
            self._fail()
        else:
            self._read_response(found)
        return event

    def _read_response(self, event: _ResponseEvent) -> None:
        """Read an event that has the response as it is now, or nothing that counts."""
        answer, is_last = event.response, event.type in self.last_events
        if answer is not None and not self._begun.response_id:
            self._begun = begun_of(answer)
        self._take(usage_in(answer.usage) if answer is not None and is_last else None, is_last=True)
        if event.type == "response.failed":
            self._fail()
        if is_last:
            self._note_last()

    def _new_scanner(self) -> Scanner:
        self._response = Scanner(b"usage", b"id", b"created_at", b"model")
        return Scanner(b"type", b"sequence_number", b"error", response=self._response)

    def _read_scanned(self, scanner: Scanner) -> None:
        found = scanner.found
        self._number = found.get(b"sequence_number", b"")
        kind = found.get(b"type", b"").decode(errors="replace").strip('"')
        if is_error(kind, raw_of(found, b"error"), b""):
            self._fail()
            return
        if kind.endswith(".delta"):
            self._frames += 1
        answer = response_of(self._response.found) if self._response is not None else None
        self._read_response(_ResponseEvent(kind, answer))

    def begun(self, last: bytes) -> Begun:
        if not self._answers and not self.passed:
            return NOTHING_BEGUN
        found = _SEQUENCE_NUMBER.search(last)
        digits = found[1] if found is not None else self._number
        is_number = digits.isdigit() and len(digits) <= _MAX_DIGITS
        return self._begun._replace(sequence_number=int(digits) if is_number else None)

    def response_id(self, whole: bool) -> str:
        return self._begun.response_id


class StoredEvents(ResponseEvents):
    """The stream of a response that was made, and counted, before."""

    def usage(self, whole: bool) -> Usage:
        return NO_USAGE
