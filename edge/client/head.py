"""What the head of a request says: path, host, client address, content type, and what of it goes upstream."""

import ipaddress
import re
from typing import Final

from aiohttp import HttpVersion10, HttpVersion11, hdrs
from multidict import istr

from edge.client.connection import Request
from edge.config.settings import ServerConfig
from edge.errors import InvalidRequest, UnsupportedCoding, UnsupportedMediaType, UnsupportedVersion
from edge.exchange import Exchange
from edge.ids import new_request_id

# What goes upstream of the client's headers; never a credential, a cookie or a header that steers an engine.
# `istr`: a name that is folded once, not at every look-up.
_FORWARDED: Final = tuple(
    map(istr, ("Accept", "traceparent", "tracestate", "anthropic-version", "anthropic-beta", "openai-beta"))
)
_X_REQUEST_ID: Final = istr("X-Request-Id")
_QUERY: Final = re.compile(r"[A-Za-z0-9._~%=&\[\]-]{0,512}")
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


def request_id_of(request: Request) -> str:
    """Return the client's own `x-request-id` when it is a plain one, else a new one."""
    given = request.headers.get(_X_REQUEST_ID)
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return new_request_id()


def target_of(request: Request, exchange: Exchange, server: ServerConfig) -> tuple[str, str]:
    """Return the raw path and the authority that are asked."""
    message = request.message
    exchange.client = _client_address(request, server) if server.trusted_proxies else request.connection.peer
    path = message.path
    if path.startswith("/"):
        authority = request.headers.get(hdrs.HOST, "")
    else:  # absolute form: the target's host is the one that counts (RFC 9112 section 3.2.2)
        authority = message.url.raw_authority or ""
        path = message.url.raw_path
    path = path.partition("?")[0]
    exchange.path = path[:256]
    return path, authority


def check_head(request: Request) -> None:
    """Accept what HTTP/1.1 allows. Raises: `UnsupportedVersion`, `UnsupportedCoding`, `InvalidRequest`."""
    message, headers = request.message, request.headers
    if message.version not in (HttpVersion11, HttpVersion10):
        raise UnsupportedVersion("this edge speaks HTTP/1.1 and HTTP/1.0")
    if message.chunked or hdrs.TRANSFER_ENCODING in headers:
        if message.version == HttpVersion10:
            raise InvalidRequest("an HTTP/1.0 request cannot have a transfer coding")
        if headers[hdrs.TRANSFER_ENCODING].strip().lower() != "chunked":
            raise UnsupportedCoding("the only transfer coding is chunked")
    if headers.get(hdrs.EXPECT, "100-continue").lower() != "100-continue" and message.version == HttpVersion11:
        raise InvalidRequest("the only expectation is 100-continue")


def _client_address(request: Request, server: ServerConfig) -> str:
    """Return the client's address; a trusted proxy's word counts, read from the right (RFC 7239 section 7.4)."""
    address = request.connection.peer
    hops = ",".join(request.headers.getall("X-Forwarded-For", [])).split(",")
    while hops and _is_trusted(address, server):
        hop = hops.pop().strip()
        try:
            address = _address_without_scope(hop)
        except ValueError:
            break
    return address


def _address_without_scope(text: str) -> str:
    """Return an address as it is usually written, an IPv4 one as such.

    Raises: `ValueError`, also for a scope: it may be any text.
    """
    if "%" in text:
        raise ValueError("a scope means nothing on another machine")
    address = ipaddress.ip_address(text)
    return str((isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped) or address)


def _is_trusted(address: str, server: ServerConfig) -> bool:
    if address == "unix":
        return True
    ip = ipaddress.ip_address(address)
    return any(ip in network for network in server.trusted_proxies)


def query_of(request: Request) -> str:
    """Return the query of a request with its question mark, "" for none. Raises: `InvalidRequest`."""
    query = request.message.path.partition("?")[2]
    if not _QUERY.fullmatch(query):
        raise InvalidRequest("the query is malformed: percent-encode it")
    return f"?{query}" if query else ""


def content_type_of(request: Request, *, form: bool) -> str:
    """Return the content type that goes upstream, of a `form` or of JSON. Raises: `UnsupportedMediaType`."""
    given = request.headers.get(hdrs.CONTENT_TYPE, "")
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedMediaType("a compressed body is not understood: send it without Content-Encoding")
    if form:
        if _media_type(given) != "multipart/form-data" or not _is_plain(given):
            raise UnsupportedMediaType("send a form: Content-Type: multipart/form-data; boundary=...")
        return given
    if given != "application/json" and _media_type(given) not in ("application/json", ""):
        raise UnsupportedMediaType("send JSON: Content-Type: application/json")
    return "application/json"


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def forwarded_head(request: Request, content_type: str) -> bytes:
    """Return the headers of a request that go upstream; no `content_type` is a request without a body."""
    head = f"Content-Type: {content_type}\r\n" if content_type else ""
    headers = request.headers
    for name in _FORWARDED:
        value = headers.get(name)
        if value is not None and _is_plain(value):
            head += f"{name}: {value}\r\n"
    return head.encode("ascii")


def _is_plain(value: str) -> bool:
    """Whether a header's value is visible ASCII, so that every parser reads it alike."""
    return value.isascii() and value.isprintable()
