"""The trace that a request belongs to, and its span in it.

Source: W3C, "Trace Context", https://www.w3.org/TR/trace-context/.
"""

import re
from typing import Final, NamedTuple

_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-((?!0{16})[0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
_KEPT_FLAGS: Final = 0x03  # sampled, and that the id is random
_SAMPLED: Final = 0x01


class Trace(NamedTuple):
    """The trace that a request belongs to; `parent_id` is the span of who asked, "" where the trace begins here."""

    trace_id: str
    parent_id: str
    flags: int

    @property
    def is_sampled(self) -> bool:
        """Whether its spans are to be kept."""
        return bool(self.flags & _SAMPLED)

    def line(self, upstream_id: str) -> str:
        """Return the header line for one attempt, whose span has an id of its own."""
        return f"traceparent: 00-{self.trace_id}-{span_id(upstream_id)}-{self.flags:02x}\r\n"


def read_trace(traceparent: str) -> Trace | None:
    """Return what a `traceparent` says, None for one that says nothing; a newer version is read as this one."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None or (found[4] and traceparent.startswith("00")):
        return None
    return Trace(found[1], found[2], int(found[3], 16) & _KEPT_FLAGS)


def span_id(upstream_id: str) -> str:
    """Return the id of the span of an attempt: a part of its own, so that either leads to the other."""
    return upstream_id.replace("-", "")[:16]
