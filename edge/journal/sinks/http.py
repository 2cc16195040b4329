"""Usage records over HTTP: `POST` of `{"records": [...]}` in JSON, a batch at a time.

Any 2xx acknowledges the whole batch. A 400, 413 or 422 refuses it, so it is sent in parts. Whatever else comes, or
nothing within ten seconds, means that it is sent again: the receiver keeps the first of each `id`.
"""

import errno
import os
import ssl
from collections.abc import Sequence
from typing import Final

import aiohttp

from edge.config.process_settings import UsageConfig
from edge.journal.sinks.protocol import SinkRefused, SinkUnavailable, place_of
from edge.tls import client_tls

_TIMEOUT_S: Final = 10.0
_REFUSALS: Final = (400, 413, 422)  # of what was sent; any other may be about who sent it, or when


class HttpSink:
    """Posts records to one URL, with a bearer token where there is one; raises `Unusable` for a bad CA file."""

    def __init__(self, config: UsageConfig) -> None:
        self._url = config.sink
        self._place = place_of(config.sink, 443 if config.sink.startswith("https:") else 80)
        self.reconfigure(config)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=client_tls(config.sink_ca_file, "usage.sink_ca_file")),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        )

    def reconfigure(self, config: UsageConfig) -> None:
        """Take over the token."""
        self._headers = {"Content-Type": "application/json"}
        if config.sink_token is not None:
            self._headers["Authorization"] = f"Bearer {config.sink_token}"

    async def deliver(self, lines: Sequence[bytes]) -> None:
        """Post records; raises `SinkUnavailable`."""
        body = b'{"records":[' + b",".join(lines) + b"]}"
        try:
            async with self._session.post(
                self._url, data=body, headers=self._headers, allow_redirects=False
            ) as response:
                status = response.status
        except (aiohttp.ClientError, OSError) as error:  # a timeout too
            raise SinkUnavailable(f"{self._place}: {_reason_of(error)}") from None
        if status in _REFUSALS:
            raise SinkRefused(f"{self._place}: status {status}")
        if not 200 <= status < 300:
            raise SinkUnavailable(f"{self._place}: status {status}")

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()


def _reason_of(error: aiohttp.ClientError | OSError) -> str:
    """Return what the log may say of a failure; the text of any other error could repeat the URL."""
    if isinstance(error, TimeoutError):
        return f"no answer within {_TIMEOUT_S:g} s"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return str(error.certificate_error)
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, ssl.SSLError):  # whose numbers are its own
        return str(cause)
    if isinstance(cause, OSError) and cause.errno is not None:
        known = os.strerror(cause.errno) if cause.errno in errno.errorcode else cause.strerror
        return known or type(error).__name__
    return type(error).__name__
