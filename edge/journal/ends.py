"""The ends of usage records, many at a time: what sums are made of."""

from collections.abc import Iterator
from typing import BinaryIO, Final

import msgspec

from edge.exchange import Unit
from edge.journal.records import VERSION

BLOCK_BYTES: Final = 2**20
FIRST_UNIT: Final = "images"  # of lines without `unit`, of the edge before units had kinds
# In every end, and never in a first line, where a quote within text has a backslash before it.
_MARK: Final = b',"end":"'


class Ended(msgspec.Struct, gc=False):
    """What sums ask of the line that ends a record."""

    time: str
    v: int = VERSION
    end: str | None = None
    key_id: str | None = None
    user: str | None = None
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    units: int = 0
    unit: Unit | None = None
    usage_source: str = ""


_decoder: Final = msgspec.json.Decoder(Ended)
_list_decoder: Final = msgspec.json.Decoder(list[Ended])


def blocks_of(file: BinaryIO, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Yield the whole lines that follow in a file, many at a time.

    A last line without its newline, which may be one that is being written, is left out. A line that is longer than a
    block comes in pieces, none of which is one of ours.
    """
    rest = b""
    while data := file.read(size):
        data = rest + data
        end = data.rfind(b"\n") + 1
        if not end and len(data) >= size:
            end = len(data)
        if end:
            yield data[:end]
        rest = data[end:]


def ends_in(block: bytes) -> tuple[list[Ended], int]:
    """Return the ends among whole lines, and how many lines cannot be read; a newer version's cannot."""
    lines = block.split(b"\n")
    ends = [line for line in lines if _MARK in line]
    unreadable = sum(_MARK not in line and line[:1] + line[-1:] != b"{}" for line in lines if line)
    try:
        found = _list_decoder.decode(b"[" + b",".join(ends) + b"]")
    except (ValueError, RecursionError):
        found = []
        for line in ends:
            try:
                found.append(_decoder.decode(line))
            except (ValueError, RecursionError):
                unreadable += 1
    known = [each for each in found if each.v <= VERSION]
    return known, unreadable + len(found) - len(known)
