"""Members that steer an engine: found in every spelling at any length, refused or dropped, never at an instance."""

import json
from typing import Any, get_args
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from edge.config.settings import Engine, PoolConfig
from edge.config.steering import REFUSE, STEERING
from edge.envelope import json as envelopes
from edge.envelope import steering
from edge.envelope.json import LONG_BODY_BYTES, Envelope
from edge.envelope.steering import READ, Names, Rules
from edge.errors import EdgeError, InvalidRequest
from edge.simulator.server import Simulator
from tests.conftest import USER, Edge, StartEdge, soon
from tests.envelope.reading import MIB, in_steps, read_json, rewrite_json

POOL = '[pools.p]\nendpoints = ["{upstream}"]\n%s\n[routes."public/m"]\npool = "p"\n'
INSTANCE = '[routes."u-*"]\ninstance = "{upstream}"\n'
ASK = {"model": "public/m", "messages": [{"role": "user", "content": "Hi"}]}


def rules(**settings: Any) -> Rules:
    return Rules(PoolConfig("p", **settings))


# --- how they are found


@pytest.mark.parametrize(
    "member",
    [
        b'"lora_path":"a"',
        b'"lora_\\u0070ath":"a"',
        b'"\\u006C\\u006f\\u0072\\u0061\\u005f\\u0070\\u0061\\u0074\\u0068" : null',
        b'"Lora_Path":"a"',
        b'"lora_path":"a","lora_path":"b"',
    ],
)
def test_member_is_found_in_every_spelling_and_behind_any_length(member: bytes) -> None:
    for body in (
        b'{"model":"m",%b}' % member,
        b'{%b,"model":"m"}' % member,
        b'{"model":"m","x":"%b",%b}' % (b"y" * (2 * MIB), member),
        b'{%b,"messages":[%b0],"model":"m"}' % (member, b'{"a":[]},' * 200_000),
    ):
        with pytest.raises(InvalidRequest, match="lora_path") as caught:
            rules(engine="sglang").dropped(read_json(body).steering, form=False)
        assert caught.value.param == "lora_path"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","messages":[{"lora_path":"a"}],"metadata":{"lora_path":"a"},"user":"\\"lora_path\\":1"}',
        b'{"model":"m","extra_body":{"lora_path":"a"},"chat_template_kwargs":{"lora_path":"a"}}',
        b'{"model":"m","sampling_params":{"lora_path":"a"},"lora_pathx":1,"%b":1}' % (b"l" * 5000),
    ],
)
def test_what_stands_within_another_member_is_left(body: bytes) -> None:
    assert rules(engine="sglang").dropped(read_json(body).steering, form=False) == ()


def test_body_of_usual_members_is_read_without_a_look_at_any_name() -> None:
    """What SDKs send by themselves: the hot path."""
    usual = {"messages": [], "model": "m", "stream": True, "temperature": 1, "tools": [], "max_tokens": 9, "stop": None}
    assert read_json(json.dumps(usual).encode()).steering == ()
    assert not {name for table in STEERING.values() for name in table} & (READ | set(usual))
    with mock.patch.object(steering, "folded", side_effect=AssertionError):
        assert envelopes.read_json(json.dumps(usual).encode()).model == "m"


@pytest.mark.parametrize(
    "name",
    ["Model", "MODEL", "mode\\u004c", "Stream", "\u017ftream", "N", "Max_Tokens", "MAX_COMPLETION_TOKENS",
     "max_output_to\u212aens", "Stream_Options", "Best_Of", "Prompt", "Messages", "Store", "Background",
     "Previous_Response_Id"],
)  # fmt: skip
def test_member_that_differs_in_case_from_what_the_edge_reads_is_refused(name: str) -> None:
    """An engine that folds case (Go's encoding/json) would read another one than the edge."""
    folded = json.loads(f'"{name}"').casefold()
    for body in (f'{{"model":"m","{name}":1}}', f'{{"{name}":"{"x" * 2 * MIB}","model":"m"}}'):
        with pytest.raises(InvalidRequest, match=f"almost named {folded}") as caught:
            read_json(body.encode())
        assert caught.value.param == folded
    assert read_json(f'{{"model":"m","x":{{"{name}":1}}}}'.encode()).model == "m"


