"""Meters of answers that are no streams: what they used, parsed when they are whole, or scanned as they pass.

Where an answer tells no usage its length is a guess at it, in the dialects of models that write. An error under a
status of success is no answer, and neither is a response that failed, or that is only to be written.

Sources: platform.openai.com, "Responses", for `status`; docs.anthropic.com, "Errors"; vLLM before 0.9 for `object`.
"""

import contextlib
import re
from typing import Final

import msgspec

from edge.exchange import NO_USAGE, Usage, UsageSource
from edge.metering.estimating import estimated
from edge.metering.scanning import Scanner
from edge.metering.usage_objects import (
    ABSENT,
    NULL,
    UNREADABLE,
    Response,
    Tokens,
    at_most,
    occurrences,
    raw_of,
    read_as,
    seconds_in,
    timings_in,
    tokens_in,
    usage_of,
    usage_or_units_of,
    with_units,
)
from edge.protocols import NOTHING_BEGUN, Begun

MAX_DOCUMENT_BYTES: Final = 2**17  # of an answer that is no stream, kept to be parsed; to scan it takes 3 ms
_JSON_OPENINGS: Final = tuple(b"{%c" % each for each in b'"} \t\r\n')  # that sound begins so is unlikely
_ERROR: Final = b'"error"'  # of `type` or `object`
_FAILED: Final = b'"failed"'  # of `status`
_OUTCOME: Final = (b"error", b"type", b"object", b"status")
_UNWRITTEN: Final = (b'"queued"', b'"in_progress"')
_BEGINS_WITH_ERROR: Final = re.compile(rb'[ \t\r\n]*+\{[ \t\r\n]*+"error"[ \t\r\n]*+:[ \t\r\n]*+["{]')
_IMAGE_KEYS: Final = (b'"b64_json"', b'"url"')
_LONGEST_KEY: Final = max(map(len, _IMAGE_KEYS))


class _Used(msgspec.Struct):
    usage: Tokens | None = None
    timings: msgspec.Raw = ABSENT


class _Timed(msgspec.Struct):
    timings: msgspec.Raw = ABSENT


class _Sound(msgspec.Struct):
    duration: msgspec.Raw = ABSENT


class _Outcome(msgspec.Struct):
    error: msgspec.Raw = ABSENT
    type: msgspec.Raw = ABSENT
    object: msgspec.Raw = ABSENT
    status: msgspec.Raw = ABSENT


class _Images(msgspec.Struct):
    data: list[msgspec.Raw] = []


_response = msgspec.json.Decoder(Response)
_used = msgspec.json.Decoder(_Used)
_timed = msgspec.json.Decoder(_Timed)
_sound = msgspec.json.Decoder(_Sound)
_outcome = msgspec.json.Decoder(_Outcome)
_images = msgspec.json.Decoder(_Images)


class Unmetered(msgspec.Struct):
    """Reads nothing of an answer without usage: sound, the tokens of a text."""

    prompt_estimate: int
    most: int | None = None
    ending: bytes = b""
    passed: int = 0
    failed: bool = False

    @property
    def ended(self) -> bool:
        return False

    @property
    def holds(self) -> bool:
        return False

    @property
    def has_content(self) -> bool:
        return True

    def feed(self, content: bytes) -> bytes:
        return content

    def is_half(self) -> bool:
        return False

    def close(self) -> bytes:
        return b""

    def usage(self, whole: bool) -> Usage:
        return NO_USAGE

    def begun(self, last: bytes) -> Begun:
        return NOTHING_BEGUN

    def response_id(self, whole: bool) -> str:
        return ""


class Document(Unmetered):
    """The meter of a JSON answer: keeps what passes by reference, and scans what is too long for that as it passes."""

    _size: int = 0
    _parts: list[bytes] = []
    _scanner: Scanner | None = None  # of an answer too long to be kept
    _late: Scanner | None = None  # of one that was kept and cannot be parsed, since its usage was asked for

    def feed(self, content: bytes) -> bytes:
        self._size += len(content)
        if self._size <= MAX_DOCUMENT_BYTES:
            self._parts.append(content)
            return content
        if self._scanner is None:
            self._scanner = self._new_scanner()
            for part in self._parts:
                self._scan(part)
            self._parts.clear()
        self._scan(content)
        return content

    def usage(self, whole: bool) -> Usage:
        if not self._size:
            return NO_USAGE
        self._late = None
        used = self._found(whole)
        if used is not None:
            return used
        return self._estimate() if self._is_answer() else NO_USAGE

    def _is_answer(self) -> bool:
        """Return whether a model has written or read something, and note a failure."""
        outcome = self._outcome()
        self.failed = (
            (bool(outcome.error) and outcome.error != NULL)
            or _ERROR in (bytes(outcome.type), bytes(outcome.object))
            or bytes(outcome.status) == _FAILED
        )
        return not self.failed and bytes(outcome.status) not in _UNWRITTEN

    def _outcome(self) -> _Outcome:
        """Return what a document without usage says of how it went."""
        if self._scanner is None:
            document = b"".join(self._parts)
            try:
                return _outcome.decode(document)
            except UNREADABLE:
                if _BEGINS_WITH_ERROR.match(document):
                    return _Outcome(error=msgspec.Raw(document))
        found = self._members()
        return _Outcome(*(raw_of(found, name) for name in _OUTCOME))

    def _members(self) -> dict[bytes, bytes]:
        """Return the members that a scan finds: of what was not kept, was cut, or has what a decoder refuses."""
        scanner = self._scanner or self._late
        if scanner is None:
            scanner = self._late = self._new_scanner()
            scanner.feed(b"".join(self._parts))
        return scanner.found

    def _new_scanner(self) -> Scanner:
        return Scanner(b"usage", b"timings", *_OUTCOME)

    def _scan(self, content: bytes) -> None:
        """Read a piece of what is too long to be kept."""
        assert self._scanner is not None
        self._scanner.feed(content)

    def _found(self, whole: bool) -> Usage | None:
        if self._scanner is None:
            document = b"".join(self._parts)
            try:
                members = _used.decode(document)
                used = self._count(members.usage) if members.usage is not None else None
                return used or timings_in(members.timings)
            except msgspec.ValidationError:  # the usage is nonsense, or all of it is
                return _by_timings(document)
            except UNREADABLE:
                pass
        found = self._members()
        tokens = tokens_in(raw_of(found, b"usage"))
        usage = (self._count(tokens) if tokens is not None else None) or timings_in(raw_of(found, b"timings"))
        if usage is None or whole:
            return usage
        return msgspec.structs.replace(usage, source=UsageSource.RUNNING)

    def _count(self, tokens: Tokens) -> Usage | None:
        return usage_or_units_of(tokens)

    def _estimate(self) -> Usage:
        return NO_USAGE


