"""What an answer used, read out of its bytes as they pass.

A meter sees the content of one answer, without the framing of HTTP, in whatever pieces it comes. It looks at the few
members that tell of usage and skips the rest; it never fails, whatever an upstream sends. Most tokens of a stream need
not be shown to it at all, see `Meter.ending`.

The upstream's own counts are taken as they stand: the last ones, never a sum, since running usage is cumulative. A
count that is missing or null is none; one that is no whole number from 0 to 2**53 makes the object that it stands in
nonsense, and nonsense is as good as no usage. Where there is none, the frames that carry a token are counted.

Source: platform.openai.com, "Chat", "Completions", "Responses"; docs.anthropic.com, "Streaming messages"; vLLM and
SGLang for `continuous_usage_stats`.
"""

import re
from typing import Annotated, Final, Protocol, TypeVar

import msgspec

from edge.events import opens_with_error
from edge.exchange import NO_USAGE, Usage, UsageSource

MAX_DOCUMENT_BYTES: Final = 2**20  # of an answer that is no stream, kept to be read as a whole
MAX_EVENT_BYTES: Final = 2**20  # of one event, likewise; `response.completed` repeats the whole text
MAX_HELD_BYTES: Final = 64 * 1024  # of one event that the client waits for; a longer one goes on as it comes
TAIL_BYTES: Final = 64 * 1024  # kept of what is longer: behind the usage stand the caller's own tools and metadata
MAX_ENDING_BYTES: Final = 256
_BYTES_PER_TOKEN: Final = 4

_UNREADABLE: Final = (ValueError, RecursionError)  # what msgspec raises: both its own errors are ValueErrors
_NULL: Final = msgspec.Raw(b"null")
_ABSENT: Final = msgspec.Raw(b"")
_EVENT_END = re.compile(rb"\n\r?\n|\r\r")
_DATA = re.compile(rb"(?:\A|[\r\n])data:[ ]?([^\r\n]*)")
# A quote within a JSON text has a backslash before it, so that none of this is found in what a model says.
_USAGE = re.compile(
    rb'(?<!\\)"usage"[ \t\r\n]*:[ \t\r\n]*'
    rb"(\{[^{}]*+(?:\{[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+\}[^{}]*+)*+\})"
)
_SPACE: Final = b" \t\r\n"
_OPEN_CHOICE: Final = (b'"finish_reason":null', b'"finish_reason": null')
_DELTA_TYPE = re.compile(rb'"type": ?"response\.[a-z_.]+\.delta" ?\}[\r\n]+')
_IMAGE_KEYS: Final = (b'"b64_json"', b'"url"')


class Meter(Protocol):
    """Reads the usage of one answer while its content passes.

    `ending` is how an event ends that need not be shown: content that is one event, that ends so, and that begins where
    `holds` is false may go on without `feed`, each counted by `passed += 1`. It is b"" as long as there is none. It is
    taken from the events themselves and reaches from `"finish_reason":null` (in `responses` from a `type` that is a
    delta's) to the empty line. What ends in the same bytes is another frame of an unfinished choice with nothing behind
    it: usage, an error, a finish reason and `[DONE]` end otherwise. Both marks have quotes that would be escaped within
    a text, so that no text can end so. `messages` has no such mark and no `ending`, and running usage is read from
    every event. What is lost is usage on a frame of content by a server that puts it in front of the choices of some
    frames and not of others; the last usage of a stream is never lost.

    `failed` says that the last data before `[DONE]`, or before the end, is an error.
    """

    ending: bytes
    passed: int
    failed: bool

    @property
    def holds(self) -> bool:
        """Whether an event has begun and not ended; where events are changed, it is held back."""

    def feed(self, content: bytes) -> bytes:
        """Return what the client gets: the same object, unless something was changed or held back."""

    def close(self) -> bytes:
        """Return what is held back: the answer has ended, in order, without an empty line."""

    def usage(self, whole: bool) -> Usage:
        """Return what the answer used, as far as it came; `whole` says that it came to its orderly end."""


