"""Every operation with every concern, in one table: what a path means, wherever that differs from path to path.

Whoever treats one operation unlike another finds the difference here.
One more is a row here and a test of its cells; an operator adds one to `server.operations` without waiting for a
release.
"""

import enum
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from edge.protocols import MESSAGES, OPENAI, RESPONSES, Protocol


class Reads(enum.Enum):
    """How the usage of an answer is read; `metering/meters.py` has a meter of events and one of documents for each."""

    __hash__ = object.__hash__  # a member is only itself; enum's own is a Python call for each look-up

    CHUNKS = "chunks"  # `usage` behind the choices of a stream, and in its document
    MESSAGE = "message"  # `message_start` and `message_delta`
    RESPONSE = "response"  # the response with which a stream ends
    READING = "reading"  # a model that only reads: the document's `usage`, else the prompt is estimated
    IMAGES = "images"  # the document's `usage`, and the images in it
    SPEECH = "speech"  # the document's `usage`, else the characters of the text that is spoken
    TRANSCRIPT = "transcript"  # the document's `usage`, else the seconds of sound that it tells
    ANY = "any"  # the document's `usage`, where there is one
    STORED = "stored"  # of a response that was counted when it was made
    NOTHING = "nothing"


class Reserves(enum.Enum):
    """How many tokens a request reserves of its limit before it begins."""

    ANSWER = "the prompt and the answer"
    PROMPT = "the prompt"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Operation:
    """One row: what is asked at a path.

    `name` is the path behind `/v1`, here and upstream. `protocol` words errors, error events and heartbeats. `form`:
    the body is multipart/form-data, else JSON. `last_events` end a stream, by their `type`, or as data that is no JSON;
    without one nothing marks the end. `limits` are the members of the body that may limit an answer, the one first that
    engines obey where there are several. `is_cached`: an engine answers sooner where it has read the beginning of the
    prompt before, so that a conversation is kept with one member.
    """

    name: str
    protocol: Protocol = OPENAI
    reads: Reads = Reads.ANY
    reserves: Reserves = Reserves.PROMPT
    last_events: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    is_cached: bool = False
    form: bool = False
    takes_usage_options: bool = False  # `stream_options` makes its streams tell their usage
    always_ends: bool = False  # a stream without its last event is half an answer; not every engine sends `[DONE]`
    keeps: bool = False  # what it answers is kept by the endpoint, and asked for again by its id
    at_root: bool = False  # engines serve it at their root, not under `/v1`
    has_version: bool = False  # its name has one of its own
    is_own: bool = False  # the edge answers it by itself, to whoever has a key


_RESPONSE_ENDS: Final = ("response.completed", "response.incomplete", "response.failed")

UNKNOWN: Final = Operation("", reads=Reads.NOTHING, reserves=Reserves.NOTHING)
UNKNOWN_MESSAGES: Final = Operation("", MESSAGES, reads=Reads.NOTHING, reserves=Reserves.NOTHING)
STORED_RESPONSE: Final = Operation("responses/{id}", RESPONSES, Reads.STORED, Reserves.NOTHING, _RESPONSE_ENDS)
_ROWS: Final = (
    Operation(
        "chat/completions",
        OPENAI,
        Reads.CHUNKS,
        Reserves.ANSWER,
        ("[DONE]",),
        ("max_completion_tokens", "max_tokens"),
        is_cached=True,
        takes_usage_options=True,
    ),
    Operation(
        "completions",
        OPENAI,
        Reads.CHUNKS,
        Reserves.ANSWER,
        ("[DONE]",),
        ("max_tokens",),
        is_cached=True,
        takes_usage_options=True,
    ),
    Operation(
        "responses",
        RESPONSES,
        Reads.RESPONSE,
        Reserves.ANSWER,
        _RESPONSE_ENDS,
        ("max_output_tokens",),
        is_cached=True,
        always_ends=True,
        keeps=True,
    ),
    Operation(
        "messages",
        MESSAGES,
        Reads.MESSAGE,
        Reserves.ANSWER,
        ("message_stop",),
        ("max_tokens",),
        is_cached=True,
        always_ends=True,
    ),
    Operation("messages/count_tokens", MESSAGES, Reads.NOTHING, Reserves.NOTHING),
    Operation("embeddings", reads=Reads.READING),
    Operation("rerank", reads=Reads.READING),
    Operation("v2/rerank", reads=Reads.READING, has_version=True),
    Operation("score", reads=Reads.READING),
    Operation("systemone", reads=Reads.READING),
    Operation("tokenize", reads=Reads.NOTHING, at_root=True),
    Operation("detokenize", reads=Reads.NOTHING, at_root=True),
    Operation("images/generations", reads=Reads.IMAGES),
    Operation("images/edits", reads=Reads.IMAGES, form=True),
    Operation("audio/speech", reads=Reads.SPEECH),
    Operation("audio/transcriptions", reads=Reads.TRANSCRIPT, form=True),
    Operation("audio/translations", reads=Reads.TRANSCRIPT, form=True),
)
OPERATIONS: Final[Mapping[str, Operation]] = {row.name: row for row in _ROWS}

