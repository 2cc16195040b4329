"""The channel by which every process learns of changed keys at once: publish and subscribe of Redis or Valkey.

A message names what was changed: `digest:` and the SHA-256 of a key in hex, `key:` and an id, `user:` and a user, or
`all`. Redis keeps no message for who is not there: whenever the subscription was lost, everything may have changed.

Source: https://valkey.io/topics/pubsub/
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.core import GaugeMetricFamily, Metric

from edge.keys.stores.protocol import Invalidation, ignore
from edge.outage import Outage
from edge.tasks import end_tasks
from edge.valkey import answer_of, reason_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

_log = logging.getLogger(__name__)

CHANNEL: Final = "edge:keys"
ALL: Final = "all"
_PING_INTERVAL_S: Final = 0.5  # a subscription that is silently dead would miss revocations
_GATHER_S: Final = 0.05
_MAX_GATHERED: Final = 300  # their keys are forgotten in 3 ms
_A_STEP: Final = 20  # messages that are read
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 1.0


class RevocationChannel:
    """A subscription that is taken up again whenever it is lost.

    `on_change` is called with everything each time that it begins or ceases to listen. `on_outage` is called at every
    attempt that fails, and with "" when it listens.
    """

    def __init__(self, client: "Redis") -> None:
        self.on_change: Callable[[Invalidation], object] = ignore
        self.on_outage: Callable[[str], object] = ignore
        # Of no weight in the log: whoever else needs this Redis logs that it is gone.
        self.outage = Outage(_log, "revocations are not received", "revocations are received again")
        self.outage.reason = "not connected yet"
        self._client = client
        self._is_told = False  # that a message is not understood
        self._is_behind = False  # more messages wait than were gathered
        self._task: asyncio.Task[None] | None = None

    def metrics(self) -> Iterator[Metric]:
        """Yield whether it listens."""
        up = not self.outage
        yield GaugeMetricFamily("edge_shared_redis_up", "1, or 0 while shared.redis does not answer.", value=up)

    def open(self) -> None:
        """Begin to listen."""
        self._task = asyncio.get_running_loop().create_task(self._listen(), name="revocations")

    async def close(self) -> None:
        """Stop listening."""
        task, self._task = self._task, None
        if task is not None:
            await end_tasks((task,))

    async def publish(self, invalidation: Invalidation) -> int:
        """Notify every process, this one too; return how many listen. Raises what the client raises."""
        messages = messages_of(invalidation)
        listeners = [int(await answer_of(self._client.publish(CHANNEL, message))) for message in messages]
        return max(listeners, default=0)

    async def _listen(self) -> None:
        pause_s, heard = _FIRST_PAUSE_S, False
        while True:
            try:
                async for invalidation in self._invalidations():
                    pause_s, heard = _FIRST_PAUSE_S, True
                    self.on_change(invalidation)
            except Exception as error:  # whatever it is: who does not listen any more misses every revocation
                self.outage.down(reason_of(error), logging.DEBUG)
                self.on_outage(self.outage.reason)
                if heard:
                    heard = False
                    self.on_change(Invalidation(everything=True))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _invalidations(self) -> Any:
        """Yield what was changed, everything first; raises when the subscription does not answer any more."""
        subscription = self._client.pubsub()
        async with contextlib.aclosing(subscription):
            await answer_of(subscription.subscribe(CHANNEL))
            unanswered, subscribed = 0, False
            while unanswered < 2:
                message = await answer_of(subscription.get_message(timeout=_PING_INTERVAL_S))
                if message is None:
                    unanswered += 1
                    await answer_of(subscription.ping())
                    continue
                unanswered = 0
                match message["type"]:
                    case "subscribe":
                        subscribed = True
                        self.outage.up(logging.DEBUG)
                        self.on_outage("")
                        yield Invalidation(everything=True)
                    case "message":
                        yield await self._with_what_follows(self._read(message["data"]), subscription)
                    case "pong" if subscribed:
                        pass
                    case _:
                        raise ConnectionError("what answers is no subscription")
            raise TimeoutError("the subscription does not answer")

    async def _with_what_follows(self, invalidation: Invalidation, subscription: Any) -> Invalidation:
        """Return an invalidation with those that come right behind, as one.

        Whoever takes it compares it with every look-up under way: once for a thousand users, not a thousand times.
        """
        if not self._is_behind:
            await asyncio.sleep(_GATHER_S)
        self._is_behind, gathered = False, [invalidation]
        with contextlib.suppress(Exception):  # the next read fails again; what has arrived must be reported
            for count in range(1, _MAX_GATHERED):
                message = await answer_of(subscription.get_message(timeout=0))
                if message is None:
                    break
                if message["type"] == "message":
                    gathered.append(self._read(message["data"]))
                if count % _A_STEP == 0:  # what the client has in its buffer it gives without a turn of the loop
                    await asyncio.sleep(0)
            else:
                self._is_behind = True
        return Invalidation.all_of(gathered)

    def _read(self, message: bytes) -> Invalidation:
        """Return what a message names; the first that is not understood is logged, though not its words."""
        invalidation = invalidation_of(message)
        if invalidation.everything and message.strip() != ALL.encode() and not self._is_told:
            self._is_told = True
            _log.warning("messages on %s are not understood: every key is asked for again at each", CHANNEL)
        return invalidation


def messages_of(invalidation: Invalidation) -> list[str]:
    """Return the messages of an invalidation."""
    if invalidation.everything:
        return [ALL]
    return [
        *(f"digest:{digest.hex()}" for digest in invalidation.digests),
        *(f"key:{each}" for each in invalidation.ids),
        *(f"user:{user}" for user in invalidation.users),
    ]


def invalidation_of(message: bytes) -> Invalidation:
    """Return what a message names; one that is not understood may mean anything."""
    kind, _, name = message.decode("utf-8", "replace").strip().partition(":")
    match kind:
        case "digest":
            with contextlib.suppress(ValueError):
                return Invalidation(frozenset((bytes.fromhex(name),)))
        case "key" if name:
            return Invalidation(ids=frozenset((name,)))
        case "user" if name:
            return Invalidation(users=frozenset((name,)))
    return Invalidation(everything=True)