class Metering(msgspec.Struct, frozen=True):
    """How the answer to one request is to be metered.

    `continuous` says that the upstream was asked for running usage. `hide_usage` and `hide_running` say that the client
    did not ask for what we asked for: the last frame, with usage and no choices, and the usage on the others.
    `prompt_estimate` is what counts for the prompt where the upstream says nothing, in tokens.
    """

    operation: str
    continuous: bool = False
    hide_usage: bool = False
    hide_running: bool = False
    prompt_estimate: int = 0

    @property
    def changes(self) -> bool:
        """Whether a meter of events may change or hold back what passes."""
        return self.hide_usage or self.hide_running

    def events(self) -> Meter:
        """Return a meter for an answer that is a stream of events."""
        kind = _EVENTS.get(self.operation, _OtherEvents)
        return kind(self.prompt_estimate, not self.continuous, self.hide_usage, self.hide_running)

    def document(self) -> Meter:
        """Return a meter for any other answer."""
        return _DOCUMENTS.get(self.operation, _Document)(self.prompt_estimate)


# --- usage objects

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = None
    reasoning_tokens: _Count | None = None


class _Tokens(msgspec.Struct):
    """A usage object in any of the dialects."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    total_tokens: _Count | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    cache_creation_input_tokens: _Count | None = None
    cache_read_input_tokens: _Count | None = None
    prompt_tokens_details: msgspec.Raw = _ABSENT
    completion_tokens_details: msgspec.Raw = _ABSENT
    input_tokens_details: msgspec.Raw = _ABSENT
    output_tokens_details: msgspec.Raw = _ABSENT


_details = msgspec.json.Decoder(_Details)
_tokens = msgspec.json.Decoder(_Tokens)
_NO_DETAILS: Final = _Details()


def _tokens_in(raw: msgspec.Raw) -> _Tokens | None:
    if not raw or raw == _NULL:
        return None
    try:
        return _tokens.decode(raw)
    except _UNREADABLE:
        return None


def _usage_of(tokens: _Tokens) -> Usage | None:
    """Return what a usage object says; None when it holds no count of tokens."""
    prompt = tokens.prompt_tokens
    completion = tokens.completion_tokens if tokens.completion_tokens is not None else tokens.output_tokens
    cached = tokens.cache_read_input_tokens or 0
    if prompt is None and tokens.input_tokens is not None:  # what `messages` calls so is what no cache had a part in
        prompt = tokens.input_tokens + (tokens.cache_creation_input_tokens or 0) + cached
    total = tokens.total_tokens
    if total is not None:
        if prompt is None:
            prompt = max(0, total - (completion or 0))
        elif completion is None:
            completion = max(0, total - prompt)
    if prompt is None and completion is None:
        return None
    reasoning = 0
    if details := tokens.prompt_tokens_details or tokens.input_tokens_details:
        cached = cached or _details_in(details).cached_tokens or 0
    if details := tokens.completion_tokens_details or tokens.output_tokens_details:
        reasoning = _details_in(details).reasoning_tokens or 0
    return Usage(prompt or 0, completion or 0, cached, reasoning, 0, UsageSource.FINAL)


def _details_in(raw: msgspec.Raw) -> _Details:
    if raw == _NULL:
        return _NO_DETAILS
    try:
        return _details.decode(raw)
    except _UNREADABLE:
        return _NO_DETAILS


def _usage_in(raw: msgspec.Raw) -> Usage | None:
    tokens = _tokens_in(raw)
    return _usage_of(tokens) if tokens is not None else None


def _last_usage(tail: bytes) -> Usage | None:
    """Return the last usage in the end of what is too long, or too odd, to be parsed, or was cut."""
    usage = None
    for found in _USAGE.finditer(tail):
        usage = _usage_in(msgspec.Raw(found[1])) or usage
    return usage


# --- streams of events

_T = TypeVar("_T")


def _decoded(decoder: msgspec.json.Decoder[_T], event: bytes) -> _T | None:
    """Return the object that an event carries; None for a comment, `[DONE]` and what cannot be read."""
    try:
        if event.startswith(b"data: {"):  # as every server writes it, in one line: else this is no JSON
            return decoder.decode(event[6:])
        at = event.find(b"\n") + 1  # behind the line that names the event
        if event.startswith(b"data: {", at):
            return decoder.decode(event[at + 6 :])
    except _UNREADABLE:
        pass
    try:
        return decoder.decode(_data(event))
    except _UNREADABLE:
        return None


def _data(event: bytes) -> bytes:
    """Return the data of an event, as many lines as it has."""
    return b"\n".join(_DATA.findall(event))


class _Events(msgspec.Struct):
    """The meter of one stream: cuts it into events, which a kind of stream reads in `_read`."""

    prompt_estimate: int
    learns: bool
    hide_usage: bool
    hide_running: bool
    ending: bytes = b""
    passed: int = 0
    failed: bool = False
    _frames: int = 0  # that carry a token
    _answers: bool = False  # there was data that is no error
    _usage: Usage | None = None
    _is_last: bool = False  # the usage is the one at the end of a stream
    _held: bytearray = bytearray()  # an event that has begun
    _overlong: bool = False  # it is too long: only its end is kept, and the client has got it

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def feed(self, content: bytes) -> bytes:
        end = content.find(b"\n\n")
        if 2 <= end + 2 == len(content) < MAX_HELD_BYTES and not self._held and content.find(b"\r") < 0:
            return self._read(content)  # one event, as a read of a stream mostly is
        changes = self.hide_usage or self.hide_running
        given = self._cut(content, MAX_HELD_BYTES if changes else MAX_EVENT_BYTES)
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

    def usage(self, whole: bool) -> Usage:
        if whole:
            self.close()
        if self._usage is not None:
            if whole or self._is_last:
                return self._usage
            return msgspec.structs.replace(self._usage, source=UsageSource.RUNNING)
        return self._estimate() if self._answers or self.passed else NO_USAGE

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
        while (end := _event_end(data, max(at, looked), no_cr)) > 0:
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
        self._take(_last_usage(tail), is_last=False)

    def _take(self, usage: Usage | None, *, is_last: bool) -> None:
        """Note an event that is no error, and the usage that it tells of, if it does."""
        self.failed, self._answers = False, True
        if usage is not None:
            self._usage, self._is_last = usage, is_last

    def _fail(self) -> None:
        self.failed, self.ending = True, b""  # what comes next is read, to know whether the error was the last

    def _read_other(self, event: bytes) -> None:
        """Read an event that carries no object: a comment, `[DONE]`, an error of an odd shape, or nobody knows what."""
        data = _data(event).strip()
        if data == b"[DONE]":
            return
        if opens_with_error(event, True):
            self._fail()
        elif data:
            self._read_end(data[-TAIL_BYTES:])


def _event_end(data: bytes | bytearray, at: int, no_cr: bool) -> int:
    """Return where the first event that ends behind `at` ends, 0 for none."""
    if no_cr:
        end = data.find(b"\n\n", at)
        return end + 2 if end >= 0 else 0
    found = _EVENT_END.search(data, at)
    return found.end() if found is not None else 0


class _Choice(msgspec.Struct):
    delta: dict[str, msgspec.Raw] | None = None
    text: msgspec.Raw = _ABSENT


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: msgspec.Raw = _ABSENT
    error: msgspec.Raw = _ABSENT


_chunk = msgspec.json.Decoder(_Chunk)


class _ChunkEvents(_Events):
    """`chat/completions` and `completions`."""

    def _read(self, event: bytes) -> bytes:
        chunk = _decoded(_chunk, event)
        if chunk is None:
            self._read_other(event)
            return event
        choices, usage = chunk.choices, chunk.usage
        if (chunk.error and chunk.error != _NULL) or (choices is None and opens_with_error(event, True)):
            self._fail()
            return event
        self.failed, self._answers = False, True
        has_usage = bool(usage) and usage != _NULL
        if has_usage:
            self._take(_usage_in(usage), is_last=not choices)
        if _says_something(choices) if choices is not None else not has_usage:
            self._frames += 1
            if self.learns and not has_usage and not (self.ending and event.endswith(self.ending)):
                self.ending = _ending_of(event)
        if has_usage and bytes(usage).startswith(b"{"):
            if choices and self.hide_running:
                return _without_usage(event)
            if choices == [] and self.hide_usage:
                return b""
        return event


def _says_something(choices: list[_Choice]) -> bool:
    """Say whether a chunk carries a token: a text, a part of a tool's call, reasoning; not just a role or an end."""
    for choice in choices:
        if len(choice.text) > 2 and choice.text != _NULL:
            return True
        if choice.delta:
            for name, value in choice.delta.items():
                if len(value) > 2 and value != _NULL and name != "role":  # `""`, `[]` and `{}` say nothing
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
        found = _USAGE.match(event, at)
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


