"""Random ids of requests. Nobody can guess one, or learn from one how many there were."""

import os
import re
from typing import Final

_BATCH: Final = 256  # a call of the system for each id would cost more than the id
_BYTES: Final = 16
_EACH: Final = re.compile(f".{{{2 * _BYTES}}}")
_unused: list[str] = []


def _random() -> str:
    """Return 128 random bits as 32 hexadecimal digits."""
    if not _unused:
        _unused.extend(_EACH.findall(os.urandom(_BATCH * _BYTES).hex()))
    return _unused.pop()


def new_request_id() -> str:
    """Return the id of a request that its client gave none."""
    return "req_" + _random()


def new_trace_id() -> str:
    """Return the id of a trace that begins here."""
    return _random()


def new_upstream_id() -> str:
    """Return the id of one attempt: a random UUID (RFC 9562 section 5.4), since some engines refuse any other."""
    it = _random()  # less the bits of version and variant, and two more: 120 of them
    return f"{it[:8]}-{it[8:12]}-4{it[13:16]}-a{it[17:20]}-{it[20:]}"
