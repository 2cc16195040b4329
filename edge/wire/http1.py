"""HTTP/1.1 as bytes (RFC 9112): heads of answers and requests, and where a body ends, tracked to the byte.

What is understood is the little that vLLM and its like send; whatever is malformed is refused, never guessed at.
"""

import functools
import re
from dataclasses import dataclass, field
from typing import Final

MAX_HEAD_BYTES: Final = 64 * 1024  # of one response head; Envoy allows 60 KiB
_MAX_LINES: Final = 128  # of one head, as aiohttp has it; a read may have many interim answers
MAX_LINE_BYTES: Final = 4096  # of one chunk-size line with its extensions, or one trailer
_MAX_TRAILER_BYTES: Final = 16 * 1024
READ_STEP_BYTES: Final = 2 * 1024  # that are read at once, whatever they are; `Flow` knows what of a longer read is
DEFAULT_IDLE_S: Final = 4.0  # under the 5 s after which uvicorn, and so vLLM and SGLang, close an idle connection
LAST_CHUNK: Final = b"0\r\n\r\n"
_LONGEST_IDLE_S: Final = 60.0
_KEEP_ALIVE_SHARE: Final = 0.8  # of the time that the upstream's Keep-Alive header promises

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
_MAX_NAME_BYTES: Final = 256
_fields: dict[bytes, tuple[bytes, bytes]] = {}
_MAX_FIELDS: Final = 1024
_MAX_REMEMBERED_BYTES: Final = 256
_shapes: "dict[tuple[bytes, bytes, bytes], Shape]" = {}  # by what stands around the digits of a length
_MAX_SHAPES: Final = 256
_MAX_SHAPE_BYTES: Final = 2048
_LENGTH_BEGINS: Final = b"content-l"
_LENGTH: Final = b"ength: "  # however the name is written
_MAX_LENGTH_DIGITS: Final = 15
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n")
_LAST_CHUNK = re.compile(rb"0{1,15}\r\n\r\n")
_PARTIAL = re.compile(rb"[0-9A-Fa-f]{0,15}|[0-9A-Fa-f]{1,15}\r|0{1,15}\r\n\r?")
_ANY_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t \x21-\x7e\x80-\xff]*)?\r\n")
_KEEP_ALIVE_TIMEOUT = re.compile(rb"timeout[ \t]*=[ \t]*([0-9]{1,6})", re.IGNORECASE)


class Malformed(Exception):
    """The upstream sent what RFC 9112 does not allow."""


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """What a head says besides the length of the body; heads that differ in nothing else have the same one.

    `headers` has lower-case names, each value as it came (RFC 9110 section 5). `is_events` says that the content is
    server-sent events, `is_identity` that it can be read, since it is not encoded. `returned` are the lines that a
    client gets, once they were worked out, by whether it owns the server.
    """

    status: int
    headers: dict[bytes, bytes]
    framing: "type[Framing]"
    keep_alive: bool
    idle_s: float
    returned: dict[bool, bytes] = field(default_factory=dict)
    is_events: bool = field(init=False)
    is_identity: bool = field(init=False)

    def __post_init__(self) -> None:
        is_events = self.headers.get(b"content-type", b"")[:17].lower() == b"text/event-stream"
        object.__setattr__(self, "is_events", is_events)
        object.__setattr__(
            self, "is_identity", self.headers.get(b"content-encoding", b"identity").lower() == b"identity"
        )


@dataclass(slots=True)
class ResponseHead:
    """The head of a response: its shape, how its body ends, and whether the connection can serve again."""

    shape: Shape
    framing: "Framing"
    keep_alive: bool


def parse_head(block: bytes) -> ResponseHead:
    """Return the head of `block`, which is what stands before the empty line.

    A server's heads are alike but for a length and the second of the day: they are remembered without the length.
    Raises: `Malformed`, also for what two recipients could frame differently (RFC 9112 section 6.3).
    """
    before, name, rest = block.partition(_LENGTH)
    digits, line_end, after = rest.partition(b"\r\n")
    key = before, name + line_end, after
    is_whole = not name or (digits.isdigit() and len(digits) <= _MAX_LENGTH_DIGITS)
    shape = _shapes.get(key) if is_whole else None
    if shape is not None:
        length = int(digits) if name else 0
    else:
        shape, length = _parse(block)
        # Without the name a length may be written in another way, and is then not what was cut out.
        is_cut = before[before.rfind(b"\n") + 1 :].lower() == _LENGTH_BEGINS if name else shape.framing is not Length
        if is_whole and is_cut and len(block) <= _MAX_SHAPE_BYTES:
            if len(_shapes) >= _MAX_SHAPES:
                _shapes.clear()
            _shapes[key] = shape
    framing = Length(length) if shape.framing is Length else shape.framing()
    return ResponseHead(shape, framing, shape.keep_alive)


