"""What is asked: the few members of a request's body that the edge has to know, and the splices.

The body goes upstream as the client's own bytes, but for the model's name and for what makes a stream tell its usage.
Two JSON parsers that disagree about a body could authorise one model and serve another, so whatever is ambiguous is
refused, and where a splice is not provably right the top level of the object is written anew, each of its values still
as the client's own bytes (RFC 8259 section 4: names SHOULD be unique).
"""

import codecs
import itertools
import re
import types
from collections.abc import Generator
from typing import Final, TypeVar

import msgspec

from edge.errors import InvalidRequest, ModelNotFound
from edge.names import is_model_name

_T = TypeVar("_T")

LONG_BODY_BYTES: Final = 1 << 20  # a shorter one takes 3 ms, or 10 where it is built to be slow
STEP_BYTES: Final = 1 << 18
_START_BYTES: Final = 1024
_START_MESSAGES: Final = 8
_MAX_DIGITS: Final = 15  # of a limit of tokens; no model writes that many
_BYTES_PER_TOKEN: Final = 4
_IMAGE: Final = b"data:image/"
_SMALL_BODY_BYTES: Final = 4096  # of a body in which an image would not matter
_MAX_OBJECTS: Final = 50_000  # at most, in a body whose messages are listed one by one
_MAX_IMAGES: Final = 100  # that are not taken for text; each is looked for
_MAX_SPELLINGS: Final = 10_000  # `"model"` keys at any depth; a body with more is built to be slow

# A member with a text, by the six letters of its key in every spelling that JSON allows (RFC 8259 section 7). Within a
# text it may be found as well, behind a backslash, where it means nothing. No name has more than 1024 escapes, two a
# character; and nothing is tried twice.
_MODEL_MEMBER = re.compile(
    rb'"(?:m|\\u006[dD])(?:o|\\u006[fF])(?:d|\\u0064)(?:e|\\u0065)(?:l|\\u006[cC])"'
    rb'[ \t\r\n]*:[ \t\r\n]*("[^"\\]*+(?:\\.[^"\\]*+){0,1024}+")'
)
_MAX_OPTIONS_BYTES: Final = 4096  # there are three of them
_MAX_QUOTES: Final = 100_000  # that begin or end a text or a key
_MAX_MEMBER_BYTES: Final = 1 << 16  # six bytes a character of the name, and much space
_HYPHEN: Final = ord("-")
_OPTIONS_KEY = re.compile(rb'"stream_options"[ \t\r\n]*:[ \t\r\n]*')
_MODEL: Final = b'"model"'
_ESCAPED: Final = b"\\u006"  # how an escape of one of its letters begins
_MODEL_VALUE = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*"([^"\\]*)"')


class Envelope(msgspec.Struct, frozen=True):
    """What a body asks for.

    `span` is where the model's name stands, where that was found; `one_spelling` says that JSON names no other `model`.
    `prompt_tokens` is a guess (`prompt_estimate`), and 0 for a form: it holds sound or an image, whose size says
    nothing of tokens. `max_tokens` is the smallest limit of the answer, `n` the number of answers. `stream_options` is
    the client's own value, b"" when there is none, and `include_usage` and `continuous_usage` are what it asks for in
    there. What is of a wrong type counts as not said: the upstream will judge it.
    """

    model: str
    stream: bool = False
    span: tuple[int, int] | None = None
    one_spelling: bool = False
    prompt_tokens: int = 0
    max_tokens: int | None = None
    n: int = 1
    stream_options: bytes = b""
    include_usage: bool = False
    continuous_usage: bool = False


_ABSENT: Final = msgspec.Raw(b"")
_TRUE: Final = msgspec.Raw(b"true")
_NOTHING_ASKED: Final = (b"", False, False)


class _Members(msgspec.Struct):
    model: msgspec.Raw = _ABSENT
    stream: bool | None = None
    max_tokens: msgspec.Raw = _ABSENT
    max_completion_tokens: msgspec.Raw = _ABSENT
    max_output_tokens: msgspec.Raw = _ABSENT
    n: msgspec.Raw = _ABSENT
    stream_options: msgspec.Raw = _ABSENT


class _OnlyModel(msgspec.Struct):
    model: msgspec.Raw = _ABSENT


class _OnlyOptions(msgspec.Struct):
    stream_options: msgspec.Raw = _ABSENT


