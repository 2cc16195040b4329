"""Streams of real servers, and how bytes are chunked and cut."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

STREAMS = {path.stem: path.read_bytes() for path in sorted((Path(__file__).parent / "cases/streams").glob("*.sse"))}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def cut(data: bytes, positions: Iterable[int]) -> list[bytes]:
    at = [0, *sorted(positions), len(data)]
    return [data[low:high] for low, high in pairwise(at)]
