"""Reading a JSON body both ways, and in little memory."""

import re
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from edge.envelope import json as envelopes
from edge.envelope.json import Envelope, read_long_json
from edge.errors import EdgeError

MIB = 2**20


def read_json(body: bytes, *limits: str) -> Envelope:
    """Read a body at once, and in steps: both must say the same. `limits` are the members that limit an answer."""
    try:
        at_once = envelopes.read_json(body, "", limits)
    except EdgeError as error:
        with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
            in_steps(body, limits)
        raise
    assert in_steps(body, limits) == at_once
    return at_once


def in_steps(body: bytes, limits: tuple[str, ...]) -> Envelope:
    async def read() -> Envelope:
        return await read_long_json(body, "", limits)

    reading = read()
    while True:
        try:
            reading.send(None)
        except StopIteration as done:
            envelope: Envelope = done.value
            return envelope


@contextmanager
def memory_below(limit_bytes: int) -> Iterator[None]:
    """Assert that what runs inside allocates less than this at its peak."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()