_members = msgspec.json.Decoder(_Members)
_only_model = msgspec.json.Decoder(_OnlyModel)
_only_options = msgspec.json.Decoder(_OnlyOptions)
_text = msgspec.json.Decoder(str)
_top_level = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_json(body: bytes) -> Envelope:
    """Return the envelope of a JSON body; builds no tree, so a bomb of tiny values costs no memory.

    Raises: `InvalidRequest`, naming what to change.
    """
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError:
            raise _not_text() from None
    members = _decode(body)
    model = _model_in(members)
    one_spelling = body.count(_MODEL) == 1 and not (b"\\" in body and (_ESCAPED in body or _is_escaped(members.model)))
    span = None if one_spelling else _at_once(_place_of_model(body, model))
    return _envelope(members, model, span, one_spelling, prompt_estimate(body))


@types.coroutine
def read_long_json(body: bytes) -> Generator[None, None, Envelope]:
    """Return what `read_json` does, and let others run between its steps.

    10 MB would keep all streams waiting for 20 to 40 ms; their longest step takes 3, or 12 where they are built to be
    slow.
    """
    decoder = None if body.isascii() else codecs.getincrementaldecoder("utf-8")()
    models, escaped = 0, False
    for start in range(0, len(body), STEP_BYTES):
        yield
        stop = start + STEP_BYTES
        if decoder is not None:
            try:
                decoder.decode(body[start:stop], final=stop >= len(body))
            except UnicodeDecodeError:
                raise _not_text() from None
        models += body.count(_MODEL, start, stop + len(_MODEL) - 1)
        escaped = escaped or body.find(_ESCAPED, start, stop + len(_ESCAPED) - 1) >= 0
    yield
    members = _decode(body)
    model = _model_in(members)
    yield
    prompt_tokens = prompt_estimate(body)
    yield
    one_spelling = models == 1 and not escaped and not _is_escaped(members.model)
    span = None if one_spelling else (yield from _place_of_model(body, model))
    return _envelope(members, model, span, one_spelling, prompt_tokens)


def _at_once(steps: Generator[None, None, _T]) -> _T:
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: _T = done.value
            return result


def _not_text() -> InvalidRequest:
    return InvalidRequest("the body is not valid UTF-8")


def _is_escaped(raw: msgspec.Raw) -> bool:
    return b"\\" in bytes(raw)


def _model_in(members: _Members) -> str:
    raw = bytes(members.model)
    if not raw:
        raise InvalidRequest("you must provide a model parameter", param="model")
    if raw[:1] != b'"':
        raise InvalidRequest('model must be a string, such as "public/deepseek-r1"', param="model")
    return _model_name(_text.decode(raw))


def _envelope(
    members: _Members, model: str, span: tuple[int, int] | None, one_spelling: bool, prompt_tokens: int
) -> Envelope:
    options, include_usage, continuous_usage = _NOTHING_ASKED
    if members.stream_options:
        options, include_usage, continuous_usage = _asked_of_usage(members.stream_options)
    max_tokens = None
    if members.max_tokens or members.max_completion_tokens or members.max_output_tokens:
        max_tokens = _smallest(members.max_tokens, members.max_completion_tokens, members.max_output_tokens)
    n = (_smallest(members.n) or 1) if members.n else 1
    return Envelope(
        model,
        members.stream is True,
        span,
        one_spelling,
        prompt_tokens,
        max_tokens,
        n,
        options,
        include_usage,
        continuous_usage,
    )


def rewrite_json(
    body: bytes, envelope: Envelope, model: str, *, include_usage: bool = False, continuous: bool = False
) -> bytes:
    """Return `body` with the model's name replaced: spliced where its place is certain, else written anew.

    `include_usage` and `continuous` make it ask for usage at the end of a stream and for running usage, whatever the
    client said of them; an upstream takes that only of a body with `"stream":true`. A long body in which the place of
    the client's own `stream_options` is not certain stays without: its usage is estimated.
    """
    splices: list[tuple[int, int, bytes]] = []
    is_certain = True
    if model != envelope.model:
        span = _model_span(body, envelope)
        if span is not None:
            splices.append((*span, msgspec.json.encode(model)[1:-1]))
        else:
            is_certain = False
    options = _stream_options(envelope, include_usage, continuous)
    if options is not None and not envelope.stream_options:
        inside = body.find(b"{") + 1  # nothing but space stands before; and a member follows, the model
        splices.append((inside, inside, b'"stream_options":%b,' % options))
    elif options is not None:
        span = _place_of_options(body, envelope.stream_options)
        if span is not None:
            splices.append((*span, options))
        elif len(body) <= STEP_BYTES:
            is_certain = False
        else:
            options = None
    return _spliced(body, splices) if is_certain else _written_anew(body, model, options)