def _parse(block: bytes) -> tuple[Shape, int]:
    """Return the shape of a head, and the length that it gives to the body, 0 for none."""
    first, *lines = block.split(b"\r\n")
    if len(lines) > _MAX_LINES:
        raise Malformed("too many header lines")
    minor_version, status = _status_line(first)
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, value = _fields.get(line) or _field(line)
        if name in headers:
            if name in (b"content-length", b"transfer-encoding"):
                raise Malformed("framing header given twice")
            value = headers[name] + b", " + value
        headers[name] = value
    framing, length = _framing(status, minor_version, headers)
    headers.pop(b"content-length", None)
    keep_alive = minor_version == 1
    if b"connection" in headers:
        options = headers[b"connection"].lower()
        keep_alive = b"close" not in options if keep_alive else b"keep-alive" in options
    idle_s = DEFAULT_IDLE_S
    if b"keep-alive" in headers and (promised := _KEEP_ALIVE_TIMEOUT.search(headers[b"keep-alive"])):
        idle_s = min(int(promised[1]) * _KEEP_ALIVE_SHARE, _LONGEST_IDLE_S)
    return Shape(status, headers, framing, keep_alive, idle_s), length


@functools.lru_cache(maxsize=64)
def _status_line(line: bytes) -> tuple[int, int]:
    """Return the minor version and the status."""
    found = _STATUS_LINE.fullmatch(line)
    if found is None:
        raise Malformed("status line")
    return int(found[1]), int(found[2])


def _field(line: bytes) -> tuple[bytes, bytes]:
    """Return a header's name in lower case and its value; lines are remembered, since servers send the same ones."""
    found = _FIELD.fullmatch(line)
    if found is None or len(found[1]) > _MAX_NAME_BYTES:
        raise Malformed("header line")
    field = found[1].lower(), found[2].strip(b" \t")
    if len(line) <= _MAX_REMEMBERED_BYTES:
        if len(_fields) >= _MAX_FIELDS:
            _fields.clear()
        _fields[line] = field
    return field


def _framing(status: int, minor_version: int, headers: dict[bytes, bytes]) -> "tuple[type[Framing], int]":
    """Return how the body ends, and its length (RFC 9112 section 6.3)."""
    coding = headers.get(b"transfer-encoding")
    length = headers.get(b"content-length")
    if coding is not None:
        if length is not None or minor_version == 0 or coding.lower() != b"chunked":
            raise Malformed("transfer coding")
        return NoBody if status in (204, 304) else Chunked, 0
    if length is not None:
        if not length.isdigit() or len(length) > _MAX_LENGTH_DIGITS:
            raise Malformed("content length")
        return NoBody if status in (204, 304) else Length, int(length)
    return NoBody if status < 200 or status in (204, 304) else UntilClose, 0


class Framing:
    """Where a body ends.

    `scan` returns how many bytes of `data` belong to the body and are understood; the caller keeps the rest and gives
    it again before what comes next. The content without its framing is appended to `payload`. `plain` refuses what may
    not go to a client as it is.
    """

    __slots__ = ("done", "tail")
    chunked = False
    self_delimited = True

    def __init__(self) -> None:
        self.done = False
        self.tail = b""  # the last bytes of the content, as many as the end of an event may have

    def scan(self, data: bytes, payload: list[bytes], plain: bool = False) -> int:
        """Return the count of bytes understood; raises `Malformed`."""
        raise NotImplementedError

    @property
    def between_chunks(self) -> bool:
        """Whether what was understood ends where a frame of our own could stand."""
        return True


class NoBody(Framing):
    """No body at all."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()
        self.done = True

    def scan(self, data: bytes, payload: list[bytes], plain: bool = False) -> int:
        """Return 0: whatever follows is not part of the answer."""
        return 0


class Length(Framing):
    """`Content-Length`."""

    __slots__ = ("left", "total")

    def __init__(self, length: int) -> None:
        self.tail = b""  # as in `Framing`, whose call each answer would pay for
        self.total = self.left = length
        self.done = length == 0

    def scan(self, data: bytes, payload: list[bytes], plain: bool = False) -> int:
        """Return how much of `data` is body."""
        count = min(len(data), self.left)
        self.left -= count
        self.done = self.left == 0
        if count:
            payload.append(data[:count])
        return count

    @property
    def between_chunks(self) -> bool:
        """Never: another byte would be counted as the answer's."""
        return False


class UntilClose(Framing):
    """The body ends with the connection (RFC 9112 section 6.3, rule 8)."""

    __slots__ = ()
    self_delimited = False

    def scan(self, data: bytes, payload: list[bytes], plain: bool = False) -> int:
        """Return all of it."""
        if data:
            payload.append(data)
        return len(data)


EVENT_END_BYTES: Final = 4  # of the longest end of an event, CRLF CRLF

