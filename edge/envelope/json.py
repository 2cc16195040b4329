"""What a JSON body asks for: the few members that the edge has to know.

Two parsers that disagree about a body could authorise one model and serve another, so whatever is ambiguous is refused
(RFC 8259 section 4: names SHOULD be unique). `envelope/splices.py` changes what goes upstream.
"""

import itertools
import re
from typing import Any, Final, NamedTuple, cast

import msgspec

from edge.envelope.lax import is_true, whole_number
from edge.envelope.outline import (
    MAX_MEMBERS,
    SPACE,
    Member,
    no_object,
    not_json,
    not_text,
    plain_quotes,
    too_deep,
    too_many_members,
)
from edge.envelope.steering import NAMES, READ, Names
from edge.errors import InvalidRequest, ModelNotFound
from edge.metering.estimating import estimated
from edge.names import is_model_name

_COUNTED_BYTES: Final = 1 << 14  # a shorter body has no more members than are read in 1 ms
LONG_BODY_BYTES: Final = 1 << 19  # a shorter one takes 1 ms, or 5 where it is built to be slow
STEP_BYTES: Final = 1 << 18
START_BYTES: Final = 1024
_START_MESSAGES: Final = 8
_MAX_OBJECTS: Final = 50_000  # at most, in a body whose messages are listed one by one
MAX_SPELLINGS: Final = 10_000  # `"model"` keys at any depth; a body with more is built to be slow

# A member with a text, by the six letters of its key in every spelling that JSON allows (RFC 8259 section 7). Within a
# text it may be found as well, behind a backslash, where it means nothing. No name has more than 1024 escapes, two a
# character; and nothing is tried twice.
_MODEL_MEMBER = re.compile(
    rb'"(?:m|\\u006[dD])(?:o|\\u006[fF])(?:d|\\u0064)(?:e|\\u0065)(?:l|\\u006[cC])"'
    rb'[ \t\r\n]*:[ \t\r\n]*("[^"\\]*+(?:\\.[^"\\]*+){0,1024}+")'
)
_MAX_OPTIONS_BYTES: Final = 4096  # there are three of them
_ABSENT: Final = msgspec.Raw(b"")
TRUE: Final = msgspec.Raw(b"true")
_FALSE: Final = msgspec.Raw(b"false")
_NULL: Final = msgspec.Raw(b"null")
_NO: Final = (b"", b"false", b"null")
_TRUTHS: Final = (_FALSE, TRUE, _NULL)
HYPHEN: Final = ord("-")
MODEL_KEY: Final = b'"model"'
_ESCAPED: Final = b"\\u006"  # how an escape of one of its letters begins


class Places(NamedTuple):
    """What is known of a long body, in which nothing is to be looked for again.

    `members` are those of the top level, in their order, and `inside` is where the first one could stand. `characters`
    are those of the text `input`, and `begins` is what `conversation_start` returns.
    """

    members: tuple[Member, ...]
    inside: int
    characters: int
    begins: bytes


