"""What the owner of a key or token may call."""

from typing import Final

from edge.errors import ModelNotFound, OutOfQuota, PermissionDenied
from edge.exchange import Principal
from edge.keys.credential import wrong_key
from edge.names import Glob

_MAX_VERDICTS: Final = 256  # models remembered per key


class Caller:
    """A principal as the cache holds it, with what was decided of the models it asked for."""

    __slots__ = ("_allow", "_deny", "_verdicts", "principal")

    def __init__(self, principal: Principal) -> None:
        self.principal = principal
        self._allow = [(pattern, Glob(pattern)) for pattern in principal.allow]
        self._deny = [Glob(pattern) for pattern in principal.deny]
        self._verdicts: dict[str, bool | None] = {}

    def may_call(self, model: str) -> bool | None:
        """Return True, False (looks like an unknown model), or None for an explicit deny."""
        verdict = self._verdicts.get(model, ...)
        if verdict is ...:
            if len(self._verdicts) >= _MAX_VERDICTS:
                self._verdicts.clear()
            verdict = self._verdicts[model] = self._judge(model)
        return verdict

    def _judge(self, model: str) -> bool | None:
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