# How long a read is that is one whole chunk, by its first bytes: a size line that was found valid, and maybe the first
# of the content. The same few come again and again, and one look-up costs a quarter of reading the line. Only chunks
# that are long enough to show the end of an event by themselves.
SIZE_LINE_BYTES: Final = 5  # of a chunk under 4 KiB
whole_chunks: dict[bytes, int] = {}
_MAX_WHOLE_CHUNKS: Final = 4096


def _remember(beginning: bytes, count: int) -> None:
    if len(whole_chunks) >= _MAX_WHOLE_CHUNKS:
        whole_chunks.clear()
    whole_chunks[beginning] = count


def chunk(content: bytes) -> bytes:
    """Return content as one chunk; nothing for none, since an empty chunk would be the last."""
    return b"%x\r\n%b\r\n" % (len(content), content) if content else b""


class Irregular(Exception):
    """A chunk extension or a trailer: legal, and to be taken away by reading what is not `plain`."""


class Chunked(Framing):
    """`Transfer-Encoding: chunked` (RFC 9112 section 7.1).

    What is `plain` is chunks that may go to the client as they are: an extension or a trailer raises `Irregular`.
    Whatever raises, `consumed` bytes before it were understood. Extensions and trailers are bounded and dropped.
    """

    __slots__ = ("_ending", "_in_trailers", "_left", "_trailer_bytes", "consumed")
    chunked = True

    def __init__(self) -> None:
        super().__init__()
        self.consumed = 0
        self._left = 0  # bytes of the chunk's data that are still to come
        self._ending = False  # the CRLF after the data is still to come
        self._in_trailers = False
        self._trailer_bytes = 0

    @property
    def between_chunks(self) -> bool:
        """Whether a chunk could begin here."""
        return not self._left and not self._ending

    def scan(self, data: bytes, payload: list[bytes], plain: bool = False) -> int:
        """Return how many bytes are whole tokens: size lines, data, ends of chunks."""
        at, end = 0, len(data)
        while at < end and not self.done:
            self.consumed = at
            if self._left:
                count = min(self._left, end - at)
                content = data[at : at + count]
                self._passed(content)
                payload.append(content)
                self._left -= count
                at += count
                self._ending = not self._left
            elif self._ending:
                if end - at < 2 and data[at] == 13:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise Malformed("end of chunk")
                self._ending = False
                at += 2
            elif self._in_trailers:
                after = self._trailer(data, at)
                if after < 0:
                    break
                at = after
            else:
                line = _SIZE_LINE.match(data, at)
                size = int(line[1], 16) if line is not None else 0
                if line is not None and size:
                    line_bytes = line.end() - at
                    if line_bytes <= SIZE_LINE_BYTES and size >= EVENT_END_BYTES:
                        _remember(data[at : at + SIZE_LINE_BYTES], line_bytes + size + 2)
                    stop = line.end() + size
                    if stop + 2 <= end and data[stop : stop + 2] == b"\r\n":  # a whole chunk
                        self._passed(data[max(stop - EVENT_END_BYTES, line.end()) : stop])
                        payload.append(data[line.end() : stop])
                        at = stop + 2
                        continue
                    self._left = size
                    at = line.end()
                elif (last := _LAST_CHUNK.match(data, at)) is not None:
                    self.done = True
                    at = last.end()
                elif _PARTIAL.fullmatch(data, at):
                    break
                elif plain:
                    raise Irregular
                else:
                    after = self._irregular_line(data, at)
                    if after < 0:
                        break
                    at = after
        return at

    def _passed(self, content: bytes) -> None:
        self.tail = (self.tail + content[-EVENT_END_BYTES:])[-EVENT_END_BYTES:]

    def _irregular_line(self, data: bytes, at: int) -> int:
        line = _ANY_SIZE_LINE.match(data, at)
        if line is None:
            if data.find(b"\n", at, at + MAX_LINE_BYTES) >= 0 or len(data) - at > MAX_LINE_BYTES:
                raise Malformed("chunk size")
            return -1
        if line.end() - at > MAX_LINE_BYTES:
            raise Malformed("chunk extension")
        self._left = int(line[1], 16)
        self._in_trailers = not self._left
        return line.end()

    def _trailer(self, data: bytes, at: int) -> int:
        line_end = data.find(b"\r\n", at)
        if line_end < 0:
            if len(data) - at > MAX_LINE_BYTES:
                raise Malformed("trailer")
            return -1
        self._trailer_bytes += line_end - at
        if line_end == at:
            self.done = True
        elif (
            line_end - at > MAX_LINE_BYTES
            or self._trailer_bytes > _MAX_TRAILER_BYTES
            or not _FIELD.fullmatch(data, at, line_end)
        ):
            raise Malformed("trailer")
        return line_end + 2


def request_head(target: str, authority: str, headers: list[tuple[str, str]], method: str = "POST") -> bytes:
    """Return the constant part of a request's head: everything but what differs from request to request."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {authority}", *(f"{name}: {value}" for name, value in headers)]
    return ("\r\n".join(lines) + "\r\n").encode("ascii")
