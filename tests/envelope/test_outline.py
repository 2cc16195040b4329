"""A long body in pieces: wherever it is cut, it is the JSON that it is as a whole."""

import contextlib
import json
import random
import time
from typing import Any

import msgspec
import pytest

from edge.envelope import outline
from edge.envelope.outline import PIECE_BYTES, Outline
from edge.errors import InvalidRequest
from tests.envelope.reading import MIB, in_steps, memory_below

_raw = msgspec.json.Decoder(msgspec.Raw)
SCALARS = ("1", "-0", "1.5e3", "123456789012345678901", "true", "false", "null", "0.000000000000000000001", "1E+10")
LETTERS = ("a", "界", "\\n", "\\\\", '\\"', "\\u006d", "\\ud83d\\ude00", "é", "[", "{", ",", ":", "   ", "}", "]")
KEYS = ('"model"', '"a"', '"mod\\u0065l"', '""', '"\\\\"', '"longer key é"', '"\\ud83d\\ude00"')
MUTATIONS = (b",", b":", b"[", b"]", b"{", b"}", b'"', b"0", b"1", b" ", b"\\", b"-", b"e", b".", b"\xff")


def value(chance: random.Random, depth: int = 0) -> str:
    def spaced(values: list[str]) -> str:
        spaces = [chance.choice(("", "", " ", "\n  ")) for _ in range(2)]
        return spaces[0] + f"{spaces[0]},{spaces[1]}".join(values) + spaces[1]

    kind = chance.random() if depth else 1
    if depth > 4 or kind < 0.25:
        return chance.choice(SCALARS)
    if kind < 0.5:
        return '"' + "".join(chance.choices(LETTERS, k=chance.choice((0, 3, 12, 80)))) + '"'
    if kind < 0.75:
        return "[" + spaced([value(chance, depth + 1) for _ in range(chance.randrange(5))]) + "]"
    members = [f"{chance.choice(KEYS)} : {value(chance, depth + 1)}" for _ in range(chance.randrange(6))]
    return "{" + spaced(members) + "}"


def mutated(chance: random.Random, body: bytes) -> bytes:
    at, kind = chance.randrange(len(body)), chance.random()
    if kind < 0.4:
        return body
    if kind < 0.6:
        return body[:at] + body[at + 1 :]
    if kind < 0.9:
        return body[:at] + chance.choice(MUTATIONS) + body[at + chance.randrange(2) :]
    return body[:at]


def pairs(text: bytes) -> Any:
    return json.loads(text, object_pairs_hook=tuple)


