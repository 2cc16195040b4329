"""An edge of its own in front of a model server: a file, a key and a process."""

import contextlib
import json
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Final

_USER: Final = "u-1100a15812cc"
_READY_WITHIN_S: Final = 20.0
_STOPS_WITHIN_S: Final = 15.0
_FILE: Final = """
[server]
listen = "127.0.0.1:{port}"
admin = "127.0.0.1:{admin}"
shutdown_delay = "0s"
drain_timeout = "1s"
[keys]
store = "sqlite:keys.db"
[usage]
journal = "usage"
[pools.model-server]
endpoints = ["{upstream}"]
[routes."public/m-*"]
pool = "model-server"
metered = true
"""


class EdgeProcess:
    """`edge serve` in a directory of its own, in a `with`; `key` opens all models but the one of `denied`."""

    def __init__(self, binary: Path, upstream: str, denied: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="edge-", ignore_cleanup_errors=True)
        self._home = Path(self._directory.name)
        port, self._admin = _free_ports(2)
        self.url = f"http://127.0.0.1:{port}"
        file = self._home / "routes.toml"
        file.write_text(_FILE.format(port=port, admin=self._admin, upstream=upstream))
        create = [str(binary), "keys", "create", "--config", str(file), "--user", _USER, "--deny", denied, "--json"]
        made = subprocess.run(create, capture_output=True, text=True)
        if made.returncode:
            raise SystemExit(f"the edge made no key: {made.stdout}{made.stderr}")
        self.key: str = json.loads(made.stdout)["key"]
        self._log = self._home / "out"
        with self._log.open("wb") as out, (self._home / "err").open("wb") as err:
            self._process = subprocess.Popen(
                [binary, "serve", "--config", file], stdout=out, stderr=err, cwd=self._home
            )

    def __enter__(self) -> "EdgeProcess":
        until = time.monotonic() + _READY_WITHIN_S
        while time.monotonic() < until and self._process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self._admin}/readyz", timeout=5).close()
                return self
            time.sleep(0.05)
        self.__exit__(None, None, None)
        raise SystemExit("the edge did not start")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ask_to_stop()
        self.wait()
        self._directory.cleanup()

    def ask_to_stop(self) -> None:
        """Begin the drain."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Wait until the process has ended."""
        try:
            self._process.wait(_STOPS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def asked(self) -> Counter[str]:
        """Return how often each model was asked for, by the access log of a process that ended.

        A request that had no valid key has no model there; it counts for the key "401".
        """
        lines = [json.loads(line) for line in self._log.read_bytes().splitlines() if line.startswith(b"{")]
        posts = [line for line in lines if line.get("event") == "request" and line.get("method") == "POST"]
        return Counter("401" if line["status"] == 401 else str(line["model"]) for line in posts)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
