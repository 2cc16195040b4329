"""Reading a JSON body both ways, and in little memory."""

import re
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from msgspec import structs

from edge.envelope import json as envelopes
from edge.envelope import splices
from edge.envelope.json import LONG_BODY_BYTES, Envelope
from edge.envelope.long_json import read_long_json
from edge.envelope.steering import NAMES, Names
from edge.errors import EdgeError

MIB = 2**20


def read_json(body: bytes, *limits: str) -> Envelope:
    """Read a body as a proxy does, in steps where it is long; a short one both ways, which must say the same.

    `limits` are the members that limit an answer.
    """
    if len(body) > LONG_BODY_BYTES:
        return in_steps(body, limits)
    try:
        at_once = envelopes.read_json(body, "", limits)
    except EdgeError as error:
        if not body:
            raise
        with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
            in_steps(body, limits)
        raise
    found = {"places": None, "members": None}
    assert structs.replace(in_steps(body, limits), **found) == structs.replace(at_once, **found)
    return at_once


def rewrite_json(
    body: bytes,
    envelope: Envelope,
    model: str,
    dropped: tuple[str, ...] = (),
    *,
    include_usage: bool = False,
    continuous: bool = False,
) -> bytes:
    """Rewrite a body as a proxy does; a short one both ways, which must give the same."""
    options = {"include_usage": include_usage, "continuous": continuous}
    rewritten = b"".join(splices.rewrite_json(body, envelope, model, dropped, **options))
    if len(body) <= LONG_BODY_BYTES:
        assert b"".join(splices.rewrite_json(body, in_steps(body), model, dropped, **options)) == rewritten
    return rewritten


def in_steps(body: bytes, limits: tuple[str, ...] = (), path_model: str = "", names: Names = NAMES) -> Envelope:
    async def read() -> Envelope:
        return await read_long_json(body, path_model, limits, names)

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
