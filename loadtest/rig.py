"""Where the proxies of a comparison run: their directory, core, upstream and certificate; and how one is started."""

import contextlib
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from loadtest import processes
from loadtest.measures.load import Target, ready
from loadtest.peers.peer import Certificate, Peer, Scene
from loadtest.processes import Process

_READY_TIMEOUT_S: Final = 60.0
_SELF_SIGNED: Final = (
    "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
    "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rig:
    """What proxies share; `pids` the rig's own processes, of each core, `core` that of the proxies."""

    directory: Path
    upstream_port: int
    pids: Sequence[Sequence[int]]
    core: int
    certificate: Certificate | None

    def start(self, stack: contextlib.ExitStack, peer: Peer, program: str, *, tls: bool = False) -> "Started":
        """Start a peer that ends with the stack, and return when it listens; raises `ProcessError`, `OSError`."""
        directory = Path(tempfile.mkdtemp(prefix=f"{peer.name}-", dir=self.directory))
        directory.chmod(0o755)
        certificate = self.certificate if tls else None
        scene = Scene(
            directory, processes.free_port(), processes.free_port(), self.upstream_port, certificate=certificate
        )
        launch = peer.launch(program, scene)
        log = directory / "log"
        process = Process(peer.name, launch.command, log, cores={self.core}, environment=launch.environment)
        stack.enter_context(process)
        process.wait_listening(scene.port)
        trusting = ssl.create_default_context(cafile=certificate.path) if certificate else None
        target = Target(
            peer.name, scene.port, self.upstream_port, launch.key, [], self.pids, peer.load_divisor, launch.headers,
            trusting, process.start_s,
        )  # fmt: skip
        return Started(peer, process, target)


@dataclass(frozen=True, slots=True)
class Started:
    """A peer that listens."""

    peer: Peer
    process: Process
    target: Target

    async def served(self) -> Target:
        """Return where it is with its processes, as soon as it serves; raises `Failed`."""
        await ready(self.target, _READY_TIMEOUT_S, streams=self.peer.streams)
        return replace(self.target, pids=self.process.pids())  # only now: workers are forked after the port is open


def certificate(directory: Path) -> Certificate | None:
    """Return a certificate for 127.0.0.1, with a key of P-256 as most servers have today; None without openssl."""
    program = shutil.which("openssl")
    if program is None:
        return None
    made = Certificate(directory / "tls.crt", directory / "tls.key")
    paths = ["-out", str(made.path), "-keyout", str(made.key_path)]
    subprocess.run([program, *_SELF_SIGNED, *paths], check=True, capture_output=True)
    made.key_path.chmod(0o644)  # of no use outside of this run, and nginx's worker may be another user
    return made
