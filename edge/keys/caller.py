"""What the owner of a key or token may call."""

from functools import lru_cache
from sys import getsizeof
from typing import Final

from edge.errors import ModelNotFound, OutOfQuota, PermissionDenied
from edge.exchange import Principal
from edge.keys.credential import wrong_key
from edge.names import Glob

# Of the names that are remembered of a key: about twenty of usual length. Whoever has a key can make up names of 512
# characters, and there are 100,000 keys.
_MAX_REMEMBERED_BYTES: Final = 2048
# Most keys have the patterns of others, and a compiled one takes a kilobyte.
_glob: Final = lru_cache(maxsize=4096)(Glob)


class Caller:
    """A principal as the cache holds it, with what was decided of the models it asked for."""

    __slots__ = ("_allow", "_deny", "_remembered_bytes", "_verdicts", "principal")

    def __init__(self, principal: Principal) -> None:
        self.principal = principal
        self._allow = tuple((pattern, _glob(pattern)) for pattern in principal.allow)
        self._deny = tuple(_glob(pattern) for pattern in principal.deny)
        self._verdicts: dict[str, bool | None] = {}
        self._remembered_bytes = 0

    def may_call(self, model: str) -> bool | None:
        """Return True, False (looks like an unknown model), or None for an explicit deny."""
        verdict = self._verdicts.get(model, ...)
        if verdict is ...:
            verdict = self.judge(model)
            self._remember(model, verdict)
        return verdict

    def _remember(self, model: str, verdict: bool | None) -> None:
        size_bytes = getsizeof(model)
        if size_bytes > _MAX_REMEMBERED_BYTES // 8:  # a long name drives no other out
            return
        if self._remembered_bytes + size_bytes > _MAX_REMEMBERED_BYTES:
            self._verdicts = {}
            self._remembered_bytes = 0
        self._verdicts[model] = verdict
        self._remembered_bytes += size_bytes

    def judge(self, model: str) -> bool | None:
        """Return what `may_call` does, and remember nothing: a list of all models would drive out those in use."""
        if any(denied.matches(model) for denied in self._deny):
            return None
        owner, slash, _ = model.partition("/")
        owned = owner.startswith("u-")
        if not self._allow:
            return bool(slash) and owner in ("public", self.principal.user)
        for pattern, allowed in self._allow:
            opens = not owned or owner in (self.principal.user, pattern.partition("/")[0])
            if opens and allowed.matches(model):
                return True
        return False

    def check(self, model: str) -> None:
        """Raise `PermissionDenied` or `ModelNotFound` unless this caller may call the model."""
        verdict = self.may_call(model)
        if verdict is None:
            raise PermissionDenied("This API key is not allowed to use this model.", param="model")
        if not verdict:
            raise ModelNotFound.named(f"`{model}`")

    def check_state(self, now: float) -> None:
        """Raise `Unauthenticated` or `OutOfQuota` unless the key is usable at the Unix time `now`."""
        principal = self.principal
        if principal.has_expired(now) or not principal.enabled or principal.suspended:
            raise wrong_key()
        if principal.out_of_quota:
            raise OutOfQuota("You exceeded your current quota: check the balance of your account.")
