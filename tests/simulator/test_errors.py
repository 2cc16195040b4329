"""What goes wrong, in the words of each engine: documents, streams that fail, paths that are not there."""

from typing import Any

import pytest

from edge.simulator.behaviour import Behaviour
from edge.simulator.errors import error_document
from tests.simulator.asking import CHAT, COMPLETIONS, Answer, ask, asked, raw, request_bytes, simulating

FAILED = "The simulated engine failed with status %d."


@pytest.mark.parametrize(
    ("dialect", "status", "expected"),
    [
        ("vllm", 503, {"error": {"message": "m", "type": "ServiceUnavailableError", "param": None, "code": 503}}),
        ("vllm", 500, {"error": {"message": "m", "type": "InternalServerError", "param": None, "code": 500}}),
        ("vllm", 499, {"error": {"message": "m", "type": "UnknownError", "param": None, "code": 499}}),
        ("vllm", 401, {"error": "Unauthorized"}),
        ("sglang", 400, {"object": "error", "message": "m", "type": "BadRequestError", "param": None, "code": 400}),
        ("sglang", 500, {"object": "error", "message": "m", "type": "InternalServerError", "param": None, "code": 500}),
        ("sglang", 503, {"object": "error", "message": "m", "type": "503", "param": None, "code": 503}),
        ("sglang", 401, {"error": "Unauthorized"}),
        ("llamacpp", 503, {"error": {"code": 503, "message": "m", "type": "unavailable_error"}}),
        ("llamacpp", 501, {"error": {"code": 501, "message": "m", "type": "not_supported_error"}}),
        (
            "openai",
            429,
            {"error": {"message": "m", "type": "invalid_request_error", "param": None, "code": "rate_limit_exceeded"}},
        ),
        ("openai", 599, {"error": {"message": "m", "type": "server_error", "param": None, "code": None}}),
    ],
)
def test_each_dialect_words_errors_in_its_own_shape(dialect: Any, status: int, expected: dict[str, Any]) -> None:
    """The four shapes that an edge has to bring to one."""
    assert error_document(dialect, status, "m") == expected


# --- Streams that fail

SGLANG_USED = (
    '"usage":{"prompt_tokens":12,"total_tokens":14,"completion_tokens":2,"prompt_tokens_details":null,'
    '"reasoning_tokens":0,"completion_tokens_details":null}'
)
STREAMS: list[tuple[str, str, bool, int, list[str]]] = [
    ("vllm", CHAT, True, 3, [
        'data: {"error": {"message": "FAILED", "type": "ServiceUnavailableError", "param": null, "code": 503}}',
        "data: [DONE]"]),
    ("sglang", CHAT, True, 3, [
        'data: {"error": {"object": "error", "message": "FAILED", "type": "SERVICE_UNAVAILABLE", "param": null, '
        '"code": 503}}',
        f'"model":"m","choices":[],{SGLANG_USED}}}',
        "data: [DONE]"]),
    ("sglang", COMPLETIONS, True, 2, [
        'data: {"error": {"object": "error", "message": "FAILED", "type": "SERVICE_UNAVAILABLE", "param": null, '
        '"code": 503}}',
        '"choices":[],"usage":{"prompt_tokens":12,"total_tokens":14,"completion_tokens":2,"reasoning_tokens":0}}',
        "data: [DONE]"]),
    ("sglang", CHAT, False, 3, [
        'data: {"error": {"object": "error", "message": "FAILED", "type": "SERVICE_UNAVAILABLE", "param": null, '
        '"code": 503}}',
        "data: [DONE]"]),
    ("llamacpp", CHAT, True, 2, ['data: {"error":{"code":503,"message":"FAILED","type":"unavailable_error"}}']),
    ("openai", CHAT, True, 3, [
        'data: {"error":{"message":"FAILED","type":"server_error","param":null,"code":null}}']),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "path", "usage", "after", "ends"), STREAMS)
