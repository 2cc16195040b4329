"""Which endpoint made which response of OpenAI's Responses API: that one alone can return, continue or delete it.

A process knows at once of the responses that it passed on. Over `shared.redis` every other one does soon:
`edge:response:` and a user with a response's id (a JSON array) name a JSON array of the model that was asked and the
member that answered. A response is its user's: the id of somebody else's is not known.

Source: https://platform.openai.com/docs/api-reference/responses
"""

import asyncio
import contextlib
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import orjson
from prometheus_client.core import GaugeMetricFamily, Metric

from edge.errors import UpstreamUnavailable
from edge.outage import Outage
from edge.tasks import end_tasks
from edge.valkey import answer_of, reason_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

_log = logging.getLogger(__name__)

PREFIX: Final = "edge:response:"
# Engines keep responses in memory, so none outlives its server; OpenAI keeps them for 30 days. A day is enough for a
# conversation that goes on and a background response that is fetched, and it bounds what Redis holds.
LIFETIME_S: Final = 86_400
MAX_KNOWN: Final = 100_000  # of 0.4 kB each, as OpenAI makes ids: 40 MB
MAX_OF_USER: Final = 10_000  # whose instance can make as many ids as it likes
_MAX_QUEUED: Final = 10_000  # while Redis is down; what is dropped is known here all the same
_MAX_DROPPED: Final = 2  # expired ones at each new one: all of a quiet night's at once would hold the loop up
_BATCH: Final = 20  # in a call, 0.1 ms each: what the server and the loop are held up by
_TIMEOUT_S: Final = 1.0  # for an answer of Redis; a client waits for it
_FIRST_PAUSE_S: Final = 0.1  # between two tries
_LONGEST_PAUSE_S: Final = 1.0
_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")  # what upstreams call responses; anything else goes into no key


class Keeper(NamedTuple):
    """Who keeps a response: the model's name that was asked, the member's (`host:port`), "" for an instance."""

    model: str
    member: str


_keeper: Final = msgspec.json.Decoder(Keeper)