def _spliced(body: bytes, splices: list[tuple[int, int, bytes]]) -> bytes:
    parts: list[bytes] = []
    at = 0
    for start, end, replacement in sorted(splices):
        parts += (body[at:start], replacement)
        at = end
    return b"".join((*parts, body[at:])) if parts else body


def _written_anew(body: bytes, model: str, options: bytes | None) -> bytes:
    """Return the body with its top level written anew, each other value as the client's own bytes."""
    members = _top_level.decode(body)
    members["model"] = msgspec.Raw(msgspec.json.encode(model))
    if options is not None:
        members["stream_options"] = msgspec.Raw(options)
    return msgspec.json.encode(members)


def _model_span(body: bytes, envelope: Envelope) -> tuple[int, int] | None:
    """Return where the model's name stands; None where that is not certain."""
    if envelope.one_spelling:
        value = _MODEL_VALUE.search(body, body.find(_MODEL))
        if value is not None and value[1] == envelope.model.encode():
            return value.span(1)
    return envelope.span


def _place_of_options(body: bytes, raw: bytes) -> tuple[int, int] | None:
    """Return where the client's own `stream_options` stand; None where that is not certain."""
    places = [
        key for key in itertools.islice(_OPTIONS_KEY.finditer(body), _MAX_SPELLINGS) if body.startswith(raw, key.end())
    ]
    if len(places) != 1:
        return None
    [key] = places
    renamed = bytearray(body)
    renamed[key.start() + 1] = _HYPHEN
    if _only_options.decode(renamed).stream_options:
        return None
    return key.end(), key.end() + len(raw)


def _stream_options(envelope: Envelope, include_usage: bool, continuous: bool) -> bytes | None:
    """Return what `stream_options` has to be; None when it can stay, or is nothing that could be added to."""
    if (envelope.include_usage or not include_usage) and (envelope.continuous_usage or not continuous):
        return None
    options = _options_in(envelope.stream_options)
    if options is None:
        return None
    if include_usage:
        options["include_usage"] = _TRUE
    if continuous:
        options["continuous_usage_stats"] = _TRUE
    return msgspec.json.encode(options)


def _asked_of_usage(raw: msgspec.Raw) -> tuple[bytes, bool, bool]:
    stream_options = bytes(raw)
    if len(stream_options) > _MAX_OPTIONS_BYTES:
        raise InvalidRequest(f"`stream_options` is over {_MAX_OPTIONS_BYTES} bytes", param="stream_options")
    options = _options_in(stream_options) or {}
    return stream_options, options.get("include_usage") == _TRUE, options.get("continuous_usage_stats") == _TRUE


def _options_in(raw: bytes) -> dict[str, msgspec.Raw] | None:
    """Return the members of `stream_options`, which may be absent or null; None for anything but an object."""
    if raw in (b"", b"null"):
        return {}
    try:
        return _top_level.decode(raw)
    except (ValueError, RecursionError):
        return None


def _smallest(*members: msgspec.Raw) -> int | None:
    """Return the smallest of the members that are whole numbers above 0."""
    smallest = None
    for raw in members:
        if raw:
            digits = bytes(raw)
            if digits.isdigit() and len(digits) <= _MAX_DIGITS:
                number = int(digits)
                if number and (smallest is None or number < smallest):
                    smallest = number
    return smallest