class Envelope(msgspec.Struct, frozen=True):
    """What a body asks for.

    `model` is the name that is asked, `written` the one in the body, which is another, or "", only where the path names
    the model. `span` is where it stands, where that was found; `one_spelling`: JSON names no other `model`.
    `prompt_tokens` is a guess (`metering/estimating.py`), at least 1, and 0 for a form: it holds sound or an image,
    whose size says nothing of tokens. `max_tokens` is the limit of an answer, None where there is none, `n` the number
    of answers to each of `prompts`. `stream_options` is the client's own value, b"" when there is none, and
    `include_usage` and `continuous_usage` are what it asks for in there. `previous_response_id` is the response that is
    gone on with, "" for none, `background` asks for one that is written while nobody waits, and `stored` that it is
    kept. `places` are those of a long body. `steering` are names of members that may steer an engine. What is of a
    wrong type counts as not said: the upstream will judge it.
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
    written: str = ""
    previous_response_id: str = ""
    background: bool = False
    stored: bool = True
    prompts: int = 1
    steering: tuple[str, ...] = ()
    places: Places | None = None


class _Members(msgspec.Struct, forbid_unknown_fields=True):
    """What a body has most often, in about the order of SDKs: the search for a name goes on where the last one stood.

    Each more costs every request; of those after `best_of` none is read, or steers.
    """

    messages: msgspec.Raw = _ABSENT
    model: msgspec.Raw = _ABSENT
    max_completion_tokens: msgspec.Raw = _ABSENT
    max_tokens: msgspec.Raw = _ABSENT
    stream: bool | None = None
    stream_options: msgspec.Raw = _ABSENT
    n: msgspec.Raw = _ABSENT
    prompt: msgspec.Raw = _ABSENT
    input: msgspec.Raw = _ABSENT
    max_output_tokens: msgspec.Raw = _ABSENT
    previous_response_id: msgspec.Raw = _ABSENT
    background: msgspec.Raw = _ABSENT
    store: msgspec.Raw = _ABSENT
    best_of: msgspec.Raw = _ABSENT
    temperature: msgspec.Raw = _ABSENT
    top_p: msgspec.Raw = _ABSENT
    stop: msgspec.Raw = _ABSENT
    tools: msgspec.Raw = _ABSENT
    tool_choice: msgspec.Raw = _ABSENT
    parallel_tool_calls: msgspec.Raw = _ABSENT
    response_format: msgspec.Raw = _ABSENT
    presence_penalty: msgspec.Raw = _ABSENT
    frequency_penalty: msgspec.Raw = _ABSENT
    reasoning_effort: msgspec.Raw = _ABSENT
    seed: msgspec.Raw = _ABSENT
    user: msgspec.Raw = _ABSENT
    metadata: msgspec.Raw = _ABSENT
    system: msgspec.Raw = _ABSENT
    instructions: msgspec.Raw = _ABSENT


class _OnlyModel(msgspec.Struct):
    model: msgspec.Raw = _ABSENT


_members = msgspec.json.Decoder(_Members)
_only_model = msgspec.json.Decoder(_OnlyModel)
_text = msgspec.json.Decoder(str)
top_level = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_json(body: bytes, path_model: str = "", limits: tuple[str, ...] = (), names: Names = NAMES) -> Envelope:
    """Return the envelope of a JSON body; builds no tree, so a bomb of tiny values costs no memory.

    `path_model` is the model that the path names, which counts before that of the body. `limits` are the members that
    may limit the answer, of which the first one that is there does. `names` are those of members that pools look for.
    Raises: `InvalidRequest`, naming what to change.
    """
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError:
            raise not_text() from None
    members, steering = _decode(body, names)
    written = _model_in(members, path_model)
    one_spelling = body.count(MODEL_KEY) == 1 and not (
        b"\\" in body and (_ESCAPED in body or b"\\" in bytes(members.model))
    )
    span = None if one_spelling or not written else _place_of_model(body, written)
    return _envelope(members, path_model or written, written, span, one_spelling, estimated(body), limits, steering)


def _model_in(members: _Members, path_model: str) -> str:
    """Return the model's name in a body, which may be absent only where the path has one."""
    raw = bytes(members.model)
    if path_model and raw in (b"", b"null"):
        return ""
    if raw and raw[:1] != b'"':
        raise InvalidRequest('model must be a string, such as "public/deepseek-r1"', param="model")
    return model_name(_text.decode(raw) if raw else "")


def _envelope(
    members: _Members,
    model: str,
    written: str,
    span: tuple[int, int] | None,
    one_spelling: bool,
    prompt_tokens: int,
    limits: tuple[str, ...],
    steering: tuple[str, ...],
) -> Envelope:
    options, include_usage, continuous_usage = b"", False, False
    if members.stream_options:
        options, include_usage, continuous_usage = _asked_of_usage(members.stream_options)
    max_tokens = None
    for name in limits:
        limit = getattr(members, name)
        if limit and limit != _NULL:
            max_tokens = whole_number(limit)
            break
    n = (whole_number(members.n) or 1) if members.n else 1
    if members.best_of:
        n = max(n, whole_number(members.best_of) or 1)
    prompts = max(1, _prompts_in(members.prompt)) if members.prompt else 1
    previous, background, stored = "", False, True
    if members.previous_response_id or members.background or members.store:
        previous = _text_in(members.previous_response_id)
        background = bytes(members.background) not in _NO  # engines take 1 and "yes" for true
        stored = members.store != _FALSE
    return Envelope(
        model, members.stream is True, span, one_spelling, prompt_tokens or 1, max_tokens, n,
        options, include_usage, continuous_usage,
        written, previous, background, stored, prompts, steering,
    )  # fmt: skip


def _text_in(raw: msgspec.Raw) -> str:
    return _text.decode(raw) if raw and bytes(raw).startswith(b'"') else ""


def _asked_of_usage(raw: msgspec.Raw) -> tuple[bytes, bool, bool]:
    stream_options = bytes(raw)
    if len(stream_options) > _MAX_OPTIONS_BYTES:
        raise InvalidRequest(f"`stream_options` is over {_MAX_OPTIONS_BYTES} bytes", param="stream_options")
    options = options_in(stream_options) or {}
    usage, running = options.get("include_usage"), options.get("continuous_usage_stats")
    return stream_options, usage is not None and is_true(usage), running is not None and is_true(running)


