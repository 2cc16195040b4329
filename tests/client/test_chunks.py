"""What the chunks of a body may be, wherever reads cut them."""

import random
from collections.abc import Iterator
from typing import Any, cast

import pytest

from edge.client.chunks import Chunks
from edge.errors import EdgeError, InvalidRequest, RequestTooLarge

MAX_BODY = 2**20


def cuts(data: bytes) -> Iterator[list[bytes]]:
    yield [data]
    if len(data) < 3000:
        yield [data[at : at + 1] for at in range(len(data))]
    chance = random.Random(5)
    for _ in range(3):
        at = sorted(chance.randrange(len(data)) for _ in range(6))
        yield [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]


def follow(parts: list[bytes]) -> None:
    chunks = Chunks(cast(Any, None), MAX_BODY)
    for part in parts:
        chunks.follow(part)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"5\r\nhello\r\n0\r\n\r\n", None, ""),
        (b"5;a=b\r\nhello\r\n0;c\r\nX: y\r\n\r\n", None, ""),
        (b"5;" + b"x" * 4095 + b"\r\nhello\r\n0\r\n\r\n", None, ""),
        (b"5;" + b"x" * 4096 + b"\r\nhello\r\n0\r\n\r\n", InvalidRequest, "extensions"),
        (b"5;" + b"x" * 5000, InvalidRequest, "extensions"),
        (b"5;x=123456\r\nhello\r\n" * 600, InvalidRequest, "extensions"),
        (b"0\r\n" + b"X: y\r\n" * 1100, InvalidRequest, "extensions"),
        (b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n", None, ""),
        (b"1\r\nx\r\n" * 1200, InvalidRequest, "at least 16 bytes"),
        (b"10\r\n" + b"x" * 16 + b"\r\n", None, ""),
        ((b"10\r\n" + b"x" * 16 + b"\r\n") * 5000, None, ""),
        (b"100000\r\n", None, ""),
        (b"100001\r\n", RequestTooLarge, "limit"),
        (b"80000\r\n" + b"x" * 2**19 + b"\r\n80001\r\n", RequestTooLarge, "limit"),
        (b"7fffffffffffffff\r\n", RequestTooLarge, "limit"),
        (b"8000000000000000\r\n", RequestTooLarge, "limit"),
        (b"0" * 17 + b"5\r\n", InvalidRequest, "digits"),
        (b"zz\r\nhello\r\n", None, ""),  # which the parser refuses
    ],
)
def test_chunks_that_no_client_needs_are_refused(data: bytes, error: type[EdgeError] | None, words: str) -> None:
    for parts in cuts(data):
        if error is None:
            follow(parts)
        else:
            with pytest.raises(error, match=words):
                follow(parts)
