"""Marks of a prompt: a digest of all that stands before a place, so that the next request finds what it shares with it.

Marks stand where the last messages end, which the next turn finds again to the byte; behind tools and system; and at
growing offsets, for what was edited and for long single messages. No digest leaves the process, and none can be turned
back into a prompt.
"""

import types
from bisect import bisect_left
from collections.abc import Generator
from hashlib import sha256
from typing import Final, NamedTuple

from edge.envelope.prompt import Prompt

_OFFSETS: Final = tuple(1 << power for power in range(10, 20))  # of messages: 1 KiB to 512 KiB, each twice the last
_TEXT_OFFSETS: Final = (*(1 << power for power in range(3, 10)), *_OFFSETS)  # a text has no ends within it
_LONG_OFFSETS: Final = tuple(int(2 ** (power / 4)) for power in range(77, 109))  # past 512 KiB: 100,000 tokens are much
_SMALL_BYTES: Final = 1 << 12  # of messages, whose ends are enough
_STEP_BYTES: Final = 1 << 18  # 0.2 ms
_DROPPED_BITS: Final = 4  # of 64: an int of 60 takes 32 bytes


class Prefix(NamedTuple):
    """The marks of a prompt: `offsets` into it, ascending, with a digest each; the last one is its `size` in bytes.

    `previous` is the offset at which the request before ended, 0 for a first turn. `home` is whose the conversation is
    and how it began, the same in every process; `session` a digest of the caller's own name for it, 0 for none.
    """

    size: int
    offsets: tuple[int, ...]
    digests: tuple[int, ...]
    previous: int
    home: bytes
    session: int


@types.coroutine
def read_prefix(prompt: Prompt, owner: bytes, session: bytes = b"") -> Generator[None, None, Prefix]:
    """Return the marks of a prompt, and let others run within a long one.

    Prompts of different owners share no mark: how fast an answer came says nothing of what others asked. `session` is
    what a header names the conversation, if the body does not.
    """
    owner = b"%d %b" % (len(owner), owner)  # none is the beginning of another
    views = [memoryview(part) for part in prompt.head]
    before = sum(map(len, views)) - prompt.start if views else -prompt.start  # of an offset and its place in `data`
    last = prompt.ends[-1]
    size = before + last
    offsets = _places(prompt, before, size)
    views.append(memoryview(prompt.data)[prompt.start : last])
    running, digests, at, number = sha256(owner), [], 0, 0
    for view in views:
        begin, end = at, at + len(view)
        while at < end:
            mark = offsets[number]
            stop = mark if mark < end else end
            if stop - at > _STEP_BYTES:
                stop = at + _STEP_BYTES
                yield
            running.update(view[at - begin : stop - begin])
            at = stop
            if at == mark:
                digests.append(_short(running.copy().digest()))
                number += at < size
    if not size:
        digests.append(_short(running.digest()))
    previous = before + prompt.previous if prompt.previous else 0
    named = prompt.session or session
    home = b"%b %b" % (owner, named or prompt.home)
    return Prefix(size, tuple(offsets), tuple(digests), previous, home, _short(sha256(home).digest()) if named else 0)


def _places(prompt: Prompt, before: int, size: int) -> list[int]:
    """Return where a prompt has marks, ascending."""
    if size <= _SMALL_BYTES and not prompt.is_text and not prompt.head:
        return [before + end for end in prompt.ends]
    marks = {before + end for end in prompt.ends}
    if prompt.head:
        marks.add(before + prompt.start)
    if prompt.is_text or size > _SMALL_BYTES:
        growing = _TEXT_OFFSETS if prompt.is_text else _OFFSETS
        marks.update(growing[: bisect_left(growing, size)])
        if size > growing[-1]:
            marks.update(_LONG_OFFSETS[: bisect_left(_LONG_OFFSETS, size)])
    return sorted(marks)


def _short(digest: bytes) -> int:
    return int.from_bytes(digest[:8]) >> _DROPPED_BITS
