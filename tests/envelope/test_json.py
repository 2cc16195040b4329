"""What a body asks for: two parsers that read one body must come to the same model."""

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge.config.steering import STEERING
from edge.envelope.json import LONG_BODY_BYTES, STEP_BYTES
from edge.envelope.long_json import read_long_json
from edge.envelope.steering import READ
from edge.errors import InvalidRequest, ModelNotFound
from edge.names import MAX_MODEL_LENGTH
from edge.operations import OPERATIONS
from tests.envelope.reading import MIB, memory_below, read_json, rewrite_json

# --- what is read


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
def test_two_models_cannot_hide_behind_a_key_that_the_check_uses_itself(separator: bytes) -> None:
    """The check renames keys; a key of the client's that equals a new name must not take another one's place."""
    for dots in [1, 2, 3]:
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


# --- what is refused


STEER = {name for table in STEERING.values() for name in table}
MODELS = st.sampled_from(['"m"', '"m"', '"\\u006d"', '"n"', '""', "null", "1", '["m"]', '{"model":"m"}', '"a\\u0000"'])
NAMES_OF_MODEL = st.sampled_from(['"model"', '"mod\\u0065l"', '"\\u006D\\u006f\\u0064\\u0065\\u006C"'])
SCALARS = st.sampled_from(
    ["null", "true", "false", "1", '"true"', "[]", '{"model":"n","Stream":1}', '"\\"model\\": 1"']
)
OTHERS = st.sampled_from(
    ['"stream"', '"str\\u0065am"', '"Model"', '"MODE\\u004c"', '"\u017ftream"', '"messages"', '"x"', '"\\"model\\":"',
     '"lora_path"', '"Lora_\\u0050ath"', '"priority"', '"max_tokens"', '"%s"' % ("k" * 600)]
)  # fmt: skip
MEMBERS = st.tuples(NAMES_OF_MODEL, MODELS) | st.tuples(OTHERS, SCALARS)
PADDING = st.sampled_from(["", "x" * 20_000, '\\"model\\":\\"n\\",' * 1500, "\\\\u006dodel" * 2000, "é" * 9000])


def verdict(body: bytes) -> tuple[str, ...]:
    """Return what is to become of a body by what another parser finds: why it is refused, or its model."""
    members: list[tuple[str, Any]] = json.loads(body, object_pairs_hook=lambda pairs: pairs)
    names = dict(members)
    for name in names:
        if name.casefold() in READ and name != name.casefold():
            return "refused", name.casefold()
    if not any(names.get("stream") is value for value in (None, True, False)):
        return "refused", "stream"
    models = [value for name, value in members if name == "model"]
    if not models or not isinstance(models[-1], str) or not models[-1]:
        return "refused", "model"
    if not models[-1].isprintable():
        return ("unknown",)
    if any(value != models[-1] for value in models):
        return "refused", "model"
    return "read", models[-1], *(name for name in names if name.casefold() in STEER)


@given(st.lists(MEMBERS, max_size=4), PADDING, st.sampled_from(["", " ", "\n\t"]))
@example([('"model"', '"m"'), ('"mod\\u0065l"', '"n"')], "", "")
@example([('"model"', '"m"'), ('"model"', "null")], "x" * 20_000, " ")
def test_body_is_read_or_refused_as_another_parser_would_have_it(
    members: list[tuple[str, str]], padding: str, space: str
) -> None:
    """However its names are spelled, whatever its texts hold, and whichever way a body of its size is read."""
    padded = [*members, ('"y"', f'"{padding}"')] if padding else members
    body = f",{space}".join(f"{name}{space}:{space}{value}" for name, value in padded)
    try:
        envelope = read_json(f"{space}{{{body}}}".encode())
        outcome = ("read", envelope.model, *envelope.steering)
    except ModelNotFound:
        outcome = ("unknown",)
    except InvalidRequest as refusal:
        outcome = ("refused", str(refusal.param))
    assert outcome == verdict(f"{{{body}}}".encode())


# --- limits, and what is asked of usage


CHAT, TEXT, MESSAGES, RESPONSES = (
    OPERATIONS[name].limits for name in ("chat/completions", "completions", "messages", "responses")
)


