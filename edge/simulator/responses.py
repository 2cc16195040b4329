"""The Responses API, as vLLM, SGLang, llama.cpp and OpenAI serve it.

A limit of tokens ends vLLM's answer as `response.completed` with status `incomplete`, SGLang's as
`response.incomplete`, and llama.cpp's as if it were complete. llama.cpp numbers nothing.
"""

import itertools
from typing import Any, Final

from edge.simulator import usage
from edge.simulator.behaviour import Dialect
from edge.simulator.questions import Question
from edge.simulator.scripts import CREATED, Script, answer_text, event, events, pieces

_BEGINNING: Final = 2  # events that every response begins with
_LIMIT: Final = {"reason": "max_output_tokens"}
_UNCACHED: Final = ("cache-control: no-cache", "connection: keep-alive")  # which SGLang sends here alone
_LLAMACPP_MEMBERS: Final = ("id", "object", "created_at", "status", "model", "output", "usage")  # at a stream's end


def response_document(question: Question) -> dict[str, Any]:
    """Return a response that is at its end."""
    status = _status(question)
    match question.dialect:
        case "vllm":
            return _vllm(question, status, [_item(question)])
        case "sglang":
            return _sglang(question, status, [_item(question)])
        case "llamacpp":
            return _llamacpp(question)
        case "openai":
            return _openai(question, status, [_item(question)])


def response_stream(question: Question) -> Script:
    """Return the stream of a response; llama.cpp's first and last chunks have several events."""
    if question.dialect == "llamacpp":
        return _llamacpp_stream(question)
    numbers = itertools.count()
    text, said = answer_text(question.tokens), pieces(question)
    at = _at(question)
    item = _item(question)

    def numbered(kind: str, **members: Any) -> bytes:
        return _numbered(question, kind, next(numbers), members)

    frames = [
        numbered("created", response=_begun(question)),
        numbered("in_progress", response=_begun(question)),
        numbered("output_item.added", item=item | {"content": [], "status": "in_progress"}, output_index=0),
        numbered("content_part.added", **at, part=_part(question, "")),
        *(numbered("output_text.delta", **at, delta=piece, logprobs=[]) for piece, _ in said),
        numbered("output_text.done", **at, logprobs=[], text=text),
        numbered("content_part.done", **at, part=_part(question, text)),
        numbered("output_item.done", item=item, output_index=0),
        numbered(_ending(question), response=response_document(question)),
    ]
    return events(frames, question, lead=4, headers=_UNCACHED if question.dialect == "sglang" else (), said=said)


def failed_frames(
    dialect: Dialect, question: Question | None, message: str, sent: int, tokens: int
) -> tuple[bytes, ...]:
    """Return how the stream of a response ends that failed behind `sent` frames with `tokens` tokens.

    vLLM 0.32.0 has no event for it: what it makes does not pass its own checks, and the connection ends, which is the
    fault `cut`. Here it fails as OpenAI's does. An error of llama.cpp is the same in every stream.
    """
    if dialect == "sglang":
        return _sglang_failed(question, message, sent, tokens)
    error = {"type": "error", "sequence_number": sent, "code": "server_error", "message": message, "param": None}
    return (event(error),)


def _sglang_failed(question: Question | None, message: str, sent: int, tokens: int) -> tuple[bytes, ...]:
    """Return every end of a part that has begun, then `response.failed` with what was used, if there was a question."""
    asked = question or Question("sglang", "default", 0, "stop", 0)
    text = answer_text(tokens)
    item = _item(asked) | {"content": [_part(asked, text)]}
    ends: list[tuple[str, dict[str, Any]]] = []
    if sent > _BEGINNING:
        ends = [
            ("output_text.done", {**_at(asked), "logprobs": [], "text": text}),
            ("content_part.done", {**_at(asked), "part": _part(asked, text)}),
            ("output_item.done", {"item": item, "output_index": 0}),
        ]
    failed = _sglang(asked, "failed", [item] if ends else []) | {
        "usage": _usage(asked, tokens) if question else None,
        "error": {"code": "server_error", "message": message},
    }
    ends.append(("failed", {"response": failed}))
    return tuple(_numbered(asked, kind, sent + at, members) for at, (kind, members) in enumerate(ends))


def _status(question: Question) -> str:
    return "incomplete" if question.finish == "length" else "completed"


def _ending(question: Question) -> str:
    """Return the name of the last event; vLLM's is the same however the answer ends."""
    return "completed" if question.dialect == "vllm" else _status(question)


def _numbered(question: Question, kind: str, number: int, members: dict[str, Any]) -> bytes:
    """Return an event with the members in the order of the dialect."""
    name = f"response.{kind}"
    if question.dialect == "openai" or (question.dialect == "sglang" and "response" in members):
        return event({"type": name} | members | {"sequence_number": number})
    return event(dict(sorted((members | {"sequence_number": number, "type": name}).items())))


def _at(question: Question) -> dict[str, Any]:
    return {"content_index": 0, "item_id": question.id("item"), "output_index": 0}


def _part(question: Question, text: str) -> dict[str, Any]:
    match question.dialect:
        case "llamacpp":
            return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}
        case "openai":
            return {"type": "output_text", "text": text, "annotations": []}
        case _:
            logprobs: list[Any] | None = [] if question.dialect == "vllm" and not text else None
            return {"annotations": [], "text": text, "type": "output_text", "logprobs": logprobs}


