"""How many tokens a JSON text may be to a model: a guess from its size, where nobody has counted.

Four bytes are taken for a token, which suits English and Chinese in UTF-8; escaped text counts for up to twice as much.
A medium in base64 is no text and counts as a sum, in tokens:

- an image 1,600. Anthropic scales one down to 1,568; OpenAI takes 765 for 1024 x 1024 in high detail and 1,105 for
  2048 x 4096; Qwen2.5-VL takes one for 28 x 28 pixels, which is 1,369 for 1024 x 1024 and 2,691 for 1920 x 1080.
- sound 25 a second, one for 40 ms, as Qwen2-Audio (arXiv 2407.10759). A second is taken for 16 kB, as MP3 at 128 kbit/s
  has; WAV at 16 kHz has twice as many, Opus a quarter.
- video 263 a second, as Gemini, and 24,576 at most, as the report of Qwen2.5-VL (arXiv 2502.13923). A second is taken
  for 250 kB.
- any other file 2,000 a page, of 100 pages at most; Anthropic takes 1,500 to 3,000 for a page of a PDF. A page is taken
  for 100 kB, as a scanner writes it.

Sources: docs.anthropic.com, "Vision", "PDF support"; platform.openai.com, "Images and vision"; ai.google.dev,
"Understand and count tokens"; the README of Qwen2.5-VL.
"""

import re
from collections.abc import Generator
from typing import Final

_BYTES_PER_TOKEN: Final = 4
_SMALL_BYTES: Final = 4096  # of a text in which a medium would not matter, and of a medium that is taken for text
_STRIDE: Final = _SMALL_BYTES // 2  # between two looks: there is one within each medium, wherever it begins
_LOOKED_PER_STEP: Final = 1 << 22  # bytes in which one is looked for, in a quarter of a ms
_FOUND_PER_STEP: Final = 1 << 22  # bytes in which a mark is looked for, in 1 ms
_LOOKS_PER_STEP: Final = 256  # in half a ms, or 2 in a text that is built to be slow
# Some escape the slash, some break lines. Text has a space, a comma or another mark among so many.
_RUN_BYTES: Final = 64
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/=_-]*+(?:\\[/nr][A-Za-z0-9+/=_-]*+)*+\\?")
_FIRST_BYTES: Final = 8  # of a run: most text has another mark among them already
_IS_BASE64: Final = bytes(chr(byte).isascii() and (chr(byte).isalnum() or byte in b"+/=_-\\") for byte in range(256))
_DATA_URL: Final = re.compile(rb'data:([a-z]*+)[^",]{0,200}?;base64,', re.IGNORECASE)
# Where the dialects of OpenAI, Anthropic, vLLM, SGLang and MCP have a medium; none of them has a text there.
_MEMBER: Final = re.compile(
    rb'"(?:data|file_data|b64_json|url|(?:image|audio|video)(?:_url|_data)?)"[ \t\r\n]*+:[ \t\r\n]*+"\Z'
)
_MEMBER_BYTES: Final = 48
_KIND: Final = re.compile(rb"image|audio|video|pdf|document|file", re.IGNORECASE)
_NEAR_BYTES: Final = 160  # where the kind of a medium stands that is no URL
_IMAGE_TOKENS: Final = 1600
# Bytes of the file for a token, and tokens at most.
_RATES: Final = {b"audio": (640, 2**53), b"video": (950, 24_576)}
_RATE_OF_FILES: Final = (50, 200_000)


def estimated(text: bytes) -> int:
    """Return how many tokens a JSON text, or a piece of one, may be."""
    size, tokens = len(text), 0
    if size > _SMALL_BYTES:
        for medium in _media(text):
            if medium is not None:
                size -= medium[0]
                tokens += medium[1]
    return tokens + size // _BYTES_PER_TOKEN


def estimated_in_steps(text: bytes) -> Generator[None, None, int]:
    """Return what `estimated` does, and let others run between its steps."""
    size, tokens = len(text), 0
    for medium in _media(text):
        if medium is None:
            yield
        else:
            size -= medium[0]
            tokens += medium[1]
    return tokens + size // _BYTES_PER_TOKEN