@pytest.mark.parametrize(
    ("value", "max_tokens"),
    [
        (b"256", 256),
        (b" 64", 64),
        (b"null", None),
        (b"0", None),
        (b"-1", None),
        (b"-0", None),
        (b"1.0", 1),
        (b"1e3", 1000),
        (b'"12"', 12),
        (b"true", 1),
        (b"[1]", None),
        (b'{"max_tokens":1}', None),
        (b"9" * 5000, None),
    ],
)
def test_limit_of_an_answer_is_a_number_above_zero(value: bytes, max_tokens: int | None) -> None:
    """What else stands there is for the upstream to refuse."""
    assert read_json(b'{"model":"m","max_tokens":%b}' % value, *TEXT).max_tokens == max_tokens
    assert read_json(b'{"model":"m","max_tok\\u0065ns":%b}' % value, *TEXT).max_tokens == max_tokens
    assert read_json(b'{"model":"m","x":{"max_tokens":%b}}' % value, *TEXT).max_tokens is None
    assert read_json(b'{"model":"m","max_tokens":%b}' % value).max_tokens is None, "an operation that has no limit"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (b"", [None, None, None, None]),
        (b',"max_tokens":256', [256, 256, 256, None]),
        (b',"max_completion_tokens":64', [64, None, None, None]),
        (b',"max_output_tokens":128', [None, None, None, 128]),
        (b',"max_tokens":16,"max_completion_tokens":64', [64, 16, 16, None]),
        (b',"max_completion_tokens":64,"max_tokens":256', [64, 256, 256, None]),
        (b',"max_tokens":256,"max_completion_tokens":null', [256, 256, 256, None]),
        (b',"max_tokens":256,"max_completion_tokens":-1', [None, 256, 256, None]),  # without end to llama.cpp
        (b',"max_tokens":1,"max_completion_tokens":2,"max_output_tokens":4000', [2, 1, 1, 4000]),
    ],
)
def test_limit_that_counts_is_the_one_that_engines_obey(members: bytes, expected: list[int | None]) -> None:
    """A smaller one that an engine does not know must not bound what it wrote."""
    body = b'{"model":"m"' + members + b"}"
    assert [read_json(body, *limits).max_tokens for limits in (CHAT, TEXT, MESSAGES, RESPONSES)] == expected


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        (b'"a"', 1),
        (b'"[\\"a\\",\\"b\\"]"', 1),
        (b"null", 1),
        (b"[]", 1),
        (b"[1,2,3]", 1),
        (b"[[1,2],[3]]", 2),
        (b" [ [ 1 , 2 ] , [3],[4] ] ", 3),
        (b'["a"]', 1),
        (b'["a","b","c"]', 3),
        (b'[ "a" ,\n"b" ]', 2),
        (b'["say \\"a\\"","b","\\\\","\\\\\\""]', 4),
        (b'["[1]","[\\"a\\",2]"]', 2),
        (b'[{"a":1}]', 1),
        (b'["a"' + b',"b"' * 999 + b"]", 1000),
        (b'["' + b'\\"' * 100_000 + b'"]', 1),
        (b'["' + b'\\"' * 200_000 + b'","b"]', 2),
    ],
)
def test_each_prompt_of_a_batch_is_counted(prompt: bytes, prompts: int) -> None:
    assert read_json(b'{"model":"m","prompt":%b}' % prompt).prompts == prompts
    assert read_json(b'{"model":"m","x":{"prompt":%b}}' % prompt).prompts == 1


def test_batch_of_millions_of_prompts_is_not_built() -> None:
    body = b'{"model":"m","prompt":["\\\\"' + b',"a"' * (2 * MIB) + b"]}"
    with memory_below(3 * len(body)):
        assert read_json(body).prompts == 2 * MIB + 1


@pytest.mark.parametrize(
    ("value", "n"), [(b"3", 3), (b"1", 1), (b"0", 1), (b"-2", 1), (b"null", 1), (b'"2"', 2), (b"2.0", 2), (b"[2]", 1)]
)
def test_number_of_answers_is_one_unless_it_says_more(value: bytes, n: int) -> None:
    assert read_json(b'{"model":"m","n":%b}' % value).n == n
    assert read_json(b'{"model":"m"}').n == 1


def test_answers_that_are_made_to_choose_from_count() -> None:
    """OpenAI's completions bill each of `best_of`; of fewer than `n` there are none."""
    assert read_json(b'{"model":"m","best_of":5}').n == 5
    assert read_json(b'{"model":"m","n":2,"best_of":5}').n == 5
    assert read_json(b'{"model":"m","n":2,"best_of":1}').n == 2


