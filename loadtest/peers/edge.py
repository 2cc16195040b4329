"""The edge of a checkout: alone, and as two processes on one socket, as its manual runs several cores."""

import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Final

import orjson

from loadtest.peers.peer import ROOT, Launch, Peer, Scene

_TLS: Final = """
[server.tls]
certificate = "{0.path}"
private_key = "{0.key_path}"
"""


def _prepared(root: Path, program: str, scene: Scene) -> Launch:
    """Write the configuration and make a key; the command is still only its beginning."""
    text = (root / "loadtest" / "edge.toml").read_text()
    path = scene.file("routes.toml", text + (_TLS.format(scene.certificate) if scene.certificate else ""))
    environment = {
        "PYTHONPATH": str(root),  # the checkout's edge, whatever is installed
        "PORT": str(scene.port),
        "ADMIN_PORT": str(scene.second_port),
        "UPSTREAM": scene.upstream,
    }
    made = subprocess.run(
        [program, "-m", "edge", "keys", "create", "--config", path, "--user", "u-loadtest", "--json"],
        capture_output=True,
        check=True,
        env=os.environ | environment,
        cwd=scene.directory,
    )
    return Launch([program, "-m"], str(orjson.loads(made.stdout)["key"]), environment)


def _one(root: Path, program: str, scene: Scene) -> Launch:
    prepared = _prepared(root, program, scene)
    command = [*prepared.command, "edge", "serve", "--config", str(scene.directory / "routes.toml")]
    return Launch(command, prepared.key, prepared.environment)


def _two(program: str, scene: Scene) -> Launch:
    prepared = _prepared(ROOT, program, scene)
    return Launch([*prepared.command, "loadtest.peers.two"], prepared.key, prepared.environment)


def edge(root: Path, name: str = "edge") -> Peer:
    """Return the edge of a checkout."""
    text = "keys, route, limit, metering, journal, metrics and log on"
    return Peer(name, text, partial(_one, root), package="aiohttp uvloop", checks_keys=True, tls=True)


PEER: Final = edge(ROOT)
TWO: Final = Peer(
    "edge-two",
    "the same, two processes on one socket and, here, on one core",
    _two,
    package="aiohttp uvloop",
    checks_keys=True,
    only=frozenset({"small", "unkept"}),
)
