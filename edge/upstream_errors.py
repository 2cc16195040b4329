"""What an upstream says of a failure, brought to a failure of ours, whatever shape and coding it had.

What the caller can act on keeps its status and words: 400, 404, 413, 422, 429. A 405, 415 or 501 keeps its status, so
that no SDK tries it again. A 401, 403, 407, 409 or 3xx is a fault between the edge and the upstream, so our 502; and
openai 0.28.1 repeats a 409 for ever, without a pause. The owner of an instance gets each 4xx of it, and its 501.
"""

import math
import re
import time
import zlib
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple

import orjson

from edge import errors
from edge.errors import EdgeError

_MAX_MESSAGE_LENGTH: Final = 2000
_MAX_PARAM_LENGTH: Final = 256
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_DECODED_BYTES: Final = 64 * 1024
_MAX_LISTED: Final = 5  # of the errors of a list, in one message
_LOGGED_BYTES: Final = 200
_MESSAGE = re.compile(rb'\A\s*\{.{0,500}?"(?:message|msg|detail|error)"\s*:\s*("[^"\\\x00-\x1f]{1,4000}")', re.DOTALL)
# Of the account that asked: of a pool that is the platform's at a vendor, of an instance its owner's.
ACCOUNT_HEADERS: Final = (b"openai-", b"anthropic-", b"x-ratelimit-")
_GZIP_OR_ZLIB: Final = zlib.MAX_WBITS | 32
_BROKEN: Final = "The model's server failed to answer this request."
_NOT_SERVED: Final = "The model's server does not serve this operation."
_KEPT: Final[Mapping[int, type[EdgeError]]] = {
    400: errors.InvalidRequest,
    404: errors.ModelNotFound,
    405: errors.MethodNotAllowed,
    413: errors.RequestTooLarge,
    415: errors.UnsupportedMediaType,
    422: errors.UnprocessableRequest,
    429: errors.RateLimited,
    501: errors.NotSupported,
}
_BUSY: Final = (503, 529)  # 529 is Anthropic's "overloaded"
_LATE: Final = (408, 504)
_CONFLICT: Final = 409
_NO_PATH: Final = ("not found", "file not found", "")  # what FastAPI, llama.cpp and bare servers say of a path

# --- what is no word for a caller
_STACK = re.compile(r'Traceback \(most recent call last\)|\bFile "[^"\n]{1,300}", line [0-9]')
_WORD = re.compile(r"[^\s'\"`,;<>{}=()]+")
_LONGEST_WORD: Final = 300
_KEY = re.compile(r"\bsk-[\w-]+")
_INNER: Final = r"localhost|[\w.-]+\.(?:local|internal|lan|svc)"
_SUSPECT = re.compile(r"[:/\\.-]")  # one of these is in each of the following
_HIDDEN: Final = (
    ("(key)", _KEY),
    ("(address)", re.compile(rf"\b[a-z+]{{2,16}}://(?:{_INNER}|[^/.]+|[^/]*:[0-9]+)(?![^/]).*")),
    ("(path)", re.compile(r"(?<![\w./-])[\w./-]+\.(?:py|rs|cpp|cc|cu|go|java|js|ts)(?::[0-9]+)+")),
    ("(path)", re.compile(r"(?<![\w.])[A-Za-z]:[\\/](?!/).*")),
    # but no path of the API, or into the request
    (
        "(path)",
        re.compile(r"(?<![\w./])/(?!(?:v[0-9]+|messages|input|prompt|tools)/(?!.*\.\.))[\w.@+-]+(?:/[\w.@+-]+)+"),
    ),
    ("(address)", re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\.?\w)(?::[0-9]+)?")),
    ("(address)", re.compile(r"\[?(?<![\w:])(?:[0-9a-f]{1,4}:)*:(?::?[0-9a-f]{1,4})+(?![\w:])\]?(?::[0-9]+)?")),
    ("(address)", re.compile(rf"(?<![\w.-])(?:{_INNER})(?![\w-])(?::[0-9]+)?")),
    ("(address)", re.compile(r"(?<![\w.-])(?=[\w-]*[0-9.])[A-Za-z][\w.-]*:[0-9]{2,5}(?!\.?\w)")),
)

