"""The name that was asked stands in the answer, and no other byte is different."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.metering.meters import Metering
from edge.operations import OPERATIONS
from edge.relay.echo import MAX_ECHOED_BYTES, DocumentEcho, EventEcho, model_span
from tests.profiles import examples
from tests.streams import cut

STREAMS = {path.stem: path.read_bytes() for path in sorted((Path(__file__).parents[1] / "cases/streams").glob("*.sse"))}
RESPONSES = (
    b'event: response.created\ndata: {"type":"response.created","response":{"id":"r","tools":[{"model":"t"}],'
    b'"model": "m", "output":[]}}\n\ndata: {"type":"response.output_text.delta","delta":"\\"model\\": \\"m\\""}\n\n'
    b'data: {"response":{"output":[{"model":"o","text":"x}]"}],"model":"m"},"type":"response.completed"}\n\n'
)
STREAMS["responses with a model"] = RESPONSES
STREAMS["cr"] = b'data: {"model":"m"}\r\rdata: {"a":1,"model":"m"}\r\r'
STREAMS["unfinished"] = b'data: {"model":"m"}\n\ndata: {"model":"m"}'
NAME = 'public/"new"\u00e9'
DOCUMENTS = [
    (b'{"model":"m"}', b'{"model":%b}'),
    (b' { "id" : "1" , "model" : "m" } ', b' { "id" : "1" , "model" : %b } '),
    (b'{"choices":[{"model":"x","text":"model"}],"model":"a\\"b\\\\"}',
     b'{"choices":[{"model":"x","text":"model"}],"model":%b}'),
    (b'{"a":{"model":"x"},"b":[[{"c":[{"d":[{"e":[1]}]}]}],"}"],"n":-1.5e3,"t":true,"model":"","z":{}}',
     b'{"a":{"model":"x"},"b":[[{"c":[{"d":[{"e":[1]}]}]}],"}"],"n":-1.5e3,"t":true,"model":%b,"z":{}}'),
    (b'{"t":"\\\\","k\\"model":1,"model":"m"}', b'{"t":"\\\\","k\\"model":1,"model":%b}'),
]  # fmt: skip
UNTOUCHED = [
    b"", b"[]", b'"model"', b"null", b"{}", b'{"model":null}', b'{"model":["m"]}', b'{"model":{"model":"m"}}',
    b'[{"model":"m"}]', b'{"a":{"model":"m"}}', b'{"message":{"model":"m"}}', b'{"a":"\\"model\\":\\"m\\""}',
    b'{"a":1 "model', b'{"model":"m', b"{{{", b'{"a":]', b"\xff\xfe", b'{"a" "model":"m"}',
]  # fmt: skip


def named(document: bytes) -> bytes:
    """The document with the name, the same however it was cut."""
    echoes = list(DocumentEcho(NAME, Metering(OPERATIONS["chat/completions"]).document()) for _ in range(2))
    echoes[0].feed(document)
    for part in cut(document, range(7, len(document), 7)):
        echoes[1].feed(part)
    changed, in_parts = (each.changed() for each in echoes)
    assert changed == in_parts
    return changed


def echoed(name: str, parts: Iterable[bytes]) -> bytes:
    echo = EventEcho(name)
    return b"".join(map(echo.feed, parts)) + echo.close()


def expected(stream: bytes) -> bytes:
    """The stream with each name replaced, found by a parser and not by the code under test."""

    def line(found: re.Match[bytes]) -> bytes:
        try:
            event = json.loads(found[0])
        except ValueError:
            return found[0]
        holder = next((each for each in (event, event.get("response"), event.get("message")) if is_named(each)), None)
        if holder is None:
            return found[0]
        name = json.dumps(holder["model"]).encode()
        places = [place.span(1) for place in re.finditer(rb'"model": ?(' + re.escape(name) + rb")", found[0])]
        for low, high in places:
            changed = found[0][:low] + json.dumps(NAME, ensure_ascii=False).encode() + found[0][high:]
            after = json.loads(changed)
            if any(is_named(each, NAME) for each in (after, after.get("response"), after.get("message"))):
                return changed
        raise AssertionError(found[0])

    return re.sub(rb"(?<=data: )[^\r\n]+", line, stream)


def is_named(holder: Any, name: str | None = None) -> bool:
    return isinstance(holder, dict) and isinstance(holder.get("model"), str) and name in (None, holder["model"])


@pytest.mark.parametrize(("document", "changed"), DOCUMENTS)
def test_only_the_value_of_the_answers_own_model_changes(document: bytes, changed: bytes) -> None:
    value = json.dumps(NAME, ensure_ascii=False).encode()
    assert named(document) == changed % value
    assert json.loads(named(document))["model"] == NAME


@pytest.mark.parametrize("document", UNTOUCHED)
def test_answer_without_a_model_is_left_as_it_is(document: bytes) -> None:
    assert named(document) == document


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('a"\\{}[]:,\n', max_size=6),
    lambda below: (
        st.lists(below, max_size=4) | st.dictionaries(st.sampled_from(["model", "a", 'x"}', "message"]), below)
    ),
    max_leaves=25,
)


@examples(500)
@given(st.dictionaries(st.sampled_from(["model", "id", "message", 'q"{']), JSON), st.booleans())
def test_any_object_is_changed_as_a_parser_would(document: dict[str, Any], spaced: bool) -> None:
    text = json.dumps(document, indent=1 if spaced else None).encode()
    changed = {**document, "model": NAME} if isinstance(document.get("model"), str) else document
    assert json.loads(named(text)) == changed


def test_answer_that_is_deep_or_many_times_nested_costs_no_stack() -> None:
    deep = b'{"a":' + b"[" * 400 + b"]" * 400 + b',"model":"m"}'
    assert model_span(deep) == (len(deep) - 4, len(deep) - 1)
    assert model_span(b'{"a":' + b"[" * 100_000) is None


def test_name_behind_what_no_server_writes_is_not_looked_for() -> None:
    for before in (b'"a":1,' * 10_000, b'"a":' + b"[" * 10_000 + b"]" * 10_000 + b","):
        assert model_span(b"{" + before + b'"model":"m"}') is None


def test_comments_and_empty_lines_pass_as_they_come() -> None:
    stream = b": a\n: b\n\n\n\r\n:\r\r" + STREAMS["cr"] + b":\n\n" * 3 + STREAMS["cr"] + b"\n\r"
    assert echoed(NAME, [stream]) == expected(stream)
    assert echoed(NAME, cut(stream, range(1, len(stream)))) == expected(stream)


@pytest.mark.parametrize("name", STREAMS)
def test_every_event_names_the_model_that_was_asked(name: str) -> None:
    stream = STREAMS[name]
    assert expected(stream) != stream or name == "responses"
    assert echoed(NAME, [stream]) == expected(stream)


@pytest.mark.parametrize("name", STREAMS)
def test_stream_is_echoed_alike_in_single_bytes(name: str) -> None:
    stream = STREAMS[name]
    assert echoed(NAME, cut(stream, range(1, len(stream)))) == expected(stream)


@pytest.mark.parametrize("name", sorted(set(STREAMS) - {"long"}))
def test_stream_is_echoed_alike_cut_in_two_at_every_byte(name: str) -> None:
    stream = STREAMS[name]
    for at in range(len(stream)):
        assert echoed(NAME, cut(stream, [at])) == expected(stream), at


@examples(200)
@given(st.sampled_from(sorted(STREAMS)), st.data())
def test_stream_is_echoed_alike_at_random_cuts(name: str, data: st.DataObject) -> None:
    stream = STREAMS[name]
    positions = data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=20))
    assert echoed(NAME, cut(stream, positions)) == expected(stream)


@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
def test_event_too_long_to_be_held_is_passed_on_with_the_name_if_it_stands_in_front(size: int) -> None:
    for end in [b"\n\n", b"\r\n\r\n", b"\r\r"]:
        text = b"x" * (MAX_ECHOED_BYTES + 5000)
        event = b'data: {"id":%d,"model":"m","text":"' + text + b'"}' + end
        late = b'data: {"text":"' + text + b'","model":"m"}' + end
        after = b'data: {"model":"m"}' + end
        stream = event % 1 + late + event % 2 + after
        value = json.dumps(NAME, ensure_ascii=False).encode()
        changed = stream.replace(b',"model":"m","text', b',"model":%b,"text' % value).replace(
            after, b'data: {"model":%b}' % value + end
        )
        assert changed.count(value) == 3
        assert echoed(NAME, cut(stream, range(size, len(stream), size))) == changed


def test_only_whole_events_are_given() -> None:
    echo = EventEcho(NAME)
    given = [echo.feed(part) for part in (b"data: 1", b"\n", b"\ndata: 2\n\ndata: 3", b"\r\n\r", b"\n")]
    assert given == [b"", b"", b"data: 1\n\ndata: 2\n\n", b"", b"data: 3\r\n\r\n"]
    assert not echo.holds