async def test_stream_that_fails_ends_as_its_engine_ends_it(
    dialect: Any, path: str, usage: bool, after: int, ends: list[str]
) -> None:
    """SGLang sends the error, THEN usage if it was asked for, then `[DONE]`; llama.cpp just ends."""
    async with simulating(Behaviour(dialect=dialect, fault="error_mid", after=after, status=503)) as simulator:
        body = {"model": "m", "stream": True, "stream_options": {"include_usage": usage}}
        answer = await ask(simulator, body, path)
        assert simulator.requests[0].tokens == 2
    tail = answer.chunks[after:]
    assert len(tail) == len(ends)
    for chunk, end in zip(tail, ends, strict=True):
        assert chunk.decode().endswith(end.replace("FAILED", FAILED % 503) + "\n\n")


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llamacpp", "openai"])
async def test_stream_may_fail_before_its_first_token(dialect: Any) -> None:
    answer = await asked(dialect, {"stream": True}, fault="error_first", after=9)
    assert answer.status == 200
    assert answer.events[0]["error"]["message"] == FAILED % 500


async def test_error_after_uneven_tokens_counts_them_all() -> None:
    """Two frames of text behind the role: a half and a whole character are two tokens."""
    async with simulating(Behaviour(dialect="vllm", uneven=True, fault="error_mid", after=3)) as simulator:
        await ask(simulator, {"stream": True})
        assert simulator.requests[0].tokens == 2


# --- Paths that are not there

NOT_FOUND = {
    "vllm": {"detail": "Not Found"},
    "sglang": {"detail": "Not Found"},
    "llamacpp": {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}},
}
LACKING = [
    ("vllm", ["/v1/tokenize", "/v1/detokenize", "/reranking", "/nope"]),
    ("sglang", ["/rerank", "/v2/rerank", "/score", "/v1/audio/translations", "/nope"]),
    ("llamacpp", ["/v1/tokenize", "/v1/detokenize", "/v2/rerank", "/v1/score", "/v1/audio/speech",
                  "/v1/audio/translations", "/v1/images/generations", "/nope"]),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "path"), [(dialect, path) for dialect, paths in LACKING for path in paths])
async def test_path_that_an_engine_lacks_is_its_own_404(dialect: Any, path: str) -> None:
    for body in ({"input": "x"}, b"{", b""):
        answer = await asked(dialect, body, path)
        assert (answer.status, answer.json) == (404, NOT_FOUND[dialect])


@pytest.mark.parametrize("path", ["/v1/messages", "/tokenize", "/v1/rerank", "/health", "/v1/systemone"])
async def test_openai_has_only_its_own_paths(path: str) -> None:
    answer = await asked("openai", {}, path)
    assert (answer.status, answer.error["message"]) == (404, f"Invalid URL (POST {path})")


ONLY_CHAT: list[tuple[str, str, int, str]] = [
    ("vllm", "/v1/embeddings", 404, "Not Found"),
    ("vllm", "/v1/rerank", 404, "Not Found"),
    ("vllm", "/v1/score", 404, "Not Found"),
    ("vllm", "/v1/audio/transcriptions", 404, "Not Found"),
    ("sglang", "/v1/embeddings", 400, "does not appear to be an embedding model by default"),
    ("sglang", "/v1/rerank", 400, "does not appear to be an embedding model by default"),
    ("sglang", "/v1/score", 400, "label_token_ids is required"),
    ("llamacpp", "/v1/embeddings", 501, "Start it with `--embeddings`"),
    ("llamacpp", "/v1/rerank", 501, "Start it with `--reranking`"),
    ("llamacpp", "/v1/audio/transcriptions", 501, "does not support audio input"),
    ("openai", "/v1/embeddings", 404, "Invalid URL (POST /v1/embeddings)"),
]


