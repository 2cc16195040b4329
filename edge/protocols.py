"""How each API words what the edge itself has to say: an error, an error within a stream, a heartbeat.

One object for each protocol; `operations.py` says which one a caller speaks.

Sources: platform.openai.com, "Error codes" and "Responses"; docs.anthropic.com, "Errors" and "Streaming messages".
"""

from typing import Final, NamedTuple

import orjson

from edge.errors import EdgeError
from edge.sse import HEARTBEAT, named_event, unnamed_event

_OVERLOADED: Final = 503
_MESSAGES_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    _OVERLOADED: "overloaded_error",
    504: "timeout_error",
}
# The codes of the Responses API that clients act on; any other failure is one of the server.
_RESPONSE_CODES: Final = {
    400: "invalid_prompt", 402: "insufficient_quota", 413: "invalid_prompt", 422: "invalid_prompt",
    429: "rate_limit_exceeded",
}  # fmt: skip
_KEPT_CODES: Final = ("context_length_exceeded",)


class Begun(NamedTuple):
    """What the events of a `responses` stream have shown of it so far.

    `created_at` is Unix seconds, `sequence_number` that of the last event, None where the server counts none.
    """

    response_id: str = ""
    created_at: float = 0
    model: str = ""
    sequence_number: int | None = None


NOTHING_BEGUN: Final = Begun(sequence_number=-1)


class Protocol:
    """What OpenAI's API says, and so every path that has no other protocol."""

    heartbeat: bytes = HEARTBEAT

    def id_lines(self, request_id: str) -> bytes:
        """Return the lines of a head that carry the id of a request."""
        return b"x-request-id: %b\r\n" % request_id.encode()

    def error_body(self, error: EdgeError, request_id: str) -> bytes:
        """Return the JSON body of an error: the only shape that all generations of the OpenAI SDKs parse."""
        return orjson.dumps({"error": _openai_error(error)})

    def error_event(self, error: EdgeError, request_id: str, begun: Begun) -> bytes:
        """Return the event that ends a stream which failed, and which every SDK turns into an exception."""
        return unnamed_event(self.error_body(error, request_id))


class _Messages(Protocol):
    """Anthropic's API: an SDK of it skips every event that it does not know, and takes half an answer for a whole."""

    heartbeat = named_event("ping", b'{"type": "ping"}')

    def id_lines(self, request_id: str) -> bytes:
        return b"request-id: %b\r\nx-request-id: %b\r\n" % (request_id.encode(), request_id.encode())

    def error_body(self, error: EdgeError, request_id: str) -> bytes:
        message, status = error.message, error.status
        if status == _OVERLOADED:  # its own status for that is 529, which no proxy between knows
            message += " (overloaded_error, as with status 529)"
        kind = _MESSAGES_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id})

    def error_event(self, error: EdgeError, request_id: str, begun: Begun) -> bytes:
        return named_event("error", self.error_body(error, request_id))


class _Responses(Protocol):
    """OpenAI's Responses API, whose streams end with the whole response, here one that failed.

    `error` stands beside it too: OpenAI's SDKs raise an exception for that, and for nothing else.
    """

    def error_event(self, error: EdgeError, request_id: str, begun: Begun) -> bytes:
        code = error.error_code
        if code not in _KEPT_CODES:
            code = _RESPONSE_CODES.get(error.status, "server_error")
        response = {
            "id": begun.response_id or f"resp_{request_id}",
            "object": "response",
            "created_at": begun.created_at,
            "status": "failed",
            "error": {"code": code, "message": error.message},
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": begun.model,
            "output": [],
            "parallel_tool_calls": True,
            "temperature": None,
            "tool_choice": "auto",
            "tools": [],
            "top_p": None,
            "usage": None,
        }
        event: dict[str, object] = {"type": "response.failed"}
        if begun.sequence_number is not None:
            event["sequence_number"] = begun.sequence_number + 1
        return named_event(
            "response.failed", orjson.dumps(event | {"response": response, "error": _openai_error(error)})
        )


def _openai_error(error: EdgeError) -> dict[str, object]:
    return {
        "message": error.message, "type": error.kind, "param": error.param, "code": error.error_code, **error.details
    }  # fmt: skip


OPENAI: Final = Protocol()
MESSAGES: Final = _Messages()
RESPONSES: Final = _Responses()
