"""The sinks there are: a row for each scheme of `usage.sink`."""

from collections.abc import Callable, Mapping
from typing import Final

from edge.config import redis_urls
from edge.config.process_settings import UsageConfig
from edge.journal.sinks.http import HttpSink
from edge.journal.sinks.protocol import Sink
from edge.journal.sinks.redis import RedisSink

SINKS: Final[Mapping[str, Callable[[UsageConfig], Sink]]] = {
    "http": HttpSink,
    "https": HttpSink,
    **dict.fromkeys(redis_urls.SCHEMES, RedisSink),
}


def sink_of(config: UsageConfig) -> Sink | None:
    """Return the sink that `usage.sink` names, None where there is none; raises `Unusable`."""
    return SINKS[config.sink.partition(":")[0]](config) if config.sink else None
