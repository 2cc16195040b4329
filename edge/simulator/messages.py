"""Anthropic's Messages API, as vLLM, SGLang and llama.cpp serve it."""

from typing import Any, Final

from edge.simulator.questions import Question
from edge.simulator.scripts import Script, answer_text, event, events, pieces

_STOP_REASONS: Final = {"length": "max_tokens", "stop": "end_turn"}
_SGLANG_KINDS: Final = {  # Anthropic's names of errors (docs.anthropic.com/en/api/errors), by status
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_kind(status: int) -> str:
    """Return Anthropic's name of an error of this status."""
    return _SGLANG_KINDS.get(status, "api_error")


def message_document(question: Question) -> dict[str, Any]:
    """Return a whole message."""
    content = [{"type": "text", "text": answer_text(question.tokens)}]
    message = _head(question, content) | {"stop_reason": _STOP_REASONS[question.finish]}
    if question.dialect == "llamacpp":
        message["stop_sequence"] = None
    return message | {"usage": _usage(question, question.tokens)}


def message_stream(question: Question) -> Script:
    """Return the stream of a message; llama.cpp's first and last chunks have several events."""
    said = pieces(question)
    frames = [*_opening(question), *_deltas(question), *_closing(question)]
    if question.dialect != "llamacpp":
        return events(frames, question, lead=2, said=said)
    first, last = 2 + min(len(said), 1), len(frames) - 3
    joined = [b"".join(frames[:first]), *frames[first:last], b"".join(frames[last:])]
    return events(joined, question, lead=0, said=said)


def refused_stream(question: Question, message: str) -> Script:
    """Return how SGLang refuses, in a stream that has begun, a prompt that does not fit into its context."""
    return events(
        [_start(question, {"input_tokens": 0, "output_tokens": 0}), *failed_frames(message, 400)], question, 1
    )


def failed_frames(message: str, status: int) -> tuple[bytes, bytes]:
    """Return how SGLang ends a stream that failed: an error, and then as every other."""
    error = {"type": error_kind(status), "message": message}
    return event({"type": "error", "error": error}), event({"type": "message_stop"})


def block_stop() -> bytes:
    """Return the end of the text."""
    return event({"type": "content_block_stop", "index": 0})


def count_tokens(question: Question) -> dict[str, Any]:
    """Return the answer of `/v1/messages/count_tokens`."""
    counted: dict[str, Any] = {"input_tokens": question.prompt_tokens}
    if question.dialect == "vllm":
        counted["context_management"] = {"original_input_tokens": question.prompt_tokens}
    return counted


def _head(question: Question, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": question.id("message"),
        "type": "message",
        "role": "assistant",
        "content": content,
        "model": question.model,
    }


def _start(question: Question, used: dict[str, Any]) -> bytes:
    message = _head(question, [])
    if question.dialect != "sglang":
        message |= {"stop_reason": None, "stop_sequence": None}
    return event({"type": "message_start", "message": message | {"usage": used}})


def _opening(question: Question) -> list[bytes]:
    used = _usage(question, 0)
    if question.dialect == "vllm":  # which looks at its cache only at the end
        used = {"input_tokens": question.prompt_tokens, "output_tokens": 0}
    block = {"type": "text", "text": ""}
    start = {"type": "content_block_start"} | _at(question, "content_block", block)
    return [_start(question, used), event(start)]


def _deltas(question: Question) -> list[bytes]:
    deltas = ({"type": "text_delta", "text": text} for text, _ in pieces(question))
    return [event({"type": "content_block_delta"} | _at(question, "delta", delta)) for delta in deltas]


def _closing(question: Question) -> list[bytes]:
    delta: dict[str, Any] = {"stop_reason": _STOP_REASONS[question.finish]}
    if question.dialect != "sglang":
        delta["stop_sequence"] = None
    used = _usage(question, question.tokens)
    if question.dialect in ("sglang", "llamacpp"):
        used = {"output_tokens": question.tokens}
    ended = event({"type": "message_delta", "delta": delta, "usage": used})
    return [block_stop(), ended, event({"type": "message_stop"})]


def _at(question: Question, name: str, value: object) -> dict[str, Any]:
    """Return a member of the only block, with its index where the dialect puts it."""
    return {name: value, "index": 0} if question.dialect == "vllm" else {"index": 0, name: value}


def _usage(question: Question, tokens: int) -> dict[str, Any]:
    """Return a usage object; what stands of the prompt in a cache is no input, as Anthropic counts."""
    prompt, cached = question.prompt_tokens, question.cached_tokens
    match question.dialect:
        case "llamacpp":
            read = cached or 0
            return {"cache_read_input_tokens": read, "input_tokens": prompt - read, "output_tokens": tokens}
        case "vllm" if cached is not None:
            created = question.created_cache_tokens
            kept = {"cache_creation_input_tokens": created, "cache_read_input_tokens": cached}
            return {"input_tokens": prompt - created - cached, "output_tokens": tokens} | kept
        case "sglang" if cached:
            return {"input_tokens": prompt - cached, "output_tokens": tokens, "cache_read_input_tokens": cached}
        case _:
            return {"input_tokens": prompt, "output_tokens": tokens}
