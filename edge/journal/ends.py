"""The ends of usage records, many at a time: what sums are made of."""

import contextlib
from collections.abc import Iterator
from typing import BinaryIO, Final

import msgspec

from edge.exchange import Unit
from edge.journal.files import MAX_LINE_BYTES
from edge.journal.records import VERSION

_BLOCK_BYTES: Final = 2**14  # what is made of it stays in the processor's cache: of 1 MiB it takes twice as long
FIRST_UNIT: Final = "images"  # of lines without `unit`, of the edge before units had kinds


class Ended(msgspec.Struct, gc=False):
    """What sums ask of the line that ends a record."""

    time: str
    v: int = VERSION
    end: str | None = None
    key_id: str | None = None
    user: str | None = None
    route: str | None = None
    model: str | None = None
    region: str | None = None
    endpoint: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    units: int = 0
    unit: Unit | None = None
    usage_source: str = ""


_decoder: Final = msgspec.json.Decoder(Ended)


def blocks_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield the whole lines that follow in a file, many at a time.

    A last line without its newline, which may be one that is being written, is left out. A line that is too long to be
    one of ours comes in pieces.
    """
    rest = b""
    while data := file.read(_BLOCK_BYTES):
        data = rest + data
        end = data.rfind(b"\n") + 1
        if not end and len(data) >= MAX_LINE_BYTES:
            end = len(data)
        if end:
            yield data[:end]
        rest = data[end:]


def ends_in(block: bytes) -> tuple[list[Ended], int]:
    """Return the ends among whole lines, and how many lines cannot be read; a newer version's cannot."""
    try:
        found, unreadable = _decoder.decode_lines(block), 0
    except (ValueError, RecursionError):
        found, unreadable = _one_by_one(block)
    newer = sum(each.v > VERSION for each in found)
    return [each for each in found if each.end is not None and each.v <= VERSION], unreadable + newer


def _one_by_one(block: bytes) -> tuple[list[Ended], int]:
    """Return what can be read of lines, some of which cannot, and how many those are."""
    lines = [line for line in block.split(b"\n") if line]
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(_decoder.decode(line))
    return found, len(lines) - len(found)
