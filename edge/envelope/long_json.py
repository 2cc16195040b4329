"""A long JSON body: what it asks, found in steps between which others run.

Its outline is read (`envelope/outline.py`), and what it asks is read in a short body of the same members, in which each
long value is another one of its kind.
"""

import random
import types
from collections.abc import Generator
from typing import Final

import msgspec

from edge.envelope.json import LONG_BODY_BYTES, START_BYTES, Envelope, Places, read_json
from edge.envelope.members import Member
from edge.envelope.outline import PIECE_BYTES, Outline, end_within_text, plain_quotes
from edge.envelope.steering import NAMES, READ, Names
from edge.errors import InvalidRequest
from edge.metering.estimating import estimated_in_steps

_MAX_VALUE_BYTES: Final = 8192  # of a value that is read; what the edge reads is shorter, or has no such length
_MAX_SHORT_BYTES: Final = 1 << 17  # of all of them
_STAND_INS: Final = {
    b'"': b'"%b"' % (b"x" * _MAX_VALUE_BYTES),
    b"[": b"[0%b]" % (b",0" * (_MAX_VALUE_BYTES // 2)),
    b"{": b'{"":"%b"}' % (b"x" * _MAX_VALUE_BYTES),
}
_NUMBER: Final = b"1" * _MAX_VALUE_BYTES
_MOST_AT_ONCE_BYTES: Final = 1 << 20  # of text, in 1 ms, or 3 where it is not ASCII
_STRIDE_BITS: Final = 12  # between two bytes of a sample
_FEW_MARKS: Final = 8  # in a sample is one in so many
_NOT_MARKS: Final = bytes(set(range(256)) - set(b'[]{},:"\\'))
_text = msgspec.json.Decoder(str)


def takes_long(body: bytes) -> bool:
    """Whether a body is to be read in steps: it is very long, or long and dense.

    A number or a bracket takes ten times as long as so much text. How many there are is told from a sample: it begins
    anywhere, so that nobody can write a body around it.
    """
    if len(body) <= LONG_BODY_BYTES:
        return False
    sample = body[random.getrandbits(_STRIDE_BITS) :: 1 << _STRIDE_BITS]
    return len(body) > _MOST_AT_ONCE_BYTES or len(sample.translate(None, _NOT_MARKS)) > len(sample) // _FEW_MARKS


@types.coroutine
def read_long_json(
    body: bytes, path_model: str = "", limits: tuple[str, ...] = (), names: Names = NAMES
) -> Generator[None, None, Envelope]:
    """Return what `read_json` does, and let others run between its steps; no step takes 5 ms.

    Raises: as `read_json`.
    """
    outline = Outline(body)
    yield from outline.read()
    members = outline.members
    envelope = read_json(_short(body, members), path_model, limits, names)
    yield
    prompt_tokens = yield from estimated_in_steps(body)
    last = {member.name: member for member in members if member.name is not None}
    prompts, characters = envelope.prompts, 0
    if "prompt" in last and _is_long(last["prompt"]):
        prompts = max(1, (yield from _prompts_in(body, last["prompt"])))
    if "input" in last:
        characters = yield from _characters_in(body, last["input"])
        yield
    places = Places(tuple(members), outline.inside, characters)
    return msgspec.structs.replace(
        envelope, prompt_tokens=prompt_tokens or 1, prompts=prompts, places=places, members=None
    )


def _short(body: bytes, members: list[Member]) -> bytes:
    """Return a body with the same members.

    Each long value is replaced by another one of its kind, and each that is not read by a small one.
    """
    parts: list[bytes] = []
    size = 0
    for member in members:
        if member.name is None:
            continue  # nobody looks for it
        value = b"0"
        if member.name in READ:
            is_long = _is_long(member)
            stand_in = _STAND_INS.get(body[member.start : member.start + 1], _NUMBER)
            value = stand_in if is_long else body[member.start : member.end]
            size += len(value)
        if size > _MAX_SHORT_BYTES:
            raise InvalidRequest("the body has too many members, and is too large for so many")
        parts.append(b"%b:%b" % (msgspec.json.encode(member.name), value))
    return b"{%b}" % b",".join(parts)


def _is_long(member: Member) -> bool:
    return member.end - member.start > _MAX_VALUE_BYTES


def _prompts_in(body: bytes, prompt: Member) -> Generator[None, None, int]:
    """Return how many prompts a long member asks to be completed, at most."""
    start, end = prompt.start, prompt.end
    if body[start : start + 1] != b"[":
        return 1
    kind = body[start + 1 : start + START_BYTES].lstrip()[:1]
    if kind not in (b"[", b'"'):
        return 1
    count, at = 0, start
    while at < end:
        window = body[at : min(end, at + PIECE_BYTES)]
        plain = plain_quotes(window)
        if plain.endswith(b"\\"):  # an escape goes on
            plain = plain[:-1]
        count += plain.count(kind)
        at += len(plain)
        yield
    return count // 2 if kind == b'"' else count - 1


def _characters_in(body: bytes, text: Member) -> Generator[None, None, int]:
    """Return how many characters a text has; 0 for what is none."""
    if body[text.start : text.start + 1] != b'"':
        return 0
    characters, at, end = 0, text.start + 1, text.end - 1
    while at < end:
        window = body[at : min(end, at + PIECE_BYTES)]
        if at + len(window) < end:
            window = window[: end_within_text(window)]
        characters += len(_text.decode(b'"%b"' % window))
        at += len(window)
        yield
    return characters
