"""What the API of keys takes and gives: JSON whose members, types and bounds its OpenAPI document shows too."""

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from edge.keys.stores.administration import KeyChanges, KeyRecord, UserMarks
from edge.keys.stores.records import MOST_SHARE

Time = Annotated[str, Meta(description="RFC 3339, in UTC.", extra_json_schema={"format": "date-time"})]
Moment = Annotated[datetime, Meta(description="RFC 3339, with its offset from UTC.", tz=True)]
Name = Annotated[str, Meta(description="For people: one line.", max_length=256)]
Patterns = Annotated[list[str], Meta(description="Models, with `*` within a level and `**` across.", max_length=100)]
UserName = Annotated[str, Meta(description="The namespace that owns the key, such as u-1100a15812cc: a DNS label.")]
Limit = Annotated[str, Meta(description="A table of [limits].")]
Share = Annotated[
    int, Meta(description="Of the tokens in the queue of a pool, before that of its limit.", ge=1, le=MOST_SHARE)
]
Count = Annotated[int, Meta(ge=0)]


class NewKey(Struct, forbid_unknown_fields=True):
    """A key to be made.

    Without `allow` it may call public models and its user's own; without `expires_at` it has no end.
    """

    user: UserName
    name: Name = ""
    allow: Patterns = msgspec.field(default_factory=list)
    deny: Patterns = msgspec.field(default_factory=list)
    expires_at: Moment | None = None
    limit: Limit | None = None
    share: Share | None = None


class KeyChange(Struct, forbid_unknown_fields=True):
    """What is to be another; the rest stays as it is. null takes an end, a limit or a share away."""

    name: Name | UnsetType = UNSET
    allow: Patterns | UnsetType = UNSET
    deny: Patterns | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET
    expires_at: Moment | UnsetType | None = UNSET
    limit: Limit | UnsetType | None = UNSET
    share: Share | UnsetType | None = UNSET

    def changes(self) -> KeyChanges:
        """Return what is given."""
        given: Any = msgspec.structs.asdict(self)
        found = {name: value for name, value in given.items() if value is not UNSET}
        if isinstance(self.expires_at, datetime):
            found["expires_at"] = self.expires_at.timestamp()
        return KeyChanges(**found)  # type: ignore[typeddict-item]  # whose fields are these


class Rotation(Struct, forbid_unknown_fields=True):
    """How a key is to be replaced: the old one works for `grace`, such as 24h, and without it no longer."""

    grace: Annotated[str, Meta(description="A duration: a number and ms, s, m, h, d or w.")] = "0s"


class UserChange(Struct, forbid_unknown_fields=True):
    """What is to be recorded of a user, for keys made later too; what is not given stays as it is."""

    suspended: Annotated[bool, Meta(description="Requests get a 401.")] | UnsetType = UNSET
    out_of_quota: Annotated[bool, Meta(description="Requests get a 402.")] | UnsetType = UNSET

    def marks(self) -> UserMarks:
        """Return what is given."""
        given: Any = msgspec.structs.asdict(self)
        return UserMarks(**{name: value for name, value in given.items() if value is not UNSET})  # type: ignore[typeddict-item]


class Key(Struct):
    """A key without its secret. `suspended` and `out_of_quota` are its user's; `last_used_at` is exact to a minute."""

    object: Literal["key"]
    id: str
    user: str
    name: str
    allow: list[str]
    deny: list[str]
    enabled: bool
    suspended: bool
    out_of_quota: bool
    expires_at: Time | None
    limit: str | None
    share: int | None
    created_at: Time | None
    last_used_at: Time | None
    revoked: bool
    revoked_at: Time | None
    replaced_by: Annotated[str, Meta(description="The id of the key that a rotation made.")] | None

    @classmethod
    def of(cls, record: KeyRecord) -> "Key":
        """Return the document of a record."""
        return msgspec.convert({"object": "key", **record.as_json()}, cls)


class CreatedKey(Key, kw_only=True):
    """A key with its secret, which is shown this once and kept nowhere."""

    key: str

    @classmethod
    def made(cls, key: str, record: KeyRecord) -> "CreatedKey":
        """Return the document of a key that was made."""
        return msgspec.convert({"object": "key", **record.as_json(), "key": key}, cls)


class KeyPage(Struct):
    """Some keys in the order they were made; those that follow are behind `after` = `last_id`."""

    object: Literal["list"]
    data: list[Key]
    first_id: str | None
    last_id: str | None
    has_more: bool


class User(Struct):
    """What is recorded of a user."""

    object: Literal["user"]
    id: str
    suspended: bool
    out_of_quota: bool
    keys: Annotated[int, Meta(description="Keys that are not revoked; 0 may be a misspelt user.", ge=0)]


class Day(Struct):
    """What a key used of a model on a day (UTC), in tokens and in units of each kind."""

    day: Annotated[str, Meta(extra_json_schema={"format": "date"})]
    model: str
    requests: Count
    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count
    reasoning_tokens: Count
    images: Count
    seconds: Count
    characters: Count
    estimated: Annotated[int, Meta(description="Requests whose counts are the edge's own.", ge=0)]
    crashed: Annotated[int, Meta(description="Requests whose process died.", ge=0)]


class KeyUsage(Struct):
    """What a key used, as the journal of this machine has it: by day and model, up to `as_of`."""

    object: Literal["usage"]
    key_id: str
    as_of: Time
    data: list[Day]


class Problem(Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class Error(Struct):
    """The answer to a request that was refused."""

    error: Problem
