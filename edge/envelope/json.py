"""What a JSON body asks for: the few members that the edge has to know.

Two parsers that disagree about a body could authorise one model and serve another, so whatever is ambiguous is refused
(RFC 8259 section 4: names SHOULD be unique). `envelope/splices.py` changes what goes upstream.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from edge.envelope.lax import is_true, whole_number
from edge.envelope.members import MAX_MEMBERS, Member, check_text, first_place, members_of, refusal
from edge.envelope.outline import plain_quotes
from edge.envelope.steering import NAMES, Names
from edge.errors import InvalidRequest, ModelNotFound
from edge.metering.estimating import estimated
from edge.names import is_model_name

# To look for `"model"` in all of a longer body takes as long as to read it. A shorter one has no more members than are
# read in 1 ms.
_SHORT_BYTES: Final = 1 << 14
_FEW_MEMBERS_BYTES: Final = len(b'"":0,') * MAX_MEMBERS  # a body with more members than are taken is longer
LONG_BODY_BYTES: Final = 1 << 19  # a shorter one takes 1 ms, or 5 where it is built to be slow
STEP_BYTES: Final = 1 << 18
START_BYTES: Final = 1024
_MAX_OPTIONS_BYTES: Final = 4096  # there are three of them
TRUE: Final = msgspec.Raw(b"true")
_FALSE: Final = msgspec.Raw(b"false")
_NULL: Final = msgspec.Raw(b"null")
_NO: Final = (_FALSE, _NULL)
_ABSENT: Final = msgspec.Raw(b"")
MODEL_KEY: Final = b'"model"'
_ESCAPED: Final = b"\\u006"  # how an escape of one of its letters begins (RFC 8259 section 7)
# What most bodies do not say, besides `model`, `stream` and a limit.
_RARE: Final = frozenset({"stream_options", "n", "best_of", "prompt", "previous_response_id", "background", "store"})
_text = msgspec.json.Decoder(str)
_top_level = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Places(NamedTuple):
    """What is known of a long or unusual body, in which nothing is to be looked for again.

    `members` are those of the top level, in their order, and `inside` is where the first one could stand. Of a body
    that is read in steps, `characters` are those of the text `input`; else nobody has worked them out.
    """

    members: tuple[Member, ...]
    inside: int
    characters: int | None = None


class Envelope(msgspec.Struct, frozen=True):
    """What a body asks for.

    `model` is the name that is asked, `written` the one in the body, which is another, or "", only where the path names
    the model. `span` is where it stands in a form. `prompt_tokens` is a guess (`metering/estimating.py`), at least 1,
    and 0 for a form: it holds sound or an image, whose size says nothing of tokens. `max_tokens` is the limit of an
    answer, None where there is none, `n` the number of answers to each of `prompts`. `stream_options` is the client's
    own value, b"" when there is none, and `include_usage` and `continuous_usage` are what it asks for in there.
    `previous_response_id` is the response that is gone on with, "" for none, `background` asks for one that is written
    while nobody waits, and `stored` that it is kept. `steering` are names of members that may steer an engine. `places`
    are None where the body cannot have another `model`. `members` are the values of a body that is read at once, until
    `let_go`. What is of a wrong type counts as not said: the upstream will judge it.
    """

    model: str
    stream: bool = False
    span: tuple[int, int] | None = None
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
    members: dict[str, msgspec.Raw] | None = None

    @property
    def choices(self) -> int:
        """How many texts the answer has."""
        return self.n * self.prompts

    def let_go(self) -> None:
        """Let go of the bytes of the body, once nothing more is read of it."""
        if self.members is not None:
            msgspec.structs.force_setattr(self, "members", None)


def read_json(body: bytes, path_model: str = "", limits: tuple[str, ...] = (), names: Names = NAMES) -> Envelope:
    """Return the envelope of a JSON body; builds no tree, so a bomb of tiny values costs no memory.

    `path_model` is the model that the path names, which counts before that of the body. `limits` are the members that
    may limit the answer, of which the first one that is there does. `names` are those of members that pools look for.
    Of a member that comes twice the last value counts, as for engines.
    Raises: `InvalidRequest`, naming what to change; `ModelNotFound`.
    """
    if not body:
        raise InvalidRequest("the body is empty: send a JSON object with a model")
    check_text(body)
    if len(body) <= _SHORT_BYTES and _can_name_model_once(body) and _has_few_members(body):
        return _envelope(body, _read(body), None, path_model, limits, names)
    members, values = members_of(body)
    found = {member.name: value for member, value in zip(members, values, strict=True) if member.name is not None}
    models = [value for member, value in zip(members, values, strict=True) if member.name == "model"]
    return _envelope(body, found, Places(tuple(members), first_place(body)), path_model, limits, names, models)


def _can_name_model_once(body: bytes) -> bool:
    """Whether a body has at most one member named `model`, at any depth."""
    return body.count(MODEL_KEY) <= 1 and not (b"\\" in body and _ESCAPED in body)


def _has_few_members(body: bytes) -> bool:
    """Whether a body cannot have too many members, those that come again counted."""
    return len(body) <= _FEW_MEMBERS_BYTES or body.count(b":") <= MAX_MEMBERS


def _read(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        return _top_level.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise refusal(body, error) from None


def _model_in(found: dict[str, msgspec.Raw], path_model: str) -> str:
    """Return the model's name in a body, which may be absent only where the path has one."""
    raw = bytes(found.get("model", b""))
    if path_model and raw in (b"", b"null"):
        return ""
    if raw and raw[:1] != b'"':
        raise InvalidRequest('model must be a string, such as "public/deepseek-r1"', param="model")
    return model_name(_text.decode(raw) if raw else "")


