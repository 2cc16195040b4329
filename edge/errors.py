"""Every failure by name: its status, its OpenAI type and code, who caused it, and whether another try is safe.

One place, `proxy.py`, turns an `EdgeError` into HTTP, in the words of the caller's protocol (`protocols.py`). What an
upstream says of its own failures becomes one of these in `upstream_errors.py`. A message is read by the caller: it
never holds an address of an upstream, a key, a digest, a file's path, a parser's quote of the input, or a stack.
"""

import enum
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final


class Origin(enum.Enum):
    """Who caused a failure."""

    CLIENT = "client"
    EDGE = "edge"
    UPSTREAM = "upstream"


_NO_DETAILS: Final[Mapping[str, int]] = {}
_DENIED: Final = "http_request_denied"
NO_LIMIT: Final = ("", "")
# SDKs wait as long as `Retry-After` says up to a minute, and Vercel's less than one; past that they go by their own.
LONGEST_RETRY_AFTER_S: Final = 59


class EdgeError(Exception):
    """A failure that has a name.

    `safe_elsewhere`: no endpoint has begun the work, so another endpoint may be asked.
    `should_retry` becomes `x-should-retry`: False where the client's retry cannot help, None to leave it to the SDK.
    `proxy_error` is the type of RFC 9209, for `Proxy-Status`, and `received_status` what the upstream answered, 0 for
    nothing.
    `details` are counts that an engine gives beside its message, such as the size of its context.
    `cause` is what befell a connection, for operators alone: a word, and more behind a colon. `limit` is the limit that
    refused the request, and what of it was used up.
    """

    status: int = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    origin: ClassVar[Origin] = Origin.EDGE
    safe_elsewhere: ClassVar[bool] = False
    proxy_error: str = "proxy_internal_error"
    received_status: int = 0
    should_retry: bool | None = None
    details: Mapping[str, int] = _NO_DETAILS
    cause: str = ""
    limit: tuple[str, str] = NO_LIMIT

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


class Unusable(Exception):
    """What the process or a command needs cannot be used as it is; the message tells an operator what to change."""


class InternalError(EdgeError):
    """A defect of the edge itself."""


class _ClientError(EdgeError):
    kind = "invalid_request_error"
    origin = Origin.CLIENT
    proxy_error = "http_request_error"
    should_retry: bool | None = False


class InvalidRequest(_ClientError, status=400, code="invalid_request_error"):
    """400: the request cannot be understood."""


class Unauthenticated(_ClientError, status=401, code="invalid_api_key"):
    """401: no key, or none that is known (RFC 6750 section 3)."""

    kind = "authentication_error"
    proxy_error = _DENIED


class OutOfQuota(_ClientError, status=402, code="insufficient_quota"):
    """402: the key or its user has used up what was paid."""

    kind = "insufficient_quota"
    proxy_error = _DENIED


class PermissionDenied(_ClientError, status=403, code="permission_denied"):
    """403: a deny pattern of the key names this model."""

    kind = "permission_error"
    proxy_error = _DENIED


class ModelNotFound(_ClientError, status=404, code="model_not_found"):
    """404: no such model, or not the caller's; the two look the same."""

    @classmethod
    def named(cls, shown: str) -> "ModelNotFound":
        """Return the error for a model as it is `shown` to the caller."""
        return cls(f"The model {shown} does not exist or you do not have access to it.", param="model")


class PathNotFound(_ClientError, status=404, code="not_found"):
    """404: no such path, here or at the model's server."""


class ResponseNotFound(_ClientError, status=404, code="response_not_found"):
    """404: no such response, or not the caller's; the two look the same."""


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
    """429: too much at once; `retry_after_s` says when to come back.

    `wait_s`, of a limit here, says when exactly, 0 where that depends on requests that run.
    """

    kind = "rate_limit_error"
    origin = Origin.CLIENT
    wait_s: float = math.inf
    proxy_error = _DENIED


class QuotaSpent(RateLimited, code="insufficient_quota"):
    """429: what a day or a month allows is used up; `retry_after_s` is how long that lasts."""

    kind = "insufficient_quota"


class UpgradeRequired(_ClientError, status=426, code="websocket_not_supported"):
    """426: a WebSocket is asked for, and only HTTP is spoken (RFC 9110 section 15.5.22)."""


class HeadersTooLarge(_ClientError, status=431, code="headers_too_large"):
    """431: the header section is over the limit (RFC 6585 section 5)."""


class UnsupportedCoding(_ClientError, status=501, code="unsupported_transfer_coding"):
    """501: a transfer coding that is not `chunked` (RFC 9112 section 6.1)."""


class NotSupported(_ClientError, status=501, code="not_supported"):
    """501: the model's server does not do what was asked."""


class RefusedByInstance(_ClientError, status=400, code="invalid_request_error"):
    """A 4xx of a user's own server, whose words are for its owner."""

    def __init__(self, status: int, message: str, **more: Any) -> None:
        super().__init__(message, **more)
        self.status = status


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
    proxy_error = "destination_unavailable"


class ConnectFailed(UpstreamUnavailable):
    """503: no connection to an endpoint; nothing was sent, so another endpoint may be asked."""

    safe_elsewhere = True


class UpstreamError(EdgeError, status=502, code="upstream_error"):
    """502: the upstream failed, or answered what cannot be passed on."""

    origin = Origin.UPSTREAM
    proxy_error = "http_response_incomplete"


class UpstreamTimeout(EdgeError, status=504, code="upstream_timeout"):
    """504: the upstream was too slow."""

    origin = Origin.UPSTREAM
    proxy_error = "http_response_timeout"


class BrokenStream(EdgeError, status=502, code="upstream_disconnected"):
    """An answer that began ends too early, for whatever reason: what the last event of its stream says."""

    origin = Origin.UPSTREAM
