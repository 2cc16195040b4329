"""What is kept of a stream that may go on elsewhere: by reference, counted, and let go of past its bound."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.client.body import BodyMemory
from edge.relay.delivered import Delivered
from tests.streams import chunk, cut

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


Kept = tuple[Delivered, Callable[[bytes], None], BodyMemory, list[bytes], list[str]]


def delivered(most_bytes: int = 2**20, memory_bytes: int = 2**20) -> Kept:
    memory, written, gone = BodyMemory(memory_bytes), list[bytes](), list[str]()
    kept = Delivered(memory, most_bytes)
    return kept, kept.passing(written.append, lambda: gone.append("gone")), memory, written, gone


def content(kept: Delivered, *, bare: bool) -> bytes | None:
    return asyncio.run(kept.content(bare=bare))


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=5), st.lists(st.integers(0, 200), max_size=4))
def test_the_content_is_what_the_client_has_in_any_cut(events: list[bytes], cuts: list[int]) -> None:
    for bare in (True, False):
        kept, write, memory, written, _ = delivered()
        stream = HEAD + b"".join(events if bare else map(chunk, events))
        for piece in cut(stream, sorted(min(each, len(stream)) for each in cuts)):
            write(piece)
        assert b"".join(written) == stream
        assert content(kept, bare=bare) == b"".join(events)
        kept.release()
        kept.release()
        assert memory.used_bytes == 0


@pytest.mark.parametrize("body", [chunk(b"a" * 9)[:-4], chunk(b"a" * 9) + b"5", b"x\r\n"])
def test_what_is_no_whole_chunk_is_not_nothing(body: bytes) -> None:
    kept, write, *_ = delivered()
    write(HEAD + body)
    assert content(kept, bare=False) is None


async def test_a_long_stream_is_read_in_steps() -> None:
    """Others get their turn after a part of it."""
    kept, write, *_ = delivered()
    write(HEAD)
    for _ in range(10_000):
        write(chunk(b"data: {}\n\n"))
    reading = asyncio.get_running_loop().create_task(kept.content(bare=False))
    turns = 0
    while not reading.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 8
    assert reading.result() == b"data: {}\n\n" * 10_000


def test_past_the_bound_or_without_memory_all_is_let_go_of() -> None:
    for most_bytes, memory_bytes in ((40_000, 2**20), (2**20, 80_000)):
        kept, write, memory, written, gone = delivered(most_bytes, memory_bytes)
        for _ in range(30):
            write(b"x" * 1000)
        assert kept.is_whole
        assert 30_000 <= memory.used_bytes <= 40_000
        for _ in range(100):
            write(b"x" * 1000)
        assert (kept.is_whole, gone, memory.used_bytes, len(written)) == (False, ["gone"], 0, 130)
        assert content(kept, bare=True) == b""


def test_what_is_kept_leaves_half_of_the_memory_to_new_requests() -> None:
    """Whatever has the other half: bodies count too."""
    memory = BodyMemory(200_000)
    memory.reserve(70_000)
    kept = [Delivered(memory, 2**20) for _ in range(9)]
    for each in kept:
        each.passing(lambda _: None, lambda: None)(b"x" * 10_000)
    assert [each.is_whole for each in kept] == [True] + 8 * [False]
    memory.reserve(100_000)