def options_in(raw: bytes) -> dict[str, msgspec.Raw] | None:
    """Return the members of `stream_options`, which may be absent or null; None for anything but an object."""
    if raw in (b"", b"null"):
        return {}
    try:
        return top_level.decode(raw)
    except (ValueError, RecursionError):
        return None


def _prompts_in(raw: msgspec.Raw) -> int:
    """Return how many prompts a member asks to be completed: a list holds texts, lists of tokens, or tokens of one."""
    if bytes(memoryview(raw)[:1]) != b"[":
        return 1
    prompts = bytes(raw)
    kind = prompts[1:START_BYTES].lstrip()[:1]
    if kind == b"[":
        return prompts.count(b"[") - 1
    if kind != b'"':
        return 1
    return plain_quotes(prompts).count(b'"') // 2


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
            return b"\0".join(bytes(memoryview(raw)[:START_BYTES]) for raw in begins)
        asked = _conversation.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return b""
    parts = [bytes(raw)[:START_BYTES] for raw in (asked.prompt, asked.input)]
    for message in asked.messages[:_START_MESSAGES]:
        parts.append(bytes(message.content)[:START_BYTES])
        if message.role == "user":
            break
    return b"\0".join(parts)


def _decode(body: bytes, names: Names) -> tuple[_Members, tuple[str, ...]]:
    """Return the members that are read, and the names of those that may steer an engine.

    Of a name that comes twice the last value counts, as for engines. Each name is looked at only where one is unusual.
    """
    if not body:
        raise InvalidRequest("the body is empty: send a JSON object with a model")
    try:
        if names.usual_are_taken:
            try:
                return _members.decode(body), ()
            except msgspec.ValidationError:  # another name, or no object
                pass
        found = top_level.decode(body) if len(body) <= _COUNTED_BYTES else _counted(body)
    except RecursionError:
        raise too_deep() from None
    except msgspec.DecodeError:
        raise (not_json() if body.lstrip(SPACE).startswith(b"{") else no_object()) from None
    if len(found) > MAX_MEMBERS:
        raise too_many_members()
    steering = names.steering(found)
    values: dict[str, Any] = {name: value for name, value in found.items() if name in READ}
    if "stream" in values:
        values["stream"] = _is_stream(values["stream"])
    return _Members(**values), steering


def _is_stream(raw: msgspec.Raw) -> bool:
    if raw not in _TRUTHS:
        raise InvalidRequest("stream must be true or false", param="stream")
    return raw == TRUE


class _Name(str):
    """The name of a member, told apart from other texts so that msgspec shows each of them."""

    __slots__ = ()


def _counted(body: bytes) -> dict[str, msgspec.Raw]:
    """Return the members of a body that may have tens of thousands: no more are read than there may be."""
    count = itertools.count(1)

    def name(_: type, text: str) -> _Name:
        if next(count) > MAX_MEMBERS:
            raise too_many_members()
        return _Name(text)

    return cast(dict[str, msgspec.Raw], msgspec.json.decode(body, type=dict[_Name, msgspec.Raw], dec_hook=name))


def model_name(name: str) -> str:
    """Return the name that a body asks for; raises `InvalidRequest`, `ModelNotFound`."""
    if not name:
        raise InvalidRequest("you must provide a model parameter", param="model")
    if not is_model_name(name):
        raise ModelNotFound.named("of that name")
    return name


def _place_of_model(body: bytes, model: str) -> tuple[int, int] | None:
    """Return where `model` stands, the value of the last member of that name; None where it stands at several places.

    Raises: `InvalidRequest` for another value at the top level, in any spelling of the key. Each member of this value
    gets another key, at any depth; where a decoding then still finds a `model`, its value is another one.
    """
    renamed, places = bytearray(body), []
    for number, member in enumerate(_MODEL_MEMBER.finditer(body)):
        if number >= MAX_SPELLINGS:
            raise InvalidRequest("the body has too many members named model", param="model")
        if _is_text(member[1], model):
            places.append((member.start(1) + 1, member.end(1) - 1))
            renamed[member.start() + 1] = HYPHEN
    if _only_model.decode(renamed).model:
        raise InvalidRequest("the body has two different model members", param="model")
    return places[0] if len(places) == 1 else None


def _is_text(raw: bytes, text: str) -> bool:
    try:
        return _text.decode(raw) == text
    except msgspec.DecodeError:  # within a text that is not JSON
        return False
