"""Meters of streams: what an answer used, read from its events as they pass.

Most tokens need not be shown to a meter, see `metering.Meter.ending`.

Source: platform.openai.com, "Chat", "Completions", "Responses"; docs.anthropic.com, "Streaming messages"; vLLM and
SGLang for `continuous_usage_stats`.
"""

import re
from typing import Final, TypeVar

import msgspec

from edge.exchange import NO_USAGE, Usage, UsageSource
from edge.metering.usage_objects import (
    ABSENT,
    NULL,
    TAIL_BYTES,
    UNREADABLE,
    USAGE_MEMBER,
    Response,
    Tokens,
    begun_of,
    last_usage,
    occurrences,
    tokens_in,
    usage_in,
    usage_of,
    with_units,
)
from edge.protocols import NOTHING_BEGUN, Begun
from edge.sse import EVENT_DATA, event_end, opens_with_error

MAX_METERED_BYTES: Final = 2**20  # of one event that is read whole; `response.completed` repeats the whole text
MAX_HELD_BYTES: Final = 64 * 1024  # of one event that the client waits for; a longer one goes on as it comes
MAX_ENDING_BYTES: Final = 256
_SPACE: Final = b" \t\r\n"
_OPEN_CHOICE: Final = (b'"finish_reason":null', b'"finish_reason": null')
_DELTA_TYPE = re.compile(rb'"type": ?"response\.[a-z_.]+\.delta" ?\}[\r\n]+')

# What is in base64 has no quotes.
_IMAGE_DONE: Final = (b'"image_generation.completed"', b'"image_edit.completed"')
_LONGEST_IMAGE_DONE: Final = max(map(len, _IMAGE_DONE))

_T = TypeVar("_T")


def _decoded(decoder: msgspec.json.Decoder[_T], event: bytes) -> _T | None:
    """Return the object that an event carries; None for a comment, `[DONE]` and what cannot be read."""
    try:
        if event.startswith(b"data: {"):  # as every server writes it, in one line: else this is no JSON
            return decoder.decode(event[6:])
        at = event.find(b"\n") + 1  # behind the line that names the event
        if event.startswith(b"data: {", at):
            return decoder.decode(event[at + 6 :])
    except UNREADABLE:
        pass
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
    ending: bytes = b""
    passed: int = 0
    failed: bool = False
    _ended: bool = False
    _frames: int = 0  # that carry a token
    _answers: bool = False  # there was data that is no error
    _usage: Usage | None = None
    _is_last: bool = False  # the usage is the one at the end of a stream
    _held: bytearray = bytearray()  # an event that has begun
    _overlong: bool = False  # it is too long: only its end is kept, and the client has got it

    @property
    def ended(self) -> bool:
        return self._ended and not self._held

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def feed(self, content: bytes) -> bytes:
        end = content.find(b"\n\n")
        if 2 <= end + 2 == len(content) < MAX_HELD_BYTES and not self._held and content.find(b"\r") < 0:
            return self._read(content)  # one event, as a read of a stream mostly is
        changes = self.hide_usage or self.hide_running
        given = self._cut(content, MAX_HELD_BYTES if changes else MAX_METERED_BYTES)
        return given if changes and given != content else content

    def close(self) -> bytes:
        event = bytes(self._held)
        self._held.clear()
        if self._overlong:
            self._overlong = False
            self._read_end(event[-TAIL_BYTES:])
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
        return Usage(self.prompt_estimate, self._frames + self.passed, source=UsageSource.ESTIMATED)

    def _cut(self, content: bytes, most: int) -> bytes:
        """Read the events that `content` completes and return what goes on; `most` is as much as is kept of one."""
        held = self._held
        looked = max(0, len(held) - 2)  # no event ends before, but its end may have begun
        given_to = len(held) if self._overlong else 0
        data: bytes | bytearray = content
        if held:
            held += content
            data = held
        no_cr = data.find(b"\r", looked) < 0
        given: list[bytes] = []
        at = 0
        while (end := event_end(data, max(at, looked), no_cr)) > 0:
            event = bytes(data[at:end])
            if self._overlong or len(event) >= most:
                given.append(event[given_to - at :])
                self._read_end(event[-TAIL_BYTES:])
                self._overlong = False
            else:
                given.append(self._read(event))
            at = given_to = end
        if data is content:
            held += content[at:]
        else:
            del held[:at]
        if self._overlong or len(held) >= most:
            given.append(bytes(held[given_to - at :]))
            self._overlong = True
            if len(held) > 2 * TAIL_BYTES:
                del held[:-TAIL_BYTES]
        return b"".join(given)

    def _read(self, event: bytes) -> bytes:
        """Read a whole event; return what goes on of it."""
        raise NotImplementedError

    def _read_end(self, tail: bytes) -> None:
        """Read the end of an event that is too long, or too odd, to be parsed; it counts as a token's."""
        self._frames += 1
        self._take(last_usage(tail), is_last=False)

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
        elif data:
            self._read_end(data[-TAIL_BYTES:])