def prompt_estimate(body: bytes) -> int:
    """Return how many tokens a body may ask a model to read, at least 1: a guess from its size.

    Four bytes are taken for a token, which suits English and Chinese in UTF-8. Escaped text counts for up to twice as
    much, and sound in base64 as if it were text; an image in a `data:` URL counts for nothing, in a body over 4 KiB.
    """
    size = len(body)
    if size <= _SMALL_BODY_BYTES:
        return max(1, size // _BYTES_PER_TOKEN)
    at = 0
    for _ in range(_MAX_IMAGES):
        at = body.find(_IMAGE, at)
        if at < 0:
            break
        end = body.find(b'"', at)
        if end < 0:
            break
        size -= end - at
        at = end
    return max(1, size // _BYTES_PER_TOKEN)


class _Message(msgspec.Struct):
    role: str = ""
    content: msgspec.Raw = _ABSENT


class _Opening(msgspec.Struct):
    messages: msgspec.Raw = _ABSENT
    prompt: msgspec.Raw = _ABSENT
    input: msgspec.Raw = _ABSENT


class _Conversation(msgspec.Struct):
    messages: list[_Message] = []
    prompt: msgspec.Raw = _ABSENT
    input: msgspec.Raw = _ABSENT


_opening = msgspec.json.Decoder(_Opening)
_conversation = msgspec.json.Decoder(_Conversation)


def conversation_start(body: bytes) -> bytes:
    """Return what stays the same of a conversation's body from turn to turn: the messages up to the user's first.

    A system prompt alone would not do: everybody who shares it would be taken for one conversation. Each message counts
    with its first KiB. Where there may be millions of messages none is told from another, and all of them count with
    their first KiB. Returns nothing for a body of another shape.
    """
    try:
        if body.count(b"{") > _MAX_OBJECTS:
            opening = _opening.decode(body)
            begins = (opening.prompt, opening.input, opening.messages)
            return b"\0".join(bytes(memoryview(raw)[:_START_BYTES]) for raw in begins)
        asked = _conversation.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return b""
    parts = [bytes(raw)[:_START_BYTES] for raw in (asked.prompt, asked.input)]
    for message in asked.messages[:_START_MESSAGES]:
        parts.append(bytes(message.content)[:_START_BYTES])
        if message.role == "user":
            break
    return b"\0".join(parts)


def _decode(body: bytes) -> _Members:
    if not body:
        raise InvalidRequest("the body is empty: send a JSON object with a model")
    try:
        return _members.decode(body)
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except msgspec.ValidationError as error:
        if "$.stream" in str(error):
            raise InvalidRequest("stream must be true or false", param="stream") from None
        raise InvalidRequest("the body must be a JSON object") from None
    except msgspec.DecodeError:
        raise InvalidRequest("the body is not valid JSON") from None


def _model_name(name: str) -> str:
    if not name:
        raise InvalidRequest("you must provide a model parameter", param="model")
    if not is_model_name(name):
        raise ModelNotFound.named("of that name")
    return name


def _place_of_model(body: bytes, model: str) -> Generator[None, None, tuple[int, int] | None]:
    """Return where `model` stands, the value of the last member of that name; None where it stands at several places.

    Raises: `InvalidRequest` for another value at the top level, in any spelling of the key. Each member of this value
    gets another key, at any depth; where a decoding then still finds a `model`, its value is another one. Yields
    between its steps, for who lets others run there.
    """
    renamed, places, number = bytearray(body), [], 0
    for start in range(0, len(body), STEP_BYTES):
        yield
        stop = start + STEP_BYTES
        for member in _MODEL_MEMBER.finditer(renamed, start, stop + _MAX_MEMBER_BYTES):
            if member.start() >= stop:
                break
            number += 1
            if number > _MAX_SPELLINGS:
                raise InvalidRequest("the body has too many members named model", param="model")
            if _is_text(member[1], model):
                places.append((member.start(1) + 1, member.end(1) - 1))
                renamed[member.start() + 1] = _HYPHEN
    yield
    if _only_model.decode(renamed).model:
        raise InvalidRequest("the body has two different model members", param="model")
    if len(places) == 1:
        return places[0]
    yield
    if body.count(b'"') - body.count(b'\\"') > _MAX_QUOTES:  # and so too many members to be written anew
        raise InvalidRequest("so large a body can name its model only once", param="model")
    return None


def _is_text(raw: bytes, text: str) -> bool:
    try:
        return _text.decode(raw) == text
    except msgspec.DecodeError:  # within a text that is not JSON
        return False


# --- multipart/form-data (RFC 7578), for audio and image edits -------------------------------------------------------

_PARAMETER = r"[ \t]*;[ \t]*([!#$%&'+^_`|~0-9A-Za-z.*-]+)=(?:\"([^\"\\\\]*)\"|([^\s;\",]*))"
_FORM_TYPE = re.compile(rf"multipart/form-data((?:{_PARAMETER})+)[ \t]*", re.IGNORECASE)
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")  # RFC 2046 section 5.1.1
_DISPOSITION = re.compile(
    rb'form-data(?:[ \t]*;[ \t]*[!#$%&\'+^_`|~0-9A-Za-z.-]+\*?=(?:"[^"]*"|[^\s;"]*))*[ \t]*', re.IGNORECASE
)
_NAME = re.compile(rb';[ \t]*name=(?:"([^"]*)"|([^\s;"]*))', re.IGNORECASE)
_AMBIGUOUS_NAME = re.compile(rb";[ \t]*name\*", re.IGNORECASE)
_FILENAME = re.compile(rb";[ \t]*filename\*?=", re.IGNORECASE)
_MAX_PARTS: Final = 1000


def boundary_of(content_type: str) -> str:
    """Return the boundary of a form's content type; raises `InvalidRequest` where two parsers could find two."""
    form = _FORM_TYPE.fullmatch(content_type.strip())
    parameters = re.findall(_PARAMETER, form[1]) if form is not None else []
    boundaries: list[str] = [
        quoted or bare for name, quoted, bare in parameters if name.lower().rstrip("*") == "boundary"
    ]
    starred = any(name.endswith("*") for name, _, _ in parameters)
    if len(boundaries) != 1 or starred or not _BOUNDARY.fullmatch(boundaries[0]):
        raise InvalidRequest("the content type must name one boundary: send multipart/form-data; boundary=...")
    return boundaries[0]


def read_multipart(body: bytes, content_type: str) -> Envelope:
    """Return the envelope of a multipart body; `model` and `stream` are parts of their own.

    Raises: `InvalidRequest`.
    """
    found: dict[bytes, tuple[int, int]] = {}
    for name, start, end in _fields(body, content_type):
        if name in found and body[slice(*found[name])] != body[start:end]:
            raise InvalidRequest(f"the form has two different {name.decode()} parts", param=name.decode())
        if name in found and name == b"model":
            raise InvalidRequest("the form has two model parts", param="model")
        found[name] = (start, end)
    if b"model" not in found:
        raise InvalidRequest("you must provide a model part in the form", param="model")
    start, end = found[b"model"]
    try:
        model = _model_name(body[start:end].decode())
    except UnicodeDecodeError:
        raise InvalidRequest("the model part is not valid UTF-8", param="model") from None
    stream = body[slice(*found[b"stream"])].lower() in (b"true", b"1") if b"stream" in found else False
    return Envelope(model, stream, (start, end))


def rewrite_multipart(body: bytes, envelope: Envelope, model: str) -> bytes:
    """Return `body` with the content of its `model` part replaced."""
    assert envelope.span is not None  # read_multipart always knows it
    return _spliced(body, [(*envelope.span, model.encode())])


def _fields(body: bytes, content_type: str) -> list[tuple[bytes, int, int]]:
    """Return the `model` and `stream` fields: their name and where their content begins and ends."""
    delimiter = b"--" + boundary_of(content_type).encode()
    malformed = InvalidRequest("the body is not valid multipart/form-data")
    if not body.startswith(delimiter):
        raise malformed
    fields: list[tuple[bytes, int, int]] = []
    at = len(delimiter)
    for _ in range(_MAX_PARTS):
        if body.startswith(b"--", at):
            return fields
        head_end = body.find(b"\r\n\r\n", at)
        part_end = body.find(b"\r\n" + delimiter, at)
        if not body.startswith(b"\r\n", at) or head_end < 0 or not head_end <= part_end:
            raise malformed
        name = _field_name(body[at + 2 : head_end])
        if name in (b"model", b"stream"):
            fields.append((name, min(head_end + 4, part_end), part_end))
        at = part_end + 2 + len(delimiter)
    raise InvalidRequest(f"the form has more than {_MAX_PARTS} parts")


def _field_name(head: bytes) -> bytes | None:
    """Return the name of a part, None for a file; refuse what two parsers could read as different names."""
    dispositions = []
    for line in head.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        if not colon or name != name.strip() or not name:
            raise InvalidRequest("a part of the form has a malformed header")
        if name.lower() == b"content-disposition":
            dispositions.append(value.strip())
    if len(dispositions) != 1 or not _DISPOSITION.fullmatch(dispositions[0]):
        raise InvalidRequest("each part of the form needs one header: Content-Disposition: form-data; name=...")
    names = _NAME.findall(dispositions[0])
    if len(names) != 1 or _AMBIGUOUS_NAME.search(dispositions[0]) or b"\\" in names[0][0]:
        raise InvalidRequest("a part of the form has an ambiguous name")
    return None if _FILENAME.search(dispositions[0]) else names[0][0] or names[0][1]
