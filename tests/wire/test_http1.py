"""Heads and framings of answers: every split is read like the whole, and what is malformed is refused."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.wire import http1
from edge.wire.http1 import Chunked, Framing, Irregular, Length, Malformed, NoBody, UntilClose, parse_head
from tests.profiles import examples
from tests.streams import cut as parts_of

# --- heads


@pytest.mark.parametrize(
    ("lines", "framing", "keep_alive"),
    [
        ("HTTP/1.1 200 OK|content-length: 5", Length, True),
        ("HTTP/1.1 200 |CONTENT-LENGTH:5", Length, True),
        ("HTTP/1.1 200|Content-Length: \t5\t ", Length, True),
        ("HTTP/1.1 200 OK|transfer-encoding: chunked", Chunked, True),
        ("HTTP/1.1 500 OK|Transfer-Encoding: Chunked|connection: Close", Chunked, False),
        ("HTTP/1.1 200 OK|connection: keep-alive", UntilClose, True),
        ("HTTP/1.1 200 OK|connection: x, close|content-length: 0", Length, False),
        ("HTTP/1.0 200 OK|content-length: 0", Length, False),
        ("HTTP/1.0 200 OK|content-length: 0|connection: Keep-Alive", Length, True),
        ("HTTP/1.0 200 OK", UntilClose, False),
        ("HTTP/1.1 204 No Content", NoBody, True),
        ("HTTP/1.1 304 Not Modified|x: y", NoBody, True),
        ("HTTP/1.1 100 Continue", NoBody, True),
        ("HTTP/1.1 200 \xe4\xf6|x-a: \xe4\xf6", UntilClose, True),
    ],
)
def test_head_shows_how_its_body_ends(lines: str, framing: type[Framing], keep_alive: bool) -> None:
    head = parse_head(lines.replace("|", "\r\n").encode("latin-1"))
    assert (type(head.framing), head.keep_alive) == (framing, keep_alive)


def test_head_is_read_by_name_and_repeated_headers_are_joined() -> None:
    head = parse_head(b"HTTP/1.1 429 Slow\r\nRetry-After: 7\r\nVia: a\r\nvia:b\r\nX-Empty:")
    assert head.shape.status == 429
    assert head.shape.headers == {b"retry-after": b"7", b"via": b"a, b", b"x-empty": b""}


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "HTTP/2 200 OK",
        "HTTP/1.2 200 OK",
        "http/1.1 200 OK",
        " HTTP/1.1 200 OK",
        "HTTP/1.1  200 OK",
        "HTTP/1.1 2000 OK",
        "HTTP/1.1 20 OK",
        "HTTP/1.1 000 OK",
        "HTTP/1.1 600 OK",
        "HTTP/1.1 200 O\x00K",
        "HTTP/1.1 200 OK\nx: y",
        "HTTP/1.1 200 OK|x: y\nz: a",
        "HTTP/1.1 200 OK|x: y\rz",
        "HTTP/1.1 200 OK|x: a\x00b",
        "HTTP/1.1 200 OK|x: y| folded",
        "HTTP/1.1 200 OK|\tfolded",
        "HTTP/1.1 200 OK|no colon",
        "HTTP/1.1 200 OK|: no name",
        "HTTP/1.1 200 OK|a b: c",
        "HTTP/1.1 200 OK|content-length : 5",
        "HTTP/1.1 200 OK|content-length: 5|content-length: 5",
        "HTTP/1.1 200 OK|content-length: 5|Content-Length: 6",
        "HTTP/1.1 200 OK|content-length: 5, 5",
        "HTTP/1.1 200 OK|content-length: +5",
        "HTTP/1.1 200 OK|content-length: -5",
        "HTTP/1.1 200 OK|content-length: 0x5",
        "HTTP/1.1 200 OK|content-length: 5_0",
        "HTTP/1.1 200 OK|content-length: \xb2",
        "HTTP/1.1 200 OK|content-length:",
        "HTTP/1.1 200 OK|content-length: 5 5",
        "HTTP/1.1 200 OK|content-length: 1000000000000000",
        "HTTP/1.1 200 OK|content-length: 5|transfer-encoding: chunked",
        "HTTP/1.1 200 OK|transfer-encoding: chunked|transfer-encoding: chunked",
        "HTTP/1.1 200 OK|transfer-encoding: gzip, chunked",
        "HTTP/1.1 200 OK|transfer-encoding: chunked, gzip",
        "HTTP/1.1 200 OK|transfer-encoding: identity",
        "HTTP/1.1 200 OK|transfer-encoding:",
        "HTTP/1.1 200 OK|transfer-encoding: \x0bchunked",
        "HTTP/1.0 200 OK|transfer-encoding: chunked",
    ],
)
def test_head_that_could_be_read_in_two_ways_is_malformed(lines: str) -> None:
    """RFC 9112 sections 2.2, 4, 5.1, 5.2 and 6.3."""
    with pytest.raises(Malformed):
        parse_head(lines.replace("|", "\r\n").encode("latin-1"))


def test_head_of_many_lines_is_malformed() -> None:
    assert parse_head(b"HTTP/1.1 200 OK" + b"\r\nx: y" * 128).shape.status == 200
    with pytest.raises(Malformed):
        parse_head(b"HTTP/1.1 200 OK" + b"\r\nx: y" * 129)


@given(st.binary(max_size=200))
def test_head_of_any_bytes_is_read_or_malformed(block: bytes) -> None:
    try:
        head = parse_head(b"HTTP/1.1 200 OK\r\n" + block)
    except Malformed:
        return
    assert all(name == name.lower() for name in head.shape.headers)


@pytest.mark.parametrize(
    ("header", "idle_s"),
    [
        ("x: y", 4.0),
        ("keep-alive: timeout=5", 4.0),
        ("keep-alive: timeout=2, max=100", 1.6),
        ("Keep-Alive: max=100, Timeout = 10", 8.0),
        ("keep-alive: timeout=0", 0.0),
        ("keep-alive: timeout=999999", 60.0),
        ("keep-alive: timeout=soon", 4.0),
    ],
)
def test_connection_may_be_idle_for_most_of_what_the_upstream_promised(header: str, idle_s: float) -> None:
    head = parse_head(f"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n{header}".encode())
    assert head.shape.idle_s == pytest.approx(idle_s)


# --- framings


def read(framing: Framing, parts: Iterable[bytes]) -> tuple[str, bytes, bytes]:
    """Scan as a relay does, which gives again what was not understood: the verdict, the content, what was left."""
    payload: list[bytes] = []
    held = b""
    for part in parts:
        held += part
        try:
            understood = framing.scan(held, payload)
        except Malformed:
            return "malformed", b"".join(payload), b""
        held = held[understood:]
    return ("done" if framing.done else "open"), b"".join(payload), held


def pass_on(framing: Framing, parts: Iterable[bytes]) -> tuple[str, bytes]:
    """Scan for what is plain: the verdict, and the bytes that go on as they are."""
    passed, held = b"", b""
    for part in parts:
        held += part
        try:
            understood = framing.scan(held, [], plain=True)
        except Irregular:
            assert isinstance(framing, Chunked)
            return "irregular", passed + held[: framing.consumed]
        except Malformed:
            return "malformed", b""
        passed += held[:understood]
        held = held[understood:]
    return ("done" if framing.done else "open"), passed


EXTENSION = b";" + b"x" * 4000
PLAIN = {
    "one chunk": b"5\r\nhello\r\n0\r\n\r\n",
    "three chunks": b"1\r\nh\r\n4\r\nello\r\n00A\r\n0123456789\r\n0\r\n\r\n",
    "nothing": b"0\r\n\r\n",
    "many zeros": b"000000000000005\r\nhello\r\n000000000000000\r\n\r\n",
    "chunks in a chunk": b"f\r\n5\r\nhello\r\n0\r\n\r\n\r\n0\r\n\r\n",
    "ends of lines as data": b"4\r\n\r\n\r\n\r\n2\r\n\n\n\r\n1\r\n\r\r\n0\r\n\r\n",
    "more after the end": b"1\r\nh\r\n0\r\n\r\n5\r\nhello\r\nHTTP/1.1 200 OK\r\n\r\n",
    "cut in data": b"5\r\nhel",
    "cut before the last chunk": b"5\r\nhello\r\n",
    "cut in the last chunk": b"5\r\nhello\r\n0\r\n\r",
}
IRREGULAR = {
    "extension": b"5;a=b\r\nhello\r\n0\r\n\r\n",
    "extension in quotes": b'5;a="b;\\"c"\r\nhello\r\n0\r\n\r\n',
    "long extension": b"5" + EXTENSION + b"\r\nhello\r\n0\r\n\r\n",
    "space before an extension": b"5 \t;a\r\nhello\r\n0\r\n\r\n",
    "space after the size": b"5 \r\nhello\r\n0\r\n\r\n",
    "later extension": b"5\r\nhello\r\n1;a\r\n!\r\n0\r\n\r\n",
    "extension of the last chunk": b"5\r\nhello\r\n0;a\r\n\r\n",
    "trailer": b"5\r\nhello\r\n0\r\nx: y\r\n\r\n",
    "trailers": b"0\r\nx: y\r\nz:\r\n\r\nmore",
    "long trailer": b"0\r\nx: " + b"y" * 4000 + b"\r\n\r\n",
    "cut trailer": b"5\r\nhello\r\n0\r\nx: y\r\n",
}
MALFORMED = {
    "no size": b"\r\nhello\r\n0\r\n\r\n",
    "no hex": b"g\r\nhello\r\n0\r\n\r\n",
    "prefix": b"0x5\r\nhello\r\n0\r\n\r\n",
    "sign": b"+5\r\nhello\r\n0\r\n\r\n",
    "minus": b"-5\r\nhello\r\n0\r\n\r\n",
    "underscore": b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "leading space": b" 5\r\nhello\r\n0\r\n\r\n",
    "too large": b"1000000000000000\r\nhello\r\n",
    "bare line feed": b"5\nhello\r\n0\r\n\r\n",
    "carriage return in an extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "line feed in an extension": b"5;a\nb\r\nhello\r\n0\r\n\r\n",
    "null in an extension": b"5;a\x00\r\nhello\r\n0\r\n\r\n",
    "endless extension": b"5" + EXTENSION * 2 + b"\r\nhello\r\n0\r\n\r\n",
    "endless size": b"0" * 5000 + b"5\r\nhello\r\n",
    "chunk too long": b"5\r\nhello!\r\n0\r\n\r\n",
    "chunk ends with a line feed": b"5\r\nhello\n0\r\n\r\n",
    "chunk ends with a carriage return": b"5\r\nhello\r0\r\n\r\n",
    "trailer without colon": b"0\r\nx\r\n\r\n",
    "folded trailer": b"0\r\nx: y\r\n z\r\n\r\n",
    "line feed in a trailer": b"0\r\nx: y\nz: a\r\n\r\n",
    "endless trailer": b"0\r\nx: " + b"y" * 17_000 + b"\r\n\r\n",
    "long line in the trailers": b"0\r\nx: " + b"y" * 5000 + b"\r\n\r\n",
    "endless trailers": b"0\r\n" + b"x: y\r\n" * 5000 + b"\r\n",
}
BODIES = PLAIN | IRREGULAR | MALFORMED


def splits(data: bytes) -> Iterable[list[bytes]]:
    """Byte by byte, and in two at every byte, or near both ends of what is long."""
    yield parts_of(data, range(1, len(data)))
    ends = range(len(data)) if len(data) < 200 else (*range(60), *range(len(data) - 60, len(data)), 4096, 4097, 4098)
    for at in ends:
        yield parts_of(data, [at])


@pytest.mark.parametrize("name", BODIES)
def test_chunks_cut_anywhere_are_read_like_the_whole(name: str) -> None:
    verdict, content, left = whole = read(Chunked(), [BODIES[name]])
    assert (verdict == "malformed") == (name in MALFORMED)
    for parts in splits(BODIES[name]):
        assert read(Chunked(), parts) == whole, parts
    if verdict == "done":
        assert BODIES[name].endswith(left)
        assert name in ("nothing", "long trailer", "trailers") or content


@pytest.mark.parametrize("name", BODIES)
def test_chunks_pass_as_they_are_up_to_what_is_irregular(name: str) -> None:
    """A size line that is no plain one may turn out malformed only when it is read with `payload`."""
    body = BODIES[name]
    for parts in ([body], *splits(body)):
        verdict, passed = pass_on(Chunked(), parts)
        assert body.startswith(passed)
        if name in PLAIN:
            assert verdict == read(Chunked(), [body])[0]
            assert (
                body.startswith(passed + b"HTTP") or verdict == "open" or body.removeprefix(passed)[:1] in (b"", b"5")
            )
        else:
            assert verdict in (("irregular",) if name in IRREGULAR else ("irregular", "malformed"))


@examples(300)
@given(st.data())
def test_chunks_cut_at_random_are_read_like_the_whole(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.binary(min_size=1, max_size=40), max_size=6))
    body = b"".join(
        b"%x%b\r\n%b\r\n" % (len(content), data.draw(st.sampled_from([b"", b"", b";a", b" ;b=c"])), content)
        for content in sizes
    )
    body += data.draw(st.sampled_from([b"0\r\n\r\n", b"0;x\r\n\r\n", b"0\r\na: b\r\n\r\n", b"0\r\nbad\r\n\r\n", b""]))
    if data.draw(st.booleans()):  # break it somewhere
        at = data.draw(st.integers(0, len(body)))
        body = body[:at] + data.draw(st.binary(max_size=3)) + body[at + data.draw(st.integers(0, 2)) :]
    positions = data.draw(st.sets(st.integers(0, len(body)), max_size=8))
    assert read(Chunked(), parts_of(body, positions)) == read(Chunked(), [body])


@pytest.mark.parametrize("name", PLAIN)
def test_a_frame_of_our_own_can_stand_only_between_two_chunks(name: str) -> None:
    body = PLAIN[name]
    starts, at = {0}, 0
    while (end := body.find(b"\r\n", at)) > 0 and (size := int(body[at:end], 16)):
        at = end + 2 + size + 2
        starts.add(at)
    for cut in range(len(body)):
        framing = Chunked()
        understood = framing.scan(body[:cut], [], plain=True)
        if not framing.done:
            assert (framing.between_chunks and understood == cut) == (cut in starts), body[:cut]


@pytest.mark.parametrize("data", [b"", b"he", b"hello", b"hello and more"])
def test_length_is_kept_to_the_byte(data: bytes) -> None:
    for parts in ([data], *splits(data)):
        verdict, content, left = read(Length(5), parts)
        assert (content, left) == (data[:5], data[5:])
        assert verdict == ("done" if len(data) >= 5 else "open")


def test_no_body_takes_nothing_and_the_close_ends_the_rest() -> None:
    assert read(NoBody(), [b"abc"]) == ("done", b"", b"abc")
    assert read(Length(0), [b"abc"]) == ("done", b"", b"abc")
    assert read(UntilClose(), [b"ab", b"c"]) == ("open", b"abc", b"")
    assert [framing.self_delimited for framing in (NoBody(), Length(1), Chunked(), UntilClose())] == [
        True,
        True,
        True,
        False,
    ]


# --- heads that were seen before

LINES = st.sampled_from([
    *(b"Content-Length: %d" % each for each in (0, 5, 17)), b"content-length: 5", b"CONTENT-LENGTH: 5",
    b"Content-Length:5", b"Content-Length:\t5", b"content-length: 05", b"content-length: 5 ", b"content-length: +5",
    b"content-length: 5x", b"content-length: \xb2", b"content-length:", b"Content-Length", b"content-l",
    b"content-length: ", b"X-Length: 5", b"Strength: 7", b"x: ength: 5", b"Transfer-Encoding: chunked",
    b"Connection: close", b"Connection: keep-alive", b"Keep-Alive: timeout=3", b"date: today", b"",
])  # fmt: skip
BLOCKS = st.builds(
    lambda first, lines: b"\r\n".join([first, *lines]),
    st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.0 200 OK", b"HTTP/1.1 204 No", b"HTTP/1.1 500 e", b"HTTP/1.1 100 C"]),
    st.lists(LINES, max_size=3),
)


def seen(block: bytes) -> object:
    try:
        head = parse_head(block)
    except Malformed:
        return Malformed
    shape = head.shape
    total = head.framing.total if isinstance(head.framing, Length) else 0
    return shape.status, shape.headers, type(head.framing), total, head.keep_alive, shape.idle_s


@examples(1000)
@given(st.lists(BLOCKS, min_size=1, max_size=12))
def test_head_is_read_alike_whatever_was_read_before(blocks: list[bytes]) -> None:
    http1._shapes.clear()
    warm = [seen(block) for block in (*blocks, *blocks)]
    cold = []
    for block in (*blocks, *blocks):
        http1._shapes.clear()
        cold.append(seen(block))
    assert warm == cold


@pytest.mark.parametrize("name", [b"Content-Length:", b"CONTENT-LENGTH: ", b"content-length:\t", b"Content-Length: "])
def test_length_is_that_of_each_answer_however_it_is_written(name: bytes) -> None:
    for length in (b"5", b"5", b"7", b"7"):
        framing = parse_head(b"HTTP/1.1 200 OK\r\n" + name + length).framing
        assert isinstance(framing, Length)
        assert framing.total == int(length)
