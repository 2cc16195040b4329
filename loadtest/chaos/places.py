"""Where faults need the system: a network namespace that can be cut off, a disk that fills, a clock that steps.

Where the machine does not allow one, `Denied` says why.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_CLONE_NEWNET: Final = 0x4000_0000  # setns(2)
_DISK_BYTES: Final = 2**30
_BESIDE_BYTES: Final = 2**20  # what the journal may write while the disk is filled
_FAKETIME: Final = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/faketime/libfaketime.so.1",
    "/usr/local/lib/faketime/libfaketime.so.1",
)


class Denied(Exception):
    """The machine does not allow it; the message says why."""


def _run(*command: str) -> None:
    """Run a command of the system; raises `Denied`."""
    if os.geteuid() != 0:
        raise Denied("needs root")
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        raise Denied(f"needs {command[0]}") from None
    except subprocess.CalledProcessError as error:
        raise Denied(f"{' '.join(command[:3])}: {error.stderr.decode(errors='replace').strip()}") from None


class Island:
    """A network namespace behind one cable, which can be pulled; no packet leaves the machine (RFC 2544 addresses).

    Raises: `Denied`.
    """

    def __init__(self) -> None:
        self._name = f"chaos-{os.getpid()}"
        self._outer, self._inner = f"co{os.getpid()}", f"ci{os.getpid()}"
        net = f"198.18.{os.getpid() % 256}"
        self.host = f"{net}.2"
        _run("ip", "netns", "add", self._name)
        try:
            _run("ip", "link", "add", self._outer, "type", "veth", "peer", "name", self._inner, "netns", self._name)
            _run("ip", "addr", "add", f"{net}.1/30", "dev", self._outer)
            _run("ip", "link", "set", self._outer, "up")
            _run("ip", "-n", self._name, "addr", "add", f"{self.host}/30", "dev", self._inner)
            self.plug(plugged=True)
        except Denied:
            self.close()
            raise

    def plug(self, *, plugged: bool) -> None:
        """Pull the cable, or plug it in."""
        _run("ip", "-n", self._name, "link", "set", self._inner, "up" if plugged else "down")

    def listening(self) -> socket.socket:
        """Return a socket that listens on a free port inside."""
        found: list[socket.socket] = []

        def inside() -> None:  # a thread that enters a namespace stays there
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/run/netns/{self._name}", "rb") as namespace:
                if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                    return
            found.append(socket.create_server((self.host, 0), backlog=4096))

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        if not found:
            raise OSError(ctypes.get_errno(), "the namespace cannot be entered")
        return found[0]

    def close(self) -> None:
        """Remove the namespace, and the cable with it."""
        subprocess.run(("ip", "netns", "del", self._name), check=False, capture_output=True)


class Disk:
    """A small disk in memory, mounted at a directory; raises `Denied`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self._filler = directory / "filler"
        _run("mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "none", str(directory))

    def fill(self) -> None:
        """Leave no room; the journal writes beside it, so the last bytes are taken as they come."""
        free = os.statvfs(self.directory)
        with self._filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_bsize - _BESIDE_BYTES, 1))
            file.seek(0, os.SEEK_END)
            while file.write(bytes(4096)):
                pass

    def empty(self) -> None:
        """Make room again."""
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(("umount", "-l", str(self.directory)), check=False, capture_output=True)


class Clock:
    """The wall clock of processes that run under libfaketime; the monotonic one goes on."""

    def __init__(self, library: Path, directory: Path) -> None:
        self._file = directory / "clock"
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",  # seconds; to read the file at each call would slow every timer
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        self.step(0)

    @staticmethod
    def library(named: Sequence[Path]) -> Path | None:
        """Return libfaketime where it is installed, or the one that is named."""
        return next((each for each in (*named, *map(Path, _FAKETIME)) if each.is_file()), None)

    def step(self, offset_s: int) -> None:
        """Set how far the clock is off."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{offset_s:+d}")
        fresh.replace(self._file)
