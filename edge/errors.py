"""Every failure by name: its status, its OpenAI type and code, who caused it, and whether another try is safe.

One place, `proxy.py`, turns an `EdgeError` into HTTP with `body()`. The body is always
`{"error": {"message", "type", "param", "code"}}`, the only shape that all generations of the OpenAI SDKs parse.
A message is read by the caller: it never holds an address of an upstream, a key, a digest, a file's path,
a parser's quote of the input, or a stack.
"""

import enum
from typing import ClassVar

import orjson


class Origin(enum.Enum):
    """Who caused a failure."""

    CLIENT = "client"
    EDGE = "edge"
    UPSTREAM = "upstream"


def error_body(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    """Return the JSON of one error in OpenAI's shape."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


class EdgeError(Exception):
    """A failure that has a name.

    `safe_elsewhere`: no endpoint has begun the work, so another endpoint may be asked.
    `should_retry` becomes `x-should-retry`: False where the client's retry cannot help, None to leave it to the SDK.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    origin: ClassVar[Origin] = Origin.EDGE
    safe_elsewhere: ClassVar[bool] = False
    should_retry: ClassVar[bool | None] = None

    def __init_subclass__(cls, status: int = 0, code: str = "") -> None:
        cls.status, cls.code = status or cls.status, code or cls.code

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code or self.code
        self.retry_after_s = retry_after_s
        self.headers = headers

    def body(self) -> bytes:
        """Return the JSON body of this error."""
        return error_body(self.message, self.kind, self.param, self.error_code)


class Unusable(Exception):
    """What the process or a command needs cannot be used as it is; the message tells an operator what to change."""


class InternalError(EdgeError):
    """A defect of the edge itself."""


class _ClientError(EdgeError):
    kind = "invalid_request_error"
    origin = Origin.CLIENT
    should_retry: ClassVar[bool | None] = False


class InvalidRequest(_ClientError, status=400, code="invalid_request_error"):
    """400: the request cannot be understood."""


class Unauthenticated(_ClientError, status=401, code="invalid_api_key"):
    """401: no key, or none that is known (RFC 6750 section 3)."""

    kind = "authentication_error"


class OutOfQuota(_ClientError, status=402, code="insufficient_quota"):
    """402: the key or its user has used up what was paid."""

    kind = "insufficient_quota"


class PermissionDenied(_ClientError, status=403, code="permission_denied"):
    """403: a deny pattern of the key names this model."""

    kind = "permission_error"


class ModelNotFound(_ClientError, status=404, code="model_not_found"):
    """404: no such model, or not the caller's; the two look the same."""

    @classmethod
    def named(cls, shown: str) -> "ModelNotFound":
        """Return the error for a model as it is `shown` to the caller."""
        return cls(f"The model {shown} does not exist or you do not have access to it.", param="model")


class PathNotFound(_ClientError, status=404, code="not_found"):
    """404: no such path."""


class MethodNotAllowed(_ClientError, status=405, code="method_not_allowed"):
    """405: the path exists, the method does not."""


class RequestTimeout(_ClientError, status=408, code="request_timeout"):
    """408: the client was too slow to send its request."""

    should_retry = None


class RequestTooLarge(_ClientError, status=413, code="request_too_large"):
    """413: the body is over the limit."""


class UriTooLong(_ClientError, status=414, code="uri_too_long"):
    """414: the request line is over the limit."""


class UnsupportedMediaType(_ClientError, status=415, code="unsupported_media_type"):
    """415: not the content type of this path."""


class MisdirectedRequest(_ClientError, status=421, code="misdirected_request"):
    """421: no route of this edge serves the host that was asked (RFC 9110 section 15.5.20)."""


class UnprocessableRequest(_ClientError, status=422, code="invalid_request_error"):
    """422: the upstream refused the values of the request."""


class RateLimited(EdgeError, status=429, code="rate_limit_exceeded"):
    """429: too much at once; `retry_after_s` says when to come back."""

    kind = "rate_limit_error"
    origin = Origin.CLIENT


class HeadersTooLarge(_ClientError, status=431, code="headers_too_large"):
    """431: the header section is over the limit (RFC 6585 section 5)."""


class UnsupportedCoding(_ClientError, status=501, code="unsupported_transfer_coding"):
    """501: a transfer coding that is not `chunked` (RFC 9112 section 6.1)."""


class UnsupportedVersion(_ClientError, status=505, code="unsupported_http_version"):
    """505: not HTTP/1.0 or HTTP/1.1."""


class Overloaded(EdgeError, status=503, code="overloaded"):
    """503: the edge itself has no room for this request now."""


class OutOfPorts(Overloaded):
    """503: no local port is left towards an endpoint; nothing was sent, and another address has ports of its own."""

    safe_elsewhere = True


class JournalUnavailable(EdgeError, status=503, code="journal_unavailable"):
    """503: what the request would use cannot be recorded, so it is not begun."""


class KeyStoreUnavailable(EdgeError, status=503, code="key_store_unavailable"):
    """503: who calls cannot be proved now; never a reason to say 401."""


class UpstreamUnavailable(EdgeError, status=503, code="upstream_unavailable"):
    """503: nobody serves this model now."""

    origin = Origin.UPSTREAM


class ConnectFailed(UpstreamUnavailable):
    """503: no connection to an endpoint; nothing was sent, so another endpoint may be asked."""

    safe_elsewhere = True


class UpstreamError(EdgeError, status=502, code="upstream_error"):
    """502: the upstream failed, or answered what cannot be passed on."""

    origin = Origin.UPSTREAM


class UpstreamTimeout(EdgeError, status=504, code="upstream_timeout"):
    """504: the upstream was too slow."""

    origin = Origin.UPSTREAM


# --- errors of upstreams

_MAX_MESSAGE_LENGTH = 4000
_BROKEN = "The model's server failed to answer this request."
_KEPT: dict[int, type[EdgeError]] = {
    400: InvalidRequest,
    404: ModelNotFound,
    413: RequestTooLarge,
    422: UnprocessableRequest,
    429: RateLimited,
}


def from_upstream(status: int, body: bytes, retry_after: bytes = b"") -> EdgeError:
    """Return an upstream's error in our shape, whatever shape it had.

    What the caller can act on keeps its status and message: 400, 404, 413, 422, 429. A 401, 403, 407, 409 or 3xx is a
    fault between the edge and the upstream, so our 502; and openai 0.28.1 repeats a 409 for ever, without a pause.
    """
    pause_s = _pause_s(retry_after) if status in (429, 503) else None
    kept = _KEPT.get(status)
    if kept is not None:
        message, param, code = _read(body)
        return kept(message or _BROKEN, param=param, code=code, retry_after_s=pause_s)
    if status == 503:
        return UpstreamUnavailable("The model is overloaded or not ready, try again.", retry_after_s=pause_s)
    if status in (408, 504):
        return UpstreamTimeout("The model's server timed out.")
    return UpstreamError(_BROKEN)


def _pause_s(retry_after: bytes) -> int:
    """Return whole seconds from 1 to 60: SDKs sleep that long, and litellm parses with `int()`."""
    return min(max(int(retry_after[:6]), 1), 60) if retry_after.isdigit() else 1


def _read(body: bytes) -> tuple[str, str | None, str | None]:
    """Return message, param and code of an error of vLLM, SGLang (flat), llama.cpp or FastAPI (`detail`)."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        data = None
    error = data.get("error", data.get("detail", data)) if isinstance(data, dict) else None
    if isinstance(error, list):  # FastAPI's validation errors
        error = error[0] if error else None
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        return "", None, None
    message = error.get("message", error.get("msg"))
    param, code = error.get("param"), error.get("code")
    return (
        message[:_MAX_MESSAGE_LENGTH] if isinstance(message, str) else "",
        param if isinstance(param, str) else None,
        code if isinstance(code, str) else None,
    )