# --- the words of engines
_OVERFLOW = re.compile(r"maximum context length|context (?:length|size|window)", re.IGNORECASE)
# A 500 that is the caller's mistake: llama.cpp says so of a text longer than its batch.
_TOO_LARGE = re.compile(r"too large to process|exceeds? the (?:available |maximum )?(?:context|batch)", re.IGNORECASE)


class Words(NamedTuple):
    """What an upstream's error says; `details` are counts beside the message."""

    message: str = ""
    param: str | None = None
    code: str | None = None
    kind: str = ""
    details: Mapping[str, int] = {}


def from_upstream(status: int, headers: Mapping[bytes, bytes], body: bytes, *, is_instance: bool = False) -> EdgeError:
    """Return an upstream's error as one of ours; an instance belongs to the caller, who gets more of its words."""
    error = _error_of(status, words_of(headers, body), is_instance)
    error.received_status = status
    if status in (429, *_BUSY):
        error.retry_after_s = pause_of(headers) or 1
    advice = headers.get(b"x-should-retry", b"").lower()
    if advice in (b"true", b"false"):
        error.should_retry = advice == b"true"
    if is_instance:
        error.headers += tuple(
            (name.decode(), value.decode())
            for name, value in headers.items()
            if name.startswith(ACCOUNT_HEADERS) and value.isascii()
        )
    return error


def _error_of(status: int, words: Words, is_instance: bool) -> EdgeError:
    message = words.message
    if status in (400, 413, 422) and (_OVERFLOW.search(message) or words.kind == "exceed_context_size_error"):
        words = words._replace(code=words.code or "context_length_exceeded")
    if status == 404 and words.code != "model_not_found" and words.param != "model" and not _names_model(words):
        message = _NOT_SERVED if message.lower() in _NO_PATH else message
        return _said(errors.PathNotFound(message), words)
    if status == 500 and _TOO_LARGE.search(message):
        return _said(errors.InvalidRequest(message), words)
    if is_instance and 400 <= status < 500 and status not in _KEPT:
        # Never a 409, see above.
        return _said(errors.RefusedByInstance(400 if status == _CONFLICT else status, message or _BROKEN), words)
    kept = _KEPT.get(status)
    if kept is errors.NotSupported and not is_instance:
        return kept(_NOT_SERVED)
    if kept is not None:
        return _said(kept(message or _BROKEN), words)
    if status in _BUSY:
        return errors.UpstreamUnavailable("The model is overloaded or not ready, try again.")
    if status in _LATE:
        return errors.UpstreamTimeout("The model's server timed out.")
    broken = errors.UpstreamError(_BROKEN)
    if status == _CONFLICT:
        broken.should_retry = False
    return broken


def _said(error: EdgeError, words: Words) -> EdgeError:
    error.param, error.details = words.param, words.details
    error.error_code = words.code or error.code
    return error


def _names_model(words: Words) -> bool:
    """Whether a 404 is about the model, as vLLM, Ollama and vendors word it."""
    return "model" in words.message.lower() and words.kind != "not_found_error"


# --- pauses


def pause_of(headers: Mapping[bytes, bytes]) -> int | None:
    """Return for how many whole seconds, 1 to 59, an upstream asks to wait; None: it does not say.

    SDKs sleep what they are told, and litellm parses with `int()`. It may be said in milliseconds, as OpenAI does, in
    seconds, also in parts of one, or as a date (RFC 9110 section 10.2.3), by the upstream's own clock where it shows.
    """
    seconds = _number(headers.get(b"retry-after-ms", b""))
    if seconds is not None:
        seconds /= 1000
    else:
        given = headers.get(b"retry-after", b"")
        seconds = _number(given)
        if seconds is None and given:
            until = _unix_time(given)
            seconds = until - (_unix_time(headers.get(b"date", b"")) or time.time()) if until is not None else None
    return None if seconds is None else min(max(math.ceil(seconds), 1), errors.LONGEST_RETRY_AFTER_S)


def _number(text: bytes) -> float | None:
    if re.fullmatch(rb"[0-9]{1,20}(?:\.[0-9]{0,9})?", text) is None:
        return None
    return float(text)


