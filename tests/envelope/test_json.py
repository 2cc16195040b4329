"""What a body asks for, and the splices: two parsers that read one body must come to the same model."""

import asyncio
import json
import re
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge.envelope import json as envelopes
from edge.envelope.json import (
    STEP_BYTES,
    Envelope,
    conversation_start,
    prompt_estimate,
    read_long_json,
    read_multipart,
    rewrite_json,
    rewrite_multipart,
)
from edge.errors import EdgeError, InvalidRequest, ModelNotFound
from edge.names import MAX_MODEL_LENGTH

MIB = 2**20


def read_json(body: bytes) -> Envelope:
    """Read a body at once, and in steps: both must say the same."""
    try:
        at_once = envelopes.read_json(body)
    except EdgeError as error:
        with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
            in_steps(body)
        raise
    assert in_steps(body) == at_once
    return at_once


def in_steps(body: bytes) -> Envelope:
    async def read() -> Envelope:
        return await read_long_json(body)

    reading = read()
    while True:
        try:
            reading.send(None)
        except StopIteration as done:
            envelope: Envelope = done.value
            return envelope


@contextmanager
def memory_below(limit_bytes: int) -> Iterator[None]:
    """Assert that what runs inside allocates less than this at its peak."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()


# --- JSON: what is read


@pytest.mark.parametrize(
    ("body", "model", "stream"),
    [
        (b'{"model":"m"}', "m", False),
        (b'{"model":"m","stream":true}', "m", True),
        (b'{"stream":true,"messages":[{"role":"user","content":"x"}],"model":"m"}', "m", True),
        (b'{"stream":null,"model":"m"}', "m", False),
        (b' \t\r\n{ "model"\n:\t"m" , "stream" : false }\n', "m", False),
        (b'{"mod\\u0065l":"m","stre\\u0061m":true}', "m", True),
        (b'{"\\u006D\\u006f\\u0064\\u0065\\u006C":"m"}', "m", False),
        (b'{"model":"a\\u002fb"}', "a/b", False),
        ('{"model":"模型/ü"}'.encode(), "模型/ü", False),
        (b'{"model":"\\ud83d\\ude00"}', "\N{GRINNING FACE}", False),
        (b'{"metadata":{"model":"n"},"model":"m"}', "m", False),
        (b'{"model":"m","metadata":{"model":"n","mod\\u0065l":"o"}}', "m", False),
        (b'{"model":"m","tools":["model",{"x":"\\"model\\": \\"n\\""}]}', "m", False),
        (b'{"model":"m","model":"m"}', "m", False),
        (b'{"model":"m","mod\\u0065l":"\\u006d"}', "m", False),
        (b'{"Model":"n","model":"m","MODEL":"o"}', "m", False),
        (b'{"model":"m","x":{"model":1e400}}', "m", False),
    ],
)
def test_model_and_stream_are_found_wherever_they_stand(body: bytes, model: str, stream: bool) -> None:
    envelope = read_json(body)
    assert (envelope.model, envelope.stream) == (model, stream)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"null", None),
        (b"[]", None),
        (b'"model"', None),
        (b"{", None),
        (b'{"model":"m"', None),
        (b'{"model":"m"} x', None),
        (b'{"model":"m"}{"model":"n"}', None),
        (b"{'model':'m'}", None),
        (b'{"model":"m",}', None),
        (b'\xef\xbb\xbf{"model":"m"}', None),
        (b'{"model":"m","x":"\xff"}', None),
        (b'{"model":"\xed\xa0\x80"}', None),
        (b"{}", "model"),
        (b'{"model":""}', "model"),
        (b'{"model":null}', "model"),
        (b'{"model":1}', "model"),
        (b'{"model":["m"]}', "model"),
        (b'{"x":{"model":"m"}}', "model"),
        (b'{"model":"m","stream":1}', "stream"),
        (b'{"model":"m","stream":"true"}', "stream"),
        (b'{"model":"m","model":"n"}', "model"),
        (b'{"model":"m","model":null}', None),
        (b'{"model":1,"model":"m"}', "model"),
        (b'{"model":"m","x":1,"mod\\u0065l":"n"}', "model"),
        (b'{"mod\\u0065l":"n","model":"m"}', "model"),
        (b'{"x":{"model":"m"},"model":"n","\\u006dodel":"m"}', "model"),
    ],
)
def test_what_two_parsers_could_read_differently_is_refused(body: bytes, param: str | None) -> None:
    """RFC 8259 section 4: the behaviour of software that receives equal names is unpredictable."""
    with pytest.raises(InvalidRequest) as caught:
        read_json(body)
    assert param is None or caught.value.param == param


@pytest.mark.parametrize("separator", [b"\\u002e", b"\\u002E", b"."])
@pytest.mark.parametrize("dots", [1, 2, 3])
def test_two_models_cannot_hide_behind_a_key_that_the_check_uses_itself(separator: bytes, dots: int) -> None:
    """The check renames keys; a key of the client's that equals a new name must not take another one's place."""
    for number in range(4):
        for hidden in (b"m", b"n"):
            body = b'{"model":"m","model":"n","model%b%d":"%b"}' % (separator * dots, number, hidden)
            with pytest.raises(InvalidRequest):
                read_json(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","x":"\\ud800"}',
        b'{"model":"\\ud800"}',
        b'{"model":"m\\ud83d"}',
        b'{"model":"\\udc00\\ud800"}',
        b'{"model":"\\ud800","model":"\\ud800"}',
        b'{"\\ud800":1,"model":"m","x":{"model":"n"}}',
        b'{"\\ud800":1,"mod\\u0065l":"m"}',
        b'{"model":"m","model":"\\ud800"}',
        b'{"model":"\\ud800","model":"m"}',
    ],
)
def test_lone_surrogates_are_the_callers_fault(body: bytes) -> None:
    """An escape of half a pair is no character (RFC 8259 section 8.2); whatever is said of it, it is no defect."""
    try:
        envelope = read_json(body)
    except (InvalidRequest, ModelNotFound):
        return
    assert json.loads(rewrite_json(body, envelope, "new"))["model"] == "new"


@pytest.mark.parametrize("name", ["m\\u0000", "m\\n", "m\\u202e", "m\\u007f", "m" * (MAX_MODEL_LENGTH + 1)])
def test_a_name_that_no_model_can_have_is_not_found_and_not_repeated(name: str) -> None:
    """An answer or a log line must not carry control characters or 64 MiB of name."""
    with pytest.raises(ModelNotFound) as caught:
        read_json(b'{"model":"%b"}' % name.encode())
    assert len(caught.value.message) < 200
    assert caught.value.message.isprintable()


# --- JSON: the splice

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
    members = draw(st.dictionaries(KEYS.filter(lambda key: key not in ("model", "stream")), VALUES, max_size=4))
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
    """Whoever parses the result finds the new name, and everything else as it was; spliced: to the byte."""
    envelope = read_json(body)
    assert envelope.model == json.loads(body)["model"]
    rewritten = rewrite_json(body, envelope, name)
    assert json.loads(rewritten) == {**json.loads(body), "model": name}
    if envelope.one_spelling and b"\\" not in body:
        start = body.find(b'"', body.find(b":", body.find(b'"model"'))) + 1
        end = start + len(envelope.model.encode())
        assert rewritten[:start] == body[:start]
        assert rewritten[start:].endswith(body[end:])


@given(
    st.dictionaries(st.text("abc", max_size=3), st.integers(), max_size=3),
    NAMES.filter(lambda name: '"' not in name and name.replace("\\", "")[:5] != "model"),
)
def test_plain_body_is_spliced(members: dict[str, int], name: str) -> None:
    """The usual body, one `"model"` without escapes, is never written anew."""
    body = json.dumps({**members, "model": name.replace("\\", "")[:5] or "m"}, ensure_ascii=False).encode()
    envelope = read_json(body)
    assert envelope.one_spelling
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
def test_values_of_a_body_written_anew_are_the_clients_bytes(value: bytes) -> None:
    """No number loses digits and no text changes its spelling because a splice was not possible."""
    body = b'{"mod\\u0065l":"m","x":%b}' % value
    envelope = read_json(body)
    assert not envelope.one_spelling
    assert value in rewrite_json(body, envelope, "new")


@pytest.mark.parametrize("body", [b'{"model":"m","x":{"model":"n"},"model":"m"}', b'{"mod\\u0065l":"m","model":"m"}'])
def test_body_written_anew_has_one_model(body: bytes) -> None:
    pairs: list[tuple[str, object]] = []
    json.loads(rewrite_json(body, read_json(body), "new"), object_pairs_hook=pairs.extend)
    assert [value for key, value in pairs if key == "model" and value != "n"] == ["new"]


# --- JSON: limits, and what is asked of usage


@pytest.mark.parametrize(
    ("members", "max_tokens"),
    [
        (b"", None),
        (b',"max_tokens":256', 256),
        (b',"max_completion_tokens": 64', 64),
        (b',"max_output_tokens":1', 1),
        (b',"max_tokens":256,"max_completion_tokens":64,"max_output_tokens":128', 64),
        (b',"max_tokens":null,"max_completion_tokens":64', 64),
        (b',"max_tok\\u0065ns":5', 5),
        (b',"max_tokens":0', None),
        (b',"max_tokens":0,"max_output_tokens":9', 9),
        (b',"max_tokens":-1', None),
        (b',"max_tokens":-0', None),
        (b',"max_tokens":1.0', None),
        (b',"max_tokens":1e3', None),
        (b',"max_tokens":"12"', None),
        (b',"max_tokens":true', None),
        (b',"max_tokens":[1]', None),
        (b',"max_tokens":{"max_tokens":1}', None),
        (b',"max_tokens":' + b"9" * 5000, None),
        (b',"x":{"max_tokens":1}', None),
    ],
)
def test_smallest_limit_that_is_a_number_counts(members: bytes, max_tokens: int | None) -> None:
    """What else stands there is for the upstream to refuse."""
    assert read_json(b'{"model":"m"' + members + b"}").max_tokens == max_tokens


@pytest.mark.parametrize(
    ("value", "n"), [(b"3", 3), (b"1", 1), (b"0", 1), (b"-2", 1), (b"null", 1), (b'"2"', 1), (b"2.5", 1)]
)
def test_number_of_answers_is_one_unless_it_says_more(value: bytes, n: int) -> None:
    assert read_json(b'{"model":"m","n":%b}' % value).n == n
    assert read_json(b'{"model":"m"}').n == 1


@pytest.mark.parametrize(
    ("options", "include_usage", "continuous"),
    [
        (b'{"include_usage":true}', True, False),
        (b'{"include_usage":true,"continuous_usage_stats":true}', True, True),
        (b'{ "continuous_usage_stats" : true , "include_usag\\u0065" : true }', True, True),
        (b'{"include_usage":false,"continuous_usage_stats":true}', False, True),
        (b'{"include_usage":null}', False, False),
        (b'{"include_usage":1}', False, False),
        (b'{"include_usage":"true"}', False, False),
        (b'{"x":{"include_usage":true}}', False, False),
        (b"{}", False, False),
        (b"null", False, False),
        (b"true", False, False),
        (b'"include_usage"', False, False),
        (b'["include_usage"]', False, False),
        (b'[{"include_usage":true}]', False, False),
    ],
)
def test_what_is_asked_of_usage_is_known_and_nothing_else_is_refused(
    options: bytes, include_usage: bool, continuous: bool
) -> None:
    envelope = read_json(b'{"stream_options":%b,"model":"m","stream":true}' % options)
    assert envelope.stream_options == options
    assert (envelope.include_usage, envelope.continuous_usage) == (include_usage, continuous)


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
    assert rewrite_json(body, envelope, "m", include_usage=True, continuous=continuous) is body
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


# --- JSON: the size of the prompt


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (b"", 1),
        (b"{}", 1),
        (b"x" * 400, 100),
        (b'{"text":"%b"}' % (b"x" * 4000), 1002),
        (b'{"url":"data:image/png;base64,%b","b":"%b"}' % (b"A" * 10**6, b"x" * 4000), 1004),
        (b'["data:image/png;base64,AAAA","data:image/png;base64,BBBB"]', 14),  # too small to be looked through
        (b"x" * 400 + b"data:image/png", 103),
        (b'"data:image/' * 1_000_000, 2_999_725),
    ],
)
def test_size_of_the_prompt_is_guessed_from_text_and_not_from_images(body: bytes, tokens: int) -> None:
    assert prompt_estimate(body) == tokens


# --- JSON: long bodies


def test_character_may_stand_across_the_pieces_in_which_a_long_body_is_checked() -> None:
    begins = b'{"model":"m","x":"'
    for shift in range(3):
        text = b"x" * shift + "界".encode() * (2 * MIB)
        assert read_json(begins + text + b'"}').model == "m"
        with pytest.raises(InvalidRequest, match="UTF-8"):
            read_json(begins + text[:-1] + b'"}')
        with pytest.raises(InvalidRequest, match="UTF-8"):
            read_json(begins + text[:-1])


async def test_others_have_their_turn_between_the_steps_of_a_long_body() -> None:
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while not reading.done():
            turns += 1
            await asyncio.sleep(0)

    async def read() -> None:
        envelope = await read_long_json(b'{"model":"m","x":"%b"}' % ("界".encode() * MIB))
        assert envelope.model == "m"

    async with asyncio.TaskGroup() as group:
        reading = group.create_task(read())
        await take_turns()
    assert turns > 12  # one for each 256 KiB, and some over all of it


# --- JSON: bombs


@pytest.mark.parametrize(
    "bomb",
    [
        b'{"model":"m","x":[' + b"[]," * (8 * MIB // 3) + b"[]]}",
        b'{"model":"m","x":[' + b"{}," * (8 * MIB // 3) + b"{}]}",
        b'{"model":"m","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"m","x":' + b'{"x":' * 100_000 + b"1" + b"}" * 100_001,
        b'{"model":"m"' + b"".join(b',"%d":0' % number for number in range(700_000)) + b"}",
        b'{"model":"m","x":[' + b'{"model":1},' * 300_000 + b"1]}",
        b'{"model":"m"' + b',"model":"m"' * 300_000 + b"}",
        b'{"model":"m","x":"' + b"\\u006d" * (8 * MIB // 6) + b'"}',
        b'{"model":"m","x":' + b"9" * (8 * MIB) + b"}",
        b'{"x":"' + b'\\"model\\":' * 700_000 + b'","model":"m"}',
        b'{"model":"m","x":' + b"[" * 8 * MIB,
        b'{"model"' + b" " * 8 * MIB + b':"m"}',
        b'{"model":"' + b"m" * 8 * MIB + b'"}',
        b'{"' + b"model" * MIB + b'":1,"model":"m"}',
    ],
    ids=[
        "arrays", "objects", "deep arrays", "deep objects", "keys", "nested models", "equal models", "escapes",
        "a long number", "quoted keys", "open brackets", "space", "a long name", "a long key",
    ],
)  # fmt: skip
def test_bomb_costs_no_tree(bomb: bytes) -> None:
    """What stands in the body is not built: at most a few copies of the body itself are ever held."""
    with memory_below(4 * len(bomb) + MIB):
        try:
            outcome = read_json(bomb).model
        except (InvalidRequest, ModelNotFound) as refusal:
            outcome = refusal.message
    assert outcome == "m" or 5 < len(outcome) < 200


def test_many_keys_beside_an_escaped_model_stay_bounded() -> None:
    """The top level is read member by member where the key is escaped: still no tree of the values."""
    body = b'{"mod\\u0065l":"m"' + b"".join(b',"%d":[]' % number for number in range(100_000)) + b"}"
    with memory_below(64 * MIB):
        envelope = read_json(body)
        assert envelope.model == "m"


def test_conversation_of_millions_of_messages_is_not_built() -> None:
    body = b'{"model":"m","messages":[' + b"{}," * 3_000_000 + b"{}]}"
    with memory_below(MIB):
        assert conversation_start(body).endswith(b"[{},{},{}" + b",{}" * 338 + b",")


def test_conversation_full_of_braces_begins_as_it_did_a_turn_ago() -> None:
    first = [{"role": "user", "content": "{" * 60_000}]
    more = [*first, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "go on"}]
    begins = [conversation_start(json.dumps({"model": "m", "messages": each}).encode()) for each in (first, more)]
    assert begins[0] == begins[1] != b""


@pytest.mark.parametrize(
    "members",
    [
        b'"\\u0061":1' + b"".join(b',"%07x":1' % number for number in range(300_000)),
        b'"\\u0061":"' + b'\\"' * MIB + b'"',
        b'"x":[' + b'"",' * MIB + b'""],"\\u0061":1',
    ],
    ids=["members", "quotes in a text", "texts"],
)
def test_looking_for_a_second_model_builds_nothing(members: bytes) -> None:
    body = b'{"model":"m",%b}' % members
    with memory_below(3 * len(body)):
        assert read_json(body).model == "m"


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


@pytest.mark.parametrize("members", [400, 300_000])
def test_stream_options_of_many_members_are_refused(members: int) -> None:
    """There are three: what cannot be added to would switch exact metering off, and hide usage from who asked."""
    options = b'{"include_usage":true' + b"".join(b',"%d":1234' % number for number in range(members)) + b"}"
    body = b'{"model":"m","stream":true,"stream_options":%b}' % options
    with memory_below(5 * len(body)), pytest.raises(InvalidRequest, match="stream_options"):
        read_json(body)


def test_large_body_that_names_its_model_twice_is_not_written_anew() -> None:
    """It would build all of its members; few of them may stay."""
    few = b'{"model":"m","x":[{"model":"m"}],"y":"%b"}' % (b'\\"' * 200_000)
    assert json.loads(rewrite_json(few, read_json(few), "new"))["model"] == "new"
    many = b'{"model":"m","x":[{"model":"m"}]%b}' % b"".join(b',"%d":1' % number for number in range(60_000))
    with pytest.raises(InvalidRequest, match="only once"):
        read_json(many)


@pytest.mark.parametrize("long", [False, True])
def test_options_whose_place_is_not_certain_are_written_anew_in_a_short_body_only(long: bool) -> None:
    text = b"x" * (STEP_BYTES if long else 1)
    body = b'{"model":"m","stream":true,"x":"%b","stream_\\u006fptions":{"a":1},"y":{"stream_options":{"a":1}}}' % text
    rewritten = rewrite_json(body, read_json(body), "n", include_usage=True)
    asked = json.loads(rewritten)
    assert asked["model"] == "n"
    assert asked["y"] == {"stream_options": {"a": 1}}
    assert asked["stream_options"] == ({"a": 1} if long else {"a": 1, "include_usage": True})


def test_second_model_is_found_wherever_a_step_ends() -> None:
    """Each step looks a little into the next one; what stands across both is found once."""
    for shift in range(-30, 5):
        text = b"x" * (STEP_BYTES + shift)
        assert read_json(b'{"model":"m","x":"%b","mod\\u0065l":"\\u006d"}' % text).model == "m"
        for first, last in ((b"m", b"n"), (b"n", b"m")):
            with pytest.raises(InvalidRequest, match="two different"):
                read_json(b'{"model":"%b","x":"%b","mod\\u0065l":"%b"}' % (first, text, last))


# --- multipart

TYPE = "multipart/form-data; boundary=xx"


def part(name: str, content: bytes, more: str = "") -> bytes:
    return b'--xx\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (
        name.encode(),
        more.encode(),
        content,
    )


END = b"--xx--\r\n"
MODEL = part("model", b"whisper")
FILE = part("file", b"RIFF\r\n\r\n--x\r\n--\r\n\x00\xff--xx", '; filename="a.wav"\r\nContent-Type: audio/wav')


@pytest.mark.parametrize(
    ("content_type", "delimiter"),
    [
        ("multipart/form-data; boundary=xx", b"xx"),
        ('multipart/form-data; boundary="xx"', b"xx"),
        ("multipart/form-data;boundary=xx; charset=utf-8", b"xx"),
        ("Multipart/Form-Data; charset=utf-8; BOUNDARY=xx", b"xx"),
        ('multipart/form-data; boundary="a b?=/:()"', b"a b?=/:()"),
        (
            "multipart/form-data; boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW",
            b"----WebKitFormBoundary7MA4YWxkTrZu0gW",
        ),
        ("multipart/form-data; boundary=" + "b" * 70, b"b" * 70),
    ],
)
def test_boundary_is_understood_quoted_or_not(content_type: str, delimiter: bytes) -> None:
    """RFC 2046 section 5.1.1: up to 70 characters, quoted when one of them needs it."""
    body = (
        (FILE + MODEL + END).replace(b"--xx\r\n", b"--" + delimiter + b"\r\n").replace(b"--xx--", b"--%b--" % delimiter)
    )
    assert read_multipart(body, content_type).model == "whisper"


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ('Content-Disposition: form-data; name="model"', True),
        ("content-disposition:form-data;name=model", True),
        ('CONTENT-DISPOSITION: Form-Data; NAME="model"', True),
        ('Content-Type: text/plain\r\nContent-Disposition: form-data; name="model"', True),
        ('Content-Disposition: form-data; x="name=y"; name="model"', True),
        ('Content-Disposition: form-data; name="model"; filename="m"', False),
        ("Content-Disposition: form-data; filename*=utf-8''m; name=\"model\"", False),
        ('Content-Disposition: form-data; filename="m"; name="model"', False),
        ('Content-Disposition: form-data; name="models"', False),
        ('Content-Disposition: form-data; name="x"', False),
        ('Content-Disposition: attachment; name="model"', False),
        ("X-Name: model", False),
        ("", False),
    ],
)
def test_only_a_form_field_named_model_is_the_model(head: str, found: bool) -> None:
    """RFC 7578 section 4.2; a file of that name is a file."""
    separator = "\r\n" if head else ""
    body = b"--xx\r\n%b%b\r\nm\r\n" % (head.encode(), separator.encode()) + END
    if found:
        assert read_multipart(body, TYPE).model == "m"
    else:
        with pytest.raises(InvalidRequest):
            read_multipart(body, TYPE)


@pytest.mark.parametrize(
    "second",
    [
        b'--xx\r\nContent-Disposition: form-data; name="x"; name="model"\r\n\r\nm2\r\n',
        b'--xx\r\nContent-Disposition: form-data;\r\n name="model"\r\n\r\nm2\r\n',
        b'--xx\r\nContent-Disposition: form-data; name="x"\r\n'
        b'Content-Disposition: form-data; name="model"\r\n\r\nm2\r\n',
        b"--xx\r\nContent-Disposition: form-data; name*=utf-8''model\r\n\r\nm2\r\n",
        b'--xx\r\nContent-Disposition : form-data; name="model"\r\n\r\nm2\r\n',
        b'--xx\r\nContent-Disposition: form-data; name = "model"\r\n\r\nm2\r\n',
        b'--xx\r\nContent-Disposition: form-data; name="mod\\el"\r\n\r\nm2\r\n',
    ],
    ids=["two names", "folded", "two dispositions", "extended name", "space", "spaces", "escape"],
)
def test_part_that_others_could_read_as_a_second_model_is_refused(second: bytes) -> None:
    """One parser takes the last of two names, another the first; the model served must be the one authorised."""
    for body in (MODEL + second + END, second + MODEL + END):
        with pytest.raises(InvalidRequest):
            read_multipart(body, TYPE)


def changed(old: bytes, new: bytes) -> bytes:
    return (FILE + MODEL + END).replace(old, new, 1)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (FILE + END, TYPE),
        (MODEL + MODEL + END, TYPE),
        (MODEL + part("model", b"other") + END, TYPE),
        (MODEL + part("stream", b"true") + part("stream", b"false") + END, TYPE),
        (MODEL, TYPE),
        (MODEL + b"--xx", TYPE),
        (MODEL[:-4], TYPE),
        (b"", TYPE),
        (END, TYPE),
        (b"preamble\r\n" + MODEL + END, TYPE),
        (b"\r\n" + MODEL + END, TYPE),
        (MODEL.replace(b"\r\n", b"\n") + END, TYPE),
        (b'--xx\r\nContent-Disposition: form-data; name="model"\r\nwhisper\r\n' + END, TYPE),
        (MODEL + END, "multipart/form-data"),
        (MODEL + END, "multipart/form-data; boundary="),
        (MODEL + END, 'multipart/form-data; boundary=""'),
        (MODEL + END, "multipart/form-data; boundary=" + "b" * 71),
        (MODEL + END, "multipart/form-data; boundary=x"),
        (MODEL + END, "multipart/form-data; boundary=xxx"),
        (part("model", b"\xff") + END, TYPE),
        (part("model", b"") + END, TYPE),
        (part("a", b"") * 1100 + MODEL + END, TYPE),
    ],
)
def test_form_without_one_certain_model_is_refused(body: bytes, content_type: str) -> None:
    with pytest.raises(InvalidRequest):
        read_multipart(body, content_type)


@pytest.mark.parametrize(
    ("value", "stream"), [(b"true", True), (b"True", True), (b"1", True), (b"false", False), (b"", False)]
)
def test_stream_is_a_field_of_the_form(value: bytes, stream: bool) -> None:
    assert read_multipart(FILE + part("stream", value) + MODEL + END, TYPE).stream is stream


@pytest.mark.parametrize("epilogue", [b"", b"\r\n", b"an epilogue"])
@pytest.mark.parametrize("order", [lambda a, b: a + b, lambda a, b: b + a])
def test_spliced_form_differs_in_the_models_name_only(order: Callable[[bytes, bytes], bytes], epilogue: bytes) -> None:
    """Files hold CRLF and what looks like a boundary; they go upstream as they came."""
    body = order(FILE, MODEL) + b"--xx--" + epilogue
    envelope = read_multipart(body, TYPE)
    assert rewrite_multipart(body, envelope, "模型") == body.replace(b"\r\nwhisper\r\n", "\r\n模型\r\n".encode())


@given(st.binary(max_size=40).filter(lambda data: b"\r\n--xx" not in b"\r\n" + data))
def test_content_of_a_file_never_matters(content: bytes) -> None:
    body = part("file", content, '; filename="model"') + MODEL + END
    envelope = read_multipart(body, TYPE)
    assert (
        rewrite_multipart(body, envelope, "new")
        == part("file", content, '; filename="model"') + part("model", b"new") + END
    )


def test_form_of_a_million_boundaries_is_refused_without_reading_on() -> None:
    body = b"--xx\r\n\r\n\r\n" * 700_000
    with memory_below(4 * len(body)), pytest.raises(InvalidRequest):
        read_multipart(body, TYPE)
