"""What a record of a key may hold, whichever store it comes from."""

from typing import Any

import pytest

from edge.exchange import Principal
from edge.keys.stores.protocol import UserState
from edge.keys.stores.records import principal_of, user_state_of

USER = "u-1100a15812cc"
LEAST = {"id": "key_1", "user": USER}


@pytest.mark.parametrize(
    "more", [{}, {"name": None, "allow": None, "deny": [], "expires_at": None, "limit": ""}, {"scope": "x"}]
)
def test_what_is_missing_or_unknown_changes_nothing(more: dict[str, Any]) -> None:
    assert principal_of({**LEAST, **more}) == Principal("key_1", USER)


def test_whole_record() -> None:
    record = {
        **LEAST, "name": "laptop", "allow": ["public/*", f"{USER}/**"], "deny": ["public/glm*"], "enabled": False,
        "suspended": True, "out_of_quota": True, "expires_at": 1060, "limit": "standard",
        "share": 4,
    }  # fmt: skip
    assert principal_of(record) == Principal(
        "key_1", USER, "laptop", ("public/*", f"{USER}/**"), ("public/glm*",),
        enabled=False, suspended=True, out_of_quota=True, expires_at=1060.0, limit="standard", share=4,
    )  # fmt: skip
    assert user_state_of(record) == UserState(suspended=True, out_of_quota=True)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"user": None}, "a DNS label as user"),
        ({"user": "../x"}, "a DNS label as user"),
        ({"id": ""}, "a line of text as id"),
        ({"id": 7}, "a line of text as id"),
        ({"id": "a\nb"}, "a line of text as id"),
        ({"id": "k" * 257}, "a line of text as id"),
        ({"name": ["x"]}, "text as name"),
        ({"limit": 1}, "text as limit"),
        ({"allow": "public/*"}, "a list of patterns as allow"),
        ({"allow": [1]}, "a list of patterns as allow"),
        ({"deny": ["[a-z]"]}, "a list of patterns as deny"),
        ({"enabled": None}, "true or false as enabled"),
        ({"enabled": "yes"}, "true or false as enabled"),
        ({"suspended": 0}, "true or false as suspended"),
        ({"out_of_quota": ""}, "true or false as out_of_quota"),
        ({"share": 0}, "1 to 1000 as share"),
        ({"share": 1001}, "1 to 1000 as share"),
        ({"share": True}, "1 to 1000 as share"),
        ({"share": "many"}, "1 to 1000 as share"),
        ({"expires_at": "soon"}, "Unix seconds as expires_at"),
        ({"expires_at": True}, "Unix seconds as expires_at"),
        ({"expires_at": -1}, "Unix seconds as expires_at"),
        ({"expires_at": float("nan")}, "Unix seconds as expires_at"),
        ({"expires_at": float("inf")}, "Unix seconds as expires_at"),
    ],
)
def test_value_of_another_kind_is_named_by_its_field(wrong: dict[str, Any], what: str) -> None:
    """Whoever repairs the record reads it in the log; the value is not repeated, as it may be a secret."""
    with pytest.raises(ValueError, match=f"^something else than {what}$"):
        principal_of({**LEAST, **wrong})
