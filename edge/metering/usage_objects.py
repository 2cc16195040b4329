"""What an object named `usage` counts, in any of the dialects, and the `timings` of llama.cpp.

`prompt_tokens` includes whatever a cache had a part in, and so does `input_tokens` of OpenAI's Responses API. That of
Anthropic's `messages` does not: what was read from a cache and written to one stands beside it.

Sources: platform.openai.com, "Usage"; docs.anthropic.com, "Prompt caching"; platform.moonshot.ai, "Chat", for
`cached_tokens` of usage itself; api-docs.deepseek.com, "Context caching", for `prompt_cache_hit_tokens`;
alibabacloud.com, "Context cache", for `cache_creation_input_tokens` of the prompt's details; vLLM for
`created_cache_tokens`; the README of llama.cpp's server for `timings`: `prompt_n` tokens were read, `cache_n` cached,
`predicted_n` written.
"""

import math
import re
from typing import Annotated, Final, TypeVar

import msgspec

from edge.exchange import NO_USAGE, Unit, Usage, UsageSource
from edge.protocols import Begun

UNREADABLE: Final = (ValueError, RecursionError)  # what msgspec raises: both its own errors are ValueErrors
NULL: Final = msgspec.Raw(b"null")
ABSENT: Final = msgspec.Raw(b"")
# A quote within a JSON text has a backslash before it, so that none of this is found in what a model says.
USAGE_MEMBER = re.compile(
    rb'(?<!\\)"usage"[ \t\r\n]*:[ \t\r\n]*'
    rb"(\{[^{}]*+(?:\{[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+\}[^{}]*+)*+\})"
)

_T = TypeVar("_T")
_FINAL: Final = UsageSource.FINAL
_MAX_DIGITS: Final = 15  # of a count that is read by hand
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = None
    reasoning_tokens: _Count | None = None
    cache_creation_input_tokens: _Count | None = None
    created_cache_tokens: _Count | None = None


class _Timings(msgspec.Struct):
    prompt_n: _Count
    predicted_n: _Count
    cache_n: _Count | None = None


