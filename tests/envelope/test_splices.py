"""What of a body is changed: whoever parses the result finds the new model, and all else as it was."""

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge.envelope.json import LONG_BODY_BYTES
from edge.envelope.steering import READ
from tests.envelope.reading import in_steps, read_json, rewrite_json

TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"')
WHITESPACE = st.text(" \t\r\n", max_size=2)
NAMES = st.one_of(
    st.sampled_from(
        ["m", "public/deepseek-r1", "u-1100a15812cc/qwen2", "模型/ü", "a b", "\N{GRINNING FACE}", '"', "\\"]
    ),
    st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8),
).filter(str.isprintable)
KEYS = st.one_of(st.sampled_from(["stream", "messages", "models", "a", '"model"', "\\", "model."]), st.text(max_size=4))
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "x", 'a"model', "mod"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Draw the text of an object with one model somewhere, written in any of the ways that JSON allows."""
    members = draw(st.dictionaries(KEYS.filter(lambda key: key.casefold() not in READ), VALUES, max_size=4))
    items = [(json.dumps(key, ensure_ascii=draw(st.booleans())), json.dumps(value)) for key, value in members.items()]
    key = draw(st.sampled_from(['"model"', '"mod\\u0065l"', '"\\u006Dodel"']))
    items.insert(draw(st.integers(0, len(items))), (key, json.dumps(draw(NAMES), ensure_ascii=draw(st.booleans()))))
    space = draw(WHITESPACE)
    text = ",".join(f"{space}{name}{space}:{space}{value}{space}" for name, value in items)
    return f"{space}{{{text}}}{space}".encode("utf-8", "surrogatepass")


def is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


@given(bodies().filter(is_utf8), NAMES)
@example(b'{"model":"a","x":{"model":"b"}}', "c")
@example(b'{"x":["model"],"model":"a"}', "c")
@example(b'{"model" : "a"}', '"')
def test_rewritten_body_differs_in_the_models_name_only(body: bytes, name: str) -> None:
    """Whoever parses the result finds the new name, and everything else as it was, to the byte."""
    envelope = read_json(body)
    assert envelope.model == json.loads(body)["model"]
    rewritten = rewrite_json(body, envelope, name)
    assert json.loads(rewritten) == {**json.loads(body), "model": name}
    written = json.dumps(name, ensure_ascii=False).encode()
    texts = [text.span() for text in TEXT.finditer(body)]
    assert rewritten in [body] + [body[:start] + written + body[end:] for start, end in texts]


@given(
    st.dictionaries(st.text("abc", max_size=3), st.integers(), max_size=3),
    NAMES.filter(lambda name: '"' not in name and name.replace("\\", "")[:5] != "model"),
)
def test_plain_body_is_spliced(members: dict[str, int], name: str) -> None:
    """In the usual body, one `"model"` without escapes, nothing is looked up."""
    body = json.dumps({**members, "model": name.replace("\\", "")[:5] or "m"}, ensure_ascii=False).encode()
    envelope = read_json(body)
    assert envelope.places is None
    written = b'"model": ' + json.dumps(envelope.model, ensure_ascii=False).encode()
    assert rewrite_json(body, envelope, "n") == body.replace(written, b'"model": "n"')


@pytest.mark.parametrize(
    "value",
    [
        b"123456789012345678901234567890123456789012345678901234567890",
        b"1.00000000000000000000000000000000000000001",
        b"-0.0",
        b"1E+2",
        b"1e400",
        b'"\\u00e9\\/\\ud83d\\ude00"',
        b"[ 1 ,\t2 ]",
        b'{"a":1,"a":2}',
    ],
)
def test_values_of_a_body_with_an_unusual_model_are_the_clients_bytes(value: bytes) -> None:
    """No number loses digits and no text changes its spelling."""
    body = b'{"mod\\u0065l":"m","x":%b}' % value
    assert rewrite_json(body, read_json(body), "new") == body.replace(b'"m"', b'"new"')


@pytest.mark.parametrize("body", [b'{"model":"m","x":{"model":"n"},"model":"m"}', b'{"mod\\u0065l":"m","model":"m"}'])
def test_every_model_of_a_rewritten_body_is_the_new_one(body: bytes) -> None:
    pairs: list[tuple[str, object]] = []
    json.loads(rewrite_json(body, read_json(body), "new"), object_pairs_hook=pairs.extend)
    assert [value for key, value in pairs if key == "model" and value != "n"] == ["new", "new"]


# --- what is asked of usage


@pytest.mark.parametrize(
    ("body", "rewritten"),
    [
        (b'{"model":"m"}', b'{"stream_options":{"include_usage":true},"model":"new"}'),
        (
            b' \t\r\n{ "messages":[{"stream_options":1}],"model" : "m"}\n',
            b' \t\r\n{"stream_options":{"include_usage":true}, "messages":[{"stream_options":1}],"model" : "new"}\n',
        ),
        (b'{"x":"{\\"model\\":1}","model":"m"}', b'{"stream_options":{"include_usage":true},'
         b'"x":"{\\"model\\":1}","model":"new"}'),
    ],
)  # fmt: skip
def test_body_that_says_nothing_of_usage_asks_for_it_by_a_splice(body: bytes, rewritten: bytes) -> None:
    """Every other byte is the client's, and the model is spliced in the same go."""
    envelope = read_json(body)
    assert rewrite_json(body, envelope, "new", include_usage=True) == rewritten
    same = rewritten.replace(b'"new"', b'"m"')
    assert rewrite_json(body, envelope, "m", include_usage=True) == same
    both = same.replace(b'"include_usage":true', b'"include_usage":true,"continuous_usage_stats":true')
    assert rewrite_json(body, envelope, "m", include_usage=True, continuous=True) == both


