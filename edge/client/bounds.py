"""How large the head of a request may be, and the error for one that is larger, or no head at all."""

from typing import Final

from aiohttp.http_exceptions import LineTooLong

from edge.errors import EdgeError, HeadersTooLarge, InvalidRequest, UriTooLong

MAX_REQUEST_LINE_BYTES: Final = 8190
MAX_FIELD_BYTES: Final = 16_384  # of one header; unlike the request line's, so that an error tells which it was
MAX_FIELDS: Final = 100  # Envoy's default
MAX_HEAD_BYTES: Final = 64 * 1024


def head_too_large() -> HeadersTooLarge:
    """Return the error for a head over the bound."""
    return HeadersTooLarge(f"the head of the request is over {MAX_HEAD_BYTES} bytes")


def parser_error(error: BaseException | None) -> EdgeError:
    """Return what the parser refused as an error of ours; nothing quotes the input, which may hold a key."""
    if isinstance(error, LineTooLong):
        if error.args[1] == MAX_REQUEST_LINE_BYTES:
            return UriTooLong(f"the request line is over {MAX_REQUEST_LINE_BYTES} bytes")
        return HeadersTooLarge(f"a header is over {MAX_FIELD_BYTES} bytes")
    if "Too many headers" in str(error):
        return HeadersTooLarge(f"the request has more than {MAX_FIELDS} headers")
    return InvalidRequest("the request is not valid HTTP/1.1")
