"""Routers in front of several engines, for `conversations`: edges, and those of others with their own policy."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest.edges import SERVER, Edge, create_key, is_ready
from loadtest.peers import smg, vllm_router
from loadtest.peers.peer import KEY, Peer, Scene
from loadtest.processes import Process, ProcessError, free_port, tree

_CONFIG: Final = """
[usage]
journal = "usage{number}"
[pools.members]
balance = "{balance}"
endpoints = [{endpoints}]
[routes."public/m"]
pool = "members"
metered = true
"""
_COMMANDS: Final[dict[str, tuple[Peer, Callable[[str, Scene, Sequence[str]], list[str]]]]] = {
    "smg": (smg.PEER, smg.cache_aware),
    "vllm-router": (vllm_router.PEER, vllm_router.cache_aware),
}
ROUTERS: Final = tuple(_COMMANDS)
_READY_PATIENCE_S: Final = 60.0  # until engines that are there have been found healthy


@dataclass(frozen=True, slots=True)
class Front:
    """What clients ask: where, with which key; and the processes behind it."""

    urls: list[str]
    key: str
    pids: list[int]


@contextlib.contextmanager
def edges(count: int, root: Path, directory: Path, balance: str, engines: Sequence[str]) -> Iterator[Front]:
    """Run edges of a checkout that share nothing but their keys; raises `ProcessError`."""
    with contextlib.ExitStack() as stack:
        urls, key, pids = [], "", []
        for number in range(count):
            endpoints = ", ".join(f'"{engine}"' for engine in engines)
            text = SERVER + _CONFIG.format(balance=balance, endpoints=endpoints, number=number)
            (directory / "routes.toml").write_text(text)
            key = key or create_key(root, directory)
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
            edge = Edge(number, root, directory, listening)
            stack.callback(edge.kill)
            edge.start()
            urls.append(f"http://127.0.0.1:{listening.getsockname()[1]}")
            pids += tree(edge.pid)
        yield Front(urls, key, pids)


@contextlib.contextmanager
def routers(
    name: str, count: int, directory: Path, engines: Sequence[str], directories: Sequence[Path]
) -> Iterator[Front]:
    """Run routers of others that share nothing; raises `ProcessError`, also for one that is not installed."""
    peer, command = _COMMANDS[name]
    program = peer.find(directories)
    if program is None:
        raise ProcessError(f"{name} is not installed: {peer.install}, and name its environment with --peer-dir")
    with contextlib.ExitStack() as stack:
        urls, pids = [], []
        for number in range(count):
            scene = Scene(directory, free_port(), free_port(), 0)
            log = directory / f"{name}{number}.log"
            words, cores = command(program, scene, engines), os.sched_getaffinity(0)
            running = stack.enter_context(Process(name, words, log, cores=cores))
            running.wait_listening(scene.port)
            urls.append(f"http://127.0.0.1:{scene.port}")
            _wait_ready(running, urls[-1])
            pids += running.pids()
        yield Front(urls, KEY, pids)


def _wait_ready(router: Process, url: str) -> None:
    """Wait until a router knows its engines; raises `ProcessError`."""
    give_up_at = time.monotonic() + _READY_PATIENCE_S
    while not is_ready(f"{url}/readiness"):
        if time.monotonic() > give_up_at:
            raise ProcessError(f"{router.name} did not find its engines: {router.last_words()}")
        time.sleep(0.05)