def _stream_in(found: dict[str, msgspec.Raw]) -> bool:
    raw = found.get("stream")
    if raw is None or raw in _NO:
        return False
    if raw != TRUE:
        raise InvalidRequest("stream must be true or false", param="stream")
    return True


def _envelope(
    body: bytes,
    found: dict[str, msgspec.Raw],
    places: Places | None,
    path_model: str,
    limits: tuple[str, ...],
    names: Names,
    models: Sequence[msgspec.Raw] = (),
) -> Envelope:
    steering = names.steering(found)
    stream = _stream_in(found)
    written = _model_in(found, path_model)
    if len(models) > 1 and written and not all(_is_text(value, written) for value in models):
        raise InvalidRequest("the body has two different model members", param="model")
    max_tokens = None
    for name in limits:
        limit = found.get(name)
        if limit is not None and limit != _NULL:
            max_tokens = whole_number(limit)
            break
    options, include_usage, continuous_usage = b"", False, False
    n = prompts = 1
    previous, background, stored = "", False, True
    if not _RARE.isdisjoint(found):
        if "stream_options" in found:
            options, include_usage, continuous_usage = _asked_of_usage(found["stream_options"])
        if "n" in found or "best_of" in found:
            n = max(whole_number(found.get(name, _ABSENT)) or 1 for name in ("n", "best_of"))
        if "prompt" in found:
            prompts = max(1, _prompts_in(found["prompt"]))
        if "previous_response_id" in found:
            previous = _text_in(found["previous_response_id"])
        background = found.get("background", _FALSE) not in _NO  # engines take 1 and "yes" for true
        stored = found.get("store", TRUE) != _FALSE
    return Envelope(
        path_model or written, stream, None, estimated(body) or 1, max_tokens, n,
        options, include_usage, continuous_usage,
        written, previous, background, stored, prompts, steering, places, found,
    )  # fmt: skip


def _text_in(raw: msgspec.Raw) -> str:
    return _text.decode(raw) if bytes(raw).startswith(b'"') else ""


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
        return _top_level.decode(raw)
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


def model_name(name: str) -> str:
    """Return the name that a body asks for; raises `InvalidRequest`, `ModelNotFound`."""
    if not name:
        raise InvalidRequest("you must provide a model parameter", param="model")
    if not is_model_name(name):
        raise ModelNotFound.named("of that name")
    return name


def _is_text(raw: msgspec.Raw, text: str) -> bool:
    try:
        return _text.decode(raw) == text
    except msgspec.DecodeError:
        return False
