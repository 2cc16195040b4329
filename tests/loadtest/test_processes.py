"""Processes of the benchmarks: started, pinned, read and stopped, with their children."""

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest import processes
from loadtest.processes import Process, ProcessError

PARENT = """
import os, socket, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"], stdout=-1)
child.stdout.readline()
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    server.accept()[0].close()
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + PARENT


def command(code: str, port: int) -> list[str]:
    return [sys.executable, "-c", code, str(port)]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Process]:
    port = processes.free_port()
    core = max(os.sched_getaffinity(0))
    with Process("parent", command(PARENT, port), tmp_path / "log", cores={core}) as process:
        process.wait_listening(port)
        yield process


def test_a_process_is_ready_when_it_listens_with_its_children_counted(running: Process) -> None:
    assert running.start_s > 0
    assert running.pids()[0] == running.pid
    assert len(running.pids()) == 2


def test_it_runs_on_the_cores_it_was_given_and_so_do_its_children(running: Process) -> None:
    core = max(os.sched_getaffinity(0))
    assert [os.sched_getaffinity(pid) for pid in running.pids()] == [{core}, {core}]


def test_what_a_tree_uses_is_summed(running: Process) -> None:
    first, second = running.pids()
    for read in (processes.pss_bytes, processes.descriptors, processes.cpu_s):
        assert read([first]) > 0
        assert read([first, second]) > read([first])
    assert processes.major_faults([first, second]) >= 0


def test_the_cpu_of_work_is_seen() -> None:
    before = processes.cpu_s([os.getpid()])
    sum(range(2_000_000))
    assert processes.cpu_s([os.getpid()]) > before


def test_a_process_that_is_gone_uses_nothing() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert processes.tree(done.pid) == []
    for read in (processes.pss_bytes, processes.descriptors, processes.cpu_s, processes.major_faults):
        assert read([done.pid]) == 0


def test_steal_is_a_part_of_all_time() -> None:
    steal_s, all_s = processes.steal_and_total_s()
    assert 0 <= steal_s < all_s


@pytest.mark.parametrize("code", [PARENT, STUBBORN], ids=["obedient", "stubborn"])
def test_at_the_end_the_whole_tree_is_gone(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_STOP_TIMEOUT_S", 0.1)
    port = processes.free_port()
    with Process("parent", command(code, port), tmp_path / "log", cores=os.sched_getaffinity(0)) as process:
        process.wait_listening(port)
        handles = [os.pidfd_open(pid) for pid in process.pids()]
    for handle in handles:
        assert select.select([handle], [], [], 20)[0], "a process of the tree lives on"
        os.close(handle)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_process_that_ends_before_it_listens_is_told_with_its_last_words(tmp_path: Path) -> None:
    code = "print('no such model'); raise SystemExit(1)"
    with (
        Process("broken", [sys.executable, "-c", code], tmp_path / "log", cores=os.sched_getaffinity(0)) as process,
        pytest.raises(ProcessError, match="broken did not start: no such model"),
    ):
        process.wait_listening(processes.free_port())


def test_the_environment_given_is_added(tmp_path: Path) -> None:
    code = "import os; raise SystemExit(os.environ['SIGN'] + os.environ['PATH'][:0])"
    with (
        Process(
            "asked", [sys.executable, "-c", code], tmp_path / "log", cores=os.sched_getaffinity(0),
            environment={"SIGN": "seen"},
        ) as process,
        pytest.raises(ProcessError, match="seen"),
    ):  # fmt: skip
        process.wait_listening(processes.free_port())


def test_signals_of_a_terminal_reach_only_the_benchmark_itself(running: Process) -> None:
    assert os.getpgid(running.pid) != os.getpgid(0)
