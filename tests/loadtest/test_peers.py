"""Peers: found where they are installed, named when they are not, each with its own configuration."""

import re
import sys
from pathlib import Path

import orjson
import pytest

from loadtest.peers import peer as peers
from loadtest.peers.peer import Scene
from loadtest.peers.table import PEERS

THIRD_PARTY = [peer for peer in PEERS.values() if peer.program is not None]


def program(directory: Path, name: str, said: str = "") -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{said}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("peer", THIRD_PARTY, ids=lambda peer: peer.name)
def test_a_peer_is_found_in_the_environment_made_for_it(peer: peers.Peer, tmp_path: Path) -> None:
    assert peer.program is not None
    path = program(tmp_path / peer.name / "bin", peer.program)
    assert peer.find([tmp_path]) == str(path)


@pytest.mark.parametrize("peer", THIRD_PARTY, ids=lambda peer: peer.name)
def test_a_peer_that_is_nowhere_is_missing_and_says_how_to_get_it(
    peer: peers.Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_SYSTEM_PLACES", ())
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert peer.find([tmp_path]) is None
    assert peer.install


def test_directories_are_those_given_then_those_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOADTEST_PEERS", f"{tmp_path / 'b'}:{tmp_path / 'c'}")
    assert peers.directories([tmp_path / "a"]) == [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    monkeypatch.delenv("LOADTEST_PEERS")
    assert peers.directories([]) == []


def test_a_version_is_read_from_what_the_program_says(tmp_path: Path) -> None:
    path = program(tmp_path, "nginx", "nginx version: nginx/1.22.1 built with OpenSSL 3.0")
    assert PEERS["nginx"].version(str(path)) == "1.22.1"
    mute = program(tmp_path, "mute")
    assert PEERS["nginx"].version(str(mute)) == "version unknown"


def test_a_python_peer_has_the_version_of_its_package(tmp_path: Path) -> None:
    path = tmp_path / "litellm"
    path.write_text(f"#!{sys.executable}\n")
    peer = peers.Peer("aiohttp", "", PEERS["litellm"].launch, program="litellm", package="aiohttp")
    assert re.fullmatch(r"3\.14\.\d+", peer.version(str(path)))
    assert "aiohttp 3.14" in PEERS["edge"].version(sys.executable)


@pytest.mark.parametrize("peer", PEERS.values(), ids=lambda peer: peer.name)
def test_every_peer_is_told_its_port_and_the_upstream(peer: peers.Peer, tmp_path: Path) -> None:
    scene = Scene(tmp_path, 18080, 18081, 19000)
    launch = peer.launch(sys.executable if peer.program is None else "/bin/true", scene)
    written = "".join(
        path.read_text() for path in tmp_path.iterdir() if path.suffix != ".db" and "db-" not in path.name
    )
    told = " ".join((*launch.command, *launch.environment.values(), *launch.headers.values())) + written
    assert "18080" in told
    assert "19000" in told
    assert launch.key


def test_envoy_and_litellm_get_json_which_is_yaml_too(tmp_path: Path) -> None:
    scene = Scene(tmp_path, 18080, 18081, 19000)
    for name, file in (("envoy", "envoy.json"), ("envoy-working", "envoy.json"), ("litellm", "litellm.yaml")):
        PEERS[name].launch("/bin/true", scene)
        assert orjson.loads((tmp_path / file).read_bytes())


def test_haproxy_differs_from_its_delaying_self_by_one_option(tmp_path: Path) -> None:
    scene = Scene(tmp_path, 18080, 18081, 19000)
    written = []
    for name in ("haproxy", "haproxy-delay"):
        PEERS[name].launch("/bin/true", scene)
        written.append([line.strip() for line in (tmp_path / "haproxy.cfg").read_text().splitlines() if line.strip()])
    assert [line for line in written[0] if line not in written[1]] == ["option http-no-delay"]


def test_the_edge_gets_a_key_that_was_made_for_it(tmp_path: Path) -> None:
    launch = PEERS["edge"].launch(sys.executable, Scene(tmp_path, 18080, 18081, 19000))
    assert launch.key.startswith("sk-")
    assert launch.key != peers.KEY
    assert (tmp_path / "keys.db").exists()