def _by_timings(document: bytes) -> Usage | None:
    try:
        return timings_in(_timed.decode(document).timings)
    except UNREADABLE:
        return None


class TextDocument(Document):
    """The answer of a model that writes."""

    _tokens: int = 0  # in what is no longer kept

    def _scan(self, content: bytes) -> None:
        self._tokens += estimated(content)
        super()._scan(content)

    def _count(self, tokens: Tokens) -> Usage | None:
        return usage_of(tokens)

    def _estimate(self) -> Usage:
        tokens = self._tokens + estimated(b"".join(self._parts))
        return Usage(self.prompt_estimate, at_most(tokens, self.most), source=UsageSource.ESTIMATED)


class ResponseDocument(TextDocument):
    """The answer of `responses`, which is kept and asked for by its id."""

    def _new_scanner(self) -> Scanner:
        return Scanner(b"usage", b"id", *_OUTCOME)

    def response_id(self, whole: bool) -> str:
        if not whole:
            return ""
        if self._scanner is not None:
            return read_as(str, raw_of(self._scanner.found, b"id"), "")
        try:
            return read_as(str, _response.decode(b"".join(self._parts)).id, "")
        except UNREADABLE:
            return ""


class ReadingDocument(Document):
    """The answer of a model that only reads: vectors, ranks, scores."""

    def _estimate(self) -> Usage:
        return Usage(self.prompt_estimate, source=UsageSource.ESTIMATED)


class TranscriptDocument(Document):
    """The text of a sound: its `usage`, else its `duration` in seconds, which vLLM writes as a text.

    Source: platform.openai.com, "Create transcription", `verbose_json`.
    """

    def usage(self, whole: bool) -> Usage:
        used = super().usage(whole)
        return (
            used if used.source is not UsageSource.NONE else with_units(used, self._seconds(), "seconds", whole=whole)
        )

    def _new_scanner(self) -> Scanner:
        return Scanner(b"usage", b"timings", b"duration")

    def _seconds(self) -> int:
        if self._scanner is None:
            with contextlib.suppress(*UNREADABLE):
                return seconds_in(_unquoted(_sound.decode(b"".join(self._parts)).duration))
        return seconds_in(_unquoted(raw_of(self._members(), b"duration")))


def _unquoted(raw: msgspec.Raw) -> msgspec.Raw:
    return msgspec.Raw(bytes(raw).strip(b'"'))


class SpeechDocument(Document):
    """A text that is spoken, by its characters: `prompt_estimate` counts them, and vendors bill them.

    They count as soon as there is sound, all of them: the engine has read the text, and who leaves behind the first
    second would else hear any text for nothing, piece by piece. JSON is no sound, so that an error counts nothing; what
    its `usage` tells counts alone.
    """

    _opening: bytes = b""

    def feed(self, content: bytes) -> bytes:
        if len(self._opening) < 2:
            self._opening += content[:2]
        if self._is_json:
            return super().feed(content)
        self._size += len(content)
        return content

    def usage(self, whole: bool) -> Usage:
        if self._is_json or not self._size:
            return super().usage(whole)
        return with_units(NO_USAGE, self.prompt_estimate, "characters", whole=whole)

    @property
    def _is_json(self) -> bool:
        return self._opening[:2] in _JSON_OPENINGS or self._opening == b"{"


class ImageDocument(Document):
    """Images: the elements of `data`. Those of an answer that cannot be parsed are counted by their keys."""

    _keys: list[int] = []  # of each of `_IMAGE_KEYS`, in what is no longer kept
    _before: bytes = b""

    def _scan(self, content: bytes) -> None:
        counts = [occurrences(key, self._before, content) for key in _IMAGE_KEYS]
        self._keys = [old + new for old, new in zip(self._keys or (0, 0), counts, strict=True)]
        self._before = (self._before + content[-_LONGEST_KEY:])[-_LONGEST_KEY:]
        super()._scan(content)

    def usage(self, whole: bool) -> Usage:
        used = super().usage(whole)
        document = b"".join(self._parts)
        try:
            units = len(_images.decode(document).data)
        except UNREADABLE:
            units = max(self._keys or map(document.count, _IMAGE_KEYS))
        return with_units(used, units, "images", whole=whole)
