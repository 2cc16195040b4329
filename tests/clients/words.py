"""What a model server says, in the three APIs: errors as documents, and streams piece by piece.

`chat` and `responses` have vLLM's errors, `messages` has Anthropic's (platform.claude.com/docs/en/api/errors). The 401
and the 403 are OpenAI's (platform.openai.com/docs/guides/error-codes): a user of the edge compares with that.
"""

import json
from typing import Any, Final

from cases import BROKE, BUSY, REFUSED

FIRST_TEXT: Final = ("Half ", "an ")

_MESSAGES: Final = {
    400: f"This model's {REFUSED} tokens, and 2000 were asked for.",
    401: "Incorrect API key provided.",
    403: "The project does not have access to the model.",
    404: "The model `public/unknown` does not exist.",
    429: f"Try later, {BUSY}.",
    500: "The engine failed: out of memory.",
    503: "The engine is not ready.",
    504: "The engine took too long.",
}
_VLLM_TYPES: Final = {
    400: "BadRequestError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}
_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_document(api: str, status: int) -> dict[str, Any]:
    """Return the JSON of an error."""
    message = _MESSAGES[status]
    if api == "messages":
        return {
            "type": "error",
            "error": {"type": _ANTHROPIC_TYPES[status], "message": message},
            "request_id": "req_direct",
        }
    if status in (401, 403):
        code = "invalid_api_key" if status == 401 else "model_not_found"
        return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return {"error": {"message": message, "type": _VLLM_TYPES[status], "param": None, "code": status}}


def opening(api: str, model: str) -> list[bytes]:
    """Return the events of a stream up to, and without, its first text."""
    match api:
        case "chat":
            return [_chunk(model, {"role": "assistant", "content": ""})]
        case "responses":
            item = {"id": "msg_1", "type": "message", "status": "in_progress", "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            return [
                _named({"type": "response.created", "sequence_number": 0, "response": _response(model)}),
                _named(
                    {"type": "response.output_item.added", "sequence_number": 1, "output_index": 0, "item": item},
                ),
                _named(
                    {
                        "type": "response.content_part.added",
                        "sequence_number": 2,
                        "item_id": "msg_1",
                        "output_index": 0,
                        "content_index": 0,
                        "part": part,
                    }
                ),
            ]
        case _:
            message: dict[str, Any] = {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": model,
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {"input_tokens": 9, "output_tokens": 0},
            }
            block = {"type": "text", "text": ""}
            return [
                _named({"type": "message_start", "message": message}),
                _named({"type": "content_block_start", "index": 0, "content_block": block}),
            ]


def piece(api: str, model: str, text: str) -> bytes:
    """Return the event that carries a piece of text."""
    match api:
        case "chat":
            return _chunk(model, {"content": text})
        case "responses":
            return _named(
                {
                    "type": "response.output_text.delta",
                    "sequence_number": 3,
                    "item_id": "msg_1",
                    "output_index": 0,
                    "content_index": 0,
                    "delta": text,
                    "logprobs": [],
                }
            )
        case _:
            delta = {"type": "text_delta", "text": text}
            return _named({"type": "content_block_delta", "index": 0, "delta": delta})


def error_events(api: str) -> list[bytes]:
    """Return the events by which a stream reports that it failed."""
    message = f"Generation stopped: {BROKE}."
    match api:
        case "chat":
            error = {"message": message, "type": "InternalServerError", "param": None, "code": 500}
            return [_event({"error": error}), b"data: [DONE]\n\n"]
        case "responses":
            error = {"type": "error", "sequence_number": 4, "code": "server_error", "message": message, "param": None}
            return [_named(error)]
        case _:
            return [_named({"type": "error", "error": {"type": "api_error", "message": message}})]


def _event(value: object, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + f"data: {json.dumps(value)}\n\n".encode()


def _named(value: dict[str, Any]) -> bytes:
    return _event(value, value["type"])


def _chunk(model: str, delta: dict[str, Any]) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    return _event(
        {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [choice]}
    )


def _response(model: str) -> dict[str, Any]:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": model,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "output": [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": None,
    }
