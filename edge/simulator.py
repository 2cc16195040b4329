"""A model server that only pretends: what stands in for an engine in tests, in `edge demo` and under load.

It speaks the APIs of vLLM, SGLang, llama.cpp or OpenAI with their framings, error shapes and usage, at a set pace, and
fails on request. It thinks nothing: text, ids and times of creation are the same for the same question, so that answers
can be compared byte for byte; another `seed` in the request gives other ids.

A request steers its own answer by a `simulate` object in its JSON body (or a `simulate` part in a form) whose members
are fields of `Behaviour`: `{"model": "m", "messages": [], "simulate": {"fault": "cut", "after": 3}}`.

aiohttp parses what comes in. What goes out is written to the transport as it stands, since exact framing, resets and
cuts are the point: frames are built once per question and kept, and a stream costs one timer and one write per frame.
"""

import argparse
import asyncio
import base64
import contextlib
import email.utils
import functools
import itertools
import random
import signal
import socket
import ssl as tls
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from http import HTTPStatus
from typing import Any, Final, Literal, TypeVar, get_args

import msgspec
import orjson
from aiohttp import BodyPartReader, MultipartReader, StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage

Dialect = Literal["vllm", "sglang", "llamacpp", "openai"]
Fault = Literal["error", "error_first", "error_mid", "reset", "cut", "stall", "rubbish", "no_done"]
Framing = Literal["chunked", "length", "close"]
_T = TypeVar("_T")

MAX_BODY_BYTES: Final = 64 * 2**20  # as much as the edge lets through by default
MAX_TOKENS: Final = 100_000  # the frames of an answer are kept in memory: about 25 MB at this length
MAX_IMAGES: Final = 10  # as OpenAI
KEEPALIVE_TIMEOUT_S: Final = 5.0  # uvicorn's, and so vLLM's and SGLang's
CREATED: Final = 1_763_000_000