@pytest.mark.parametrize(("dialect", "path", "status", "said"), ONLY_CHAT)
async def test_chat_model_has_no_answers_of_other_kinds(dialect: Any, path: str, status: int, said: str) -> None:
    answer = await asked(dialect, {"input": "x"}, path, only_chat=True)
    assert answer.status == status
    assert said in answer.text
    if status == 501:
        assert answer.error["type"] == "not_supported_error"


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llamacpp"])
async def test_chat_model_chats(dialect: Any) -> None:
    for path in (CHAT, COMPLETIONS, "/v1/messages", "/v1/responses", "/tokenize", "/detokenize"):
        assert (await asked(dialect, {"prompt": "x", "tokens": [1]}, path, only_chat=True)).status == 200


@pytest.mark.parametrize(
    ("dialect", "message", "kind"),
    [
        ("vllm", "The model does not support the structured decision API", "NotImplementedError"),
        ("llamacpp", "This model is not a decision model", "not_supported_error"),
    ],
)
async def test_decisions_are_not_made_by_a_chat_model(dialect: Any, message: str, kind: str) -> None:
    answer = await asked(dialect, {"state": "x"}, "/v1/systemone")
    assert (answer.status, answer.error["message"], answer.error["type"]) == (501, message, kind)


GETS: list[tuple[str, str, str, int, str]] = [
    ("vllm", "GET", "/health", 200, ""),
    ("vllm", "GET", "/ping", 200, ""),
    ("vllm", "GET", "/version", 200, '{"version":"0.32.0"}'),
    ("vllm", "GET", "/load", 200, '{"server_load":0}'),
    ("vllm", "GET", "/ready", 404, '{"detail":"Not Found"}'),
    ("vllm", "GET", "/v1/models/simulated", 404, '{"detail":"Not Found"}'),
    ("vllm", "GET", CHAT, 405, '{"detail":"Method Not Allowed"}'),
    ("vllm", "POST", "/health", 405, '{"detail":"Method Not Allowed"}'),
    ("sglang", "GET", "/ready", 200, ""),
    ("sglang", "GET", "/health_generate", 200, ""),
    ("sglang", "GET", "/version", 404, '{"detail":"Not Found"}'),
    ("llamacpp", "GET", "/health", 200, '{"status":"ok"}'),
    ("llamacpp", "GET", "/v1/health", 200, '{"status":"ok"}'),
    ("llamacpp", "GET", "/ping", 404, '{"error":{"message":"File Not Found","type":"not_found_error","code":404}}'),
    ("llamacpp", "GET", CHAT, 404, '{"error":{"message":"File Not Found","type":"not_found_error","code":404}}'),
    ("llamacpp", "POST", "/health", 404, '{"error":{"message":"File Not Found","type":"not_found_error","code":404}}'),
    ("openai", "GET", CHAT, 405,
     '{"error":{"message":"Not allowed to GET on /v1/chat/completions. (HINT: Perhaps you meant to use a different '
     'HTTP method?)","type":"invalid_request_error","param":null,"code":"method_not_supported"}}'),
]  # fmt: skip


async def got(dialect: Any, method: str, path: str, **behaviour: Any) -> Answer:
    async with simulating(Behaviour(dialect=dialect, **behaviour)) as simulator:
        return await ask(simulator, b"", path, method=method)


@pytest.mark.parametrize(("dialect", "method", "path", "status", "expected"), GETS)
async def test_what_is_asked_without_a_body(dialect: Any, method: str, path: str, status: int, expected: str) -> None:
    answer = await got(dialect, method, path)
    assert (answer.status, answer.text) == (status, expected)
    assert ("allow" in answer.headers) == (status == 405 and dialect == "vllm")


@pytest.mark.parametrize(
    ("dialect", "path", "expected"),
    [
        ("vllm", "/health", ""),
        ("sglang", "/ready", ""),
        ("llamacpp", "/health", '{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'),
    ],
)
async def test_server_that_is_not_well_says_so_where_it_is_probed(dialect: Any, path: str, expected: str) -> None:
    async with simulating(Behaviour(dialect=dialect)) as simulator:
        simulator.healthy = False
        answer = await ask(simulator, b"", path, method="GET")
        assert (answer.status, answer.text) == (503, expected)


