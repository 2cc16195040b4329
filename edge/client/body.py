"""The body of a request: read whole, bounded for itself and for all requests together, with deadlines."""

import asyncio
import io
import sys
from typing import Final

from aiohttp import hdrs
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestPayloadError

from edge.client.connection import Request
from edge.config.process_settings import ServerConfig
from edge.errors import InvalidRequest, Overloaded, RequestTimeout, RequestTooLarge

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_FREED_AT_ONCE_BYTES: Final = 8 << 20
_LARGE_BYTES: Final = 1 << 20  # of blocks that are mappings of their own, see `process/memory.py`
_LOOK_AGAIN_S: Final = 0.05  # whether a connection that was closed still holds the bytes
_LOOKS: Final = 20
_ALONE: Final = 2  # references: of who frees the bytes, and of the call that counts


class BodyMemory:
    """Bounds the bodies of all requests together, in bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    def reserve(self, count: int) -> None:
        """Take `count` bytes; raises `Overloaded` when they are not to be had."""
        if self.used_bytes + count > self.limit_bytes:
            raise Overloaded("The edge holds too many large requests, try again in a moment.", retry_after_s=1)
        self.used_bytes += count

    def spare(self, count: int) -> bool:
        """Take `count` bytes for what may never be needed, unless less than half is left then; return whether."""
        is_spare = 2 * (self.used_bytes + count) <= self.limit_bytes
        self.used_bytes += count * is_spare
        return is_spare

    def release(self, count: int) -> None:
        """Give `count` bytes back."""
        self.used_bytes -= count


class Body:
    """The body of a request, counted in the memory of all bodies until it is released."""

    __slots__ = ("data", "memory")

    def __init__(self, data: bytes, memory: BodyMemory) -> None:
        self.data = data
        self.memory = memory

    def release(self) -> None:
        """Let go of the bytes."""
        count = len(self.data)
        if not count:
            return
        self.memory.release(count)
        if count > _FREED_AT_ONCE_BYTES:
            asyncio.get_running_loop().call_soon(_free_unless_held, io.BytesIO(self.data), _LOOKS)
        self.data = b""


def _free_unless_held(content: io.BytesIO, looks: int) -> None:
    """Free a long body once nobody else has it; `content` shares its bytes."""
    if sys.getrefcount(content.getvalue()) == _ALONE:
        _free(content)
    elif looks:
        asyncio.get_running_loop().call_later(_LOOK_AGAIN_S, _free_unless_held, content, looks - 1)


def _mapped(content: io.BytesIO) -> io.BytesIO:
    """Return the beginning of a long body in a mapping, which grows without a copy; the heap's would move later."""
    mapped = io.BytesIO(bytes(2 * len(content.getbuffer())))
    mapped.write(content.getbuffer())
    return mapped


def _free(content: io.BytesIO) -> None:
    """Free a long body half by half: the kernel takes back 6 MiB in a ms, and all of them in one call."""
    count = content.seek(0, io.SEEK_END)
    if count > _FREED_AT_ONCE_BYTES:
        content.truncate(count // 2 - 1)  # of more than the half BytesIO would keep the memory
        asyncio.get_running_loop().call_soon(_free, content)


def _too_large(max_body_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is over the limit of {max_body_bytes} bytes")


def whole_body(request: Request, max_body_bytes: int, memory: BodyMemory) -> Body | None:
    """Return the body that came with the head, reserved in `memory` until it is released; None when more is due.

    Raises: `RequestTooLarge`, `Overloaded`.
    """
    body, payload = request.body, request.payload
    if body is None:
        if not payload.is_eof():
            return None
        # What its `read_nowait` would return, for 2 us less.
        body = b"".join(payload._buffer) if payload is not EMPTY_PAYLOAD else b""
        if body:
            payload._buffer.clear()
    request.body = b""  # else the connection would hold it beyond its answer
    if len(body) > max_body_bytes:
        raise _too_large(max_body_bytes)
    memory.reserve(len(body))
    return Body(body, memory)


async def read_body(request: Request, server: ServerConfig, memory: BodyMemory) -> Body:
    """Return the body of a request, reserved in `memory` until the caller releases it.

    Two reads are at most `body_timeout_s` apart, and all of it must keep up with the floor rate.
    Raises: `RequestTooLarge`, `Overloaded`, `RequestTimeout`, `InvalidRequest` for broken framing.
    """
    payload, max_body_bytes = request.payload, server.max_body_bytes
    timeout_s, min_rate_bytes_per_s = server.body_timeout_s, server.min_client_rate_bytes_per_s
    headers = request.head.headers
    length = headers.get(hdrs.CONTENT_LENGTH)
    if length is not None and (len(length) > 15 or int(length) > max_body_bytes):  # announced as too large
        raise _too_large(max_body_bytes)
    expects = headers.get(hdrs.EXPECT, "").lower() == "100-continue"
    if expects and not request.head.bare and not payload.total_bytes:  # RFC 9110 section 10.1.1
        request.connection.send(_CONTINUE)
    content = io.BytesIO()  # grows in place; to join 10 MB of parts at the end would take 6 ms in one go
    count = reserved_bytes = 0
    loop = asyncio.get_running_loop()
    begun = loop.time()
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            while part := await payload.readany():
                count += len(part)
                held_bytes = count + request.connection.unparsed_bytes
                memory.reserve(held_bytes - reserved_bytes)
                reserved_bytes = held_bytes
                content.write(part)
                if count > _LARGE_BYTES >= count - len(part):
                    content = _mapped(content)
                if count > max_body_bytes:
                    raise _too_large(max_body_bytes)
                floor = count / min_rate_bytes_per_s if min_rate_bytes_per_s else float("inf")
                deadline.reschedule(min(loop.time() + timeout_s, begun + 2 * timeout_s + floor))
        memory.release(reserved_bytes - count)
        content.truncate(count)
        return Body(content.getvalue(), memory)
    except BaseException as error:
        memory.release(reserved_bytes)
        _free(content)
        match error:
            case TimeoutError():
                raise RequestTimeout("The body of the request took too long.") from None
            case RequestPayloadError():
                raise InvalidRequest("the framing of the request's body is malformed") from None
            case _:
                raise
