"""The channel by which every process hears of changed keys at once: publish and subscribe of Redis or Valkey.

A message names what was changed: `digest:` and the SHA-256 of a key in hex, `key:` and an id, `user:` and a user, or
`all`. Redis keeps no message for who is not there: whenever the subscription was lost, everything may have changed.

Source: https://valkey.io/topics/pubsub/
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from edge.keys.stores.protocol import Changes, ignore_changes, ignore_outage
from edge.valkey import reason_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

CHANNEL: Final = "edge:keys"
_PING_INTERVAL_S: Final = 0.5  # a subscription that is silently dead would miss revocations
_GATHER_S: Final = 0.05
_MAX_GATHERED: Final = 10_000
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 1.0


class RevocationChannel:
    """A subscription that is taken up again whenever it is lost.

    `outage` is called at every attempt that fails, and with "" when it listens; everything may have changed each time
    that it begins or ceases to listen.
    """

    def __init__(self, client: "Redis") -> None:
        self.changed: Callable[[Changes], object] = ignore_changes
        self.outage: Callable[[str], None] = ignore_outage
        self._client = client
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to listen."""
        self._task = asyncio.get_running_loop().create_task(self._listen(), name="revocations")

    async def close(self) -> None:
        """Stop listening."""
        task, self._task = self._task, None
        while task is not None and not task.done():
            task.cancel()  # more than once: redis-py takes a cancellation while it connects for a failure to connect
            await asyncio.wait((task,), timeout=_FIRST_PAUSE_S)

    async def publish(self, changes: Changes) -> int:
        """Tell every process, this one too; return how many heard. Raises what the client raises."""
        heard = 0
        for message in messages_of(changes):
            heard = max(heard, int(await self._client.publish(CHANNEL, message)))
        return heard

    async def _listen(self) -> None:
        pause_s, heard = _FIRST_PAUSE_S, False
        while True:
            try:
                async for message in self._messages():
                    pause_s, heard = _FIRST_PAUSE_S, True
                    self.changed(message)
            except Exception as error:  # whatever it is: who does not listen any more misses every revocation
                self.outage(reason_of(error))
                if heard:
                    heard = False
                    self.changed(Changes(everything=True))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _messages(self) -> Any:
        """Yield what was changed, everything first; raises when the subscription does not answer any more."""
        subscription = self._client.pubsub()
        async with contextlib.aclosing(subscription):
            await subscription.subscribe(CHANNEL)
            unanswered, subscribed = 0, False
            while unanswered < 2:
                message = await subscription.get_message(timeout=_PING_INTERVAL_S)
                if message is None:
                    unanswered += 1
                    await subscription.ping()
                    continue
                unanswered = 0
                match message["type"]:
                    case "subscribe":
                        subscribed = True
                        self.outage("")
                        yield Changes(everything=True)
                    case "message":
                        yield await self._with_what_follows(changes_of(message["data"]), subscription)
                    case "pong" if subscribed:
                        pass
                    case _:
                        raise ConnectionError("what answers is no subscription")
            raise TimeoutError("the subscription does not answer")

    async def _with_what_follows(self, changes: Changes, subscription: Any) -> Changes:
        """Return changes with those that come right behind, as one.

        To find the keys of a user is a walk through the whole cache: one for a thousand users, not a thousand.
        """
        await asyncio.sleep(_GATHER_S)
        with contextlib.suppress(Exception):  # the next read finds it again; what was heard must be told
            for _ in range(_MAX_GATHERED):
                message = await subscription.get_message(timeout=0)
                if message is None:
                    break
                if message["type"] == "message":
                    changes |= changes_of(message["data"])
        return changes


def messages_of(changes: Changes) -> list[str]:
    """Return the messages that tell of changes."""
    if changes.everything:
        return ["all"]
    return [
        *(f"digest:{digest.hex()}" for digest in changes.digests),
        *(f"key:{each}" for each in changes.ids),
        *(f"user:{user}" for user in changes.users),
    ]


def changes_of(message: bytes) -> Changes:
    """Return what a message tells of; one that is not understood may tell of anything."""
    kind, _, name = message.decode("utf-8", "replace").strip().partition(":")
    match kind:
        case "digest":
            with contextlib.suppress(ValueError):
                return Changes(frozenset((bytes.fromhex(name),)))
        case "key" if name:
            return Changes(ids=frozenset((name,)))
        case "user" if name:
            return Changes(users=frozenset((name,)))
    return Changes(everything=True)