class Tokens(msgspec.Struct):
    """A usage object in any of the dialects."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    total_tokens: _Count | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    cache_creation_input_tokens: _Count | None = None
    cache_read_input_tokens: _Count | None = None
    reasoning_tokens: msgspec.Raw = ABSENT  # as SGLang has it, beside the details
    cached_tokens: msgspec.Raw = ABSENT
    prompt_cache_hit_tokens: msgspec.Raw = ABSENT
    seconds: msgspec.Raw = ABSENT
    characters: msgspec.Raw = ABSENT
    prompt_tokens_details: msgspec.Raw = ABSENT
    completion_tokens_details: msgspec.Raw = ABSENT
    input_tokens_details: msgspec.Raw = ABSENT
    output_tokens_details: msgspec.Raw = ABSENT


class WithUsage(msgspec.Struct):
    """An object in which a usage object stands."""

    usage: msgspec.Raw = ABSENT


class Response(msgspec.Struct):
    """A response of the Responses API, as far as it is read."""

    usage: msgspec.Raw = ABSENT
    id: msgspec.Raw = ABSENT
    created_at: msgspec.Raw = ABSENT
    model: msgspec.Raw = ABSENT


_details = msgspec.json.Decoder(_Details)
_tokens = msgspec.json.Decoder(Tokens)
_timings = msgspec.json.Decoder(_Timings)
_seconds = msgspec.json.Decoder(Annotated[float, msgspec.Meta(ge=0, le=2**53)])
_NO_DETAILS: Final = _Details()


def tokens_in(raw: msgspec.Raw) -> Tokens | None:
    """Return the counts of a usage object; None when there is none, or it cannot be read."""
    if not raw or raw == NULL:
        return None
    try:
        return _tokens.decode(raw)
    except UNREADABLE:
        return None


def usage_of(tokens: Tokens) -> Usage | None:
    """Return what a usage object counts; None when it holds no count of tokens."""
    prompt = tokens.prompt_tokens
    completion = tokens.completion_tokens if tokens.completion_tokens is not None else tokens.output_tokens
    total = tokens.total_tokens
    cached, created = tokens.cache_read_input_tokens, tokens.cache_creation_input_tokens or 0
    if prompt is None and tokens.input_tokens is not None:
        prompt = tokens.input_tokens
        if total is None or total != prompt + (completion or 0):  # else the total says that it has all of it
            prompt += (cached or 0) + created
    if total is not None:
        if prompt is None:
            prompt = max(0, total - (completion or 0))
        elif completion is None:
            completion = max(0, total - prompt)
    if prompt is None and completion is None:
        return None
    reasoning = 0
    if raw := _either(tokens.prompt_tokens_details, tokens.input_tokens_details):
        details = _details_in(raw)
        cached = _said(cached, details.cached_tokens)
        created = created or details.cache_creation_input_tokens or details.created_cache_tokens or 0
    if raw := _either(tokens.completion_tokens_details, tokens.output_tokens_details):
        reasoning = _details_in(raw).reasoning_tokens or 0
    if tokens.cached_tokens or tokens.prompt_cache_hit_tokens or tokens.reasoning_tokens:
        for raw in (tokens.cached_tokens, tokens.prompt_cache_hit_tokens):
            cached = _said(cached, _number(raw) if bytes(raw).isdigit() else None)
        reasoning = reasoning or _number(tokens.reasoning_tokens)
    return Usage(prompt or 0, completion or 0, cached, reasoning, 0, _FINAL, None, created)


def _said(count: int | None, other: int | None) -> int | None:
    """Return the first of two counts that is more than nothing; None where neither is said."""
    return count or (other if other is not None else count)


def _number(raw: msgspec.Raw) -> int:
    """Return a count in a place that not every dialect has; 0 for what is none."""
    if not raw:
        return 0
    digits = bytes(raw)
    return int(digits) if digits.isdigit() and len(digits) <= _MAX_DIGITS else 0


def _either(raw: msgspec.Raw, other: msgspec.Raw) -> msgspec.Raw:
    return raw if raw and raw != NULL else other


def _details_in(raw: msgspec.Raw) -> _Details:
    if raw == NULL:
        return _NO_DETAILS
    try:
        return _details.decode(raw)
    except UNREADABLE:
        return _NO_DETAILS


def usage_in(raw: msgspec.Raw) -> Usage | None:
    """Return what a usage object counts; None when there is none, or it counts nothing."""
    tokens = tokens_in(raw)
    return usage_of(tokens) if tokens is not None else None


def usage_or_units_of(tokens: Tokens) -> Usage | None:
    """Return what `usage_of` does, and the seconds of sound or the characters of a text that it counts.

    Where a text is made of sound, OpenAI bills tokens or seconds (`{"type":"duration","seconds":N}`), others
    characters. The seconds may have a fraction; what began counts, as vLLM counts it.
    """
    used = usage_of(tokens)
    unit: Unit = "seconds"
    units = seconds_in(tokens.seconds)
    if not units:
        unit, units = "characters", _number(tokens.characters)
    return with_units(used or NO_USAGE, units, unit, whole=True) if units else used


def usage_or_units_in(raw: msgspec.Raw) -> Usage | None:
    """Return what `usage_or_units_of` does of a usage object; None when there is none, or it counts nothing."""
    tokens = tokens_in(raw)
    return usage_or_units_of(tokens) if tokens is not None else None


def seconds_in(raw: msgspec.Raw) -> int:
    """Return a number of seconds, of which one that began counts whole; 0 for what is none."""
    try:
        return math.ceil(_seconds.decode(raw)) if raw else 0
    except UNREADABLE:
        return 0


def timings_in(raw: msgspec.Raw) -> Usage | None:
    """Return what the timings of llama.cpp count; None when there are none, or they cannot be read."""
    if not raw or raw == NULL:
        return None
    try:
        timings = _timings.decode(raw)
    except UNREADABLE:
        return None
    read = timings.prompt_n + (timings.cache_n or 0)
    return Usage(read, timings.predicted_n, timings.cache_n, source=_FINAL)


def at_most(tokens: int, most: int | None) -> int:
    """Return an estimate, or its bound where that is less; None is no bound."""
    return tokens if most is None or tokens < most else most


def occurrences(key: bytes, before: bytes, content: bytes) -> int:
    """Return how often a key ends within `content`; `before` is what came in front of it, so that none is cut."""
    return (before[1 - len(key) :] + content).count(key)


def with_units(used: Usage, units: int, unit: Unit, *, whole: bool) -> Usage:
    """Return usage with the units that were counted, if any."""
    if not units:
        return used
    source = UsageSource.FINAL if whole else UsageSource.RUNNING
    return msgspec.structs.replace(used, units=units, unit=unit, source=source)


def raw_of(found: dict[bytes, bytes], name: bytes) -> msgspec.Raw:
    """Return the value of a member that a scanner found, or not."""
    return msgspec.Raw(found.get(name, b""))


def response_of(found: dict[bytes, bytes]) -> Response:
    """Return a response of the members that a scanner found."""
    return Response(**{name: raw_of(found, name.encode()) for name in Response.__struct_fields__})


def begun_of(answer: Response) -> Begun:
    """Return what a response says of itself; what is of another type counts as not said."""
    return Begun(read_as(str, answer.id, ""), read_as(float, answer.created_at, 0.0), read_as(str, answer.model, ""))


def read_as(kind: type[_T], raw: msgspec.Raw, absent: _T) -> _T:
    """Return a value of a type, `absent` where it is none or of another type."""
    try:
        return msgspec.json.decode(raw, type=kind) if raw else absent
    except UNREADABLE:
        return absent
