"""The endpoints of the API of keys, one row each: what its document shows and what is done are the same rows.

An `act` is synchronous. It runs in a thread with the store's registry, and returns what it answers and what every
process must forget.
"""

import re
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from msgspec import Struct, convert

from edge import errors
from edge.config.values import seconds
from edge.errors import EdgeError, InvalidRequest
from edge.keys.stores.administration import Idempotency, KeyOptions, KeyRecord, Registry
from edge.keys.stores.protocol import Invalidation
from edge.process.api import documents as doc

_MOST_KEYS: Final = 1000  # of a page
_USUAL_KEYS: Final = 100
_LONGEST_GRACE_S: Final = 90 * 86_400.0


class KeyNotFound(EdgeError, status=404, code="not_found"):
    """404: no such key, user or path."""

    kind = "invalid_request_error"


class Conflict(EdgeError, status=409, code="conflict"):
    """409: the key is in a state in which this is not possible, or an Idempotency-Key was used for something else."""

    kind = "invalid_request_error"


class ReadOnly(EdgeError, status=501, code="read_only_store"):
    """501: keys are made and changed elsewhere."""

    kind = "invalid_request_error"


@dataclass(frozen=True, slots=True)
class Call:
    """A request: the id in its path, its query, its body, the limits that there are, and its idempotency if any."""

    id: str
    query: Mapping[str, str]
    body: Any
    limits: Container[str]
    idempotency: Idempotency | None
    usage: Mapping[str, object] | None = None


class Done(NamedTuple):
    """What is answered, and what is to be forgotten; `key_id` or `user` name what was changed."""

    document: Struct | None
    forget: Invalidation | None = None
    key_id: str = ""
    user: str = ""


