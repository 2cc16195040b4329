"""Streams of real servers, how bytes are chunked and cut, and whole answers."""

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

STREAMS = {path.stem: path.read_bytes() for path in sorted((Path(__file__).parent / "cases/streams").glob("*.sse"))}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def cut(data: bytes, positions: Iterable[int]) -> list[bytes]:
    at = [0, *sorted(positions), len(data)]
    return [data[low:high] for low, high in pairwise(at)]


def document(value: Any, status: int = 200, *lines: str) -> bytes:
    """A whole HTTP answer with a JSON body; `lines` are further headers."""
    body = json.dumps(value).encode()
    head = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(body)}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + body
