"""The members of a body's top level: found as any parser finds them, each where it stands."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge.envelope.members import MAX_MEMBERS, Member, first_place, members_of
from edge.errors import InvalidRequest
from tests.envelope.reading import MIB, memory_below

SPACE = st.text(" \t\r\n", max_size=2)
TEXTS = st.one_of(st.sampled_from(["model", '"', "\\", 'a":', "model\\", "}", ","]), st.text(max_size=4))
SPELLED = st.builds(lambda text, is_ascii: json.dumps(text, ensure_ascii=is_ascii), TEXTS, st.booleans())
KEYS = st.one_of(st.sampled_from(['"model"', '"mod\\u0065l"', '"\\u006Dodel"', '"m\\/"']), SPELLED)
VALUES: st.SearchStrategy[str] = st.recursive(
    st.sampled_from(["null", "true", "-1.50e+3", "0", '"\\ud83d\\ude00"', "[]", "{}"]) | SPELLED,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda values: f"[ {' ,'.join(values)}]")
        | st.lists(st.tuples(KEYS, inner), max_size=3).map(
            lambda members: f"{{{', '.join(f'{key} :{value}' for key, value in members)} }}"
        )
    ),
    max_leaves=6,
)


@st.composite
def written(draw: st.DrawFn) -> tuple[bytes, list[tuple[str, str]]]:
    """Draw the text of an object, and its members as they are written there."""
    members = draw(st.lists(st.tuples(KEYS, VALUES), max_size=5))
    parts = [f"{draw(SPACE)}{key}{draw(SPACE)}:{draw(SPACE)}{value}{draw(SPACE)}" for key, value in members]
    text = f"{draw(SPACE)}{{{','.join(parts) or draw(SPACE)}}}{draw(SPACE)}"
    return text.encode("utf-8", "surrogatepass"), members


@given(written())
@example((b'{"a":1,"a":2,"\\u0061" : [ {"a":3} ] }', [('"a"', "1"), ('"a"', "2"), ('"\\u0061"', '[ {"a":3} ]')]))
def test_each_member_is_found_in_its_order_and_where_it_stands(
    body_and_members: tuple[bytes, list[tuple[str, str]]],
) -> None:
    body, members = body_and_members
    try:
        names = [key for key, _ in json.loads(body, object_pairs_hook=list)]
        body.decode()
    except ValueError:  # half a pair of surrogates
        return
    try:
        found, values = members_of(body)
    except InvalidRequest:
        assert any("\ud800" <= letter <= "\udfff" for name in names for letter in name)
        return
    assert [member.name for member in found] == names
    assert [bytes(value).decode() for value in values] == [value for _, value in members]
    for member, (key, value) in zip(found, members, strict=True):
        assert body[member.key :].startswith(key.encode())
        assert body[member.start : member.end] == value.encode()
    assert body[first_place(body) - 1 : first_place(body)] == b"{"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "object"),
        (b" [1] ", "object"),
        (b'{"a":1', "JSON"),
        (b'{"a":1} x', "JSON"),
        (b'{"\\ud800":1}', "JSON"),
        (b'{"a":' + b"[" * MIB, "deeply"),
        (b'{"a":1' + b',"a":1' * MAX_MEMBERS + b"}", "1000 members"),
    ],
)
def test_what_is_no_object_of_few_members_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        members_of(body)


@pytest.mark.parametrize("space", [b" ", b"\n"])
def test_members_may_stand_far_apart(space: bytes) -> None:
    far = space * MIB
    body = b'{%b"a"%b:%b1%b,%b"b":2}' % (far, far, far, far, far)
    found: list[Any] = members_of(body)[0]
    assert found == [
        Member("a", MIB + 1, 3 * MIB + 5, 3 * MIB + 6),
        Member("b", 5 * MIB + 7, len(body) - 2, len(body) - 1),
    ]


def test_values_are_not_built() -> None:
    body = b'{"model":"m","x":[' + b"{}," * MIB + b"{}]}"
    with memory_below(MIB):
        assert [member.name for member in members_of(body)[0]] == ["model", "x"]
