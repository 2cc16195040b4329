"""The members of a body's top level, read in one go, and what is refused of a body as such.

The values are skipped, not built: a bomb of tiny values costs no memory. Where each member stands follows from the
lengths of the values before it, so that nothing within them is looked for.
"""

import re
from typing import Final, NamedTuple

import msgspec

from edge.errors import InvalidRequest

MAX_MEMBERS: Final = 1000  # of the top level; the largest API has 50
SPACE: Final = b" \t\r\n"
_KEY = re.compile(rb'[ \t\r\n,]*+("[^"\\]*+(?:\\.[^"\\]*+)*+")[ \t\r\n]*+:[ \t\r\n]*+')


class Member(NamedTuple):
    """A member of the top level: where its key begins, and where its value begins and ends, without space around it.

    It has no `name` where that is very long.
    """

    name: str | None
    key: int
    start: int
    end: int


class _Name:
    """A key of the top level: each is one of its own, so that of equal ones none takes the place of another."""

    __slots__ = ()


def members_of(body: bytes) -> tuple[list[Member], list[msgspec.Raw]]:
    """Return the members of the top level in their order, equal ones too, and the value of each.

    Raises: `InvalidRequest` for what is no object, is no JSON, or has too many of them.
    """
    names: list[str] = []

    def note(_: type, name: str) -> _Name:
        if len(names) == MAX_MEMBERS:
            raise too_many_members()
        names.append(name)
        return _Name()

    try:
        values = list(msgspec.json.decode(body, type=dict[_Name, msgspec.Raw], dec_hook=note).values())
    except (msgspec.DecodeError, RecursionError) as error:
        raise refusal(body, error) from None
    members, at = [], first_place(body)
    for name, value in zip(names, values, strict=True):
        key = _KEY.match(body, at)
        assert key is not None  # it was read
        start = key.end()
        at = start + len(memoryview(value))
        members.append(Member(name, key.start(1), start, at))
    return members, values


def first_place(body: bytes) -> int:
    """Return where the first member of an object could stand; nothing but space is before its bracket."""
    return body.index(b"{") + 1


def check_text(body: bytes) -> None:
    """Raise `InvalidRequest` unless the body is in UTF-8."""
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError:
            raise not_text() from None


def refusal(body: bytes, error: Exception) -> InvalidRequest:
    """Return what a caller is told of a body that could not be read."""
    if isinstance(error, RecursionError):
        return too_deep()
    return not_json() if body.lstrip(SPACE).startswith(b"{") else no_object()


def not_json() -> InvalidRequest:
    """Return the error for a body that is no JSON."""
    return InvalidRequest("the body is not valid JSON")


def no_object() -> InvalidRequest:
    """Return the error for a body that does not begin as an object, whatever else it is."""
    return InvalidRequest("the body must be a JSON object")


def not_text() -> InvalidRequest:
    """Return the error for a body that is not in UTF-8."""
    return InvalidRequest("the body is not valid UTF-8")


def too_deep() -> InvalidRequest:
    """Return the error for a body whose values stand within too many others."""
    return InvalidRequest("the body is nested too deeply")


def too_many_members() -> InvalidRequest:
    """Return the error for a body of very many members."""
    return InvalidRequest(f"the body has more than {MAX_MEMBERS} members")
