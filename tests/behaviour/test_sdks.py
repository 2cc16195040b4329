"""Real clients against a running edge: what the platform's page promises, and what SDKs make of our answers."""

import asyncio
import fcntl
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import openai
import pytest

from edge.keys.stores.registry import KeyRegistry
from edge.simulator.dialects import Behaviour, answer_text
from edge.simulator.server import Simulator
from tests.conftest import ROUTES, USER, Edge, StartEdge

pytestmark = pytest.mark.usefixtures("no_environment")

ROOT = Path(__file__).parents[2]
PUBLIC = "public/deepseek-r1"
OWN = f"{USER}/qwen2"
MESSAGES = [{"role": "user", "content": "你好"}]

# The page's table.
MAAS = (
    "DeepSeek-R1", "DeepSeek-V3", "Qwen2.5-7B-Instruct", "Qwen2.5-72B-Instruct-AWQ", "Llama-3.2-11B-Vision-Instruct",
    "glm-4-9b-chat",
)  # fmt: skip
MODEL_SERVICE = (
    "Phi-4", "Phi-3.5-mini-instruct", "Qwen2-0.5B-Instruct", "Qwen2.5-7B-Instruct", "Qwen2.5-14B-Instruct",
    "Qwen2.5-Coder-32B-Instruct", "Qwen2.5-72B-Instruct-AWQ", "baichuan2-13b-Chat", "Llama-3.2-11B-Vision-Instruct",
    "glm-4-9b-chat",
)  # fmt: skip


# --- openai 0.28.1, which the page names


@pytest.fixture(scope="session")
def old_sdk(pytestconfig: pytest.Config) -> Path:
    """The directory of openai 0.28.1; it cannot share an environment with today's, so it is installed apart, once."""
    assert pytestconfig.cache is not None
    home = pytestconfig.cache.mkdir("old-sdk")
    target = home / f"openai-0.28.1-{sys.implementation.cache_tag}"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what another session installs is waited for
        if not target.exists():
            building = home / "building"
            shutil.rmtree(building, ignore_errors=True)  # of a session that was killed
            # All that it needs, in one call of pip; aiohttp is the environment's.
            packages = ["openai==0.28.1", "requests", "tqdm", "charset-normalizer", "idna", "urllib3", "certifi"]
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            done = subprocess.run([*pip, "--target", building, *packages], capture_output=True, text=True)
            assert done.returncode == 0, f"openai 0.28.1 cannot be installed: {done.stderr}"
            building.rename(target)
    return target


async def run_old(old_sdk: Path, script: str) -> str:
    """Run a script where `import openai` finds 0.28.1; return what it printed."""
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(old_sdk)},
    )  # fmt: skip
    printed, errors = await running.communicate()
    assert running.returncode == 0, errors.decode()
    return printed.decode()


PAGE = {
    "MaaS by Token": (
        PUBLIC,
        "https://chat.d.run",
        """
        import openai
        openai.api_key = "<YOUR_API_KEY>"
        openai.api_base = "https://chat.d.run"
        print(openai.Completion.create(model="public/deepseek-r1", prompt="What is your name?"))
        """,
    ),
    "model service": (
        OWN,
        "https://sh-02.d.run",
        """
        import openai
        openai.api_key = "<YOUR_API_KEY>"
        openai.api_base = "https://sh-02.d.run"
        print(openai.Completion.create(model="u-1100a15812cc/qwen2", prompt="What is your name?"))
        """,
    ),
}


@pytest.mark.parametrize("mode", PAGE)
async def test_snippet_of_the_page_works_as_written(edge: Edge, simulator: Simulator, old_sdk: Path, mode: str) -> None:
    model, base, snippet = PAGE[mode]
    script = textwrap.dedent(snippet).replace("<YOUR_API_KEY>", edge.key).replace(base, edge.url)
    answer = json.loads(await run_old(old_sdk, script))
    assert (answer["object"], answer["model"]) == ("text_completion", model)
    assert answer["choices"][0]["text"] == answer_text(16)
    assert simulator.requests[-1].path == "/v1/completions"
    await edge.consistent()
    assert [(line["path"], line["end"]) for line in await edge.log()] == [("/completions", "complete")]


