"""Every failure has one shape, and what upstreams say of their failures is brought to it."""

import json

import pytest

from edge import errors
from edge.errors import EdgeError, Origin, from_upstream

ALL = sorted(
    (
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, EdgeError) and not each.__name__.startswith("_")
    ),
    key=lambda each: each.__name__,
)
RETRYABLE = {408, 429, 500, 502, 503, 504}


@pytest.mark.parametrize("kind", ALL)
def test_every_failure_has_openais_shape(kind: type[EdgeError]) -> None:
    """`{"error": {"message", "type", "param", "code"}}`: what every generation of the SDKs parses."""
    error = kind('a "message"\n模型', param="model")
    assert json.loads(error.body()) == {
        "error": {"message": 'a "message"\n模型', "type": kind.kind, "param": "model", "code": kind.code}
    }
    assert json.loads(kind("x").body())["error"]["param"] is None
    assert json.loads(kind("x", code="other").body())["error"]["code"] == "other"
    assert str(error) == error.message


@pytest.mark.parametrize("kind", ALL)
def test_every_failure_says_whose_it_is_and_whether_to_try_again(kind: type[EdgeError]) -> None:
    """SDKs try 408, 409, 429 and 5xx again by themselves; a 409 openai 0.28.1 repeats for ever."""
    assert 400 <= kind.status < 600
    assert kind.status != 409
    assert kind.status < 500 or kind.status in (501, 505) or kind.origin is not Origin.CLIENT
    if kind.status not in RETRYABLE:
        assert kind.should_retry is False
    else:
        assert kind.should_retry is not False
    assert kind.code == kind.code.lower()
    assert kind.safe_elsewhere is (kind in (errors.ConnectFailed, errors.OutOfPorts))


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "invalid_request_error"), (401, "invalid_api_key"), (402, "insufficient_quota"),
        (403, "permission_denied"), (404, "model_not_found"), (413, "request_too_large"),
        (429, "rate_limit_exceeded"), (502, "upstream_error"), (503, "upstream_unavailable"),
        (503, "key_store_unavailable"), (504, "upstream_timeout"),
    ],
)  # fmt: skip
def test_codes_that_clients_rely_on_exist(status: int, code: str) -> None:
    assert (status, code) in {(kind.status, kind.code) for kind in ALL}


SAID = "This model's maximum context length is 4096 tokens."
DIALECTS = {
    "vllm": {"error": {"message": SAID, "type": "BadRequestError", "param": "max_tokens", "code": 400}},
    "sglang": {"object": "error", "message": SAID, "type": "BadRequestError", "param": "max_tokens", "code": 400},
    "llamacpp": {"error": {"code": 400, "message": SAID, "type": "invalid_request_error"}},
    "openai": {"error": {"message": SAID, "type": "x", "param": "max_tokens", "code": "context_length_exceeded"}},
    "fastapi": {"detail": SAID},
    "fastapi list": {"detail": [{"loc": ["body", "x"], "msg": SAID, "type": "missing"}]},
    "string": {"error": SAID},
    "tgi": {"error": SAID, "error_type": "validation"},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_message_the_caller_can_act_on_is_kept(dialect: str) -> None:
    for status in [400, 404, 413, 422, 429]:
        error = from_upstream(status, json.dumps(DIALECTS[dialect]).encode())
        assert error.status == status
        assert error.message == SAID
        assert error.param in (None, "max_tokens")
        assert (error.error_code == "context_length_exceeded") == (dialect == "openai")
        assert isinstance(error.error_code, str)


@pytest.mark.parametrize(
    ("status", "ours"),
    [
        *((status, 502) for status in (300, 301, 302, 307, 308, 401, 403, 405, 407, 409, 418, 431, 451, 500, 501, 502)),
        (503, 503), (504, 504), (408, 504), (507, 502), (529, 502), (599, 502),
    ],
)  # fmt: skip
def test_fault_between_edge_and_upstream_is_not_the_callers(status: int, ours: int) -> None:
    """An upstream's 401 is about our key, not the caller's; what a 5xx says may hold addresses and stacks."""
    secret = "Traceback: http://10.0.0.1:8000 key sk-secret"
    error = from_upstream(status, json.dumps({"error": {"message": secret, "code": secret, "param": secret}}).encode())
    assert error.status == ours
    assert error.origin is Origin.UPSTREAM
    assert b"10.0.0.1" not in error.body()
    assert b"secret" not in error.body()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html><h1>400 Bad Request</h1><hr>nginx/1.2.3</html>", b"null", b"[]", b"1", b'"text"', b"{}", b"\xff",
        b'{"error":null}', b'{"error":[]}', b'{"error":{"message":null}}', b'{"error":{"message":{"a":1}}}',
        b'{"error":{"message":""}}', b'{"detail":[]}', b'{"detail":[1]}', b'{"error":7}', b"[" * 100_000,
        b'{"error":{"message":"x"}} trailing',
    ],
)  # fmt: skip
def test_upstream_error_of_no_known_shape_gets_a_message_of_ours(body: bytes) -> None:
    for status in [400, 404, 413, 422, 429]:
        error = from_upstream(status, body)
        said = json.loads(error.body())["error"]
        assert (error.status, bool(said["message"])) == (status, True)
        assert "nginx" not in said["message"]


def test_message_of_an_upstream_is_bounded() -> None:
    assert len(from_upstream(400, json.dumps({"error": {"message": "x" * 60_000}}).encode()).message) < 5000


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        (b"5", 5), (b"0", 1), (b"60", 60), (b"61", 60), (b"86400", 60), (b"", 1), (b"-5", 1), (b"1.5", 1),
        (b"Wed, 21 Oct 2026 07:28:00 GMT", 1), (b"9" * 5000, None), ("٣".encode(), 1),
    ],
)  # fmt: skip
def test_pause_is_whole_seconds_from_1_to_60(said: bytes, seconds: int | None) -> None:
    """SDKs sleep as long as they are told, and litellm reads the header with `int()`."""
    for status in [429, 503]:
        pause_s = from_upstream(status, b"", said).retry_after_s
        assert pause_s in ((seconds,) if seconds else range(1, 61))


def test_only_what_can_pass_names_a_pause() -> None:
    assert from_upstream(400, b"", b"5").retry_after_s is None
