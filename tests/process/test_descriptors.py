"""A process with few descriptors, and a flood that wants them all: good clients and operators are served."""

import asyncio
import contextlib
import json
import os
import resource
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trustme

from edge.keys.stores.registry import KeyRegistry
from edge.simulator.server import Simulator
from tests.conftest import ROUTES, USER, RawClient, tls_setting

DESCRIPTORS = 256
FLOOD = 400


@contextlib.contextmanager
def descriptors(most: int) -> Iterator[None]:
    """Let this process open so many files: those of the flood are its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, most), hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def liveness(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    try:
        return (await reader.read())[9:12]
    finally:
        writer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit(1) is of util-linux")
@pytest.mark.parametrize(("tls", "first_byte"), [(True, b""), (False, b"\x16")], ids=["silent TLS", "begun heads"])
async def test_flood_takes_neither_places_nor_the_descriptors_of_operators(
    tmp_path: Path, simulator: Simulator, tls: bool, first_byte: bytes
) -> None:
    """Silent connections give way to good ones; such as have begun are bounded, and operators are answered."""
    authority = trustme.CA()
    context = None
    settings = "max_connections = 100000\n"  # more than there are descriptors for
    if tls:
        settings += tls_setting(tmp_path, authority)
        context = ssl.create_default_context()
        authority.configure_trust(context)
    with ExitStack() as stack:
        stack.enter_context(descriptors(FLOOD + 256))
        ports = [stack.enter_context(socket.socket()) for _ in range(2)]
        for sock in ports:
            sock.bind(("127.0.0.1", 0))
        port, admin = (sock.getsockname()[1] for sock in ports)
    (tmp_path / "routes.toml").write_text(
        f'[server]\nlisten = "127.0.0.1:{port}"\nadmin = "127.0.0.1:{admin}"\nshutdown_delay = "0s"\n'
        f'drain_timeout = "0s"\n{settings}[keys]\nstore = "sqlite:keys.db"\n'
        + ROUTES.replace("{upstream}", simulator.url)
    )
    with KeyRegistry(tmp_path / "keys.db") as registry:
        key, _ = registry.create(USER)
    with (tmp_path / "log").open("wb") as log:
        limit = f"--nofile={DESCRIPTORS}:{DESCRIPTORS}"
        process = await asyncio.create_subprocess_exec(
            "prlimit", limit, sys.executable, "-m", "edge", "serve", cwd=tmp_path, stdout=log, stderr=log,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
    body = json.dumps({"model": "public/deepseek-r1", "messages": []}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    async def ask() -> int:
        client = RawClient(*await asyncio.open_connection("127.0.0.1", port, ssl=context))
        client.send(head.encode() + body)
        try:
            return (await client.response())[0]
        finally:
            client.abort()

    try:
        with ExitStack() as stack:
            stack.enter_context(descriptors(FLOOD + 256))
            async with asyncio.timeout(60):
                while True:
                    with contextlib.suppress(ConnectionError):
                        if await liveness(admin) == b"200":
                            break
                    await asyncio.sleep(0.02)
            assert await ask() == 200
            loop = asyncio.get_running_loop()
            for _ in range(FLOOD):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                await loop.sock_connect(sock, ("127.0.0.1", port))
                with contextlib.suppress(ConnectionError):
                    sock.send(first_byte)
            assert [await liveness(admin) for _ in range(5)] == [b"200"] * 5
            if not first_byte:
                assert [await ask() for _ in range(5)] == [200] * 5
            assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) <= DESCRIPTORS - 32
        async with asyncio.timeout(60):
            while True:  # the flood has gone
                with contextlib.suppress(OSError, EOFError):
                    if await ask() == 200:
                        break
        assert "server.max_connections: 100000 are more" in (tmp_path / "log").read_text()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
