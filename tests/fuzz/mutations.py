"""Bytes that are near the usual, for who has no time: framing is made of lines, so lines come, go and change places.

What changes any byte is refused with the first line, nearly always.
"""

import random
from collections.abc import Callable, Sequence

_COUNTS = (1, 1, 1, 2, 2, 3, 4)  # of changes: each further one hides what the first has found
_MAX_SPAN_BYTES = 30


def mutated(data: bytes, chance: random.Random, usual: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """Return bytes with some changes: whole lines, words of their grammar, spans of what is usual, any bytes."""
    for _ in range(chance.choice(_COUNTS)):
        data = chance.choice(_CHANGES)(data, chance, chance.choice((*words, _span(chance, usual))))
    return data


def _span(chance: random.Random, usual: Sequence[bytes]) -> bytes:
    seed = chance.choice(usual)
    return seed[chance.randrange(len(seed)) :][: chance.randint(0, _MAX_SPAN_BYTES)]


def _early(chance: random.Random, count: int) -> int:
    """Return one of so many places, rather one of the first: there are the heads."""
    return min(chance.randrange(count), chance.randrange(count))


def _with_word(data: bytes, chance: random.Random, word: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    lines.insert(_early(chance, len(lines) + 1), word)
    return b"".join(lines)


def _word_for_line(data: bytes, chance: random.Random, word: bytes) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    lines[_early(chance, len(lines))] = word
    return b"".join(lines)


def _line_again(data: bytes, chance: random.Random, word: bytes) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    lines.insert(_early(chance, len(lines) + 1), chance.choice(lines))
    return b"".join(lines)


def _other_line_end(data: bytes, chance: random.Random, word: bytes) -> bytes:
    lines = data.splitlines(keepends=True) or [b""]
    at = chance.randrange(len(lines))
    lines[at] = lines[at].rstrip(b"\r\n") + chance.choice((b"", b"\n", b"\r", b"\r\n\r\n"))
    return b"".join(lines)


def _word_anywhere(data: bytes, chance: random.Random, word: bytes) -> bytes:
    at = chance.randint(0, len(data))
    return data[:at] + word + data[at + chance.choice((0, 1, 2, chance.randint(0, _MAX_SPAN_BYTES))) :]


def _other_byte(data: bytes, chance: random.Random, word: bytes) -> bytes:
    at = chance.randint(0, len(data))
    return data[:at] + chance.randbytes(chance.randint(0, 2)) + data[at + 1 :]


_CHANGES: Sequence[Callable[[bytes, random.Random, bytes], bytes]] = (
    _with_word, _word_for_line, _line_again, _other_line_end, _word_anywhere, _other_byte,
)  # fmt: skip
