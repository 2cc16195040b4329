"""Two proxies of this package's own, as measures of Python: a relay without HTTP, and what a tutorial writes."""

from collections.abc import Callable
from typing import Final

from loadtest.peers.peer import ROOT, Launch, Peer, Scene


def _module(name: str) -> Callable[[str, Scene], Launch]:
    def launch(program: str, scene: Scene) -> Launch:
        ports = ["--port", str(scene.port), "--upstream-port", str(scene.upstream_port)]
        return Launch([program, "-m", name, *ports], environment={"PYTHONPATH": str(ROOT)})

    return launch


FLOOR: Final = Peer("floor", "two bare uvloop protocols, no HTTP", _module("loadtest.floor"), package="uvloop")
TUTORIAL: Final = Peer(
    "tutorial", "aiohttp Application and ClientSession", _module("loadtest.tutorial"), package="aiohttp uvloop"
)
