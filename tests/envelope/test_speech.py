"""How many characters a body asks to be spoken."""

import json

import pytest

from edge.envelope.speech import spoken_characters


@pytest.mark.parametrize(
    ("text", "characters"),
    [("", 0), ("Hello", 5), ("你好,世界", 5), ('a\n"b"', 5), ("\N{SPEAKING HEAD IN SILHOUETTE}", 1)],
)
def test_characters_are_code_points_however_they_are_written(text: str, characters: int) -> None:
    for ascii_only in (True, False):
        body = json.dumps({"model": "m", "input": text, "voice": "alloy"}, ensure_ascii=ascii_only)
        assert spoken_characters(body.encode()) == characters


@pytest.mark.parametrize("body", [b"{}", b'{"input":null}', b'{"input":["a"]}', b'{"input":7}', b"[" * 100_000, b"no"])
def test_what_is_no_text_has_none(body: bytes) -> None:
    assert spoken_characters(body) == 0