OLD_CALLS = """
import asyncio, json, openai
openai.api_key, openai.api_base = KEY, BASE
say = {"messages": [{"role": "user", "content": "你好"}]}
def chat(answer): return answer.choices[0].message.content
def delta(chunk): return chunk.choices[0].delta.get("content", "") if chunk.choices else ""
async def later():
    result = chat(await openai.ChatCompletion.acreate(model=OWN, **say))
    stream = await openai.Completion.acreate(model=PUBLIC, prompt="hi", stream=True)
    return result, "".join([chunk.choices[0].text async for chunk in stream])
chat_later, stream_later = asyncio.run(later())
print(json.dumps({
    "chat": chat(openai.ChatCompletion.create(model=PUBLIC, **say)),
    "chat stream": "".join(map(delta, openai.ChatCompletion.create(model=OWN, stream=True, **say))),
    "stream": "".join(c.choices[0].text for c in openai.Completion.create(model=OWN, prompt="hi", stream=True)),
    "async chat": chat_later,
    "async stream": stream_later,
    "embeddings": [
        each.embedding for each in openai.Embedding.create(model=PUBLIC, input=["a", "b"], encoding_format="float").data
    ],
    "models": [each.id for each in openai.Model.list().data],
    "model": openai.Model.retrieve(OWN).id,
}))
"""


async def test_old_sdk_calls_chat_streams_embeddings_and_models(edge: Edge, old_sdk: Path) -> None:
    answers = json.loads(await run_old(old_sdk, with_names(OLD_CALLS, edge)))
    text = answer_text(16)
    assert answers == {
        **dict.fromkeys(("chat", "chat stream", "stream", "async chat", "async stream"), text),
        "embeddings": [[0.125, -0.25, 0.5, -1.0]] * 2,
        "models": [PUBLIC],
        "model": OWN,
    }
    await edge.consistent()


def with_names(script: str, edge: Edge, **names: str) -> str:
    names = {"KEY": edge.key, "BASE": edge.url, "PUBLIC": PUBLIC, "OWN": OWN, **names}
    return "".join(f"{name} = {value!r}\n" for name, value in names.items()) + script


OLD_ERRORS = """
import json, openai
openai.api_base = BASE
results = {}
def note(name, key=KEY, seen=None, **arguments):
    openai.api_key = key
    arguments = {"model": PUBLIC, "prompt": "hi", **arguments}
    pieces = []
    try:
        answer = openai.Completion.create(**arguments)
        if arguments.get("stream"):
            for chunk in answer:
                pieces.append(chunk.choices[0].text)
        results[name] = ["no exception"]
    except openai.error.OpenAIError as error:
        code = (error.json_body or {}).get("error", {}).get("code") if isinstance(error.json_body, dict) else None
        results[name] = [type(error).__name__, error.http_status, code, len(pieces)]
    except Exception as error:
        results[name] = [type(error).__name__, None, None, len(pieces)]
note("wrong key", key="sk-wrong-wrong")
note("unknown model", model="public/none")
note("another's instance", model="u-2200b26923dd/qwen2")
note("denied", key=DENIED)
for status in (400, 404, 413, 422, 429, 401, 409, 500, 503, 504):
    note(f"upstream {status}", simulate={"fault": "error", "status": status})
for name, fault in {
    "error first": {"fault": "error_first", "status": 400},
    "error mid": {"fault": "error_mid", "after": 3},
    "cut before the head": {"fault": "cut", "after": -1},
    "cut between frames": {"fault": "cut", "after": 3},
    "cut in a frame": {"fault": "cut", "after": 3, "after_bytes": 9},
    "reset": {"fault": "reset", "after": 3},
}.items():
    note(name, stream=True, simulate=fault)
print(json.dumps(results))
"""