class Parameter(NamedTuple):
    """A member of the query."""

    name: str
    text: str
    schema: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A row: `takes` and `gives` are bodies, None for none; `refusals` are statuses beside 400, 401 and 503."""

    method: str
    path: str
    name: str
    text: str
    act: Callable[[Registry, Call], Done]
    takes: type[Struct] | None = None
    gives: type[Struct] | None = None
    status: int = 200
    query: tuple[Parameter, ...] = ()
    refusals: tuple[int, ...] = ()
    is_idempotent: bool = False
    needs_usage: bool = False


def _create(registry: Registry, call: Call) -> Done:
    wanted: doc.NewKey = call.body
    _check_limit(wanted.limit, call.limits)
    now = time.time()
    options: KeyOptions = {"allow": wanted.allow, "deny": wanted.deny, "limit": wanted.limit}
    options["share"] = wanted.share
    if wanted.expires_at is not None:
        options["expires_in_s"] = wanted.expires_at.timestamp() - now
    key, record = registry.create(wanted.user, wanted.name, idempotency=call.idempotency, now=lambda: now, **options)
    return Done(doc.CreatedKey.made(key, record), key_id=record.id, user=record.user)


def _list(registry: Registry, call: Call) -> Done:
    query = call.query
    limit = _number(query.get("limit", str(_USUAL_KEYS)), _MOST_KEYS)
    everything = query.get("all", "false")
    if everything not in ("true", "false"):
        raise InvalidRequest("all is true or false", param="all")
    try:
        found = registry.page(query.get("user"), query.get("after"), limit + 1, revoked=everything == "true")
    except ValueError:
        raise InvalidRequest("after is the id of no key that could be listed here", param="after") from None
    keys = [doc.Key.of(record) for record in found[:limit]]
    first, last = (keys[0].id, keys[-1].id) if keys else (None, None)
    return Done(doc.KeyPage("list", keys, first, last, len(found) > limit))


def _find(registry: Registry, call: Call) -> Done:
    return Done(doc.Key.of(registry.find(call.id)))


def _change(registry: Registry, call: Call) -> Done:
    changes = call.body.changes()
    if not changes:
        raise InvalidRequest("nothing is to be changed: send one member at least")
    _check_limit(changes.get("limit"), call.limits)
    return _changed(registry.change(call.id, **changes))


def _revoke(registry: Registry, call: Call) -> Done:
    record = registry.find(call.id)
    if record.revoked:  # again: nothing is to be done
        return Done(None)
    return _changed(registry.revoke(call.id))._replace(document=None)


def _rotate(registry: Registry, call: Call) -> Done:
    try:
        grace_s = seconds(call.body.grace, longest_s=int(_LONGEST_GRACE_S))
    except ValueError as error:
        raise InvalidRequest(str(error), param="grace") from None
    key, record = registry.rotate(call.id, grace_s, idempotency=call.idempotency)
    return Done(doc.CreatedKey.made(key, record), Invalidation(ids=frozenset((call.id,))), call.id, record.user)


def _usage(registry: Registry, call: Call) -> Done:
    assert call.usage is not None
    registry.find(call.id)  # of a key that there is not, nothing is said
    return Done(convert(call.usage, doc.KeyUsage))


def _find_user(registry: Registry, call: Call) -> Done:
    state, keys = registry.find_user(call.id)
    return Done(doc.User("user", call.id, state.suspended, state.out_of_quota, keys))


def _change_user(registry: Registry, call: Call) -> Done:
    marks = call.body.marks()
    if not marks:
        raise InvalidRequest("nothing is to be recorded: send suspended, out_of_quota, or both")
    registry.mark_user(call.id, **marks)
    return _find_user(registry, call)._replace(forget=Invalidation(users=frozenset((call.id,))), user=call.id)


def _changed(record: KeyRecord) -> Done:
    return Done(doc.Key.of(record), Invalidation(ids=frozenset((record.id,))), record.id, record.user)


def _check_limit(limit: str | None, limits: Container[str]) -> None:
    if limit is not None and limit not in limits:
        raise InvalidRequest("there is no limit of that name in [limits]", param="limit")


def _number(text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most)) and 1 <= int(text) <= most):
        raise InvalidRequest(f"limit is a number of 1 to {most}", param="limit")
    return int(text)


_TEXT: Final[Mapping[str, object]] = {"type": "string"}
_DATE: Final[Mapping[str, object]] = {"type": "string", "format": "date"}
_DAYS: Final = (
    Parameter("since", "The first day (UTC). Absent: thirty days ago.", _DATE),
    Parameter("until", "The last day (UTC). Absent: today.", _DATE),
)
_PAGE: Final = (
    Parameter("user", "Keys of this user only.", _TEXT),
    Parameter("after", "The id of a key: those that were made after it.", _TEXT),
    Parameter(
        "limit", "How many at most.", {"type": "integer", "minimum": 1, "maximum": _MOST_KEYS, "default": _USUAL_KEYS}
    ),
    Parameter("all", "Revoked keys too.", {"type": "boolean", "default": False}),
)
ENDPOINTS: Final = (
    Endpoint(
        "POST", "/keys", "create_key", "Make a key. It is shown this once.", _create,
        doc.NewKey, doc.CreatedKey, 201, refusals=(409,), is_idempotent=True,
    ),
    Endpoint(
        "GET", "/keys", "list_keys", "List keys in the order they were made.", _list, None, doc.KeyPage, query=_PAGE,
    ),
    Endpoint("GET", "/keys/{id}", "get_key", "Show a key, also a revoked one.", _find, None, doc.Key, refusals=(404,)),
    Endpoint(
        "PATCH", "/keys/{id}", "change_key", "Change a key. It holds everywhere within a second.", _change,
        doc.KeyChange, doc.Key, refusals=(404, 409),
    ),
    Endpoint(
        "DELETE", "/keys/{id}", "revoke_key", "End a key for good; again, nothing is done.", _revoke,
        status=204, refusals=(404,),
    ),
    Endpoint(
        "POST", "/keys/{id}/rotate", "rotate_key",
        "Make a key like this one, which ends after a grace. The new key is shown this once.", _rotate,
        doc.Rotation, doc.CreatedKey, 201, refusals=(404, 409), is_idempotent=True,
    ),
    Endpoint(
        "GET", "/keys/{id}/usage", "get_key_usage", "Show what a key used, by day and model.", _usage,
        None, doc.KeyUsage, query=_DAYS, refusals=(404,), needs_usage=True,
    ),
    Endpoint("GET", "/users/{id}", "get_user", "Show what is recorded of a user.", _find_user, None, doc.User),
    Endpoint(
        "PUT", "/users/{id}", "change_user", "Record something of a user. It holds everywhere within a second.",
        _change_user, doc.UserChange, doc.User,
    ),
)  # fmt: skip
_ID_PATH: Final = re.compile(r"/(keys|users)/([^/]+)(/rotate|/usage)?")


def endpoint_of(method: str, path: str) -> tuple[Endpoint, str]:
    """Return the endpoint of a request, and the id in its path. Raises: `KeyNotFound`, `MethodNotAllowed`."""
    found = _ID_PATH.fullmatch(path)
    template, key_id = (f"/{found[1]}/{{id}}{found[3] or ''}", found[2]) if found is not None else (path, "")
    there = {each.method: each for each in ENDPOINTS if each.path == template}
    if not there:
        raise KeyNotFound("There is nothing at this path: /openapi.json describes what there is.")
    endpoint = there.get("GET" if method == "HEAD" else method)
    if endpoint is None:
        allowed = ", ".join((*there, "HEAD") if "GET" in there else there)
        raise errors.MethodNotAllowed(f"use {allowed}", headers=(("Allow", allowed),))
    return endpoint, key_id
