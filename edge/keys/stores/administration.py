"""What an administrator asks of a key store and gets from it, wherever keys are kept.

`edge keys` and the admin listener ask one `Registry`: the embedded file's (`registry.py`) or that of a Redis
(`redis_registry.py`). Each change is one step with its line of the audit, which nothing changes or takes away.
"""

import dataclasses
import hashlib
import hmac
import os
import pwd
import re
import secrets
import socket
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol, Self, TypedDict, Unpack

import orjson

from edge.config.values import seconds
from edge.exchange import Principal
from edge.keys.stores.protocol import UserState, hash_key
from edge.keys.stores.records import MOST_SHARE
from edge.names import check_pattern, is_dns_label

KEY_ID: Final = re.compile(r"key_[a-z0-9]{12}")
IDEMPOTENT_S: Final = 86_400  # how long a repeated request gets the same key
_AUDIT_VERSION: Final = 1
_KEY_ALPHABET: Final = string.ascii_letters + string.digits + "_-"
_KEY_LENGTH: Final = 45  # choices out of 64: 270 random bits
_ID_ALPHABET: Final = string.ascii_lowercase + string.digits
_LONGEST_LIFETIME_S: Final = 100 * 365 * 86_400  # a later date is a slip of the pen, and soon one no clock can print
_LONGEST_NAME: Final = 256
_MOST_PATTERNS: Final = 100


class UnknownKey(ValueError):
    """No key has this id."""

    def __init__(self, key_id: str) -> None:
        if KEY_ID.fullmatch(key_id):
            message = f"no key has the id {key_id}: `edge keys list` shows those that exist"
        else:  # not repeated: it may be the key itself
            message = "this is not the id of a key: an id is key_ and 12 characters, see `edge keys list`"
        super().__init__(message)


class Unchangeable(ValueError):
    """The key is in a state in which this change is not possible."""


class RevokedKey(Unchangeable):
    """The key was revoked, which is for good."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"{key_id} is revoked and stays so: create a new key for this user")


class IdempotencyReused(ValueError):
    """An idempotency key was used before, for something else."""


class ReadOnlyStore(ValueError):
    """Keys are made and changed elsewhere, not by this edge."""


@dataclass(frozen=True, slots=True)
class KeyRecord(Principal):
    """A key as its administrator sees it: the record of a look-up, and its history.

    Times are Unix seconds, None for what is not known or did not happen; `last_used_at` is exact to a minute.
    `replaced_by` is the id of the key that a rotation made.
    """

    created_at: float | None = field(default=None, kw_only=True)
    last_used_at: float | None = field(default=None, kw_only=True)
    revoked: bool = field(default=False, kw_only=True)
    revoked_at: float | None = field(default=None, kw_only=True)
    replaced_by: str | None = field(default=None, kw_only=True)

    def as_json(self) -> dict[str, Any]:
        """Return the record for JSON: its fields in order, times as RFC 3339 in UTC or None."""
        return {name: _shown(name, value) for name, value in dataclasses.asdict(self).items()}


class KeyOptions(TypedDict, total=False):
    """What a new key may have besides its user and name."""

    allow: Sequence[str]
    deny: Sequence[str]
    expires_in_s: float | None
    limit: str | None
    share: int | None


class KeyChanges(TypedDict, total=False):
    """What can be changed of a key; `expires_at` is Unix seconds, None for no end."""

    name: str
    allow: Sequence[str]
    deny: Sequence[str]
    enabled: bool
    expires_at: float | None
    limit: str | None
    share: int | None


class UserMarks(TypedDict, total=False):
    """What can be recorded of a user."""

    suspended: bool
    out_of_quota: bool


class Actor(NamedTuple):
    """Who changes something: a person's or program's name, by which way (`command` or `api`), and from where."""

    name: str
    via: str
    address: str = ""


class Idempotency(NamedTuple):
    """A request that may come again and must make one key: the SHA-256 of its name and of all that it asks for.

    The key is worked out of `secret` and a salt that the store keeps for a day, so nothing else has to keep the key.
    """

    name: bytes
    request: bytes
    secret: bytes = b""

    def key(self, salt: bytes) -> str:
        """Return the key that this request makes with a salt."""
        drawn = hmac.digest(self.secret, salt + self.name, hashlib.sha512)
        return "sk-" + "".join(_KEY_ALPHABET[byte & 63] for byte in drawn[:_KEY_LENGTH])


class Registry(Protocol):
    """Creates, lists and changes keys; a context manager. Every method raises `Unusable` for a store that fails.

    A method that takes the id of a key raises `UnknownKey`; one that changes a key raises `Unchangeable`.
    """

    def __enter__(self) -> Self:
        """Open the store."""
        ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close it."""

    def create(
        self,
        user: str,
        name: str = "",
        *,
        idempotency: Idempotency | None = None,
        now: Callable[[], float] = time.time,
        **options: Unpack[KeyOptions],
    ) -> tuple[str, KeyRecord]:
        """Make a key and return it with its record; the key itself is kept nowhere.

        Raises `ValueError` as `new_key` does, `IdempotencyReused`.
        """
        ...

    def rotate(self, key_id: str, grace_s: float, *, idempotency: Idempotency | None = None) -> tuple[str, KeyRecord]:
        """Make a key like another, which ends `grace_s` from now; raises as `create` does too."""
        ...

    def find(self, key_id: str) -> KeyRecord:
        """Return a key, also a revoked one."""
        ...

    def page(
        self, user: str | None = None, after: str | None = None, limit: int | None = None, *, revoked: bool = False
    ) -> Sequence[KeyRecord]:
        """Return keys in the order they were made: of a user, those after another, at most `limit`."""
        ...

    def change(self, key_id: str, **changes: Unpack[KeyChanges]) -> KeyRecord:
        """Change a key and return it; raises `ValueError` for what no key may have."""
        ...

    def revoke(self, key_id: str) -> KeyRecord:
        """End a key for good; raises `RevokedKey` when that was done before."""
        ...

    def mark_user(self, user: str, **marks: Unpack[UserMarks]) -> int:
        """Record something of a user and return how many keys there are, 0 may be a misspelt user."""
        ...

    def find_user(self, user: str) -> tuple[UserState, int]:
        """Return what is recorded of a user, and how many keys there are."""
        ...

    def note_used(self, ids: Iterable[str], at: float) -> None:
        """Note that keys were used, at a time in Unix seconds."""

    def audit(self, since: float = 0.0) -> Iterator[dict[str, Any]]:
        """Yield what was changed from a time on, in its order."""
        ...