class KeptResponses:
    """Remembers who keeps the responses of each user, here and, with a client, in Redis.

    `clock` returns seconds of the loop's clock, `name_of` what a name is called in that Redis. While Redis does not
    answer, each process knows of its own alone.
    """

    def __init__(
        self, clock: Callable[[], float], client: "Redis | None" = None, name_of: Callable[[str], str] = str
    ) -> None:
        self.outage = Outage(
            _log,
            "shared.redis is unavailable, a response is found by the process alone that passed it on",
            "shared.redis answers again, a response is found by every process",
        )
        self._clock = clock
        self._client = client
        self._prefix = name_of(PREFIX)
        # By the names they have in Redis: user, model, member, and when it expires. The oldest is first and expires
        # first; a dict would search for it past all that were deleted. Plain tuples the garbage collector leaves alone.
        self._known: OrderedDict[str, tuple[str, str, str, float]] = OrderedDict()
        self._of_users: dict[str, OrderedDict[str, None]] = {}  # the names of each user's, the oldest first
        self._queued: OrderedDict[str, Keeper | None] = OrderedDict()  # what Redis has to learn; None: it is forgotten
        self._wanted = asyncio.Event()  # set when there is something to write, or an outage to end
        self._asking: set[asyncio.Task[Any]] = set()
        self._is_told = False  # that something there cannot be read

    def remember(self, user: str, response_id: str, keeper: Keeper) -> None:
        """Note who keeps a response: here at once, in Redis soon; an id that no upstream should give is not noted."""
        name = self._name_of(user, response_id)
        if name is None:
            return
        now, known = self._clock(), self._known
        self._drop(name)
        for _ in range(_MAX_DROPPED):
            if known and (len(known) >= MAX_KNOWN or next(iter(known.values()))[3] <= now):
                self._drop(next(iter(known)))
        if len(own := self._of_users.get(user, ())) >= MAX_OF_USER:
            oldest = next(iter(own))
            self._drop(oldest)
            self._queue(oldest, None)
        known[name] = (user, *keeper, now + LIFETIME_S)
        self._of_users.setdefault(user, OrderedDict())[name] = None
        self._queue(name, keeper)

    def _name_of(self, user: str, response_id: str) -> str | None:
        """Return the name of a response in Redis; None for an id that no upstream should give."""
        if not _ID.fullmatch(response_id):
            return None
        return self._prefix + orjson.dumps((user, response_id)).decode()

    def _drop(self, name: str) -> None:
        known = self._known.pop(name, None)
        if known is not None:
            own = self._of_users[known[0]]
            del own[name]
            if not own:
                del self._of_users[known[0]]

    def forget(self, user: str, response_id: str) -> None:
        """Note that a response is deleted."""
        name = self._name_of(user, response_id)
        if name is not None:
            self._drop(name)
            self._queue(name, None)

    async def find(self, user: str, response_id: str) -> Keeper | None:
        """Return who keeps a response of a user, None when nobody does; it takes a second at most.

        Raises: `UpstreamUnavailable` while Redis, which may know, does not answer, or says it in a way that is not
        known here.
        """
        name = self._name_of(user, response_id)
        if name is None:
            return None
        known = self._known.get(name)
        if known is not None and known[3] > self._clock():
            return Keeper(*known[1:3])
        is_forgotten = name in self._queued and self._queued[name] is None  # and Redis has not learnt it yet
        client = self._client
        if client is None or is_forgotten:
            return None
        if self.outage:
            raise _cannot_look_up()
        try:
            value = await self._ask(lambda: client.get(name))
        except Exception as error:  # from something that is no Redis the client raises whatever its parsing stumbles on
            self._lose(error)
            raise _cannot_look_up() from None
        try:
            return _keeper.decode(value) if isinstance(value, bytes) else None
        except ValueError:  # both of msgspec's errors are: a newer edge wrote it, say, and another process can read it
            if not self._is_told:
                self._is_told = True
                _log.error("shared.redis: who keeps a response is written in a way that this edge does not know")
            raise _cannot_look_up() from None

    def _queue(self, name: str, keeper: Keeper | None) -> None:
        if self._client is not None:
            self._queued.pop(name, None)
            if len(self._queued) >= _MAX_QUEUED:
                self._queued.popitem(last=False)
            self._queued[name] = keeper
            self._wanted.set()

    async def run(self) -> None:
        """Write to Redis what is queued until cancelled; `close` follows."""
        pause_s = _FIRST_PAUSE_S
        while True:
            if not await self._write():
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            pause_s = _FIRST_PAUSE_S
            if not self._queued:
                self._wanted.clear()
                await self._wanted.wait()

    async def close(self) -> None:
        """Write what is left if that goes quickly, when `run` has ended, and end every command.

        The last responses of a process that is replaced are asked for at another one.
        """
        if not self.outage:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TIMEOUT_S):
                    while self._queued and await self._write():
                        pass
        await end_tasks(self._asking, _TIMEOUT_S)

    async def _write(self) -> bool:
        """Write some of what is queued, or only look whether Redis is there; return whether it is."""
        batch = list(islice(self._queued.items(), _BATCH))
        try:
            await self._ask(lambda: self._commands(batch).execute())
        except Exception as error:
            self._lose(error)
            return False
        self.outage.up(logging.INFO)
        for name, keeper in batch:
            if name in self._queued and self._queued[name] is keeper:  # nothing newer came meanwhile
                del self._queued[name]
        return True

    def _commands(self, batch: list[tuple[str, Keeper | None]]) -> Any:
        assert self._client is not None  # without one nothing is queued, and nobody calls `run`
        commands: Any = self._client.pipeline(transaction=False)
        for name, keeper in batch:
            if keeper is None:
                commands.delete(name)
            else:
                commands.set(name, msgspec.json.encode(keeper), ex=LIFETIME_S)
        return commands if batch else commands.ping()

    async def _ask(self, command: Callable[[], Any]) -> Any:
        """Return what Redis answers to a command; raises what the client raises, and `TimeoutError`.

        It is a task of its own, since redis-py can lose a cancellation: who waits here leaves at once. What is left
        of it ends by itself, with the client's timeout at the latest.
        """
        task = asyncio.get_running_loop().create_task(self._try(command), name="kept responses")
        self._asking.add(task)
        task.add_done_callback(self._asked)
        try:
            await asyncio.wait((task,), timeout=_TIMEOUT_S)
            if not task.done():
                raise TimeoutError("no answer")
            return task.result()
        finally:
            task.cancel()

    async def _try(self, command: Callable[[], Any]) -> Any:
        """Try a command, and once more when its connection is lost; every command here may be repeated.

        One that was kept may have been closed long ago, and the client finds out only by using it.
        """
        from redis.exceptions import ConnectionError as RedisConnectionError

        try:
            return await answer_of(command())
        except RedisConnectionError:
            return await answer_of(command())

    def _asked(self, task: "asyncio.Task[Any]") -> None:
        self._asking.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also when nobody waits any more

    def _lose(self, error: Exception) -> None:
        self.outage.down(reason_of(error), logging.WARNING)
        self._wanted.set()

    @property
    def known_count(self) -> int:
        """The responses whose endpoint this process knows."""
        return len(self._known)

    def metrics(self) -> Iterator[Metric]:
        """Yield how many responses are known here, and whether other processes learn of them."""
        text = "Responses of the Responses API whose endpoint this process knows."
        yield GaugeMetricFamily("edge_responses_known", text, value=len(self._known))
        if self._client is not None:
            text = "1, or 0 while responses are found by the process alone that passed them on."
            yield GaugeMetricFamily("edge_shared_responses_up", text, value=not self.outage)


def _cannot_look_up() -> UpstreamUnavailable:
    return UpstreamUnavailable("Where this response is kept cannot be looked up now, try again.", retry_after_s=1)
