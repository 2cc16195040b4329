"""A key store in Redis or Valkey: a hash for each key, and one for each user who is marked.

`edge:store` is the version of this format, 1. It says that the keys are all there: who fills a Redis sets it last. A
Redis without it has lost its keys, and is down. One that has keys and no `edge:store` when an edge first sees it is of
before there were versions, and gets it from that edge.

`edge:key:` and the SHA-256 of the key in hex names a hash of `id` and `user`, and of `name`, `allow` and `deny`
(patterns with a space between two), `enabled` (0 or 1), `expires_at` (Unix seconds), `limit` and `share` where they
are needed.
`edge:user:` and the user names a hash of `suspended` and `out_of_quota` (0 or 1). Whoever changes one publishes on
`edge:keys` (see `keys/revocations.py`), after the change. Publishing knows no databases: one Redis, one set of keys.

In a Cluster all of these names begin with `{edge}:`, and the channel does not (see `config/redis_urls.py`).
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from edge.config.process_settings import KeysConfig
from edge.config.redis_urls import names_at
from edge.exchange import Principal
from edge.keys.revocations import RevocationChannel
from edge.keys.stores.protocol import AnswerUnusable, Invalidation, KeyStore, StoreFailed, UserState
from edge.keys.stores.records import principal_of, user_state_of
from edge.tasks import end_tasks
from edge.tls import client_tls
from edge.valkey import answer_of, connect, disconnect, reason_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

_log = logging.getLogger(__name__)

KEY_PREFIX: Final = "edge:key:"
USER_PREFIX: Final = "edge:user:"
MARKER: Final = "edge:store"
FORMAT: Final = "1"
EMPTY: Final = (
    f"it holds no {MARKER}, so its keys are lost or not there yet: put them back and say so with"
    " `edge keys init`, or make the first key with `edge keys create`"
)
_SET_IT: Final = f"`SET {MARKER} {FORMAT}` at its primary, else one that was half refilled is taken for whole"
_WATCH_INTERVAL_S: Final = 1.0
_SCAN_COUNT: Final = 1000
# A key that is found and the mark are one step: what is emptied in between is not marked.
_MARK: Final = "return redis.call('EXISTS', KEYS[1]) == 1 and redis.call('SET', KEYS[2], ARGV[1], 'NX') and 1 or 0"
_FLAGS: Final = {"0": False, "1": True}


class RedisKeyStore(KeyStore):
    """Looks keys up in Redis, and reports the changes that its channel brings.

    It is down while no change can be heard of, and while its keys are lost; both are watched without a look-up too.
    """

    def __init__(self, config: KeysConfig) -> None:
        self._config = config
        self._name = names_at(config.store.url)
        self._client: Redis | None = None
        self._channel: RevocationChannel | None = None
        self._watching: asyncio.Task[None] | None = None
        self._is_heard = False  # whether changes are heard of
        self._lost = ""  # why what is there cannot be believed
        self._is_down = True  # as far as it was reported
        self._wake = asyncio.Event()
        self._is_known = False  # whether the mark, or that there is no key, was seen: without a mark all is lost then
        self._adopting = asyncio.Lock()
        self._is_told = False  # that this edge may not mark it

    async def open(self) -> None:
        """Begin to answer, once Redis does; raises `Unusable` without the package, or for a bad CA file."""
        ca_file = self._config.store_ca_file
        if ca_file is not None:
            client_tls(ca_file, "keys.store_ca_file")  # the client would find out at each connection
        client = connect(self._config.store.url, self._config.store_timeout_s, ca_file)
        self._client = client
        self._channel = RevocationChannel(client)
        self._channel.on_change = self.on_change
        self._channel.on_outage = self._unheard
        self._channel.open()
        self._watching = asyncio.get_running_loop().create_task(self._watch(), name="key store")

    async def close(self) -> None:
        """Stop listening and close the connections."""
        channel, self._channel = self._channel, None
        client, self._client = self._client, None
        watching, self._watching = self._watching, None
        if watching is not None:
            await end_tasks((watching,))
        if channel is not None:
            await channel.close()
        if client is not None:
            await disconnect(client)

    def _unheard(self, reason: str) -> None:
        """Report an outage; while no change can be heard of, answers are believed from one attempt to the next."""
        self._is_heard = not reason
        if reason:
            self._down(reason)
            self.on_change(Invalidation(everything=True))
        else:
            self._wake.set()  # it is back if the keys are

    async def _watch(self) -> None:
        """Find out whether the keys are there, when changes are heard of again and every second."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_INTERVAL_S):
                    await self._wake.wait()
            self._wake.clear()
            if self._is_heard:
                with contextlib.suppress(StoreFailed):  # lost keys are reported, a lost connection is by the channel
                    await self._read()

    def _down(self, reason: str) -> None:
        self._is_down = True
        self.on_outage(reason)

    def _lose(self, reason: str) -> StoreFailed:
        """Report that the keys cannot be believed, once; return the error for who asked."""
        if self._lost != reason:
            self._lost = reason
            self._down(reason)
        return StoreFailed(reason)

    def _find(self) -> None:
        """Note that the keys are there, and report it if they were not."""
        if self._lost:
            self._lost = ""
            self.on_change(Invalidation(everything=True))
        if self._is_down and self._is_heard:
            self._is_down = False
            self.on_outage("")

    async def look_up(self, digest: bytes, key: str) -> Principal | None:
        """Return who owns the key of this SHA-256 digest; raises `StoreFailed`."""
        facts = await self._read(self._name(KEY_PREFIX + digest.hex()))
        if not facts:
            return None
        try:
            principal = principal_of(record_of(facts))
        except ValueError as error:
            raise AnswerUnusable(f"a record with {error}") from None
        state = await self.look_up_user(principal.user)
        return replace(principal, suspended=state.suspended, out_of_quota=state.out_of_quota)

    async def look_up_user(self, user: str) -> UserState:
        """Return what is recorded of a user; raises `StoreFailed`."""
        facts = await self._read(self._name(USER_PREFIX + user))
        try:
            return user_state_of(flags_of(facts, "suspended", "out_of_quota"))
        except ValueError as error:
            raise AnswerUnusable(f"a user's record with {error}") from None

    async def _read(self, name: str = "") -> dict[str, str]:
        """Return the hash of a name, once it is clear that keys are there; without a name only this is asked."""
        if self._client is None:
            raise StoreFailed("the store is closed")
        try:
            *facts, mark = await self._ask(self._client, name)
            await self._check(self._client, mark)
        except StoreFailed:
            raise
        except Exception as error:  # from something that is no Redis the client raises whatever its parsing stumbles on
            raise StoreFailed(reason_of(error)) from None
        try:
            return {_decoded(field): _decoded(value) for each in facts for field, value in each.items()}
        except UnicodeDecodeError:
            raise AnswerUnusable("a record that is not UTF-8") from None

    async def _ask(self, client: "Redis", name: str) -> list[Any]:
        """Return a hash, where one is asked for, and behind it the mark: what is emptied in between has none."""
        commands: Any = client.pipeline(transaction=False)
        if name:
            commands.hgetall(name)
        commands.get(self._name(MARKER))
        answers: list[Any] = await answer_of(commands.execute(raise_on_error=False))
        if _is_of_value(answers[-1]):
            answers[-1] = b""
        for answer in answers:
            if isinstance(answer, Exception):
                raise AnswerUnusable(reason_of(answer)) if _is_of_value(answer) else answer
        return answers

    async def _check(self, client: "Redis", mark: bytes | None) -> None:
        """Raise `StoreFailed` unless the keys are there, in the format of this edge."""
        if mark is None:
            if await self._is_of_before(client):
                return self._find()
            raise self._lose(EMPTY.replace(MARKER, self._name(MARKER)))
        self._is_known = True
        if mark != FORMAT.encode():
            raise self._lose(f"its {MARKER} names a format that this edge does not know (this is {FORMAT}): upgrade it")
        self._find()

    async def _is_of_before(self, client: "Redis") -> bool:
        """Return whether a Redis without a mark has keys of before there was one, and mark it."""
        from redis.exceptions import ResponseError

        async with self._adopting:
            if self._is_known:  # by now, another marked it
                return bool(await answer_of(client.get(self._name(MARKER))) == FORMAT.encode())
            name = await any_record(client, self._name)
            self._is_known = name is None
            if name is not None and not self._is_told:
                marking: Any = client.eval(_MARK, 2, name, self._name(MARKER), FORMAT)
                try:
                    await answer_of(marking)
                except ResponseError as error:  # a replica, or a user without the right: served as it is
                    mark = self._name(MARKER)
                    _log.warning(
                        "key store: it has keys and no %s (%s): %s",
                        mark, reason_of(error), _SET_IT.replace(MARKER, mark),
                    )  # fmt: skip
                    self._is_told = True
            return name is not None


