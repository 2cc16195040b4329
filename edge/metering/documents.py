"""Meters of answers that are no streams: what they used, read when they are whole, or from their end."""

from typing import Final

import msgspec

from edge.exchange import NO_USAGE, Usage, UsageSource
from edge.metering.usage_objects import (
    ABSENT,
    TAIL_BYTES,
    UNREADABLE,
    Response,
    begun_of,
    last_usage,
    occurrences,
    timings_in,
    usage_in,
    usage_or_units_in,
    with_units,
)
from edge.protocols import NOTHING_BEGUN, Begun

MAX_DOCUMENT_BYTES: Final = 2**20  # of an answer that is no stream, kept to be read as a whole
_BYTES_PER_TOKEN: Final = 4
_IMAGE_KEYS: Final = (b'"b64_json"', b'"url"')
_LONGEST_KEY: Final = max(map(len, _IMAGE_KEYS))


class _Used(msgspec.Struct):
    usage: msgspec.Raw = ABSENT
    timings: msgspec.Raw = ABSENT


class _Images(msgspec.Struct):
    data: list[msgspec.Raw] = []


_response = msgspec.json.Decoder(Response)
_used = msgspec.json.Decoder(_Used)
_images = msgspec.json.Decoder(_Images)


class Unmetered(msgspec.Struct):
    """Reads nothing of an answer without usage: sound, the tokens of a text."""

    prompt_estimate: int
    ending: bytes = b""
    passed: int = 0
    failed: bool = False

    @property
    def ended(self) -> bool:
        return False

    @property
    def holds(self) -> bool:
        return False

    def feed(self, content: bytes) -> bytes:
        return content

    def close(self) -> bytes:
        return b""

    def usage(self, whole: bool) -> Usage:
        return NO_USAGE

    def begun(self, last: bytes) -> Begun:
        return NOTHING_BEGUN


class Document(Unmetered):
    """The meter of a JSON answer: keeps what passes by reference, and of a long one the end, where usage stands."""

    _size: int = 0
    _parts: list[bytes] = []
    _end: bytearray = bytearray()
    _early: Usage | None = None  # of an answer too long to be kept, from where it begins

    def feed(self, content: bytes) -> bytes:
        self._size += len(content)
        if self._size <= MAX_DOCUMENT_BYTES:
            self._parts.append(content)
        else:
            kept = b"".join((*self._parts, content)) if self._parts else content
            if not self._end:
                self._early = last_usage(kept[:TAIL_BYTES])  # llama.cpp puts it in front of the vectors
            self._keep_end(kept)
            self._parts.clear()
        return content

    def usage(self, whole: bool) -> Usage:
        if not self._size:
            return NO_USAGE
        return self._found(whole) or self._estimate()

    def _keep_end(self, content: bytes) -> None:
        self._end += content
        if len(self._end) > 2 * TAIL_BYTES:
            del self._end[:-TAIL_BYTES]

    def _found(self, whole: bool) -> Usage | None:
        if self._parts:
            document = b"".join(self._parts)
            try:
                members = _used.decode(document)
                return self._count(members.usage) or timings_in(members.timings)
            except msgspec.ValidationError:
                return None
            except UNREADABLE:
                if not document.lstrip().startswith(b"{"):  # no JSON, but text or sound
                    return None
                usage = last_usage(document[-TAIL_BYTES:])
        else:
            usage = last_usage(bytes(self._end[-TAIL_BYTES:])) or self._early
        if usage is None or whole:
            return usage
        return msgspec.structs.replace(usage, source=UsageSource.RUNNING)

    def _count(self, usage: msgspec.Raw) -> Usage | None:
        return usage_or_units_in(usage)

    def _estimate(self) -> Usage:
        return NO_USAGE


class TextDocument(Document):
    """The answer of a model that writes."""

    def _count(self, usage: msgspec.Raw) -> Usage | None:
        return usage_in(usage)

    def _estimate(self) -> Usage:
        return Usage(self.prompt_estimate, self._size // _BYTES_PER_TOKEN, source=UsageSource.ESTIMATED)


class ResponseDocument(TextDocument):
    """The answer of `responses`, which is kept and asked for by its id."""

    def begun(self, last: bytes) -> Begun:
        try:
            return begun_of(_response.decode(b"".join(self._parts)))
        except UNREADABLE:
            return NOTHING_BEGUN


class ReadingDocument(Document):
    """The answer of a model that only reads: vectors, ranks, scores."""

    def _estimate(self) -> Usage:
        return Usage(self.prompt_estimate, source=UsageSource.ESTIMATED)


class ImageDocument(Document):
    """Images: the elements of `data`. Those of an answer that cannot be parsed are counted by their keys."""

    _keys: list[int] = []  # of each of `_IMAGE_KEYS`, in what is no longer kept

    def _keep_end(self, content: bytes) -> None:
        counts = [occurrences(key, bytes(self._end[-_LONGEST_KEY:]), content) for key in _IMAGE_KEYS]
        self._keys = [old + new for old, new in zip(self._keys or (0, 0), counts, strict=True)]
        super()._keep_end(content)

    def usage(self, whole: bool) -> Usage:
        used = super().usage(whole)
        document = b"".join(self._parts)
        try:
            units = len(_images.decode(document).data)
        except UNREADABLE:
            units = max(self._keys or map(document.count, _IMAGE_KEYS))
        return with_units(used, units, "images", whole=whole)