class _OtherEvents(_ChunkEvents):
    """Streams of sound, images and transcripts: nothing of theirs is a token unless they say so."""

    def _estimate(self) -> Usage:
        return NO_USAGE


class _Message(msgspec.Struct):
    usage: msgspec.Raw = _ABSENT


class _MessageEvent(msgspec.Struct):
    type: str = ""
    message: _Message | None = None
    usage: msgspec.Raw = _ABSENT
    error: msgspec.Raw = _ABSENT


_message_event = msgspec.json.Decoder(_MessageEvent)
_MESSAGE_COUNTS: Final = (
    "input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens",
)  # fmt: skip


class _MessageEvents(_Events):
    """`messages`: the prompt is told when it begins, the rest when it ends, each value by the latest that has it."""

    _latest: _Tokens | None = None

    def _read(self, event: bytes) -> bytes:
        told = _decoded(_message_event, event)
        if told is None:
            self._read_other(event)
        elif told.type == "content_block_delta":
            self._frames += 1
            self._take(None, is_last=False)
        elif told.type == "message_start" and told.message is not None:
            self._merge(told.message.usage, is_last=False)
        elif told.type == "message_delta":
            self._merge(told.usage, is_last=True)
        elif _is_error(told.type, told.error, event):
            self._fail()
        else:
            self._take(None, is_last=False)
        return event

    def _merge(self, raw: msgspec.Raw, *, is_last: bool) -> None:
        tokens = _tokens_in(raw)
        if tokens is not None and self._latest is not None:
            for name in _MESSAGE_COUNTS:
                if getattr(tokens, name) is None:
                    setattr(tokens, name, getattr(self._latest, name))
        self._latest = tokens or self._latest
        self._take(_usage_of(tokens) if tokens is not None else None, is_last=is_last)

    def usage(self, whole: bool) -> Usage:
        used = super().usage(whole)
        if self._usage is None or self._is_last:
            return used
        # What a message begins with says how long the prompt is, and nothing of what came since.
        counted = max(used.completion_tokens, self._frames + self.passed)
        return msgspec.structs.replace(used, completion_tokens=counted, source=UsageSource.ESTIMATED)