class _Choice(msgspec.Struct):
    index: msgspec.Raw = ABSENT
    delta: dict[str, msgspec.Raw] | None = None
    text: msgspec.Raw = ABSENT


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT


_chunk = msgspec.json.Decoder(_Chunk)


class ChunkEvents(Events):
    """`chat/completions` and `completions`."""

    _written: dict[bytes, int] = {}  # tokens of each choice, by its index, by its running usage

    def _read(self, event: bytes) -> bytes:
        chunk = _decoded(_chunk, event)
        if chunk is None:
            self._read_other(event)
            return event
        choices, usage = chunk.choices, chunk.usage
        if (chunk.error and chunk.error != NULL) or (choices is None and opens_with_error(event, True)):
            self._fail()
            return event
        self.failed, self._ended, self._answers = False, False, True
        has_usage = bool(usage) and usage != NULL
        if has_usage:
            used = usage_in(usage)
            self._take(used, is_last=not choices)
            if choices and used is not None:
                self._written[bytes(choices[-1].index) or b"0"] = used.completion_tokens
        if _has_token(choices) if choices is not None else not has_usage:
            self._frames += 1
            if self.learns and not has_usage and not (self.ending and event.endswith(self.ending)):
                self.ending = _ending_of(event)
        if has_usage and bytes(usage).startswith(b"{"):
            if choices and self.hide_running:
                return _without_usage(event)
            if choices == [] and self.hide_usage:
                return b""
        return event

    def usage(self, whole: bool) -> Usage:
        used = super().usage(whole)
        if self._is_last or len(self._written) < 2:
            return used
        # Running usage is that of the choice it came with, so the last one is not all that was written.
        return msgspec.structs.replace(used, completion_tokens=sum(self._written.values()))


def _has_token(choices: list[_Choice]) -> bool:
    """Return whether a chunk carries a token: a text, a part of a tool's call, reasoning; not just a role or an end."""
    for choice in choices:
        if len(choice.text) > 2 and choice.text != NULL:
            return True
        if choice.delta:
            for name, value in choice.delta.items():
                if len(value) > 2 and value != NULL and name != "role":  # `""`, `[]` and `{}` hold none
                    return True
    return False


def _ending_of(event: bytes) -> bytes:
    """Return how an event ends from the mark of an unfinished choice on, b"" where that is not near its end."""
    at = event.rfind(_OPEN_CHOICE[0])
    if at < 0:
        at = event.rfind(_OPEN_CHOICE[1])
    return event[at:] if at >= len(event) - MAX_ENDING_BYTES and at >= 0 else b""


def _without_usage(event: bytes) -> bytes:
    """Return an event without the `usage` of its chunk, every other byte as it came.

    A member of that name may stand deeper too: the right one is gone when a parser finds none at the top.
    """
    at = -1
    while (at := event.find(b'"usage"', at + 1)) >= 0:
        found = USAGE_MEMBER.match(event, at)
        if found is None:
            continue
        before, after = event[:at], event[found.end() :]
        if before.rstrip(_SPACE).endswith(b","):
            spliced = before.rstrip(_SPACE)[:-1] + after
        else:
            spliced = before + after.lstrip(_SPACE).removeprefix(b",")
        chunk = _decoded(_chunk, spliced)
        if chunk is not None and not chunk.usage:
            return spliced
    return event


class OtherEvents(ChunkEvents):
    """Streams of sound, images and transcripts: nothing of theirs is a token, unless usage counts it."""

    _units: int = 0
    _before: bytes = b""

    def feed(self, content: bytes) -> bytes:
        for key in _IMAGE_DONE:  # looked for in all that passes: such an event is too long to be kept
            self._units += occurrences(key, self._before, content)
        self._before = (self._before + content[-_LONGEST_IMAGE_DONE:])[-_LONGEST_IMAGE_DONE:]
        return super().feed(content)

    def usage(self, whole: bool) -> Usage:
        return with_units(super().usage(whole), self._units, whole)

    def _estimate(self) -> Usage:
        return NO_USAGE


