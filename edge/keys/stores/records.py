"""The one reader of a record of a key. Each store turns its own notation into these fields and values.

`id` and `user` are text, `name` and `limit` text or None, `allow` and `deny` lists of patterns or None, `enabled`,
`suspended` and `out_of_quota` true or false, `expires_at` Unix seconds or None, `share` 1 to 1000 or None. All but the
first two may be missing, and fields of other names are left alone.
"""

from collections.abc import Mapping
from typing import Any, Final

from edge.exchange import Principal
from edge.keys.stores.protocol import UserState
from edge.names import is_dns_label, is_pattern

MOST_SHARE: Final = 1000
_MAX_ID_LENGTH: Final = 256  # it stands in every log line and usage record


def principal_of(record: Mapping[str, Any]) -> Principal:
    """Return the principal of a record; raises `ValueError`, such as "something else than a DNS label as user"."""
    user, key_id = record.get("user"), record.get("id")
    if not isinstance(user, str) or not is_dns_label(user):
        raise ValueError("something else than a DNS label as user")
    if not isinstance(key_id, str) or not key_id.isprintable() or not 0 < len(key_id) <= _MAX_ID_LENGTH:
        raise ValueError("something else than a line of text as id")
    state = user_state_of(record)
    return Principal(
        id=key_id,
        user=user,
        name=_text(record, "name"),
        allow=_patterns(record, "allow"),
        deny=_patterns(record, "deny"),
        enabled=_flag(record, "enabled", True),
        suspended=state.suspended,
        out_of_quota=state.out_of_quota,
        expires_at=_time(record, "expires_at"),
        limit=_text(record, "limit") or None,
        share=_share(record),
    )


def user_state_of(record: Mapping[str, Any]) -> UserState:
    """Return what a record holds of the user; raises `ValueError` with what is wrong."""
    return UserState(_flag(record, "suspended", False), _flag(record, "out_of_quota", False))


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str | None):
        raise ValueError(f"something else than text as {name}")
    return value or ""


def _flag(record: Mapping[str, Any], name: str, default: bool) -> bool:
    value = record.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"something else than true or false as {name}")
    return value


def _time(record: Mapping[str, Any], name: str) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"something else than Unix seconds as {name}")
    return float(value)


def _share(record: Mapping[str, Any]) -> int | None:
    value = record.get("share")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_SHARE):
        raise ValueError(f"something else than 1 to {MOST_SHARE} as share")
    return value


def _patterns(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = record.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, str) and is_pattern(each) for each in value):
        raise ValueError(f"something else than a list of patterns as {name}")
    return tuple(value)
