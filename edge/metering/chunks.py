"""Meters of `chat/completions` and `completions`, whose events are chunks, and of the streams that no model writes.

Usage stands at the top of a chunk, or in its last choice (Moonshot), or in `x_groq` (Groq). Where there is none, the
`timings` of llama.cpp count.

Sources: platform.openai.com, "Chat", "Completions"; platform.moonshot.ai, "Chat"; console.groq.com, "API reference";
vLLM and SGLang for `continuous_usage_stats`.
"""

import re
from typing import Final

import msgspec

from edge.exchange import NO_USAGE, Usage, UsageSource
from edge.metering.events import Events, decoded
from edge.metering.scanning import Scanner
from edge.metering.usage_objects import (
    ABSENT,
    NULL,
    UNREADABLE,
    USAGE_MEMBER,
    WithUsage,
    occurrences,
    raw_of,
    timings_in,
    usage_in,
    usage_or_units_in,
    with_units,
)
from edge.sse import opens_with_error

MAX_ENDING_BYTES: Final = 256
_MAX_INDEX_DIGITS: Final = 4
_SPACE: Final = b" \t\r\n"
_USAGE_OR_NULL: Final = re.compile(USAGE_MEMBER.pattern + rb'|"usage"[ \t\r\n]*:[ \t\r\n]*null')
_OPEN_CHOICE: Final = (b'"finish_reason":null', b'"finish_reason": null')

# What is in base64 has no quotes.
_IMAGE_DONE: Final = (b'"image_generation.completed"', b'"image_edit.completed"')
_LONGEST_IMAGE_DONE: Final = max(map(len, _IMAGE_DONE))


class _Choice(msgspec.Struct):
    index: msgspec.Raw = ABSENT
    delta: dict[str, msgspec.Raw] | None = None
    text: msgspec.Raw = ABSENT
    finish_reason: msgspec.Raw = ABSENT
    usage: msgspec.Raw = ABSENT  # Moonshot's, in the last choice


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT
    x_groq: msgspec.Raw = ABSENT
    timings: msgspec.Raw = ABSENT


_chunk = msgspec.json.Decoder(_Chunk)
_with_usage = msgspec.json.Decoder(WithUsage)