_FLUSH_S: Final = 0.002
_DONE: Final = b"data: [DONE]\n\n"
_RUBBISH: Final = b"\x16\x03\x01 this is no HTTP \xff\xfe\r\n\r\n"
_PIXEL: Final = (  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the simulator answers; one that exists is valid.

    `ttft_ms` runs from the end of the request to the first frame, `interval_ms` from one frame to the next (0: back to
    back); an answer that is no stream takes the sum. `jitter` (0 to 1) is the share by which an interval varies; equal
    requests vary equally. `tokens` is the number of frames with content, and what usage says; the request's own limit
    lowers it. `framing` None is `chunked` for streams and `length` for the rest. `served` None serves any model; else
    vllm and openai answer 404 for others.

    Faults:
    - `error`: an error of `status` in place of the answer
    - `error_first`: status 200, and the error as the first frame of the stream
    - `error_mid`: an error frame after `after` frames; vllm and sglang then send `[DONE]`
    - `reset`, `cut`, `stall`: RST, FIN, or silence until the client goes, after the head, `after` frames and
      `after_bytes` bytes of what would follow; `after` -1 is before the head. A body that is no stream is one frame
    - `rubbish`: bytes that are no HTTP in place of the answer, then FIN
    - `no_done`: a clean end without `[DONE]`

    Raises:
        ValueError: a value is out of range; the message names the field and what it may be.

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

        Raises:
            ValueError: a member is unknown or has a wrong value.

        """
        if not simulate:
            return self
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        if unknown := sorted(set(simulate) - set(own)):
            raise ValueError(f"simulate: unknown {', '.join(unknown)}; use {', '.join(own)}")
        try:
            return msgspec.convert(own | dict(simulate), Behaviour)
        except msgspec.ValidationError as error:
            raise ValueError(f"simulate: {error}") from None


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


class _Ask(msgspec.Struct):
    """The members of a request's body that change the answer; what is not looked at stays undecoded."""

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


_decode_ask = msgspec.json.Decoder(_Ask).decode


class _Refusal(Exception):
    """A request that a real server would not answer either."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param


@dataclass(frozen=True, slots=True)
class _Question:
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


def _question(ask: _Ask, behaviour: Behaviour) -> _Question:
    """Return what to answer to `ask`.

    Raises:
        _Refusal: the model is not served, or a limit of tokens is below 1.

    """
    checked = behaviour.served is not None and behaviour.dialect in ("vllm", "openai")
    model = ask.model or (behaviour.served or ("simulated",))[0]
    if checked and model not in (behaviour.served or ()):
        raise _Refusal(404, f"The model `{model}` does not exist.", "model")
    caps = [cap for cap in (ask.max_tokens, ask.max_completion_tokens, ask.max_output_tokens) if cap is not None]
    if caps and min(caps) < 1:
        raise _Refusal(400, f"max_tokens must be at least 1, got {min(caps)}.", "max_tokens")
    tokens = min([behaviour.tokens, *caps])
    options = ask.stream_options or _StreamOptions()
    return _Question(
        dialect=behaviour.dialect,
        model=model,
        tokens=tokens,
        finish="length" if tokens < behaviour.tokens else "stop",
        prompt_tokens=behaviour.prompt_tokens,
        seed=ask.seed,
        usage=bool(options.include_usage),
        running_usage=bool(
            options.include_usage and options.continuous_usage_stats and behaviour.dialect in ("vllm", "sglang")
        ),
    )


# --- What is said


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
class _Script:
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


def _events(frames: list[bytes], question: _Question, lead: int) -> _Script:
    return _Script("text/event-stream; charset=utf-8", tuple(frames), question.tokens, lead, stream=True)


def _usage(question: _Question, tokens: int) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "prompt_tokens": question.prompt_tokens,
        "total_tokens": question.prompt_tokens + tokens,
        "completion_tokens": tokens,
    }
    if question.dialect == "openai":
        usage["prompt_tokens_details"] = {"cached_tokens": 0}
        usage["completion_tokens_details"] = {"reasoning_tokens": 0}
    return usage


def _timings(question: _Question) -> dict[str, Any]:
    """Return what llama.cpp adds to the last frame of a stream and to a whole answer."""
    return {
        "prompt_n": question.prompt_tokens,
        "prompt_ms": 1.0,
        "predicted_n": question.tokens,
        "predicted_ms": 1.0,
    }


def _chunks(question: _Question, head: dict[str, Any], choices: list[dict[str, Any]], lead: int) -> _Script:
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
    return _events([*map(_data, chunks), _DONE], question, lead)


def _chat_choice(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


def _chat_stream(question: _Question) -> _Script:
    head = {
        "id": f"chatcmpl-{question.id}",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": question.model,
    }
    last = {"content": ""} if question.dialect in ("vllm", "sglang") else {}
    choices = [
        _chat_choice({"role": "assistant", "content": ""}),
        *(_chat_choice({"content": token_text(index)}) for index in range(question.tokens)),
        _chat_choice(last, question.finish),
    ]
    return _chunks(question, head, choices, lead=1)


def _text_choice(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}


def _completion_stream(question: _Question) -> _Script:
    head = {"id": f"cmpl-{question.id}", "object": "text_completion", "created": CREATED, "model": question.model}
    choices = [
        *(_text_choice(token_text(index)) for index in range(question.tokens)),
        _text_choice("", question.finish),
    ]
    return _chunks(question, head, choices, lead=0)


def _response(question: _Question, status: str) -> dict[str, Any]:
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


def _response_item(question: _Question, status: str) -> dict[str, Any]:
    return {
        "id": f"msg_{question.id}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [_response_part(answer_text(question.tokens))] if status == "completed" else [],
    }


def _response_stream(question: _Question) -> _Script:
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


def _message(question: _Question, *, done: bool) -> dict[str, Any]:
    """Return the object of the Messages API, finished or only begun."""
    return {
        "id": f"msg_{question.id}",
        "type": "message",
        "role": "assistant",
        "model": question.model,
        "content": [{"type": "text", "text": answer_text(question.tokens)}] if done else [],
        "stop_reason": _stop_reason(question) if done else None,
        "stop_sequence": None,
        "usage": {"input_tokens": question.prompt_tokens, "output_tokens": question.tokens if done else 0},
    }


def _stop_reason(question: _Question) -> str:
    return "max_tokens" if question.finish == "length" else "end_turn"


def _message_stream(question: _Question) -> _Script:
    frames = [
        _event({"type": "message_start", "message": _message(question, done=False)}),
        _event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
        *(
            _event(
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": token_text(index)}}
            )
            for index in range(question.tokens)
        ),
        _event({"type": "content_block_stop", "index": 0}),
        _event(
            {
                "type": "message_delta",
                "delta": {"stop_reason": _stop_reason(question), "stop_sequence": None},
                "usage": {"input_tokens": question.prompt_tokens, "output_tokens": question.tokens},
            }
        ),
        _event({"type": "message_stop"}),
    ]
    return _events(frames, question, lead=2)


def _speech(question: _Question) -> _Script:
    """Return sound that is none: a frame of bytes per token, with what looks like the end of events and chunks."""
    frames = tuple(
        b"\xff\xfb\x90\x00data: \n\n0\r\n\r\n" + index.to_bytes(4, "big") * 64 for index in range(question.tokens)
    )
    return _Script("audio/mpeg", frames, question.tokens, stream=True)


# A built stream is tens of kilobytes; 64 of them serve any load of few models and lengths.
@functools.lru_cache(maxsize=64)
def _stream_script(path: str, question: _Question, *, chunked: bool) -> _Script:
    """Return the frames of a stream, as HTTP chunks (RFC 9112 section 7.1) if `chunked`."""
    script = _STREAMS[path](question)
    if not chunked:
        return script
    return replace(script, frames=tuple(map(_chunk, script.frames)))


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _member(raw: msgspec.Raw, kind: type[_T], absent: _T) -> _T:
    """Return a member of the body that only this path looks at, decoded as `kind`.

    Raises:
        _Refusal: it is something else.

    """
    try:
        return msgspec.json.decode(raw, type=kind) if raw else absent
    except msgspec.ValidationError as error:
        raise _Refusal(400, str(error)) from None


def _count(raw: msgspec.Raw) -> int:
    """Return how many texts an `input` holds: one text or one list of token ids is one."""
    value = _member(raw, object, None)
    return len(value) if isinstance(value, list) and value and not isinstance(value[0], int) else 1


def _chat(_: _Ask, question: _Question) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer_text(question.tokens)}
    answer = {
        "id": f"chatcmpl-{question.id}",
        "object": "chat.completion",
        "created": CREATED,
        "model": question.model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": question.finish}],
        "usage": _usage(question, question.tokens),
    }
    return answer | ({"timings": _timings(question)} if question.dialect == "llamacpp" else {})


def _completion(_: _Ask, question: _Question) -> dict[str, Any]:
    answer = {
        "id": f"cmpl-{question.id}",
        "object": "text_completion",
        "created": CREATED,
        "model": question.model,
        "choices": [_text_choice(answer_text(question.tokens), question.finish)],
        "usage": _usage(question, question.tokens),
    }
    return answer | ({"timings": _timings(question)} if question.dialect == "llamacpp" else {})


def _embeddings(ask: _Ask, question: _Question) -> dict[str, Any]:
    vector = [0.125, -0.25, 0.5, -1.0]
    embedding: object = vector
    if ask.encoding_format == "base64":
        embedding = base64.b64encode(struct.pack("<4f", *vector)).decode()
    return {
        "id": f"embd-{question.id}",
        "object": "list",
        "created": CREATED,
        "model": question.model,
        "data": [{"index": index, "object": "embedding", "embedding": embedding} for index in range(_count(ask.input))],
        "usage": _usage(question, 0),
    }


def _rerank(ask: _Ask, question: _Question) -> dict[str, Any]:
    documents = _member(ask.documents, list[Any], [])
    results = [
        {
            "index": index,
            "document": document if isinstance(document, dict) else {"text": document},
            "relevance_score": 1 / (index + 1),
        }
        for index, document in enumerate(documents)
    ]
    return {
        "id": f"rerank-{question.id}",
        "model": question.model,
        "usage": {"prompt_tokens": question.prompt_tokens, "total_tokens": question.prompt_tokens},
        "results": results[: ask.top_n or None],
    }


def _score(ask: _Ask, question: _Question) -> dict[str, Any]:
    return {
        "id": f"score-{question.id}",
        "object": "list",
        "created": CREATED,
        "model": question.model,
        "data": [{"index": index, "object": "score", "score": 1 / (index + 1)} for index in range(_count(ask.text_2))],
        "usage": _usage(question, 0),
    }


def _tokenize(ask: _Ask, _: _Question) -> dict[str, Any]:
    """Return the bytes of the prompt as its tokens, which `detokenize` turns back."""
    messages = _member(ask.messages, list[dict[str, Any]], [])
    prompt = _member(ask.prompt, str, "".join(str(message.get("content")) for message in messages))
    tokens = list(prompt.encode())
    return {"count": len(tokens), "max_model_len": 32_768, "tokens": tokens, "token_strs": None}


def _detokenize(ask: _Ask, _: _Question) -> dict[str, Any]:
    return {"prompt": bytes(token % 256 for token in _member(ask.tokens, list[int], [])).decode(errors="replace")}


def _images(ask: _Ask, _: _Question) -> dict[str, Any]:
    return {"created": CREATED, "data": [{"b64_json": _PIXEL}] * min(ask.n or 1, MAX_IMAGES)}


def _transcription(_: _Ask, question: _Question) -> dict[str, Any]:
    return {"text": answer_text(question.tokens), "usage": {"type": "duration", "seconds": 1}}


_STREAMS: Final[dict[str, Callable[[_Question], _Script]]] = {
    "/v1/chat/completions": _chat_stream,
    "/v1/completions": _completion_stream,
    "/v1/responses": _response_stream,
    "/v1/messages": _message_stream,
    "/v1/audio/speech": _speech,
}
_DOCUMENTS: Final[dict[str, Callable[[_Ask, _Question], dict[str, Any]]]] = {
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
_GENERATING: Final = frozenset({*_STREAMS, "/v1/audio/transcriptions", "/v1/audio/translations"})
_FORMS: Final = frozenset({"/v1/images/edits", "/v1/audio/transcriptions", "/v1/audio/translations"})
_POSTS: Final = frozenset(_STREAMS) | frozenset(_DOCUMENTS)
_GETS: Final = frozenset({"/health", "/v1/models"})


def _document(value: object, *, status: int = 200, tokens: int = 0) -> _Script:
    return _Script("application/json", (orjson.dumps(value),), tokens, status=status)


def _models(behaviour: Behaviour) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "created": CREATED, "owned_by": behaviour.dialect}
            for name in behaviour.served or ("simulated",)
        ],
    }


# --- What goes wrong


def error_document(dialect: Dialect, status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Return the JSON body of an error as this kind of server words it."""
    if status == 401 and dialect in ("vllm", "sglang"):
        return {"error": "Unauthorized"}
    error = _error(dialect, status, message, param)
    return error if dialect == "sglang" else {"error": error}


def _error(dialect: Dialect, status: int, message: str, param: str | None = None) -> dict[str, Any]:
    match dialect:
        case "vllm":
            return {"message": message, "type": _error_type(status), "param": param, "code": status}
        case "sglang":
            kind = _error_type(status)
            return {"object": "error", "message": message, "type": kind, "param": param, "code": status}
        case "llamacpp":
            return {"code": status, "message": message, "type": _LLAMACPP_TYPES.get(status, "server_error")}
        case "openai":
            kind = "invalid_request_error" if status < 500 else "server_error"
            code = _OPENAI_CODES.get((status, param)) or _OPENAI_CODES.get((status, None))
            return {"message": message, "type": kind, "param": param, "code": code}


def _error_type(status: int) -> str:
    """Return vLLM's and SGLang's name for a status: `BadRequestError`, `NotFoundError`, `InternalServerError`."""
    try:
        words = HTTPStatus(status).phrase.title().replace(" ", "").replace("-", "")
    except ValueError:
        words = "Unknown"
    return words.removesuffix("Error") + "Error"


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


def _error_frames(path: str, dialect: Dialect, status: int) -> tuple[bytes, ...]:
    """Return how a stream says that it failed."""
    message = _failure(status)
    if path == "/v1/messages":
        return (_event({"type": "error", "error": {"type": "api_error", "message": message}}),)
    if path == "/v1/responses":
        return (_event({"type": "error", "code": "server_error", "message": message, "param": None}),)
    frame = _data({"error": _error(dialect, status, message)})
    return (frame, _DONE) if dialect in ("vllm", "sglang") else (frame,)


def _failure(status: int) -> str:
    return f"The simulated engine failed with status {status}."


# --- How it is sent


@dataclass(slots=True)
class Record:
    """One request and what became of it.

    `path` is as on the wire, with its query. `outcome` is `open` while the answer runs, then `complete` (so are errors
    that nobody injected), `client_gone`, `closed` (by the simulator's own end) or the name of the injected fault.
    `status` is 0 when no status line was sent. `frames_sent` (running) and `tokens` (set at the end) count what was
    given to the transport. Times are seconds of the loop's clock.
    """

    method: str
    path: str
    headers: list[tuple[str, str]]
    started: float
    body: bytes = b""
    status: int = 0
    outcome: str = "open"
    frames_sent: int = 0
    tokens: int = 0
    ended: float = 0.0


class _Sent(web.StreamResponse):
    """Tells aiohttp that an answer is already on its way; it only has to keep or close the connection."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


_KEEP: Final = _Sent(keep_alive=True)
_CLOSE: Final = _Sent(keep_alive=False)


class _Answer:
    """One script on its way to one client, driven by one timer."""

    __slots__ = (
        "_connection", "_due", "_ended", "_fault", "_frames", "_gap_s", "_jitter", "_loop", "_paused", "_random",
        "_record", "_script", "_simulator", "_stop", "_tail", "_timer", "_transport",
    )  # fmt: skip

    def __init__(
        self,
        simulator: "Simulator",
        connection: "_Connection",
        transport: asyncio.Transport,
        record: Record,
        script: _Script,
        behaviour: Behaviour,
        tail: bytes,
    ) -> None:
        self._simulator = simulator
        self._connection = connection
        self._transport = transport
        self._record = record
        self._script = script
        self._frames = script.frames
        self._tail = tail
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self._due = 0.0
        self._fault = behaviour.fault
        self._stop = len(script.frames)
        if self._fault in ("reset", "cut", "stall"):
            self._tail = (b"".join(script.frames[max(behaviour.after, 0) :]) + tail)[: behaviour.after_bytes]
            self._stop = min(self._stop, max(behaviour.after, 0))
        self._gap_s = behaviour.interval_ms / 1000
        self._jitter = behaviour.jitter
        self._random = random.Random(zlib.crc32(record.body)) if behaviour.jitter else None

    async def send(self, head: bytes, delay_s: float) -> None:
        """Write the head of a stream now, the first frame after `delay_s`, the rest at its pace; return at the end.

        The head of an answer that is no stream goes with the body, for a server has to compute that first.
        """
        self._connection.answer = self
        self._due = self._loop.time() + delay_s
        if self._script.stream:
            self._transport.write(head)
            self._timer = self._loop.call_at(self._due, self._tick)
        else:
            self._timer = self._loop.call_at(self._due, self._tick_with, head)
        try:
            await self._ended
        finally:
            self.stop()

    def stop(self) -> None:
        """Write no more."""
        self._connection.answer = None
        self._record.tokens = self._script.tokens_in(self._record.frames_sent)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def resume(self) -> None:
        """Go on after the client made room."""
        if self._paused:
            self._paused = False
            self._due = self._loop.time()
            self._tick()

    def _tick_with(self, head: bytes) -> None:
        self._transport.write(head)
        self._tick()

    def _tick(self) -> None:
        """Write every frame that is due, unless the client is behind."""
        record = self._record
        now = self._loop.time()
        while record.frames_sent < self._stop:
            if self._connection.writing_paused:
                self._paused = True
                return
            self._transport.write(self._frames[record.frames_sent])
            record.frames_sent += 1
            self._simulator.changed()
            self._due += self._gap()
            if self._due > now and record.frames_sent < self._stop:
                self._timer = self._loop.call_at(self._due, self._tick)
                return
        self._finish()

    def _gap(self) -> float:
        if self._random is None:
            return self._gap_s
        return self._gap_s * (1 + self._jitter * self._random.uniform(-1, 1))

    def _finish(self) -> None:
        self._timer = None
        if self._tail:
            self._transport.write(self._tail)
        if self._fault == "reset":
            self._timer = self._loop.call_later(_FLUSH_S, self._reset)
        elif self._fault != "stall":
            self._end()

    def _end(self) -> None:
        self._record.outcome = self._fault or "complete"
        if not self._ended.done():
            self._ended.set_result(None)

    def _reset(self) -> None:
        """End the connection by RST, once what was written has left: `abort` would drop it.

        No event says so; and uvloop writes at the end of its turn, until when its buffer looks empty.
        """
        if self._transport.get_write_buffer_size():
            self._timer = self._loop.call_later(_FLUSH_S, self._reset)
            return
        self._end()
        sock = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


class _Connection(web.RequestHandler):
    """One client's connection: aiohttp's, that tells the answer on it when to pause and when to stop."""

    __slots__ = ("_simulator", "answer")

    def __init__(self, simulator: "Simulator", server: web.Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=simulator.keepalive_timeout_s,
            access_log=None,  # type: ignore[arg-type]  # aiohttp takes None for no log, its annotation does not
            auto_decompress=False,
            max_line_size=65_536,
            max_field_size=65_536,
        )
        self._simulator = simulator
        self.answer: _Answer | None = None

    async def start(self) -> None:
        self._simulator.opened(self)
        try:
            await super().start()
        finally:
            self._simulator.lost(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.answer is not None:
            self.answer.resume()

    def eof_received(self) -> None:
        if self.answer is not None and self.transport is not None:
            self.transport.abort()  # else a full buffer keeps the connection for as long as nobody reads it

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.answer is not None:
            self.answer.stop()
        super().connection_lost(exc)


class Simulator:
    """A model server on one listening socket.

    `behaviour` and `healthy` (else `/health` is 503) may be changed at any time and hold for later requests.
    `requests` keeps the last `keep_requests` records, bodies included; under load, keep none.
    `active` counts requests that are being answered.
    """

    def __init__(
        self,
        behaviour: Behaviour | None = None,
        *,
        keepalive_timeout_s: float = KEEPALIVE_TIMEOUT_S,
        keep_requests: int = 1_000,
    ) -> None:
        self.behaviour = behaviour or Behaviour()
        self.healthy = True
        self.keepalive_timeout_s = keepalive_timeout_s
        self.requests: deque[Record] = deque(maxlen=keep_requests)
        self.active = 0
        self._connections: set[_Connection] = set()
        self._waiters: list[tuple[Callable[[], object], asyncio.Future[None]]] = []
        self._listener: asyncio.Server | None = None
        self._scheme = "http"
        self._closing = False

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._address()[1])

    @property
    def url(self) -> str:
        """The base URL, without a path."""
        host, port = self._address()[:2]
        return f"{self._scheme}://[{host}]:{port}" if ":" in host else f"{self._scheme}://{host}:{port}"

    def _address(self) -> tuple[Any, ...]:
        if self._listener is None or not self._listener.sockets:
            raise RuntimeError("the simulator does not listen: await start() first")
        address: tuple[Any, ...] = self._listener.sockets[0].getsockname()
        return address

    async def start(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        sock: socket.socket | None = None,
        ssl: tls.SSLContext | None = None,
    ) -> None:
        """Listen on `host` and `port` (0: any free one), or on `sock`; with `ssl`, speak TLS.

        Raises:
            OSError: the address is taken or not ours.

        """
        loop = asyncio.get_running_loop()
        server = web.Server(self._handle, request_factory=_request, handler_cancellation=True)
        where: dict[str, Any] = {"host": host, "port": port} if sock is None else {"sock": sock}
        self._closing = False
        self._scheme = "https" if ssl else "http"
        self._listener = await loop.create_server(
            lambda: _Connection(self, server, loop),
            **where,
            ssl=ssl,
            backlog=65_535,  # the kernel lowers it to net.core.somaxconn
        )

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        if self._listener is None:
            return
        self._closing = True
        self._listener.close()
        for connection in self._connections:
            if connection.transport is not None:
                connection.transport.abort()
        await self.wait_for(lambda: not self._connections)
        await self._listener.wait_closed()
        self._listener = None

    async def wait_for(self, predicate: Callable[[], object]) -> None:
        """Return when `predicate()` holds; it is asked again whenever a request, frame or connection comes or ends."""
        if predicate():
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (predicate, waiter)
        self._waiters.append(entry)
        try:
            await waiter
        finally:
            self._waiters.remove(entry)

    def changed(self) -> None:
        """Ask the predicates that are waited for."""
        for predicate, waiter in self._waiters:
            if not waiter.done():
                try:
                    if predicate():
                        waiter.set_result(None)
                except Exception as error:  # the waiter's mistake, not the request's that happens to run
                    waiter.set_exception(error)

    def opened(self, connection: _Connection) -> None:
        """Count a connection."""
        self._connections.add(connection)
        self.changed()

    def lost(self, connection: _Connection) -> None:
        """Forget a connection."""
        self._connections.discard(connection)
        self.changed()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        record = Record(request.method, request.raw_path, list(request.headers.items()), loop.time())
        self.requests.append(record)
        self.active += 1
        self.changed()
        try:
            return await self._answer(request, record)
        except ConnectionError:
            return _CLOSE
        finally:
            if record.outcome == "open":
                record.outcome = "closed" if self._closing else "client_gone"
            record.ended = loop.time()
            self.active -= 1
            self.changed()

    async def _answer(self, request: web.BaseRequest, record: Record) -> web.StreamResponse:
        if request.headers.get("expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        behaviour = self.behaviour
        delay_s = 0.0
        try:
            record.body = await _read(request)
            self.changed()
            if request.method == "POST" and request.rel_url.raw_path in _POSTS:
                ask = await _asked(request, record.body, behaviour)
                behaviour = _steered(behaviour, ask)
                script = _script(request, ask, behaviour)
                tokens = 0 if script.stream else script.tokens
                delay_s = (behaviour.ttft_ms + behaviour.interval_ms * tokens) / 1000
            else:
                script, behaviour = self._unsteered(request), Behaviour()
        except _Refusal as refusal:
            document = error_document(behaviour.dialect, refusal.status, refusal.message, refusal.param)
            script, behaviour = _document(document, status=refusal.status), Behaviour()
        return await self._send(request, record, script, behaviour, delay_s)

    def _unsteered(self, request: web.BaseRequest) -> _Script:
        """Return the answer to what is no question to a model: no pace, no faults."""
        match request.method, request.rel_url.raw_path:
            case "GET", "/health":
                return _Script("text/plain; charset=utf-8", (b"",), status=200 if self.healthy else 503)
            case "GET", "/v1/models":
                return _document(_models(self.behaviour))
            case _, path if path in _POSTS or path in _GETS:
                return _document({"detail": "Method Not Allowed"}, status=405)
            case _:
                return _document({"detail": "Not Found"}, status=404)

    async def _send(
        self, request: web.BaseRequest, record: Record, script: _Script, behaviour: Behaviour, delay_s: float
    ) -> web.StreamResponse:
        connection, transport = request.protocol, request.transport
        assert isinstance(connection, _Connection)
        if transport is None:
            return _CLOSE
        framing = _framing(request, script, behaviour)
        keep = request.keep_alive and framing != "close" and behaviour.fault not in ("cut", "reset", "rubbish")
        head = _head(script, framing, self.behaviour.dialect, close=not request.keep_alive or framing == "close")
        tail = b"0\r\n\r\n" if framing == "chunked" else b""
        if framing == "chunked" and not script.stream:
            script = replace(script, frames=(b"".join((*map(_chunk, filter(None, script.frames)), tail)),))
            tail = b""
        if request.method == "HEAD":  # which has no body (RFC 9110 section 9.3.2)
            script, tail = _Script(script.content_type, (), status=script.status), b""
        elif behaviour.fault == "rubbish":
            head, script, tail = b"", _Script("", (_RUBBISH,), status=0), b""
        elif behaviour.fault in ("cut", "reset", "stall") and behaviour.after < 0:
            head, script, tail = b"", _Script("", (), status=0), b""
        record.status = script.status
        await _Answer(self, connection, transport, record, script, behaviour, tail).send(head, delay_s)
        return _KEEP if keep else _CLOSE


def _request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: web.RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=MAX_BODY_BYTES)


async def _read(request: web.BaseRequest) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _Refusal(413, f"The request is over {MAX_BODY_BYTES} bytes.") from None


async def _asked(request: web.BaseRequest, body: bytes, behaviour: Behaviour) -> _Ask:
    """Read what a body asks for.

    Raises:
        _Refusal: the body is not what this path takes; vLLM and SGLang look at its content type too.

    """
    if request.rel_url.raw_path in _FORMS:
        return await _asked_in_form(request, body)
    if behaviour.dialect in ("vllm", "sglang") and request.content_type != "application/json":
        raise _Refusal(400, "Unsupported Media Type: Only 'application/json' is allowed")
    try:
        return _decode_ask(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _Refusal(400, f"The body cannot be read: {error}") from None


async def _asked_in_form(request: web.BaseRequest, body: bytes) -> _Ask:
    if request.content_type != "multipart/form-data":
        raise _Refusal(400, "This path takes multipart/form-data.")
    # The reader wants a stream; a limit above any body keeps it from pausing the connection.
    stream = StreamReader(request.protocol, MAX_BODY_BYTES, loop=asyncio.get_running_loop())
    stream.feed_data(body)
    stream.feed_eof()
    form: dict[str, Any] = {}
    try:
        async for part in MultipartReader(request.headers, stream):
            if isinstance(part, BodyPartReader) and part.name and part.filename is None:
                form[part.name] = await part.text()
        if "simulate" in form:
            form["simulate"] = orjson.loads(form["simulate"])
        return msgspec.convert(
            {name: form[name] for name in ("model", "n", "simulate") if name in form}, _Ask, strict=False
        )
    except ValueError as error:
        raise _Refusal(400, f"The form cannot be read: {error}") from None


def _steered(behaviour: Behaviour, ask: _Ask) -> Behaviour:
    try:
        return behaviour.steered(ask.simulate)
    except ValueError as error:
        raise _Refusal(400, str(error), "simulate") from None


def _script(request: web.BaseRequest, ask: _Ask, behaviour: Behaviour) -> _Script:
    """Return the answer to `ask`, with the faults in it that lie in the frames themselves."""
    path = request.rel_url.raw_path
    question = _question(ask, behaviour)
    streams = path in _STREAMS and (bool(ask.stream) or path not in _DOCUMENTS)
    events = streams and path in _DOCUMENTS
    fault = behaviour.fault
    if fault == "error" or (fault in ("error_first", "error_mid") and not events):
        document = error_document(behaviour.dialect, behaviour.status, _failure(behaviour.status))
        return _document(document, status=behaviour.status)
    if not streams:
        tokens = question.tokens if path in _GENERATING else 0
        return _document(_DOCUMENTS[path](ask, question), tokens=tokens)
    chunked = _streams_chunked(request, behaviour)
    script = _stream_script(path, question, chunked=chunked)
    if fault in ("error_first", "error_mid"):
        error = _error_frames(path, behaviour.dialect, behaviour.status)
        after = 0 if fault == "error_first" else min(max(behaviour.after, 0), script.lead + script.tokens)
        return _with_end(script, after, tuple(map(_chunk, error)) if chunked else error)
    if fault == "no_done" and script.frames[-1].endswith(_DONE + b"\r\n" if chunked else _DONE):
        return _with_end(script, len(script.frames) - 1, ())
    return script


def _with_end(script: _Script, after: int, end: tuple[bytes, ...]) -> _Script:
    """Return a stream with other frames in place of those behind the first `after`."""
    frames = script.frames[:after] + end
    return replace(script, frames=frames, tokens=min(script.tokens, max(0, after - script.lead)))


def _streams_chunked(request: web.BaseRequest, behaviour: Behaviour) -> bool:
    """HTTP/1.0 knows no chunks (RFC 9112 section 7.1)."""
    return behaviour.framing in (None, "chunked") and request.version >= (1, 1)


def _framing(request: web.BaseRequest, script: _Script, behaviour: Behaviour) -> Framing:
    wanted = behaviour.framing or ("chunked" if script.stream else "length")
    return "close" if wanted == "chunked" and request.version < (1, 1) else wanted


def _head(script: _Script, framing: Framing, dialect: Dialect, *, close: bool) -> bytes:
    """Return the head of an answer, with the names and in the order of uvicorn."""
    lines = [
        f"HTTP/1.1 {script.status} {_reason(script.status)}",
        f"date: {_date(int(time.time()))}",
        "server: uvicorn",
        f"content-type: {script.content_type}",
    ]
    if framing == "chunked":
        lines.append("transfer-encoding: chunked")
    elif framing == "length":
        lines.append(f"content-length: {sum(map(len, script.frames))}")
    if dialect == "openai":
        lines += ["openai-processing-ms: 1", "x-request-id: req_simulated"]
    if close:
        lines.append("connection: close")
    return "\r\n".join((*lines, "\r\n")).encode()


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


@functools.lru_cache(maxsize=2)
def _date(unix_s: int) -> str:
    return email.utils.formatdate(unix_s, usegmt=True)


# --- edge simulate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `edge simulate`; `listen` becomes a (host, port) pair."""
    parser.add_argument(
        "--listen",
        type=_listen_address,
        default=("127.0.0.1", 9001),
        metavar="HOST:PORT",
        help="default 127.0.0.1:9001",
    )
    parser.add_argument("--dialect", choices=get_args(Dialect), default="vllm", help="whose habits (default vllm)")
    parser.add_argument(
        "--ttft", type=_duration_ms, default=200.0, metavar="TIME", help="to the first token (default 200ms)"
    )
    parser.add_argument(
        "--rate", type=float, default=50.0, metavar="N", help="tokens a second of one stream (default 50); 0: no pause"
    )
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of an answer (default 64)")
    parser.add_argument("--jitter", type=float, default=0.0, metavar="SHARE", help="0 to 1 of the pause between tokens")
    parser.add_argument("--prompt-tokens", type=int, default=12, metavar="N", help="what usage says (default 12)")
    parser.add_argument("--fault", choices=get_args(Fault), help="fail every answer in this way")
    parser.add_argument("--status", type=int, default=500, metavar="CODE", help="of --fault error (default 500)")
    parser.add_argument(
        "--after", type=int, default=0, metavar="FRAMES", help="sent before the fault; -1: not even the head"
    )
    parser.add_argument(
        "--after-bytes", type=int, default=0, metavar="N", help="of the next frame, sent before the fault"
    )
    parser.add_argument(
        "--framing", choices=get_args(Framing), help="of every answer (default: chunked for streams, else length)"
    )
    parser.add_argument("--model", action="append", metavar="NAME", help="serve this name only; may be repeated")


def behaviour_from(args: argparse.Namespace) -> Behaviour:
    """Return the behaviour that the options of `add_arguments` ask for.

    Raises:
        ValueError: a value is out of range; the message says which and what it may be.

    """
    if not 0 <= args.rate <= 1_000_000:
        raise ValueError(f"rate must be between 0 and 1000000 tokens a second, not {args.rate!r}")
    return Behaviour(
        dialect=args.dialect,
        ttft_ms=args.ttft,
        interval_ms=1000 / args.rate if args.rate else 0,
        tokens=args.tokens,
        jitter=args.jitter,
        fault=args.fault,
        status=args.status,
        after=args.after,
        after_bytes=args.after_bytes,
        framing=args.framing,
        prompt_tokens=args.prompt_tokens,
        served=tuple(args.model) if args.model else None,
    )


def _duration_ms(text: str) -> float:
    for unit, factor in (("ms", 1.0), ("s", 1_000.0), ("m", 60_000.0)):
        if text.endswith(unit):
            with contextlib.suppress(ValueError):
                return float(text.removesuffix(unit)) * factor
            break
    raise argparse.ArgumentTypeError(f"{text!r} is no duration: write a number with ms, s or m, such as 200ms")


def _listen_address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no address: write HOST:PORT, such as 127.0.0.1:9001")
    return host.strip("[]"), int(port)


async def run(listen_host: str, listen_port: int, behaviour: Behaviour) -> None:
    """Play a model server until SIGINT or SIGTERM.

    Raises:
        OSError: the address is taken or not ours.

    """
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    simulator = Simulator(behaviour, keep_requests=0)
    await simulator.start(listen_host, listen_port)
    try:
        print(f"simulating {behaviour.dialect} on {simulator.url}/v1", flush=True)
        await stopped.wait()
    finally:
        await simulator.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
