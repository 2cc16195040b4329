"""smg, the gateway that sglang-router became: round robin over one worker, nothing discovered and no tokenizer.

In front of several engines it chooses by what it takes them to have cached.
"""

from collections.abc import Sequence
from typing import Final

from loadtest.peers.peer import MAX_CONNECTIONS, Launch, Peer, Scene

_WITHOUT: Final = ("--disable-tokenizer-autoload", "--disable-load-monitoring")


def router_words(scene: Scene, workers: Sequence[str], policy: str) -> list[str]:
    """Return the options of sglang-router, which vllm-router took over when it began as a copy of it."""
    options = {
        "--host": "127.0.0.1",
        "--port": str(scene.port),
        "--policy": policy,
        "--prometheus-port": str(scene.second_port),
        "--log-level": "error",
        "--max-concurrent-requests": str(MAX_CONNECTIONS),
    }
    return ["--worker-urls", *workers, *(word for pair in options.items() for word in pair)]


def cache_aware(program: str, scene: Scene, workers: Sequence[str]) -> list[str]:
    """Return the command of smg in front of several engines."""
    return [program, "launch", *router_words(scene, workers, "cache_aware"), *_WITHOUT]


def _launch(program: str, scene: Scene) -> Launch:
    words = router_words(scene, [scene.upstream], "round_robin")
    if scene.certificate:
        words += ["--tls-cert-path", str(scene.certificate.path), "--tls-key-path", str(scene.certificate.key_path)]
    return Launch([program, "launch", *words, *_WITHOUT])


PEER: Final = Peer(
    "smg",
    "round robin",
    _launch,
    program="smg",
    package="smg",
    install="pip install smg",
    tls=True,
)
