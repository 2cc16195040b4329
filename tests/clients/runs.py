"""Plays all cases with one client: direct, and through an edge of its own."""

import json
import os
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from cases import CASES
from edge_process import EdgeProcess
from model_server import ModelServer
from sdks import Client
from verdicts import Row, Seen, judge

_LIMIT_S: Final = 300  # for one driver and all its cases
_DIRECT_KEY: Final = "sk-direct"  # the model server takes any
_DENIED: Final = next(case.model for case in CASES if case.name == "403")
_UNANSWERED: Final = {"bases": ["no answer in time"], "message": "", "text": "", "facts": {}}


def play(client: Client, command: list[str], edge_binary: Path) -> list[Row]:
    """Return what the user of `client` sees of each case."""
    direct, through = _play_direct(command), _play_through(command, edge_binary)
    return [
        Row(client.name, client.api, case, *seen, judge(client, case, *seen))
        for case in CASES
        for seen in ((direct[case.name], through[case.name]),)
    ]


def _play_direct(command: list[str]) -> dict[str, Seen]:
    server = ModelServer(streams_on=False)
    try:
        lines = _drive(command, server.url, _DIRECT_KEY)
    finally:
        server.close()
    return _seen(lines, server.asked, server.asked)


def _play_through(command: list[str], edge_binary: Path) -> dict[str, Seen]:
    server = ModelServer(streams_on=True)
    try:
        with EdgeProcess(edge_binary, server.url, _DENIED) as edge:
            _when(server.streaming, edge.ask_to_stop)
            lines = _drive(command, edge.url, edge.key)
            edge.ask_to_stop()
            edge.wait()
            asked = edge.asked()
    finally:
        server.close()
    return _seen(lines, {case.model: asked[case.model] or asked[case.name] for case in CASES}, server.asked)


def _when(event: threading.Event, then: Callable[[], None]) -> None:
    """Call `then` once the event has come; the case that lets it come is the last one."""

    def wait() -> None:
        if event.wait(_LIMIT_S):
            then()

    threading.Thread(target=wait, daemon=True).start()


def _drive(command: list[str], url: str, key: str) -> dict[str, dict[str, Any]]:
    """Run a driver over all cases; return its lines by the name of the case."""
    asked = [
        {"case": case.name, "model": case.model, "stream": not case.status, "key": f"{key}x" if wrong else key}
        for case in CASES
        for wrong in (case.name == "401",)
    ]
    words = "".join(f"{json.dumps(each)}\n" for each in asked)
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    # Nothing of this machine's settings reaches an SDK, and litellm fetches no list of prices.
    environment = kept | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONDONTWRITEBYTECODE": "1"}
    pipe = subprocess.PIPE
    driver = subprocess.Popen([*command, url], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
    try:
        printed, errors = driver.communicate(words, _LIMIT_S)
    except subprocess.TimeoutExpired:
        driver.kill()
        printed, errors = driver.communicate()
    else:
        if driver.returncode:
            raise SystemExit(f"{command[-1]} failed: {errors}")
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


def _seen(lines: Mapping[str, dict[str, Any]], asked: Mapping[str, int], reached: Mapping[str, int]) -> dict[str, Seen]:
    seen = {}
    for case in CASES:
        line = lines.get(case.name, _UNANSWERED)
        counts = (asked.get(case.model, 0), reached.get(case.model, 0))
        seen[case.name] = Seen(tuple(line["bases"]), line["message"], line["facts"], line["text"], *counts)
    return seen
