"""Pictures of a given size for multimodal models: PNG (RFC 2083), each with pixels of its own.

A new picture for each request would cost the generator milliseconds. All but the last row is therefore the same, made
once, and what follows it (the last row, and the checksums) is made for each.
"""

import base64
import functools
import random
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_STORED_BYTES: Final = 65_535  # of a block that is not compressed (RFC 1951 section 3.2.4)
_MAX_PIXELS: Final = 50_000_000


@dataclass(frozen=True, slots=True)
class Picture:
    """Pictures of one size, in pixels, three bytes each."""

    width: int
    height: int

    @classmethod
    def of(cls, text: str) -> "Picture":
        """Return what `1024x768` says; raises `ValueError`."""
        width, _, height = text.partition("x")
        if not (width.isdecimal() and height.isdecimal()) or not 0 < int(width) * int(height) <= _MAX_PIXELS:
            raise ValueError(f"picture {text!r}: write WIDTHxHEIGHT in pixels, such as 1024x768")
        return cls(int(width), int(height))

    def part(self, number: int) -> Mapping[str, Any]:
        """Return the picture `number` as a part of a message."""
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{self.base64(number)}"}}

    def base64(self, number: int) -> str:
        """Return the file of the picture `number`, encoded."""
        begin, rest, adler, crc, row = _begin(self.width, self.height)
        pixels = row[:1] + (struct.pack(">I", number) + row[5:] if len(row) > 5 else bytes([number % 256] * 3))
        tail = _stored(pixels, is_last=True)
        tail += struct.pack(">I", zlib.adler32(pixels, adler))
        end = rest + tail + struct.pack(">I", zlib.crc32(tail, crc)) + _chunk(b"IEND", b"")
        return begin + base64.b64encode(end).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _stored(data: bytes, *, is_last: bool = False) -> bytes:
    """Return data as blocks that are not compressed."""
    blocks = [data[at : at + _STORED_BYTES] for at in range(0, len(data), _STORED_BYTES)]
    return b"".join(
        struct.pack("<BHH", is_last and at == len(blocks) - 1, len(block), len(block) ^ 0xFFFF) + block
        for at, block in enumerate(blocks)
    )


@functools.lru_cache(maxsize=4)
def _begin(width: int, height: int) -> tuple[str, bytes, int, int, bytes]:
    """Return what pictures share: the text that is whole, the bytes behind it, both checksums so far, and a row."""
    draw = random.Random(width * height)
    row_bytes = 1 + 3 * width  # a filter's number, then the pixels
    pixels = bytearray(draw.randbytes(row_bytes * height))
    pixels[::row_bytes] = bytes(height)  # no filter
    above, row = bytes(pixels[:-row_bytes]), bytes(pixels[-row_bytes:])
    data = b"\x78\x01" + _stored(above)
    length = len(data) + len(_stored(row)) + 4
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    made = _SIGNATURE + head + struct.pack(">I", length) + b"IDAT" + data
    cut = len(made) // 3 * 3
    begin = base64.b64encode(made[:cut]).decode()
    return begin, made[cut:], zlib.adler32(above), zlib.crc32(b"IDAT" + data), row
