"""Start, pin and stop a process, and read what its tree costs: CPU, memory, descriptors (Linux, proc(5))."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_PROC: Final = Path("/proc")
_START_TIMEOUT_S: Final = 300.0  # a Python gateway imports for a minute and more beside other programs
_STOP_TIMEOUT_S: Final = 10.0


class ProcessError(Exception):
    """A process did not start; the message ends with what it wrote last."""


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tree(pid: int) -> list[int]:
    """Return a process and all its descendants that are alive."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text()
                children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        each = waiting.pop()
        if (_PROC / str(each)).exists():
            found.append(each)
            waiting += children.get(each, [])
    return found


def cpu_s(pids: Sequence[int]) -> float:
    """Return the seconds of CPU, user and system, that all threads of the processes have used so far."""
    return _scheduled_s(pids, 0)


def waited_s(pids: Sequence[int]) -> float:
    """Return the seconds that the threads of the processes have waited for a core that somebody else had."""
    return _scheduled_s(pids, 1)


def _scheduled_s(pids: Sequence[int], column: int) -> float:
    """Return the sum of a column of schedstat (Linux, sched-stats.rst): 0 on a core, 1 waiting for one."""
    total_ns = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in (_PROC / str(pid) / "task").iterdir():
                with contextlib.suppress(OSError):
                    total_ns += int((task / "schedstat").read_text().split()[column])
    return total_ns / 1e9


def pss_bytes(pids: Sequence[int]) -> int:
    """Return the processes' memory; what several share is split between them."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def descriptors(pids: Sequence[int]) -> int:
    """Return how many descriptors the processes have open."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += len(os.listdir(_PROC / str(pid) / "fd"))
    return total


def major_faults(pids: Sequence[int]) -> int:
    """Return how many page faults of the processes had to read a disk."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[9])
    return total


def steal_and_total_s() -> tuple[float, float]:
    """Return the seconds a hypervisor took from this machine, and all seconds of all its cores, since its start."""
    ticks = [int(each) for each in (_PROC / "stat").read_text().splitlines()[0].split()[1:9]]
    hz = os.sysconf("SC_CLK_TCK")
    return ticks[7] / hz, sum(ticks) / hz


def busy_s(cores: Iterable[int]) -> float:
    """Return the seconds that programs, also the kernel for them, have run on the cores since the machine's start."""
    wanted = {f"cpu{core}" for core in cores}
    lines = [line.split() for line in (_PROC / "stat").read_text().splitlines()]
    ticks = sum(int(each) for line in lines if line[0] in wanted for each in line[1:4])  # user, nice, system
    return ticks / os.sysconf("SC_CLK_TCK")


def cores_of(pids: Iterable[int]) -> set[int]:
    """Return the cores that the processes may run on."""
    cores: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            cores |= os.sched_getaffinity(pid)
    return cores


class Process:
    """A process of ours, pinned to cores, stopped at the end of the `with`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        cores: set[int],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._log = log
        begun = time.monotonic()
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                cwd=log.parent,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),  # before it starts threads of its own
                start_new_session=True,
            )
        self._begun = begun
        self.pid = self._popen.pid
        self.start_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def wait_listening(self, port: int) -> None:
        """Wait until somebody accepts at the loopback port; raises `ProcessError`."""
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                self.start_s = time.monotonic() - self._begun
                return
            if self._popen.poll() is not None or time.monotonic() - self._begun > _START_TIMEOUT_S:
                raise ProcessError(f"{self.name} did not start: {self.last_words()}")
            time.sleep(0.01)

    def last_words(self) -> str:
        """Return the end of what the process wrote."""
        return self._log.read_text(errors="replace")[-500:].strip()

    def pids(self) -> list[int]:
        """Return the processes of the tree."""
        return tree(self.pid)

    def stop(self) -> None:
        """End the process and what it started."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # its session is its own, so this is what it started
        self._popen.wait()
