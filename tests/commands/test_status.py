"""`edge status`: what a terminal shows."""

import asyncio
import json
from pathlib import Path

import pytest

from edge.__main__ import main
from edge.commands.status import describe, fetch, plot
from edge.config.values import Address
from tests.conftest import ROUTES, Edge, StartEdge


async def test_status_of_a_running_edge_is_told(edge: Edge, capsys: pytest.CaptureFixture[str]) -> None:
    await edge.ask({"model": "public/deepseek-r1"})
    admin = f"127.0.0.1:{edge.admin_port}"
    assert await asyncio.to_thread(main, ["status", "--admin", admin]) == 0
    shown = capsys.readouterr().out
    assert "ready (running)" in shown
    assert "no troubles" in shown
    assert "\npublic/deepseek-r1  r1" in shown
    assert await asyncio.to_thread(main, ["status", "--admin", admin, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ready"] is True


async def test_status_shows_the_admin_token(
    start_edge: StartEdge, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of the file, or where no file is read the one of the environment."""
    edge = await start_edge(
        ROUTES.replace("{upstream}", "http://127.0.0.1:9"), server='admin_token = "a-token-of-twenty-characters"'
    )
    admin = f"127.0.0.1:{edge.admin_port}"
    assert await asyncio.to_thread(main, ["status", "--admin", admin]) == 1
    assert "put the token into EDGE_ADMIN_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("EDGE_ADMIN_TOKEN", "a-token-of-twenty-characters")
    assert await asyncio.to_thread(main, ["status", "--admin", admin]) == 0
    monkeypatch.delenv("EDGE_ADMIN_TOKEN")
    text = edge.config_path.read_text().replace('admin = "127.0.0.1:0"', f'admin = "{admin}"')
    edge.config_path.write_text(text)
    assert await asyncio.to_thread(main, ["status", "--config", str(edge.config_path)]) == 0


async def test_status_is_asked_at_a_unix_socket_too(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /status.json HTTP/1.1\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    path = tmp_path / "admin.sock"
    async with await asyncio.start_unix_server(answer, path):
        assert await asyncio.to_thread(fetch, Address(None, None, path)) == b"{}"


def test_edge_that_does_not_answer_is_a_failure_with_its_address(
    unused_tcp_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--admin", f"127.0.0.1:{unused_tcp_port}"]) == 1
    assert f"edge: no edge answers at 127.0.0.1:{unused_tcp_port}" in capsys.readouterr().err


async def test_what_an_upstream_said_moves_no_cursor(edge: Edge, capsys: pytest.CaptureFixture[str]) -> None:
    edge.server.readiness.reload_failed = "\x1b[2Jgone\n\x07second line"
    await asyncio.to_thread(main, ["status", "--admin", f"127.0.0.1:{edge.admin_port}"])
    shown = capsys.readouterr().out
    assert "?[2Jgone; ?second line" in shown
    assert "\x1b" not in shown


def test_plot_goes_from_nothing_to_the_most() -> None:
    assert plot([0, 1, 2, 4]) == "▁▃▅█"
    assert plot([0, 0]) == "▁▁"
    assert plot([]) == ""


def test_document_without_anything_is_described() -> None:
    status = {
        "version": "1", "ready": False, "stage": "draining", "time": 5.0, "started_at": 0.0,
        "config": {"generation": 1, "loaded_at": 0.0, "sha256": "ab"},
        "now": {"in_flight": 0, "connections": 0, "max_connections": 1},
        "minute": {
            "requests": 0, "failed": 0, "refused": 0, "ttft_p50_ms": None, "ttft_p95_ms": None, "tokens_per_s": 0.0,
        },
        "troubles": [], "routes": [], "routes_more": 3, "pools": [], "pools_more": 2, "limits": [], "parts": [],
        "certificates": [], "failures": [],
    }  # fmt: skip
    shown = "\n".join(describe(status))
    assert "not ready (draining)" in shown
    assert "3 more routes are quiet" in shown
    assert "2 more pools are quiet" in shown