MODELS: Final = Operation("models", reads=Reads.NOTHING, reserves=Reserves.NOTHING, is_own=True)
ANTHROPIC_MODELS: Final = Operation("models", MESSAGES, reads=Reads.NOTHING, reserves=Reserves.NOTHING, is_own=True)
LIMITS: Final = Operation("limits", reads=Reads.NOTHING, reserves=Reserves.NOTHING, is_own=True)
USAGE: Final = Operation("usage", reads=Reads.NOTHING, reserves=Reserves.NOTHING, is_own=True)
HEALTH: Final = Operation("health", reads=Reads.NOTHING, reserves=Reserves.NOTHING)
# Of OpenAI's API, by the beginning of the path; who asks gets to know that no other path would do.
NOT_SERVED: Final = frozenset({
    "assistants", "batches", "containers", "conversations", "evals", "files", "fine-tuning", "fine_tuning",
    "moderations", "organization", "realtime", "threads", "uploads", "vector_stores", "videos",
})  # fmt: skip
_READ: Final = ("GET", "HEAD")
_ANTHROPIC: Final = "/anthropic"
_DEPLOYMENTS: Final = "/openai/deployments/"
_BASES: Final = ("", "/v1", "/openai", "/openai/v1")
_MODEL_PATH = re.compile(r"(?:/v1|/openai|/openai/v1|(/anthropic|/anthropic/v1))?/models/(.+)")
_MESSAGES_LINE = re.compile(rb"[\r\n]*[A-Z]+ (?:/anthropic/|(?:/v1|/openai|/openai/v1)?/messages[ /?])")
_STORED_PATH = re.compile(
    r"(?:/v1|/openai|/openai/v1)?/responses/"
    r"(?!(?:compact|input_tokens)(?:/|\Z))([A-Za-z0-9_.-]{1,128}(?:/(cancel|input_items))?)"
)
_LONGEST_NAME: Final = 5  # of an operation, in segments of its path


class Asked(NamedTuple):
    """What a path asks for, and with which methods that is possible.

    `model` is the percent-encoded name that the path of a model or of an Azure deployment has; `stored` the path of a
    response behind `responses/`, which begins with its id.
    """

    operation: Operation
    methods: tuple[str, ...]
    model: str = ""
    stored: str = ""

    @property
    def response_id(self) -> str:
        """The id of the stored response."""
        return self.stored.partition("/")[0]


@functools.lru_cache(maxsize=2)
def paths_of(added: tuple[str, ...] = ()) -> Mapping[str, Asked]:
    """Return what each raw path asks for; `added` are names of `server.operations`. Equal ones yield the same object.

    With and without /v1: the platform's page promised both, and a redirect would turn POST into GET in most clients.
    """
    own = (MODELS, LIMITS, USAGE)
    paths = {f"{base}/{each.name}{end}": Asked(each, _READ) for each in own for base in _BASES for end in ("", "/")}
    for base in (_ANTHROPIC, f"{_ANTHROPIC}/v1"):
        paths |= {f"{base}/models{end}": Asked(ANTHROPIC_MODELS, _READ) for end in ("", "/")}
    paths["/health"] = Asked(HEALTH, _READ)
    for operation in (*_ROWS, *map(Operation, added)):
        bases: tuple[str, ...] = ("",) if operation.has_version else _BASES
        if operation.protocol is MESSAGES:
            bases += (_ANTHROPIC, f"{_ANTHROPIC}/v1")
        paths |= {f"{base}/{operation.name}": Asked(operation, ("POST",)) for base in bases}
    return paths


def asked_at(path: str, paths: Mapping[str, Asked]) -> Asked:
    """Return what a raw path asks for; `paths` are of `paths_of`. No methods: there is nothing."""
    if path in paths:
        return paths[path]
    if path.startswith(_DEPLOYMENTS):
        return _of_deployment(path[len(_DEPLOYMENTS) :], paths)
    if model_path := _MODEL_PATH.fullmatch(path):
        return Asked(ANTHROPIC_MODELS if model_path[1] else MODELS, _READ, model=model_path[2])
    if stored := _STORED_PATH.fullmatch(path):
        methods = {None: ("GET", "DELETE"), "cancel": ("POST",), "input_items": ("GET",)}[stored[2]]
        return Asked(STORED_RESPONSE, methods, stored=stored[1])
    is_messages = path.startswith(_ANTHROPIC) or "/messages" in path
    return Asked(UNKNOWN_MESSAGES if is_messages else UNKNOWN, ())


def protocol_of_line(line: bytes) -> Protocol:
    """Return the protocol of a request line, or of how one begins, where no more of a request can be read."""
    return MESSAGES if _MESSAGES_LINE.match(line) else OPENAI


def _of_deployment(rest: str, paths: Mapping[str, Asked]) -> Asked:
    """Return what Azure's path asks for: the name of a deployment, which may have slashes, and an operation's path."""
    segments = rest.split("/")
    for count in range(min(_LONGEST_NAME, len(segments) - 1), 0, -1):
        asked = paths.get(f"/openai/{'/'.join(segments[-count:])}")
        model = "/".join(segments[:-count])
        if asked is not None and asked.operation.protocol is not MESSAGES and asked.methods == ("POST",) and model:
            return Asked(asked.operation, asked.methods, model=model)
    return Asked(UNKNOWN, ())
