"""`stalls`: the longest turn of the edge's loop, in CPU, for every kind of long body and answer.

The edge runs in a process of its own, with its turns measured; the client and the model's server are here. What holds
the loop holds every stream of the process.
"""

import argparse
import contextlib
import os
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import trustme

from loadtest import turns
from loadtest.edges import create_key
from loadtest.peers.peer import ROOT
from loadtest.processes import Process, ProcessError, free_port
from loadtest.stalls_kinds import KINDS, MIB, SHORT_ANSWER, Kind
from loadtest.target import positive

_MOST_MS: Final = 10.0
_PATIENCE_S: Final = 120.0
_REST_S: Final = 0.05  # in which what is left of a request ends
_CONFIG: Final = """
[server]
listen = "127.0.0.1:{port}"
admin = "127.0.0.1:0"
shutdown_delay = "0s"
drain_timeout = "1s"
max_connections = 100
[keys]
store = "sqlite:keys.db"
[usage]
journal = "usage"
[pools.plain]
endpoints = ["http://127.0.0.1:{plain}"]
retry_within = "0s"
[pools.affine]
endpoints = ["http://127.0.0.1:{plain}", "http://localhost:{plain}"]
balance = "cache-aware"
retry_within = "0s"
[pools.secure]
endpoints = ["https://127.0.0.1:{secure}"]
ca_file = "ca.pem"
retry_within = "0s"
[routes."public/plain"]
pool = "plain"
metered = true
[routes."public/renamed"]
pool = "plain"
model = "deepseek-ai/DeepSeek-R1"
metered = true
[routes."public/echoed"]
pool = "plain"
model = "deepseek-ai/DeepSeek-R1"
model_echo = true
metered = true
[routes."public/affine"]
pool = "affine"
metered = true
[routes."public/secure"]
pool = "secure"
metered = true
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stalls`."""
    add = parser.add_argument
    add("--mib", type=positive, default=63, metavar="N", help="how long bodies are; default: %(default)s, 63 at most")
    add("--kind", action="append", metavar="WORD", help="only kinds whose name has this; may be given again")
    add("--rounds", type=positive, default=3, metavar="N", help="of each kind at most, the shortest counts; default: 3")
    add("--edge", type=Path, default=ROOT, metavar="DIR", help="the checkout whose edge is measured")


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; return 0, 1 when a turn took too long or an answer was another, or 2 when it did not start."""
    kinds = [kind for kind in KINDS if not arguments.kind or any(word in kind.name for word in arguments.kind)]
    with tempfile.TemporaryDirectory(prefix="loadtest-stalls-", ignore_cleanup_errors=True) as directory:
        try:
            return _measure(Path(directory), kinds, arguments)
        except ProcessError as error:
            print(f"loadtest stalls: {error}", file=sys.stderr)
            return 2


def _measure(directory: Path, kinds: list[Kind], arguments: argparse.Namespace) -> int:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    plain, secure, port = Upstream(), Upstream(tls), free_port()
    (directory / "routes.toml").write_text(_CONFIG.format(port=port, plain=plain.port, secure=secure.port))
    key = create_key(arguments.edge, directory)
    file = directory / "turns"
    command = [sys.executable, turns.__file__, str(file), "serve", "--config", "routes.toml"]
    environment = {"PYTHONPATH": str(arguments.edge)}
    failed = False
    print(f"{'kind':44} {'longest turn':>12} {'answer':>7}")
    with Process(
        "edge", command, directory / "edge.log", cores=os.sched_getaffinity(0), environment=environment
    ) as edge:
        edge.wait_listening(port)
        _ask(port, key, Kind("warm", lambda model, size: iter((b'{"model":"public/plain","messages":[]}',))), 0)
        for kind in kinds:
            upstream = secure if kind.model == "secure" else plain
            upstream.answer, upstream.reads = kind.answer(), kind.reads
            shortest_ms = float("inf")
            for _ in range(arguments.rounds):
                time.sleep(_REST_S)
                file.open("r+b").write(bytes(8))
                status = _ask(port, key, kind, int(min(arguments.mib, 63) * MIB * kind.share))
                time.sleep(_REST_S)
                shortest_ms = min(shortest_ms, int.from_bytes(file.read_bytes(), sys.byteorder) / 1e6)
                if shortest_ms <= _MOST_MS and status == kind.status:
                    break
            ok = shortest_ms <= _MOST_MS and status == kind.status
            failed |= not ok
            print(f"{kind.name:44} {shortest_ms:9.1f} ms {status:7} {'ok' if ok else 'NOT OK'}", flush=True)
    return int(failed)


class Upstream:
    """The model's server: reads one request of a connection after another and gives to each the same answer."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.answer = SHORT_ANSWER
        self.reads = True
        self._tls = tls
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with connection:
                while True:
                    head, begun = _read_head(connection)
                    if self.reads:
                        _skip(connection, _length_of(head) - len(begun))
                    connection.sendall(self.answer)
                    if not self.reads:
                        time.sleep(_REST_S)
                        return


def _ask(port: int, key: str, kind: Kind, size: int) -> int:
    """Send a request of a kind; return the status of the answer, read to its end, 0 for none."""
    pieces = kind.body(f"public/{kind.model}".encode(), size)
    head = (
        f"POST /v1/{kind.path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: {kind.content_type}\r\nConnection: close\r\n"
    )
    if kind.chunk_bytes:
        head += "Transfer-Encoding: chunked\r\n\r\n"
        pieces = _in_chunks(pieces, kind.chunk_bytes, kind.extension)
    else:
        pieces = iter(list(pieces))
        body = list(pieces)
        head += f"Content-Length: {sum(map(len, body))}\r\n\r\n"
        pieces = iter(body[:-1] if not kind.status else body)
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S) as connection:
        with contextlib.suppress(ConnectionError):  # of what is refused before it was read
            connection.sendall(head.encode())
            for piece in pieces:
                connection.sendall(piece)
        if not kind.status:
            return 0
        with contextlib.suppress(ConnectionError):
            answer = connection.recv(65_536)
            status = int(answer[9:12])
            while connection.recv(MIB):
                pass
            return status
    return 0


def _in_chunks(pieces: Iterator[bytes], size: int, extension: bytes) -> Iterator[bytes]:
    for piece in pieces:
        yield b"".join(
            b"%x%b\r\n%b\r\n" % (len(piece[at : at + size]), extension, piece[at : at + size])
            for at in range(0, len(piece), size)
        )
    yield b"0\r\n\r\n"


def _read_head(connection: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65_536)
        if not more:
            raise EOFError
        data += more
    head, _, begun = data.partition(b"\r\n\r\n")
    return head, begun


def _length_of(head: bytes) -> int:
    return int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])


def _skip(connection: socket.socket, count: int) -> None:
    while count > 0:
        data = connection.recv(min(count, MIB))
        if not data:
            raise EOFError
        count -= len(data)
