"""What the meters of all streams share: events are cut out of what passes, and each kind of stream reads its own.

Most tokens need not be shown to a meter, see `metering.Meter.ending`.
"""

import re
from typing import Final, TypeVar

import msgspec

from edge.exchange import NO_USAGE, Usage, UsageSource
from edge.metering.scanning import Scanner
from edge.metering.usage_objects import ABSENT, NULL, UNREADABLE, at_most, raw_of, usage_in
from edge.protocols import NOTHING_BEGUN, Begun
from edge.sse import EVENT_DATA, event_end, opens_with_error, silence_end

_KEPT_OF_LONG: Final = 4  # bytes of an event that is passed on, in which its end may have begun
_DATA: Final = re.compile(rb"(?:\A|[\r\n])data:")
MAX_HELD_BYTES: Final = 32 * 1024  # of one event that is read whole, in 5 ms at most; a longer one goes on as it comes
_SHORTEST_LINE: Final = len(b"\ndata:")
_FIELD_BYTES: Final = len(b"data:")
_SHORTEST_READ: Final = len(b"data:[DONE]\n\n")  # of events that end a stream, fail, or tell usage
_MAX_ODD: Final = 20  # events of a stream that are no JSON and looked through all the same
_T = TypeVar("_T")


def decoded(decoder: msgspec.json.Decoder[_T], event: bytes) -> _T | None:
    """Return the object that an event carries; None for a comment, `[DONE]` and what cannot be read."""
    try:
        at = 0 if event.startswith(b"data: {") else event.find(b"\n") + 1  # behind the line that names the event
        if event.startswith(b"data: {", at):  # as every server writes it, in one line: else this is no JSON
            return decoder.decode(event[at + 6 :])
    except UNREADABLE:
        if len(event) - event.find(b"\n", at) <= _SHORTEST_LINE:
            return None
    try:
        return decoder.decode(_data(event))
    except UNREADABLE:
        return None


def _data(event: bytes) -> bytes:
    """Return the data of an event, as many lines as it has."""
    return b"\n".join(EVENT_DATA.findall(event))


