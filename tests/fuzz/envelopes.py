"""What a JSON body asks for: whoever parses it, or what goes upstream of it, finds the same."""

import json
from typing import Any

from edge.envelope.json import Envelope
from edge.envelope.splices import rewrite_json
from edge.errors import EdgeError
from tests.envelope.reading import read_json

_OTHER_MODEL = "another-name"
_LIMITS = ("max_completion_tokens", "max_tokens")

Members = list[tuple[str, Any]]


def members_of(body: bytes) -> Members | None:
    """Return each member of the object, also those of one name; None where Python's parser refuses the body."""
    members: list[Members] = []

    def keep(pairs: Members) -> dict[str, Any]:
        members.append(pairs)
        return dict(pairs)

    try:
        json.loads(body, object_pairs_hook=keep)
    except (ValueError, RecursionError):
        return None
    return members[-1] if members else []


def check(body: bytes) -> None:
    """The first `model` and the last one are what the edge read, and what is rewritten differs in them alone."""
    try:
        envelope = read_json(body, *_LIMITS)
    except EdgeError:
        return
    members = members_of(body)
    if members is None:
        return
    assert {value for key, value in members if key == "model"} == {envelope.model}
    _check_numbers(envelope, dict(members))
    rewritten = members_of(b"".join(rewrite_json(body, envelope, _OTHER_MODEL)))
    assert rewritten is not None
    assert _same(dict(rewritten), {**dict(members), "model": _OTHER_MODEL})


def _check_numbers(envelope: Envelope, members: dict[str, Any]) -> None:
    assert envelope.stream == (members.get("stream") is True)
    if envelope.max_tokens is not None:
        assert envelope.max_tokens in [int(float(members[name])) for name in _LIMITS if members.get(name) is not None]


def _same(one: object, other: object) -> bool:
    return json.dumps(one) == json.dumps(other)  # NaN is not equal to itself
