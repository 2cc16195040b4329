"""`edge init`: a first routes.toml that works as it is."""

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from edge.__main__ import main
from edge.commands.init import first_file
from edge.config.reading import parse
from edge.config.settings import Config, Engine
from edge.simulator.server import Simulator
from tests.conftest import StartEdge


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_file_that_is_written_has_no_problem_and_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "http://10.0.0.1:8000", "--model", "public/deepseek-r1", "--upstream-model", "r1"]) == 0
    assert "edge keys create --user" in capsys.readouterr().out
    assert main(["check"]) == 0
    assert capsys.readouterr().out == "routes.toml: ok, 1 routes, 1 pools\n"


def test_start_in_an_empty_folder_says_how_to_begin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.commands.serve.log_to_stderr", contextlib.nullcontext)  # which is for a whole process
    assert main(["serve"]) == 1
    assert "`edge init`" in capsys.readouterr().err


def test_file_that_is_there_is_never_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    Path("routes.toml").write_text("mine")
    assert main(["init"]) == 1
    assert "routes.toml is there already" in capsys.readouterr().err
    assert Path("routes.toml").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["http://h:1/v1/chat/completions"],
        ["h:1"],
        ["--model", "public/*"],
        ["--model", ""],
        ["--model", 'a"b'],
        ["--upstream-model", "$X"],
        ["--engine", "ollama"],
    ],
)
def test_what_would_be_no_sound_file_is_wrong_usage(arguments: list[str]) -> None:
    assert main(["init", *arguments]) == 2
    assert not Path("routes.toml").exists()


@pytest.mark.parametrize("engine", get_args(Engine))
def test_what_is_commented_out_is_sound_as_well(engine: Engine) -> None:
    text = re.sub(
        r"^(\s*)# (?=[\[{a-z_]+ ?[=\[.a-z]|\[|\{)", r"\1", first_file("http://h:1", "m", None, engine), flags=re.M
    )
    config = parse(re.sub(r"^tls.*\n", "", text, flags=re.M), Path("routes.toml"), {"UPSTREAM_KEY": "sk-x"})
    assert config.limits.keys() == {"standard"}
    assert len(config.pools["models"].endpoints) == 2
    assert config.pools["models"].queue == 100


async def test_file_serves(start_edge: StartEdge, simulator: Simulator, tmp_path: Path) -> None:
    config = parse(first_file(simulator.url, "public/my-model", None, "vllm"), tmp_path / "routes.toml", {})

    def adapt(other: Config) -> Config:
        return replace(other, pools=config.pools, routes=config.routes)

    edge = await start_edge("[pools.p]\nendpoints = ['http://p']\n[routes.r]\npool = 'p'", adapt=adapt)
    status, _, body = await edge.ask({"model": "public/my-model"})
    assert (status, json.loads(body)["model"]) == (200, "public/my-model")