def new_key(
    user: str,
    name: str = "",
    *,
    now: Callable[[], float] = time.time,
    key: str = "",
    **options: Unpack[KeyOptions],
) -> tuple[str, KeyRecord]:
    """Return a key, the given one or a random one, and its record, which stand nowhere yet.

    Raises `ValueError` for a user that is no DNS label, a wrong pattern, or a lifetime out of range.
    """
    check_user(user)
    lifetime_s = options.get("expires_in_s")
    if lifetime_s is not None and not 0 < lifetime_s <= _LONGEST_LIFETIME_S:
        raise ValueError("a key lives for more than 0 s and at most 100 years: leave its end out for one without end")
    allow, deny, limit = tuple(options.get("allow", ())), tuple(options.get("deny", ())), options.get("limit")
    share = options.get("share")
    check_changes({"name": name, "allow": allow, "deny": deny, "share": share})
    created_at = now()
    expires_at = None if lifetime_s is None else created_at + lifetime_s
    record = KeyRecord(
        "key_" + _random(_ID_ALPHABET, 12), user, name, allow, deny,
        expires_at=expires_at, limit=limit or None, share=share, created_at=created_at,
    )  # fmt: skip
    return key or "sk-" + _random(_KEY_ALPHABET, _KEY_LENGTH), record


def draw(idempotency: Idempotency | None) -> tuple[bytes, str]:
    """Return the salt of a request that may come again and the key that it makes, "" for any key."""
    salt = secrets.token_bytes(32)
    return salt, idempotency.key(salt) if idempotency is not None else ""


def successor(old: KeyRecord, now: float, key: str = "") -> tuple[str, KeyRecord]:
    """Return a key like another, with as long a life as that had; raises `Unchangeable`."""
    check_changeable(old)
    if old.replaced_by is not None:
        raise Unchangeable(f"{old.id} was rotated before: rotate {old.replaced_by}, which took its place")
    if not old.enabled:
        raise Unchangeable(f"{old.id} is disabled: enable it before it is rotated")
    begun = now if old.created_at is None else old.created_at
    lifetime_s = None if old.expires_at is None else max(old.expires_at - begun, 1.0)
    options: KeyOptions = {"allow": old.allow, "deny": old.deny, "limit": old.limit, "share": old.share}
    options["expires_in_s"] = lifetime_s
    return new_key(old.user, old.name, now=lambda: now, key=key, **options)


