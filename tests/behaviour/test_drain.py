"""The end of a process: unready first, then no new connections, then nobody is hurt who keeps to the time."""

import asyncio
import contextlib
import json
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from edge.client.connection import ClientConnection
from edge.keys.stores.registry import KeyRegistry
from edge.simulator.server import Simulator
from tests.conftest import (
    ROUTES,
    USER,
    Edge,
    Heard,
    RawClient,
    ScriptedConnection,
    StartEdge,
    StartUpstream,
    Watch,
    WatchMethod,
    tls_setting,
)

LONG_S = 30  # a patience that no test uses up
BODY = {"model": "public/deepseek-r1", "messages": []}


def stream(**simulate: Any) -> dict[str, Any]:
    return {**BODY, "stream": True, "simulate": simulate}


async def start(start_edge: StartEdge, simulator: Simulator, **times: str) -> Edge:
    server = "".join(f'{name} = "{value}"\n' for name, value in {"drain_timeout": f"{LONG_S}s", **times}.items())
    return await start_edge(ROUTES.replace("{upstream}", simulator.url), server=server)


async def sent(edge: Edge, simulator: Simulator, body: dict[str, Any], **kwargs: Any) -> RawClient:
    """Return a client whose request has reached the upstream."""
    client = await edge.connect()
    before = len(simulator.requests)
    client.send(edge.request(body, **kwargs))
    await simulator.wait_for(lambda: len(simulator.requests) > before)
    return client


async def connected(edge: Edge, count: int) -> None:
    """Wait until the edge has so many clients."""
    async with asyncio.timeout(LONG_S):
        while len(edge.server.clients.clients) < count:
            await asyncio.sleep(0)


async def closed_listeners(edge: Edge, closing: Watch, clients: int) -> None:
    """Ask the edge to stop, and wait until its listeners are closed and each of its clients knows."""
    await connected(edge, clients)
    edge.server.stop()
    await closing.until(lambda: len(closing.calls) >= clients)


async def refused(edge: Edge) -> None:
    """Wait until nobody can connect any more."""
    async with asyncio.timeout(LONG_S):
        while True:
            try:
                (await edge.connect()).abort()
            except ConnectionRefusedError:
                return


DRAINING = "draining: "  # logged when the drain has begun; stop() only asks for it


async def in_its_body(edge: Edge, body: dict[str, Any], **kwargs: Any) -> tuple[RawClient, bytes]:
    """Return a client whose request is being read, and the rest of its body."""
    client = await edge.connect()
    data = json.dumps(body).encode()
    client.send(edge.request(data, headers=("Expect: 100-continue",), **kwargs).removesuffix(data))
    assert (await client.head()).startswith(b"HTTP/1.1 100 ")
    client.send(data[:-5])
    return client, data[-5:]


async def ended(edge: Edge) -> dict[str, Any]:
    """Wait for the end of the process; assert that nothing is left over, and return the last line of the log."""
    async with asyncio.timeout(LONG_S - 5):
        await edge._task
    assert edge.server.proxy.in_flight == 0
    assert [each for each in edge.server.endpoints.states() if each.is_used] == []
    assert edge.server.memory.used_bytes == 0
    return json.loads(edge._log_path.read_bytes().splitlines()[-1])


async def readyz(edge: Edge) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.admin_port)
    writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
    try:
        return int((await reader.read()).split()[1])
    finally:
        writer.close()


async def test_edge_is_unready_at_once_and_serves_during_the_delay(
    start_edge: StartEdge, simulator: Simulator, heard: Heard
) -> None:
    """A balancer needs a few seconds to see /readyz; what it sends until then is answered, and asked to reconnect."""
    edge = await start(start_edge, simulator, shutdown_delay="1h")
    idle = await edge.connect()
    idle.send(edge.request(BODY))
    _, headers, _ = await idle.response()
    assert "connection" not in headers
    assert await readyz(edge) == 200
    edge.server.stop()
    await heard.until(DRAINING)
    assert await readyz(edge) == 503
    for client in (await edge.connect(), idle):
        client.send(edge.request(stream()))
        status, headers, body = await client.response()
        assert (status, headers["connection"]) == (200, "close")
        assert body.endswith(b"data: [DONE]\n\n")
        assert await client.rest() == b""
    status, headers, _ = await edge.ask({"model": "public/none"})
    assert (status, headers["connection"]) == (404, "close")
    edge.server.stop()
    assert (await ended(edge))["end"] == "refused"


