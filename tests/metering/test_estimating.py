"""How many tokens a text may be: media in base64 are sums, whatever the dialect, and text stays text."""

import base64
import json
import random
from collections.abc import Generator
from typing import Any

import pytest

from edge.metering.estimating import estimated, estimated_in_steps

FILE = random.Random(17).randbytes(400_000)
BASE64 = base64.b64encode(FILE).decode()
LINES = base64.encodebytes(FILE).decode()
PROSE = "What the people of a town say to each other on their way home, and what they leave out. " * 500


def dumps(value: object) -> bytes:
    return json.dumps(value).encode()


def part(media_type: str, blob: str = BASE64) -> dict[str, Any]:
    return {"type": "base64", "media_type": media_type, "data": blob}


def in_steps(text: bytes) -> tuple[int, int]:
    """The estimate, and how often others could run."""
    steps: Generator[None, None, int] = estimated_in_steps(text)
    turns = 0
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value, turns
        turns += 1


IMAGE, SOUND, VIDEO, PAGES = 1600, 625, 421, 8000


@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        # chat
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}}, IMAGE),
        ({"type": "image_url", "image_url": {"url": BASE64}}, IMAGE),
        ({"type": "input_audio", "input_audio": {"data": BASE64, "format": "wav"}}, SOUND),
        ({"type": "input_audio", "input_audio": {"format": "mp3", "data": BASE64}}, SOUND),
        ({"type": "audio_url", "audio_url": {"url": f"data:audio/ogg;base64,{BASE64}"}}, SOUND),
        ({"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{BASE64}"}}, VIDEO),
        ({"type": "file", "file": {"filename": "a", "file_data": f"data:application/pdf;base64,{BASE64}"}}, PAGES),
        ({"type": "image_url", "image_url": {"url": f"data:image/svg+xml;charset=utf-8;base64,{BASE64}"}}, IMAGE),
        # responses
        ({"type": "input_image", "image_url": f"data:image/webp;base64,{BASE64}"}, IMAGE),
        ({"type": "input_file", "file_data": BASE64, "filename": "a.pdf"}, PAGES),
        ({"type": "computer_screenshot", "image_url": f"DATA:IMAGE/PNG;BASE64,{BASE64}"}, IMAGE),
        # messages
        ({"type": "image", "source": part("image/jpeg")}, IMAGE),
        ({"type": "document", "source": part("application/pdf")}, PAGES),
        ({"source": {"data": BASE64, "media_type": "image/jpeg", "type": "base64"}, "type": "image"}, IMAGE),
        ({"source": {"data": BASE64, "media_type": "application/pdf", "type": "base64"}}, PAGES),
        # MCP, and what says nothing of itself
        ({"type": "audio", "data": BASE64, "mimeType": "audio/wav"}, SOUND),
        ({"data": BASE64}, IMAGE),
        ({"b64_json": BASE64}, IMAGE),
        ({"video": BASE64}, VIDEO),
    ],
)
def test_medium_counts_as_a_sum_in_every_dialect(content: dict[str, Any], tokens: int) -> None:
    for around in ("", PROSE):
        body = dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": around}, content]}]})
        text = len(body) - len(BASE64)
        for given in (body, body.replace(b'": "', b'":"'), body.replace(b"/", b"\\/")):
            assert abs(estimated(given) - tokens - text // 4) < 60 + tokens // 30  # slashes are escaped
            assert in_steps(given)[0] == estimated(given)


def test_medium_of_several_lines_is_one() -> None:
    for blob in (LINES, LINES.replace("\n", "\r\n")):
        assert IMAGE <= estimated(dumps({"source": part("image/png", blob)})) < IMAGE + 100


def test_each_medium_counts() -> None:
    shots = [{"type": "image", "source": part("image/png", BASE64[: 5000 + number])} for number in range(40)]
    mixed = [*shots, {"type": "input_audio", "input_audio": {"data": BASE64, "format": "wav"}}]
    body = dumps({"messages": mixed})
    assert 40 * IMAGE + SOUND < estimated(body) < 41 * IMAGE + SOUND
    assert in_steps(body)[0] == estimated(body)


@pytest.mark.parametrize("shift", range(0, 4200, 97))
def test_medium_is_found_wherever_it_stands(shift: int) -> None:
    body = dumps({"x": " " * shift, "source": part("image/png", BASE64[:4096])})
    assert IMAGE < estimated(body) < IMAGE + 100 + shift // 4


@pytest.mark.parametrize(
    ("size", "media_type", "tokens"), [(10**8, "video/mp4", 24_576), (2 * 10**7, "application/pdf", 200_000)]
)
def test_long_video_and_a_long_file_have_a_bound(size: int, media_type: str, tokens: int) -> None:
    body = b'{"source":{"media_type":"%b","data":"%b"}}' % (media_type.encode(), b"QUJD" * (size // 4))
    assert tokens < estimated(body) < tokens + 100


@pytest.mark.parametrize(
    "content",
    [
        "",
        "a",
        PROSE,
        "模型" * 5000,
        "AAAA " * 5000,
        BASE64,  # that a user wrote: the model reads it
        f"see data:image/png;base64,{BASE64}",
        json.dumps({"type": "image", "data": BASE64}),  # which a tool told, as text
        json.dumps({"url": f"data:image/png;base64,{BASE64}"}),
        "data:image/png;base64,QUJD",
        "A" * 4095,
    ],
)
def test_text_is_text(content: str) -> None:
    for body in (dumps({"content": content}), json.dumps({"content": content}, ensure_ascii=False).encode()):
        assert estimated(body) == len(body) // 4
        assert in_steps(body)[0] == estimated(body)


def test_text_stays_text_in_the_place_of_a_medium() -> None:
    for value in (PROSE, PROSE.replace(",", ""), "A" * 100 + PROSE, f"data:text/plain;base64,{BASE64}"):
        body = dumps({"source": {"type": "text", "data": value}})
        assert estimated(body) == len(body) // 4


def test_pieces_of_a_long_answer_count_as_all_of_it() -> None:
    body = dumps({"choices": [{"message": {"content": PROSE, "audio": {"id": "a", "data": BASE64}}}]})
    for size in (16_384, 65_536, 262_144):
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        assert sum(map(estimated, pieces)) < len(PROSE) // 4 + 2 * SOUND + 100


@pytest.mark.parametrize(
    "text",
    [
        b"words and words " * 2**20,
        b'"' + b"A" * 2**24 + b'"',
        b'"' + b"A" * 64 + b'",',
        (b'"' + b"A" * 64 + b'",') * 2**17,
        (b'"data":"' + b"A" * 4200 + b'",') * 2**11,
        (b'"' + b"A" * 4200 + b'\\"') * 2**11,
        b"A" * 2**24,
        b'"data:' * 2**20,
        b'"' * 2**20,
        b"",
    ],
    ids=["words", "a long one", "short", "short ones", "media", "quotes", "no quote", "urls", "only quotes", "empty"],
)
def test_whatever_a_text_is_it_is_looked_through_in_steps(text: bytes) -> None:
    tokens, turns = in_steps(text)
    assert tokens == estimated(text) <= len(text) // 4 + 2**11 * IMAGE
    assert turns >= (len(text) // 2**22 if b" " in text else 0)
