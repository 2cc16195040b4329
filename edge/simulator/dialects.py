"""What a model server answers: its documents, streams and errors, as vLLM, SGLang, llama.cpp or OpenAI word them.

Nothing is sent in here: text, ids and times of creation are the same for the same question, so that answers can be
compared byte for byte. A further engine is a name in `Dialect`, a shape in `_error`, and its habits at "dialect".
"""

import base64
import functools
import itertools
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from http.client import responses
from typing import Any, Final, Literal, TypeVar, get_args

import msgspec
import orjson

Dialect = Literal["vllm", "sglang", "llamacpp", "openai"]
Fault = Literal["error", "error_first", "error_mid", "reset", "cut", "stall", "rubbish", "no_done"]
Framing = Literal["chunked", "length", "close"]
FASTAPI: Final[tuple[Dialect, ...]] = ("vllm", "sglang")  # servers on one framework, alike in much
HEADERS: Final[Mapping[Dialect, tuple[str, ...]]] = {
    "openai": ("openai-processing-ms: 1", "x-request-id: req_simulated")
}
_T = TypeVar("_T")

MAX_BODY_BYTES: Final = 64 * 2**20  # as much as the edge lets through by default
MAX_TOKENS: Final = 100_000  # the frames of an answer are kept in memory: about 25 MB at this length
MAX_IMAGES: Final = 10  # as OpenAI
CREATED: Final = 1_763_000_000

