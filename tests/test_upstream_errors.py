"""What upstreams say of their failures is brought to ours, whatever shape and coding it has."""

import gzip
import json
import zlib
from email.utils import formatdate
from typing import Any

import pytest

from edge.errors import EdgeError, Origin
from edge.protocols import OPENAI
from edge.upstream_errors import from_upstream, logged, pause_of, presentable

JSON = {b"content-type": b"application/json"}
TEXT = {b"content-type": b"text/plain; charset=utf-8"}
KEPT = [400, 404, 413, 422, 429]


def failed(status: int, said: Any = None, headers: dict[bytes, bytes] = JSON, instance: bool = False) -> EdgeError:
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    return from_upstream(status, headers, body, is_instance=instance)


def body_of(error: EdgeError) -> bytes:
    return OPENAI.error_body(error, "req_1")


SAID = "The temperature must be under 2, whatever the model."
SHAPES: dict[str, Any] = {
    "vllm": {"error": {"message": SAID, "type": "BadRequestError", "param": "temperature", "code": 400}},
    "sglang": {"object": "error", "message": SAID, "type": "BadRequestError", "param": "temperature", "code": 400},
    "llamacpp": {"error": {"code": 400, "message": SAID, "type": "invalid_request_error"}},
    "openai": {"error": {"message": SAID, "type": "x", "param": "temperature", "code": "too_hot"}},
    "anthropic": {"type": "error", "error": {"type": "invalid_request_error", "message": SAID}},
    "fastapi": {"detail": SAID},
    "fastapi list": {"detail": [{"loc": ["body", "temperature"], "msg": SAID, "type": "missing"}]},
    "string": {"error": SAID},
    "tgi": {"error": SAID, "error_type": "validation"},
    "alibaba": {"code": "too_hot", "message": SAID, "request_id": "1"},
    "list": {"errors": [{"message": SAID}]},
    "list of text": {"errors": [SAID]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_message_the_caller_can_act_on_is_kept(shape: str) -> None:
    for status in KEPT:
        error = failed(status, SHAPES[shape])
        assert (error.status, error.message) == (status, SAID)
        assert error.param in (None, "temperature")
        assert (error.error_code == "too_hot") == (shape in ("openai", "alibaba"))


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (TEXT, SAID.encode() + b"\n"),
        (JSON | {b"content-encoding": b"gzip"}, gzip.compress(json.dumps(SHAPES["vllm"]).encode())),
        (JSON | {b"content-encoding": b"deflate"}, zlib.compress(json.dumps(SHAPES["vllm"]).encode())),
        (TEXT | {b"content-encoding": b"gzip"}, gzip.compress(SAID.encode())),
    ],
    ids=["text", "gzip", "deflate", "gzip of text"],
)
def test_words_are_read_from_plain_text_and_from_a_coding_nobody_asked_for(
    headers: dict[bytes, bytes], body: bytes
) -> None:
    assert failed(400, body, headers).message == SAID
    assert SAID.encode() in logged(headers, body).encode()


def test_what_is_no_name_is_no_code_and_a_param_holds_no_path() -> None:
    said = {"error": {"message": "x", "code": "http://10.0.0.1:8000/secret", "param": "/srv/models/x", "n_\n": 1}}
    error = failed(400, said)
    assert (error.error_code, error.param, error.details) == ("invalid_request_error", "(path)", {})
    assert len(failed(400, {"error": {"message": "x", "code": "x" * 60_000, "param": "y" * 60_000}}).param or "") == 256


def test_words_are_kept_of_an_error_that_is_cut_off_behind_them() -> None:
    """FastAPI repeats the whole input, which may be longer than what is read of an error."""
    detail = json.dumps({"detail": [{"type": "x", "loc": ["body"], "msg": SAID, "input": "y" * 99}]}).encode()
    assert failed(422, detail[:-30]).message == SAID


def test_several_errors_of_a_list_are_all_said() -> None:
    details = [{"loc": ["body", name], "msg": f"{name} is wrong"} for name in ("top_p", "seed")]
    error = failed(422, {"detail": details})
    assert (error.message, error.param) == ("top_p is wrong; seed is wrong", "top_p")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("BadRequestError", "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens."),
        ("BadRequestError", "The input (3000 tokens) is longer than the model's context length (2048 tokens)."),
        ("exceed_context_size_error", "request (3000 tokens) exceeds the available size, try increasing it"),
    ],
)
def test_prompt_over_the_context_has_openais_code_and_the_engines_counts(kind: str, words: str) -> None:
    said = {"error": {"code": 400, "message": words, "type": kind, "n_prompt_tokens": 3000, "n_ctx": 2048, "n_x": True}}
    error = failed(400, said)
    assert (error.status, error.error_code, error.message) == (400, "context_length_exceeded", words)
    members = json.loads(body_of(error))["error"]
    assert {"n_prompt_tokens": 3000, "n_ctx": 2048}.items() <= members.items()
    assert "n_x" not in members


