"""What a failure means is said in words."""

import pytest

from loadtest.hints import hint


@pytest.mark.parametrize(
    ("error", "next_step"),
    [
        ("status 429 rate_limit_exceeded", "--request-rate"),
        ("status 401 invalid_api_key", "--api-key"),
        ("status 404 model_not_found", "--model"),
        ("connect: Connection refused", "--target"),
        ("connect: Name or service not known", "--target"),
    ],
)
def test_a_failure_is_told_with_the_next_step(error: str, next_step: str) -> None:
    assert next_step in hint(error)


def test_a_failure_of_which_nothing_is_known_has_none() -> None:
    assert hint("a stream without [DONE]") == ""
