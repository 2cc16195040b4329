"""What a stream's events say: errors that open it, the status they name."""

import pytest

from edge.sse import error_in, opens_stream, opens_with_error


@pytest.mark.parametrize("error", [b'data: {"error":{}}', b'data:{"error":1}', b"error: {}", b"event: error\ndata: 1"])
def test_opening_is_told_as_soon_as_it_is_certain(error: bytes) -> None:
    answers = [opens_with_error(error[:length], False) for length in range(1, len(error) + 1)]
    certain = answers.index(True)
    assert answers == [None] * certain + [True] * (len(error) - certain)
    assert [opens_with_error(error[:length] + b"~", False) for length in range(certain)] == [False] * certain


LINES = [b": ping", b"data: 1", b"data:1", b"event: a", b"id: 1", b"retry: 1"]


@pytest.mark.parametrize("line", LINES)
def test_stream_is_told_by_its_first_line_as_soon_as_that_is_certain(line: bytes) -> None:
    for before in (b"", b"\n", b"\r\n\r\n", b"\xef\xbb\xbf"):
        opening = before + line
        certain = len(before) + line.index(b":")
        answers = [opens_stream(opening[:length], False) for length in range(len(opening) + 1)]
        assert answers == [None] * (certain + 1) + [True] * (len(opening) - certain)
        for length in range(len(before), certain):
            assert opens_stream(opening[:length] + b"~", False) is False


def test_what_is_whole_is_certain() -> None:
    assert [opens_stream(content, True) for content in (b"", b"\n", b"dat", b'{"a":1}')] == [True, True, False, False]


def test_whole_stream_that_might_have_become_an_error_is_none() -> None:
    assert opens_with_error(b"data: {", True) is False
    assert opens_with_error(b"data: [DONE]\n\n", False) is False


@pytest.mark.parametrize(
    ("event", "status", "body"),
    [
        (b'data: {"error":{"code":429}}\n\n', 429, b'{"error":{"code":429}}'),
        (b'event: error\r\ndata: {"error":{"code":413}}\r\n\r\n', 413, b'{"error":{"code":413}}'),
        (b'error: {"code":500}\n\n', 500, b'{"code":500}'),
        (b'data: {"error":{"code":200}}\n\n', 502, b'{"error":{"code":200}}'),
        (b"data: no JSON\n\n", 502, b"no JSON"),
        (b"event: error\n\n", 502, b""),
    ],
)
def test_error_event_names_its_status_or_is_a_502(event: bytes, status: int, body: bytes) -> None:
    assert error_in(event) == (status, body)
