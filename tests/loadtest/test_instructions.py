"""What a request and an event take is counted, and two counts of one edge agree."""

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from loadtest import instructions
from loadtest.instructions import Callgrind, Cost, Opcodes, counted
from loadtest.peers.peer import ROOT


def test_request_and_event_of_a_running_edge_are_counted(tmp_path: Path) -> None:
    found = counted(Opcodes(tmp_path), ROOT, tmp_path, requests=10, streams=1)
    assert 1000 < found.request < 20_000
    assert 10 < found.event < found.request


@pytest.mark.skipif(shutil.which("callgrind_control") is None, reason="valgrind is not installed")
def test_instructions_are_those_since_the_last_reading(tmp_path: Path) -> None:
    counter = Callgrind(tmp_path)
    command = counter.command(["sh", "-c", "echo ready; read go; while :; do :; done"])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout.readline() == b"ready\n"
            counter.begin(process.pid)
            assert counter.read() == 0
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert counter.read() + counter.read() > 0
        finally:
            process.kill()


def test_table_says_which_interpreter_was_counted() -> None:
    said = instructions.text({"opcodes": Cost(4813.2, 79.0)})
    assert "opcodes               4,813           79" in said
    assert said.endswith(instructions.interpreter())


def test_what_is_no_checkout_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = argparse.Namespace(directory=tmp_path, requests=1, streams=1, json=None)
    assert instructions.main(arguments) == 2
    assert "is no checkout of the edge" in capsys.readouterr().err


def test_missing_valgrind_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert instructions.main(argparse.Namespace(directory=ROOT, requests=1, streams=1, json=None)) == 2
    assert "apt install valgrind" in capsys.readouterr().err
