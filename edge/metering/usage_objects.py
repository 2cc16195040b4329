"""What an object named `usage` counts, in any of the dialects."""

import re
from typing import Annotated, Final, TypeVar

import msgspec

from edge.exchange import Usage, UsageSource
from edge.protocols import Begun

TAIL_BYTES: Final = 64 * 1024  # kept of what is longer: behind the usage stand the caller's own tools and metadata

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
    prompt_tokens_details: msgspec.Raw = ABSENT
    completion_tokens_details: msgspec.Raw = ABSENT
    input_tokens_details: msgspec.Raw = ABSENT
    output_tokens_details: msgspec.Raw = ABSENT


class Response(msgspec.Struct):
    """A response of the Responses API, as far as it is read."""

    usage: msgspec.Raw = ABSENT
    id: msgspec.Raw = ABSENT
    created_at: msgspec.Raw = ABSENT
    model: msgspec.Raw = ABSENT


_details = msgspec.json.Decoder(_Details)
_tokens = msgspec.json.Decoder(Tokens)
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
    if details := _either(tokens.prompt_tokens_details, tokens.input_tokens_details):
        cached = cached or _details_in(details).cached_tokens or 0
    if details := _either(tokens.completion_tokens_details, tokens.output_tokens_details):
        reasoning = _details_in(details).reasoning_tokens or 0
    if tokens.reasoning_tokens and not reasoning:
        digits = bytes(tokens.reasoning_tokens)
        reasoning = int(digits) if digits.isdigit() and len(digits) <= _MAX_DIGITS else 0
    return Usage(prompt or 0, completion or 0, cached, reasoning, 0, _FINAL)


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


def occurrences(key: bytes, before: bytes, content: bytes) -> int:
    """Return how often a key ends within `content`; `before` is what came in front of it, so that none is cut."""
    return (before[1 - len(key) :] + content).count(key)


def with_units(used: Usage, units: int, whole: bool) -> Usage:
    """Return usage with the images that were counted, if any."""
    if not units:
        return used
    return msgspec.structs.replace(used, units=units, source=UsageSource.FINAL if whole else UsageSource.RUNNING)


def last_usage(tail: bytes) -> Usage | None:
    """Return the last usage in the end of what is too long, or too odd, to be parsed, or was cut."""
    usage = None
    for found in USAGE_MEMBER.finditer(tail):
        usage = usage_in(msgspec.Raw(found[1])) or usage
    return usage


def begun_of(answer: Response) -> Begun:
    """Return what a response says of itself; what is of another type counts as not said."""
    return Begun(_read_as(str, answer.id, ""), _read_as(float, answer.created_at, 0.0), _read_as(str, answer.model, ""))


def _read_as(kind: type[_T], raw: msgspec.Raw, absent: _T) -> _T:
    try:
        return msgspec.json.decode(raw, type=kind) if raw else absent
    except UNREADABLE:
        return absent