async def test_answer_that_is_awaited_when_the_drain_begins_says_that_it_is_the_last(
    start_edge: StartEdge, start_upstream: StartUpstream, heard: Heard
) -> None:
    """A client that is not told would send its next request into a connection that closes."""
    begun = asyncio.Event()

    async def script(connection: ScriptedConnection) -> None:
        await begun.wait()
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 14\r\n\r\n")
        await connection.send(b"data: [DONE]\n\n")

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url), server='shutdown_delay = "1h"')
    client = await edge.connect()
    client.send(edge.request(stream()))
    await upstream.asked.wait()
    edge.server.stop()
    await heard.until(DRAINING)
    begun.set()
    status, headers, body = await client.response()
    assert (status, headers["connection"]) == (200, "close")
    assert body == b"data: [DONE]\n\n"
    assert await client.rest() == b""
    edge.server.stop()
    await ended(edge)


async def test_request_behind_an_answer_that_promised_to_go_on_is_answered(
    start_edge: StartEdge, simulator: Simulator, heard: Heard
) -> None:
    edge = await start(start_edge, simulator, shutdown_delay="1h")
    client = await sent(edge, simulator, stream(tokens=30, interval_ms=10))
    head = await client.head()
    assert b"connection" not in head
    edge.server.stop()
    await heard.until(DRAINING)
    client.send(edge.request(BODY))
    answer = await client.rest()
    assert answer.startswith(b"HTTP/1.1 200 ") or b"0\r\n\r\nHTTP/1.1 200 " in answer
    assert b"\r\nconnection: close\r\n" in answer
    edge.server.stop()
    assert (await ended(edge))["end"] == "complete"