DONE: Final = b"data: [DONE]\n\n"
_PIXEL: Final = (  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the simulator answers; one that exists is valid.

    `ttft_ms` runs from the end of the request to the first frame, `interval_ms` from one frame to the next (0: back to
    back); an answer that is no stream takes the sum. `jitter` (0 to 1) is the share by which an interval varies; equal
    requests vary equally. `tokens` is the number of frames with content, and in usage; the request's own limit lowers
    it. `framing` None is `chunked` for streams and `length` for the rest. `served` None serves any model; else
    vllm and openai answer 404 for others.

    Faults:
    - `error`: an error of `status` in place of the answer
    - `error_first`: status 200, and the error as the first frame of the stream
    - `error_mid`: an error frame after `after` frames; vllm and sglang then send `[DONE]`
    - `reset`, `cut`, `stall`: RST, FIN, or silence until the client goes, after the head, `after` frames and
      `after_bytes` bytes of what would follow; `after` -1 is before the head. A body that is no stream is one frame
    - `rubbish`: bytes that are no HTTP in place of the answer, then FIN
    - `no_done`: a clean end without `[DONE]`

    Raises: `ValueError` when a value is out of range; the message names the field and what it may be.
    """

    dialect: Dialect = "vllm"
    ttft_ms: float = 0
    interval_ms: float = 0
    tokens: int = 16
    jitter: float = 0
    fault: Fault | None = None
    status: int = 500
    after: int = 0
    after_bytes: int = 0
    framing: Framing | None = None
    prompt_tokens: int = 12
    served: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _require_choice("dialect", self.dialect, get_args(Dialect))
        _require_choice("fault", self.fault, (None, *get_args(Fault)))
        _require_choice("framing", self.framing, (None, *get_args(Framing)))
        _require_range("ttft_ms", self.ttft_ms, 0, 86_400_000)
        _require_range("interval_ms", self.interval_ms, 0, 86_400_000)
        _require_range("tokens", self.tokens, 0, MAX_TOKENS)
        _require_range("jitter", self.jitter, 0, 1)
        _require_range("status", self.status, 400, 599)
        _require_range("after", self.after, -1, MAX_TOKENS * 2)
        _require_range("after_bytes", self.after_bytes, 0, MAX_BODY_BYTES)
        _require_range("prompt_tokens", self.prompt_tokens, 0, 10_000_000)

    def steered(self, simulate: Mapping[str, Any] | None) -> "Behaviour":
        """Return this behaviour with the members of a request's `simulate` object in place of its own.

        Raises: `Refusal` when a member is unknown or has a wrong value.
        """
        if not simulate:
            return self
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        if unknown := sorted(set(simulate) - set(own)):
            raise Refusal(400, f"simulate: unknown {', '.join(unknown)}; use {', '.join(own)}", "simulate")
        try:
            return msgspec.convert(own | dict(simulate), Behaviour)
        except msgspec.ValidationError as error:
            raise Refusal(400, f"simulate: {error}", "simulate") from None


def _require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(str(c) for c in choices if c)}, not {value!r}")


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {value!r}")


# --- What is asked


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Ask(msgspec.Struct):
    """The members of a request's body that change the answer; members of a single path stay undecoded."""

    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    seed: int | None = None
    n: int | None = None
    top_n: int | None = None
    encoding_format: str | None = None
    simulate: dict[str, Any] | None = None
    input: msgspec.Raw = msgspec.Raw()
    documents: msgspec.Raw = msgspec.Raw()
    text_2: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    tokens: msgspec.Raw = msgspec.Raw()


decode_ask = msgspec.json.Decoder(Ask).decode


@dataclass(eq=False)
class Refusal(Exception):
    """A request that a real server would not answer either."""

    status: int
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """Everything the text of an answer depends on; the key under which its frames are kept."""

    dialect: Dialect
    model: str
    tokens: int
    finish: Literal["stop", "length"]
    prompt_tokens: int
    seed: int | None = None
    usage: bool = False
    running_usage: bool = False

    @property
    def id(self) -> str:
        """The last part of every id in the answer."""
        return f"{zlib.crc32(f'{self.model} {self.seed}'.encode()):08x}"


def question_of(ask: Ask, behaviour: Behaviour) -> Question:
    """Return what to answer to `ask`.

    Raises: `Refusal` when the model is not served, or a limit of tokens is below 1.
    """
    served = behaviour.served
    model = ask.model or (served or ("simulated",))[0]
    if served is not None and model not in served and behaviour.dialect in ("vllm", "openai"):
        raise Refusal(404, f"The model `{model}` does not exist.", "model")
    caps = [cap for cap in (ask.max_tokens, ask.max_completion_tokens, ask.max_output_tokens) if cap is not None]
    if caps and min(caps) < 1:
        raise Refusal(400, f"max_tokens must be at least 1, got {min(caps)}.", "max_tokens")
    tokens = min([behaviour.tokens, *caps])
    options = ask.stream_options or _StreamOptions()
    return Question(
        dialect=behaviour.dialect,
        model=model,
        tokens=tokens,
        finish="length" if tokens < behaviour.tokens else "stop",
        prompt_tokens=behaviour.prompt_tokens,
        seed=ask.seed,
        usage=bool(options.include_usage),
        running_usage=bool(options.include_usage and options.continuous_usage_stats and behaviour.dialect in FASTAPI),
    )


# --- What is answered


def token_text(index: int) -> str:
    """Return the text of one token; of eight, one is Chinese, one has quotes to escape, one has newlines."""
    match index % 8:
        case 3:
            return f"你好{index}"
        case 5:
            return f' "token{index}"'
        case 7:
            return f"\n\ntoken{index}"
        case _:
            return f" token{index}"


@functools.lru_cache(maxsize=64)
def answer_text(tokens: int) -> str:
    """Return the whole text of an answer of that many tokens."""
    return "".join(map(token_text, range(tokens)))


@dataclass(frozen=True, slots=True)
class Script:
    """The frames of one answer, each to be written apart; `lead` of them come before the first with content.

    An answer that is no stream is one frame with all tokens in it.
    """

    content_type: str
    frames: tuple[bytes, ...]
    tokens: int = 0
    lead: int = 0
    status: int = 200
    stream: bool = False

    def tokens_in(self, frames_sent: int) -> int:
        """Return how many tokens the first frames hold."""
        if not self.stream:
            return self.tokens if frames_sent else 0
        return max(0, min(frames_sent - self.lead, self.tokens))


def _data(value: object) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(value)


def _event(value: Mapping[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (value["type"].encode(), orjson.dumps(value))


def _events(frames: list[bytes], question: Question, lead: int) -> Script:
    return Script("text/event-stream; charset=utf-8", tuple(frames), question.tokens, lead, stream=True)


def _usage(question: Question, tokens: int) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "prompt_tokens": question.prompt_tokens,
        "total_tokens": question.prompt_tokens + tokens,
        "completion_tokens": tokens,
    }
    if question.dialect == "openai":
        usage["prompt_tokens_details"] = {"cached_tokens": 0}
        usage["completion_tokens_details"] = {"reasoning_tokens": 0}
    return usage


def _timings(question: Question) -> dict[str, Any]:
    """Return what llama.cpp adds to the last frame of a stream and to a whole answer."""
    prompt, predicted = question.prompt_tokens, question.tokens
    return {"prompt_n": prompt, "prompt_ms": 1.0, "predicted_n": predicted, "predicted_ms": 1.0}


def _head(question: Question, prefix: str, kind: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{question.id}", "object": kind, "created": CREATED, "model": question.model}


def _chunks(question: Question, head: dict[str, Any], choices: list[dict[str, Any]], lead: int) -> Script:
    """Return the stream of chat/completions or completions: a chunk per choice, then usage, then `[DONE]`.

    openai sends `"usage":null` in each chunk when usage was asked for, sglang always, vllm never.
    """
    chunks = [head | {"choices": [choice]} for choice in choices]
    for index, chunk in enumerate(chunks):
        if question.running_usage:
            chunk["usage"] = _usage(question, max(0, min(index + 1 - lead, question.tokens)))
        elif question.dialect == "sglang" or (question.dialect == "openai" and question.usage):
            chunk["usage"] = None
    if question.usage:
        chunks.append(head | {"choices": [], "usage": _usage(question, question.tokens)})
    if question.dialect == "llamacpp":
        chunks[-1]["timings"] = _timings(question)
    return _events([*map(_data, chunks), DONE], question, lead)


def _chat_choice(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


def _chat_stream(question: Question) -> Script:
    head = _head(question, "chatcmpl", "chat.completion.chunk")
    last = {"content": ""} if question.dialect in FASTAPI else {}
    choices = [
        _chat_choice({"role": "assistant", "content": ""}),
        *(_chat_choice({"content": token_text(index)}) for index in range(question.tokens)),
        _chat_choice(last, question.finish),
    ]
    return _chunks(question, head, choices, lead=1)


def _text_choice(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}


def _completion_stream(question: Question) -> Script:
    choices = [
        *(_text_choice(token_text(index)) for index in range(question.tokens)),
        _text_choice("", question.finish),
    ]
    return _chunks(question, _head(question, "cmpl", "text_completion"), choices, lead=0)


def _response(question: Question, status: str) -> dict[str, Any]:
    """Return the object of the Responses API, finished or only begun."""
    done = status == "completed"
    return {
        "id": f"resp_{question.id}",
        "object": "response",
        "created_at": CREATED,
        "model": question.model,
        "status": status,
        "error": None,
        "output": [_response_item(question, status)] if done else [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": question.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": question.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": question.prompt_tokens + question.tokens,
        }
        if done
        else None,
    }


def _response_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _response_item(question: Question, status: str) -> dict[str, Any]:
    return {
        "id": f"msg_{question.id}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [_response_part(answer_text(question.tokens))] if status == "completed" else [],
    }


def _response_stream(question: Question) -> Script:
    numbers = itertools.count()
    text = answer_text(question.tokens)
    at = {"item_id": f"msg_{question.id}", "output_index": 0, "content_index": 0}

    def event(kind: str, **members: Any) -> bytes:
        return _event({"type": f"response.{kind}", "sequence_number": next(numbers)} | members)

    frames = [
        event("created", response=_response(question, "in_progress")),
        event("in_progress", response=_response(question, "in_progress")),
        event("output_item.added", output_index=0, item=_response_item(question, "in_progress")),
        event("content_part.added", **at, part=_response_part("")),
        *(event("output_text.delta", **at, delta=token_text(i), logprobs=[]) for i in range(question.tokens)),
        event("output_text.done", **at, text=text, logprobs=[]),
        event("content_part.done", **at, part=_response_part(text)),
        event("output_item.done", output_index=0, item=_response_item(question, "completed")),
        event("completed", response=_response(question, "completed")),
    ]
    return _events(frames, question, lead=4)


def _message(question: Question, *, done: bool) -> dict[str, Any]:
    """Return the object of the Messages API, finished or only begun."""
    return {
        "id": f"msg_{question.id}",
        "type": "message",
        "role": "assistant",
        "model": question.model,
        "content": [{"type": "text", "text": answer_text(question.tokens)}] if done else [],
        "stop_reason": {"length": "max_tokens", "stop": "end_turn"}[question.finish] if done else None,
        "stop_sequence": None,
        "usage": {"input_tokens": question.prompt_tokens, "output_tokens": question.tokens if done else 0},
    }


def _message_stream(question: Question) -> Script:
    whole = _message(question, done=True)
    ending = {name: whole[name] for name in ("stop_reason", "stop_sequence")}
    deltas = ({"type": "text_delta", "text": token_text(index)} for index in range(question.tokens))
    frames = [
        _event({"type": "message_start", "message": _message(question, done=False)}),
        _event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
        *(_event({"type": "content_block_delta", "index": 0, "delta": delta}) for delta in deltas),
        _event({"type": "content_block_stop", "index": 0}),
        _event({"type": "message_delta", "delta": ending, "usage": whole["usage"]}),
        _event({"type": "message_stop"}),
    ]
    return _events(frames, question, lead=2)


def _speech(question: Question) -> Script:
    """Return sound that is none: a frame of bytes per token, with what looks like the end of events and chunks."""
    looks = b"\xff\xfb\x90\x00data: \n\n0\r\n\r\n"
    frames = tuple(looks + index.to_bytes(4, "big") * 64 for index in range(question.tokens))
    return Script("audio/mpeg", frames, question.tokens, stream=True)


# A built stream is tens of kilobytes; 64 of them serve any load of few models and lengths.
@functools.lru_cache(maxsize=64)
def stream_script(path: str, question: Question, *, chunked: bool) -> Script:
    """Return the frames of a stream, as HTTP chunks (RFC 9112 section 7.1) if `chunked`."""
    script = STREAMS[path](question)
    if not chunked:
        return script
    return replace(script, frames=tuple(map(http_chunk, script.frames)))


def http_chunk(data: bytes) -> bytes:
    """Return data as one HTTP chunk; `wire.chunk` is not used, since this is what the edge is tested against."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _member(raw: msgspec.Raw, kind: type[_T], absent: _T) -> _T:
    """Return a member of the body that only this path reads, decoded as `kind`.

    Raises: `Refusal` when it is something else.
    """
    try:
        return msgspec.json.decode(raw, type=kind) if raw else absent
    except msgspec.ValidationError as error:
        raise Refusal(400, str(error)) from None


def _count(raw: msgspec.Raw) -> int:
    """Return how many texts an `input` holds: one text or one list of token ids is one."""
    value = _member(raw, object, None)
    return len(value) if isinstance(value, list) and value and not isinstance(value[0], int) else 1


def _chat(_: Ask, question: Question) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer_text(question.tokens)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": question.finish}
    return _chosen(question, _head(question, "chatcmpl", "chat.completion"), choice)


def _completion(_: Ask, question: Question) -> dict[str, Any]:
    choice = _text_choice(answer_text(question.tokens), question.finish)
    return _chosen(question, _head(question, "cmpl", "text_completion"), choice)


def _chosen(question: Question, head: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    answer = head | {"choices": [choice], "usage": _usage(question, question.tokens)}
    return answer | ({"timings": _timings(question)} if question.dialect == "llamacpp" else {})


def _embeddings(ask: Ask, question: Question) -> dict[str, Any]:
    vector = [0.125, -0.25, 0.5, -1.0]
    embedding: object = vector
    if ask.encoding_format == "base64":
        embedding = base64.b64encode(struct.pack("<4f", *vector)).decode()
    data = [{"index": index, "object": "embedding", "embedding": embedding} for index in range(_count(ask.input))]
    return _head(question, "embd", "list") | {"data": data, "usage": _usage(question, 0)}


def _rerank(ask: Ask, question: Question) -> dict[str, Any]:
    given = _member(ask.documents, list[Any], [])[: ask.top_n or None]
    documents = [document if isinstance(document, dict) else {"text": document} for document in given]
    results = [
        {"index": index, "document": document, "relevance_score": 1 / (index + 1)}
        for index, document in enumerate(documents)
    ]
    usage = {"prompt_tokens": question.prompt_tokens, "total_tokens": question.prompt_tokens}
    return {"id": f"rerank-{question.id}", "model": question.model, "usage": usage, "results": results}


def _score(ask: Ask, question: Question) -> dict[str, Any]:
    data = [{"index": index, "object": "score", "score": 1 / (index + 1)} for index in range(_count(ask.text_2))]
    return _head(question, "score", "list") | {"data": data, "usage": _usage(question, 0)}


def _tokenize(ask: Ask, _: Question) -> dict[str, Any]:
    """Return the bytes of the prompt as its tokens, which `detokenize` turns back."""
    messages = _member(ask.messages, list[dict[str, Any]], [])
    prompt = _member(ask.prompt, str, "".join(str(message.get("content")) for message in messages))
    tokens = list(prompt.encode())
    return {"count": len(tokens), "max_model_len": 32_768, "tokens": tokens, "token_strs": None}


def _detokenize(ask: Ask, _: Question) -> dict[str, Any]:
    return {"prompt": bytes(token % 256 for token in _member(ask.tokens, list[int], [])).decode(errors="replace")}


def _images(ask: Ask, _: Question) -> dict[str, Any]:
    return {"created": CREATED, "data": [{"b64_json": _PIXEL}] * min(ask.n or 1, MAX_IMAGES)}


def _transcription(_: Ask, question: Question) -> dict[str, Any]:
    return {"text": answer_text(question.tokens), "usage": {"type": "duration", "seconds": 1}}


STREAMS: Final[dict[str, Callable[[Question], Script]]] = {
    "/v1/chat/completions": _chat_stream,
    "/v1/completions": _completion_stream,
    "/v1/responses": _response_stream,
    "/v1/messages": _message_stream,
    "/v1/audio/speech": _speech,
}
DOCUMENTS: Final[dict[str, Callable[[Ask, Question], dict[str, Any]]]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/responses": lambda _, question: _response(question, "completed"),
    "/v1/messages": lambda _, question: _message(question, done=True),
    "/v1/embeddings": _embeddings,
    "/v1/rerank": _rerank,
    "/v1/score": _score,
    "/tokenize": _tokenize,
    "/v1/tokenize": _tokenize,
    "/detokenize": _detokenize,
    "/v1/detokenize": _detokenize,
    "/v1/images/generations": _images,
    "/v1/images/edits": _images,
    "/v1/audio/transcriptions": _transcription,
    "/v1/audio/translations": _transcription,
}
GENERATING: Final = frozenset({*STREAMS, "/v1/audio/transcriptions", "/v1/audio/translations"})
FORMS: Final = frozenset({"/v1/images/edits", "/v1/audio/transcriptions", "/v1/audio/translations"})
POSTS: Final = frozenset(STREAMS) | frozenset(DOCUMENTS)
GETS: Final = frozenset({"/health", "/v1/models"})


def document_script(value: object, *, status: int = 200, tokens: int = 0) -> Script:
    """Return the script of an answer that is one JSON document."""
    return Script("application/json", (orjson.dumps(value),), tokens, status=status)


def models_document(behaviour: Behaviour) -> dict[str, Any]:
    """Return the list of the models that are served."""
    names = behaviour.served or ("simulated",)
    models = [{"id": name, "object": "model", "created": CREATED, "owned_by": behaviour.dialect} for name in names]
    return {"object": "list", "data": models}


# --- What goes wrong

_FAILURE: Final = "The simulated engine failed with status %d."
_LLAMACPP_TYPES: Final = {  # format_error_response in its server
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
_OPENAI_CODES: Final[dict[tuple[int, str | None], str]] = {
    (401, None): "invalid_api_key",
    (404, "model"): "model_not_found",
    (429, None): "rate_limit_exceeded",
}


def error_document(dialect: Dialect, status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Return the JSON body of an error as this kind of server words it."""
    if status == 401 and dialect in FASTAPI:
        return {"error": "Unauthorized"}
    error = _error(dialect, status, message, param)
    return error if dialect == "sglang" else {"error": error}


def _error(dialect: Dialect, status: int, message: str, param: str | None = None) -> dict[str, Any]:
    match dialect:
        case "vllm" | "sglang":
            error = {"message": message, "type": _error_type(status), "param": param, "code": status}
            return {"object": "error"} | error if dialect == "sglang" else error
        case "llamacpp":
            return {"code": status, "message": message, "type": _LLAMACPP_TYPES.get(status, "server_error")}
        case "openai":
            kind = "invalid_request_error" if status < 500 else "server_error"
            code = _OPENAI_CODES.get((status, param)) or _OPENAI_CODES.get((status, None))
            return {"message": message, "type": kind, "param": param, "code": code}


def _error_type(status: int) -> str:
    """Return vLLM's and SGLang's name for a status: `BadRequestError`, `NotFoundError`, `InternalServerError`."""
    words = responses.get(status, "Unknown").title().replace(" ", "").replace("-", "")
    return words.removesuffix("Error") + "Error"


def error_frames(path: str, dialect: Dialect, status: int) -> tuple[bytes, ...]:
    """Return the frames by which a stream reports that it failed."""
    message = _FAILURE % status
    if path == "/v1/messages":
        return (_event({"type": "error", "error": {"type": "api_error", "message": message}}),)
    if path == "/v1/responses":
        return (_event({"type": "error", "code": "server_error", "message": message, "param": None}),)
    frame = _data({"error": _error(dialect, status, message)})
    return (frame, DONE) if dialect in FASTAPI else (frame,)


def script_of(path: str, ask: Ask, behaviour: Behaviour, *, chunked: bool) -> Script:
    """Return the answer to `ask`, with the faults in it that lie in the frames themselves."""
    question = question_of(ask, behaviour)
    streams = path in STREAMS and (bool(ask.stream) or path not in DOCUMENTS)
    events = streams and path in DOCUMENTS
    fault = behaviour.fault
    if fault == "error" or (fault in ("error_first", "error_mid") and not events):
        document = error_document(behaviour.dialect, behaviour.status, _FAILURE % behaviour.status)
        return document_script(document, status=behaviour.status)
    if not streams:
        tokens = question.tokens if path in GENERATING else 0
        return document_script(DOCUMENTS[path](ask, question), tokens=tokens)
    script = stream_script(path, question, chunked=chunked)
    if fault in ("error_first", "error_mid"):
        error = error_frames(path, behaviour.dialect, behaviour.status)
        after = 0 if fault == "error_first" else min(max(behaviour.after, 0), script.lead + script.tokens)
        return _with_end(script, after, tuple(map(http_chunk, error)) if chunked else error)
    if fault == "no_done" and script.frames[-1].endswith(DONE + b"\r\n" if chunked else DONE):
        return _with_end(script, len(script.frames) - 1, ())
    return script


def _with_end(script: Script, after: int, end: tuple[bytes, ...]) -> Script:
    """Return a stream with other frames in place of those behind the first `after`."""
    frames = script.frames[:after] + end
    return replace(script, frames=frames, tokens=min(script.tokens, max(0, after - script.lead)))