class ChunkEvents(Events):
    """`chat/completions` and `completions`.

    A usage frame without choices counts the choices that ended since the one before: all of them, mostly. Usage on a
    frame with choices is that of its last choice, and the latest counts.
    """

    _by_choice: dict[int, Usage] = msgspec.field(default_factory=dict)
    _totals: list[Usage] = msgspec.field(default_factory=list)  # of the usage frames
    _ended_choices: set[int] = msgspec.field(default_factory=set)  # with the latest usage frame, or before it
    _ending_choices: set[int] = msgspec.field(default_factory=set)  # since then
    _by_timings: bool = True  # there was no other usage
    _runs: bool = False  # there was usage on a frame of an unfinished choice
    _changed_ending: bytes = b""  # as `ending`, of events of which the client gets `_given_ending` instead
    _given_ending: bytes = b""

    def _read(self, event: bytes) -> bytes:
        if self._changed_ending and event.endswith(self._changed_ending):
            self.failed, self._ended, self._answers, self._is_last = False, False, True, False
            self._frames += 1
            return event[: -len(self._changed_ending)] + self._given_ending
        chunk = decoded(_chunk, event)
        if chunk is None:
            self._read_other(event)
            return event
        choices, usage = chunk.choices, chunk.usage
        if (chunk.error and chunk.error != NULL) or (choices is None and opens_with_error(event, True)):
            self._fail()
            return event
        has_usage = bool(usage) and usage != NULL
        if choices or (choices is None and not has_usage):
            self.failed = False
        self._ended, self._answers = False, True
        used = self._used(chunk, choices)
        if choices:
            self._read_choices(choices, used)
        elif used is not None:
            self._read_total(used)
        counts = _has_token(choices) if choices is not None else not has_usage
        self._frames += counts
        given = self._without_what_is_ours(event, usage, choices)
        if counts and self.learns and used is None and not (self.ending and event.endswith(self.ending)):
            self._learn(event, given)
        return given

    def _without_what_is_ours(self, event: bytes, usage: msgspec.Raw, choices: list[_Choice] | None) -> bytes:
        """Return what the client gets of a chunk: without usage, or a null in its place, that only we asked for."""
        if not usage:
            return event
        if usage == NULL:
            return _without_usage(event) if self.hide_usage else event
        if not bytes(usage).startswith(b"{"):
            return event
        if not choices:
            return b"" if self.hide_usage else event
        if not self.hide_running:
            return event
        if any(choice.finish_reason and choice.finish_reason != NULL for choice in choices):
            # An engine that tells no running usage, and its usage nowhere else than here.
            return _without_usage(event) if self.hide_usage or self._runs else event
        self._runs = True
        return _without_usage(event)

    def _learn(self, event: bytes, given: bytes) -> None:
        """Note how a token's event ends, and what the client gets in place of that."""
        ending = _ending_of(event)
        if given is event:
            self.ending = ending
            return
        at = len(event) - len(ending)
        self._changed_ending = ending if ending and given.startswith(event[:at]) else b""
        self._given_ending = given[at:]

    def _read_choices(self, choices: list[_Choice], used: Usage | None) -> None:
        self._is_last = False
        for choice in choices:
            if choice.finish_reason and choice.finish_reason != NULL:
                index = _index_of(choice)
                if index not in self._ended_choices:
                    self._ending_choices.add(index)
        if used is not None:
            self._by_choice[_index_of(choices[-1])] = used

    def _read_total(self, used: Usage) -> None:
        """Read a usage frame. llama.cpp sends one behind each choice, with that choice's tokens only."""
        if self._ending_choices and self._ended_choices:
            self._totals.append(used)
        else:
            self._totals[-1:] = [used]
        self._ended_choices |= self._ending_choices
        self._ending_choices.clear()
        self._is_last = True
        self.ending = b""  # what comes next is read, to know whether another choice goes on

    def _used(self, chunk: _Chunk, choices: list[_Choice] | None) -> Usage | None:
        """Return what a chunk says was used, in whichever place."""
        if chunk.usage and chunk.usage != NULL:
            used = self._count(chunk.usage)
        elif choices and choices[-1].usage:
            used = self._count(choices[-1].usage)
        elif chunk.x_groq:
            used = self._count(_usage_within(chunk.x_groq))
        elif chunk.timings and self._by_timings:
            return timings_in(chunk.timings)
        else:
            return None
        if used is not None:
            self._by_timings = False
        return used

    def _read_scanned(self, scanner: Scanner) -> None:
        super()._read_scanned(scanner)
        used = self._count(raw_of(scanner.found, b"usage"))
        self._is_last = False
        if used is not None:
            self._by_choice[0] = used

    def _count(self, usage: msgspec.Raw) -> Usage | None:
        return usage_in(usage)

    def usage(self, whole: bool) -> Usage:
        if whole:
            self.close()
        if self._totals:
            self._usage = _sum(self._totals, self._totals[:1])
        elif self._by_choice:
            # Each of `n` choices was written to the same prompt, and has the prompt's tokens.
            prompts = {index // self.n: used for index, used in sorted(self._by_choice.items(), reverse=True)}
            self._usage = _sum(list(self._by_choice.values()), list(prompts.values()))
        return super().usage(whole)


def _index_of(choice: _Choice) -> int:
    """Return the number of a choice, 0 where it has none, or an odd one."""
    digits = bytes(choice.index)
    return int(digits) if digits.isdigit() and len(digits) <= _MAX_INDEX_DIGITS else 0


def _sum(written: list[Usage], read: list[Usage]) -> Usage:
    """Return what choices used: `written` has the answer of each, `read` each prompt once."""
    cached = [used.cached_tokens for used in read if used.cached_tokens is not None]
    return Usage(
        sum(used.prompt_tokens for used in read),
        sum(used.completion_tokens for used in written),
        sum(cached) if cached else None,
        sum(used.reasoning_tokens for used in written),
        written[-1].units,
        UsageSource.FINAL,
        written[-1].unit,
        sum(used.cache_creation_tokens for used in read),
    )


def _usage_within(raw: msgspec.Raw) -> msgspec.Raw:
    try:
        return _with_usage.decode(raw).usage
    except UNREADABLE:
        return ABSENT


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
    at = event.find(b'"usage"')
    if event.find(b'"usage"', at + 1) >= 0:
        at = _usage_at_top(event)
    found = _USAGE_OR_NULL.match(event, at) if at >= 0 else None
    if found is None:
        return event
    before, after = event[:at], event[found.end() :]
    if before.rstrip(_SPACE).endswith(b","):
        spliced = before.rstrip(_SPACE)[:-1] + after
    else:
        spliced = before + after.lstrip(_SPACE).removeprefix(b",")
    chunk = decoded(_chunk, spliced)
    return spliced if chunk is not None and not chunk.usage else event


def _usage_at_top(event: bytes) -> int:
    """Return where the member of the object itself stands, -1 for nowhere; the event has one line of data."""
    scanner, at = Scanner(b"usage"), event.find(b"{")
    scanner.feed(event, at)
    end = scanner.ends.get(b"usage", 0)
    return event.rfind(b'"usage"', 0, end - len(scanner.found[b"usage"])) if end else -1


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
        return with_units(super().usage(whole), self._units, "images", whole=whole)

    def _count(self, usage: msgspec.Raw) -> Usage | None:
        return usage_or_units_in(usage)

    def _estimate(self) -> Usage:
        return NO_USAGE


class SpeechEvents(OtherEvents):
    """A text that is spoken in events, by its characters where they tell no usage; as `SpeechDocument` counts it.

    Source: platform.openai.com, "Create speech", `stream_format`.
    """

    def usage(self, whole: bool) -> Usage:
        used = super().usage(whole)
        if used.source is not UsageSource.NONE or not self._answers:
            return used
        return with_units(used, self.prompt_estimate, "characters", whole=whole)
