"""Usage records over HTTP: `POST` of `{"records": [...]}` in JSON, a batch at a time.

Any 2xx acknowledges the whole batch. Whatever else comes, or nothing within ten seconds, means that it is sent again:
the receiver keeps the first of each `id`.
"""

import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import aiohttp

from edge.shipping import SinkUnavailable

_TIMEOUT_S: Final = 10.0


class HttpSink:
    """Posts records to one URL, with a bearer token where there is one."""

    def __init__(self, url: str, token: str | None = None, ca_file: Path | None = None) -> None:
        self._url = url
        self.reconfigure(token)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=ca_file)),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        )

    def reconfigure(self, token: str | None) -> None:
        """Take over the token of a reload."""
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    async def deliver(self, lines: Sequence[bytes]) -> None:
        """Post records; raises `SinkUnavailable`."""
        body = b'{"records":[' + b",".join(lines) + b"]}"
        try:
            async with self._session.post(
                self._url, data=body, headers=self._headers, allow_redirects=False
            ) as response:
                status = response.status
        except (aiohttp.ClientError, OSError) as error:  # a timeout too; the text could repeat the URL
            raise SinkUnavailable(type(error).__name__) from None
        if not 200 <= status < 300:
            raise SinkUnavailable(f"status {status}")

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()
