"""vllm-router, of the vLLM project: round robin over one worker."""

from typing import Final

from loadtest.peers.peer import Launch, Peer, Scene
from loadtest.peers.smg import router_options


def _launch(program: str, scene: Scene) -> Launch:
    return Launch([program, *(word for pair in router_options(scene).items() for word in pair)])


PEER: Final = Peer(
    "vllm-router",
    "round robin",
    _launch,
    program="vllm-router",
    package="vllm-router",
    install="pip install vllm-router",
)
