"""vllm-router, of the vLLM project: round robin over one worker, by what engines have cached over several."""

from collections.abc import Sequence
from typing import Final

from loadtest.peers.peer import Launch, Peer, Scene
from loadtest.peers.smg import router_words


def cache_aware(program: str, scene: Scene, workers: Sequence[str]) -> list[str]:
    """Return the command of vllm-router in front of several engines."""
    return [program, *router_words(scene, workers, "cache_aware")]


def _launch(program: str, scene: Scene) -> Launch:
    return Launch([program, *router_words(scene, [scene.upstream], "round_robin")])


PEER: Final = Peer(
    "vllm-router",
    "round robin",
    _launch,
    program="vllm-router",
    package="vllm-router",
    install="pip install vllm-router",
)