class Events(msgspec.Struct):
    """The meter of one stream: cuts it into events, which a kind of stream reads in `_read`."""

    prompt_estimate: int
    learns: bool
    hide_usage: bool
    hide_running: bool
    last_events: tuple[str, ...] = ()
    n: int = 1
    most: int | None = None
    ending: bytes = b""
    passed: int = 0
    failed: bool = False
    _ended: bool = False
    _frames: int = 0  # that carry a token
    _answers: bool = False  # there was data that is no error
    _usage: Usage | None = None
    _odd: int = 0
    _is_last: bool = False  # the usage is the one at the end of a stream
    _held: bytearray = bytearray()  # an event that has begun
    _long: Scanner | None = None  # of an event too long to be held, which the client gets as it comes

    @property
    def ended(self) -> bool:
        return self._ended and not self._held

    @property
    def holds(self) -> bool:
        return bool(self._held)

    @property
    def has_content(self) -> bool:
        return self._frames > 0

    def feed(self, content: bytes) -> bytes:
        end = content.find(b"\n\n")
        if _SHORTEST_READ <= end + 2 == len(content) < MAX_HELD_BYTES and not self._held and content.find(b"\r") < 0:
            return self._read(content)  # one event, as a read of a stream mostly is
        given = self._cut(content)
        return given if (self.hide_usage or self.hide_running) and given != content else content

    def close(self) -> bytes:
        event = bytes(self._held)
        self._held.clear()
        if self._long is not None:
            self._end_long()
            return b""
        given = self._read(event) if event else b""
        return given if self.hide_usage or self.hide_running else b""

    def is_half(self) -> bool:
        self.close()  # the last event may lack its empty line
        return not self.ended and not self.failed

    def usage(self, whole: bool) -> Usage:
        if whole:
            self.close()
        if self._usage is not None:
            if whole or self._is_last:
                return self._usage
            return msgspec.structs.replace(self._usage, source=UsageSource.RUNNING)
        return self._estimate() if self._answers or self.passed else NO_USAGE

    def begun(self, last: bytes) -> Begun:
        return NOTHING_BEGUN

    def response_id(self, whole: bool) -> str:
        return ""

    def _estimate(self) -> Usage:
        return Usage(self.prompt_estimate, self._tokens_seen(), source=UsageSource.ESTIMATED)

    def _tokens_seen(self) -> int:
        """Return how many tokens passed, of which each event that carries one is taken for one."""
        return at_most(self._frames + self.passed, self.most)

    def _cut(self, content: bytes) -> bytes:
        """Read the events that `content` completes and return what goes on."""
        held = self._held
        looked = max(0, len(held) - 2)  # no event ends before, but its end may have begun
        given_to = len(held) if self._long is not None else 0
        data: bytes | bytearray = content
        if held:
            held += content
            data = held
        no_cr = data.find(b"\r", looked) < 0
        given: list[bytes] = []
        at = 0
        while True:
            if at >= looked and (end := silence_end(data, at)) > at:
                given.append(bytes(data[at:end]))
                at = given_to = end
            if (end := event_end(data, max(at, looked), no_cr)) <= 0:
                break
            event = bytes(data[given_to:end])
            if self._long is not None or len(event) >= MAX_HELD_BYTES:
                given.append(self._pass_long(event))
                self._end_long()
            elif self.ending and event.endswith(self.ending):
                self.passed += 1
                given.append(event)
            elif len(event) < _SHORTEST_READ and event.startswith(b"data:"):
                if not event[_FIELD_BYTES:].isspace():  # which is no event, as a comment is none
                    self._read_odd()
                given.append(event)
            else:
                given.append(self._read(event))
            at = given_to = end
        if data is content:
            held += content[at:]
        else:
            del held[:at]
        if self._long is not None or len(held) >= MAX_HELD_BYTES:
            given.append(self._pass_long(bytes(held[given_to - at :])))
            del held[:-_KEPT_OF_LONG]
        return b"".join(given)

    def _pass_long(self, content: bytes) -> bytes:
        """Return a part of an event that is too long to be held, as it is."""
        if self._long is None:
            self._long = self._new_scanner()
            begin = _DATA.search(content)  # in one line, as every server writes it
            self._long.feed(content, begin.end() if begin is not None else len(content))
        else:
            self._long.feed(content)
        return content

    def _end_long(self) -> None:
        assert self._long is not None
        self._read_scanned(self._long)
        self._long = None

    def _new_scanner(self) -> Scanner:
        return Scanner(b"usage", b"error")

    def _read(self, event: bytes) -> bytes:
        """Read a whole event; return what goes on of it."""
        raise NotImplementedError

    def _read_scanned(self, scanner: Scanner) -> None:
        """Read an event that is too long, or too odd, to be parsed; it counts as a token's."""
        if raw_of(scanner.found, b"error") not in (ABSENT, NULL):
            self._fail()
            return
        self._frames += 1
        self._take(usage_in(raw_of(scanner.found, b"usage")), is_last=False)

    def _take(self, usage: Usage | None, *, is_last: bool) -> None:
        """Note an event that is no error, and its usage, if it has one."""
        self.failed, self._ended, self._answers = False, False, True
        if usage is not None:
            self._usage, self._is_last = usage, is_last

    def _fail(self) -> None:
        self.failed, self._ended = True, False
        self.ending = b""  # what comes next is read, to know whether the error was the last

    def _note_last(self) -> None:
        """Note the event that ends a stream, unless something follows it."""
        self._ended, self.ending = True, b""

    def _read_other(self, event: bytes) -> None:
        """Read an event that carries no object: a comment, `[DONE]`, an error of an odd shape, or nobody knows what."""
        data = _data(event).strip()
        if data == b"[DONE]":
            if "[DONE]" in self.last_events:
                self._note_last()
            return
        if opens_with_error(event, True):
            self._fail()
        elif data and self._odd < _MAX_ODD:
            self._odd += 1
            scanner = self._new_scanner()
            scanner.feed(data)
            self._read_scanned(scanner)
        elif data:
            self._read_odd()

    def _read_odd(self) -> None:
        """Take data that nothing can be read from for a token's."""
        self._frames += 1
        self._take(None, is_last=False)


def is_error(kind: str, error: msgspec.Raw, event: bytes) -> bool:
    """Return whether an event of a typed stream is an error, in its own dialect or in another's."""
    return kind == "error" or (bool(error) and error != NULL) or (not kind and bool(opens_with_error(event, True)))
