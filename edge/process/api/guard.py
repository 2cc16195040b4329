"""Who may administer: who shows the token of `server.admin_token`. Probes, metrics and the API's document are open."""

import base64
import binascii
import hashlib
import hmac
import logging
import time
from typing import Final

from multidict import MultiMapping

from edge.errors import Unauthenticated

_log = logging.getLogger(__name__)

_OPEN: Final = frozenset({"/livez", "/readyz", "/healthz", "/metrics", "/openapi.json"})
_READS: Final = ("GET", "HEAD")
_BEARER: Final = 'Bearer realm="edge admin"'
_BASIC: Final = 'Basic realm="edge admin", charset="UTF-8"'
_WARNING_INTERVAL_S: Final = 60.0

_warned_at = float("-inf")


def check_token(token: str | None, method: str, path: str, headers: MultiMapping[str], address: str) -> None:
    """Raise `Unauthenticated` unless a request may do what it asks: with no token set, all may.

    A browser shows the token as the password of HTTP Basic (RFC 7617), for pages alone: it would send it along with
    what another site has it post.
    """
    if token is None or path in _OPEN:
        return
    shown = [_shown(value, method) for value in headers.getall("Authorization", [])]
    if len(shown) == 1 and _is_same(shown[0], token):
        return
    if shown:
        _warn(address)
    challenges = (_BEARER, _BASIC) if method in _READS else (_BEARER,)
    raise Unauthenticated(
        "The admin token is wrong: send `Authorization: Bearer TOKEN`."
        if shown
        else "This needs the admin token: send `Authorization: Bearer TOKEN`.",
        code="invalid_admin_token",
        headers=tuple(("WWW-Authenticate", challenge) for challenge in challenges),
    )


def _shown(header: str, method: str) -> bytes:
    """Return the token of a header, b"" for none."""
    scheme, _, given = header.strip().partition(" ")
    given = given.strip()
    if scheme.lower() == "bearer":
        return given.encode("utf-8", "surrogateescape")
    if scheme.lower() == "basic" and method in _READS:
        try:
            return base64.b64decode(given, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _is_same(shown: bytes, token: str) -> bool:
    """Return whether they are the same, in a time that depends on neither: digests are of one length."""
    digests = (hashlib.sha256(each).digest() for each in (shown, token.encode()))
    return hmac.compare_digest(*digests)


def _warn(address: str) -> None:
    """Log a wrong token, not more than once a minute."""
    global _warned_at
    if time.monotonic() - _warned_at >= _WARNING_INTERVAL_S:
        _warned_at = time.monotonic()
        _log.warning("a request from %s shows a wrong admin token", address)