class _ResponseEvent(msgspec.Struct):
    type: str = ""
    response: _Message | None = None
    error: msgspec.Raw = _ABSENT


_response_event = msgspec.json.Decoder(_ResponseEvent)
_RESPONSE_ENDS: Final = ("response.completed", "response.incomplete", "response.failed")


class _ResponseEvents(_Events):
    """`responses`: the last event has the usage, and the whole answer once more."""

    def _read(self, event: bytes) -> bytes:
        told = _decoded(_response_event, event)
        if told is None:
            self._read_other(event)
        elif told.type.endswith(".delta"):
            self._frames += 1
            self._take(None, is_last=False)
            if self.learns:
                at = event.rfind(b'"type"')
                self.ending = event[at:] if _DELTA_TYPE.fullmatch(event, at) else b""
        elif _is_error(told.type, told.error, event):
            self._fail()
        else:
            ends = told.type in _RESPONSE_ENDS and told.response is not None
            self._take(_usage_in(told.response.usage) if ends and told.response is not None else None, is_last=True)
            if told.type == "response.failed":
                self._fail()
        return event

    def _read_end(self, tail: bytes) -> None:
        self._take(_last_usage(tail), is_last=True)


def _is_error(kind: str, error: msgspec.Raw, event: bytes) -> bool:
    return kind == "error" or (bool(error) and error != _NULL) or (not kind and bool(opens_with_error(event, True)))


# --- other answers


class _Used(msgspec.Struct):
    usage: _Tokens | None = None


_used = msgspec.json.Decoder(_Used)