def end_of(old: KeyRecord, now: float, grace_s: float) -> float:
    """Return when a key ends that is rotated: after its grace, unless it does before."""
    return min(now + grace_s, old.expires_at if old.expires_at is not None else float("inf"))


def check_changeable(record: KeyRecord) -> None:
    """Raise `RevokedKey` for one that is."""
    if record.revoked:
        raise RevokedKey(record.id)


def check_changes(changes: KeyChanges) -> None:
    """Raise `ValueError` for what no key may have."""
    name, patterns = changes.get("name", ""), (*changes.get("allow", ()), *changes.get("deny", ()))
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ValueError(f"a key's name is one line of at most {_LONGEST_NAME} printable characters")
    if len(patterns) > _MOST_PATTERNS:
        raise ValueError(f"a key has at most {_MOST_PATTERNS} patterns: allow more at once with * and **")
    for pattern in patterns:
        check_pattern(pattern)
    share = changes.get("share")
    if share is not None and not 1 <= share <= MOST_SHARE:
        raise ValueError(f"a key's share is a whole number of 1 to {MOST_SHARE}: leave it out for that of its limit")


def check_user(user: str) -> None:
    """Raise `ValueError` for a user that is no DNS label."""
    if not is_dns_label(user):
        raise ValueError(
            "a user is a DNS label such as u-1100a15812cc: 1 to 63 of a-z, 0-9 and -, with no - at either end"
        )


def parse_lifetime(text: str) -> float:
    """Return the seconds of a lifetime such as `30d`, at least 1 and whole; raises `ValueError`."""
    lifetime_s = seconds(text, longest_s=_LONGEST_LIFETIME_S)
    if lifetime_s < 1 or lifetime_s % 1:
        raise ValueError(f'{text!r} is not a lifetime: write whole seconds, one or more, such as "90s" or "30d"')
    return lifetime_s


def replayed(
    record: KeyRecord, idempotency: Idempotency, request: bytes, key: str, digest: bytes
) -> tuple[str, KeyRecord]:
    """Return what a request got when it came first, of which the store keeps what it asked and the key's digest.

    Raises `IdempotencyReused` where it asks something else now, or `key` is not what was given then.
    """
    if not hmac.compare_digest(request, idempotency.request):
        raise IdempotencyReused("this Idempotency-Key was used for another request: use a new one for each")
    if not hmac.compare_digest(digest, hash_key(key)):
        raise IdempotencyReused(
            f"this Idempotency-Key made {record.id} under another server.admin_token, so the key cannot be shown again:"
            " revoke it, and create another with a new Idempotency-Key"
        )
    return key, record


# --- the audit


def this_process() -> Actor:
    """Return who runs a command."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user need not be in the file
        name = str(os.getuid())
    sudoer = os.environ.get("SUDO_USER", "")
    return Actor(f"{sudoer} as {name}" if sudoer else name, "command", socket.gethostname())


def audit_line(actor: Actor, action: str, at: float, user: str, key_id: str, changed: Mapping[str, Any]) -> bytes:
    """Return the line of a change, JSON without a newline: who did what to which key or user, and when."""
    return orjson.dumps(
        {
            "v": _AUDIT_VERSION,
            "time": rfc_3339(at, "milliseconds"),
            "actor": actor.name,
            "via": actor.via,
            "address": actor.address or None,
            "action": action,
            "user": user,
            "key_id": key_id or None,
            "changed": {name: _shown(name, value) for name, value in changed.items()},
        }
    )


def facts_of(record: KeyRecord) -> dict[str, Any]:
    """Return what the audit notes of a key that is made: all but what is as it is of most."""
    names = ("name", "allow", "deny", "limit", "share", "expires_at")
    return {name: value for name in names if (value := getattr(record, name))}


def rfc_3339(unix_s: float, precision: str = "seconds") -> str:
    """Return a time in UTC."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec=precision).replace("+00:00", "Z")


def _shown(name: str, value: Any) -> Any:
    return rfc_3339(value) if name.endswith("_at") and value is not None else value


def _random(alphabet: str, length: int) -> str:
    return "".join(secrets.choice(alphabet) for _ in range(length))