async def test_old_sdk_raises_its_own_classes_and_never_takes_a_cut_stream_for_whole(edge: Edge, old_sdk: Path) -> None:
    with KeyRegistry(edge.keys_path) as registry:
        denied, _ = registry.create(USER, deny=["public/*"])
    assert json.loads(await run_old(old_sdk, with_names(OLD_ERRORS, edge, DENIED=denied))) == {
        "wrong key": ["AuthenticationError", 401, "invalid_api_key", 0],
        "unknown model": ["InvalidRequestError", 404, "model_not_found", 0],
        "another's instance": ["InvalidRequestError", 404, "model_not_found", 0],
        "denied": ["PermissionError", 403, "permission_denied", 0],
        "upstream 400": ["InvalidRequestError", 400, "invalid_request_error", 0],
        "upstream 404": ["InvalidRequestError", 404, "not_found", 0],
        "upstream 413": ["APIError", 413, "request_too_large", 0],
        "upstream 422": ["APIError", 422, "invalid_request_error", 0],
        "upstream 429": ["RateLimitError", 429, "rate_limit_exceeded", 0],
        "upstream 401": ["APIError", 502, "upstream_error", 0],
        "upstream 409": ["APIError", 502, "upstream_error", 0],
        "upstream 500": ["APIError", 502, "upstream_error", 0],
        "upstream 503": ["ServiceUnavailableError", 503, None, 0],
        "upstream 504": ["APIError", 504, "upstream_timeout", 0],
        "error first": ["InvalidRequestError", 400, "invalid_request_error", 0],
        "error mid": ["APIError", 200, 500, 3],
        "cut before the head": ["APIError", 502, "upstream_error", 0],
        "cut between frames": ["APIError", 200, "upstream_disconnected", 3],
        "cut in a frame": ["ChunkedEncodingError", None, None, 3],
        "reset": ["APIError", 200, "upstream_disconnected", 3],
    }
    await edge.consistent()


# --- the current SDK


class Sdk:
    """The current SDK, sync (in a thread, so that the edge's loop stays free) or async, behind one awaitable."""

    def __init__(self, client: openai.OpenAI | openai.AsyncOpenAI) -> None:
        self.client = client

    async def call(self, name: str, /, *positional: Any, **arguments: Any) -> Any:
        method = attrgetter(name)(self.client)
        if isinstance(self.client, openai.AsyncOpenAI):
            return await method(*positional, **arguments)
        return await asyncio.to_thread(method, *positional, **arguments)

    async def stream(self, name: str, seen: list[Any], **arguments: Any) -> None:
        """Add the events of a stream to `seen`, so that they are there also when it raises."""
        events = await self.call(name, stream=True, **arguments)
        if isinstance(self.client, openai.AsyncOpenAI):
            async for event in events:
                seen.append(event)  # noqa: PERF401  # what came before an exception counts
        else:
            await asyncio.to_thread(seen.extend, events)


@pytest.fixture(params=["sync", "async"])
async def sdk(request: pytest.FixtureRequest, edge: Edge) -> AsyncIterator[Sdk]:
    options: dict[str, Any] = {"base_url": f"{edge.url}/v1", "api_key": edge.key, "max_retries": 0}
    if request.param == "async":
        async with openai.AsyncOpenAI(**options) as client:
            yield Sdk(client)
    else:
        with openai.OpenAI(**options) as sync_client:
            yield Sdk(sync_client)


async def test_current_sdk_calls_everything_it_knows(sdk: Sdk, edge: Edge) -> None:
    text = answer_text(16)
    chat = await sdk.call("chat.completions.create", model=PUBLIC, messages=MESSAGES)
    assert (chat.choices[0].message.content, chat.model, chat.usage.total_tokens) == (text, PUBLIC, 28)
    assert chat._request_id.startswith("req_")
    completion = await sdk.call("completions.create", model=OWN, prompt="hi")
    assert (completion.choices[0].text, completion.model) == (text, OWN)
    embeddings = await sdk.call("embeddings.create", model=PUBLIC, input=["a", "b"])
    assert [each.embedding for each in embeddings.data] == [[0.125, -0.25, 0.5, -1.0]] * 2
    response = await sdk.call("responses.create", model=OWN, input="hi")
    assert response.output_text == text
    spoken = await sdk.call("audio.speech.create", model=PUBLIC, input="hi", voice="alloy")
    assert spoken.content.count(b"\xff\xfb\x90\x00") == 16
    heard = await sdk.call("audio.transcriptions.create", model=PUBLIC, file=("a.wav", b"RIFF"))
    assert heard.text == text
    assert [model.id for model in (await sdk.call("models.list")).data] == [PUBLIC]
    for name in (PUBLIC, OWN):
        assert (await sdk.call("models.retrieve", name)).id == name
    await edge.consistent()
    lines = await edge.log()
    assert {line["end"] for line in lines} == {"complete"}
    assert lines[-1]["path"] == "/v1/models/u-1100a15812cc%2Fqwen2"


