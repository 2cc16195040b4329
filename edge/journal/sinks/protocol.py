"""What a sink of usage records is."""

from collections.abc import Sequence
from typing import Protocol
from urllib.parse import urlsplit

from edge.config.process_settings import UsageConfig
from edge.config.values import bracketed


class SinkUnavailable(Exception):
    """A sink did not acknowledge; the message is for the log and holds no secret."""


class SinkRefused(SinkUnavailable):
    """A sink does not take these records, whenever they come: what they say is the reason."""


class Sink(Protocol):
    """Where records go; made from `[usage]`, which is proved. Raises `Unusable`."""

    async def deliver(self, lines: Sequence[bytes]) -> None:
        """Hand records over, JSON without newlines; returns when they are safe there. Raises `SinkUnavailable`.

        `SinkRefused`, one of these, where it is the records that it does not take: others may be taken.
        """

    def reconfigure(self, config: UsageConfig) -> None:
        """Take over what a reload may change: `sink_token`."""

    async def close(self) -> None:
        """Free everything."""


def place_of(url: str, default_port: int) -> str:
    """Return host and port of a sink's URL for the log, without what may be secret: credentials, path and query."""
    parts = urlsplit(url)
    return f"{bracketed(parts.hostname or 'localhost')}:{parts.port or default_port}"
