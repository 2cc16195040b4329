"""The credential that a request shows in its headers.

Source: RFC 6750 section 2.1 for `Authorization: Bearer`; `api-key` and `x-api-key` are what other clients send.
"""

import re
from collections.abc import Iterable
from typing import Final

from multidict import MultiMapping, istr

from edge.errors import InvalidRequest, Unauthenticated
from edge.exchange import NO_CREDENTIAL, Credential
from edge.keys.stores.protocol import hash_key

_CREDENTIAL = re.compile(r"[\x21-\x7e]{8,8192}")
_AUTHORIZATION: Final = istr("Authorization")
_API_KEY: Final = istr("api-key")
_X_API_KEY: Final = istr("x-api-key")
_NO_VALUES: Final[list[str]] = []
_CHALLENGE: Final = 'Bearer realm="d.run"'


def credential_of(headers: MultiMapping[str], known: Credential = NO_CREDENTIAL) -> Credential:
    """Return what a request shows as `Authorization: Bearer`, else as `api-key` or `x-api-key`.

    A Bearer counts beside another key: agents send a vendor's key of their own along with that of the gateway.
    `known` is what the connection showed last, which hardly ever changes: then it is returned, and nothing is hashed.
    Raises: `Unauthenticated` for none or a malformed one, `InvalidRequest` for two different ones of a kind.
    """
    values = headers.getall(_AUTHORIZATION, _NO_VALUES)
    header = values[0] if len(values) == 1 else ""
    if header and header == known.header:
        return known
    key = _only_one(map(_bearer, values))
    if not key:
        header = ""
        others = (*headers.getall(_API_KEY, _NO_VALUES), *headers.getall(_X_API_KEY, _NO_VALUES))
        key = _only_one(map(str.strip, others))
    if not key:
        raise Unauthenticated(
            "You didn't provide an API key. Send it as a header: Authorization: Bearer YOUR_KEY",
            headers=(("WWW-Authenticate", _CHALLENGE),),
        )
    if not _CREDENTIAL.fullmatch(key):
        raise wrong_key()
    return Credential(header, key, hash_key(key))


def wrong_key(message: str = "") -> Unauthenticated:
    """Return the error for a credential that proves nobody; RFC 6750 section 3 has its challenge."""
    return Unauthenticated(
        message or "Incorrect API key provided. Check the key, or make a new one at the platform.",
        headers=(("WWW-Authenticate", f'{_CHALLENGE}, error="invalid_token"'),),
    )


def _only_one(keys: Iterable[str]) -> str:
    """Return the one key, "" for none: another scheme, or a header that a client sends empty, has none."""
    different = {key for key in keys if key}
    if len(different) > 1:
        raise InvalidRequest("the request shows two different API keys: send one")
    return different.pop() if different else ""


def _bearer(value: str) -> str:
    """Return the key of an `Authorization`, "" when it has none or is of another scheme."""
    scheme, _, key = value.strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