class _Document(msgspec.Struct):
    """The meter of a JSON answer: keeps what passes by reference, and of a long one the end, where usage stands."""

    prompt_estimate: int
    ending: bytes = b""
    passed: int = 0
    failed: bool = False
    _size: int = 0
    _parts: list[bytes] = []
    _end: bytearray = bytearray()

    @property
    def holds(self) -> bool:
        return False

    def feed(self, content: bytes) -> bytes:
        self._size += len(content)
        if self._size <= MAX_DOCUMENT_BYTES:
            self._parts.append(content)
        else:
            self._keep_end(b"".join((*self._parts, content)) if self._parts else content)
            self._parts.clear()
        return content

    def close(self) -> bytes:
        return b""

    def usage(self, whole: bool) -> Usage:
        if not self._size:
            return NO_USAGE
        return self._found(whole) or self._estimate()

    def _keep_end(self, content: bytes) -> None:
        self._end += content
        if len(self._end) > 2 * TAIL_BYTES:
            del self._end[:-TAIL_BYTES]

    def _found(self, whole: bool) -> Usage | None:
        """Return the usage that the answer tells of."""
        if self._parts:
            parts = self._parts
            document = parts[0] if len(parts) == 1 else b"".join(parts)
            try:
                tokens = _used.decode(document).usage
                return _usage_of(tokens) if tokens is not None else None
            except msgspec.ValidationError:
                return None
            except _UNREADABLE:
                if not document.lstrip().startswith(b"{"):  # no JSON, but text or sound
                    return None
                usage = _last_usage(document[-TAIL_BYTES:])
        else:
            usage = _last_usage(bytes(self._end[-TAIL_BYTES:]))
        if usage is None or whole:
            return usage
        return msgspec.structs.replace(usage, source=UsageSource.RUNNING)

    def _estimate(self) -> Usage:
        return NO_USAGE


class _TextDocument(_Document):
    """The answer of a model that writes."""

    def _estimate(self) -> Usage:
        return Usage(self.prompt_estimate, self._size // _BYTES_PER_TOKEN, source=UsageSource.ESTIMATED)


class _ReadingDocument(_Document):
    """The answer of a model that only reads: vectors, ranks, scores."""

    def _estimate(self) -> Usage:
        return Usage(self.prompt_estimate, source=UsageSource.ESTIMATED)


class _Images(msgspec.Struct):
    data: list[msgspec.Raw] = []


_images = msgspec.json.Decoder(_Images)


class _ImageDocument(_Document):
    """Images: the elements of `data`. Those of an answer that cannot be parsed are counted by their keys."""

    _keys: list[int] = []  # of each of `_IMAGE_KEYS`, in what is no longer kept

    def _keep_end(self, content: bytes) -> None:
        # So little of what came before that no key is counted twice, and none is missed that is cut.
        counts = [(self._end[1 - len(key) :] + content).count(key) for key in _IMAGE_KEYS]
        self._keys = [old + new for old, new in zip(self._keys or (0, 0), counts, strict=True)]
        super()._keep_end(content)

    def usage(self, whole: bool) -> Usage:
        used = super().usage(whole)
        document = b"".join(self._parts)
        try:
            units = len(_images.decode(document).data)
        except _UNREADABLE:
            units = max(self._keys or map(document.count, _IMAGE_KEYS))
        if not units:
            return used
        source = UsageSource.FINAL if whole else UsageSource.RUNNING
        return msgspec.structs.replace(used, units=units, source=source)


class _Unmetered(msgspec.Struct):
    """An answer that tells of no usage: sound, the tokens of a text."""

    prompt_estimate: int
    ending: bytes = b""
    passed: int = 0
    failed: bool = False

    @property
    def holds(self) -> bool:
        return False

    def feed(self, content: bytes) -> bytes:
        return content

    def close(self) -> bytes:
        return b""

    def usage(self, whole: bool) -> Usage:
        return NO_USAGE


_EVENTS: Final[dict[str, type[_Events]]] = {
    "chat/completions": _ChunkEvents,
    "completions": _ChunkEvents,
    "messages": _MessageEvents,
    "responses": _ResponseEvents,
}
_DOCUMENTS: Final[dict[str, type[_Document] | type[_Unmetered]]] = {
    "chat/completions": _TextDocument,
    "completions": _TextDocument,
    "messages": _TextDocument,
    "responses": _TextDocument,
    "embeddings": _ReadingDocument,
    "rerank": _ReadingDocument,
    "score": _ReadingDocument,
    "images/generations": _ImageDocument,
    "images/edits": _ImageDocument,
    "audio/speech": _Unmetered,
    "tokenize": _Unmetered,
    "detokenize": _Unmetered,
}
