"""vllm-router, of the vLLM project: round robin over one worker."""

from typing import Final

from loadtest.peers.peer import MAX_CONNECTIONS, Launch, Peer, Scene


def _launch(program: str, scene: Scene) -> Launch:
    options = {
        "--host": "127.0.0.1",
        "--port": str(scene.port),
        "--worker-urls": scene.upstream,
        "--policy": "round_robin",
        "--prometheus-port": str(scene.second_port),
        "--log-level": "error",
        "--max-concurrent-requests": str(MAX_CONNECTIONS),
    }
    return Launch([program, *(word for pair in options.items() for word in pair)])


PEER: Final = Peer(
    "vllm-router",
    "round robin",
    _launch,
    program="vllm-router",
    package="vllm-router",
    install="pip install vllm-router",
)