@pytest.mark.parametrize("value", [b'"%b"', b"[%b]", b'{"a":[%b]}', b"null%b"])
def test_long_value_of_a_refused_member_is_refused_all_the_same(value: bytes) -> None:
    """The edge reads a stand-in of it, and the name counts."""
    text = b"0" + (b",0" * LONG_BODY_BYTES if value[:1] != b"n" else b" " * LONG_BODY_BYTES)
    value = value % (text.lstrip(b"0") if value[:1] == b"n" else text)
    body = b'{"model":"m","lora_path":%b,"prompt":%b}' % (value, value)
    with pytest.raises(InvalidRequest, match="lora_path"):
        rules(engine="sglang").dropped(read_json(body).steering, form=False)
    found = in_steps(body, names=Names({"prompt"})).steering
    with pytest.raises(InvalidRequest, match="prompt"):
        rules(refuse_members=("prompt",)).dropped(found, form=False)


# --- what is done with them


def test_every_engine_has_its_list() -> None:
    assert STEERING.keys() == set(get_args(Engine))


@pytest.mark.parametrize(
    ("engine", "name", "kind"),
    [
        (engine, name, kind)
        for engine, table in STEERING.items()
        for name, kind in table.items()
    ],
)  # fmt: skip
def test_each_member_of_an_engine_is_refused_or_dropped_and_can_be_allowed(engine: Any, name: str, kind: str) -> None:
    body = json.dumps({"model": "m", name: 1, "x": 2.50}).encode()
    envelope = read_json(body)
    assert rules(engine=engine, allow_members=(name,)).dropped(envelope.steering, form=False) == ()
    if kind == REFUSE:
        with pytest.raises(InvalidRequest, match=name):
            rules(engine=engine).dropped(envelope.steering, form=False)
        return
    dropped = rules(engine=engine).dropped(envelope.steering, form=False)
    assert dropped == (name,)
    assert json.loads(rewrite_json(body, envelope, "m", dropped)) == {"model": "m", "x": 2.5}


def test_dropped_members_leave_the_rest_as_it_was() -> None:
    body = b' {"pri\\u006frity":1, "a":1.0e400,"model":"m","priority":7,"\\u0061":[ "\\ud83d\\ude00" ],"Cache_Salt":""}'
    envelope = read_json(body)
    dropped = rules().dropped(envelope.steering, form=False)
    kept = b' {"a":1.0e400,"model":"n","\\u0061":[ "\\ud83d\\ude00" ]}'
    assert rewrite_json(body, envelope, "n", dropped) == kept


DROPPED = ("priority", "cache_salt", "Session_Id")
SPELLINGS = {"priority": ['"priority"', '"pri\\u006frity"'], "cache_salt": ['"cache_salt"', '"\\u0063ache_salt"']}
KEYS = ("model", *DROPPED, "a", "stream", "n", "lora_request", "stream_options", "max_tokens", "Model", "é" * 300)
SMALL = st.sampled_from(
    ["null", "1", "true", '"m"', '"\\u006d"', "[ 1 ,{}]", '{"priority":1,"model":"x"}', '{"include_usage":1}', '"}, "']
)


