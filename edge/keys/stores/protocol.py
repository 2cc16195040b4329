"""What the edge asks of any place that keeps API keys.

A store knows the SHA-256 of a key, never the key (a server that is asked over HTTP is the exception: RFC 7662 sends it
the key). It yields a `Principal`, answers what is recorded and judges nothing: whether a key is disabled, suspended or
expired, how long an answer is kept, and what happens while the store is down, is decided by its owner
(`keys/authenticator.py`).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edge.config.process_settings import KeysConfig
from edge.errors import KeyStoreUnavailable
from edge.exchange import Principal


class StoreFailed(KeyStoreUnavailable):
    """503: the store gave no answer. `reason` is for the log and reaches no client; it holds no key and no digest."""

    def __init__(self, reason: str = "") -> None:
        super().__init__("API keys cannot be checked right now, try again in a moment.", retry_after_s=1)
        self.reason = reason


class AnswerUnusable(StoreFailed):
    """503: what the store answered is neither yes nor no; the fault may be in what it holds of this one key."""


@dataclass(frozen=True, slots=True)
class TokenPrincipal(Principal):
    """Who a token proved to be; `proof` names the key of its issuer that proved it."""

    proof: str = ""


@dataclass(frozen=True, slots=True)
class Invalidation:
    """What a cache of look-ups must forget: keys by digest or id, the keys of users, tokens by what proved them.

    What is named was changed, so it is dropped. `everything` means that changes may have been missed: every answer is
    asked for anew, but goes on as a known one while the store is down. `proofs` are keys that an issuer withdrew; each
    process finds out by itself, so they are not published.
    """

    digests: frozenset[bytes] = field(default=frozenset(), repr=False)
    ids: frozenset[str] = frozenset()
    users: frozenset[str] = frozenset()
    proofs: frozenset[str] = frozenset()
    everything: bool = False

    @classmethod
    def all_of(cls, parts: Sequence["Invalidation"]) -> "Invalidation":
        """Return several as one."""
        return cls(
            digests=frozenset().union(*(each.digests for each in parts)),
            ids=frozenset().union(*(each.ids for each in parts)),
            users=frozenset().union(*(each.users for each in parts)),
            proofs=frozenset().union(*(each.proofs for each in parts)),
            everything=any(each.everything for each in parts),
        )

    @property
    def names_principals(self) -> bool:
        """Whether something is named that only the record of a key or token has."""
        return bool(self.ids or self.users or self.proofs)

    def names(self, principal: Principal) -> bool:
        """Return whether a key is named by its id or its user, or a token by what proved it."""
        if isinstance(principal, TokenPrincipal) and principal.proof in self.proofs:
            return True
        return principal.id in self.ids or principal.user in self.users

    def concerns(self, digest: bytes, principal: Principal | None) -> bool:
        """Return whether an answer, None for one that is not known yet, may have changed."""
        if self.everything or digest in self.digests:
            return True
        return self.names_principals if principal is None else self.names(principal)


@dataclass(frozen=True, slots=True)
class UserState:
    """What a store has recorded of a user, whichever credential they show."""

    suspended: bool = False
    out_of_quota: bool = False


def ignore(_: object) -> None:
    """Do nothing: a hook that nobody has set."""


class KeyStore(Protocol):
    """What the edge asks of a place that knows keys.

    The hooks are set by the owner before `open` and called on the event loop. `on_change` is called in the order of the
    changes; a store that was down and answers again reports `everything`. An answer may arrive after the report that
    makes it stale: whoever keeps answers must not keep one whose look-up began before the last report. `on_outage` is
    called by a store that notices by itself that it is down, with the reason for the log, and with "" when it is back.
    `knows_users`: whether there is something to learn from `look_up_user`.
    """

    on_change: Callable[[Invalidation], object] = staticmethod(ignore)
    on_outage: Callable[[str], object] = staticmethod(ignore)
    knows_users: bool = True

    async def open(self) -> None:
        """Begin to answer; raises `Unusable` when a person must act first."""

    async def close(self) -> None:
        """Stop answering and free everything; safe to call twice."""

    def reconfigure(self, config: KeysConfig) -> None:
        """Take over what a reload may change of this store, if anything; its address needs a restart."""

    async def look_up(self, digest: bytes, key: str) -> Principal | None:
        """Return who owns the key of a SHA-256 digest; None if it is unknown or revoked. Raises `StoreFailed`.

        `key` is for stores that must send it on; it is kept nowhere.
        """

    async def look_up_user(self, user: str) -> UserState:
        """Return what is recorded of a user who shows a token instead of a key; raises `StoreFailed`."""
        return UserState()


def hash_key(key: str | bytes) -> bytes:
    """Return the 32 raw bytes of the SHA-256 of a key, the only form in which keys are kept and looked up.

    Plain SHA-256 is enough: a salt and a slow hash protect what can be guessed, and 270 random bits cannot.
    A str is read as a header's value: bytes that are no UTF-8 come as surrogates and go back as they were.
    """
    return hashlib.sha256(key if isinstance(key, bytes) else key.encode("utf-8", "surrogateescape")).digest()