async def test_listeners_are_closed_and_idle_connections_too(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start(start_edge, simulator)
    fresh, idle = await edge.connect(), await edge.connect()
    idle.send(edge.request(BODY))
    await idle.response()
    running = await sent(edge, simulator, stream(ttft_ms=86_400_000))
    edge.server.stop()
    assert await idle.rest() == b""
    assert await fresh.rest() == b""
    with pytest.raises(ConnectionRefusedError):
        await edge.connect()
    running.abort()
    assert (await ended(edge))["end"] == "client_gone"


async def test_kept_connection_answers_what_comes_when_the_listeners_are_closed(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod
) -> None:
    """A balancer that sends on a connection of its pool at that moment would get nothing, and its client a 502."""
    closing = watch(ClientConnection, "leave_soon")
    edge = await start(start_edge, simulator)
    kept, fresh = await edge.connect(), await edge.connect()
    kept.send(edge.request(BODY))
    assert "connection" not in (await kept.response())[1]
    await closed_listeners(edge, closing, 2)
    for client in (kept, fresh):
        client.send(edge.request(stream()))
        status, headers, body = await client.response()
        assert (status, headers["connection"]) == (200, "close")
        assert body.endswith(b"data: [DONE]\n\n")
        assert await client.rest() == b""
    assert (await ended(edge))["end"] == "complete"


async def test_connection_whose_head_promised_another_request_answers_it_after_the_drain_began(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod
) -> None:
    closing = watch(ClientConnection, "leave_soon")
    edge = await start(start_edge, simulator)
    client = await sent(edge, simulator, stream(tokens=40, interval_ms=10))
    head = await client.head()
    assert b"connection" not in head
    await closed_listeners(edge, closing, 1)
    await client.reader.readuntil(b"\r\n0\r\n\r\n")
    client.send(edge.request(BODY))
    status, headers, _ = await client.response()
    assert (status, headers["connection"]) == (200, "close")
    assert await client.rest() == b""
    assert (await ended(edge))["end"] == "complete"


async def test_request_that_waits_in_the_kernel_when_its_connection_is_due_is_answered(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod
) -> None:
    """The loop is busy with others, and the time is up before it has read."""
    closing = watch(ClientConnection, "leave_soon")
    edge = await start(start_edge, simulator)
    with socket.create_connection(("127.0.0.1", edge.port)) as sock:
        await closed_listeners(edge, closing, 1)
        [connection] = edge.server.clients.clients
        sock.sendall(edge.request(BODY))
        connection._process_keepalive()
        sock.setblocking(False)
        client = RawClient(*await asyncio.open_connection(sock=sock))
        status, headers, _ = await client.response()
        assert (status, headers["connection"]) == (200, "close")
        client.close()
    assert (await ended(edge))["end"] == "complete"


async def test_request_that_has_begun_when_its_connection_is_due_is_answered(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod
) -> None:
    closing, received = watch(ClientConnection, "leave_soon"), watch(ClientConnection, "data_received")
    edge = await start(start_edge, simulator)
    client = await edge.connect()
    await closed_listeners(edge, closing, 1)
    [connection] = edge.server.clients.clients
    request = edge.request(BODY)
    client.send(request[:20])
    await received.called()
    connection._process_keepalive()
    client.send(request[20:])
    status, headers, _ = await client.response()
    assert (status, headers["connection"]) == (200, "close")
    assert await client.rest() == b""
    assert (await ended(edge))["end"] == "complete"


async def test_further_signal_ends_the_wait_for_a_last_request(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.client.connection.LAST_REQUEST_S", 3600)
    closing = watch(ClientConnection, "leave_soon")
    edge = await start(start_edge, simulator)
    idle = await edge.connect()
    await connected(edge, 1)
    await closed_listeners(edge, closing, 1)
    edge.server.stop()
    assert await idle.rest() == b""
    await asyncio.wait_for(edge._task, LONG_S - 5)


async def test_tls_client_in_its_handshake_when_the_listeners_close_is_answered(
    start_edge: StartEdge, simulator: Simulator, tmp_path: Path
) -> None:
    """No other connection is open, so nothing else keeps the process."""
    authority = trustme.CA()
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server=tls_setting(tmp_path, authority))
    tls = ssl.create_default_context()
    authority.configure_trust(tls)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    handshake = tls.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    client = await edge.connect()
    with contextlib.suppress(ssl.SSLWantReadError):
        handshake.do_handshake()
    client.send(outgoing.read())
    incoming.write(await client.reader.read(2**16))  # accepted, and half way
    edge.server.stop()
    await refused(edge)
    while True:
        try:
            handshake.do_handshake()
            break
        except ssl.SSLWantReadError:
            client.send(outgoing.read())
            incoming.write(await client.reader.read(2**16))
    handshake.write(edge.request(BODY))
    client.send(outgoing.read())
    answer = b""
    while b"\r\n\r\n" not in answer:
        incoming.write(await client.reader.read(2**16))
        with contextlib.suppress(ssl.SSLWantReadError):
            answer += handshake.read(2**16)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nconnection: close\r\n" in answer.lower()
    client.close()
    assert (await ended(edge))["end"] == "complete"


async def test_running_stream_finishes(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start(start_edge, simulator)
    client = await sent(edge, simulator, stream(tokens=40, interval_ms=10))
    await client.reader.readuntil(b"data: ")
    edge.server.stop()
    rest = await client.rest()
    assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert rest.count(b"data: ") > 40
    assert (await ended(edge))["end"] == "complete"


async def test_request_that_waits_for_its_first_byte_finishes(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start(start_edge, simulator)
    client = await sent(edge, simulator, {**BODY, "simulate": {"ttft_ms": 300}})
    edge.server.stop()
    assert (await client.response())[0] == 200
    assert await client.rest() == b""
    assert (await ended(edge))["end"] == "complete"


async def test_half_read_body_finishes(start_edge: StartEdge, simulator: Simulator) -> None:
    """aiohttp's own shutdown would drop it."""
    edge = await start(start_edge, simulator)
    idle = await edge.connect()
    client, rest = await in_its_body(edge, BODY)
    edge.server.stop()
    assert await idle.rest() == b""  # closed with the listeners
    client.send(rest)
    assert (await client.response())[0] == 200
    assert await client.rest() == b""
    assert (await ended(edge))["end"] == "complete"


async def test_half_read_head_finishes(start_edge: StartEdge, simulator: Simulator, watch: WatchMethod) -> None:
    """A request of which a byte has come is on its way."""
    received = watch(ClientConnection, "data_received")
    edge = await start(start_edge, simulator)
    idle, client = await edge.connect(), await edge.connect()
    request = edge.request(BODY)
    client.send(request[:20])
    await received.called()
    edge.server.stop()
    assert await idle.rest() == b""  # closed with the listeners
    client.send(request[20:])
    status, headers, _ = await client.response()
    assert (status, headers["connection"]) == (200, "close")
    assert await client.rest() == b""
    assert (await ended(edge))["end"] == "complete"


@pytest.mark.parametrize("fault", [{"fault": "error", "status": 400}, {"fault": "error", "status": 500}])
async def test_error_that_arrives_during_the_drain_closes_its_connection(
    start_edge: StartEdge, simulator: Simulator, fault: dict[str, Any]
) -> None:
    """Else the connection would be kept for a next request, and the drain would wait for it in vain."""
    edge = await start(start_edge, simulator)
    idle = await edge.connect()
    client = await sent(edge, simulator, {**BODY, "simulate": {"ttft_ms": 200, **fault}})
    edge.server.stop()
    assert await idle.rest() == b""
    status, _, _ = await client.response()
    assert status in (400, 502)
    async with asyncio.timeout(5):
        assert await client.rest() == b""
    assert (await ended(edge))["end"] == "upstream_error"


async def test_stream_is_cut_with_an_error_frame_at_the_drain_timeout(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    """On a boundary: one error event, then the last chunk, no `[DONE]`, so that every SDK raises."""
    edge = await start(start_edge, simulator, drain_timeout="100ms")
    client = await sent(edge, simulator, stream(fault="stall", after=3))
    head = await client.head()
    assert b"200 OK" in head
    edge.server.stop()
    body = await client.rest()
    assert body.endswith(b"\n\n\r\n0\r\n\r\n")
    assert b"[DONE]" not in body
    last = body.removesuffix(b"\n\n\r\n0\r\n\r\n").rpartition(b"data: ")[2]
    assert json.loads(last)["error"]["code"] == "upstream_disconnected"
    line = await ended(edge)
    assert (line["status"], line["end"], line["ended_by"]) == (200, "drained", "edge")
    await simulator.wait_for(lambda: simulator.connections == 0)


async def test_stream_within_a_frame_is_cut_without_a_clean_end(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start(start_edge, simulator, drain_timeout="100ms")
    client = await sent(edge, simulator, stream(fault="stall", after=3, after_bytes=20))
    await client.head()
    edge.server.stop()
    assert not (await client.rest()).endswith(b"0\r\n\r\n")
    assert (await ended(edge))["end"] == "drained"


async def test_json_answer_within_its_length_is_cut_short(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start(start_edge, simulator, drain_timeout="100ms")
    client = await sent(edge, simulator, {**BODY, "simulate": {"fault": "stall", "after_bytes": 40}})
    await client.head()
    edge.server.stop()
    assert len(await client.rest()) == 40
    assert (await ended(edge))["end"] == "drained"


async def test_request_without_a_first_byte_is_told_to_come_back(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start(start_edge, simulator, drain_timeout="100ms")
    client = await sent(edge, simulator, stream(ttft_ms=86_400_000))
    edge.server.stop()
    status, headers, body = await client.response()
    assert (status, headers["retry-after"]) == (503, "1")
    assert json.loads(body)["error"]["code"]
    assert await client.rest() == b""
    line = await ended(edge)
    assert (line["end"], line["ended_by"], line["status"]) == ("drained", "edge", 503)


async def test_body_that_never_ends_is_cut_and_is_not_the_clients_doing(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    edge = await start(start_edge, simulator, drain_timeout="100ms")
    client, _ = await in_its_body(edge, BODY)
    edge.server.stop()
    with contextlib.suppress(ConnectionResetError):
        assert b" 200 " not in await client.rest()
    line = await ended(edge)
    assert (line["end"], line["ended_by"]) == ("drained", "edge")


@pytest.mark.parametrize("answer", [{"ttft_ms": 86_400_000}, {"fault": "stall", "after": 1}])
async def test_answer_that_began_after_the_cut_is_not_ended_by_its_client(
    start_edge: StartEdge, simulator: Simulator, heard: Heard, answer: dict[str, Any]
) -> None:
    """Its body came in the second that cut answers have for their last bytes."""
    edge = await start(start_edge, simulator, drain_timeout="100ms")
    client, rest = await in_its_body(edge, stream(**answer))
    edge.server.stop()
    await heard.until("are cut")
    client.send(rest)
    await simulator.wait_for(lambda: simulator.requests)
    line = await ended(edge)
    assert (line["end"], line["ended_by"]) == ("drained", "edge")
    assert [record["end"] for record in edge.records()] == ["drained"]


async def test_second_stop_does_not_wait(start_edge: StartEdge, simulator: Simulator, heard: Heard) -> None:
    """Of all that waits nothing is waited for: neither the balancer nor the answers."""
    edge = await start(start_edge, simulator, shutdown_delay="1h", drain_timeout="1h")
    client = await sent(edge, simulator, stream(fault="stall", after=1))
    await client.head()
    edge.server.stop()
    await heard.until(DRAINING)
    edge.server.stop()
    assert (await client.rest()).endswith(b"0\r\n\r\n")
    assert (await ended(edge))["end"] == "drained"


async def test_stop_without_a_request_ends_at_once(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start(start_edge, simulator)
    idle = await edge.connect()
    edge.server.stop()
    async with asyncio.timeout(LONG_S - 5):
        await edge._task
    assert await idle.rest() == b""


async def test_client_that_reads_nothing_is_cut_at_the_drain_timeout(
    start_edge: StartEdge, start_upstream: StartUpstream, watch: WatchMethod
) -> None:
    """Its buffers are full, so no frame can reach it; the end must not wait for it."""
    paused = watch(ClientConnection, "pause_writing")

    async def flood(connection: ScriptedConnection) -> None:
        await connection.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        event = b"data: " + b"x" * 2**16 + b"\n\n"
        while True:
            await connection.send(b"%x\r\n%b\r\n" % (len(event), event))

    upstream = await start_upstream(flood)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url), server='drain_timeout = "100ms"')
    client = await edge.connect()
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(edge.request(stream()))
    await paused.called()
    edge.server.stop()
    assert (await ended(edge))["end"] == "drained"


# --- as a process

_PASS_ON = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@asynccontextmanager
async def process(
    directory: Path,
    simulator: Simulator,
    sock: socket.socket | None,
    server: str = "",
    stderr: int = asyncio.subprocess.PIPE,
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run `edge serve`, with a listening socket as descriptor 3 if there is one."""
    config = directory / "routes.toml"
    listen = f'listen = "127.0.0.1:{sock.getsockname()[1] if sock else 0}"'
    config.write_text(
        f'[server]\n{listen}\nadmin = "127.0.0.1:0"\nshutdown_delay = "0s"\n{server}\n'
        '[keys]\nstore = "sqlite:keys.db"\n' + ROUTES.replace("{upstream}", simulator.url)
    )
    with KeyRegistry(directory / "keys.db") as registry:
        key, _ = registry.create(USER)
    arguments = ["-m", "edge", "serve", "--config", str(config)]
    if sock is not None:
        arguments = ["-c", _PASS_ON, str(sock.fileno()), *arguments]
    running = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, pass_fds=(sock.fileno(),) if sock else (), stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
    )  # fmt: skip
    try:
        yield running, key
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()
        running._transport.close()  # type: ignore[attr-defined]  # its pipes, where nobody read them to the end


async def logged(running: asyncio.subprocess.Process, words: str) -> str:
    assert running.stderr is not None
    async with asyncio.timeout(LONG_S):
        while words not in (line := (await running.stderr.readline()).decode()):
            assert line, f"the process ended without saying {words!r}"
    return line


async def asked(port: int, key: str, body: dict[str, Any]) -> RawClient:
    client = RawClient(*await asyncio.open_connection("127.0.0.1", port))
    data = json.dumps(body).encode()
    client.send(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return client


async def test_listening_socket_that_is_passed_is_served_without_binding(tmp_path: Path, simulator: Simulator) -> None:
    """sd_listen_fds(3): the socket belongs to whoever passed it, so a restart loses no connection."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        for _ in range(2):  # a second process on the same socket after the first
            waiting = asyncio.open_connection("127.0.0.1", port)
            early = RawClient(*await waiting)  # connected before anybody serves: the kernel holds it
            async with process(tmp_path, simulator, sock) as (running, key):
                assert f"127.0.0.1:{port}" in await logged(running, "listening on")
                client = await asked(port, key, BODY)
                assert (await client.response())[0] == 200
                early.send(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await early.response())[0] == 401
                running.terminate()
                assert await client.rest() == b""
                assert await asyncio.wait_for(running.wait(), LONG_S) == 0
            client.close()
            early.close()
        after = RawClient(*await asyncio.open_connection("127.0.0.1", port))  # still accepted by the kernel
        after.close()


async def test_signals_drain_and_hurry(tmp_path: Path, simulator: Simulator) -> None:
    """SIGTERM drains; a second one ends the wait; the exit is a success."""
    async with process(tmp_path, simulator, None, 'drain_timeout = "1h"') as (running, key):
        line = await logged(running, "listening on")
        port = int(line.split("listening on 127.0.0.1:")[1].split(",")[0])
        client = await asked(port, key, stream(fault="stall", after=2))
        await client.head()
        running.send_signal(signal.SIGTERM)
        await logged(running, "draining")
        running.send_signal(signal.SIGTERM)
        assert (await client.rest()).endswith(b"0\r\n\r\n")
        client.close()
        assert await asyncio.wait_for(running.wait(), LONG_S) == 0
        assert running.stdout is not None
        log = [json.loads(each) for each in (await running.stdout.read()).splitlines()]
        assert [each["end"] for each in log] == ["drained"]


async def test_process_whose_standard_error_nobody_reads_serves_and_ends(
    tmp_path: Path, simulator: Simulator, full_pipe: tuple[int, int]
) -> None:
    """Its first line already finds no room; the loop must not wait for the reader, and neither must the exit."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        async with process(tmp_path, simulator, sock, stderr=full_pipe[1]) as (running, key):
            async with asyncio.timeout(LONG_S):
                client = await asked(sock.getsockname()[1], key, BODY)
                assert (await client.response())[0] == 200
                running.terminate()
                assert await running.wait() == 0
            client.close()


async def test_last_words_of_a_process_are_all_written(tmp_path: Path, simulator: Simulator) -> None:
    async with process(tmp_path, simulator, None) as (running, _):
        await logged(running, "listening on")
        running.terminate()
        await logged(running, "draining: 0 requests")
        assert await asyncio.wait_for(running.wait(), LONG_S) == 0