@st.composite
def steered(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Draw a body, and the same one with space or a member of text that makes it long."""
    space = draw(st.sampled_from(["", " ", "\n\t"]))
    members = []
    for name in draw(st.lists(st.sampled_from(KEYS), max_size=6)):
        key = draw(st.sampled_from(SPELLINGS.get(name, [f'"{name}"'])))
        members.append(f"{space}{key}{space}:{space}{draw(SMALL)}{space}")
    members.insert(draw(st.integers(0, len(members))), f'{space}"model":"m"')
    at = draw(st.integers(0, len(members)))
    name = draw(st.sampled_from(["a", "messages", "priority", "lora_request", "y"]))
    members.insert(at, f'{space}"{name}"{space}:"PADDING"')
    padded = f"{space}{{{','.join(members)}}}{space}".encode()
    short, long = (padded.replace(b"PADDING", b"x" * length) for length in (1, LONG_BODY_BYTES))
    if draw(st.booleans()):
        return short, long
    plain = short.strip()
    at = draw(st.sampled_from([0, 1, len(plain) - 1, len(plain)]))
    return plain, plain[:at] + b" " * LONG_BODY_BYTES + plain[at:]


def outcome(body: bytes) -> tuple[Any, dict[str, Any]]:
    """Return what is read of a body, or why it is refused, and what goes upstream."""
    try:
        envelope = in_steps(body, ("max_tokens",)) if len(body) > LONG_BODY_BYTES else at_once(body)
        dropped = rules(engine="vllm").dropped(envelope.steering, form=False)
        sent = rewrite_json(body, envelope, "n", dropped, include_usage=True)
    except EdgeError as error:
        return (error.message, getattr(error, "param", None)), {}
    bare = structs.replace(envelope, places=None, prompt_tokens=0, members=None)
    return bare, {name: value for name, value in json.loads(sent).items() if not is_padding(value)}


def at_once(body: bytes) -> Envelope:
    return envelopes.read_json(body, "", ("max_tokens",))


def is_padding(value: Any) -> bool:
    return isinstance(value, str) and not value.strip("x")


@settings(max_examples=60)
@given(steered())
def test_short_and_long_bodies_are_read_refused_and_sent_alike(bodies: tuple[bytes, bytes]) -> None:
    short, long = bodies
    assert outcome(long) == outcome(short)


@pytest.mark.parametrize(
    ("members", "left"),
    [
        (b'"priority":1,"model":"m","x":2', b'"model":"m","x":2'),
        (b' "priority" : 1 , "model":"m" ,"x":2', b' "model":"m" ,"x":2'),
        (b'"model":"m", "priority":[1,{"a":2}] ,"x":2', b'"model":"m", "x":2'),
        (b'"model":"m" , "priority":"," ', b'"model":"m" '),
        (b'"priority":1,"pri\\u006frity":2,"model":"m","priority":3, "cache_salt":4', b'"model":"m"'),
        (b'"model":"m","%b":1,"priority":2' % (b"k" * 600), b'"model":"m","%b":1' % (b"k" * 600)),
        (b'"model":"m","priority":2,"%b":1' % (b"k" * 600), b'"model":"m","%b":1' % (b"k" * 600)),
    ],
)  # fmt: skip
def test_dropped_members_of_a_long_body_are_cut_and_all_else_stays_to_the_byte(members: bytes, left: bytes) -> None:
    space = b" " * LONG_BODY_BYTES
    envelope = read_json(b"{%b%b}" % (members, space))
    dropped = rules().dropped(envelope.steering, form=False)
    assert rewrite_json(b"{%b%b}" % (members, space), envelope, "m", dropped) == b"{%b%b}" % (left, space)


def test_long_body_of_nothing_but_dropped_members_gets_a_model() -> None:
    body = b'{ "priority":1,%b"cache_salt":"" }' % (b" " * LONG_BODY_BYTES)
    envelope = in_steps(body, path_model="m")
    dropped = rules().dropped(envelope.steering, form=False)
    assert rewrite_json(body, envelope, "n", dropped) == b'{"model":"n"  }'


def test_pool_may_refuse_more_also_what_is_usual() -> None:
    names = Names({"tools", "mm_processor_kwargs", "stream"})
    for name in ("tools", "mm_processor_kwargs", "stream", "Mm_Processor_Kwargs"):
        found = in_steps(json.dumps({"model": "m", name: True}).encode(), names=names).steering
        assert rules().dropped(found, form=False) == ()
        with pytest.raises(InvalidRequest, match=name.lower()):
            rules(refuse_members=("tools", "mm_processor_kwargs", "stream")).dropped(found, form=False)


# --- over real sockets


async def test_pool_gets_a_body_without_what_places_it_and_an_instance_gets_all(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    edge = await start_edge((POOL % "" + INSTANCE).replace("{upstream}", simulator.url))
    long = {**ASK, "priority": -9, "x": "y" * (2 * MIB), "request_id": "r"}
    for asked, arrives in (
        (ASK | {"priority": -9, "cache_salt": "s"}, ASK),
        (long, {**ASK, "x": long["x"]}),
        (ASK | {"model": f"{USER}/a", "priority": -9, "kv_transfer_params": {}}, None),
    ):
        assert (await soon(edge.ask(asked)))[0] == 200
        assert json.loads(simulator.requests[-1].body) == (arrives or asked)
    await edge.consistent()


@pytest.mark.parametrize(
    ("settings", "member", "status"),
    [
        ("", "kv_transfer_params", 400),
        ("", "vllm_xargs", 400),
        ("", "lora_path", 200),  # which vLLM does not have
        ('engine = "sglang"', "lora_path", 400),
        ('engine = "sglang"', "bootstrap_host", 400),
        ('engine = "llamacpp"', "n_predict", 400),
        ('engine = "sglang"\nallow_members = ["lora_path"]', "lora_path", 200),
        ('refuse_members = ["logprobs"]', "logprobs", 400),
    ],
)
async def test_refused_member_is_named_and_nothing_goes_upstream(
    start_edge: StartEdge, simulator: Simulator, settings: str, member: str, status: int
) -> None:
    edge = await start_edge((POOL % settings).replace("{upstream}", simulator.url))
    got, _, body = await soon(edge.ask(ASK | {member: None}))
    assert got == status
    if status == 400:
        assert json.loads(body)["error"]["param"] == member
        assert not simulator.requests
        assert [line["end"] for line in await edge.log()] == ["refused"]
    else:
        assert member in json.loads(simulator.requests[0].body)
    await edge.consistent()


@pytest.mark.parametrize(
    ("name", "status"), [("vllm_xargs", 400), ("Vllm_Xargs[a]", 400), ("priority", 400), ("language", 200)]
)
async def test_form_has_no_member_that_steers(
    start_edge: StartEdge, simulator: Simulator, name: str, status: int
) -> None:
    """From a form nothing is dropped: no client sends such a part."""
    edge = await start_edge((POOL % "").replace("{upstream}", simulator.url))
    parts = (('name="model"', "public/m"), (f'name="{name}"', "1"), ('name="file"; filename="a.wav"', "RIFF"))
    form = "".join(f"--xx\r\nContent-Disposition: form-data; {head}\r\n\r\n{content}\r\n" for head, content in parts)
    assert (await send_form(edge, f"{form}--xx--\r\n".encode()))[0] == status
    await edge.consistent()


async def send_form(edge: Edge, form: bytes) -> tuple[int, dict[str, str], bytes]:
    client = await edge.connect()
    request = edge.request(form, path="/v1/audio/transcriptions")
    client.send(request.replace(b"application/json", b"multipart/form-data; boundary=xx", 1))
    return await soon(client.response())


async def test_no_header_that_steers_an_engine_goes_upstream(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge((POOL % "").replace("{upstream}", simulator.url))
    names = ("X-Session-ID", "X-Vllm-Priority", "X-data-parallel-rank", "X-Override-Bootstrap-Host", "X-Override-Rid")
    ids = ("X-Request-Id: mine",)
    assert (await soon(edge.ask(ASK, headers=(*(f"{name}: 1" for name in names), *ids))))[0] == 200
    arrived = {name.lower(): value for name, value in dict(simulator.requests[0].headers).items()}
    assert not arrived.keys() & {name.lower() for name in names}
    assert arrived["x-request-id"] != "mine"
