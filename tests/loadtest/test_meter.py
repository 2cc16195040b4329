"""What a load cost, and whether the machine was the benchmark's own meanwhile; the readings of the kernel are given."""

import os

import pytest

from loadtest import processes
from loadtest.meter import Meter

PROXY, UPSTREAM, GENERATOR = 11, 12, 13


class Kernel:
    """What `/proc` says, set by a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cpu_s = {PROXY: 5.0, UPSTREAM: 7.0, GENERATOR: 9.0}
        self.busy_s, self.steal_s, self.all_s, self.faults = 100.0, 1.0, 1000.0, 3
        monkeypatch.setattr(processes, "cpu_s", lambda pids: sum(self.cpu_s[pid] for pid in pids))
        monkeypatch.setattr(processes, "busy_s", lambda cores: self.busy_s)
        monkeypatch.setattr(processes, "cores_of", lambda pids: {0, 1})
        monkeypatch.setattr(processes, "steal_and_total_s", lambda: (self.steal_s, self.all_s))
        monkeypatch.setattr(processes, "major_faults", lambda pids: self.faults)
        monkeypatch.setattr("loadtest.meter.time.monotonic", lambda: self.all_s)

    def run(self, seconds: float, foreign_s: float = 0.0) -> None:
        """Let both cores be busy with ours, and somebody else take his part."""
        for pid, share in ((PROXY, 1.0), (UPSTREAM, 0.4), (GENERATOR, 0.3)):
            self.cpu_s[pid] += share * seconds
        self.busy_s += 1.7 * seconds + foreign_s
        self.all_s += seconds


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


@pytest.fixture
def meter(kernel: Kernel) -> Meter:
    return Meter([PROXY], [[UPSTREAM, GENERATOR]])


def test_a_machine_of_our_own_is_fit(kernel: Kernel, meter: Meter) -> None:
    with meter:
        kernel.run(4.0, foreign_s=0.04)  # as much as ticks may be off
    assert (meter.unfit, meter.cpu_s, meter.proxy_busy, meter.rig_busy) == ("", 4.0, 1.0, pytest.approx(0.7))


def test_another_program_on_our_cores_makes_the_round_unfit(kernel: Kernel, meter: Meter) -> None:
    with meter:
        kernel.run(4.0, foreign_s=0.4)
    assert meter.unfit == "another program took 5.0% of the cores"


def test_spans_add_up(kernel: Kernel, meter: Meter) -> None:
    for foreign_s in (0.0, 0.5):
        with meter:
            kernel.run(2.0, foreign_s)
        kernel.run(50.0, foreign_s=50.0)  # in between, where nothing is measured
    assert meter.cpu_s == pytest.approx(4.0)
    assert meter.foreign == pytest.approx(0.5 / 8)


def test_steal_and_faults_make_a_round_unfit(kernel: Kernel, meter: Meter) -> None:
    with meter:
        kernel.run(4.0)
        kernel.faults += 2
    assert meter.unfit == "2 major faults"
    with meter:
        kernel.run(4.0)
        kernel.steal_s += 1
    assert meter.unfit == "steal 12.5%"


def test_what_programs_ran_on_a_core_is_known() -> None:
    cores = processes.cores_of([os.getpid()])
    before = processes.busy_s(cores), processes.cpu_s([os.getpid()])
    while processes.cpu_s([os.getpid()]) < before[1] + 0.3:
        sum(range(100_000))
    assert processes.busy_s(cores) - before[0] >= 0.2
    assert processes.busy_s(()) == 0