@pytest.mark.parametrize(
    ("status", "ours"),
    [
        *((status, 502) for status in (300, 301, 302, 307, 308, 401, 402, 403, 407, 409, 410, 418, 431, 451, 500, 502)),
        (503, 503), (529, 503), (504, 504), (408, 504), (507, 502), (599, 502),
    ],
)  # fmt: skip
def test_fault_between_edge_and_upstream_is_not_the_callers(status: int, ours: int) -> None:
    """An upstream's 401 is about our key, not the caller's; what a 5xx says may hold addresses and stacks."""
    secret = "Traceback: http://10.0.0.1:8000 key sk-secret"
    error = failed(status, {"error": {"message": secret, "code": secret, "param": secret}})
    assert error.status == ours
    assert error.origin is Origin.UPSTREAM
    assert b"10.0.0.1" not in body_of(error)
    assert b"secret" not in body_of(error)
    assert (error.should_retry is False) == (status == 409)


@pytest.mark.parametrize("status", [405, 415, 501])
def test_what_the_server_cannot_do_is_not_tried_again(status: int) -> None:
    """OpenAI's SDKs try a 5xx again, though it cannot help."""
    error = failed(
        status, {"error": {"message": "This server does not support embeddings. Start it with `--embeddings`"}}
    )
    assert (error.status, error.should_retry) == (status, False)
    assert ("--embeddings" in error.message) == (status < 500)


@pytest.mark.parametrize("status", [401, 402, 403, 405, 406, 408, 410, 415, 418, 423, 431, 451, 501])
def test_owner_of_an_instance_gets_its_words(status: int) -> None:
    error = failed(status, {"error": {"message": "start it with --embeddings"}}, instance=True)
    assert (error.status, error.message) == (status, "start it with --embeddings")
    assert error.should_retry is False


def test_owner_of_an_instance_gets_the_headers_of_its_account_and_of_a_pool_nobody_does() -> None:
    headers = JSON | {b"x-ratelimit-remaining-requests": b"7", b"openai-organization": b"o", b"anthropic-x": b"\xff"}
    assert failed(429, {}, headers, instance=True).headers == (
        ("x-ratelimit-remaining-requests", "7"), ("openai-organization", "o"),
    )  # fmt: skip
    assert failed(429, {}, headers).headers == ()


def test_conflict_is_a_400_even_of_an_instance() -> None:
    """openai 0.28.1 repeats a 409 for ever."""
    assert failed(409, {"error": "busy"}, instance=True).status == 400


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ({"detail": "Not Found"}, "not_found"),
        ({"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}, "not_found"),
        (b"404 page not found", "not_found"),
        ({"error": {"message": "Response with id 'resp_1' not found.", "type": "invalid_request_error"}}, "not_found"),
        (
            {"error": {"message": "The model `x` does not exist.", "type": "NotFoundError", "code": 404}},
            "model_not_found",
        ),
        ({"error": {"message": "nope", "code": "model_not_found"}}, "model_not_found"),
        ({"error": {"message": "nope", "param": "model"}}, "model_not_found"),
        ({"error": "model 'x' not found, try pulling it first"}, "model_not_found"),
    ],
)
def test_404_of_a_path_is_not_that_of_a_model(said: Any, code: str) -> None:
    """Clients that drop a model on `model_not_found` would drop a healthy one."""
    error = failed(404, said)
    assert (error.status, error.error_code) == (404, code)
    assert error.message


def test_500_that_is_the_callers_mistake_is_a_400_with_its_words() -> None:
    words = "input (3000 tokens) is too large to process. increase the physical batch size (current batch size: 512)"
    error = failed(500, {"error": {"code": 500, "message": words, "type": "server_error"}})
    assert (error.status, error.message, error.origin) == (400, words, Origin.CLIENT)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html><h1>400 Bad Request</h1><hr>nginx/1.2.3</html>", b"null", b"[]", b"1", b'"text"', b"{}", b"\xff",
        b'{"error":null}', b'{"error":[]}', b'{"error":{"message":null}}', b'{"error":{"message":{"a":1}}}',
        b'{"error":{"message":""}}', b'{"detail":[]}', b'{"detail":[1]}', b'{"error":7}', b"[" * 100_000,
        b'{"error":{"message":"x"}} trailing', b'{"errors":{"a":["b"]}}', b'{"error":[[]]}',
    ],
)  # fmt: skip
def test_upstream_error_of_no_known_shape_gets_a_message_of_ours(body: bytes) -> None:
    for status in KEPT:
        for headers in ({}, {b"content-type": b"text/html"}, JSON, JSON | {b"content-encoding": b"gzip"}):
            error = failed(status, body, headers)
            assert (error.status, bool(error.message)) == (status, True)
            assert "nginx" not in error.message


def test_message_of_an_upstream_is_bounded() -> None:
    assert len(failed(400, {"error": {"message": "x" * 60_000}}).message) < 5000
    assert len(failed(400, gzip.compress(b"x " * 10_000_000), TEXT | {b"content-encoding": b"gzip"}).message) < 5000
    assert len(logged(TEXT, b"x" * 10_000)) == 200