def _media(text: bytes) -> Generator[tuple[int, int] | None, None, None]:
    """Yield the bytes and the tokens of each medium in base64, and None in between, where others may run.

    A text is not read, it is looked at now and then: only base64 goes on for so long without a mark.
    """
    behind = count = 0  # behind: the string that was looked at last
    for window in range(0, len(text), _LOOKED_PER_STEP):
        yield None
        looks = _looks(text, window)
        look = looks.find(True, max(0, (behind - window) // _STRIDE))
        while look >= 0:
            at = window + look * _STRIDE
            count += 1
            if not count % _LOOKS_PER_STEP:
                yield None
            if at >= behind and not _is_short(text, at) and _BASE64.fullmatch(text, at, at + _RUN_BYTES) is not None:
                start = (yield from _last(text, behind, at)) + 1
                end = yield from _first(text, b'"', at, len(text))
                if end < 0:
                    end = len(text)
                if end - start >= _SMALL_BYTES:
                    yield None
                    if (yield from _first(text, b" ", start, end)) < 0 and (start or not behind):
                        tokens = _tokens_of(text, start, end)
                        if tokens is not None:
                            yield end - start, tokens
                behind = end + 1
            look = looks.find(True, max(look, (behind - window) // _STRIDE) + 1)


def _looks(text: bytes, window: int) -> bytes:
    """Return for each look whether the first bytes that it sees may be base64; those of a step are made at once."""
    end = max(window, min(len(text) - _RUN_BYTES, window + _LOOKED_PER_STEP))
    found, count = -1, len(text[window:end:_STRIDE])
    for offset in range(_FIRST_BYTES):
        found &= int.from_bytes(text[window + offset : end + offset : _STRIDE].translate(_IS_BASE64))
    return found.to_bytes(count)


def _is_short(text: bytes, at: int) -> bool:
    """Whether a place is within a string of less than `_SMALL_BYTES`, or between two."""
    return text.find(b'"', at, at + _STRIDE) >= 0 and text.rfind(b'"', max(0, at - _STRIDE), at) >= 0


def _first(text: bytes, mark: bytes, start: int, end: int) -> Generator[None, None, int]:
    """Return where a mark stands first, -1 for nowhere."""
    for at in range(start, end, _FOUND_PER_STEP):
        found = text.find(mark, at, min(end, at + _FOUND_PER_STEP))
        if found >= 0:
            return found
        yield
    return -1


def _last(text: bytes, start: int, end: int) -> Generator[None, None, int]:
    """Return where a quote stands last, -1 for nowhere."""
    for at in range(end, start, -_FOUND_PER_STEP):
        found = text.rfind(b'"', max(start, at - _FOUND_PER_STEP), at)
        if found >= 0:
            return found
        yield
    return -1


def _tokens_of(text: bytes, start: int, end: int) -> int | None:
    """Return what a string in base64 counts, None where it is a text after all.

    That of a piece which begins within a string is counted with the piece in which the string began.
    """
    if not start:
        return 0
    url = _DATA_URL.match(text, start, min(end, start + _NEAR_BYTES))
    if url is not None and text[start - 2 : start - 1] != b"\\":  # else it is told within a text
        kind = url[1].lower()
        if kind == b"text":
            return None
    elif _MEMBER.search(text[max(0, start - _MEMBER_BYTES) : start]):
        kind = _kind_near(text, start, end)
    else:
        return None
    if kind == b"image":
        return _IMAGE_TOKENS
    bytes_per_token, most = _RATES.get(kind, _RATE_OF_FILES)
    return min((end - start) * 3 // 4 // bytes_per_token, most)


def _kind_near(text: bytes, start: int, end: int) -> bytes:
    """Return the kind of a medium by what stands before it in its object, or else behind; most are images."""
    before = text[max(0, start - _NEAR_BYTES) : start].rpartition(b"}")[2]
    kinds: list[bytes] = _KIND.findall(before) or _KIND.findall(text, end, end + _NEAR_BYTES)[:1]
    return kinds[-1].lower() if kinds else b"image"