@pytest.mark.parametrize(("dialect", "status"), [("llamacpp", b"200"), ("vllm", b"405"), ("sglang", b"405")])
async def test_head_is_answered_by_llamacpp_only(dialect: Any, status: bytes) -> None:
    async with simulating(Behaviour(dialect=dialect)) as simulator, raw(simulator) as connection:
        connection.writer.write(request_bytes(b"", "/health", method="HEAD", headers="connection: close\r\n"))
        assert (await connection.rest()).split()[1] == status


# --- Models


async def test_models_of_vllm_and_sglang_tell_their_context() -> None:
    listed = (await got("vllm", "GET", "/v1/models", served=("a", "b"), context_length=99)).json
    assert [(each["id"], each["max_model_len"], each["owned_by"]) for each in listed["data"]] == [
        ("a", 99, "vllm"),
        ("b", 99, "vllm"),
    ]
    assert listed["data"][0]["permission"][0]["object"] == "model_permission"
    [card] = (await got("sglang", "GET", "/v1/models", context_length=99)).json["data"]
    assert card == {
        "id": "simulated",
        "object": "model",
        "created": 1_763_000_000,
        "owned_by": "sglang",
        "root": "simulated",
        "parent": None,
        "max_model_len": 99,
    }


async def test_models_of_llamacpp_are_listed_twice_under_the_path_of_a_file() -> None:
    listed = (await got("llamacpp", "GET", "/v1/models", context_length=99)).json
    assert list(listed) == ["models", "object", "data"]
    assert [each["model"] for each in listed["models"]] == [each["id"] for each in listed["data"]]
    assert listed["data"][0]["id"] == "/models/simulated.gguf"
    assert listed["data"][0]["meta"]["n_ctx"] == 99
    assert (await got("llamacpp", "GET", "/models")).json["object"] == "list"


async def test_one_model_can_be_asked_for_where_the_engine_has_a_path_for_it() -> None:
    assert (await got("sglang", "GET", "/v1/models/simulated")).json["id"] == "simulated"
    missing = await got("sglang", "GET", "/v1/models/other")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


NAMES: list[tuple[str, str, int, str]] = [
    ("vllm", CHAT, 404, "The model `other` does not exist. Valid aliases: mine, alias."),
    ("vllm", "/tokenize", 404, "The model `other` does not exist. Valid aliases: mine, alias."),
    ("sglang", CHAT, 200, "other"),
    ("sglang", "/v1/responses", 404, "The model 'other' does not exist"),
    ("llamacpp", CHAT, 200, "mine"),
    ("llamacpp", "/v1/embeddings", 200, "other"),
    ("openai", CHAT, 404, "The model `other` does not exist."),
]


@pytest.mark.parametrize(("dialect", "path", "status", "said"), NAMES)
async def test_name_that_is_not_served_is_refused_or_answered_as_the_engine_does(
    dialect: Any, path: str, status: int, said: str
) -> None:
    """SGLang answers under any name, and llama.cpp under its own."""
    answer = await asked(dialect, {"model": "other", "prompt": "x"}, path, served=("mine", "alias"))
    assert answer.status == status
    assert (answer.error["message"] if status == 404 else answer.json["model"]) == said
    if status == 404:
        assert answer.error["param"] == "model"


@pytest.mark.parametrize(
    ("dialect", "served", "asked_for", "answered"),
    [
        ("vllm", ("mine", "alias"), "alias", "mine"),
        ("vllm", ("mine", "alias"), None, "mine"),
        ("vllm", None, "any", "any"),
        ("sglang", ("mine",), None, "default"),
        ("llamacpp", None, "any", "/models/simulated.gguf"),
        ("openai", ("mine", "alias"), "alias", "alias"),
    ],
)
async def test_name_in_an_answer_is_the_one_that_the_engine_gives(
    dialect: Any, served: tuple[str, ...] | None, asked_for: str | None, answered: str
) -> None:
    """vLLM answers under the first of its names, whichever was asked for."""
    answer = await asked(dialect, {"model": asked_for}, served=served)
    assert answer.json["model"] == answered
