"""The parser of `edge`, and what every command does alike."""

import os
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

import edge.commands
from edge.__main__ import _COMMANDS, main

NOT_COMMANDS = {"__init__", "arguments", "event_loop"}


def run(*arguments: str, stdout: int, unbuffered: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "edge", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=env)


def test_every_module_of_a_command_is_in_the_table_and_offers_what_the_parser_calls() -> None:
    [folder] = edge.commands.__path__
    assert {path.stem for path in Path(folder).glob("*.py")} - NOT_COMMANDS == set(_COMMANDS)
    for name in _COMMANDS:
        module = import_module(f"edge.commands.{name}")
        assert list(signature(module.add_arguments).parameters) == ["parser"]
        assert list(signature(module.run).parameters) == ["parsed"]


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "edge 0.1.0\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_without_a_reader_is_a_failure_without_a_complaint(unbuffered: str) -> None:
    """As of every command's output: the closed pipe was met at the interpreter's end, which exits with 120 then."""
    reader, writer = os.pipe()
    os.close(reader)
    for arguments in (["--help"], ["schema", "--help"], ["--version"]):
        done = run(*arguments, stdout=writer, unbuffered=unbuffered)
        assert (arguments, done.returncode, done.stderr) == (arguments, 1, "")
    done = run("check", "--nothing", stdout=writer, unbuffered=unbuffered)
    assert done.returncode == 2
    assert "unrecognized arguments: --nothing" in done.stderr
    os.close(writer)