def _item(question: Question) -> dict[str, Any]:
    content = [_part(question, answer_text(question.tokens))]
    item = {"id": question.id("item"), "content": content, "role": "assistant", "status": "completed"}
    match question.dialect:
        case "llamacpp":
            return {"content": item.pop("content")} | item | {"type": "message"}
        case "vllm":
            return item | {"type": "message", "phase": None}
        case "sglang":
            return item | {"type": "message", "phase": "final_answer"}
        case _:
            return item | {"type": "message"}


def _begun(question: Question) -> dict[str, Any]:
    """Return a response that is in progress."""
    match question.dialect:
        case "vllm":
            return _vllm(question, "in_progress", [])
        case "sglang":
            return _sglang(question, "in_progress", [])
        case _:
            return _openai(question, "in_progress", [])


def _usage(question: Question, tokens: int) -> dict[str, Any]:
    prompt, cached = question.prompt_tokens, question.cached_tokens or 0
    read: dict[str, Any] = {"cached_tokens": cached}
    wrote: dict[str, Any] = {"reasoning_tokens": 0}
    if question.dialect == "vllm":
        created = 0 if question.cached_tokens is None else question.created_cache_tokens
        read |= {"cache_write_tokens": created, "input_tokens_per_turn": [], "cached_tokens_per_turn": []}
        wrote |= {"tool_output_tokens": 0, "output_tokens_per_turn": [], "tool_output_tokens_per_turn": []}
    elif question.dialect == "sglang":
        read |= {"cache_write_tokens": 0}
    total = prompt + tokens
    if question.dialect == "llamacpp":
        counts = {"input_tokens": prompt, "output_tokens": tokens, "total_tokens": total}
        return counts | {"input_tokens_details": read}
    return {
        "input_tokens": prompt,
        "input_tokens_details": read,
        "output_tokens": tokens,
        "output_tokens_details": wrote,
        "total_tokens": total,
    }


def _used(question: Question, status: str) -> dict[str, Any] | None:
    return None if status == "in_progress" else _usage(question, question.tokens)


def _vllm(question: Question, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    head = {
        "id": question.id("response"),
        "created_at": CREATED,
        "incomplete_details": _LIMIT if status == "incomplete" else None,
        "instructions": None,
        "metadata": None,
        "model": question.model,
        "object": "response",
        "output": output,
    }
    given = {
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "none",
        "tools": [],
        "top_p": 1.0,
        "background": False,
        "max_output_tokens": question.limit,
        "max_tool_calls": None,
        "previous_response_id": question.previous_response_id,
        "prompt": None,
        "reasoning": None,
        "service_tier": "auto",
    }
    end: dict[str, Any] = {"status": status, "text": None, "top_logprobs": None, "truncation": "disabled"}
    end |= {"usage": _used(question, status), "user": None, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    nothing = ("kv_transfer_params", "ec_transfer_params", "input_messages", "output_messages")
    return head | given | end | dict.fromkeys(nothing)


def _sglang(question: Question, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": question.id("response"),
        "object": "response",
        "created_at": CREATED,
        "model": question.model,
        "output": output,
        "status": status,
        "usage": _used(question, status),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "error": None,
        "incomplete_details": _LIMIT if status == "incomplete" else None,
        "instructions": None,
        "max_output_tokens": question.limit,
        "previous_response_id": question.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "store": question.store,
        "temperature": None,
        "text": None if status == "in_progress" else {"format": {"type": "text"}},
        "top_p": None,
        "truncation": "disabled",
        "user": None,
        "metadata": {},
    }


def _openai(question: Question, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": question.id("response"),
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "error": None,
        "incomplete_details": _LIMIT if status == "incomplete" else None,
        "max_output_tokens": question.limit,
        "model": question.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": question.previous_response_id,
        "store": question.store,
        "tool_choice": "auto",
        "tools": [],
        "usage": _used(question, status),
    }


def _llamacpp(question: Question) -> dict[str, Any]:
    """Return a whole response, which is complete whatever ended it."""
    head = {"completed_at": CREATED, "created_at": CREATED, "id": question.id("response"), "model": question.model}
    end = {"status": "completed", "usage": _usage(question, question.tokens)}
    return head | {"object": "response", "output": [_item(question)]} | end


def _llamacpp_stream(question: Question) -> Script:
    begun = {"id": question.id("response"), "object": "response", "status": "in_progress"}
    item_id = question.id("item")
    item = _item(question)
    text = answer_text(question.tokens)

    def plain(kind: str, **members: Any) -> bytes:
        return event({"type": f"response.{kind}"} | members)

    opening = [
        plain("created", response=begun),
        plain("in_progress", response=begun),
        plain("output_item.added", item=item | {"content": [], "status": "in_progress"}),
        plain("content_part.added", item_id=item_id, part={"type": "output_text", "text": ""}),
    ]
    said = pieces(question)
    deltas = [plain("output_text.delta", item_id=item_id, delta=piece) for piece, _ in said]
    # Its stream has the members of a document in another order.
    done = {name: item[name] for name in ("type", "status", "id", "content", "role")}
    document = _llamacpp(question) | {"output": [done]}
    whole = {name: document[name] for name in _LLAMACPP_MEMBERS}
    closing = [
        plain("output_text.done", item_id=item_id, text=text),
        plain("content_part.done", item_id=item_id, part=_part(question, text)),
        plain("output_item.done", item=done),
        plain("completed", response=whole, timings=usage.timings(question)),
    ]
    joined = [b"".join(opening + deltas[:1]), *deltas[1:], b"".join(closing)]
    return events(joined, question, lead=0, said=said)