async def any_record(client: "Redis", name_of: Callable[[str], str]) -> str | None:
    """Return the name of a key's or a user's record, None where there is none."""
    cursor, prefixes = 0, (name_of(KEY_PREFIX), name_of(USER_PREFIX))
    while True:
        cursor, names = await answer_of(client.scan(cursor, name_of("edge:*"), _SCAN_COUNT))
        for name in map(_decoded, names):
            if name.startswith(prefixes):
                return name
        if not cursor:
            return None


def _is_of_value(answer: object) -> bool:
    """Return whether an answer is the error of one value, which is of another type."""
    return isinstance(answer, Exception) and str(answer).startswith("WRONGTYPE")


def _decoded(text: bytes | str) -> str:
    return text if isinstance(text, str) else text.decode()


def record_of(facts: Mapping[str, str]) -> dict[str, Any]:
    """Return the record of a hash; text that is no flag or no number stays text, which no rule accepts."""
    record: dict[str, Any] = {name: facts.get(name) for name in ("id", "user", "name", "limit")}
    record |= {name: facts.get(name, "").split() for name in ("allow", "deny")}
    record["expires_at"] = facts.get("expires_at") or None
    with contextlib.suppress(TypeError, ValueError):
        record["expires_at"] = float(record["expires_at"])
    record["share"] = facts.get("share") or None
    with contextlib.suppress(TypeError, ValueError):
        record["share"] = int(record["share"])
    return record | flags_of(facts, "enabled")


def flags_of(facts: Mapping[str, str], *names: str) -> dict[str, bool | str]:
    """Return some flags of a hash that has them; text that is none stays text, which no rule accepts."""
    return {name: _FLAGS.get(facts[name], facts[name]) for name in names if name in facts}
