"""What an answer used, read out of its bytes as they pass.

A meter sees the content of one answer, without the framing of HTTP, in whatever pieces it comes. It looks at the few
members that hold usage and skips the rest; it never fails, whatever an upstream sends. Most tokens of a stream need
not be shown to it at all, see `Meter.ending`.

The upstream's own counts are taken as they stand: the last ones, never a sum, since running usage is cumulative. Only
where each choice has its own are they summed, a prompt of several choices once. A count that is missing or null is
none; one that is no whole number from 0 to 2**53 makes the object that it stands in nonsense, and nonsense is as good
as no usage. Where there is none, the frames that carry a token are counted.
"""

from typing import Final, Protocol

import msgspec

from edge.exchange import Usage
from edge.metering.chunks import ChunkEvents, OtherEvents, SpeechEvents
from edge.metering.documents import (
    Document,
    ImageDocument,
    ReadingDocument,
    ResponseDocument,
    SpeechDocument,
    TextDocument,
    TranscriptDocument,
    Unmetered,
)
from edge.metering.events import Events
from edge.metering.messages import MessageEvents
from edge.metering.responses import ResponseEvents, StoredEvents
from edge.operations import Operation, Reads
from edge.protocols import Begun


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

    `failed`: the last data before `[DONE]`, or before the end, is an error; usage alone does not undo it, since SGLang
    tells the usage of a request that failed as of any other.
    """

    ending: bytes
    passed: int
    failed: bool

    @property
    def ended(self) -> bool:
        """Whether the event with which the protocol ends a stream was the last: whoever has it has all."""

    @property
    def holds(self) -> bool:
        """Whether an event has begun and not ended; where events are changed, it is held back."""

    @property
    def has_content(self) -> bool:
        """Whether something came that a model made: no comment, role or beginning; any byte of what is no stream."""

    def feed(self, content: bytes) -> bytes:
        """Return what the client gets: the same object, unless something was changed or held back."""

    def is_half(self) -> bool:
        """Whether a stream that is over has neither ended, as its protocol has it, nor failed."""

    def close(self) -> bytes:
        """Return what is held back: the answer has ended, in order, without an empty line."""

    def usage(self, whole: bool) -> Usage:
        """Return what the answer used, as far as it came; `whole`: it came to its orderly end."""

    def begun(self, last: bytes) -> Begun:
        """Return what a stream has shown of itself; `last` holds its last event, where that was not fed."""

    def response_id(self, whole: bool) -> str:
        """Return the id of a response that is kept, "" while it has not come; `whole`: all of the answer has."""


class Metering(msgspec.Struct, frozen=True):
    """How the answer to one request is to be metered.

    `continuous` says that the upstream was asked for running usage. `hide_usage` and `hide_running` say that the client
    did not ask for what we asked for: the frame with usage and no choices, which may be absent, null or empty, with the
    nulls that announce it in the other frames; and the usage on frames with choices. That on the last frame of a choice
    is shown to who asked for usage where an engine has it nowhere else.
    `prompt_estimate` is what counts for the prompt where the upstream counts nothing: tokens, or the characters of a
    text that is spoken. `n` is the number of choices to each prompt that was asked for, `most` how many tokens all of
    them together may have, None where nothing limits them: what is estimated is never more.
    """

    operation: Operation
    continuous: bool = False
    hide_usage: bool = False
    hide_running: bool = False
    prompt_estimate: int = 0
    n: int = 1
    most: int | None = None

    @property
    def changes(self) -> bool:
        """Whether a meter of events may change or hold back what passes."""
        return self.hide_usage or self.hide_running

    def events(self) -> Meter:
        """Return a meter for an answer that is a stream of events."""
        kind = _METERS[self.operation.reads][0]
        return kind(
            self.prompt_estimate, not self.continuous, self.hide_usage, self.hide_running, self.operation.last_events,
            self.n, self.most,
        )  # fmt: skip

    def document(self) -> Meter:
        """Return a meter for any other answer."""
        return _METERS[self.operation.reads][1](self.prompt_estimate, self.most)


_METERS: Final[dict[Reads, tuple[type[Events], type[Unmetered]]]] = {
    Reads.CHUNKS: (ChunkEvents, TextDocument),
    Reads.MESSAGE: (MessageEvents, TextDocument),
    Reads.RESPONSE: (ResponseEvents, ResponseDocument),
    Reads.READING: (OtherEvents, ReadingDocument),
    Reads.IMAGES: (OtherEvents, ImageDocument),
    Reads.SPEECH: (SpeechEvents, SpeechDocument),
    Reads.TRANSCRIPT: (OtherEvents, TranscriptDocument),
    Reads.ANY: (OtherEvents, Document),
    Reads.STORED: (StoredEvents, Unmetered),
    Reads.NOTHING: (OtherEvents, Unmetered),
}
