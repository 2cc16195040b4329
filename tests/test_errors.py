"""Every failure has a name, a status and an owner, and says whether another try can help."""

import pytest

from edge import errors
from edge.errors import EdgeError, Origin, RefusedByInstance

ALL = sorted(
    (
        each
        for each in vars(errors).values()
        if isinstance(each, type)
        and issubclass(each, EdgeError)
        and each is not RefusedByInstance
        and not each.__name__.startswith("_")
    ),
    key=lambda each: each.__name__,
)
RETRYABLE = {408, 429, 500, 502, 503, 504}


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
