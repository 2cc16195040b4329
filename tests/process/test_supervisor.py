"""What systemd hears: a datagram when the edge serves, and one when it begins to drain."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.process.supervisor import notify
from edge.simulator.server import Simulator
from tests.conftest import ROUTES, StartEdge


@pytest.fixture
def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


async def test_edge_says_when_it_serves_and_when_it_ends(
    start_edge: StartEdge, simulator: Simulator, heard: socket.socket
) -> None:
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url))
    assert heard.recv(100) == b"READY=1"
    await edge.stop()
    assert heard.recv(100) == b"STOPPING=1"


def test_name_of_an_abstract_socket_begins_with_an_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = f"edge-test-{tmp_path.name}-{id(tmp_path)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify("READY=1")
        assert sock.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "nonsense", "/nowhere/at/all"])
def test_nobody_who_listens_is_no_matter(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")