@pytest.mark.parametrize(
    ("options", "continuous"),
    [
        (b'{"include_usage":true}', False),
        (b'{"include_usage" : true,"x":1}', False),
        (b'{"include_usage":true,"continuous_usage_stats":true}', True),
        (b'"yes"', True),
        (b"[]", True),
        (b"1", False),
    ],
)
def test_body_that_asks_already_or_asks_nonsense_stays_as_it_is(options: bytes, continuous: bool) -> None:
    body = b'{ "model" : "m", "stream_options" : %b }' % options
    envelope = read_json(body)
    assert rewrite_json(body, envelope, "m", include_usage=True, continuous=continuous) == body
    assert rewrite_json(body, envelope, "n", include_usage=True, continuous=continuous) == body.replace(b'"m"', b'"n"')


@pytest.mark.parametrize(
    ("key", "options", "merged"),
    [
        ("stream_options", "null", {"include_usage": True}),
        ("stream_options", "{}", {"include_usage": True}),
        ("stream\\u005foptions", '{"include_usage":false}', {"include_usage": True}),
        ("stream_options", '{"include_usage":1,"include_obfuscation":false}',
         {"include_usage": True, "include_obfuscation": False}),
        ("stream_options", '{"continuous_usage_stats":true}', {"include_usage": True, "continuous_usage_stats": True}),
    ],
)  # fmt: skip
def test_options_that_lack_usage_are_added_to(key: str, options: str, merged: dict[str, Any]) -> None:
    """In every spelling: a second member of that name could be read instead of ours."""
    body = f'{{"x":1e400,"{key}":{options},"model":"m"}}'.encode()
    rewritten = rewrite_json(body, read_json(body), "n", include_usage=True)
    pairs = json.loads(rewritten, object_pairs_hook=list)
    assert [name for name, _ in pairs] == ["x", "stream_options", "model"]
    assert json.loads(rewritten)["stream_options"] == merged
    assert json.loads(rewritten)["model"] == "n"
    assert b"1e400" in rewritten


OPTIONS = st.one_of(
    st.none(),
    st.text(max_size=3),
    st.lists(st.booleans(), max_size=2),
    st.dictionaries(
        st.sampled_from(["include_usage", "continuous_usage_stats", "x"]), st.none() | st.booleans() | st.just(1)
    ),
)


@given(bodies().filter(is_utf8), NAMES, OPTIONS, st.booleans(), st.booleans(), st.booleans())
def test_rewritten_body_differs_in_model_and_usage_only(
    body: bytes, name: str, options: Any, given_options: bool, include_usage: bool, continuous: bool
) -> None:
    if given_options:
        end = body.rindex(b"}")
        body = body[:end] + b', "stream_opt\\u0069ons" :' + json.dumps(options).encode() + body[end:]
    expected = {**json.loads(body), "model": name}
    wanted = [("include_usage", include_usage), ("continuous_usage_stats", continuous)]
    asked = options if given_options and options is not None else {}
    if isinstance(asked, dict) and any(want and asked.get(key) is not True for key, want in wanted):
        expected["stream_options"] = asked | {key: True for key, want in wanted if want}
    rewritten = rewrite_json(body, read_json(body), name, include_usage=include_usage, continuous=continuous)
    assert json.loads(rewritten) == expected
    assert len(json.loads(rewritten, object_pairs_hook=list)) == len(expected)


# --- places that are not certain


@pytest.mark.parametrize(
    "body",
    [
        b'{ "model":"m" , "tools":[{"model":{"type":"string"}}]}',
        b'{"x":{"model":"n"},"mod\\u0065l" : "\\u006d"}',
        b'{"x":"\\"model\\": \\"m\\"","y":{"model":"n"},"model":"m"}',
    ],
)
def test_only_model_of_its_value_is_spliced_whatever_else_is_called_so(body: bytes) -> None:
    written = b'"\\u006d"' if b"\\u006d" in body else b'"m"'
    assert rewrite_json(body, read_json(body), "new") == b'"new"'.join(body.rsplit(written, 1))


def test_slash_that_is_escaped_as_php_does_is_spliced() -> None:
    body = b'{"x":[1,\t2],"model":"public\\/m" }'
    assert rewrite_json(body, read_json(body), "n") == b'{"x":[1,\t2],"model":"n" }'


@pytest.mark.parametrize("text", [b"x", b"x" * LONG_BODY_BYTES])
def test_options_whose_place_is_not_plain_ask_for_usage_all_the_same(text: bytes) -> None:
    """What an answer used is metered exactly, however long its request was."""
    body = b'{"model":"m","stream":true,"x":"%b","stream_\\u006fptions":{"a":1},"y":{"stream_options":{"a":1}}}' % text
    rewritten = rewrite_json(body, read_json(body), "n", include_usage=True)
    asked = json.loads(rewritten)
    assert asked["model"] == "n"
    assert asked["y"] == {"stream_options": {"a": 1}}
    assert asked["stream_options"] == {"a": 1, "include_usage": True}


@pytest.mark.parametrize("members", [b"", b'"model":null', b'"x":1,"mod\\u0065l": null ', b'"model":null,"model":null'])
def test_long_body_without_a_model_gets_one(members: bytes) -> None:
    """As an Azure deployment has it: the path names the model."""
    body = b"{%b%b}" % (b" " * LONG_BODY_BYTES, members)
    rewritten = rewrite_json(body, in_steps(body, path_model="m"), "n", include_usage=True)
    pairs = json.loads(rewritten, object_pairs_hook=list)
    assert {value for name, value in pairs if name == "model"} == {"n"}
    assert ("stream_options", [("include_usage", True)]) in pairs
