"""The members at the top of a document, however long it is and however it comes: as a parser finds them."""

import json
import random
import tracemalloc
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.metering.scanning import _BYTES_PER_STEP, MAX_VALUE_BYTES, Scanner
from tests.profiles import examples
from tests.streams import cut

KEYS = ["usage", "timings", "response", "a", "usag", "usages", "", "us\\age", 'u"', "{", "é"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**9) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('au"\\{}[]:, \n\u2028é') | st.just('"usage":{"prompt_tokens":1}}'),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.sampled_from(KEYS), below, max_size=4),
    max_leaves=20,
)  # fmt: skip
MEMBERS = st.lists(st.tuples(st.sampled_from(KEYS), JSON), max_size=6)  # the same key may come twice
SPACES = [(",", ":"), (", ", ": "), (" ,\n\t", " :\r\n")]


def written(members: list[tuple[str, Any]], spaces: tuple[str, str], *, is_ascii: bool = False) -> bytes:
    """A document with these members, in this order."""
    comma, colon = spaces
    texts = [
        f"{json.dumps(key)}{colon}{json.dumps(value, separators=spaces, ensure_ascii=is_ascii)}"
        for key, value in members
    ]
    return ("{" + comma.join(texts) + "}").encode()


def found_in(parts: list[bytes]) -> dict[bytes, Any]:
    """What is found, with `usage` of `response` beside it."""
    inner = Scanner(b"usage")
    scanner = Scanner(b"usage", b"timings", response=inner)
    for part in parts:
        scanner.feed(part)
    found = {name: orjson.loads(value) for name, value in scanner.found.items()}
    if inner.found:
        found[b"inner"] = orjson.loads(inner.found[b"usage"])
    return found


def parsed(document: bytes) -> dict[bytes, Any]:
    value = orjson.loads(document)
    found = {name.encode(): value[name] for name in ("usage", "timings") if name in value}
    response = value.get("response")
    if isinstance(response, dict) and "usage" in response:
        found[b"inner"] = response["usage"]
    return found


@examples(400)
@given(MEMBERS, st.sampled_from(SPACES), st.booleans(), st.data())
def test_members_are_those_that_a_parser_finds(
    members: list[tuple[str, Any]], spaces: tuple[str, str], is_ascii: bool, draw: st.DataObject
) -> None:
    if sum(key == "response" for key, _ in members) > 1:
        members = [member for member in members if member[0] != "response"]
    document = written(members, spaces, is_ascii=is_ascii)
    expected = parsed(document)
    assert found_in([document]) == expected
    assert found_in(cut(document, range(1, len(document)))) == expected
    positions = draw.draw(st.sets(st.integers(1, len(document) - 1), max_size=8))
    assert found_in(cut(document, positions)) == expected
    assert found_in([b" \r\n", document, b"\n", document.replace(b"1", b"2")]) == expected


@examples(200)
@given(MEMBERS, st.sampled_from(SPACES), st.data())
def test_document_that_is_cut_yields_the_members_that_it_had_whole(
    members: list[tuple[str, Any]], spaces: tuple[str, str], draw: st.DataObject
) -> None:
    members = list(dict(members).items())
    document = written(members, spaces)
    length = draw.draw(st.integers(0, len(document) - 1))
    positions = draw.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=4))
    whole: dict[bytes, Any] = {}
    for count in range(len(members) + 1):  # its end is the comma behind the last of them, or before that
        if len(written(members[:count], spaces)) - 1 + spaces[0].index(",") < length or not count:
            whole = parsed(written(members[:count], spaces))
    found = found_in(cut(document[:length], [at for at in positions if at < length]))
    inner = found.pop(b"inner", None)
    assert inner is None or inner == parsed(document)[b"inner"]
    whole.pop(b"inner", None)
    assert found == {name: parsed(document)[name] for name in found}
    assert found.keys() >= whole.keys() - {members[-1][0].encode()} if members else not found


@examples(300)
@given(st.lists(st.binary(max_size=9) | st.sampled_from([b"{", b'"usage"', b":", b"[", b"]", b"}", b",", b"\\", b'"'])))
def test_no_bytes_make_it_fail(parts: list[bytes]) -> None:
    scanners = Scanner(b"usage"), Scanner(b"usage")
    for part in parts:
        scanners[0].feed(part)
    scanners[1].feed(b"".join(parts))
    assert scanners[0].found == scanners[1].found


@pytest.mark.parametrize("document", [b"", b" ", b"[1]", b'"usage":{}', b"\xff\xfb", b"null", b'[{"usage":{}}]'])
def test_nothing_is_found_in_what_is_no_object(document: bytes) -> None:
    assert found_in([document]) == {}


def test_value_that_is_too_long_is_none() -> None:
    for length, is_found in ((MAX_VALUE_BYTES - 2, True), (MAX_VALUE_BYTES - 1, False), (10**6, False)):
        document = orjson.dumps({"usage": "x" * length, "timings": 1})
        for size in (10**7, 1000):
            found = found_in(cut(document, range(size, len(document), size)))
            assert (b"usage" in found, found[b"timings"]) == (is_found, 1)


BUILT_TO_BE_SLOW = {
    "deep": b'{"a":[' + b"[[[[[[[[[[]]]]]]]]]]," * 100_000,
    "open": b'{"a":' + b"[" * 10**6,
    "twice": b"{" + b'"usage":1,' * 100_000,
    "escapes": b"{" + b'"\\u0061":1,' * 100_000,
}


@pytest.mark.parametrize("name", BUILT_TO_BE_SLOW)
def test_document_that_is_built_to_be_slow_is_given_up(name: str) -> None:
    scanner = Scanner(b"usage")
    for part in cut(BUILT_TO_BE_SLOW[name], range(65_536, len(BUILT_TO_BE_SLOW[name]), 65_536)):
        scanner.feed(part)
        assert scanner._spare >= 0, "no more steps are taken than there are, whatever a step finds"
    scanner.feed(b'"usage":{"prompt_tokens":1}}')
    assert scanner.done
    is_found = scanner.found.get(b"usage") == b'{"prompt_tokens":1}'
    assert is_found is (name == "escapes"), "members that nobody asked for are skipped"


def test_little_is_kept() -> None:
    tracemalloc.start()
    try:
        for begin in (b'{"a":"', b'{"a":[', b'{"usage":"', b'{"'):
            scanner = Scanner(b"usage")
            scanner.feed(begin)
            for _ in range(100):
                scanner.feed(b"1," * 16_384)
            assert tracemalloc.get_traced_memory()[0] < 3 * MAX_VALUE_BYTES
    finally:
        tracemalloc.stop()


def test_vectors_and_images_take_few_steps() -> None:
    """Which is what they cost; one whole value, or as much as came of it, is one."""
    vector = [random.Random(1).random() for _ in range(512)]
    documents: list[Any] = [
        {"data": [{"object": "embedding", "index": at, "embedding": vector} for at in range(50)]},
        {"data": [{"b64_json": "QUJD" * 10**5}] * 3},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "a", "bytes": [97]}] * 5}] * 2000}}]},
    ]
    for value in documents:
        document = orjson.dumps(value | {"usage": {"prompt_tokens": 3}})
        scanner = Scanner(b"usage")
        before = scanner._spare
        scanner.feed(document)
        assert scanner.found == {b"usage": b'{"prompt_tokens":3}'}
        assert before + len(document) // _BYTES_PER_STEP - scanner._spare < 20
