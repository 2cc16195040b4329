"""A head that comes again is known by its bytes: what is asked, and what is answered, is as if it were parsed."""

import asyncio
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.client.answers import response
from edge.client.body import BodyMemory, read_body, whole_body
from edge.client.connection import Request
from edge.client.server import ClientServer
from edge.config.process_settings import ServerConfig
from edge.errors import EdgeError
from edge.stage import Lifecycle
from tests.profiles import examples

Asked = tuple[str, str, tuple[tuple[str, str], ...], bytes | str]
_PER_ANSWER = re.compile(rb"(x-request-id|date): [^\r]*|req_[0-9a-f]+")


class Wire(asyncio.Transport):
    """A transport that keeps what is written: reads are cut where a test wants them, which no socket does."""

    def __init__(self) -> None:
        super().__init__({"peername": ""})  # as that of a unix socket
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


@dataclass
class Served:
    """One connection, what was asked on it, and what it was answered."""

    remembers: bool = True
    asked: list[Asked] = field(default_factory=list)
    known: int = 0
    wire: Wire = field(default_factory=Wire)

    async def take(self, reads: Sequence[bytes]) -> "Served":
        config = ServerConfig()
        server = ClientServer(self._answer, Lifecycle(), config, 10)
        connection = server.connection()
        if not self.remembers:
            connection._repeats.due_bytes = None
        connection.connection_made(self.wire)
        await _settled()
        for read in reads:
            if self.wire.closed:
                break
            connection.data_received(read)
            await _settled()
        connection.connection_lost(None)
        await _settled()
        return self

    async def _answer(self, request: Request) -> None:
        head, connection = request.head, request.connection
        self.known += request.body is not None
        said: bytes | str
        memory = BodyMemory(10**9)
        try:
            head.check()
            said = (whole_body(request, 10**6, memory) or await read_body(request, ServerConfig(), memory)).data
        except EdgeError as error:
            said = type(error).__name__
            connection.last = True
        # The length is that of the body, and the head's own that of the request which showed it first.
        headers = tuple(sorted(item for item in head.headers.items() if item[0].lower() != "content-length"))
        self.asked.append((head.method, head.path, headers, said))
        connection.send(response(200, b"%d" % len(self.asked), request_id="r", last=connection.last))

    @property
    def result(self) -> tuple[list[Asked], bytes, bool]:
        return self.asked, _PER_ANSWER.sub(b"", self.wire.written), self.wire.closed


async def _settled() -> None:
    for _ in range(6):  # turns of the loop, which wait for nothing
        await asyncio.sleep(0)


def _request(body: bytes, *lines: str, method: str = "POST", length: str = "Content-Length: {}") -> bytes:
    head = [f"{method} /v1/chat/completions HTTP/1.1", "Host: x", *lines, length.format(len(body)), "Accept: */*"]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


USUAL = [_request(b"x" * count) for count in (1, 2, 9, 10, 30, 0)]
OTHERS = [
    _request(b"y", "Authorization: Bearer one"),
    _request(b"y", "Authorization: Bearer two"),
    _request(b"yy", length="content-length:{}"),
    _request(b"yyy", length="CONTENT-LENGTH:   {}  "),
    _request(b"yyyy", length="Content-Length: 000{}"),
    _request(b"", method="GET", length="X: {}"),
    _request(b"", "Connection: keep-alive", length="X: {}"),
    _request(b"abc", "Expect: 100-continue"),
    _request(b"\r\n\r\nPOST / HTTP/1.1\r\n\r\n"),
    _request(b"content-length: 1\r\n\r\n"),
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
    b"\r\n" + USUAL[0],
    b"\r\n\r\n" + USUAL[3],
]
REFUSED = [
    USUAL[0].replace(b"Content-Length: 1", b"Content-Length: 1\r\nContent-Length: 1"),
    USUAL[0].replace(b"Content-Length: 1", b"Content-Length: +1"),
    USUAL[0].replace(b"Content-Length: 1", b"Content-Length: 1 1"),
    USUAL[0].replace(b"Content-Length: 1", b"Content-Length : 1"),
    USUAL[0].replace(b"Content-Length: 1", b"Content-Length: 1\r\nTransfer-Encoding: chunked"),
    USUAL[0].replace(b"Content-Length: 1", b"Content-Length: 99999999999999999999"),
    USUAL[0].replace(b"Content-Length: 1", b"Content-Length: "),
    USUAL[0].replace(b"Host: x", b"Host x"),
    USUAL[0].replace(b"Host: x\r\n", b"Host: x\n"),
    USUAL[0].replace(b"HTTP/1.1", b"HTTP/1.2"),
    USUAL[0].replace(b"Accept: */*", b" folded"),
]
ONE_BYTE = st.builds(
    lambda request, at, byte: request[: at % len(request)] + bytes((byte,)) + request[at % len(request) + 1 :],
    st.sampled_from(USUAL),
    st.integers(0, 200),
    st.integers(0, 255),
)
REQUESTS = st.lists(
    st.one_of(*[st.sampled_from(USUAL)] * 4, st.sampled_from(OTHERS), st.sampled_from(REFUSED), ONE_BYTE), max_size=12
)