async def test_current_sdk_streams_everything_it_knows(sdk: Sdk, edge: Edge) -> None:
    chat: list[Any] = []
    await sdk.stream("chat.completions.create", chat, model=OWN, messages=MESSAGES)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chat) == answer_text(16)
    usage: list[Any] = []
    options = {"include_usage": True}
    await sdk.stream("chat.completions.create", usage, model=PUBLIC, messages=MESSAGES, stream_options=options)
    assert usage[-1].usage.completion_tokens == 16
    texts: list[Any] = []
    await sdk.stream("completions.create", texts, model=PUBLIC, prompt="hi")
    assert "".join(chunk.choices[0].text for chunk in texts) == answer_text(16)
    events: list[Any] = []
    await sdk.stream("responses.create", events, model=OWN, input="hi")
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer_text(16)
    assert events[-1].type == "response.completed"
    await edge.consistent()
    assert [line["end"] for line in await edge.log()] == ["complete"] * 4


REFUSALS: list[tuple[type[openai.APIStatusError], str, dict[str, Any]]] = [
    (openai.NotFoundError, "model_not_found", {"model": "public/none"}),
    (openai.NotFoundError, "model_not_found", {"model": "u-2200b26923dd/qwen2"}),
    (openai.BadRequestError, "invalid_request_error", {"model": ""}),
    (openai.BadRequestError, "invalid_request_error", {"extra_body": {"stream": "yes"}}),
    *(
        (raised, code, {"extra_body": {"simulate": {"fault": "error", "status": status}}})
        for status, raised, code in (
            (400, openai.BadRequestError, "invalid_request_error"),
            (404, openai.NotFoundError, "not_found"),
            (413, openai.APIStatusError, "request_too_large"),
            (422, openai.UnprocessableEntityError, "invalid_request_error"),
            (429, openai.RateLimitError, "rate_limit_exceeded"),
            (401, openai.InternalServerError, "upstream_error"),
            (500, openai.InternalServerError, "upstream_error"),
            (503, openai.InternalServerError, "upstream_unavailable"),
        )
    ),
]