def test_log_has_where_the_upstream_is_and_no_key() -> None:
    assert logged(TEXT, b"10.0.0.1:8000 knows no sk-abc_def-123.") == "10.0.0.1:8000 knows no (key)."


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            '1 validation error\n  File "/opt/x/http_server.py", line 1870, in chat\n    POST /v1/chat',
            "1 validation error",
        ),
        ("bad\nTraceback (most recent call last):\n  x", "bad"),
        ("cannot open /var/lib/models/a.gguf.", "cannot open (path)"),
        ("cannot open C:\\models\\a.gguf", "cannot open (path)"),
        ("upstream http://10.0.0.1:8000/v1 refused", "upstream (address) refused"),
        ("upstream 10.0.0.1:8000, refused", "upstream (address), refused"),
        ("[fd00::1]:8000 refused", "(address) refused"),
        ("engine-0.ns.svc.cluster.local:8000 refused", "(address) refused"),
        ("http://engine/v1 refused", "(address) refused"),
        ("localhost:8000 refused", "(address) refused"),
        ("Incorrect key sk-abcdefgh1234", "Incorrect key (key)"),
        ("Connection refused: /10.0.0.5:8000", "Connection refused: /(address)"),
        ("tcp:10.0.0.5:8000, user@10.0.0.5.", "tcp:(address), user@(address)."),
        ("at fd00::12 and [fd00::12]:80", "at (address) and (address)"),
        ("vllm-0:8000 is down", "(address) is down"),
        ("path:/srv/models/x, [/srv/models/x.py:12]", "path:(path), [(path)]"),
        ("entrypoints/openai/serving_chat.py:123 and src/main.rs:4:5", "(path) and (path)"),
        ("C:/Users/a/b.py", "(path)"),
        ("see /v1/../srv/models/secret", "see (path)"),
        ("key:sk-abcdef", "key:(key)"),
        ("http://10.1.2.3:8000/" + 400 * "a", "(...)"),
    ],
)
def test_what_a_server_says_of_itself_is_taken_out(said: str, shown: str) -> None:
    assert presentable(said) == shown
    assert failed(400, {"error": {"message": said}}).message == shown


@pytest.mark.parametrize(
    "said",
    [
        "Could not fetch https://example.com/images/cat.png",
        "use /v1/chat/completions",
        "deepseek-ai/DeepSeek-R1 and qwen2.5:72b and/or 3/4",
        "at most 2048 tokens: 10:30 is no ratio, 1:2048 is",
        'expected "a", got {"b": [1, 2]}',
        "maximum length:4096, requested:5000 at /messages/0/content",
        "body.messages.0.content.1.text: Input should be a valid string",
        "version 0.5.23, top_p=0.9, at 12:30:45",
    ],
)
def test_what_a_caller_needs_is_left_as_it_was(said: str) -> None:
    assert presentable(said) == said


def http_date(at: float) -> bytes:
    return formatdate(at, usegmt=True).encode()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({b"retry-after": b"5"}, 5), ({b"retry-after": b"0"}, 1),
        ({b"retry-after": b"59"}, 59), ({b"retry-after": b"60"}, 59),
        ({b"retry-after": b"61"}, 59), ({b"retry-after": b"9" * 20}, 59), ({}, None), ({b"retry-after": b"-5"}, None),
        ({b"retry-after": b"1.5"}, 2), ({b"retry-after": b"12.5"}, 13), ({b"retry-after": b"9" * 5000}, None),
        ({b"retry-after": "٣".encode()}, None), ({b"retry-after-ms": b"20000"}, 20),
        ({b"retry-after-ms": b"1500", b"retry-after": b"30"}, 2),
        ({b"retry-after-ms": b"soon", b"retry-after": b"3"}, 3),
        ({b"retry-after": b"soon"}, None), ({b"retry-after": b"Wed, 21 Oct 2020 07:28:00 GMT"}, 1),
        # by the upstream's own clock, whatever ours says
        ({b"retry-after": http_date(1e9 + 30), b"date": http_date(1e9)}, 30),
        ({b"retry-after": http_date(4e9)}, 59),
    ],
)  # fmt: skip
def test_pause_is_whole_seconds_from_1_to_60(headers: dict[bytes, bytes], seconds: int | None) -> None:
    """SDKs sleep as long as they are told, and litellm reads the header with `int()`."""
    assert pause_of(headers) == seconds
    for status in [429, 503, 529]:
        assert from_upstream(status, headers, b"").retry_after_s == (seconds or 1)


def test_only_what_can_pass_names_a_pause() -> None:
    assert from_upstream(400, {b"retry-after": b"5"}, b"").retry_after_s is None


@pytest.mark.parametrize(("advice", "kept"), [(b"true", True), (b"False", False), (b"maybe", None)])
def test_advice_to_try_again_is_carried_over(advice: bytes, kept: bool | None) -> None:
    assert from_upstream(500, {b"x-should-retry": advice}, b"").should_retry is kept
