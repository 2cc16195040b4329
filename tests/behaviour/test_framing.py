"""What could be framed in two ways: refused, the connection ended, and nothing behind it served.

Each case is sent in one write, byte by byte, and cut at every CRLF. The upstream is the oracle: of a request that is
refused it sees nothing, of any other exactly one, framed anew. Whatever stood behind a refused request is not answered,
and who comes next gets an answer of its own (RFC 9112 sections 2.2, 5, 6, 7 and 9.3; RFC 9110 sections 5.5, 7 and 8.6).
The numbers are those of a corpus that other proxies were tried with; a row that is served says why that is right.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pytest

from tests.conftest import Edge, RawClient, ScriptedConnection, ScriptedUpstream, StartEdge, StartUpstream, soon

BODY = b'{"model":"public/deepseek-r1"}'
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
TE = "Transfer-Encoding: chunked"
LENGTH = f"Content-Length: {len(BODY)}"
POST = "POST /v1/chat/completions HTTP/1.1"
MODELS = "GET /v1/models HTTP/1.1"
SPLITS = ("whole", "bytes", "lines")


@dataclass(frozen=True)
class Case:
    """One request as bytes. `statuses` are those that it may get, `served` how many requests the upstream may see."""

    name: str
    lines: tuple[str, ...] = ()
    body: bytes = BODY
    first: str = POST
    statuses: tuple[int, ...] = (400,)
    served: int = 0
    host: str | None = "127.0.0.1"
    eol: bytes = b"\r\n"
    ends: bool = True  # the connection, once it is answered
    why: str = ""  # it is right where it is not refused

    def head(self, key: str) -> bytes:
        lines = [self.first] + ([f"Host: {self.host}"] if self.host is not None else [])
        lines += [f"Authorization: Bearer {key}", "Content-Type: application/json", *self.lines]
        return self.eol.join(line.encode("latin-1") for line in lines) + self.eol * 2

    @property
    def number(self) -> str:
        return self.name[:3]


def refused(number: str, *rows: tuple[str, ...], body: bytes = BODY, statuses: tuple[int, ...] = (400,)) -> list[Case]:
    return [Case(f"{number} {' | '.join(row)[:60]}", row, body, statuses=statuses) for row in rows]


def chunked(number: str, *bodies: bytes, statuses: tuple[int, ...] = (400,)) -> list[Case]:
    return [Case(f"{number} {body[:40]!r}", (TE,), body, statuses=statuses) for body in bodies]


def first(number: str, *lines: str, statuses: tuple[int, ...] = (400,), ends: bool = True) -> list[Case]:
    return [Case(f"{number} {line[:60]}", (LENGTH,), first=line, statuses=statuses, ends=ends) for line in lines]


def size(text: bytes) -> bytes:
    return text + b"\r\n" + BODY + b"\r\n0\r\n\r\n"


N = len(BODY)
SIZE = b"%x" % N
CASES = [
    Case("C01 length", (LENGTH,), statuses=(200,), served=1, ends=False, why="the usual request"),
    Case("C01 chunked", (TE,), CHUNKED, statuses=(200,), served=1, ends=False, why="the usual request"),
    *refused("C02", (LENGTH, TE), (TE, LENGTH), body=CHUNKED),
    *refused("C03", (LENGTH, "Content-Length: 0"), (LENGTH, LENGTH), (f"{LENGTH}, {N}",), (f"{LENGTH}, 1",)),
    *refused(
        "C04",
        *((f"Content-Length: {each}",) for each in ("+30", "-1", "-0", "3_0", "0x1e", "30Z", "3 0", "30.0", "3e1")),
    ),
    *refused("C04", ("Content-Length:",), ("Content-Length: \u00b2",), ("Content-Length: ,30",)),
    *refused("C04", ("Content-Length: 30,",)),
    *refused("C05", ("Content-Length:", LENGTH), (LENGTH, "Content-Length:")),
    Case("C06 0030", (f"Content-Length: 00{N}",), statuses=(200, 400), served=1, ends=False,
         why="RFC 9110 8.6: 1*DIGIT; the length that goes upstream is written anew"),
    *refused("C07", *((f"Content-Length: {each}",) for each in (2**64, 2**63, 10**15, 10**30)), statuses=(400, 413)),
    *refused("C08", (f"Content-Length : {N}",), (f"Content\tLength: {N}",), (f"Content-Length\x85: {N}",)),
    *refused(
        "C09",
        *((f"Transfer-Encoding: {each}",) for each in (
            "xchunked", "identity", "chunked;q=1", '"chunked"', "\xa0chunked", "chunked\xff", "chunke", "")),
        body=CHUNKED, statuses=(400, 501),
    ),
    *refused(
        "C09",
        *((f"Transfer-Encoding: {each}", LENGTH) for each in ("xchunked", "identity", "chunked;q=1", "")),
        statuses=(400, 501),
    ),
    *refused(
        "C10",
        ("Transfer-Encoding: chunked, gzip",), ("Transfer-Encoding: chunked, chunked",), (TE, TE),
        (TE, "Transfer-Encoding: identity"), ("Transfer-Encoding: chunked,",), ("Transfer-Encoding: identity", TE),
        body=CHUNKED, statuses=(400, 501),
    ),
    *refused("C11", ("Transfer-Encoding: gzip, chunked",), ("Transfer-Encoding: gzip", TE), body=CHUNKED,
             statuses=(400, 501)),
    Case("C12 1.0", (TE,), CHUNKED, first=POST[:-1] + "0"),
    *refused("C13", ("Transfer-Encoding: ,chunked",), body=CHUNKED, statuses=(400, 501)),
    *(Case(f"C13 {each!r}", (f"Transfer-Encoding:{each}",), CHUNKED, statuses=(200,), served=1, ends=False,
           why="RFC 9110 5.5 and RFC 9112 7: space around a value and its case mean nothing")
      for each in ("\tchunked", " ChUnKeD")),
    *refused("C13", ("Transfer-Encoding: chunked \t",), body=CHUNKED),
    *refused("C14", ("Transfer-Encoding: \x0bchunked",), ("Transfer-Encoding: chunked\x00",),
             ("Transfer-Encoding:\r\n chunked",), body=CHUNKED),
    *(Case(f"C15 {each}", (each, LENGTH), statuses=(200, 400), served=1, ends=False,
           why="a name with an underscore is another header, which is not passed on")
      for each in ("Transfer_Encoding: chunked", "Content_Length: 1")),
    *chunked("C16", *(size(each) for each in (
        b"0x" + SIZE, b"+" + SIZE, b"-1", b"0_1", b" " + SIZE, b"", SIZE + b"xyz", b"\t" + SIZE))),
    *chunked("C17", size(b"F" * 17)),
    Case("C17 zeros", (TE,), size(b"0" * 17 + SIZE), statuses=(200, 400), served=1, ends=False,
         why="RFC 9112 7.1: 1*HEXDIG; the length that goes upstream is written anew"),
    *chunked("C18", CHUNKED.replace(b"\r\n", b"\n"), CHUNKED.replace(b"\r\n", b"\r", 1),
             SIZE + b"\r\n" + BODY + b"0\r\n\r\n", b"5\r\n" + BODY + b"\r\n0\r\n\r\n",
             SIZE + b"\n" + BODY + b"\r\n0\r\n\r\n"),
    *chunked("C19", size(SIZE + b";a\n"), size(SIZE + b";a\rb"), size(SIZE + b"\r\r;a"), size(SIZE + b";a\x00")),
    Case("C19 a=b", (TE,), size(SIZE + b";a=b"), statuses=(200, 400), served=1, ends=False,
         why="RFC 9112 7.1.1: an extension that is not understood is ignored; it is not passed on"),
    *(Case(f"C22 {each!r}", (TE,), CHUNKED[:-2] + each + b"\r\n\r\n", statuses=(200, 400), served=1, ends=False,
           why="RFC 9110 6.5.1: a trailer is dropped, and never taken for a header")
      for each in (b"X:POST / HTTP/1.1", b"Authorization: Bearer sk-other-0123456789", b"Host: evil")),
    *chunked("C23", CHUNKED[:-2] + b"a: b\r\n" * 300 + b"\r\n", CHUNKED[:-2] + b"a: b\n\r\n", statuses=(400, 431)),
    Case("C24 lines end with LF", (LENGTH,), eol=b"\n"),
    *refused("C24", ("X: a\nY: b", LENGTH), ("X: a\rb", LENGTH)),
    *refused("C25", ("X: a\x00b", LENGTH), ("X: a\x01b", LENGTH), ("X: a\x7fb", LENGTH), ("X[: b", LENGTH),
             ("\xc3\xa9: b", LENGTH), ("no colon", LENGTH), (": no name", LENGTH), ("X Y: b", LENGTH)),
    *refused("C26", ("X: a\r\n b", LENGTH), ("X: a\r\n\tb", LENGTH), ("\r\rZGET /evil: HTTP/1.1", LENGTH)),
    Case("C27 X-Role: ad\\xffmin", ("X-Role: ad\xffmin", LENGTH), statuses=(200, 400), served=1, ends=False,
         why="RFC 9110 5.5: obs-text is opaque; this header is not passed on"),
    *(Case(f"C28 {' | '.join(each)[:50]}", (*each, LENGTH), ends=False) for each in (
        ("Authorization: Bearer sk-other-0123456789",),)),
    *refused("C29", ("X: " + "a" * 17_000, LENGTH), tuple(f"X{n}: a" for n in range(200)), statuses=(400, 431)),
    *refused("C30", tuple(f"X{n}: {'a' * 8000}" for n in range(20)), statuses=(400, 431)),
    Case("C31 no Host", (LENGTH,), host=None),
    *(Case(f"C31 {each}", (f"Host: {each}", LENGTH)) for each in ("127.0.0.1", "evil")),
    *(Case(f"C32 {each!r}", (LENGTH,), host=each, statuses=(400, 421), ends=False)
      for each in ("a, b", "u@a", "a/p", "a b", "127.0.0.1:99999", "127.0.0.1:65536", "127.0.0.1:1x", "[::1", "a\\b")),
    *(Case(f"C32 {each!r}", (LENGTH,), statuses=(200,), served=1, host=each, ends=False,
           why="RFC 9112 3.2: of a target without a host, which reaches what is served at all; RFC 3986 3.2.3")
      for each in ("", "127.0.0.1:", "127.0.0.1:65535")),
    *first("C34", "POST evil HTTP/1.1", "POST @evil/x HTTP/1.1", "POST /x y HTTP/1.1", "POST /x\ty HTTP/1.1",
           "POST /\x00 HTTP/1.1", "POST /\xc0\xaf HTTP/1.1", statuses=(400, 404, 421), ends=False),
    *first("C35", "POST //evil/v1/chat/completions HTTP/1.1", "POST //v1/chat/completions HTTP/1.1",
           statuses=(400, 404), ends=False),
    *first("C36", "POST /v1/../v1/chat/completions HTTP/1.1", "POST /v1/%2e%2e/chat/completions HTTP/1.1",
           "POST /v1;x=/chat/completions HTTP/1.1", "POST /v1/./chat/completions HTTP/1.1",
           statuses=(400, 404), ends=False),
    *first("C37", "POST /v1%2fchat/completions HTTP/1.1", "POST /v1\\chat/completions HTTP/1.1", "POST /x%00 HTTP/1.1",
           "POST /x%0d%0aX:y HTTP/1.1", statuses=(400, 404), ends=False),
    *(Case(f"C38 {each}", (LENGTH,), first=each, statuses=(200, 400), served=1, ends=False,
           why="RFC 9112 3: a request line may be read by its words; what goes upstream is written anew")
      for each in (f"POST  {POST[5:]}", POST.replace(" HTTP", "  HTTP"))),
    *first("C38", POST.replace(" HTTP", "#frag HTTP"), " " + POST, statuses=(400, 404), ends=False),
    *first("C39", "POST * HTTP/1.1", "CONNECT evil:443 HTTP/1.1",
           *(f"{method} {POST[5:]}" for method in ("TRACE", "post", "FOO")),
           statuses=(400, 404, 405, 421, 501), ends=False),
    *first("C40", POST[:-9], POST[:-3] + "0.9", POST[:-3] + "2.0", statuses=(400, 505)),
    *first("C41", *(POST[:-8] + each for each in ("HTTP/1.2", "HTTP/1.10", "http/1.1", "HTTP/11", "HTP/1.1")),
           "PRI * HTTP/2.0", "\x16\x03\x01\x02", statuses=(400, 505)),
    Case("C45 Expect: y 100-continue", ("Expect: y 100-continue", LENGTH), statuses=(400, 417)),
    Case("C45 Expect: 200-ok", ("Expect: 200-ok", LENGTH), statuses=(400, 417)),
    Case("C48 gzip", ("Content-Encoding: gzip", LENGTH), statuses=(415,), ends=False),
    Case("C50 long line", (LENGTH,), first=f"POST /{'x' * 9000} HTTP/1.1", statuses=(414,)),
]  # fmt: skip


def cut(data: bytes, split: str) -> Iterator[bytes]:
    if split == "whole":
        yield data
    elif split == "bytes":
        # Long runs say nothing more than their first bytes.
        yield from re.findall(rb"(?s)a{50,}|x{50,}|(?:X?[0-9a]*: a\r\n){9,}|.", data)
    else:
        yield from re.findall(rb"(?s).*?\r\n|.+\Z", data)


@pytest.fixture
async def upstream(start_upstream: StartUpstream) -> ScriptedUpstream:
    async def script(connection: ScriptedConnection) -> None:
        asked = re.search(rb'"mark": "(\w+)"', connection.request)
        said = b'{"mark":"%b"}' % (asked[1] if asked else b"case")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        await connection.send(head % len(said) + said)

    return await start_upstream(script)


@pytest.fixture
async def edge(start_edge: StartEdge, upstream: ScriptedUpstream) -> Edge:
    return await start_edge(f'[pools.p]\nendpoints = ["{upstream.url}"]\n[routes."public/deepseek-r1"]\npool = "p"\n')


async def answered(client: RawClient, parts: Iterator[bytes]) -> tuple[int, dict[str, str]]:
    """Send parts, each read apart, until an answer begins; return its status and headers."""
    async with asyncio.TaskGroup() as group:
        answer = group.create_task(soon(client.response()))
        for part in parts:
            if answer.done():
                break
            client.send(part)
            for _ in range(2):  # turns of the loop that the edge shares: it reads this part alone
                await asyncio.sleep(0)
    return answer.result()[:2]


@pytest.mark.parametrize("number", sorted({case.number for case in CASES}))
async def test_what_is_read_in_two_ways_is_refused_and_nothing_behind_it_is_served(
    edge: Edge, upstream: ScriptedUpstream, number: str
) -> None:
    behind = edge.request({"model": "public/deepseek-r1", "mark": "behind"})
    for case, split in product((case for case in CASES if case.number == number), SPLITS):
        upstream.requests.clear()
        client = await edge.connect()
        status, headers = await answered(client, cut(case.head(edge.key) + case.body + behind * case.ends, split))
        assert status in case.statuses, (case, split)
        if case.ends:
            assert headers["connection"] == "close", (case, split)
            assert await soon(client.rest()) == b"", (case, split)
        client.close()
        await edge.idle()
        assert len(upstream.requests) == (case.served if status == 200 else 0), (case, split)
        for asked in upstream.requests:
            assert asked.endswith(b"\r\nContent-Length: %d\r\n\r\n%b" % (N, BODY)), (case, split)
            assert not re.search(b"evil|chunked|sk-other", asked), (case, split)
        own = await edge.ask({"model": "public/deepseek-r1", "mark": "own"})
        assert (own[0], json.loads(own[2])) == (200, {"mark": "own"}), (case, split)
    await edge.consistent()


@pytest.mark.parametrize(
    "sent",
    [
        ("Content-Length: 60", BODY),
        (TE, SIZE + b"\r\n" + BODY),
        (TE, SIZE + b"\r\n" + BODY + b"\r\n"),
        (TE, size(b"8000000000000000")),
        (TE, size(b"f" * 16)),
    ],
    ids=["C49 length", "C49 chunk", "C49 no last chunk", "C17 2**63", "C17 2**64 - 1"],
)
async def test_body_that_does_not_come_whole_is_never_sent_upstream(
    edge: Edge, upstream: ScriptedUpstream, sent: tuple[str, bytes]
) -> None:
    client = await edge.connect()
    client.send(Case("", (sent[0],)).head(edge.key) + sent[1])
    client.writer.write_eof()
    await soon(client.rest())
    await edge.consistent()
    assert upstream.requests == []


async def test_requests_in_a_row_get_one_answer_each_in_their_order(edge: Edge) -> None:
    """C42 and C43: what a body holds is a body, and so is one of no length."""
    client = await edge.connect()
    marks = [f"m{number}" for number in range(100)]
    asked = [edge.request({"model": "public/deepseek-r1", "mark": mark}) for mark in marks]
    inner = edge.request({"model": "public/deepseek-r1", "mark": "inner"})
    client.send(edge.request(inner, path="/v1/models", method="GET") + b"".join(asked) + edge.request(b""))
    status, _, body = await soon(client.response())
    assert (status, json.loads(body)["object"]) == (200, "list")
    for mark in marks:
        assert json.loads((await soon(client.response()))[2]) == {"mark": mark}
    assert (await soon(client.response()))[0] == 400
    await edge.consistent()