# The two clients share how they take a status, so each case runs with one of them.
@pytest.mark.parametrize(
    ("raised", "code", "arguments", "sdk"),
    [(*case, "async" if index % 2 else "sync") for index, case in enumerate(REFUSALS)],
    indirect=["sdk"],
)
async def test_current_sdk_raises_the_class_of_the_status_with_code_and_request_id(
    sdk: Sdk, edge: Edge, raised: type[openai.APIStatusError], code: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(raised) as caught:
        await sdk.call("chat.completions.create", **{"model": PUBLIC, "messages": MESSAGES, **arguments})
    assert caught.value.code == code
    await edge.consistent()
    [line] = await edge.log()
    assert caught.value.request_id == line["request_id"]
    assert caught.value.status_code == line["status"]


async def test_current_sdk_tells_a_wrong_key_from_a_denied_model(sdk: Sdk, edge: Edge) -> None:
    with KeyRegistry(edge.keys_path) as registry:
        denied, _ = registry.create(USER, deny=["public/*"])
    for key, raised, code in (
        ("sk-wrong-wrong", openai.AuthenticationError, "invalid_api_key"),
        (denied, openai.PermissionDeniedError, "permission_denied"),
    ):
        client = Sdk(sdk.client.with_options(api_key=key))
        with pytest.raises(raised) as caught:
            await client.call("chat.completions.create", model=PUBLIC, messages=MESSAGES)
        assert caught.value.code == code
        assert key not in str(caught.value)


OPERATIONS = {
    "chat.completions.create": {"messages": MESSAGES},
    "completions.create": {"prompt": "hi"},
    "responses.create": {"input": "hi"},
}


BREAKS: list[dict[str, Any]] = [
    {"fault": "cut", "after": 5},
    {"fault": "cut", "after": 5, "after_bytes": 1},
    {"fault": "cut", "after": 5, "after_bytes": 40},
    {"fault": "reset", "after": 5},
    {"fault": "reset", "after": 5, "after_bytes": 40},
    {"fault": "cut", "after": 5, "framing": "length"},
    {"fault": "cut", "after": 5, "after_bytes": 40, "framing": "length"},
    {"fault": "reset", "after": 5, "framing": "close"},
    {"fault": "cut", "after": 5, "after_bytes": 40, "framing": "close"},
]


# Every operation breaks in every way; the two clients, which the edge cannot tell apart, take turns.
@pytest.mark.parametrize(
    ("operation", "fault", "sdk"),
    [
        (operation, fault, "async" if index % 2 else "sync")
        for index, (fault, operation) in enumerate(itertools.product(BREAKS, OPERATIONS))
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
    indirect=["sdk"],
)
async def test_stream_that_the_upstream_broke_raises_after_what_came(
    sdk: Sdk, edge: Edge, operation: str, fault: dict[str, Any]
) -> None:
    """Never a silent end: no SDK looks for `[DONE]`."""
    seen: list[Any] = []
    with pytest.raises(openai.APIError) as caught:
        await sdk.stream(
            operation, seen, model=OWN, **OPERATIONS[operation], extra_body={"simulate": {**fault, "tokens": 64}}
        )
    assert len(seen) == 5
    assert isinstance(caught.value, openai.APIConnectionError) or caught.value.code == "upstream_disconnected"
    await edge.consistent()
    [line] = await edge.log()
    assert (line["end"], line["ended_by"]) == ("upstream_cut", "upstream")


@pytest.mark.parametrize(
    ("kind", "fault", "sdk"),
    [
        ("cut", {"after": -1}, "sync"),
        ("cut", {"after": 0}, "async"),
        ("cut", {"after": 0, "after_bytes": 2}, "sync"),
        ("reset", {"after": -1}, "async"),
        ("reset", {"after": 0}, "sync"),
        ("reset", {"after": 0, "after_bytes": 2}, "async"),
    ],
    indirect=["sdk"],
)
async def test_stream_that_broke_before_its_first_byte_is_a_502(
    sdk: Sdk, edge: Edge, kind: str, fault: dict[str, Any]
) -> None:
    seen: list[Any] = []
    with pytest.raises(openai.InternalServerError) as caught:
        await sdk.stream(
            "chat.completions.create", seen, model=OWN, messages=MESSAGES,
            extra_body={"simulate": {"fault": kind, **fault}},
        )  # fmt: skip
    assert (seen, caught.value.status_code, caught.value.code) == ([], 502, "upstream_error")


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llamacpp", "openai"])
async def test_error_frame_within_a_stream_raises_with_its_own_message(start_edge: StartEdge, dialect: Any) -> None:
    """Frames inside a stream that began are never changed."""
    upstream = Simulator(Behaviour(dialect=dialect, fault="error_mid", after=3))
    await upstream.start()
    try:
        edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
        seen: list[Any] = []
        async with openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key=edge.key, max_retries=0) as client:
            with pytest.raises(openai.APIError, match="The simulated engine failed with status 500"):
                await Sdk(client).stream("chat.completions.create", seen, model=PUBLIC, messages=MESSAGES)
        assert len(seen) == 3 + (dialect == "llamacpp")  # whose first frame has the role and a token, an event each
        await edge.consistent()
    finally:
        await upstream.close()


async def test_retries_of_the_sdk_reach_an_upstream_that_recovers(edge: Edge, simulator: Simulator) -> None:
    """A 502 leaves the retry to the SDK; only where it cannot help does `x-should-retry: false` stop it."""
    simulator.behaviour = Behaviour(fault="error", status=500)
    async with openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key=edge.key, max_retries=5) as client:
        asking = asyncio.get_running_loop().create_task(
            client.chat.completions.create(model=PUBLIC, messages=[{"role": "user", "content": "hi"}])
        )
        await simulator.wait_for(lambda: len(simulator.requests) >= 1)
        simulator.behaviour = Behaviour()
        assert (await asking).choices[0].message.content == answer_text(16)
        await edge.idle()
        asked = len(await edge.log())
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="public/none", messages=[{"role": "user", "content": "hi"}])
        await edge.idle()
        assert len(await edge.log()) == asked + 1


