"""What the head of a request says: path, host, client address, content type, and what of it goes upstream."""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aiohttp import HttpVersion10, HttpVersion11, hdrs
from aiohttp.http_parser import RawRequestMessage
from multidict import CIMultiDictProxy, istr

from edge.config.process_settings import ServerConfig
from edge.config.values import Network
from edge.errors import InvalidRequest, UnsupportedCoding, UnsupportedMediaType, UnsupportedVersion
from edge.exchange import Credential
from edge.operations import UNKNOWN, Asked, asked_at
from edge.traces import Trace, read_trace

# What goes upstream of the client's headers; never a credential, a cookie or a header that steers an engine.
# `istr`: a name that is folded once, not at every look-up.
_FORWARDED: Final = tuple(map(istr, ("Accept", "anthropic-version", "anthropic-beta", "openai-beta")))
_TRACEPARENT, _TRACESTATE = istr("traceparent"), istr("tracestate")
_X_REQUEST_ID: Final = istr("X-Request-Id")
_QUERY: Final = re.compile(r"[A-Za-z0-9._~%=&\[\]-]{0,512}")
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_NOTHING: Final = Asked(UNKNOWN, ())


class Head:
    """What the head of a request says, each thing worked out once: a head that comes again is the same object.

    `path` is raw and without its query, `request_id` the client's own when it is a plain one, else "". `bare` is
    HTTP/1.0: no chunks, and the end of the connection ends the answer; `is_last` says that no request follows, `is_odd`
    that the body may end elsewhere for who sent it, so that what comes next is none (RFC 9112 section 6.3). `trace` is
    the one that it belongs to.
    What is not there yet is false: whoever needs it calls the method that works it out. `Content-Length` is that of the
    request which showed the head first.
    """

    __slots__ = (
        "asked", "authority", "bare", "content_type", "credential", "forwarded", "headers", "is_checked", "is_last",
        "is_odd", "message", "method", "path", "paths", "plan", "request_id", "trace",
    )  # fmt: skip

    def __init__(self, message: RawRequestMessage) -> None:
        self.message = message
        self.method: str = message.method
        self.headers: CIMultiDictProxy[str] = message.headers
        given = self.headers.get(_X_REQUEST_ID)
        self.request_id = given if given is not None and _REQUEST_ID.fullmatch(given) else ""
        traces = self.headers.getall(_TRACEPARENT, ())
        self.trace: Trace | None = read_trace(traces[0]) if len(traces) == 1 else None
        self.bare = message.version == HttpVersion10
        # A tunnel is never opened, so what would go through it must not be taken for requests (RFC 9110 section 7.8).
        tunnel = message.upgrade or message.method == "CONNECT"
        coding = self.headers.get(hdrs.TRANSFER_ENCODING, "chunked").strip().lower()
        self.is_odd = coding != "chunked" or not _expects_what_is_known(self.headers)
        self.is_last = message.should_close or tunnel or message.version != HttpVersion11 or self.is_odd
        path = message.path
        if path.startswith("/"):
            self.authority = self.headers.get(hdrs.HOST, "")
        else:  # absolute form: the target's host is the one that counts (RFC 9112 section 3.2.2)
            self.authority = message.url.raw_authority or ""
            path = message.url.raw_path
        self.path = path.partition("?")[0]
        self.paths: Mapping[str, Asked] | None = None  # of the generation that `asked` is of
        self.asked = _NOTHING
        self.is_checked = False
        self.credential: Credential | None = None  # which the proxy reads
        self.plan: Any = None  # which the proxy keeps here
        self.content_type = ""
        self.forwarded = b""

    def ask(self, paths: Mapping[str, Asked]) -> Asked:
        """Return what the path asks for; `paths` are those of a generation."""
        self.asked = paths.get(self.path) or asked_at(self.path, paths)
        self.paths = paths
        self.content_type, self.forwarded = "", b""
        return self.asked

    def check(self) -> None:
        """Accept what HTTP/1.1 allows. Raises: `UnsupportedVersion`, `UnsupportedCoding`, `InvalidRequest`."""
        message, headers = self.message, self.headers
        if message.version not in (HttpVersion11, HttpVersion10):
            raise UnsupportedVersion("this edge speaks HTTP/1.1 and HTTP/1.0")
        if message.chunked or hdrs.TRANSFER_ENCODING in headers:
            if self.bare:
                raise InvalidRequest("an HTTP/1.0 request cannot have a transfer coding")
            if headers[hdrs.TRANSFER_ENCODING].strip().lower() != "chunked":
                raise UnsupportedCoding("the only transfer coding is chunked")
        if not _expects_what_is_known(headers) and not self.bare:
            raise InvalidRequest("the only expectation is 100-continue")
        self.is_checked = True

    def read_content_type(self) -> str:
        """Return the content type that goes upstream: a form's, or JSON. Raises: `UnsupportedMediaType`."""
        given = self.headers.get(hdrs.CONTENT_TYPE, "")
        if self.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
            raise UnsupportedMediaType("a compressed body is not understood: send it without Content-Encoding")
        if self.asked.operation.form:
            if _media_type(given) != "multipart/form-data" or not _is_plain(given):
                raise UnsupportedMediaType("send a form: Content-Type: multipart/form-data; boundary=...")
            self.content_type = given
        elif given != "application/json" and _media_type(given) not in ("application/json", ""):
            raise UnsupportedMediaType("send JSON: Content-Type: application/json")
        else:
            self.content_type = "application/json"
        return self.content_type

    def read_forwarded(self, content_type: str) -> bytes:
        """Return the lines that go upstream; no `content_type` is a request without a body."""
        lines = f"Content-Type: {content_type}\r\n" if content_type else ""
        for name in _FORWARDED:
            value = self.headers.get(name)
            if value is not None and _is_plain(value):
                lines += f"{name}: {value}\r\n"
        state = ",".join(self.headers.getall(_TRACESTATE, ())) if self.trace is not None else ""
        if state and _is_plain(state):
            lines += f"tracestate: {state}\r\n"
        self.forwarded = lines.encode("ascii")
        return self.forwarded

    def query(self) -> str:
        """Return the query with its question mark, "" for none. Raises: `InvalidRequest`."""
        query = self.message.path.partition("?")[2]
        if not _QUERY.fullmatch(query):
            raise InvalidRequest("the query is malformed: percent-encode it")
        return f"?{query}" if query else ""


def address_behind_proxies(head: Head, peer: str, server: ServerConfig) -> str:
    """Return the client's address; a trusted proxy's word counts, read from the right (RFC 7239 section 7.4)."""
    address = peer
    hops = ",".join(head.headers.getall("X-Forwarded-For", [])).split(",")
    while hops and is_trusted(address, server.trusted_proxies):
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


def is_trusted(address: str, proxies: Sequence[Network]) -> bool:
    """Return whether an address is that of a trusted proxy; what connects by a unix socket is one."""
    if address == "unix":
        return True
    ip = ipaddress.ip_address(address)
    return any(ip in network for network in proxies)


def _expects_what_is_known(headers: CIMultiDictProxy[str]) -> bool:
    return headers.get(hdrs.EXPECT, "100-continue").lower() == "100-continue"


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _is_plain(value: str) -> bool:
    """Whether a header's value is visible ASCII, so that every parser reads it alike."""
    return value.isascii() and value.isprintable()