def _unix_time(date: bytes) -> float | None:
    try:
        return parsedate_to_datetime(date[:64].decode("ascii")).timestamp()
    except (ValueError, OverflowError):
        return None


# --- words


def logged(headers: Mapping[bytes, bytes], body: bytes) -> str:
    """Return the beginning of an upstream's error for the log: without keys, but with addresses, for operators."""
    return _KEY.sub("(key)", _decoded(headers, body)[:_LOGGED_BYTES].decode("utf-8", "replace"))


def words_of(headers: Mapping[bytes, bytes], body: bytes) -> Words:
    """Return what an upstream's error says, in whatever shape; nothing of a page of HTML, which no caller can read."""
    body = _decoded(headers, body)
    try:
        return _words_in(orjson.loads(body))
    except orjson.JSONDecodeError:
        pass
    if found := _MESSAGE.search(body):  # what follows is cut off: some echo the whole request behind it
        return _words_in({"message": orjson.loads(found[1])})
    if not headers.get(b"content-type", b"").lower().startswith(b"text/plain"):
        return Words()
    try:
        return Words(presentable(body.decode()))
    except UnicodeDecodeError:
        return Words()


def _decoded(headers: Mapping[bytes, bytes], body: bytes) -> bytes:
    """Return a body without its coding: some compress an error though nobody asked for that."""
    if headers.get(b"content-encoding", b"identity").lower() not in (b"gzip", b"x-gzip", b"deflate"):
        return body
    try:
        return zlib.decompressobj(_GZIP_OR_ZLIB).decompress(body, _MAX_DECODED_BYTES)
    except zlib.error:
        return b""


def _words_in(data: Any) -> Words:
    """Return the words of vLLM, SGLang (flat), llama.cpp, FastAPI (`detail`), Triton, Anthropic; of lists, too."""
    if not isinstance(data, dict):
        return Words()
    error = data
    for name in ("error", "detail", "errors"):
        if data.get(name):
            error = data[name]
            break
    if isinstance(error, list):
        return _words_of_list(error)
    if isinstance(error, str):
        return Words(presentable(error), kind=str(data.get("error_type", "")))
    return _words_of_one(error)


def _words_of_list(listed: list[Any]) -> Words:
    each = [Words(presentable(one)) if isinstance(one, str) else _words_of_one(one) for one in listed[:_MAX_LISTED]]
    said = [words for words in each if words.message]
    if not said:
        return Words()
    return said[0]._replace(message="; ".join(words.message for words in said)[:_MAX_MESSAGE_LENGTH])


def _words_of_one(error: Any) -> Words:
    if not isinstance(error, dict):
        return Words()
    message, place = error.get("message", error.get("msg")), error.get("loc")
    param, code, kind = error.get("param"), error.get("code"), error.get("type")
    if isinstance(place, list) and "msg" in error:  # FastAPI's: ["body", "temperature"]
        param = ".".join(map(str, place[1:])) or None
    details = {
        name: value
        for name, value in error.items()
        if name.startswith("n_") and _NAME.fullmatch(name) and type(value) is int  # llama.cpp's counts
    }
    return Words(
        presentable(message) if isinstance(message, str) else "",
        presentable(param)[:_MAX_PARAM_LENGTH] if isinstance(param, str) else None,
        code if isinstance(code, str) and _NAME.fullmatch(code) else None,
        kind if isinstance(kind, str) else "",
        details,
    )


def presentable(message: str) -> str:
    """Return a message without what a server says of itself: stacks, paths of files, addresses, keys."""
    message = message[:_MAX_MESSAGE_LENGTH]
    stack = _STACK.search(message)
    if stack is not None:
        message = message[: stack.start()]
    return _WORD.sub(_shown, message).strip()


def _shown(found: re.Match[str]) -> str:
    """Return a word of a message, or what stands for what it holds."""
    word = found[0]
    if not _SUSPECT.search(word):
        return word
    if len(word) > _LONGEST_WORD:
        return "(...)"
    for shown, hidden in _HIDDEN:
        word = hidden.sub(shown, word)
    return word
