"""What a member's own tokenizer makes of a text: asked while a client waits, on connections of their own."""

import errno
from typing import Final

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientOSError,
    ClientSession,
    DummyCookieJar,
    ServerDisconnectedError,
    TCPConnector,
)

from edge.upstream.endpoints import Member
from edge.upstream.engines import ENGINES
from edge.wire.connections import unreachable

_MAX_BYTES: Final = 16 << 20  # of an answer: ids of a long prompt
_MAX_ERROR_BYTES: Final = 64 * 1024


class NoTokens(Exception):
    """The member gave no answer that could be one."""


class RefusedTokens(Exception):
    """The member answered with an error; `body` is what it sent, at most 64 KiB."""

    def __init__(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers
        self.body = body


async def asked(member: Member, path: str, question: bytes) -> bytes:
    """Return what a member answers at `tokenize`, or another path beside that.

    Raises: `ConnectFailed`, `RefusedTokens` for any status but 200, and `NoTokens` for what is no answer.
    """
    url, config = member.endpoint.url, member.config
    base = "" if ENGINES[member.engine].tokenizes_at_root else config.url.base
    headers = {"Host": config.url.authority, "Accept-Encoding": "identity", "Content-Type": "application/json"}
    if config.api_key is not None:
        headers["Authorization"] = f"Bearer {config.api_key}"
    connector, body = TCPConnector(force_close=True, limit=0), bytearray()
    try:
        async with (
            ClientSession(connector=connector, cookie_jar=DummyCookieJar(), auto_decompress=False) as session,
            session.post(
                f"{url.scheme}://{url.authority}{base}/{path}",
                data=question,
                headers=headers,
                ssl=member.endpoint.connections.tls or True,
                allow_redirects=False,
            ) as answer,
        ):
            async for piece in answer.content.iter_any():
                body += piece
                if len(body) > _MAX_BYTES:
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
