"""smg, the gateway that sglang-router became: round robin over one worker, nothing discovered and no tokenizer."""

from typing import Final

from loadtest.peers.peer import MAX_CONNECTIONS, Launch, Peer, Scene


def router_options(scene: Scene) -> dict[str, str]:
    """Return the options of sglang-router, which vllm-router took over when it began as a copy of it."""
    return {
        "--host": "127.0.0.1",
        "--port": str(scene.port),
        "--worker-urls": scene.upstream,
        "--policy": "round_robin",
        "--prometheus-port": str(scene.second_port),
        "--log-level": "error",
        "--max-concurrent-requests": str(MAX_CONNECTIONS),
    }


def _launch(program: str, scene: Scene) -> Launch:
    options = router_options(scene)
    if scene.certificate:
        options |= {"--tls-cert-path": str(scene.certificate.path), "--tls-key-path": str(scene.certificate.key_path)}
    words = [word for pair in options.items() for word in pair]
    return Launch([program, "launch", *words, "--disable-tokenizer-autoload", "--disable-load-monitoring"])


PEER: Final = Peer(
    "smg",
    "round robin",
    _launch,
    program="smg",
    package="smg",
    install="pip install smg",
    tls=True,
)
