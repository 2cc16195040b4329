"""What goes wrong, as each dialect words it: documents, ends of streams, paths that are not there."""

from collections.abc import Mapping
from http import HTTPStatus
from http.client import responses as phrases
from typing import Any, Final

from edge.simulator import chat, messages, responses
from edge.simulator.behaviour import FASTAPI, Dialect, Refusal
from edge.simulator.questions import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Question
from edge.simulator.scripts import DONE, Script, data, document, event, spaced_data

FAILURE: Final = "The simulated engine failed with status %d."
_LLAMACPP_KINDS: Final = {  # format_error_response in its server
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


def error_document(
    dialect: Dialect,
    status: int,
    message: str,
    param: str | None = None,
    *,
    path: str = CHAT,
    kind: str | None = None,
    code: str | None = None,
    members: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the JSON body of an error as this kind of server words it on this path; the rest as in `Refusal`."""
    if status == 401 and dialect in FASTAPI:
        return {"error": "Unauthorized"}
    match dialect:
        case "vllm":
            return _vllm_document(path, status, message, param, kind)
        case "sglang":
            return _sglang_document(path, status, message, param, kind)
        case "llamacpp":
            name = kind or _LLAMACPP_KINDS.get(status, "server_error")
            return {"error": {"code": status, "message": message, "type": name} | dict(members or {})}
        case "openai":
            name = kind or ("invalid_request_error" if status < 500 else "server_error")
            code = code or _OPENAI_CODES.get((status, param)) or _OPENAI_CODES.get((status, None))
            return {"error": {"message": message, "type": name, "param": param, "code": code}}


def refusal(dialect: Dialect, path: str, refused: Refusal) -> Script:
    """Return the answer to what is refused."""
    said = error_document(
        dialect,
        refused.status,
        refused.message,
        refused.param,
        path=path,
        kind=refused.kind,
        code=refused.code,
        members=refused.members,
    )
    return document(dialect, said, status=refused.status)


def _vllm_document(path: str, status: int, message: str, param: str | None, kind: str | None) -> dict[str, Any]:
    """Errors of its own on `/v1/messages` are as Anthropic's; those of its framework never are."""
    if kind == "detail":
        return {"detail": message}
    if path.startswith(MESSAGES) and kind is None:
        return {"type": "error", "error": {"type": _error_kind(status), "message": message}}
    return {"error": {"message": message, "type": kind or _error_kind(status), "param": param, "code": status}}


def _sglang_document(path: str, status: int, message: str, param: str | None, kind: str | None) -> dict[str, Any]:
    if path.startswith(MESSAGES):
        said = message if status < 500 else "Internal server error"
        return {"type": "error", "error": {"type": kind or messages.error_kind(status), "message": said}}
    if path.startswith(RESPONSES):
        name = kind or ("invalid_request_error" if status < 500 else phrases.get(status, "Unknown"))
        return {"error": {"message": message, "type": name, "param": param, "code": status}}
    name = kind or (_error_kind(status) if status in (400, 500) else str(status))
    return {"object": "error", "message": message, "type": name, "param": param, "code": status}


def _error_kind(status: int) -> str:
    """Return vLLM's and SGLang's name for a status: `BadRequestError`, `NotFoundError`, `InternalServerError`."""
    words = phrases.get(status, "Unknown").title().replace(" ", "").replace("-", "")
    return words.removesuffix("Error") + "Error"


# --- Streams that fail


def error_frames(
    path: str, dialect: Dialect, status: int, question: Question | None = None, sent: int = 0, tokens: int = 0
) -> tuple[bytes, ...]:
    """Return the frames by which a stream reports that it failed, behind `sent` frames with `tokens` tokens.

    Without a question, nothing is told of what was used.
    """
    message = FAILURE % status
    if dialect == "llamacpp":
        error = {"code": status, "message": message, "type": _LLAMACPP_KINDS.get(status, "server_error")}
        return (event(error, "error"),) if path == MESSAGES else (data({"error": error}),)
    if path == MESSAGES:
        return _message_frames(dialect, status, message, sent)
    if path == RESPONSES:
        return responses.failed_frames(dialect, question, message, sent, tokens)
    match dialect:
        case "vllm":
            return spaced_data(error_document(dialect, status, message, kind=_error_kind(status))), DONE
        case "sglang":
            error = {"object": "error", "message": message, "type": _status_name(status), "param": None, "code": status}
            used: tuple[bytes, ...] = ()
            if question is not None and question.usage:
                used = (chat.usage_frame(question, tokens, text=path == COMPLETIONS),)
            return (spaced_data({"error": error}), *used, DONE)
        case _:
            return (data(error_document(dialect, status, message)),)


def _message_frames(dialect: Dialect, status: int, message: str, sent: int) -> tuple[bytes, ...]:
    """End a stream of a message: with the error itself, or as SGLang, which ends it as every other."""
    if dialect == "sglang":
        block = (messages.block_stop(),) if sent > 1 else ()
        return (*block, *messages.failed_frames(message, status))
    kind = "internal_error" if dialect == "vllm" else "api_error"
    return (event({"type": "error", "error": {"type": kind, "message": message}}),)


def _status_name(status: int) -> str:
    return HTTPStatus(status).name if status in phrases else "INTERNAL_SERVER_ERROR"


# --- Paths that are not there


def no_path(dialect: Dialect, method: str, path: str) -> Script:
    """Return the answer to a path that this kind of server has not, or has not for this model."""
    match dialect:
        case "llamacpp":
            missing: object = {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}
        case "openai":
            missing = error_document(dialect, 404, f"Invalid URL ({method} {path})")
        case _:
            missing = {"detail": "Not Found"}
    return document(dialect, missing, status=404)


def no_method(dialect: Dialect, method: str, path: str, allowed: str) -> Script:
    """Return the answer to a method that a path has not; llama.cpp knows no path without it."""
    match dialect:
        case "llamacpp":
            return no_path(dialect, method, path)
        case "openai":
            said = f"Not allowed to {method} on {path}. (HINT: Perhaps you meant to use a different HTTP method?)"
            return document(dialect, error_document(dialect, 405, said, code="method_not_supported"), status=405)
        case _:
            return document(dialect, {"detail": "Method Not Allowed"}, status=405, headers=(f"allow: {allowed}",))
