"""What is kept of a stream that may go on elsewhere: by reference, counted, and let go of past its bound."""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from edge.client.body import BodyMemory
from edge.relay.delivered import Delivered
from tests.streams import chunk, cut

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


Kept = tuple[Delivered, Callable[[bytes], None], BodyMemory, list[bytes], list[str]]


def delivered(most_bytes: int = 2**20, memory_bytes: int = 2**20) -> Kept:
    memory, written, gone = BodyMemory(memory_bytes), list[bytes](), list[str]()
    kept = Delivered(memory, most_bytes, lambda: gone.append("gone"))
    return kept, kept.passing(written.append), memory, written, gone


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=5), st.lists(st.integers(0, 200), max_size=4))
def test_the_content_is_what_the_client_has_in_any_cut(events: list[bytes], cuts: list[int]) -> None:
    for bare in (True, False):
        kept, write, memory, written, _ = delivered()
        stream = HEAD + b"".join(events if bare else map(chunk, events))
        for piece in cut(stream, sorted(min(each, len(stream)) for each in cuts)):
            write(piece)
        assert b"".join(written) == stream
        assert kept.content(bare=bare) == b"".join(events)
        kept.release()
        kept.release()
        assert memory.used_bytes == 0


def test_half_a_chunk_is_no_content() -> None:
    kept, write, *_ = delivered()
    write(HEAD + chunk(b"a" * 9)[:-4])
    assert kept.content(bare=False) == b""


def test_past_the_bound_or_without_memory_all_is_let_go_of() -> None:
    for most_bytes, memory_bytes in ((40_000, 2**20), (2**20, 40_000)):
        kept, write, memory, written, gone = delivered(most_bytes, memory_bytes)
        for _ in range(30):
            write(b"x" * 1000)
        assert kept.is_whole
        assert 30_000 <= memory.used_bytes <= 40_000
        for _ in range(100):
            write(b"x" * 1000)
        assert (kept.is_whole, gone, memory.used_bytes, len(written)) == (False, ["gone"], 0, 130)
        assert kept.content(bare=True) == b""
