"""What of a body goes upstream changed: the model's name, and what makes a stream report its usage.

Where a splice is not provably right, the top level of the object is written anew, each of its values still as the
client's own bytes.
"""

import itertools
import re

import msgspec

from edge.envelope.json import HYPHEN, MAX_SPELLINGS, MODEL_KEY, TRUE, Envelope, options_in, top_level

_MODEL_VALUE = re.compile(MODEL_KEY + rb'[ \t\r\n]*:[ \t\r\n]*"([^"\\]*)"')
_NO_MEMBER = re.compile(rb"[ \t\r\n]*\}")
_OPTIONS_KEY = re.compile(rb'"stream_options"[ \t\r\n]*:[ \t\r\n]*')


class _OnlyOptions(msgspec.Struct):
    stream_options: msgspec.Raw = msgspec.Raw(b"")


_only_options = msgspec.json.Decoder(_OnlyOptions)


def rewrite_json(
    body: bytes,
    envelope: Envelope,
    model: str,
    dropped: tuple[str, ...] = (),
    *,
    include_usage: bool = False,
    continuous: bool = False,
) -> bytes:
    """Return `body` with the model's name replaced: spliced where its place is certain, else written anew.

    It is written anew without the members that are `dropped`, at most a thousand being left.
    `include_usage` and `continuous` make it ask for usage at the end of a stream and for running usage, whatever the
    client said of them; an upstream takes that only of a body with `"stream":true`.
    """
    splices: list[tuple[int, int, bytes]] = []
    is_certain = not dropped
    inside = body.find(b"{") + 1  # nothing but space stands before
    if not envelope.written:
        # What is put in front needs a member behind it, and no other `model`, such as null.
        has_place = _NO_MEMBER.match(body, inside) is None and MODEL_KEY not in body and b"\\u" not in body
        is_certain = is_certain and has_place
        splices.append((inside, inside, b'"model":%b,' % msgspec.json.encode(model)))
    elif model != envelope.written:
        span = _model_span(body, envelope)
        if span is not None:
            splices.append((*span, msgspec.json.encode(model)[1:-1]))
        else:
            is_certain = False
    options = options_for(envelope, include_usage, continuous)
    if options is not None and not envelope.stream_options:
        splices.append((inside, inside, b'"stream_options":%b,' % options))
    elif options is not None:
        span = _place_of_options(body, envelope.stream_options)
        if span is not None:
            splices.append((*span, options))
        else:
            is_certain = False
    if not is_certain:
        return _written_anew(body, model, options, dropped)
    return b"".join(spliced(body, splices)) if splices else body


def spliced(body: bytes, splices: list[tuple[int, int, bytes]]) -> list[memoryview | bytes]:
    """Return a body in pieces, of which some places are replaced; no byte of it is copied."""
    view, at = memoryview(body), 0
    pieces: list[memoryview | bytes] = []
    for start, end, replacement in sorted(splices):
        pieces += (view[at:start], replacement) if replacement else (view[at:start],)
        at = end
    pieces.append(view[at:])
    return pieces


def _written_anew(body: bytes, model: str, options: bytes | None, dropped: tuple[str, ...]) -> bytes:
    members = top_level.decode(body)
    for name in dropped:
        del members[name]
    members["model"] = msgspec.Raw(msgspec.json.encode(model))
    if options is not None:
        members["stream_options"] = msgspec.Raw(options)
    return msgspec.json.encode(members)


def _model_span(body: bytes, envelope: Envelope) -> tuple[int, int] | None:
    """Return where the model's name stands; None where that is not certain."""
    if envelope.one_spelling:
        value = _MODEL_VALUE.search(body, body.find(MODEL_KEY))
        if value is not None and value[1] == envelope.written.encode():
            return value.span(1)
    return envelope.span


def _place_of_options(body: bytes, raw: bytes) -> tuple[int, int] | None:
    """Return where the client's own `stream_options` stand; None where that is not certain."""
    places = [
        key for key in itertools.islice(_OPTIONS_KEY.finditer(body), MAX_SPELLINGS) if body.startswith(raw, key.end())
    ]
    if len(places) != 1:
        return None
    [key] = places
    renamed = bytearray(body)
    renamed[key.start() + 1] = HYPHEN
    if _only_options.decode(renamed).stream_options:
        return None
    return key.end(), key.end() + len(raw)


def options_for(envelope: Envelope, include_usage: bool, continuous: bool) -> bytes | None:
    """Return what `stream_options` has to be; None when it can stay, or is nothing that could be added to."""
    if (envelope.include_usage or not include_usage) and (envelope.continuous_usage or not continuous):
        return None
    options = options_in(envelope.stream_options)
    if options is None:
        return None
    if include_usage:
        options["include_usage"] = TRUE
    if continuous:
        options["continuous_usage_stats"] = TRUE
    return msgspec.json.encode(options)
