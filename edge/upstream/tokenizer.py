"""What a member's own tokenizer makes of a text: asked while a client waits, on connections of their own."""

from typing import Final

from aiohttp import ClientError, ClientSession, DummyCookieJar, TCPConnector

from edge.upstream.endpoints import Member
from edge.upstream.engines import ENGINES

_MAX_BYTES: Final = 16 << 20  # of an answer: ids of a long prompt


class NoTokens(Exception):
    """The member gave no answer that could be one."""


async def asked(member: Member, path: str, question: bytes) -> bytes:
    """Return what a member answers at `tokenize`, or another path beside that; raises `NoTokens`."""
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
                raise NoTokens
    except (ClientError, OSError, ValueError):
        raise NoTokens from None
    return bytes(body)