def _reads(requests: list[bytes], cuts: str, seed: int) -> list[bytes]:
    """Return the reads in which requests come: one each, at random cuts, several in one, or byte by byte."""
    chance = random.Random(seed)
    if cuts == "whole":
        return requests
    joined = b"".join(requests)
    if cuts == "bytes":
        return [joined[at : at + 1] for at in range(len(joined))]
    if cuts == "pipelined":
        return [b"".join(requests[at : at + 3]) for at in range(0, len(requests), 3)]
    places = sorted({0, len(joined), *(chance.randrange(len(joined) + 1) for _ in range(len(requests) * 2))})
    if cuts == "mixed":  # some at the ends of requests, as a client that sends head and body apart
        ends, at = [], 0
        for request in requests:
            at += len(request)
            ends.append(at)
        places = sorted({0, len(joined), *chance.sample(places, len(places) // 2), *ends})
    return [joined[begin:end] for begin, end in itertools.pairwise(places)]


@examples(300)
@given(REQUESTS, st.sampled_from(("whole", "mixed", "cut", "pipelined")), st.integers(0, 2**32))
def test_what_is_asked_and_answered_is_the_same_as_without_remembering(
    requests: list[bytes], cuts: str, seed: int
) -> None:
    reads = _reads(requests, cuts, seed)

    async def both() -> tuple[Served, Served]:
        return await Served().take(reads), await Served(remembers=False).take(reads)

    remembering, forgetful = asyncio.run(both())
    assert remembering.result == forgetful.result
    assert not forgetful.known


@pytest.mark.parametrize("cuts", ["whole", "bytes", "cut", "pipelined", "mixed"])
async def test_every_kind_of_head_behind_every_other_is_as_if_it_were_parsed(cuts: str) -> None:
    for other in (*OTHERS, *REFUSED):
        reads = _reads([USUAL[2], USUAL[3], other, USUAL[2], USUAL[4]], cuts, 7)
        assert (await Served().take(reads)).result == (await Served(remembers=False).take(reads)).result


async def test_head_is_known_from_its_second_request_on_whatever_the_length_of_the_body() -> None:
    served = await Served().take(USUAL)
    assert (len(served.asked), served.known) == (len(USUAL), len(USUAL) - 1)


async def test_a_few_heads_are_known_at_once() -> None:
    heads = [_request(b"a", f"Authorization: Bearer {name}") for name in "abcd"]
    served = await Served().take([*heads, *heads])
    assert served.known == len(heads)


async def test_body_in_several_reads_does_not_end_what_is_known() -> None:
    request = _request(b"z" * 50)
    served = await Served().take([USUAL[0], request[:-20], request[-20:-5], request[-5:], USUAL[1]])
    assert (len(served.asked), served.known) == (3, 1)


async def test_client_that_writes_a_new_head_each_time_is_given_up() -> None:
    served = await Served().take([_request(b"a", f"X-Request-Id: {number}") for number in range(20)] + USUAL)
    assert (len(served.asked), served.known) == (20 + len(USUAL), 0)


@pytest.mark.parametrize("other", [each for each in OTHERS if b"Expect" in each or b"chunked" in each])
async def test_head_that_asks_for_more_than_its_body_is_parsed_each_time(other: bytes) -> None:
    assert not (await Served().take([other, other, other])).known


async def test_half_a_request_behind_a_whole_one_leaves_it_to_the_parser() -> None:
    served = await Served().take([USUAL[0], USUAL[1] + USUAL[2][:40], USUAL[2][40:], USUAL[3]])
    assert (len(served.asked), served.known) == (4, 0)
