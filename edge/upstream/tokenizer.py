"""What a member's own tokenizer makes of a text: asked while a client waits."""

import errno
from io import BytesIO
from typing import Final, Self

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientOSError,
    ClientSession,
    DummyCookieJar,
    ServerDisconnectedError,
    TCPConnector,
)

from edge.errors import UpstreamError
from edge.upstream.endpoints import Member
from edge.upstream.engines import ENGINES
from edge.wire.connections import unreachable

_MAX_BYTES: Final = 16 << 20  # of an answer: ids of a long prompt
_BYTES_A_BYTE: Final = 16  # of an answer for one of its question: a token has at least a byte of text
_MORE_BYTES: Final = 64 * 1024  # of what a template adds
_MAX_ERROR_BYTES: Final = 64 * 1024


class NoTokens(UpstreamError):
    """The member gave no answer that could be one, or none in time: another one may be asked instead."""

    safe_elsewhere = True

    def __init__(self) -> None:
        super().__init__("The model's server did not count tokens.")


class RefusedTokens(Exception):
    """The member answered with an error; `body` is what it sent, at most 64 KiB."""

    def __init__(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers
        self.body = body


class Tokenizer:
    """A member's tokenizer; a context, which ends what it asks.

    Each question has a connection of its own: one that was kept may be closed by the server as the next is asked.
    """

    def __init__(self, member: Member) -> None:
        url, config = member.endpoint.url, member.config
        base = "" if ENGINES[member.engine].tokenizes_at_root else config.url.base
        headers = {"Host": config.url.authority, "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if config.api_key is not None:
            headers["Authorization"] = f"Bearer {config.api_key}"
        self._base = f"{url.scheme}://{url.authority}{base}/"
        self._tls = member.endpoint.connections.tls or True
        self._session = ClientSession(
            connector=TCPConnector(limit=0, force_close=True),
            cookie_jar=DummyCookieJar(),
            auto_decompress=False,
            headers=headers,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, path: str, question: bytes) -> bytes:
        """Return what the member answers at `tokenize`, or another path beside that.

        Raises: `ConnectFailed`, `RefusedTokens` for any status but 200, and `NoTokens` for what is no answer.
        """
        body, most = bytearray(), min(_MAX_BYTES, _BYTES_A_BYTE * len(question) + _MORE_BYTES)
        try:
            async with self._session.post(
                self._base + path, data=BytesIO(question), ssl=self._tls, allow_redirects=False
            ) as answer:
                async for piece in answer.content.iter_any():
                    body += piece
                    if len(body) > most:
                        raise NoTokens
                if answer.status != 200:
                    heads = {name.lower(): value for name, value in answer.raw_headers}
                    raise RefusedTokens(answer.status, heads, bytes(body[:_MAX_ERROR_BYTES]))
        except ClientConnectorError as error:
            raise unreachable(error.os_error) from None
        except (ServerDisconnectedError, ClientOSError):
            raise unreachable(OSError(errno.ECONNRESET, "")) from None
        except (ClientError, OSError, ValueError):
            raise NoTokens from None
        return bytes(body)
