"""What a hash in Redis may hold; the rest is in `test_keystores.py`."""

import pytest

from edge.exchange import Principal
from edge.keys_redis import principal_of
from edge.keystores import UserState

USER = "u-1100a15812cc"
LEAST = {"id": "key_1", "user": USER}


def test_least_record() -> None:
    assert principal_of(LEAST, UserState()) == Principal("key_1", USER)


def test_whole_record() -> None:
    facts = {
        **LEAST, "name": "laptop", "allow": "public/* u-1100a15812cc/**", "deny": "public/glm*", "enabled": "0",
        "expires_at": "1060.5", "limit": "standard", "unknown": "field",
    }  # fmt: skip
    assert principal_of(facts, UserState(suspended=True, out_of_quota=True)) == Principal(
        "key_1", USER, "laptop", ("public/*", "u-1100a15812cc/**"), ("public/glm*",),
        enabled=False, suspended=True, out_of_quota=True, expires_at=1060.5, limit="standard",
    )  # fmt: skip


@pytest.mark.parametrize(
    "facts",
    [
        {}, {"user": USER}, {"id": "key_1"}, {**LEAST, "user": "../x"}, {**LEAST, "id": "a\nb"},
        {**LEAST, "enabled": "yes"}, {**LEAST, "enabled": ""}, {**LEAST, "expires_at": "soon"},
        {**LEAST, "expires_at": "inf"}, {**LEAST, "expires_at": "nan"}, {**LEAST, "expires_at": "-1"},
        {**LEAST, "deny": "[a-z]"}, {**LEAST, "allow": "public/?"},
    ],
)  # fmt: skip
def test_record_that_is_not_understood_is_no_answer(facts: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"with"):
        principal_of(facts, UserState())