@pytest.mark.parametrize(
    ("options", "include_usage", "continuous"),
    [
        (b'{"include_usage":true}', True, False),
        (b'{"include_usage":true,"continuous_usage_stats":true}', True, True),
        (b'{ "continuous_usage_stats" : true , "include_usag\\u0065" : true }', True, True),
        (b'{"include_usage":false,"continuous_usage_stats":true}', False, True),
        (b'{"include_usage":null}', False, False),
        (b'{"include_usage":1}', True, False),
        (b'{"include_usage":"true","continuous_usage_stats":1.0}', True, True),
        (b'{"include_usage":0}', False, False),
        (b'{"include_usage":[true]}', False, False),
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


# --- the size of the prompt


def test_prompt_is_guessed_from_its_size_and_is_never_nothing() -> None:
    assert read_json(b'{"model":"m"}').prompt_tokens == 3
    assert read_json(b'{"model":"m","x":"%b"}' % (b"some words " * 40_000)).prompt_tokens == 110_005
    sound = b'{"model":"m","input_audio":{"data":"%b","format":"wav"}}' % (b"QUJD" * 100_000)
    assert 400 < read_json(sound).prompt_tokens < 1000


# --- long bodies


def test_character_may_stand_across_the_pieces_in_which_a_long_body_is_checked() -> None:
    begins = b'{"model":"m","x":"'
    for shift in range(3):
        text = b"x" * shift + "界".encode() * (2 * MIB)
        assert read_json(begins + text + b'"}').model == "m"
        with pytest.raises(InvalidRequest, match="UTF-8"):
            read_json(begins + text[:-1] + b'"}')
        with pytest.raises(InvalidRequest, match="UTF-8"):
            read_json(begins + text[:-1])


async def test_others_have_their_turn_between_the_steps_of_a_long_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.envelope.outline.thread_time", itertools.count().__next__)  # each piece takes its time
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
    assert turns >= 12  # a step is a piece of at most 256 KiB of 3 MiB


# --- bombs


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


def test_long_body_has_at_most_a_thousand_members() -> None:
    """Who looks at its top level could otherwise be kept at it; the largest API has 50."""
    text = b"x" * LONG_BODY_BYTES
    body = b'{"model":"m","x":"%b"%%b}' % text
    assert read_json(body % b"".join(b',"%d":0' % number for number in range(998))).model == "m"
    with pytest.raises(InvalidRequest, match="more than 1000 members"):
        read_json(body % b"".join(b',"%d":0' % number for number in range(999)))


def test_body_of_very_many_members_is_refused() -> None:
    """Each name is looked at; the largest API has 50."""
    few = b'{"mod\\u0065l":"m"%b}' % b"".join(b',"%d":[]' % number for number in range(999))
    assert read_json(few).model == "m"
    many = b'{"mod\\u0065l":"m"%b}' % b"".join(b',"%d":[]' % number for number in range(20_000))
    with memory_below(4 * MIB), pytest.raises(InvalidRequest, match="1000 members"):
        read_json(many)


@pytest.mark.parametrize(
    "members",
    [
        b'"\\u0061":{"":1' + b"".join(b',"%07x":1' % number for number in range(300_000)) + b"}",
        b'"\\u0061":"' + b'\\"' * MIB + b'"',
        b'"x":[' + b'"",' * MIB + b'""],"\\u0061":1',
    ],
    ids=["members", "quotes in a text", "texts"],
)
def test_looking_for_a_second_model_builds_nothing(members: bytes) -> None:
    body = b'{"model":"m",%b}' % members
    with memory_below(3 * len(body)):
        assert read_json(body).model == "m"


@pytest.mark.parametrize("members", [400, 300_000])
def test_stream_options_of_many_members_are_refused(members: int) -> None:
    """There are three: what cannot be added to would switch exact metering off, and hide usage from who asked."""
    options = b'{"include_usage":true' + b"".join(b',"%d":1234' % number for number in range(members)) + b"}"
    body = b'{"model":"m","stream":true,"stream_options":%b}' % options
    with memory_below(5 * len(body) + MIB // 8), pytest.raises(InvalidRequest, match="stream_options"):
        read_json(body)


def test_long_body_that_names_its_model_twice_is_rewritten_in_both_places() -> None:
    body = b'{"model":"m","x":[{"model":"m"}%b],"mod\\u0065l" : "\\u006d" }' % (b',"x"' * LONG_BODY_BYTES)
    pairs = json.loads(rewrite_json(body, read_json(body), "new"), object_pairs_hook=list)
    assert [value for name, value in pairs if name == "model"] == ["new", "new"]
    assert dict(pairs)["x"][0] == [("model", "m")]


def test_second_model_is_found_wherever_a_step_ends() -> None:
    """Each step looks a little into the next one; what stands across both is found once."""
    for shift in range(-30, 5):
        text = b"x" * (STEP_BYTES + shift)
        assert read_json(b'{"model":"m","x":"%b","mod\\u0065l":"\\u006d"}' % text).model == "m"
        for first, last in ((b"m", b"n"), (b"n", b"m")):
            with pytest.raises(InvalidRequest, match="two different"):
                read_json(b'{"model":"%b","x":"%b","mod\\u0065l":"%b"}' % (first, text, last))


@pytest.mark.parametrize("rest", [b',"a":0', b',"":0', b',"a" :"::"'])
def test_member_that_comes_again_counts_however_short_the_body_is(rest: bytes) -> None:
    """Else a body would be taken that cannot be changed afterwards, when an endpoint is to be asked."""
    few = b'{"model":"m"%b}' % (rest * 999)
    assert rewrite_json(few, read_json(few), "other", include_usage=True).startswith(b'{"')
    with pytest.raises(InvalidRequest, match="1000 members"):
        read_json(b'{"model":"m"%b}' % (rest * 1000))