@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_json_exactly_when_the_body_is(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr(outline, "_DENSE_PIECE_BYTES", 70)
    for _ in range(300):
        monkeypatch.setattr(outline, "PIECE_BYTES", chance.choice((70, 90, 150)))
        monkeypatch.setattr(outline, "_FIRST_PIECE_BYTES", chance.choice((70, 90)))
        monkeypatch.setattr(outline, "_LONG_TEXT_BYTES", chance.choice((1, 5, 20)))
        monkeypatch.setattr(outline, "_FIRST_TEXT_BYTES", chance.choice((13, 20, 60)))
        monkeypatch.setattr(outline, "_TEXT_PIECE_BYTES", chance.choice((20, 40, 100)))
        monkeypatch.setattr(outline, "_FEW_QUOTES", chance.choice((1, 10, 1000)))
        monkeypatch.setattr(outline, "_MANY_MARKS", chance.choice((1, 5, 20)))
        monkeypatch.setattr(outline, "_LONG_TOKEN_BYTES", chance.choice((8, 30, 64)))
        body = mutated(chance, value(chance).encode())
        try:
            body.decode()
            _raw.decode(body)
        except (UnicodeDecodeError, msgspec.DecodeError):
            with pytest.raises(InvalidRequest):
                list(Outline(body).read())
            continue
        if not body.lstrip().startswith(b"{"):
            continue
        read = Outline(body)
        list(read.read())
        found = tuple((name, pairs(body[start:end])) for name, _, start, end in read.members)
        assert found == pairs(body)
        for name, key, *_ in read.members:
            assert json.JSONDecoder().raw_decode(body[key:].decode())[0] == name
        assert body[read.inside - 1 : read.inside] == b"{"


@pytest.mark.parametrize("token", [b'"', b"\\", b"5", b"[", b" ", "界".encode(), b"\\ud83d\\ude00", b'",'])
def test_long_token_may_stand_across_pieces(token: bytes) -> None:
    for shift in range(13):
        text = b"x" * (PIECE_BYTES - 20 + shift)
        for unit in (token, token * 40_000):
            body = b'{"x":"%b%b' % (text, unit)
            for end in (b"", b'"}', b'","y":1}', b"}"):
                whole = body + end
                try:
                    _raw.decode(whole)
                except msgspec.DecodeError:
                    with pytest.raises(InvalidRequest):
                        list(Outline(whole).read())
                else:
                    list(Outline(whole).read())


@pytest.mark.parametrize("token", [b"\\\\ud83d\\n", b'\\\\\\\\ud83d\\"', b"\\ud83d\\ude00", b"\\\\\\ud83d\\ude00"])
def test_written_escape_is_not_cut(token: bytes) -> None:
    """A text about escapes has `\\\\ud83d`: a backslash and five letters, and no half of a character."""
    begun = b'{"x":"' + b"a" * PIECE_BYTES
    for before in range(outline._FIRST_TEXT_BYTES - 30, outline._FIRST_TEXT_BYTES):
        list(Outline(begun[:PIECE_BYTES] + b"a" * before + token + b"b" * 5000 + b'"}').read())


@pytest.mark.parametrize("run", [150, 2000])
def test_backslashes_before_each_quote_are_not_counted_one_by_one(run: int) -> None:
    """That took 30 ms a step."""
    steps = Outline(b'{"x":"' + (b"\\\\" * run + b'\\"') * (MIB // run) + b'"}').read()
    took_s = []
    with contextlib.suppress(StopIteration):
        while True:
            begun = time.thread_time()
            next(steps)
            took_s.append(time.thread_time() - begun)
    assert max(took_s) < 0.015


def test_number_of_many_digits_is_one_number() -> None:
    for shift in range(3):
        digits = b"7" * (3 * PIECE_BYTES + shift)
        list(Outline(b'{"x":-1.%be%b}' % (digits, digits)).read())
        for wrong in (b"0%b", b"1.%b.5", b"%be", b"-%b-1", b"1e%be5"):
            with pytest.raises(InvalidRequest, match="JSON"):
                list(Outline(b'{"x":%b}' % (wrong % digits)).read())


@pytest.mark.parametrize("before", [b'"t"', b"true", b"1 ", b"[]", b"{}", b"1\n"])
@pytest.mark.parametrize("behind", [b".5", b"e5", b"E+1", b"5", b"-1", b'"', b"null"])
def test_what_stands_behind_a_value_is_no_part_of_it(before: bytes, behind: bytes) -> None:
    """Where a piece ends just behind a value, what follows must not be read as the end of a number."""
    for opening in (b'{"x":[', b'{"x":'):
        start = opening + b" " * (PIECE_BYTES - len(opening) - len(before)) + before
        body = start + behind + (b"]}" if opening.endswith(b"[") else b"}")
        with pytest.raises(InvalidRequest, match="JSON"):
            list(Outline(body).read())


def test_nesting_is_bounded() -> None:
    with pytest.raises(InvalidRequest, match="deeply"):
        list(Outline(b'{"x":' + b"[" * MIB + b"]" * MIB + b"}").read())


@pytest.mark.parametrize(
    "unit",
    [b"[],", b"1,", b'"",', b'{"model":"m"},', b"[" * 400 + b"]" * 400 + b",", b'"\\u006d",', b'{"a":{},"b":[[]]},'],
    ids=["arrays", "numbers", "texts", "models", "deep", "escapes", "objects"],
)
def test_step_reads_a_piece_and_holds_little(unit: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here no two pieces share a step, as on a machine that is slow."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(outline, "thread_time", lambda: next(ticks))
    body = b'{"model":"m","x":[' + unit * (MIB // 2 // len(unit)) + b"1]}"
    with memory_below(2 * MIB):
        assert in_steps(body).model == "m"
        steps = sum(1 for _ in Outline(body).read())
    assert steps >= len(body) // PIECE_BYTES