class _WithUsage(msgspec.Struct):
    usage: msgspec.Raw = ABSENT


class _MessageEvent(msgspec.Struct):
    type: str = ""
    message: _WithUsage | None = None
    usage: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT


_message_event = msgspec.json.Decoder(_MessageEvent)
_MESSAGE_COUNTS: Final = (
    "input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens",
)  # fmt: skip


class MessageEvents(Events):
    """`messages`: the beginning has the prompt, the end the rest, and of each count the latest is right."""

    _latest: Tokens | None = None

    def _read(self, event: bytes) -> bytes:
        found = _decoded(_message_event, event)
        if found is None:
            self._read_other(event)
        elif found.type == "content_block_delta":
            self._frames += 1
            self._take(None, is_last=False)
        elif found.type == "message_start" and found.message is not None:
            self._merge(found.message.usage, is_last=False)
        elif found.type == "message_delta":
            self._merge(found.usage, is_last=True)
        elif _is_error(found.type, found.error, event):
            self._fail()
        else:
            self._take(None, is_last=False)
            if found.type in self.last_events:
                self._note_last()
        return event

    def _merge(self, raw: msgspec.Raw, *, is_last: bool) -> None:
        tokens = tokens_in(raw)
        if tokens is not None and self._latest is not None:
            for name in _MESSAGE_COUNTS:
                if getattr(tokens, name) is None:
                    setattr(tokens, name, getattr(self._latest, name))
        self._latest = tokens or self._latest
        self._take(usage_of(tokens) if tokens is not None else None, is_last=is_last)

    def usage(self, whole: bool) -> Usage:
        used = super().usage(whole)
        if self._usage is None or self._is_last:
            return used
        # The beginning of a message counts the prompt, and nothing of what came since.
        counted = max(used.completion_tokens, self._frames + self.passed)
        return msgspec.structs.replace(used, completion_tokens=counted, source=UsageSource.ESTIMATED)


class _ResponseEvent(msgspec.Struct):
    type: str = ""
    response: Response | None = None
    error: msgspec.Raw = ABSENT
    sequence_number: msgspec.Raw = ABSENT


_response_event = msgspec.json.Decoder(_ResponseEvent)
# Of an event that was not read, a delta: within its text quotes are escaped.
_SEQUENCE_NUMBER = re.compile(rb'"sequence_number": ?([0-9]+)')
_MAX_DIGITS: Final = 15


class ResponseEvents(Events):
    """`responses`: the last event has the usage, and the whole answer once more."""

    _begun: Begun = NOTHING_BEGUN
    _number: msgspec.Raw = ABSENT  # of the event that was read last

    def _read(self, event: bytes) -> bytes:
        found = _decoded(_response_event, event)
        if found is None:
            self._read_other(event)
            return event
        self._number = found.sequence_number
        if found.type.endswith(".delta"):
            self._frames += 1
            self._take(None, is_last=False)
            if self.learns:
                at = event.rfind(b'"type"')
                self.ending = event[at:] if _DELTA_TYPE.fullmatch(event, at) else b""
        elif _is_error(found.type, found.error, event):
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

    def _read_end(self, tail: bytes) -> None:
        self._take(last_usage(tail), is_last=True)

    def begun(self, last: bytes) -> Begun:
        if not self._answers and not self.passed:
            return NOTHING_BEGUN
        found = _SEQUENCE_NUMBER.search(last)
        digits = found[1] if found is not None else bytes(self._number)
        is_number = digits.isdigit() and len(digits) <= _MAX_DIGITS
        return self._begun._replace(sequence_number=int(digits) if is_number else None)

    def response_id(self, whole: bool) -> str:
        return self._begun.response_id


class StoredEvents(ResponseEvents):
    """The stream of a response that was made, and counted, before."""

    def usage(self, whole: bool) -> Usage:
        return NO_USAGE


def _is_error(kind: str, error: msgspec.Raw, event: bytes) -> bool:
    return kind == "error" or (bool(error) and error != NULL) or (not kind and bool(opens_with_error(event, True)))
