"""Usage records into a stream of Redis or Valkey: `XADD edge:usage * id ID record JSON`, a batch in one transaction.

The stream grows until its readers trim it (XTRIM with MINID); to trim here could lose what nobody has read. A reader
keeps the first of each `id`. Source: https://valkey.io/topics/streams-intro/

A primary acknowledges before its replicas have a record. One that is replaced takes along what they lack, also what it
acknowledged after that, until it knows. `WAIT` asks how many have it: https://valkey.io/commands/wait/
"""

from collections.abc import Sequence
from typing import Final

from edge.config.process_settings import UsageConfig
from edge.config.redis_urls import parse_redis
from edge.journal.records import head_decoder
from edge.journal.sinks.protocol import SinkUnavailable
from edge.valkey import answer_of, connect, disconnect, reason_of

STREAM: Final = "edge:usage"
_TIMEOUT_S: Final = 3.0
_WAIT_S: Final = 2.0  # for replicas, within the timeout


class RedisSink:
    """Adds records to the stream; raises `Unusable` without the package or for a bad URL."""

    def __init__(self, config: UsageConfig) -> None:
        self._client = connect(config.sink, _TIMEOUT_S, config.sink_ca_file, STREAM)
        self._place = str(parse_redis(config.sink))
        self._replicas = config.sink_replicas or 0

    def reconfigure(self, config: UsageConfig) -> None:
        """Take over nothing: what is said of a Redis needs a restart."""

    async def deliver(self, lines: Sequence[bytes]) -> None:
        """Add records, all or none; raises `SinkUnavailable`."""
        from redis.exceptions import RedisError

        try:
            # `WAIT` asks of its own connection, so all of it is one pipeline.
            async with self._client.pipeline(transaction=False) as pipeline:
                pipeline.execute_command("MULTI")
                for line in lines:
                    pipeline.xadd(STREAM, {"id": head_decoder.decode(line).id, "record": line})
                pipeline.execute_command("EXEC")
                if self._replicas:  # else a user of that Redis need not be allowed to ask
                    pipeline.execute_command("WAIT", self._replicas, round(_WAIT_S * 1000))
                _, *answers = await answer_of(pipeline.execute())
            added, *replicas = answers[len(lines) :]
            for each in added:
                if isinstance(each, RedisError):
                    raise each
        except (RedisError, OSError) as error:
            raise SinkUnavailable(self._reason_of(error)) from None
        if sum(replicas) < self._replicas:
            raise SinkUnavailable(f"{self._place}: {sum(replicas)} of {self._replicas} replicas have the records")

    def _reason_of(self, error: Exception) -> str:
        """Return where and why a delivery failed; redis-py names the place itself when it cannot connect."""
        from redis.exceptions import TimeoutError as RedisTimeoutError

        late = isinstance(error, RedisTimeoutError | TimeoutError)
        reason = f"no answer within {_TIMEOUT_S:g} s" if late else reason_of(error)
        return reason if self._place in reason else f"{self._place}: {reason}"

    async def close(self) -> None:
        """Close the connections."""
        await disconnect(self._client)