async def test_sdk_does_not_try_again_what_a_day_has_no_more_of(start_edge: StartEdge, simulator: Simulator) -> None:
    limit = "[limits.standard]\nrequests_per_day = 1\n"
    route = f'[routes."{PUBLIC}"]\npool = "p"\nlimit = "standard"\n'
    edge = await start_edge(f'{limit}[pools.p]\nendpoints = ["{simulator.url}"]\n{route}')
    async with openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key=edge.key, max_retries=5) as client:
        await client.chat.completions.create(model=PUBLIC, messages=[{"role": "user", "content": "hi"}])
        with pytest.raises(openai.RateLimitError, match="The next day begins at") as caught:
            await client.chat.completions.create(model=PUBLIC, messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "insufficient_quota"
    await edge.idle()
    assert [line["status"] for line in await edge.log()] == [200, 429]


# --- the 16 cells of the page's table, with the catalogue that is shipped


@pytest.fixture
async def shipped(start_edge: StartEdge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> Edge:
    """an edge with the limits, pools and routes of the repository's routes.toml."""
    text = (ROOT / "routes.toml").read_text()
    routes = text[text.index("[limits.") :]
    for name in re.findall(r"\$\{(\w+):-", routes):
        monkeypatch.setenv(name, simulator.url)
    return await start_edge(routes)


@pytest.mark.parametrize(
    ("model", "host"),
    [
        *((f"public/{name.lower()}", "chat.d.run") for name in MAAS),
        *((f"{USER}/{name.lower().replace('.', '-')}", "sh-02.d.run") for name in MODEL_SERVICE),
    ],
)
async def test_every_model_of_the_page_answers_on_its_host_and_only_there(
    shipped: Edge, simulator: Simulator, model: str, host: str
) -> None:
    other = "sh-02.d.run" if host == "chat.d.run" else "chat.d.run"
    options: dict[str, Any] = {"base_url": f"{shipped.url}/v1", "api_key": shipped.key, "max_retries": 0}
    async with openai.AsyncOpenAI(**options) as local:
        here, there = (local.with_options(default_headers={"Host": each}) for each in (host, other))
        for client in (local, here):
            sdk = Sdk(client)
            chat = await sdk.call("chat.completions.create", model=model, messages=MESSAGES)
            assert (chat.model, chat.choices[0].message.content) == (model, answer_text(16))
            completion = await sdk.call("completions.create", model=model, prompt="hi")
            assert (completion.model, completion.choices[0].text) == (model, answer_text(16))
            assert (await sdk.call("models.retrieve", model)).id == model
        asked = len(simulator.requests)
        with pytest.raises(openai.NotFoundError):
            await there.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}])
        assert len(simulator.requests) == asked
    await shipped.consistent()


async def test_list_of_models_is_the_page_on_chat_and_empty_on_a_region(shipped: Edge) -> None:
    for host, names in (("chat.d.run", sorted(f"public/{name.lower()}" for name in MAAS)), ("sh-02.d.run", [])):
        async with openai.AsyncOpenAI(
            base_url=f"{shipped.url}/v1", api_key=shipped.key, default_headers={"Host": host}
        ) as client:
            assert [model.id for model in (await client.models.list()).data] == names
